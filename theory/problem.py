"""A preference problem: models of one shape, a loss and learning rates, and gradients of log-probabilities in it.

The one implementation of inner products of log-probability gradients, shared prefixes included. With
`E_{v,k} = e_{v_k} - pi(. | x, v_<k)`, for any responses v (to x) and w (to x~) of the unconstrained-features model

    <grad ln pi(v|x), grad ln pi(w|x~)> = eta_W sum_{k,l} <E_{v,k}, E_{w,l}> <h_{x,v<k}, h_{x~,w<l}>
                                        + eta_h sum_{(k,l): same context} <W^T E_{v,k}, W^T E_{w,l}>

in the metric of the learning rates. Theorems 4 to 9 and Propositions 1 and 2 of Razin et al. (arXiv 2410.08847) split
it into named terms. Everything works on a batch of B models that share vocabulary, contexts and responses.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from theory._check import FloatArray, check_number
from theory.losses import Interval, Loss, MarginForm, MarginLoss, Pair, TokenLoss
from theory.model import Context, Response, Sample, UnconstrainedFeatures, _as_response, inner_products
from theory.pulls import token_slopes

Array = NDArray[np.floating[Any]]
SAME = 1e-14  # relative: log-probabilities this close differ by the order of their sums
RATE = Interval(low=0.0, open_low=False)
_BLOCK = 4096  # rows of a large W widened to float64 at a time


class Positions(NamedTuple):
    """A response as the contexts it is predicted from (rows of H) and the tokens predicted."""

    rows: tuple[int, ...]
    tokens: tuple[int, ...]


class Overlap(NamedTuple):
    """The parts of <grad ln pi(v), grad ln pi(w)>, one entry per pair of positions, (B, |v|, |w|) each.

    alpha : <E_{v,k}, E_{w,l}>, in [-2, 2] (alpha and beta of Theorems 3, 6 and 7).
    hidden : <h_{x,v<k}, h_{x~,w<l}>.
    unembedding : <W^T E_{v,k}, W^T E_{w,l}> where the contexts are one and the same, else 0.
    """

    alpha: Array
    hidden: Array
    unembedding: Array

    def through_W(self, eta_W: float) -> Array:
        """(B,) the part that comes from moving W."""
        return eta_W * np.einsum("bkl,bkl->b", self.alpha, self.hidden)

    def through_h(self, eta_h: float) -> Array:
        """(B,) the part that comes from moving hidden vectors."""
        return eta_h * self.unembedding.sum((1, 2))


@dataclass(frozen=True, eq=False)
class Problem:
    """B models of one shape with a loss and learning rates. The objective is the mean of the loss over the samples.

    W (B, V, d), H (B, n, d); references (B, S, 2): ln pi_ref of y+ and y- of each sample; `contexts` names the rows of
    H. `probe`: a (prompt, response) whose contexts are in the model, trained or not, for claims about other responses.
    `origin`: (W, H) of the reference models, for losses that look at tokens; default the models themselves, and kept
    when `dataclasses.replace` moves the parameters.
    """

    W: FloatArray
    H: FloatArray
    samples: tuple[Sample, ...]
    contexts: tuple[Context, ...]
    references: Array
    loss: Loss
    lr_unembedding: float = 1.0
    lr_hidden: float = 1.0
    probe: tuple[Hashable, Response] | None = None
    origin: tuple[FloatArray, FloatArray] | None = None
    _rows: dict[Context, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.loss, Loss):
            raise ValueError(f"loss must be a theory.losses.Loss instance, got {self.loss!r}")
        for name in ("lr_unembedding", "lr_hidden"):
            object.__setattr__(self, name, check_number(getattr(self, name), name, RATE))
        object.__setattr__(self, "_rows", {c: i for i, c in enumerate(self.contexts)})
        if self.origin is None:
            object.__setattr__(self, "origin", (self.W, self.H))
        wanted = {
            "H": (len(self), len(self.contexts), self.W.shape[2]),
            "references": (len(self), len(self.samples), 2),
        }
        for name, shape in wanted.items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {getattr(self, name).shape}")

    @classmethod
    def of(
        cls,
        models: UnconstrainedFeatures | Sequence[UnconstrainedFeatures],
        loss: Loss,
        lr_unembedding: float = 1.0,
        lr_hidden: float = 1.0,
        probe: tuple[Hashable, Response] | None = None,
    ) -> "Problem":
        """From one model, or several of one shape; a ValueError names the first that differs."""
        if isinstance(models, UnconstrainedFeatures):
            models = [models]
        if not models:
            raise ValueError("models must not be empty")
        first = models[0]
        check_one_shape(models)
        one = len(models) == 1  # a view, so that a language model's W is not copied
        W = first.W[None] if one else np.stack([m.W for m in models])
        H = first.H[None].astype(np.float64) if one else np.stack([m.H for m in models]).astype(np.float64)
        references = np.array([[s.reference[:2] for s in m.samples] for m in models])  # type: ignore[index]
        origins = zip(*(m.origin or () for m in models), strict=True)
        W_ref, H_ref = (x[0][None] if one else np.stack(x) for x in origins)
        return cls(
            W, H, first.samples, first.contexts, references, loss, lr_unembedding, lr_hidden, probe, (W_ref, H_ref)
        )

    def __len__(self) -> int:
        return len(self.W)

    @property
    def V(self) -> int:
        return self.W.shape[1]

    def model(self, i: int) -> UnconstrainedFeatures:
        """The i-th model of the batch, with its own frozen references."""
        assert self.origin is not None
        origin = self.origin[0][i], self.origin[1][i]
        stated = [s.reference if s.reference is not None else (0.0,) * len(s.responses) for s in self.samples]
        samples = tuple(
            replace(s, reference=(*map(float, r), *more[2:]))
            for s, r, more in zip(self.samples, self.references[i], stated, strict=True)
        )
        return UnconstrainedFeatures(self.W[i], self.H[i], samples, self.contexts, origin=origin)

    def take(self, which: Any) -> "Problem":
        """The given instances of the batch (an index array, mask or slice)."""
        assert self.origin is not None
        part = self.W[which], self.H[which], self.samples, self.contexts, self.references[which]
        origin = self.origin[0][which], self.origin[1][which]
        return Problem(*part, self.loss, self.lr_unembedding, self.lr_hidden, self.probe, origin)

    # ---- responses

    def positions(self, response: Iterable[int] | int, prompt: Hashable | None = None) -> Positions:
        """Rows of H and tokens of a response; a ValueError names a token out of range or a context without a row."""
        y = _as_response(response, "response")
        prompt = self.samples[0].prompt if prompt is None else prompt
        for t in y:
            if not 0 <= t < self.V:
                raise ValueError(f"response must be a token index in [0, {self.V}), got {t}")
        rows = []
        for k in range(len(y)):
            if (prompt, y[:k]) not in self._rows:
                raise ValueError(
                    f"response {y} visits the context {(prompt, y[:k])!r}, which has no hidden vector in the model"
                )
            rows.append(self._rows[(prompt, y[:k])])
        return Positions(tuple(rows), y)

    @cached_property
    def pairs(self) -> tuple[tuple[Positions, Positions], ...]:
        """(y+, y-) of every sample as positions."""
        return tuple(
            (self.positions(s.preferred, s.prompt), self.positions(s.dispreferred, s.prompt)) for s in self.samples
        )

    @cached_property
    def groups(self) -> tuple[tuple[Positions, ...], ...]:
        """Every response of every sample as positions."""
        return tuple(tuple(self.positions(y, s.prompt) for y in s.responses) for s in self.samples)

    @cached_property
    def logits(self) -> Array:
        """(B, n, V) <W_z, h>."""
        if len(self) == 1:
            return inner_products(self.W[0], self.H[0].T).T[None]
        return self.H @ self.W.transpose(0, 2, 1)

    @cached_property
    def log_pi(self) -> Array:
        """(B, n, V) ln pi(. | context)."""
        return log_softmax(self.logits, axis=-1)

    @cached_property
    def pi(self) -> Array:
        """(B, n, V) probabilities."""
        return np.exp(self.log_pi)

    def log_prob(self, y: Positions) -> Array:
        """(B,) ln pi(y), nats."""
        return self.log_pi[:, y.rows, y.tokens].sum(-1)

    def errors(self, y: Positions) -> Array:
        """(B, |y|, V) E = e_{y_k} - pi(. | context), the k-th entry kept to full relative precision as pi -> 1."""
        E = -self.pi[:, y.rows]
        k = np.arange(len(y.tokens))
        E[:, k, y.tokens] = 0.0
        E[:, k, y.tokens] = -E.sum(-1)
        return E

    def embeddings(self, y: Positions) -> Array:
        """(B, |y|, d) W^T E = W_{y_k} - Wbar(context)."""
        return self.through_rows(self.errors(y))

    def through_rows(self, weights: Array) -> Array:
        """(B, k, d) sums of the rows of W with the given weights (B, k, V)."""
        if len(self) > 1 or self.W.dtype == np.float64:
            return weights @ self.W
        out = np.zeros((1, weights.shape[1], self.W.shape[2]))
        for i in range(0, self.V, _BLOCK):
            out[0] += weights[0, :, i : i + _BLOCK] @ self.W[0, i : i + _BLOCK].astype(np.float64)
        return out

    def overlap(self, v: Positions, w: Positions) -> Overlap:
        """The inner product of the gradients of ln pi(v) and ln pi(w), position by position."""
        E, F = self.errors(v), self.errors(w)
        hidden = self.H[:, v.rows] @ self.H[:, w.rows].transpose(0, 2, 1)
        same = np.equal.outer(v.rows, w.rows)
        unembedding = np.zeros(hidden.shape)
        if same.any():
            k, l = np.nonzero(same.any(1))[0], np.nonzero(same.any(0))[0]  # the positions that meet another
            inner = self.through_rows(E[:, k]) @ self.through_rows(F[:, l]).transpose(0, 2, 1)
            unembedding[:, k[:, None], l] = inner
        return Overlap(E @ F.transpose(0, 2, 1), hidden, unembedding * same)

    def inner(self, v: Positions, w: Positions) -> Array:
        """(B,) <grad ln pi(v), grad ln pi(w)> in the metric of the learning rates."""
        parts = self.overlap(v, w)
        return parts.through_W(self.lr_unembedding) + parts.through_h(self.lr_hidden)

    def products(self, vectors: Array) -> Array:
        """(B, V) inner products of every row of W with one vector per instance, (B, d)."""
        if len(self) == 1:
            return inner_products(self.W[0], vectors[0][:, None])[None, :, 0]
        return np.einsum("bvd,bd->bv", self.W, vectors)

    # ---- the loss

    @cached_property
    def pair_log_probs(self) -> Array:
        """(B, S, 2) ln pi of y+ and of y- of every sample, nats: laid out as `references`."""
        return np.stack([np.stack([self.log_prob(w), self.log_prob(l)], axis=1) for w, l in self.pairs], axis=1)

    def _incentives(self, shift: float = 0.0) -> tuple[Array, Array]:
        """(d_w, d_l), (B, S) each, with u moved by `shift` times the sizes it is a difference of."""
        a, b = self.pair_log_probs[..., 0], self.pair_log_probs[..., 1]
        a_ref, b_ref = self.references[..., 0], self.references[..., 1]
        moved = shift * (abs(a) + abs(b) + abs(a_ref) + abs(b_ref))
        if isinstance(self.loss, MarginLoss):
            G = MarginForm(self.loss, a_ref - b_ref).slope(self.margins + moved)
            return G, G
        # A model at its reference is there, not a rounding beside it: losses may have a kink at that place (DPOP).
        a_ref, b_ref = (np.where(abs(x - r) <= SAME * (1 + abs(r)), x, r) for x, r in ((a, a_ref), (b, b_ref)))
        n_w, n_l = np.array([[len(y.tokens) for y in pair] for pair in self.pairs]).T
        return self.loss.incentives(Pair(a + moved, b, a_ref, b_ref, n_w, n_l, self.norm_ratios))

    @cached_property
    def norm_ratios(self) -> Array:
        """(B, S) |grad ln pi(y-)| / |grad ln pi(y+)| in the metric of the rates; ones unless the loss looks at it."""
        if not self.loss.uses_norms:
            return np.ones(self.references.shape[:2])
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.stack([np.sqrt(self.inner(l, l) / self.inner(w, w)) for w, l in self.pairs], axis=1)

    @property
    def has_margin_loss(self) -> bool:
        """Whether the loss is a function of the margin alone."""
        return isinstance(self.loss, MarginLoss)

    @cached_property
    def margins(self) -> Array:
        """(B, S) u = ln pi(y+) - ln pi(y-) of every sample, nats; in shared contexts from logits alone."""
        return np.stack([self._margin(w, l) for w, l in self.pairs], axis=1)

    def _margin(self, w: Positions, l: Positions) -> Array:
        shared = set(w.rows) & set(l.rows)
        u = np.zeros(len(self))
        for sign, y in ((1, w), (-1, l)):
            for row, token in zip(y.rows, y.tokens, strict=True):
                # The normaliser of a context that both visit cancels: left out, the digits stay.
                u += sign * (self.logits if row in shared else self.log_pi)[:, row, token]
        return u

    @property
    def margin(self) -> Array:
        """(B,) u of the first sample, nats."""
        return self.margins[:, 0]

    @property
    def reference_margin(self) -> Array:
        """(B,) u_ref of the first sample, nats."""
        return self.references[:, 0, 0] - self.references[:, 0, 1]

    @cached_property
    def incentives(self) -> tuple[Array, Array]:
        """(d_w, d_l), (B, S) each: -dL/d ln pi(y+) and dL/d ln pi(y-) per sample; both are G for a margin loss."""
        return self._incentives()

    @cached_property
    def incentive_sizes(self) -> tuple[Array, Array]:
        """(B, S) each: the size of the incentives together with what rounding of the margin makes of them.

        Near a minimiser the slope is a small difference of large terms (IPO's 1/tau - 2m): to first order its terms
        are as large as the slope's change when the margin moves by the sizes it is a difference of.
        """
        step = 1e-4
        low, high = self._incentives(-step), self._incentives(step)
        w, l = (abs(d) + abs(h - o) / (2 * step) for d, o, h in zip(self.incentives, low, high, strict=True))
        return w, l

    def rate(self, z: Positions) -> Array:
        """(B,) d/dt ln pi(z) = mean over samples of d_w <grad z, grad y+> - d_l <grad z, grad y->."""
        return self.rate_by_sample(z).sum(1)

    def rate_by_sample(self, z: Positions) -> Array:
        """(B, S) what each sample of the data contributes to d/dt ln pi(z)."""
        if isinstance(self.loss, TokenLoss):
            through_W, through_h = self.through_logits(z)
            return (through_W + through_h) / len(self.pairs)
        d_w, d_l = self.incentives
        plus = np.stack([self.inner(z, w) for w, _ in self.pairs], axis=1)
        minus = np.stack([self.inner(z, l) for _, l in self.pairs], axis=1)
        return (d_w * plus - d_l * minus) / len(self.pairs)

    @cached_property
    def _token_slopes(self) -> tuple[Array, Array]:
        """(B, S, n, V) each: dL/d ln pi(v | context) of each sample's token-level loss, and the sum of the sizes of
        what its responses contribute to it."""
        assert isinstance(self.loss, TokenLoss)
        assert self.origin is not None
        self.check_origin()
        ref = log_softmax(self.origin[1] @ self.origin[0].transpose(0, 2, 1), axis=-1)
        samples = zip(self.groups, (s.rewards or () for s in self.samples), strict=True)
        each = [token_slopes(self.loss, self.log_pi, ref, self.origin[1], *sample) for sample in samples]
        return np.stack([x.sum(0) for x in each], axis=1), np.stack([abs(x).sum(0) for x in each], axis=1)

    @property
    def pulls(self) -> Array:
        """(B, S, n, V) -dL/dlogits of each sample's loss in every context: what a token-level loss exerts."""
        slopes = self._token_slopes[0]
        return self.pi[:, None] * slopes.sum(-1, keepdims=True) - slopes

    def check_origin(self) -> None:
        """A ValueError if the samples state references that are not those of the reference model."""
        assert self.origin is not None
        seen = replace(self, W=self.origin[0], H=self.origin[1]).pair_log_probs
        gap = abs(seen - self.references)
        if (gap > 1e-6 * (1 + abs(seen))).any():
            raise ValueError(
                f"loss {self.loss!r} compares tokens with the reference model, but the samples' references are not its "
                f"own (off by up to {gap.max():.2g} nats): leave `reference` to the model, or give it its `origin`"
            )

    def through_logits(self, z: Positions) -> tuple[Array, Array]:
        """(B, S) each: the rate of ln pi(z) that comes from moving W, and from moving hidden vectors, when logits are
        pulled: the formula of the module with `pulls` in the place of E_w, times |D|."""
        return self._through(self.errors(z), z, self.H @ self.H.transpose(0, 2, 1), self.W, self.pulls)

    def _through(self, E: Array, z: Positions, hidden: Array, W: Array, pulls: Array) -> tuple[Array, Array]:
        through_W = np.einsum("bkv,bscv,bkc->bs", E, pulls, hidden[:, z.rows])
        moved = np.einsum("bskv,bvd->bskd", pulls[:, :, z.rows], W)
        through_h = np.einsum("bkv,bvd,bskd->bs", E, W, moved, optimize=True)
        return self.lr_unembedding * through_W, self.lr_hidden * through_h

    def rate_scale(self, z: Positions) -> Array:
        """(B,) the sum of the absolute terms of `rate`, every difference (e - pi, d) split up: what rounding sees."""
        if isinstance(self.loss, TokenLoss):
            H, slopes = abs(self.H), self._token_slopes[1]
            terms = slopes + self.pi[:, None] * slopes.sum(-1, keepdims=True)
            split = self.pi[:, z.rows] + np.eye(self.V)[list(z.tokens)]
            size_W, size_h = self._through(split, z, H @ H.transpose(0, 2, 1), abs(self.W), terms)
            return (size_W + size_h).sum(1) / len(self.pairs)
        sizes_w, sizes_l = self.incentive_sizes
        lengths = np.sqrt(np.einsum("bvd,bvd->bv", self.W, self.W))

        def inner(y: Positions) -> Array:
            p, q = self.pi[:, z.rows], self.pi[:, y.rows]
            alpha = np.equal.outer(z.tokens, y.tokens) + p @ q.transpose(0, 2, 1)
            alpha = alpha + p[:, :, y.tokens] + q[:, :, z.tokens].transpose(0, 2, 1)
            hidden = abs(self.H[:, z.rows]) @ abs(self.H[:, y.rows]).transpose(0, 2, 1)
            mean = np.einsum("bkv,bv->bk", p, lengths), np.einsum("bkv,bv->bk", q, lengths)
            rows = (lengths[:, z.tokens] + mean[0])[:, :, None] * (lengths[:, y.tokens] + mean[1])[:, None]
            same = np.equal.outer(z.rows, y.rows)
            return (self.lr_unembedding * alpha * hidden + self.lr_hidden * rows * same).sum((1, 2))

        plus = np.stack([inner(w) for w, _ in self.pairs], axis=1)
        minus = np.stack([inner(l) for _, l in self.pairs], axis=1)
        return (sizes_w * plus + sizes_l * minus).sum(1) / len(self.pairs)


def check_one_shape(models: Sequence[UnconstrainedFeatures]) -> None:
    """A ValueError names the first model that differs from model 0 in vocabulary, contexts or responses."""

    def shape(m: UnconstrainedFeatures) -> tuple[Any, ...]:
        return m.V, m.d, m.contexts, tuple((s.prompt, s.responses) for s in m.samples)

    for i, m in enumerate(models):
        if shape(m) != shape(models[0]):
            raise ValueError(f"models must share vocabulary, contexts and responses; model {i} differs from model 0")

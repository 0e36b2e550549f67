"""The unconstrained-features model: token unembeddings W and one free hidden vector per context.

Razin et al. (arXiv 2410.08847), Section 4: `pi(. | x, y_<k) = softmax(W h_{x,y_<k})`, where every distinct token
prefix owns a trainable hidden vector. Equal prefixes share one vector.
"""

import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax

from theory._check import FloatArray, check_array, unknown

Response = tuple[int, ...]
Context = tuple[Hashable, Response]
PROMPT: Hashable = "x"


@dataclass(frozen=True)
class Sample:
    """One prompt with two or more responses, the preferred one first.

    Attributes
    ----------
    prompt : any hashable label.
    responses : token sequences; `responses[0]` is y+, `responses[1]` is y-.
    reference : ln pi_ref(y | x) of each response (nats), frozen data of the sample. None means "the model this
        sample is first put in"; the model then fills it in.
    rewards : one number per response, for losses of several responses; default 1 for y+ and 0 for all others.
    """

    prompt: Hashable
    responses: tuple[Response, ...]
    reference: tuple[float, ...] | None = None
    rewards: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if len(self.responses) < 2:
            raise ValueError(f"responses must hold y+ and y- at least, got {len(self.responses)} response(s)")
        clean = tuple(_as_response(y, f"responses[{i}]") for i, y in enumerate(self.responses))
        if clean[0] == clean[1]:
            raise ValueError(f"y+ and y- must differ, both are {clean[0]}")
        object.__setattr__(self, "responses", clean)
        if self.reference is not None:
            ref = tuple(float(r) for r in self.reference)
            if len(ref) != len(clean) or not all(np.isfinite(ref)):
                raise ValueError(
                    f"reference must hold a finite log-probability per response ({len(clean)}), got {self.reference!r}"
                )
            object.__setattr__(self, "reference", ref)
        rewards = (1.0,) + (0.0,) * (len(clean) - 1) if self.rewards is None else tuple(map(float, self.rewards))
        if len(rewards) != len(clean) or not all(np.isfinite(rewards)):
            raise ValueError(f"rewards must hold a finite number per response ({len(clean)}), got {self.rewards!r}")
        object.__setattr__(self, "rewards", rewards)

    @property
    def preferred(self) -> Response:
        return self.responses[0]

    @property
    def dispreferred(self) -> Response:
        return self.responses[1]

    @property
    def reference_margin(self) -> float:
        """u_ref = ln pi_ref(y+ | x) - ln pi_ref(y- | x), in nats."""
        if self.reference is None:
            raise ValueError("reference is not set: put the sample into a model first, or state its log-probabilities")
        return self.reference[0] - self.reference[1]


def _as_response(tokens: Any, name: str) -> Response:
    if isinstance(tokens, int | np.integer) and not isinstance(tokens, bool):
        tokens = (tokens,)
    if isinstance(tokens, str) or not isinstance(tokens, Iterable):
        raise ValueError(f"{name} must be a sequence of token indices, got {tokens!r}")
    response = tuple(tokens)
    if not response:
        raise ValueError(f"{name} must not be empty")
    for t in response:
        if isinstance(t, bool) or not isinstance(t, int | np.integer):
            raise ValueError(f"{name} must hold integer token indices, got {t!r}")
    return tuple(int(t) for t in response)


def contexts_of(samples: Sequence[Sample]) -> tuple[Context, ...]:
    """Every distinct (prompt, prefix) that some response visits, in order of first visit."""
    seen: dict[Context, None] = {}
    for sample in samples:
        for y in sample.responses:
            for k in range(len(y)):
                seen.setdefault((sample.prompt, y[:k]))
    return tuple(seen)


@dataclass(frozen=True, eq=False, repr=False)
class UnconstrainedFeatures:
    """Token unembeddings, hidden vectors per context, and preference samples. Frozen and validated.

    Parameters
    ----------
    W : (V, d) float32 or float64 token unembeddings; not copied.
    H : (n, d) hidden vectors, row i belonging to `contexts[i]`.
    samples : preference data; missing references become those of this model.
    contexts : (prompt, prefix) of each row of H; default `contexts_of(samples)`.
    tokens : V names, optional.
    origin : (W, H) of the reference model, for losses that compare whole next-token distributions; default: this model.
        Parameters that move keep it.

    Raises
    ------
    ValueError : wrong shapes, NaN or inf, a token index outside [0, V), y+ = y-, a context without a row.
    """

    W: FloatArray
    H: FloatArray
    samples: tuple[Sample, ...]
    contexts: tuple[Context, ...] = ()
    tokens: Sequence[str] | None = None
    origin: tuple[FloatArray, FloatArray] | None = None
    _rows: dict[Context, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("W", check_array(self.W, "W", (None, None)))
        V, d = self.W.shape
        if V < 2:
            raise ValueError(f"W must have at least 2 rows (tokens), got shape {self.W.shape}")
        put("samples", tuple(self.samples))
        if not self.samples:
            raise ValueError("samples must not be empty")
        for i, sample in enumerate(self.samples):
            for y in sample.responses:
                for t in y:
                    if not 0 <= t < V:
                        raise ValueError(f"token index in samples[{i}] must be in [0, {V}), got {t}")
        put("contexts", tuple(self.contexts) or contexts_of(self.samples))
        put("H", check_array(self.H, "H", (len(self.contexts), d)))
        put("_rows", {c: i for i, c in enumerate(self.contexts)})
        if len(self._rows) != len(self.contexts):
            raise ValueError("contexts must be distinct")
        for context in contexts_of(self.samples):
            if context not in self._rows:
                raise ValueError(f"context {context!r} of a sample has no row in H")
        if self.tokens is not None:
            put("tokens", tuple(str(t) for t in self.tokens))
            if len(self.tokens) != V:
                raise ValueError(f"tokens must name all {V} rows of W, got {len(self.tokens)} names")
        if self.origin is None:
            put("origin", (self.W, self.H))
        else:
            shapes = self.W.shape, self.H.shape
            put("origin", tuple(check_array(x, "origin", s) for x, s in zip(self.origin, shapes, strict=True)))
        put("samples", tuple(self._with_reference(s) for s in self.samples))

    def _with_reference(self, sample: Sample) -> Sample:
        if sample.reference is not None:
            return sample
        return replace(sample, reference=tuple(self.log_prob(y, sample.prompt) for y in sample.responses))

    @classmethod
    def single_token(
        cls,
        W: ArrayLike,
        h: ArrayLike,
        preferred: int | str,
        dispreferred: int | str,
        tokens: Sequence[str] | None = None,
        reference: tuple[float, float] | None = None,
    ) -> Self:
        """One prompt, two one-token responses.

        Parameters
        ----------
        W : (V, d) token unembeddings.
        h : (d,) hidden vector of the prompt.
        preferred, dispreferred : token index, or a name in `tokens`.
        tokens : V names, optional.
        reference : (ln pi_ref(y+), ln pi_ref(y-)); default: of this model, as when training starts at the reference.
        """
        W = check_array(W, "W", (None, None))
        h = check_array(h, "h", (W.shape[1],))
        pair = []
        for value, name in ((preferred, "preferred"), (dispreferred, "dispreferred")):
            index = token_index(value, tokens, name)
            if not 0 <= index < W.shape[0]:
                raise ValueError(f"{name} must be a token index in [0, {W.shape[0]}), got {index}")
            pair.append((index,))
        if pair[0] == pair[1]:
            raise ValueError(f"preferred and dispreferred must differ, both are {preferred!r}")
        return cls(W, h[None, :], (Sample(PROMPT, tuple(pair), reference),), tokens=tokens)

    @classmethod
    def from_samples(
        cls,
        W: ArrayLike,
        hidden: Mapping[Context, ArrayLike] | ArrayLike,
        samples: Sequence[Sample],
        tokens: Sequence[str] | None = None,
    ) -> Self:
        """A model of the contexts that the samples visit; `hidden` maps each to its vector or is (n, d) in order.

        Further contexts in the mapping are kept: those of responses that are not trained, but asked about.
        """
        contexts = contexts_of(samples)
        if isinstance(hidden, Mapping):
            contexts += tuple((p, tuple(y)) for p, y in hidden if (p, tuple(y)) not in contexts)
            missing = [c for c in contexts if c not in hidden]
            if missing:
                raise ValueError(f"hidden has no vector for context {missing[0]!r}")
            hidden = np.stack([np.asarray(hidden[c]) for c in contexts])
        return cls(np.asarray(W), np.asarray(hidden), tuple(samples), contexts, tokens)

    def with_parameters(self, W: ArrayLike, H: ArrayLike) -> Self:
        """The same samples with the same frozen references, at other parameters (a restart midway)."""
        return type(self)(np.asarray(W), np.asarray(H), self.samples, self.contexts, self.tokens, self.origin)

    @property
    def V(self) -> int:
        """Number of tokens."""
        return self.W.shape[0]

    @property
    def d(self) -> int:
        """Dimension of embeddings."""
        return self.W.shape[1]

    @property
    def h(self) -> FloatArray:
        """(d,) hidden vector of the first sample's prompt."""
        return self.H[self._rows[(self.samples[0].prompt, ())]]

    def context_row(self, prompt: Hashable, prefix: Response = ()) -> int:
        """Row of H that belongs to a context."""
        try:
            return self._rows[(prompt, tuple(prefix))]
        except KeyError:
            raise ValueError(f"context {(prompt, tuple(prefix))!r} is not in the model") from None

    def next_token_log_probs(self, prompt: Hashable = PROMPT, prefix: Response = ()) -> NDArray[np.float64]:
        """(V,) ln pi(. | prompt, prefix), in nats."""
        return log_softmax(inner_products(self.W, self.H[self.context_row(prompt, prefix)][:, None])[:, 0])

    def log_prob(self, response: Iterable[int] | int, prompt: Hashable | None = None) -> float:
        """ln pi(response | prompt) in nats: the sum over its tokens. Default prompt: that of the first sample."""
        y = _as_response(response, "response")
        prompt = self.samples[0].prompt if prompt is None else prompt
        if not all(0 <= t < self.V for t in y):
            raise ValueError(f"response must hold token indices in [0, {self.V}), got {y}")
        return float(sum(self.next_token_log_probs(prompt, y[:k])[t] for k, t in enumerate(y)))

    @cached_property
    def single_pair(self) -> tuple[int, int]:
        """(y+, y-) of a model with one sample of two single-token responses; a ValueError for any other model."""
        first = self.samples[0]
        if len(self.samples) != 1 or [len(y) for y in first.responses] != [1, 1] or len(self.contexts) != 1:
            raise ValueError(
                f"model must have one sample with two single-token responses, got {len(self.samples)} sample(s) "
                f"with response lengths {[[len(y) for y in s.responses] for s in self.samples][:3]}"
            )
        return first.preferred[0], first.dispreferred[0]

    def name(self, token: int) -> str:
        """The token's name, or its index as text."""
        return self.tokens[token] if self.tokens is not None else str(token)

    def __repr__(self) -> str:
        pairs = ", ".join(
            f"{'+'.join(map(self.name, s.preferred))} > {'+'.join(map(self.name, s.dispreferred))}"
            for s in self.samples[:3]
        )
        more = ", ..." if len(self.samples) > 3 else ""
        return f"UnconstrainedFeatures(V={self.V}, d={self.d}, contexts={len(self.contexts)}, samples=[{pairs}{more}])"


def token_index(token: int | str, tokens: Sequence[str] | None, name: str) -> int:
    """Index of a token given by index or by name; `name` is the argument's name for the error."""
    if isinstance(token, str):
        if tokens is None:
            raise ValueError(f"{name} is the name {token!r}, but tokens was not given")
        rows = [i for i, t in enumerate(tokens) if t == token]
        if not rows:
            raise ValueError(f"{name}: " + unknown("token", token, tokens))
        if len(rows) > 1:
            raise ValueError(f"{name}: {token!r} names several rows of W ({rows[:4]}); give the index")
        return rows[0]
    if isinstance(token, bool) or not isinstance(token, int | np.integer):
        raise ValueError(f"{name} must be a token index or name, got {token!r}")
    return int(token)


def inner_products(
    W: FloatArray, vectors: NDArray[np.floating[Any]], block_bytes: int = 1 << 20
) -> NDArray[np.float64]:
    """(V, k) inner products of the rows of W with the columns of `vectors` (d, k), as float64.

    A float64 W, and a float32 W below 64 MiB, is multiplied in float64. A larger float32 W (a language model's) is
    read once in blocks that stay in cache and multiplied in float32: widening it would cost several times the read.
    The error is then about 1e-7 |W_z| |vector|.
    """
    V, d = W.shape
    if W.dtype == np.float64 or W.nbytes < 1 << 26:
        return W.astype(np.float64, copy=False) @ np.asarray(vectors, dtype=np.float64)
    columns = [np.ascontiguousarray(v, dtype=np.float32) for v in vectors.T]
    out = np.empty((V, len(columns)))
    rows = max(1, block_bytes // (W.itemsize * d))

    def stripe(begin: int, end: int) -> None:
        for start in range(begin, end, rows):
            stop = min(start + rows, end)
            for k, column in enumerate(columns):
                out[start:stop, k] = np.dot(W[start:stop], column)  # dot, not @: it lets the other threads run

    # Own threads over blocks too small for BLAS to share out: waiting for its threads at the end of every block costs
    # as much as the block, and many times that on a busy machine.
    threads = min(8, os.cpu_count() or 1)
    edges = [V * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(stripe, edges[:-1], edges[1:]))
    return out

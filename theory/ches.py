r"""CHES, its length-normalised form, the exact term it stands for, and the scores it is compared with.

Razin et al. (arXiv 2410.08847), Section 5. With h_k the hidden vector that predicts token k of a response, given the
prompt and the k - 1 tokens before it (so h_1 is the prompt's, and the state after the last token does not take part),

    CHES    = <S+, S-> - |S+|^2 = <S+, S- - S+>,    S+- = sum of the n+- hidden vectors              (Definition 2)
    ln-CHES = the same with the means S+-/n+- in place of the sums                                   (Definition 3)
    exact   = sum alpha^-_kk' <h+_k, h-_k'> - sum alpha^+_kk' <h+_k, h+_k'>                          (Theorems 3 and 6)

The larger, the more ln pi(y+) is expected to fall. CHES is the exact term with every alpha set to 1. Edit similarity
and the inner product of last hidden vectors are the rivals of the paper's Figure 2; larger means more alike.

Scores are taken in difference form from sums accumulated in float64 of blocks of 64 positions in float32: the
product form loses all digits of half-precision states, and half-precision sums overflow or stop growing. torch tensors
are recognised by their type and used through their own methods; torch itself is not imported.

Identical responses score exactly 0, and so do any two single-token responses to one prompt (both sums are h_1). If y+
is a prefix of y-, CHES is <S+, R> with R the sum over the rest of y-; if y- is a prefix of y+, it is -<S+, R>.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import log_softmax, logsumexp

from theory._check import check_array, check_count
from theory.model import UnconstrainedFeatures, inner_products

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
States = Any  # numpy array, torch tensor on any device, or nested lists

# Positions summed in float32 before the sum goes to float64. Half-precision states, of 8 or 11 significant bits, lose
# almost nothing in it.
BLOCK = 64
# Entries converted at a time, within which torch does not wake its threads: on a busy machine they cost far more than
# the work.
SERIAL = 1 << 15


def ches_score(hidden_preferred: States, hidden_dispreferred: States, length_normalize: bool = False) -> float:
    """CHES of one pair, or ln-CHES.

    Parameters
    ----------
    hidden_preferred, hidden_dispreferred : (n+, d) and (n-, d) hidden vectors that predict the tokens of y+ and y-,
        numpy or torch, any floating dtype and device.
    length_normalize : Definition 3 in place of Definition 2.

    Error: at most 8e-6 N+ (N+ + N-), with N+- the sum of the norms |h_k| over a response. Measured at d = 4096 on up
    to 1000 states with a common mean: 1e-7 |S+| |S- - S+| for float32, 1e-8 of it for half precision.

    Raises
    ------
    ValueError : not two dimensions, no position, different d, integers, NaN or inf.
    """
    plus = _states(hidden_preferred, "hidden_preferred", 2)
    minus = _states(hidden_dispreferred, "hidden_dispreferred", 2)
    return float(ches_scores(plus[None], minus[None], length_normalize=length_normalize)[0])


def ches_scores(
    hidden_preferred: States,
    hidden_dispreferred: States,
    mask_preferred: Any = None,
    mask_dispreferred: Any = None,
    length_normalize: bool = False,
) -> Array:
    """(B,) CHES of a padded batch, float64 numpy whatever comes in. Reads the states once.

    Parameters
    ----------
    hidden_preferred, hidden_dispreferred : (B, T+, d) and (B, T-, d), both numpy or both torch on one device.
    mask_preferred, mask_dispreferred : (B, T+) and (B, T-), bool or 0/1: true where the state predicts a token of the
        response. None: everywhere. Padding may be on either side or in between; what the states hold there, NaN and
        inf included, has no effect. For states of prompt + response this is the completion mask shifted by one:
        `completion_mask[:, 1:]` with `hidden[:, :-1]`.

    Raises
    ------
    ValueError : wrong shapes, integers, a response without positions, NaN or inf at a position of a response.
    """
    plus = _Batch.of(hidden_preferred, mask_preferred, "preferred", length_normalize)
    minus = _Batch.of(hidden_dispreferred, mask_dispreferred, "dispreferred", length_normalize)
    if plus.x.shape[0] != minus.x.shape[0] or plus.x.shape[2] != minus.x.shape[2]:
        shapes = f"{tuple(plus.x.shape)} and {tuple(minus.x.shape)}"
        raise ValueError(f"hidden_preferred and hidden_dispreferred must agree in batch size and d, got {shapes}")
    if _is_tensor(plus.x) != _is_tensor(minus.x) or (_is_tensor(plus.x) and plus.x.device != minus.x.device):
        raise ValueError("hidden_preferred and hidden_dispreferred must both be numpy, or both torch on one device")
    if _is_tensor(plus.x) and plus.x.device.type != "cpu":
        return _scores_on_device(plus, minus)
    scores = np.empty(len(plus.keep))
    for b in range(len(scores)):
        S_plus = _sum(plus, b)
        scores[b] = S_plus @ (_sum(minus, b) - S_plus)
    return scores


@dataclass(frozen=True, eq=False)
class _Batch:
    """The states x (B, T, d) of B responses, which positions count, and the weight (B,) of each response's sum."""

    x: Any
    keep: Mask
    weight: Array
    name: str

    @classmethod
    def of(cls, hidden: States, mask: Any, name: str, mean: bool) -> "_Batch":
        x = _states(hidden, f"hidden_{name}", 3)
        keep = _mask(mask, f"mask_{name}", tuple(x.shape[:2]))
        return cls(x, keep, 1 / keep.sum(axis=1) if mean else np.ones(len(keep)), f"hidden_{name}")


def _is_tensor(x: Any) -> bool:
    return any(c.__module__.split(".")[0] == "torch" for c in type(x).__mro__)


def _states(value: States, name: str, dimensions: int) -> Any:
    """The states as an array or detached tensor of floats; finiteness is seen in the sums."""
    shape = {1: "(d,)", 2: "(positions, d)", 3: "(pairs, positions, d)"}[dimensions]
    if _is_tensor(value):
        value = value.detach()
        floating = value.is_floating_point()
    else:
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise ValueError(f"{name} must have shape {shape}, got a ragged list; pad it and give masks") from error
        floating = value.dtype.kind == "f"
    if value.ndim != dimensions or 0 in value.shape:
        raise ValueError(f"{name} must have shape {shape}, no size 0, got {tuple(value.shape)}")
    if not floating:
        raise ValueError(f"{name} must hold floating-point numbers, got dtype {value.dtype}")
    return value


def _mask(mask: Any, name: str, shape: tuple[int, ...]) -> Mask:
    if mask is None:
        return np.ones(shape, dtype=bool)
    try:
        array = mask.cpu().double().numpy() if _is_tensor(mask) else np.asarray(mask)
    except ValueError as error:
        raise ValueError(f"{name} must have shape {shape}, got a ragged list") from error
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    keep = array == 1
    if not (keep | (array == 0)).all():
        raise ValueError(f"{name} must hold booleans or 0 and 1, got {array[~(keep | (array == 0))][0]!r}")
    if not keep.any(axis=1).all():
        raise ValueError(f"{name} must leave every response a position, row {int(keep.any(axis=1).argmin())} has none")
    return keep


def _sum(batch: _Batch, b: int) -> Array:
    """(d,) weighted sum of response b, in main memory."""
    x, positions = batch.x[b], np.flatnonzero(batch.keep[b])
    total = np.zeros(x.shape[1])
    with np.errstate(over="ignore", invalid="ignore"):
        for block in _blocks(x, positions):
            total += block.sum(axis=0)
        if not np.isfinite(total).all():  # a bad entry, or finite ones whose sum leaves float32
            total[:] = 0
            for block in _blocks(x, positions):
                total += block.sum(axis=0, dtype=np.float64)
    if not np.isfinite(total).all():
        raise ValueError(f"{batch.name} must be finite and have a finite sum, response {b} has not")
    return batch.weight[b] * total


def _blocks(x: Any, positions: NDArray[np.intp]) -> Iterator[NDArray[np.floating[Any]]]:
    """The states (T, d) at the positions, as numpy blocks of float32 or wider, each to be used before the next."""
    x = x.cpu() if _is_tensor(x) else x
    narrow = _is_tensor(x) and x.element_size() < 4
    buffer: Any = x[:0].float().new_empty((min(BLOCK, len(positions)), x.shape[1])) if narrow else None
    rows = max(1, SERIAL // x.shape[1])
    for start in range(0, len(positions), BLOCK):
        at = positions[start : start + BLOCK]
        first, last = int(at[0]), int(at[-1])
        block = x[first : last + 1] if last - first + 1 == len(at) else x[at]  # a slice is not copied
        if narrow:
            for i in range(0, len(at), rows):
                buffer[i : min(i + rows, len(at))] = block[i : i + rows]
            block = buffer[: len(at)]
        if _is_tensor(block):
            block = block.numpy()
        yield block.astype(np.float32) if block.dtype == np.float16 else block


def _scores_on_device(plus: _Batch, minus: _Batch) -> Array:
    """(B,) scores on an accelerator, where a loop over pairs would cost more than the sums."""
    S_plus, S_minus = _sums_on_device(plus), _sums_on_device(minus)
    return (S_plus * (S_minus - S_plus)).sum(-1).cpu().numpy()


def _sums_on_device(batch: _Batch) -> Any:
    """(B, d) weighted sums as a float64 tensor."""
    x = batch.x
    drop = None if batch.keep.all() else ~x.new_tensor(batch.keep).bool().unsqueeze(-1)
    wide = x.dtype if x.element_size() == 8 else x[:0].float().dtype
    total: Any = 0
    for start in range(0, x.shape[1], BLOCK):
        part = x[:, start : start + BLOCK]
        if drop is not None:
            part = part.masked_fill(drop[:, start : start + BLOCK], 0)
        part = part.sum(1, dtype=wide)
        total = total + (part.cpu() if x.device.type == "mps" else part).double()  # that device has no float64
    total = total * total.new_tensor(batch.weight).unsqueeze(-1)
    for b in np.flatnonzero(~total.isfinite().all(-1).cpu().numpy()):
        total[int(b)] = total.new_tensor(_sum(batch, int(b)))
    return total


@dataclass(frozen=True, eq=False, repr=False)
class SequenceTerms:
    """The hidden-vector part of Theorem 6 for one pair, alphas kept. All values at one moment, rates and G left out.

    alpha_minus (n+, n-), alpha_plus (n+, n+) : <e_{y_k} - pi_k, e_{y_k'} - pi_k'>, in [-2, 2].
    inner_minus (n+, n-), inner_plus (n+, n+) : <h+_k, h-_k'>, <h+_k, h+_k'>.
    """

    alpha_minus: Array
    alpha_plus: Array
    inner_minus: Array
    inner_plus: Array

    @property
    def alpha_weighted(self) -> float:
        """sum alpha^- <h+, h-> - sum alpha^+ <h+, h+>: how fast hidden vectors pull ln pi(y+) down."""
        return float((self.alpha_minus * self.inner_minus).sum() - (self.alpha_plus * self.inner_plus).sum())

    @property
    def ches(self) -> float:
        """The same with every alpha 1, by the double sum."""
        return float(self.inner_minus.sum() - self.inner_plus.sum())

    @property
    def share_positive_minus(self) -> float:
        """Share of positive alpha^-."""
        return float((self.alpha_minus > 0).mean())

    @property
    def share_positive_plus(self) -> float:
        """Share of positive alpha^+."""
        return float((self.alpha_plus > 0).mean())

    @property
    def share_positive(self) -> float:
        """Share of positive alphas of both kinds: above 0.69 on average in the paper's models."""
        positive = (self.alpha_minus > 0).sum() + (self.alpha_plus > 0).sum()
        return float(positive / (self.alpha_minus.size + self.alpha_plus.size))

    @property
    def largest_alpha(self) -> float:
        """Largest |alpha|, at most 2."""
        return float(max(np.abs(self.alpha_minus).max(), np.abs(self.alpha_plus).max()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the matrices as nested lists, and every number of the summary."""
        matrices = {name: value.tolist() for name, value in asdict(self).items()}
        return matrices | {name: getattr(self, name) for name in _SUMMARY}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        n, m = self.alpha_minus.shape
        rows = "\n".join(f"  {label:46} {getattr(self, name):+.6g}" for name, label in _SUMMARY.items())
        return f"hidden-vector terms of a pair of lengths {n} and {m}\n{rows}"


_SUMMARY = {
    "alpha_weighted": "sum alpha^- <h+, h-> - sum alpha^+ <h+, h+>",
    "ches": "CHES: every alpha 1",
    "share_positive": "share of positive alphas",
    "share_positive_minus": "  of alpha^-",
    "share_positive_plus": "  of alpha^+",
    "largest_alpha": "largest |alpha| (at most 2)",
}


def sequence_terms(
    hidden_preferred: ArrayLike,
    hidden_dispreferred: ArrayLike,
    tokens_preferred: Sequence[int],
    tokens_dispreferred: Sequence[int],
    *,
    W: ArrayLike | None = None,
    log_probs: tuple[ArrayLike, ArrayLike] | None = None,
) -> SequenceTerms:
    """The terms of Theorem 6 that hold the alphas. numpy; time and memory of (n+ + n-) V numbers.

    Parameters
    ----------
    hidden_preferred, hidden_dispreferred : (n+, d), (n-, d) hidden vectors that predict the tokens.
    tokens_preferred, tokens_dispreferred : the n+ and n- tokens.
    W : (V, d) unembeddings, from which pi_k = softmax(W h_k); or
    log_probs : ln pi_k as a pair of (n+, V) and (n-, V), for models whose logits are not W h.

    The double sums hold whether or not the responses share a prefix; what the unembeddings add (S and m of Theorem 6,
    and one inner product for every further shared context) is not part of this record.

    Raises
    ------
    ValueError : both or none of W and log_probs, wrong shapes, NaN or inf, a token outside [0, V), log_probs whose
        probabilities do not sum to 1 within 1e-3.
    """
    if (W is None) == (log_probs is None):
        raise ValueError("W or log_probs must be given, and not both")
    plus = check_array(hidden_preferred, "hidden_preferred", (None, None)).astype(np.float64)
    minus = check_array(hidden_dispreferred, "hidden_dispreferred", (None, plus.shape[1])).astype(np.float64)
    if W is not None:
        W = check_array(W, "W", (None, plus.shape[1]))
        of_plus, of_minus = (log_softmax(inner_products(W, h.T).T, axis=1) for h in (plus, minus))
    else:
        of_plus, of_minus = log_probs  # type: ignore[misc]
    e_plus = _errors(of_plus, tokens_preferred, len(plus), "preferred")
    e_minus = _errors(of_minus, tokens_dispreferred, len(minus), "dispreferred")
    if e_plus.shape[1] != e_minus.shape[1]:
        raise ValueError(f"log_probs must agree in V, got {e_plus.shape[1]} and {e_minus.shape[1]}")
    return SequenceTerms(e_plus @ e_minus.T, e_plus @ e_plus.T, plus @ minus.T, plus @ plus.T)


def _errors(log_probs: ArrayLike, tokens: Sequence[int], n: int, name: str) -> Array:
    """(n, V) e_{y_k} - pi_k, with all digits of 1 - pi_k(y_k)."""
    log_pi = np.asarray(log_probs, dtype=np.float64)  # -inf is a probability of 0
    if log_pi.ndim != 2 or log_pi.shape[0] != n or not np.abs(logsumexp(log_pi, axis=1)).max() <= 1e-3:
        raise ValueError(f"log_probs of the {name} response must be (n = {n}, V) normalised log-probabilities")
    if len(tokens) != n:
        raise ValueError(f"tokens_{name} must hold a token for each of the {n} hidden vectors, got {len(tokens)}")
    y = np.array([check_count(t, f"tokens_{name}", low=0) for t in tokens])
    if y.max() >= log_pi.shape[1]:
        raise ValueError(f"tokens_{name} must be in [0, {log_pi.shape[1]}), got {y.max()}")
    errors = -np.exp(log_pi)
    errors[np.arange(n), y] = -np.expm1(log_pi[np.arange(n), y])
    return errors


def sample_terms(model: UnconstrainedFeatures, sample: int = 0) -> SequenceTerms:
    """`sequence_terms` of a model's sample, at the model's parameters."""
    if check_count(sample, "sample", low=0) >= len(model.samples):
        raise ValueError(f"sample must be below {len(model.samples)}, got {sample}")
    s = model.samples[sample]
    plus, minus = (
        model.H[[model.context_row(s.prompt, y[:k]) for k in range(len(y))]] for y in (s.preferred, s.dispreferred)
    )
    return sequence_terms(plus, minus, s.preferred, s.dispreferred, W=model.W)


def last_hidden_inner_product(hidden_preferred: States, hidden_dispreferred: States) -> float:
    """<h+, h-> of the last hidden vectors (d,) of the two responses, in float64; numpy or torch."""
    plus = _Batch.of(_states(hidden_preferred, "hidden_preferred", 1)[None, None], None, "preferred", False)
    minus = _Batch.of(_states(hidden_dispreferred, "hidden_dispreferred", 1)[None, None], None, "dispreferred", False)
    S_plus, S_minus = _sum(plus, 0), _sum(minus, 0)
    if S_plus.shape != S_minus.shape:
        raise ValueError(f"hidden vectors must agree in d, got {len(S_plus)} and {len(S_minus)}")
    return float(S_plus @ S_minus)


def edit_similarity(tokens_preferred: Sequence[Hashable], tokens_dispreferred: Sequence[Hashable]) -> float:
    """Minus the Levenshtein distance over the longer length: 0 for equal responses, -1 for nothing in common.

    Needs rapidfuzz (extra `ches`).
    """
    try:
        from rapidfuzz.distance import Levenshtein
    except ImportError as error:
        raise ImportError(
            "edit_similarity needs rapidfuzz: python3 -m pip install 'likelihood-displacement[ches]'"
        ) from error
    pair = []
    for tokens, name in ((tokens_preferred, "tokens_preferred"), (tokens_dispreferred, "tokens_dispreferred")):
        plain = tokens.tolist() if hasattr(tokens, "tolist") else tokens  # type: ignore[attr-defined]
        if isinstance(plain, str) or not isinstance(plain, Sequence) or not plain or isinstance(plain[0], list):
            raise ValueError(f"{name} must be a sequence of tokens, not empty, got {tokens!r}")
        pair.append(plain)
    return -float(Levenshtein.normalized_distance(*pair))

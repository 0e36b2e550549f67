"""Losses of single tokens or of groups: values, gradients, extremes, and the claims that were made."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy.special import log_softmax, logsumexp

from theory.check._base import Check, differences, no_memory, tensor, tensors
from theory.losses import Group, TokenLoss, Tokens

_LENGTHS = (3, 5, 4)
_DIFFERENTIATED = ("log_prob", "kl", "log_sum_sq")


def response(rng: np.random.Generator, n: int, scale: float = 1.0, lead: tuple[int, ...] = ()) -> Tokens:
    """n tokens drawn from random next-token distributions over 7 tokens, with those of a reference model."""
    logits, other = rng.normal(size=(2, *lead, n, 7)) * scale
    lp, ref = log_softmax(logits, -1), log_softmax(other, -1)
    token = rng.integers(7, size=(*lead, n, 1))
    pick = lambda x: np.take_along_axis(x, token, -1)[..., 0]  # noqa: E731
    kl = (np.exp(ref) * (ref - lp)).sum(-1)
    return Tokens(pick(lp), pick(ref), kl, logsumexp(2 * lp, axis=-1), rng.normal(size=(*lead, n, 4)))


def group(seed: int, scale: float = 1.0, lead: tuple[int, ...] = ()) -> Group:
    rng = np.random.default_rng(seed)
    return Group(tuple(response(rng, n, scale, lead) for n in _LENGTHS), (1.0, 0.0, 0.7))


def _arrays(y: Group) -> np.ndarray:
    """Everything that is differentiated, in one vector."""
    return np.concatenate([getattr(r, f).ravel() for r in y.responses for f in _DIFFERENTIATED])


def _with_arrays(y: Group, x: Any) -> Group:
    """The group with the entries of the vector in their places."""
    out, i = [], 0
    for r in y.responses:
        new = {}
        for f in _DIFFERENTIATED:
            shape = tuple(getattr(r, f).shape)
            n = int(np.prod(shape))
            new[f] = x[i : i + n].reshape(shape)
            i += n
        out.append(r._replace(**new))
    return y._replace(responses=tuple(out))


def _autodiff(loss: TokenLoss, y: Group) -> tuple[float, np.ndarray]:
    """Value and gradient by torch."""
    x = tensor(_arrays(y)).requires_grad_()
    fixed = y._replace(responses=tuple(tensors(r) for r in y.responses))
    value = loss.torch_value(_with_arrays(fixed, x)).sum()
    if value.requires_grad:
        value.backward()
    gradient = np.zeros(x.numel()) if x.grad is None else x.grad.numpy()
    return float(value.detach()), gradient


def tokens(loss: TokenLoss) -> Iterator[Check]:
    """Values on numpy and torch, gradients against differences with stop-gradients held fixed, nothing NaN."""
    groups = [group(s) for s in range(4)]
    yield no_memory(loss, groups)
    many = group(9, lead=(2,))
    parts = [many._replace(responses=tuple(Tokens(*(x[i] for x in r)) for r in many.responses)) for i in range(2)]
    seen, alone = np.asarray(loss.value(many)), [float(loss.value(p)) for p in parts]
    good = seen.shape == (2,) and np.allclose(seen, alone, rtol=1e-12, atol=1e-13)
    detail = "" if good else f"2 samples have the value {seen.tolist()}, one by one {alone}: sum over tokens (-1) only"
    yield Check("an array of samples has an array of values", good, detail)
    off, worst, place = 0.0, 0.0, ""
    for k, y in enumerate(groups):
        value, gradient = _autodiff(loss, y)
        off = max(off, abs(value - float(loss.value(y))) / (1 + abs(value)))
        exact = differences(lambda ops, x, y=y: loss.formula(ops, _with_arrays(y, x)), _arrays(y))  # type: ignore[arg-type]
        # Differences of values are as exact as the values.
        gap = np.abs(gradient - exact) / (np.abs(exact) + 1e-3 * (1 + abs(value)))
        if gap.max() > worst:
            worst, place = float(gap.max()), f" (group {k}, entry {int(gap.argmax())})"
    yield Check("numpy and torch agree", off < 1e-12, f"worst {off:.1e}")
    yield Check("gradients: autodiff, differences", worst < 1e-6, f"worst {worst:.1e}{place}")
    lost = []
    for scale in (30.0, 1e3, 4e3):
        for seed in range(4):
            y = group(seed, scale)
            value, gradient = _autodiff(loss, y)
            if np.isnan([value, float(loss.value(y)), *gradient]).any():
                lost.append(f"u = {float(y.pair.u):.4g}")
    cause = (
        f"NaN at {', '.join(lost[:3])}: an intermediate overflows; use log_sigmoid, softplus or expm1" if lost else ""
    )
    yield Check("no NaN up to margins of 1e4", not lost, cause)


def claims(loss: TokenLoss) -> Iterator[Check]:
    """Claims made must hold on random groups; of a claim denied, a counter-example is looked for and not required."""
    rng = np.random.default_rng(1)
    found = dict.fromkeys(("convex", "decreasing", "nonnegative"), "")
    moved = ""
    for seed in range(60):
        scale = float(rng.choice([0.3, 1.0, 4.0, 15.0]))
        y = group(seed, scale)
        value, gradient = _autodiff(loss, y)
        tag = f"group {seed} (u = {float(y.pair.u):.4g})"
        if value < -1e-12:
            found["nonnegative"] = found["nonnegative"] or f"the loss is {value:.3g} < 0 at {tag}"
        g = _with_arrays(y, gradient).responses
        size = 1e-9 * (np.abs(gradient).max() + 1e-300)
        for r, sign, words in ((g[0], 1, "a token of y+ down"), (g[1], -1, "a token of y- up")):
            if (sign * r.log_prob > size).any():
                found["decreasing"] = found["decreasing"] or f"the loss pushes {words} at {tag}"
        found["convex"] = found["convex"] or _concave(loss, y, rng, tag)
        shifted = y._replace(responses=tuple(r._replace(ref=r.ref - 0.3) for r in y.responses[:1]) + y.responses[1:])
        if not np.allclose(_autodiff(loss, shifted)[1], gradient, rtol=1e-9, atol=1e-13):
            moved = moved or tag
    for claim, seen in found.items():
        claimed = getattr(loss.claims, claim)
        told = ("claimed, but " if claimed else "denied; counter-example: ") + seen
        yield Check(claim, not (claimed and seen), told if seen else "claimed, holds" if claimed else "denied")
    ok = (not moved) == loss.claims.reference_free
    detail = f"the loss depends on the reference, at {moved}" if moved else "the loss ignores the reference"
    yield Check("reference_free", ok, detail + ("" if ok else f", but the claim is {loss.claims.reference_free}"))


def _concave(loss: TokenLoss, y: Group, rng: np.random.Generator, tag: str) -> str:
    """Midpoint test in the log-probabilities of all tokens, everything else fixed."""
    step = [rng.normal(size=r.log_prob.shape) for r in y.responses]

    def at(s: float) -> float:
        moved = (r._replace(log_prob=r.log_prob + s * d) for r, d in zip(y.responses, step, strict=True))
        return float(loss.value(y._replace(responses=tuple(moved))))

    lo, mid, hi = at(-1.0), at(0.0), at(1.0)
    return f"the loss is concave at {tag}" if mid - (lo + hi) / 2 > 1e-11 * (1 + abs(lo) + abs(hi)) else ""

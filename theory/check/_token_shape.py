"""Losses of tokens: how references and lengths enter, kinks, and forms in the margin."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from theory.check._base import Array, Check, FrozenOps, tensor, tensors
from theory.check._pair import jumps
from theory.check._token import group, response
from theory.losses import Group, TokenLoss, Tokens
from theory.model import Sample

_NAMES = ("y+", "y-")


def shape(loss: TokenLoss) -> Iterator[Check]:
    """What a loss of log-ratios and lengths must be, each fault by its name."""
    yield _references(loss)
    yield _lengths(loss)
    yield _margin_forms(loss)
    seen = _kink(loss)
    claimed = loss.claims.differentiable
    told = ("claimed, but " if claimed else "denied; counter-example: ") + seen
    yield Check("differentiable", not (claimed and seen), told if seen else "claimed, holds" if claimed else "denied")


def _with(y: Group, i: int, new: Tokens) -> Group:
    return y._replace(responses=(*y.responses[:i], new, *y.responses[i + 1 :]))


def _same(loss: TokenLoss, y: Group, other: Group) -> bool:
    """Whether two groups have one value, stop-gradients held at the first."""
    ops: Any = FrozenOps()
    first = loss.formula(ops, y)  # type: ignore[arg-type]
    return bool(np.allclose(first, loss.formula(ops.replay(), other), rtol=1e-10, atol=1e-13))  # type: ignore[arg-type]


def _references(loss: TokenLoss) -> Check:
    """A loss of log-ratios does not change if ln pi and ln pi_ref of a token do so together."""
    name = "the references are subtracted"
    if loss.claims.reference_free:
        return Check(name, True, "reference_free")
    values = {f.name: getattr(loss, f.name) for f in dataclasses.fields(loss)}  # type: ignore[arg-type]
    # ln pi_ref enters as f ln pi does, with f = -1 in a log-ratio; a parameter p left out of one of the two: f = -p.
    factors = {1.0: "", -1.0: "has the wrong sign: added, not subtracted"}
    for p, v in values.items():
        if isinstance(v, float) and v not in (0.0, 1.0, -1.0):
            factors |= {v: f"is not multiplied by {p}, as ln pi is", 1 / v: f"is multiplied by {p}, as ln pi is not"}
    shapes = []
    for i, y_name in enumerate(_NAMES):

        def moved(y: Group, by: float, reference: float, i: int = i) -> Group:
            r = y.responses[i]
            shift = np.random.default_rng(5).normal(size=r.n)
            return _with(y, i, r._replace(log_prob=r.log_prob + by * shift, ref=r.ref + reference * shift))

        groups = [group(s) for s in range(3)]
        if all(_same(loss, y, moved(y, 0.0, 1.0)) for y in groups):
            shapes.append(f"{y_name}: no reference")
            continue
        fits = [told for f, told in factors.items() if all(_same(loss, y, moved(y, 1.0, f)) for y in groups)]
        if fits and fits[0]:
            return Check(name, False, f"the reference of {y_name} {fits[0]}")
        shapes.append(f"{y_name}: {'log-ratios' if fits else 'no function of log-ratios'}")
    return Check(name, True, ", ".join(shapes))


def _lengths(loss: TokenLoss) -> Check:
    """ln pi(y+) doubled and |y-| doubled with it cancel only if the one is divided by the other."""

    def doubled(r: Tokens) -> Tokens:
        return r._replace(log_prob=2 * r.log_prob, ref=2 * r.ref, kl=2 * r.kl)

    def padded(r: Tokens) -> Tokens:
        """Twice as many tokens and the same sums."""
        return Tokens(*(np.concatenate([x, np.zeros_like(x)], axis=0) for x in r))

    y = group(3)
    for i, j in ((0, 1), (1, 0)):
        longer = _with(y, j, padded(y.responses[j]))
        both = _with(longer, i, doubled(y.responses[i]))
        value, other, balanced = (float(loss.value(z)) for z in (y, longer, both))
        if not np.isclose(value, other, rtol=1e-9) and np.isclose(value, balanced, rtol=1e-12):
            cause = f"ln pi({_NAMES[i]}) is divided by |{_NAMES[j]}|: the lengths are swapped"
            return Check("lengths", False, cause)
    return Check("lengths", True)


def _margin_forms(loss: TokenLoss) -> Check:
    """For samples that have a form in the margin: the loss is that form up to a constant, whatever the tokens are."""
    name, told = "margin(sample) is the loss", []
    for n_w, n_l in ((2, 2), (1, 1), (3, 2)):
        sample = Sample("x", (tuple(range(n_w)), tuple(range(1, n_l + 1))), (-4.1, -6.4))
        form = loss.margin(sample)
        if form is None:
            continue
        told.append(f"{n_w} and {n_l} tokens")
        groups = [_of_sample(sample, seed) for seed in range(30)]
        u = np.array([float(y.pair.u) for y in groups])
        off = np.array([float(loss.value(y)) for y in groups]) - form.value(u)
        if not np.ptp(off) <= 1e-9 * (1 + np.abs(form.value(u)).max()):
            again = groups[0].responses[0]
            other = _with(groups[0], 0, again._replace(kl=again.kl + 0.5))
            cause = "" if _same(loss, groups[0], other) else ": the loss looks at kl as well, so it has no such form"
            detail = f"for {told[-1]} they differ by {off.min():.6g} to {off.max():.6g}{cause}"
            return Check(name, False, detail)
    return Check(name, True, f"for {', '.join(told)}" if told else "no sample has one")


def _of_sample(sample: Sample, seed: int) -> Group:
    """Random tokens with the sample's lengths, reference log-probabilities and rewards."""
    rng = np.random.default_rng(seed)
    out = []
    for tokens, total in zip(sample.responses, sample.reference or (), strict=True):
        r = response(rng, len(tokens), 3.0)
        out.append(r._replace(ref=r.ref / r.ref.sum() * total))
    return Group(tuple(out), sample.rewards or ())


# ---- kinks


def _kink(loss: TokenLoss) -> str:
    """A jump of the slope along lines of log-probabilities, everything else fixed."""
    if np.shape(loss.value(group(9, lead=(2,)))) != (2,):
        return ""  # many points at once cannot be had
    for seed in range(4):
        y = group(seed)
        rng = np.random.default_rng(seed)
        lines = {"random": [rng.normal(size=r.n) for r in y.responses]}
        for i, name in enumerate(_NAMES):
            lines[name] = [np.full(r.n, 1.0 if j == i else 0.0) for j, r in enumerate(y.responses)]
        for words, line in lines.items():
            # Up to where a token is certain: -ln(1 - pi) is steep there, without a kink.
            rise = max(float((d / (-1e-3 - r.log_prob)).max()) for d, r in zip(line, y.responses, strict=True))
            fall = max(float((-d / (-1e-3 - r.log_prob)).max()) for d, r in zip(line, y.responses, strict=True))
            t = np.geomspace(1e-3, 60, 200)
            t = np.concatenate([-t[t * fall < 1][::-1], t[t * rise < 1]])
            slope = _slope_along(loss, y, line, t)
            found = jumps(lambda s, y=y, line=line: _slope_along(loss, y, line, s), t, 1e-9 * np.nanmedian(abs(slope)))
            if found:
                lo, hi = found[0]
                jump = abs(np.diff(_slope_along(loss, y, line, np.array([lo, hi])))[0])
                along = "along a random line" if words == "random" else f"with the log-probabilities of {words}"
                return f"the slope jumps by {jump:.3g} {along}, from group {seed}, step {lo:.4g}"
    return ""


def _slope_along(loss: TokenLoss, y: Group, line: list[Array], t: Array) -> Array:
    """d loss/dt at log-probabilities moved by t times the line, (k,)."""
    s = tensor(t).requires_grad_()
    moved = []
    for r, d in zip(y.responses, line, strict=True):
        many = tensors(Tokens(*(np.broadcast_to(x, (t.size, *x.shape)).copy() for x in r)))
        moved.append(many._replace(log_prob=many.log_prob + s[:, None] * tensor(d)))
    total = loss.torch_value(y._replace(responses=tuple(moved))).sum()
    if total.requires_grad:
        total.backward()
    return np.zeros_like(t) if s.grad is None else s.grad.numpy()

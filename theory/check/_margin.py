"""Margin losses: slopes, claims and landmarks of a function of u = ln pi(y+) - ln pi(y-)."""

import dataclasses
from collections.abc import Iterator

import mpmath
import numpy as np

from theory.check._base import FAR, NEAR, REFERENCES, Array, Check, near_pairs
from theory.losses import MarginForm, MarginLoss, Pair
from theory.losses._base import slope_mpmath
from theory.model import Sample


def _forms(loss: MarginLoss) -> list[MarginForm]:
    return [MarginForm(loss, r) for r in REFERENCES]


def slopes(loss: MarginLoss) -> Iterator[Check]:
    """It is a function of the margin; its closed slopes are its derivative, far out as well."""
    yield _margin_alone(loss)
    worst, place, pairs = 0.0, "", []
    for form in _forms(loss):
        u = _off_kinks(form, NEAR)
        exact = np.array([float(slope_mpmath(loss, float(v), form.u_ref)) for v in u])
        G = form.slope(u)
        pairs.append((u, form.u_ref, G, exact))
        for kind, seen in (("slope", G), ("autodiff", loss.incentives(Pair.of_margin(u, form.u_ref))[0])):
            off = np.abs(seen - exact) / (np.abs(exact) + 1e-3)
            if not off.max() <= worst:
                worst, place = float(off.max()), f"{kind} at u = {u[off.argmax()]:g}, u_ref = {form.u_ref:g}"
    good = worst < 1e-10
    detail = f"worst {worst:.1e} ({place or 'everywhere'})" + ("" if good else _slope_cause(pairs))
    yield Check("slopes: closed form, autodiff, 40 digits", good, detail)
    if loss.closed_log_slope is not None and loss.closed_slope is not None:
        off = np.concatenate(
            [
                form.log_slope(u) - np.log(np.abs(form.slope(u)))
                for form in _forms(loss)
                for u in [_off_kinks(form, NEAR)]
            ]
        )
        cause = f"; off by ln {np.exp(off[0]):.4g} everywhere" if np.ptp(off) < 1e-9 < abs(off[0]) else ""
        worst = float(np.abs(off).max())
        yield Check("closed_log_slope is ln|closed_slope|", worst < 1e-10, f"worst {worst:.1e}{cause}")
    lost = [
        f"{g:g} at u = {u:g}, u_ref = {form.u_ref:g}"
        for form in _forms(loss)
        for u, g in zip(FAR, form.log_slope(FAR), strict=True)
        if np.isnan(g) or g == np.inf
    ]
    yield Check("ln|G| is never NaN or inf up to margins of 1e4", not lost, "; ".join(lost[:3]))
    worst, place = 0.0, ""
    for form in _forms(loss):
        for u in _off_kinks(form, FAR):
            exact = slope_mpmath(loss, float(u), form.u_ref)
            target = float(mpmath.log(abs(exact))) if exact else -np.inf
            seen = float(form.log_slope(u))
            gap = 0.0 if seen == target else abs(seen - target) / (1 + abs(target)) if np.isfinite(target) else np.inf
            if not gap <= worst:
                worst, place = gap, f"u = {u:g}, u_ref = {form.u_ref:g}: {seen:g}, by many digits {target:g}"
    good = worst < 1e-9
    advice = "closed_log_slope" if loss.closed_slope is not None else "closed_slope"
    cause = "" if good else f"; float64 loses the slope there: define {advice} in a form that keeps it"
    yield Check("ln|G| far out agrees with many digits", good, f"worst {worst:.1e} ({place or 'everywhere'}){cause}")


def _margin_alone(loss: MarginLoss) -> Check:
    """Both log-probabilities shifted, other lengths, other norms: nothing may change."""
    changes = {
        "shifting both ln pi by -2.7": lambda y: y._replace(a=y.a - 2.7, b=y.b - 2.7),
        "other lengths (7 and 2 tokens)": lambda y: y._replace(n_w=7, n_l=2),
        "another ratio of gradient norms": lambda y: y._replace(norm_ratio=0.4),
    }
    for what, change in changes.items():
        for y in near_pairs():
            gap = abs(float(loss.value(y)) - float(loss.value(change(y))))
            if not gap <= 1e-12 * (1 + abs(float(loss.value(y)))):
                detail = f"{what} changes the loss by {gap:.2g} at u = {float(y.u):g}: derive from Loss"
                return Check("depends on the margin alone", False, detail)
    return Check("depends on the margin alone", True)


def _slope_cause(pairs: list[tuple[Array, float, Array, Array]]) -> str:
    """What a wrong closed slope has in common with the derivative."""
    ratio = np.concatenate([G / exact for _, _, G, exact in pairs])
    if np.isfinite(ratio).all() and np.ptp(ratio) < 1e-6 * np.abs(ratio).max():
        if abs(ratio[0] + 1) < 1e-6:
            return ": closed_slope has the wrong sign; G = -l'(u) is positive where the loss falls"
        return f": closed_slope is {ratio[0]:.6g} times the derivative"
    (_, _, G, exact), (_, u_ref, other, exact_other) = pairs
    if np.allclose(G, exact, rtol=1e-9) and not np.allclose(other, exact_other, rtol=1e-9):
        return f": right at u_ref = 0, wrong at u_ref = {u_ref:g}; is the reference in it, and with its sign?"
    return ""


def _off_kinks(form: MarginForm, u: Array) -> Array:
    """Margins away from kinks (no derivative there) and from zeros of the slope (no logarithm there)."""
    special = np.array([*form.kinks, *form.zeros], dtype=float)
    if not special.size:
        return u
    u = u[np.abs(u[:, None] - special).min(axis=1) > 0.05]
    with np.errstate(divide="ignore"):
        return u[np.isfinite(np.log(np.abs(form.slope(u))))]


def claims(loss: MarginLoss) -> Iterator[Check]:
    claims = loss.claims
    scale = _width(loss)
    for form in _forms(loss):
        marks = [float(x) + scale * np.linspace(-1, 1, 21) for x in (*form.kinks, *form.zeros)]  # may lie far off
        tag = f"(u_ref = {form.u_ref:g})"
        far = np.geomspace(30, 3e4, 100)
        grids = [np.linspace(-30, 30, 6001), np.concatenate([-far[::-1], far])]
        near, beyond = (_seen(form, np.unique(np.concatenate([form.u_ref + scale * g, *marks]))) for g in grids)
        if not near[0].size:
            yield Check(f"finite near the reference {tag}", False, "neither the loss nor its slope is")
            continue
        cause = "the slope points up" + _swapped(form)
        rules = (
            ("decreasing", claims.decreasing, _points_up, cause),
            ("convex", claims.convex, _concave, "the loss is concave"),
            ("non-negative", claims.nonnegative, _negative, "l < 0"),
        )
        for name, claimed, broken, cause in rules:
            at = np.concatenate([broken(*near), broken(*beyond)])
            yield _claim(name, claimed, at, tag, cause)
        u, _, G = near
        jump, place = _largest_jump(form, u, scale)
        smooth = jump <= 1e-3 * np.abs(G).max()
        good = smooth == claims.differentiable
        said = "claimed differentiable" if claims.differentiable else "claimed to have a kink"
        yield Check(f"differentiable {tag}", good, f"{said}; largest jump of the slope {jump:.2g} at u = {place:g}")
    yield from _reference(loss)


def _seen(form: MarginForm, u: Array) -> tuple[Array, Array, Array]:
    """Margins where the loss and its slope are finite, with both."""
    l, G = form.value(u), form.slope(u)
    keep = np.isfinite(l) & np.isfinite(G)
    return u[keep], l[keep], G[keep]


# Margins at which a claim is broken; on each grid by its own sizes, so that what is large far out hides nothing near.


def _points_up(u: Array, l: Array, G: Array) -> Array:
    return u[G < -1e-9 * np.abs(G).max(initial=0)]


def _concave(u: Array, l: Array, G: Array) -> Array:
    return u[1:][np.diff(G) > 1e-9 * np.abs(G).max(initial=0)]


def _negative(u: Array, l: Array, G: Array) -> Array:
    return u[l < -1e-12 * (1 + np.abs(l).max(initial=0))]


def _reference(loss: MarginLoss) -> Iterator[Check]:
    """Whether the loss looks at u_ref, and then as u - u_ref."""
    free, seen = (form.value(NEAR) for form in _forms(loss))
    same = np.allclose(free, seen, rtol=1e-12, atol=1e-12)
    detail = "the loss ignores the reference" if same else "the loss depends on the reference"
    ok = bool(same) == loss.claims.reference_free
    yield Check("reference_free", ok, detail + ("" if ok else f", but the claim is {loss.claims.reference_free}"))
    if same:
        return
    r = REFERENCES[1]
    form = MarginForm(loss, 0.0)
    # A parameter p left out of the reference's term, as in p u - u_ref, shows as a factor 1/p.
    forgotten = {
        1 / v: f.name
        for f in dataclasses.fields(loss)  # type: ignore[arg-type]
        if isinstance(v := getattr(loss, f.name), float) and v not in (0.0, 1.0)
    }
    # Of u_ref with factor c, l(u, u_ref) = l(u - c u_ref, 0), up to a constant.
    enters = [c for c in (1.0, -1.0, *forgotten) if np.ptp(form.value(NEAR - c * r) - seen) < 1e-11 * np.ptp(seen)]
    cause = ""
    if enters and enters[0] == -1:
        cause = f"l(u, {r:g}) = l(u + {r:g}, 0): the value depends on u_ref with the wrong sign"
    elif enters and enters[0] != 1:
        p = forgotten[enters[0]]
        cause = f"l(u, u_ref) = l(u - u_ref/{p}, 0): {p} multiplies u and not u_ref"
    shape = "l(u, u_ref) = l(u - u_ref, 0)" if enters else "the loss is no function of u - u_ref or u + u_ref"
    yield Check("the reference is subtracted", not cause, cause or shape)


def _claim(name: str, claimed: bool, broken: Array, tag: str, cause: str) -> Check:
    """A claim is broken at no margin, or (where denied) at some."""
    if claimed:
        at = f"claimed, but at u = {broken[0]:g} {cause}" if broken.size else "claimed, holds"
        return Check(f"{name} {tag}", not broken.size, at)
    found = (
        f"denied; counter-example at u = {broken[0]:g}"
        if broken.size
        else (f"denied, but no counter-example was found: set {name.replace('non-negative', 'nonnegative')}=True")
    )
    return Check(f"{name} {tag}", broken.size > 0, found)


def _swapped(form: MarginForm) -> str:
    """A loss that never pushes the margin up has its responses exchanged."""
    G = form.slope(form.u_ref + _width(form.loss) * np.linspace(-30, 30, 601))
    return " and nowhere down: y+ and y- swapped?" if (G[np.isfinite(G)] <= 0).all() else ""


def _width(loss: MarginLoss) -> float:
    """The scale of margins on which this loss changes: the distance to its landmarks, or where its slope halves."""
    form = MarginForm(loss, 0.0)
    marks = [abs(float(x)) for x in (*form.kinks, *form.zeros) if x != 0]
    if marks:
        return max(marks) / 10
    trial = np.array([0.0]), 2.0 ** np.arange(-12, 24)
    G0, G = form.slope(trial[0])[0], form.slope(trial[1])
    changed = np.nonzero(np.abs(G - G0) > 0.25 * np.abs(G0) + 1e-300)[0]
    return float(trial[1][changed[0]]) if changed.size else 1.0


def _largest_jump(form: MarginForm, u: Array, scale: float) -> tuple[float, float]:
    """The largest jump of the slope between neighbours that survives zooming in, and where it is."""
    best, at = 0.0, float(u[0])
    G = form.slope(u)
    for i in np.argsort(-np.abs(np.diff(G)))[:5]:
        lo, hi = u[i], u[i + 1]
        for _ in range(60):  # keep the half with the larger change
            mid = (lo + hi) / 2
            if not lo < mid < hi or hi - lo < 1e-9 * scale:
                break
            a, b, c = form.slope(np.array([lo, mid, hi]))
            lo, hi = (lo, mid) if abs(b - a) > abs(c - b) else (mid, hi)
        ends = form.slope(np.array([lo, hi]))
        jump = float(abs(ends[1] - ends[0]))
        if jump > best:
            best, at = jump, float(hi)
    return best, at


def landmarks(loss: MarginLoss) -> Iterator[Check]:
    for form in _forms(loss):
        tag = f"(u_ref = {form.u_ref:g})"
        scale = _width(loss)
        u = form.u_ref + scale * np.linspace(-30, 30, 6001)
        G = form.slope(u)
        crossing = np.nonzero((G[:-1] > 0) & (G[1:] <= 0) | (G[:-1] < 0) & (G[1:] >= 0))[0]
        declared = np.array([float(z) for z in form.zeros])
        missing = [u[i] for i in crossing if not (np.abs(declared - u[i]) <= 2 * (u[1] - u[0])).any()]
        detail = f"the slope vanishes near u = {missing[0]:g}: declare it in minimiser() or zeros()" if missing else ""
        yield Check(f"zeros of the slope are declared {tag}", not missing, detail)
        for z in declared:
            around = np.abs(
                form.slope(z + 1e-12 * scale * np.array([-1.0, 0.0, 1.0]))
            )  # a kink has a side where G is not 0
            small = float(around.min()) <= 1e-9 * np.abs(G).max()
            yield Check(f"the slope is 0 at the declared {z:g} {tag}", small, f"G = {around.min():.2g}")
        least = form.minimiser
        if least is not None:
            lower = form.value(u).min() < form.value(least) - 1e-12 * (1 + np.abs(form.value(least)))
            yield Check(
                f"least at {float(least):g} {tag}", not lower, "some margin has a smaller loss" if lower else ""
            )
        law = form.law
        if law is not None:
            yield _law_check(form, law, tag)
    sample = Sample("x", ((0,), (1,)), (-0.4, -0.9))
    seen = loss.margin(sample)
    right = seen is not None and abs(float(seen.u_ref) - 0.5) < 1e-12
    yield Check(
        "margin(sample) uses the sample's reference", right, f"u_ref = {seen.u_ref if seen else None}, expected 0.5"
    )


def _law_check(form: MarginForm, law: object, tag: str) -> Check:
    """The declared elementary slope against the slope itself, up to where the law ends."""
    from theory.losses._laws import ConstantSlope, ExponentialSlope, LinearSlope, LogisticSlope

    around = np.linspace(-10, 10, 101) * _width(form.loss)
    match law:
        case ConstantSlope(rate, end):
            u = end + around[around < 0]
            G = np.full_like(u, rate)
        case LinearSlope(rate, zero):
            u = zero + around[around < 0]
            G = rate * (zero - u)
        case LogisticSlope(beta, centre):
            u = centre + around
            G = beta / (1 + np.exp(beta * (u - centre)))
        case ExponentialSlope(beta, centre):
            u = centre + around
            G = beta * np.exp(-beta * (u - centre))
        case _:
            return Check(f"law {tag}", False, f"unknown law {law!r}")
    gap = np.abs(G - form.slope(u)) / (np.abs(G) + 1e-300)
    return Check(f"slope follows {type(law).__name__} {tag}", bool(gap.max() < 1e-9), f"worst {gap.max():.1e}")

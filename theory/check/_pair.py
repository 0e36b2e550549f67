"""Losses of the two log-probabilities: incentives, claims over (a, b), minima, and forms in the margin."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
from numpy.typing import NDArray

from theory.check import _coupled
from theory.check._base import Array, Check, digits_incentives, is_combinator, near_pairs, where
from theory.losses import Loss, Pair
from theory.model import Sample

# References and lengths claims are tried at: near, far from and very far from certainty; unequal and equal lengths.
SETTINGS = ((-3.1, -4.7, 3, 5), (-31.0, -24.0, 7, 2), (-300.0, -310.0, 4, 4))
# Where losses of small parameters (beta = 0.001, say) turn.
FAR_SETTINGS = tuple((-300.0 * k, -310.0 * k, 4, 4) for k in (10, 100, 1000))


def pair_at(setting: tuple[float, float, int, int], a: Any, b: Any) -> Pair:
    """Samples at (a, b); the last axis is a batch of one, so that a coupled loss sees each alone."""
    a, b = (np.asarray(x, dtype=np.float64)[..., None] for x in np.broadcast_arrays(a, b))
    return Pair(a, b, *(np.full_like(a, x) for x in (*setting, 1.7)))


def value(loss: Loss, setting: Any, a: Any, b: Any) -> Array:
    return np.asarray(loss.value(pair_at(setting, a, b)))[..., 0]


def incentives(loss: Loss, setting: Any, a: Any, b: Any) -> tuple[Array, Array]:
    d_w, d_l = loss.incentives(pair_at(setting, a, b))
    return d_w[..., 0], d_l[..., 0]


def at(setting: Any, a: Any, b: Any) -> str:
    return where(pair_at(setting, a, b)) + f", |y+| = {setting[2]}, |y-| = {setting[3]}"


def start_size(loss: Loss, setting: Any) -> float:
    """The size of the incentives at the reference: what counts as large."""
    size = float(max(np.abs(incentives(loss, setting, setting[0], setting[1]))))
    return size if 0 < size < np.inf else 1.0


def _reach(setting: Any) -> float:
    """How much further than 310 nats the references lie."""
    return max(1.0, -min(setting[:2]) / 310)


def lattice(setting: Any) -> tuple[Array, Array]:
    """(n, n) log-probabilities <= 0 on axes fine around the reference and around certainty."""
    far = _reach(setting)
    steps, own = np.geomspace(0.02, 290 * far, 20), -np.geomspace(1e-3, 400 * far, 20)
    axes = [np.unique(np.concatenate([x - steps, [x], x + steps, own])) for x in setting[:2]]
    a, b = np.meshgrid(*(x[x < 0] for x in axes), indexing="ij")
    return a, b


# ---- incentives


def slopes(loss: Loss) -> Iterator[Check]:
    """Incentives by automatic differentiation against dual numbers in 40 digits."""
    if loss.uses_norms:
        detail = "not compared: its gradients are rescaled by norms, which only automatic differentiation sees"
        yield Check("incentives: autodiff, 40 digits", True, detail)
        return
    worst, place = 0.0, ""
    for y in near_pairs():
        for kind, seen, exact in zip(("d_w", "d_l"), loss.incentives(y), digits_incentives(loss, y), strict=True):
            off = abs(float(seen) - float(exact)) / (abs(float(exact)) + 1e-3)
            if not off <= worst:
                worst, place = off, f"{kind} = {float(seen):g}, by 40 digits {float(exact):g}, at {where(y)}"
    yield Check("incentives: autodiff, 40 digits", worst < 1e-10, f"worst {worst:.1e} ({place or 'everywhere'})")


# ---- claims


def claims(loss: Loss) -> Iterator[Check]:
    """Each claim holds over (a, b), or has a counter-example where denied."""
    searches = {"convex": _concave, "decreasing": _pushed_back, "differentiable": _kink, "nonnegative": _negative}
    in_batches = {"decreasing": _coupled.pushed_back, "nonnegative": _coupled.negative} if loss.coupled else {}
    for claim, search in searches.items():
        claimed = getattr(loss.claims, claim)
        # A small parameter moves a counter-example far out: only a claim that is denied is looked at there.
        seen = _first(search, loss, SETTINGS if claimed or is_combinator(loss) else SETTINGS + FAR_SETTINGS)
        if claim == "decreasing" and seen:
            seen += _swapped(loss)
        if claim in in_batches:
            seen = seen or in_batches[claim](loss)
        check = claim_check(claim, claimed, seen, is_combinator(loss))
        alone = loss.coupled and claim not in in_batches
        yield replace(check, detail=f"{check.detail} (in a batch of one)") if alone else check
    yield _reference_free(loss)
    yield from _reference_kind(loss)
    yield _lengths(loss)


def _first(search: Callable[[Loss, Any], str], loss: Loss, settings: Any) -> str:
    return next(filter(None, (search(loss, setting) for setting in settings)), "")


def claim_check(claim: str, claimed: bool, seen: str, combinator: bool) -> Check:
    """A claim holds, or (where denied) has a counter-example; a combinator may deny what its parts do not need."""
    if claimed:
        return Check(claim, not seen, f"claimed, but {seen}" if seen else "claimed, holds")
    if seen:
        return Check(claim, True, f"denied; counter-example: {seen}")
    if combinator:
        return Check(claim, True, "denied; no counter-example for these parts")
    detail = f"denied, but no counter-example was found with references down to {FAR_SETTINGS[-1][0]:g}"
    return Check(claim, False, f"{detail}: set {claim}=True")


def _concave(loss: Loss, setting: Any) -> str:
    """Midpoints above the chord: of neighbours in four directions, and of pairs drawn at random."""
    a, b = lattice(setting)
    ends = []
    for i, j in ((1, 0), (0, 1), (1, 1), (1, -1)):
        one = np.s_[: a.shape[0] - i, max(0, -j) : a.shape[1] - max(0, j)]
        two = np.s_[i:, max(0, j) : a.shape[1] - max(0, -j)]
        ends.append([x[s].ravel() for s in (one, two) for x in (a, b)])
    rng = np.random.default_rng(0)
    p, q = rng.integers(a.size, size=(2, 20_000))
    ends.append([x.ravel()[s] for s in (p, q) for x in (a, b)])
    a1, b1, a2, b2 = (np.concatenate(x) for x in zip(*ends, strict=True))
    l1, l2, mid = (value(loss, setting, *x) for x in ((a1, b1), (a2, b2), ((a1 + a2) / 2, (b1 + b2) / 2)))
    above = mid - (l1 + l2) / 2
    broken = above > 1e-11 * (1 + np.abs(l1) + np.abs(l2) + np.abs(mid))
    if not broken.any():
        return ""
    # The shortest such chord says where the loss is concave.
    i = np.flatnonzero(broken)[np.hypot(a2 - a1, b2 - b1)[broken].argmin()]
    point = at(setting, (a1[i] + a2[i]) / 2, (b1[i] + b2[i]) / 2)
    return f"the loss is concave at {point}: above the chord from ({a1[i]:g}, {b1[i]:g}) to ({a2[i]:g}, {b2[i]:g})"


def _pushed_back(loss: Loss, setting: Any) -> str:
    a, b = lattice(setting)
    d_w, d_l = incentives(loss, setting, a, b)
    floor = 1e-9 * (np.abs(d_w) + np.abs(d_l)) + 1e-12 * start_size(loss, setting)
    for d, name, words in ((d_w, "d_w", "pushes y+ down"), (d_l, "d_l", "pushes y- up")):
        broken = d < -floor
        if broken.any():
            # The one nearest to the reference.
            off = np.where(broken, np.hypot(a - setting[0], b - setting[1]), np.inf)
            i = np.unravel_index(off.argmin(), off.shape)
            return f"the loss {words} ({name} = {d[i]:.3g}) at {at(setting, a[i], b[i])}"
    return ""


def _swapped(loss: Loss) -> str:
    """Whether y- is pushed up and y+ down wherever anything is pushed."""
    for setting in SETTINGS:
        d_w, d_l = incentives(loss, setting, *lattice(setting))
        if (d_w > 0).any() or (d_l > 0).any():
            return ""
    return "; nowhere is y+ pushed up or y- down: y+ and y- swapped?"


def _negative(loss: Loss, setting: Any) -> str:
    a, b = lattice(setting)
    l = value(loss, setting, a, b)
    i = np.unravel_index(np.where(np.isnan(l), np.inf, l).argmin(), l.shape)
    return f"the loss is {l[i]:.3g} < 0 at {at(setting, a[i], b[i])}" if l[i] < -1e-12 else ""


def _kink(loss: Loss, setting: Any) -> str:
    """A jump of either incentive along lines through the neighbourhood of the reference."""
    t = np.geomspace(1e-3, 300 * _reach(setting), 400)
    t = np.concatenate([-t[::-1], t])
    a_ref, b_ref = setting[:2]
    lines = [(a_ref, 1.0, b_ref - 0.7, 0.0), (a_ref - 0.6, 0.0, b_ref, 1.0)]
    lines += [(a_ref, 0.5, b_ref, -0.5), (a_ref, 1.0, b_ref - 0.4, 1.0)]
    for a0, da, b0, db in lines:
        inside = t[(a0 + da * t < 0) & (b0 + db * t < 0)]

        def along(s: Array, line: tuple[float, ...] = (a0, da, b0, db)) -> Array:
            """(2, n): both incentives."""
            return np.stack(incentives(loss, setting, line[0] + line[1] * s, line[2] + line[3] * s))

        for which, name in ((0, "d_w"), (1, "d_l")):
            for s in jumps(lambda s, which=which, f=along: f(s)[which], inside, 1e-9 * start_size(loss, setting)):
                jump = _jump_in_digits(loss, setting, (a0, da, b0, db), which, s)
                if jump:
                    return f"{name} jumps by {jump:.3g} at {at(setting, a0 + da * s[0], b0 + db * s[0])}"
    return ""


def jumps(f: Callable[[Array], Array], t: Array, floor: float) -> list[tuple[float, float]]:
    """Intervals across which f jumps as far as float64 can tell: every interval is halved towards its larger change."""
    lo, hi = t[:-1].copy(), t[1:].copy()
    f_lo, f_hi = f(lo), f(hi)
    size = np.maximum(np.abs(f_lo), np.abs(f_hi))
    for _ in range(30):
        mid = (lo + hi) / 2
        f_mid = f(mid)
        left = np.abs(f_mid - f_lo) > np.abs(f_hi - f_mid)
        lo, f_lo = np.where(left, lo, mid), np.where(left, f_lo, f_mid)
        hi, f_hi = np.where(left, mid, hi), np.where(left, f_mid, f_hi)
    jump = np.abs(f_hi - f_lo)
    # A slope of 1e200 may turn within 1e-200 nats, which is as far as `_jump_in_digits` sees.
    found = np.flatnonzero((jump > 1e-3 * size) & (jump > floor) & (jump < 1e200))
    return [(float(lo[i]), float(hi[i])) for i in found[np.argsort(-jump[found] / size[found])][:3]]


def _jump_in_digits(loss: Loss, setting: Any, line: tuple[float, ...], which: int, ends: tuple[float, float]) -> float:
    """The jump that remains in 300 digits; a slope that is only steep (a saturated sigmoid, say) has none."""
    with mpmath.workdps(300):
        a0, da, b0, db = map(mpmath.mpf, line)

        def f(s: Any) -> Any:
            y = Pair(a0 + da * s, b0 + db * s, *setting)._replace(norm_ratio=1.7)
            return digits_incentives(loss, y, 300)[which]

        lo, hi = map(mpmath.mpf, ends)
        f_lo, f_hi = f(lo), f(hi)
        first = abs(f_hi - f_lo)
        while hi - lo > mpmath.mpf(10) ** -250 and abs(f_hi - f_lo) > first / 1000:
            mid = (lo + hi) / 2
            f_mid = f(mid)
            lo, f_lo, hi, f_hi = (
                (lo, f_lo, mid, f_mid) if abs(f_mid - f_lo) > abs(f_hi - f_mid) else (mid, f_mid, hi, f_hi)
            )
        return float(abs(f_hi - f_lo)) if abs(f_hi - f_lo) > first / 1000 else 0.0


# ---- references and lengths


def _reference_free(loss: Loss) -> Check:
    """Whether other references change the incentives."""
    moved = ""
    for one in SETTINGS:
        other = (one[0] - 1.9, one[1] - 0.8, *one[2:])
        a, b = lattice(one)
        for x, z in zip(incentives(loss, one, a, b), incentives(loss, other, a, b), strict=True):
            off = ~np.isclose(x, z, rtol=1e-10, atol=1e-12 * start_size(loss, one), equal_nan=True)
            if off.any() and not moved:
                i = np.unravel_index(off.argmax(), off.shape)
                moved = at(one, a[i], b[i])
    if loss.coupled:  # a difference to the batch's mean is 0 in a batch of one
        moved = moved or _coupled.looks_at_reference(loss)
    ok = (not moved) == loss.claims.reference_free
    detail = f"the loss depends on the reference, at {moved}" if moved else "the loss ignores the reference"
    return Check("reference_free", ok, detail + ("" if ok else f", but the claim is {loss.claims.reference_free}"))


def _reference_kind(loss: Loss) -> Iterator[Check]:
    """If the incentives are those of shifted log-probabilities without reference, the shift must be the right one."""
    if loss.claims.reference_free:
        return
    shifts: dict[str, Callable[[float, float], tuple[float, float]]] = {
        "": lambda r, s: (-r, -s),
        "both references are added, not subtracted: the wrong sign": lambda r, s: (r, s),
        "the reference of y+ has the wrong sign": lambda r, s: (r, -s),
        "the reference of y- has the wrong sign": lambda r, s: (-r, s),
        "the references of y+ and y- are swapped": lambda r, s: (-s, -r),
    }
    one = (-0.9, -1.7, 3, 5)
    a, b = np.meshgrid(np.linspace(-2.9, -0.2, 7), np.linspace(-2.3, -0.3, 7))
    seen = incentives(loss, one, a, b)
    explained = [
        cause
        for cause, shift in shifts.items()
        for da, db in [shift(*one[:2])]
        if np.allclose(incentives(loss, (0.0, 0.0, 3, 5), a + da, b + db), seen, rtol=1e-9, atol=1e-12)
    ]
    cause = explained[0] if explained else ""
    shape = "log-ratios" if explained else "the loss is no function of log-ratios"
    yield Check("the references are subtracted", not cause, cause or shape)


def _lengths(loss: Loss) -> Check:
    """Which lengths matter, and that each divides its own response."""
    y = pair_at(SETTINGS[0], [-0.4, -2.0, -5.3], [-1.3, -0.9, -9.1])
    seen = loss.incentives(y)

    def same(other: Pair, scale: tuple[float, float] = (1.0, 1.0)) -> bool:
        return np.allclose([s * d for s, d in zip(scale, loss.incentives(other), strict=True)], seen, rtol=1e-9, atol=0)

    looked = [n for n in ("n_w", "n_l") if not same(y._replace(**{n: 2 * getattr(y, n)}))]
    # ln pi(y+) doubled and |y-| doubled with it cancel only if the one is divided by the other.
    swapped = same(y._replace(a=2 * y.a, a_ref=2 * y.a_ref, n_l=2 * y.n_l), (2.0, 1.0)) and looked == ["n_w", "n_l"]
    cause = "ln pi(y+) is divided by |y-|: the lengths are swapped" if swapped else ""
    names = {"n_w": "|y+|", "n_l": "|y-|"}
    return Check("lengths", not cause, cause or f"depends on {' and '.join(names[n] for n in looked) or 'no length'}")


# ---- minima and margins


def landmarks(loss: Loss) -> Iterator[Check]:
    """A declared minimum is one, and none is left undeclared; margin forms are the loss."""
    for setting in SETTINGS:
        least = loss.minimum(Pair(0.0, 0.0, *setting))
        if least is not None:
            yield _is_least(loss, setting, *map(float, least))
        elif setting is not SETTINGS[0] and not is_combinator(loss):
            found = _strict_minimum(loss, setting)
            detail = f"the loss is least at {at(setting, *found)}: declare it in minimum()" if found else ""
            yield Check(f"no undeclared minimum (references {setting[0]:g}, {setting[1]:g})", not found, detail)
    yield from _margin_forms(loss)


def _around(a: float, b: float, radii: NDArray[Any], directions: int = 48) -> tuple[Array, Array]:
    angle = np.linspace(0, 2 * np.pi, directions, endpoint=False) + 0.1
    return a + radii[:, None] * np.cos(angle), b + radii[:, None] * np.sin(angle)


def _is_least(loss: Loss, setting: Any, a: float, b: float) -> Check:
    name = f"least at ({a:g}, {b:g}) (references {setting[0]:g}, {setting[1]:g})"
    d_w, d_l = incentives(loss, setting, a, b)
    # Rounding of a and b moves the incentives by as much as a step of 1e-9 does.
    size = max(start_size(loss, setting), float(np.abs(incentives(loss, setting, *_around(a, b, np.ones(1)))).max()))
    if max(abs(d_w), abs(d_l)) > 1e-9 * size:
        return Check(name, False, f"not stationary there: d_w = {d_w:.3g}, d_l = {d_l:.3g}")
    here, ring = value(loss, setting, a, b), _around(a, b, np.geomspace(1e-3, 300, 24))
    l = value(loss, setting, *ring)
    lower = l < here - 1e-12 * (1 + abs(here))
    if lower.any():
        i = np.unravel_index(np.where(np.isnan(l), np.inf, l).argmin(), l.shape)
        return Check(name, False, f"the loss is smaller, {l[i]:.6g} < {here:.6g}, at ({ring[0][i]:g}, {ring[1][i]:g})")
    return Check(name, True)


def _strict_minimum(loss: Loss, setting: Any) -> tuple[float, float] | None:
    """(a, b) inside the valid region where the loss is strictly least, by zooming into a lattice; None: nowhere."""
    a, b = lattice(setting)
    l = value(loss, setting, a, b)
    l = np.where(np.isfinite(l), l, np.inf)
    i, j = np.unravel_index(l.argmin(), l.shape)
    if not (0 < i < a.shape[0] - 1 and 0 < j < a.shape[1] - 1):
        return None  # the loss falls towards the edge
    x, z = a[i, j], b[i, j]
    width = max(a[i + 1, j] - a[i - 1, j], b[i, j + 1] - b[i, j - 1])
    first = width
    for _ in range(40):
        grid = np.linspace(-width, width, 15)
        p, q = np.meshgrid(x + grid, z + grid, indexing="ij")
        l = value(loss, setting, p, q)
        best = np.unravel_index(np.where(np.isfinite(l), l, np.inf).argmin(), l.shape)
        x, z, width = p[best], q[best], 0.5 * width
    rise = value(loss, setting, *_around(x, z, np.array([0.3 * first]), 720)) - value(loss, setting, x, z)
    # A valley (a line of minima) or a plateau does not rise in every direction.
    strict = np.isfinite(rise).all() and rise.min() > 1e-3 * np.median(rise) > 1e-9
    return (float(x), float(z)) if strict and x < -1e-6 and z < -1e-6 else None


def _margin_forms(loss: Loss) -> Iterator[Check]:
    """For samples that have a form in the margin: the loss is that form up to a constant, its incentives the slope."""
    told = []
    for n_w, n_l in ((2, 2), (1, 1), (3, 2)):
        sample = Sample("x", (tuple(range(n_w)), tuple(range(1, n_l + 1))), (-4.1, -6.4))
        form = loss.margin(sample)
        if form is None:
            continue
        told.append(f"{n_w} and {n_l} tokens")
        setting = (-4.1, -6.4, n_w, n_l)
        a, b = np.meshgrid(-np.geomspace(0.07, 55, 17), -np.geomspace(0.05, 60, 18))
        G, (d_w, d_l) = form.slope(a - b), incentives(loss, setting, a, b)
        shift = value(loss, setting, a, b) - form.value(a - b)
        size = start_size(loss, setting)
        for what, seen in (("d_w", d_w), ("d_l", d_l)):
            off = np.abs(seen - G) > 1e-9 * (np.abs(G) + size)
            if off.any():
                i = np.unravel_index(off.argmax(), off.shape)
                cause = f"{what} = {seen[i]:.6g}, the form's slope {G[i]:.6g} at {at(setting, a[i], b[i])}"
                yield Check("margin(sample) is the loss", False, cause)
                return
        if not np.ptp(shift) <= 1e-9 * (1 + np.abs(form.value(a - b)).max()):
            yield Check("margin(sample) is the loss", False, f"they differ by {shift.min():.6g} to {shift.max():.6g}")
            return
    yield Check("margin(sample) is the loss", True, f"for {', '.join(told)}" if told else "no sample has one")

"""`check_loss`: everything a loss claims, tried on one instance, with a report a person can read."""

import dataclasses
import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
from numpy.typing import NDArray

from theory.losses import Loss, MarginForm, MarginLoss, Pair
from theory.losses._base import slope_mpmath
from theory.model import Sample

Array = NDArray[np.float64]

# Margins looked at: around 0, and far out, where formulas overflow. Two references, so that a wrong one shows.
_NEAR = np.array([-7.3, -2.1, -0.63, -1e-3, 0.0, 0.41, 1.9, 5.7, 11.0])
_FAR = np.array([-1e4, -3e3, -745.0, -60.0, 60.0, 745.0, 3e3, 1e4])
_REFERENCES = (0.0, 0.37)


@dataclass(frozen=True)
class Check:
    """One check: its name, whether it held, and what was seen (where it failed and the likely cause)."""

    name: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, repr=False)
class LossReport:
    """The outcome of `check_loss`. Truthy if every check held; `raise_if_failed()` for scripts."""

    loss: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(c.ok for c in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(c for c in self.checks if not c.ok)

    def __bool__(self) -> bool:
        return self.ok

    def raise_if_failed(self) -> None:
        """AssertionError that lists every failed check."""
        if not self.ok:
            raise AssertionError(str(self))

    def __repr__(self) -> str:
        return str(self)  # a notebook or a prompt shows the table

    def __str__(self) -> str:
        head = f"{self.loss}: {'all' if self.ok else len(self.failures)} of {len(self.checks)} checks "
        head += "passed" if self.ok else "FAILED"
        return "\n".join([head] + [f"  {'ok  ' if c.ok else 'FAIL'} {c.name}: {c.detail}" for c in self.checks])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{'✓' if c.ok else '✗'}</td><td>{html.escape(c.name)}</td><td>{html.escape(c.detail)}</td></tr>"
            for c in self.checks
        )
        return f"<b>{html.escape(self.loss)}</b><table>{rows}</table>"


def check_loss(loss: Loss) -> LossReport:
    """Try the loss against its contract and its claims; see `theory.losses._base` for the contract.

    Values agree on numpy, torch and 50-digit arithmetic; nothing is NaN up to margins of 1e4; slopes by closed form, by
    automatic differentiation and by high precision agree; each claim holds where made and has a counter-example where
    denied; declared minimisers, zeros, kinks and slope laws are what they say.
    """
    if isinstance(loss, type):
        raise ValueError(f"loss must be an instance, got the class {loss.__name__}: call it, {loss.__name__}()")
    if not isinstance(loss, Loss):
        raise ValueError(f"loss must be a theory.losses.Loss instance, got {loss!r}")
    checks: list[Check] = []
    battery: list[Callable[..., Iterator[Check]]] = [_contract, _values]
    if isinstance(loss, MarginLoss):
        battery += [_slopes, _claims, _landmarks]
    for part in battery:
        try:
            with np.errstate(all="ignore"):  # a loss under test may overflow; NaN is looked for where it matters
                checks.extend(part(loss))
        except Exception as error:  # a loss under test may raise anything; the report says what
            checks.append(Check(part.__name__.strip("_"), False, f"raised {type(error).__name__}: {error}"))
    return LossReport(repr(loss), tuple(checks))


def _contract(loss: Loss) -> Iterator[Check]:
    name = loss.name or type(loss).__name__
    yield Check("name", True, name) if loss.name else Check("name", False, "set the class attribute `name`")
    yield Check("reference", bool(loss.reference), loss.reference or "set the class attribute `reference`")
    frozen = dataclasses.is_dataclass(loss) and loss.__dataclass_params__.frozen  # type: ignore[attr-defined]
    yield Check("frozen dataclass", frozen, "" if frozen else "decorate the class with @dataclass(frozen=True)")
    bad = [f.name for f in dataclasses.fields(loss) if "domain" not in f.metadata]  # type: ignore[arg-type]
    yield Check("parameters have domains", not bad, f"no domain: {', '.join(bad)}; use parameter(...)" if bad else "")
    examples = loss.examples()
    good = len(examples) > 0 and all(isinstance(e, type(loss)) for e in examples)
    yield Check("examples", good, f"{len(examples)} instance(s)" if good else "examples() must return instances")
    latex = loss.latex()
    yield Check("LaTeX", len(latex) > 0, latex)


def _pairs() -> list[Pair]:
    """Samples with every argument generic, so that a swapped or forgotten one shows."""
    return [Pair(-0.8 + u / 2, -0.8 - u / 2, -1.3 + r / 2, -1.3 - r / 2, 3, 5) for u in _NEAR for r in _REFERENCES]


def _values(loss: Loss) -> Iterator[Check]:
    import torch

    worst, where = 0.0, ""
    for y in _pairs():
        exact = _digits(loss, y)
        for kind, value in (
            ("numpy", float(loss.value(y))),
            ("torch", float(loss.torch_value(Pair(*(torch.tensor(float(x), dtype=torch.float64) for x in y))))),
        ):
            gap = float(abs(value - exact) / (abs(exact) + 1e-300 + 1e-2)) if np.isfinite(value) else np.inf
            if not gap <= worst:
                worst, where = gap, f"{kind} at u = {float(y.u):g}, u_ref = {float(y.u_ref):g}"
    yield Check("numpy, torch and 50 digits agree", worst < 1e-12, f"worst {worst:.1e} ({where or 'everywhere'})")
    lost = []
    for u in np.concatenate([_NEAR, _FAR]):
        y = Pair(u / 2, -u / 2, 0.1, -0.1, 2, 2)
        tensors = Pair(*(torch.tensor(float(x), dtype=torch.float64) for x in y))
        seen = [float(loss.value(y)), float(loss.torch_value(tensors)), *map(float, loss.incentives(y))]
        if np.isnan(seen).any():
            lost.append(f"u = {u:g}")
    cause = f"NaN at {', '.join(lost)}: an intermediate overflows; use log_sigmoid, softplus or expm1" if lost else ""
    yield Check("no NaN up to margins of 1e4", not lost, cause)


def _digits(loss: Loss, y: Pair, digits: int = 50) -> Any:
    with mpmath.workdps(digits):
        return mpmath.mpf(loss.mpmath_value(y))


def _forms(loss: MarginLoss) -> list[MarginForm]:
    return [MarginForm(loss, r) for r in _REFERENCES]


def _slopes(loss: MarginLoss) -> Iterator[Check]:
    shift, where = 0.0, ""
    for y in _pairs():
        moved = y._replace(a=y.a - 2.7, b=y.b - 2.7)
        gap = abs(float(loss.value(y)) - float(loss.value(moved)))
        if gap > shift + 1e-12:
            shift, where = gap, f"u = {float(y.u):g}"
    detail = f"shifting both ln pi changes the loss by {shift:.2g} at {where}: derive from Loss" if where else ""
    yield Check("depends on the margin alone", not where, detail)
    worst, place = 0.0, ""
    for form in _forms(loss):
        u = _off_kinks(form, _NEAR)
        with mpmath.workdps(40):
            value = lambda x, f=form: _at(loss, x, f.u_ref)  # noqa: E731
            exact = np.array([float(-mpmath.diff(value, mpmath.mpf(float(v)))) for v in u])
        for kind, G in (("slope", form.slope(u)), ("autodiff", loss.incentives(Pair.of_margin(u, form.u_ref))[0])):
            gap = np.abs(G - exact) / (np.abs(exact) + 1e-3)
            if not gap.max() <= worst:
                worst, place = float(gap.max()), f"{kind} at u = {u[gap.argmax()]:g}, u_ref = {form.u_ref:g}"
    detail = f"worst {worst:.1e} ({place or 'everywhere'})"
    yield Check("slopes: closed form, autodiff, 40 digits", worst < 1e-9, detail)
    if loss.closed_log_slope is not None and loss.closed_slope is not None:
        gaps = [
            np.abs(form.log_slope(u) - np.log(np.abs(form.slope(u)))).max()
            for form in _forms(loss)
            for u in [_off_kinks(form, _NEAR)]
        ]
        yield Check("closed_log_slope is ln|closed_slope|", max(gaps) < 1e-10, f"worst {max(gaps):.1e}")
    finite = [np.isnan(form.log_slope(_FAR)).any() or (form.log_slope(_FAR) == np.inf).any() for form in _forms(loss)]
    yield Check("ln|G| is never NaN or inf up to margins of 1e4", not any(finite), "")
    worst, place = 0.0, ""
    for form in _forms(loss):
        for u in _off_kinks(form, _FAR):
            exact = slope_mpmath(loss, float(u), form.u_ref)
            target = float(mpmath.log(abs(exact))) if exact else -np.inf
            seen = float(form.log_slope(u))
            gap = 0.0 if seen == target else abs(seen - target) / (1 + abs(target)) if np.isfinite(target) else np.inf
            if not gap <= worst:
                worst, place = gap, f"u = {u:g}, u_ref = {form.u_ref:g}: {seen:g}, by many digits {target:g}"
    yield Check("ln|G| far out agrees with many digits", worst < 1e-9, f"worst {worst:.1e} ({place or 'everywhere'})")


def _at(loss: MarginLoss, u: Any, u_ref: float) -> Any:
    from theory.ops import MPMATH

    return loss.formula(MPMATH, Pair.of_margin(u, mpmath.mpf(u_ref)))


def _off_kinks(form: MarginForm, u: Array) -> Array:
    """Margins away from kinks (no derivative there) and from zeros of the slope (no logarithm there)."""
    special = np.array([*form.kinks, *form.zeros], dtype=float)
    if not special.size:
        return u
    u = u[np.abs(u[:, None] - special).min(axis=1) > 0.05]
    with np.errstate(divide="ignore"):
        return u[np.isfinite(np.log(np.abs(form.slope(u))))]


def _claims(loss: MarginLoss) -> Iterator[Check]:
    claims = loss.claims
    scale = _width(loss)
    for form in _forms(loss):
        u = form.u_ref + scale * np.linspace(-30, 30, 6001)
        u = np.unique(np.concatenate([u, *(np.asarray(x)[None] for x in (*form.kinks, *form.zeros))]))
        l, G = form.value(u), form.slope(u)
        keep = np.isfinite(l) & np.isfinite(G)
        u, l, G = u[keep], l[keep], G[keep]
        tag = f"(u_ref = {form.u_ref:g})"
        size = np.abs(G).max()
        yield _claim("decreasing", claims.decreasing, G < -1e-9 * size, u, tag, "the slope points up", loss)
        yield _claim("convex", claims.convex, np.diff(G) > 1e-9 * size, u[1:], tag, "the loss is concave", loss)
        yield _claim("non-negative", claims.nonnegative, l < -1e-12 * (1 + np.abs(l).max()), u, tag, "l < 0", loss)
        jump, at = _largest_jump(form, u, scale)
        smooth = jump < 1e-3 * size
        good = smooth == claims.differentiable
        said = "claimed differentiable" if claims.differentiable else "claimed to have a kink"
        yield Check(f"differentiable {tag}", good, f"{said}; largest jump of the slope {jump:.2g} at u = {at:g}")
    u = _NEAR
    same = np.allclose(_forms(loss)[0].value(u), _forms(loss)[1].value(u), rtol=1e-12, atol=1e-12)
    detail = "the loss ignores the reference" if same else "the loss depends on the reference"
    ok = bool(same) == claims.reference_free
    yield Check("reference_free", ok, detail + ("" if ok else f", but the claim is {claims.reference_free}"))


def _claim(
    name: str, claimed: bool, broken: NDArray[np.bool_], u: Array, tag: str, cause: str, loss: MarginLoss
) -> Check:
    """A claim holds everywhere, or (where denied) has a counter-example."""
    if claimed:
        at = f"claimed, but at u = {u[broken.argmax()]:g} {cause}" if broken.any() else "claimed, holds"
        return Check(f"{name} {tag}", not broken.any(), at)
    found = (
        f"denied; counter-example at u = {u[broken.argmax()]:g}"
        if broken.any()
        else (f"denied, but no counter-example was found: set {name.replace('non-negative', 'nonnegative')}=True")
    )
    return Check(f"{name} {tag}", bool(broken.any()), found)


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


def _landmarks(loss: MarginLoss) -> Iterator[Check]:
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

    u = form.u_ref + np.linspace(-5, 5, 101) * _width(form.loss)
    match law:
        case ConstantSlope(rate, end):
            u = u[u < end]
            G = np.full_like(u, rate)
        case LinearSlope(rate, zero):
            u = u[u < zero]
            G = rate * (zero - u)
        case LogisticSlope(beta, centre):
            G = beta / (1 + np.exp(beta * (u - centre)))
        case ExponentialSlope(beta, centre):
            G = beta * np.exp(-beta * (u - centre))
        case _:
            return Check(f"law {tag}", False, f"unknown law {law!r}")
    gap = np.abs(G - form.slope(u)) / (np.abs(G) + 1e-300)
    return Check(f"slope follows {type(law).__name__} {tag}", bool(gap.max() < 1e-9), f"worst {gap.max():.1e}")

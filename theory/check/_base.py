"""What a check is, what a report is, and how a loss is looked at: on every backend, at points that are generic."""

import dataclasses
import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mpmath
import numpy as np
from numpy.typing import NDArray

from theory.losses import Loss, Pair
from theory.ops import DUAL, MPMATH, Dual, NumpyOps

Array = NDArray[np.float64]

# Margins looked at: around 0, and far out, where formulas overflow. Two references, so that a wrong one shows.
NEAR = np.array([-7.3, -2.1, -0.63, -1e-3, 0.0, 0.41, 1.9, 5.7, 11.0])
FAR = np.array([-1e4, -3e3, -745.0, -60.0, 60.0, 745.0, 3e3, 1e4])
REFERENCES = (0.0, 0.37)


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

    def to_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "ok": self.ok, "checks": [dataclasses.asdict(c) for c in self.checks]}

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


Battery = Callable[[Any], Iterator[Check]]


# ---- points


def pair(u: float, u_ref: float, drop: float = 0.3) -> Pair:
    """A sample of these margins with log-probabilities <= -drop, generic in everything else."""
    return Pair(
        -drop + min(u, 0.0), -drop - max(u, 0.0), -1.3 + min(u_ref, 0), -1.3 - max(u_ref, 0), 3, 5, norm_ratio=1.7
    )


def near_pairs() -> list[Pair]:
    """Samples of moderate margins, every argument generic, so that a swapped or forgotten one shows."""
    return [pair(u, r) for u in NEAR for r in REFERENCES]


def where(y: Pair) -> str:
    """A point as reports print it."""
    a, b, a_ref, b_ref = (float(np.ravel(x)[0]) for x in y[:4])
    return f"a = {a:g}, b = {b:g} (u = {a - b:g}; references {a_ref:g}, {b_ref:g})"


# ---- evaluation


def tensor(x: Any) -> Any:
    """A float64 tensor of a number or an array."""
    import torch

    return torch.as_tensor(np.asarray(x, dtype=np.float64))


def tensors(y: Any) -> Any:
    """The same record with tensors for numbers and arrays."""
    return type(y)(*map(tensor, y))


def digits_value(loss: Loss, y: Pair, digits: int = 50) -> Any:
    """The formula at one point in many digits."""
    with mpmath.workdps(digits):
        return mpmath.mpf(loss.formula(MPMATH, Pair(*(mpmath.mpf(float(x)) for x in y))))


def digits_incentives(loss: Loss, y: Pair, digits: int = 40) -> tuple[Any, Any]:
    """(d_w, d_l) at one point by dual numbers in many digits; log-probabilities may be mpmath numbers."""
    with mpmath.workdps(digits):
        a, b, *rest = (mpmath.mpf(x) for x in y)
        d_w = -Dual.of(loss.formula(DUAL, Pair(Dual(a, 1), Dual(b), *rest))).dx
        d_l = Dual.of(loss.formula(DUAL, Pair(Dual(a), Dual(b, 1), *rest))).dx
        return d_w, d_l


def gap(seen: float, exact: Any, floor: float) -> float:
    """|seen - exact| / (|exact| + floor); inf for a NaN or a wrong infinity, 0 where both are the same infinity."""
    exact = mpmath.mpf(exact)
    if not np.isfinite(seen):
        return 0.0 if seen == float(exact) else np.inf
    return float(abs(mpmath.mpf(float(seen)) - exact) / (abs(exact) + floor)) if mpmath.isfinite(exact) else np.inf


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread: its arrays here are small, and waiting for threads takes longer than the work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class FrozenOps(NumpyOps):
    """numpy, with every `detach` held at what it was when this was made: differences then respect stop-gradients.

    The first call of a formula records what it detaches; later calls, at points beside, get the recorded values.
    """

    def __init__(self) -> None:
        self._held: list[Any] = []
        self._next: int | None = None  # None while recording

    def replay(self) -> "FrozenOps":
        self._next = 0
        return self

    def detach(self, x: Any) -> Any:
        if self._next is None:
            self._held.append(np.array(x, copy=True))
            return x
        self._next += 1
        return self._held[self._next - 1]


def differences(formula: Callable[[Any, Any], Any], x: Array, step: float = 1e-5) -> Array:
    """The gradient of `sum formula(ops, x)` at x by central differences, fourth order; stop-gradients respected."""
    ops = FrozenOps()
    formula(ops, x)
    out = np.zeros_like(x)
    for i in np.ndindex(*x.shape):
        for weight, shift in ((8, 1), (-8, -1), (-1, 2), (1, -2)):
            moved = x.copy()
            moved[i] += shift * step
            out[i] += weight * float(np.sum(formula(ops.replay(), moved))) / (12 * step)
    return out


def is_combinator(loss: Loss) -> bool:
    """Whether it is made of other losses, its fields."""
    values = [getattr(loss, f.name) for f in dataclasses.fields(loss)] if dataclasses.is_dataclass(loss) else []
    return any(isinstance(x, Loss) for v in values for x in (v if isinstance(v, tuple) else (v,)))


def no_memory(loss: Loss, points: list[Any]) -> Check:
    """The same value twice, other points between; parameters untouched."""
    before = repr(loss)
    first = [np.array(loss.value(y)) for y in points]
    again = [np.array(loss.value(y)) for y in reversed(points)][::-1]
    moved = [i for i, (x, z) in enumerate(zip(first, again, strict=True)) if not np.array_equal(x, z, equal_nan=True)]
    cause = ""
    if moved:
        cause = f"two calls at one point gave {float(first[moved[0]].ravel()[0]):g} and "
        cause += (
            f"{float(again[moved[0]].ravel()[0]):g}: the formula keeps state; it must be a function of its arguments"
        )
    elif repr(loss) != before:
        cause = f"evaluating changed the loss from {before} to {loss!r}"
    return Check("no memory", not cause, cause)

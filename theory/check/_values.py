"""Values of a loss of log-probabilities: backends agree, arrays are arrays of values, nothing is NaN far out."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from theory.check._base import (
    FAR,
    NEAR,
    Check,
    digits_incentives,
    digits_value,
    gap,
    near_pairs,
    no_memory,
    pair,
    tensors,
    where,
)
from theory.losses import Loss, Pair

# Start of the far points: references beside the policy, far below it (log-ratios of +1e4), unequal lengths.
_FAR_REFERENCES = ((-3.1, -4.7), (-9999.0, -10003.0))


def values(loss: Loss) -> Iterator[Check]:
    """numpy, torch and 50 digits agree; arrays; no memory; far out."""
    points = near_pairs()
    yield no_memory(loss, points)
    shape = _elementwise(loss, points)
    yield shape
    if not shape.ok:
        return  # everything below would repeat it
    worst, at = 0.0, ""
    for y in points:
        exact = digits_value(loss, y)
        for kind, value in (("numpy", float(loss.value(y))), ("torch", float(loss.torch_value(tensors(y))))):
            off = gap(value, exact, 1e-2)
            if not off <= worst:
                worst, at = off, f"{kind} at {where(y)}"
    yield Check("numpy, torch and 50 digits agree", worst < 1e-12, f"worst {worst:.1e} ({at or 'everywhere'})")
    yield from _far(loss)


def _elementwise(loss: Loss, points: list[Pair]) -> Check:
    """The value of an array is the array of values; of a coupled loss, of batches of one."""
    name = "an array of samples has an array of values"
    alone = np.array([float(np.ravel(loss.value(y))[0]) for y in points])
    together = Pair(*(np.array(x, dtype=np.float64) for x in zip(*points, strict=True)))
    if loss.coupled:
        together = Pair(*(x[:, None] for x in together))
    seen = np.asarray(loss.value(together))
    if seen.shape != together.a.shape:
        cause = f"{together.a.shape} samples have a value of shape {seen.shape}: "
        cause += "the formula sums or averages; return one value per sample"
        return Check(name, False, cause)
    seen = seen.reshape(-1)
    off = ~np.isclose(seen, alone, rtol=1e-13, atol=1e-14, equal_nan=True)
    if not off.any():
        return Check(name, True)
    cause = f"at {where(points[int(off.argmax())])} the value is {seen[off.argmax()]:g} in an array and "
    cause += f"{alone[off.argmax()]:g} alone: "
    if loss.coupled:
        cause += "batches see each other; sort and average along the last axis alone"
    else:
        cause += "samples see each other; set coupled = True, or use no sum or mean"
    return Check(name, False, cause)


def far_points() -> list[Pair]:
    """Margins up to 1e4, log-probabilities <= 0, probable and improbable responses."""
    out = []
    for u in np.concatenate([NEAR, FAR]):
        for drop in (0.3, 5e3):
            out += [pair(u, 0.37, drop)._replace(a_ref=a, b_ref=b) for a, b in _FAR_REFERENCES]
    return out


def _far(loss: Loss) -> Iterator[Check]:
    lost, overflown = [], ""
    for y in far_points():
        seen: dict[str, Any] = {"numpy": float(loss.value(y)), "torch": float(loss.torch_value(tensors(y)))}
        seen["d_w"], seen["d_l"] = map(float, loss.incentives(y))
        bad = [k for k, x in seen.items() if np.isnan(x)]
        if bad:
            lost.append(f"{where(y)} ({', '.join(bad)})")
        elif not overflown:
            overflown = _wrong_infinity(loss, y, seen)
    some = "; ".join(lost[:3]) + (f"; and {len(lost) - 3} more" if len(lost) > 3 else "")
    cause = f"NaN at {some}: an intermediate overflows; use log_sigmoid, softplus or expm1" if lost else ""
    yield Check("no NaN up to margins of 1e4", not lost, cause)
    yield Check("values and incentives far out agree with many digits", not overflown, overflown)


def _wrong_infinity(loss: Loss, y: Pair, seen: dict[str, Any]) -> str:
    """Far out: infinite only where the exact number is beyond float64, and right where it is not."""
    exact = digits_value(loss, y, 400)
    targets = [("numpy", exact), ("torch", exact)]
    if not loss.uses_norms:  # else gradients are rescaled by norms, which only automatic differentiation sees
        targets += zip(("d_w", "d_l"), digits_incentives(loss, y, 400), strict=True)
    for kind, target in targets:
        # Slopes are compared absolutely: those below float64's resolution of the largest part are lost to rounding.
        off = gap(seen[kind], target, 1e-2 if kind in ("numpy", "torch") else 1e-3)
        if not off < 1e-9:
            hint = ": an intermediate overflows; use log_sigmoid, softplus or expm1" if np.isinf(seen[kind]) else ""
            return f"{kind} is {seen[kind]:g} at {where(y)}, by 400 digits {float(target):g}{hint}"
    return ""

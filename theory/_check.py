"""Argument checks. Every message names the argument, its value and what was expected."""

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.floating[Any]]


class SolverError(RuntimeError):
    """A solver could not deliver the accuracy asked for; nothing was returned in its place."""


@dataclass(frozen=True)
class Interval:
    """A domain of real numbers; validation and test generators read the same object."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = True
    open_high: bool = True
    typical: tuple[float, float] = (0.1, 2.0)

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.open_low else x >= self.low
        below = x < self.high if self.open_high else x <= self.high
        return above and below and math.isfinite(x)

    def __str__(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


POSITIVE = Interval(low=0.0)
REAL = Interval(typical=(-2.0, 2.0))


def check_number(value: Any, name: str, domain: Interval = REAL) -> float:
    """`value` as a finite float inside `domain`, or a ValueError that says what was wrong."""
    if isinstance(value, bool) or not np.isscalar(value) or isinstance(value, str | bytes | complex):
        raise ValueError(f"{name} must be a real number in {domain}, got {value!r}")
    number = float(value)  # type: ignore[arg-type]
    if number not in domain:
        raise ValueError(f"{name} must be in {domain}, got {value!r}")
    return number


def check_array(value: ArrayLike, name: str, shape: tuple[int | None, ...]) -> FloatArray:
    """`value` as a finite floating array of the given shape (None: any size, at least 1).

    float32 and float64 arrays pass through without a copy, anything else real becomes float64.
    """
    array = np.asarray(value)
    if array.dtype.kind in "iu" or array.dtype == np.float16:
        array = array.astype(np.float64)
    if array.dtype not in (np.float32, np.float64):
        raise ValueError(f"{name} must hold real numbers, got dtype {array.dtype}")
    wanted = "(" + ", ".join("any" if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "") + ")"
    fits = array.ndim == len(shape) and all(s in (None, n) for s, n in zip(shape, array.shape, strict=True))
    if not fits or 0 in array.shape:
        raise ValueError(f"{name} must have shape {wanted}, got {array.shape}")
    # The sum of a float array is finite unless an entry is not (or it overflows): one read, no copy.
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(array.sum(dtype=np.float64)) if array.dtype == np.float64 else float(array.sum())
    if not math.isfinite(total) and not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, got {array[where]} at {where}")
    return array


def check_times(value: ArrayLike, name: str = "times", *, low: float = 0.0) -> NDArray[np.float64]:
    """A one-dimensional, non-decreasing grid of numbers >= low (scalars become length one)."""
    times = np.atleast_1d(np.asarray(value, dtype=np.float64))
    if times.ndim != 1 or times.size == 0:
        raise ValueError(f"{name} must be one-dimensional and not empty, got shape {times.shape}")
    if np.isnan(times).any():
        raise ValueError(f"{name} must not hold NaN, got {times!r}")
    if (times < low).any():
        raise ValueError(f"{name} must be >= {low:g}, got {times.min():g}")
    steps = times[1:] < times[:-1]
    if steps.any():
        i = int(np.argmax(steps))
        raise ValueError(f"{name} must not decrease, got {times[i]:g} followed by {times[i + 1]:g} at {i + 1}")
    return times


def check_count(value: Any, name: str, low: int = 1) -> int:
    """`value` as an integer >= low."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
    return int(value)


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Message for a name that is not known, with the nearest ones that are."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    if near:
        return f"unknown {kind} {name!r}; did you mean {', '.join(map(repr, near))}?"
    shown = ", ".join(names[:100]) + (", ..." if len(names) > 100 else "")
    return f"unknown {kind} {name!r}; known: {shown}"

"""Forms of the slope G(u) for which the clock t(u) is elementary (exact_solution E1, E5)."""

from typing import Any, NamedTuple


class ConstantSlope(NamedTuple):
    """G = rate for u < end, 0 from there on (hinge-like)."""

    rate: Any
    end: Any


class LinearSlope(NamedTuple):
    """G = rate (zero - u) (quadratic losses); valid for u < until."""

    rate: Any
    zero: Any


class LogisticSlope(NamedTuple):
    """G = beta sigmoid(-beta (u - centre))."""

    beta: Any
    centre: Any


class ExponentialSlope(NamedTuple):
    """G = beta exp(-beta (u - centre))."""

    beta: Any
    centre: Any


Law = ConstantSlope | LinearSlope | LogisticSlope | ExponentialSlope

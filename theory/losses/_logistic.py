"""The logistic loss of a label that may be wrong, a piece of several losses."""

from typing import Any

from theory.ops import Ops


def smoothed(ops: Ops, z: Any, eps: Any) -> Any:
    """-(1-eps) ln sigmoid(z) - eps ln sigmoid(-z)."""
    return -(1 - eps) * ops.log_sigmoid(z) - eps * ops.log_sigmoid(-z)

"""Many paths looked at together, on a grid fine enough for pictures and shares (the exact extrema are in theory)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from theory.extrema import rising_from
from theory.path import Path

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Deepest:
    """Per model of a batch, all (B,)."""

    depth: Array  # lowest ln pi(y+) minus its start, nats
    largest_drop: Array  # of the probability pi(y+), from any point of the path to any later one
    top_gainer: NDArray[np.intp]  # token whose probability rose most at the lowest point after the drop


def deepest(path: Path, points: int = 241) -> Deepest:
    """Walk every path of the batch up to where pi(y+) must rise for good (one mode, W and h both trained)."""
    motion = path.motion
    if motion.k.shape[1] != 1 or not (motion.omega > 0).all() or not (motion.P > 0).all():
        raise ValueError("path must have one mode with W and h both trained and P > 0")
    y = np.linspace(0.0, 1.0, points) ** 2 * (
        rising_from(path)[:, None] * motion.omega
    )  # denser near the start, where curves bend
    log_p = path.log_probs(y / motion.omega)  # (B, T, V)
    rows = np.arange(len(log_p))
    plus = log_p[rows, :, path.plus]
    p = np.exp(plus)
    drop = np.maximum.accumulate(p, axis=1) - p
    at = drop.argmax(axis=1)
    rise = np.exp(log_p[rows, at]) - np.exp(log_p[:, 0])
    return Deepest(plus.min(axis=1) - plus[:, 0], drop.max(axis=1), rise.argmax(axis=1))

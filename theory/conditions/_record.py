"""What the records of conditions share."""

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory._check import check_count
from theory.losses import TokenLoss
from theory.problem import Positions, Problem

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


class Record:
    """A frozen dataclass of arrays that can be saved."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and text."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}  # type: ignore[arg-type]


def plain(x: Any) -> Any:
    """Arrays as lists, records as dictionaries."""
    if isinstance(x, Record):
        return x.to_dict()
    if isinstance(x, np.ndarray | np.generic):
        return x.tolist()
    return [plain(y) for y in x] if isinstance(x, tuple) else x


def pair_of(problem: Problem, sample: int, whole: bool = False) -> tuple[Positions, Positions]:
    """(y+, y-) of a sample; a ValueError for a sample out of range or, unless `whole`, a loss without incentives."""
    if check_count(sample, "sample", low=0) >= len(problem.samples):
        raise ValueError(f"sample must be an index in [0, {len(problem.samples)}), got {sample}")
    if not whole and isinstance(problem.loss, TokenLoss):
        raise ValueError(
            f"loss must be one of two log-probabilities, with incentives d_w and d_l, got {problem.loss!r}"
        )
    return problem.pairs[sample]

"""What a validation found: the measured courses, how well each score foretells them, and the verdict in words.

A fall is minus the change of ln pi(y+). Every score is oriented so that larger means: a deeper fall is expected; a rank
correlation (Spearman) of +1 is a score that ranks all runs rightly.

The rule. Intervals are simultaneous: with 95 % all of a table hold together, those of the correlations and those of
what is left of them at equal length difference (studentised maximum over bootstrap draws of the runs, on Fisher's
scale). A score is

    useless                      if its interval lies below WORTH (misleading: below 0),
    useful                       if its interval lies above 0, and also at equal length difference,
    no better than length        if its interval lies above 0, and at equal length difference below WORTH,
    undecided                    else; `needed` is the number of runs at which it would be decided, were the
                                 correlations to stay as they are and the intervals to narrow with the root of the runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from sims.language.ranks import LEVEL, correlations
from sims.language.scoring.together import Together

Array = NDArray[np.float64]
DRAWS = 2000
WORTH = 0.3  # the rank correlation below which dropping the pairs ranked highest does little more than dropping any
DROPPED = (0.05, 0.1, 0.2)
PERCENTILES = (0, 25, 50, 75, 100)
FEW = 5  # falls
LENGTH = "length_difference"


class About(NamedTuple):
    """A score: its name in words, +1 or -1 as its column has larger or smaller values for a deeper fall, its cost."""

    label: str
    sign: int
    cost: str


SCORES = {
    "ches": About("CHES", +1, "1 forward pass"),
    "ln_ches": About("CHES, length-normalised", +1, "1 forward pass"),
    "last_hidden": About("last-hidden inner product", +1, "1 forward pass"),
    "edit_distance": About("edit similarity", -1, "no model"),
    "alpha": About("head term, alphas kept", +1, "1 forward pass, logits"),
    "gradient_step_chosen": About("gradient probe", -1, "2 backward passes"),
    "sign_step_chosen": About("sign probe", -1, "2 backward passes"),
    LENGTH: About("length, rejected - chosen", +1, "no model"),
}
PROBES = ("gradient_step_chosen", "sign_step_chosen")


class Range(NamedTuple):
    """A correlation and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Finding:
    """How well a score foretells the fall.

    rho : with the fall at the end. beyond : the same at equal length difference (None for the length itself).
    early : rho with the fall by the first step.
    removed : share of the sum of all falls that dropping the DROPPED shares of pairs with the highest scores would have
        removed; precision : share of those dropped that fell. Both empty without `Validation.lifts`.
    needed : runs that would decide, where it is undecided.
    """

    name: str
    rho: Range
    beyond: Range | None
    early: Range
    removed: tuple[float, ...]
    precision: tuple[float, ...]
    verdict: str
    needed: int | None

    @property
    def label(self) -> str:
        return SCORES[self.name].label


@dataclass(frozen=True, eq=False, repr=False)
class Validation:
    """N pairs, scored by the model as it is; R runs of T steps from there. `str()` is the report.

    parameters : what produced it. where : of every pair, its place in the data.
    scores : by name, (N,), oriented: larger means a deeper fall is expected.
    runs : indices of the pairs of every run. chosen, rejected (R, T + 1) : mean ln pi(y+) and ln pi(y-) over the pairs
        of a run, before every step and after the last, nats.
    percentiles : score -> (5,) mean change of ln pi(y+) over the pairs around its percentiles 0, 25, 50, 75, 100,
        trained on together; empty unless asked for.
    seconds : per pair, of each group of scores, and "run".
    first : what all pairs together do at first order, and how much of it to each other.
    whole (2, T + 1) : mean ln pi(y+) and ln pi(y-) of all pairs, all trained on together, with the steps of the runs;
        None, as `first`, for runs alone.
    """

    parameters: dict[str, Any]
    where: tuple[str, ...]
    scores: dict[str, Array]
    runs: tuple[tuple[int, ...], ...]
    chosen: Array
    rejected: Array
    percentiles: dict[str, Array]
    seconds: dict[str, float]
    first: Together | None = None
    whole: Array | None = None

    @property
    def alone(self) -> bool:
        """Whether every run holds one pair."""
        return all(len(rows) == 1 for rows in self.runs)

    @property
    def lifts(self) -> bool:
        """Whether it can be said what dropping pairs removes: of pairs, and with enough falls to speak of shares."""
        return self.alone and int((self.fall() > 0).sum()) >= FEW

    def fall(self, step: int = -1) -> Array:
        """(R,) by how much ln pi(y+) has fallen after a step, nats."""
        return self.chosen[:, 0] - self.chosen[:, step]

    def margin(self, step: int = -1) -> Array:
        """(R,) by how much the margin has grown after a step, nats."""
        u = self.chosen - self.rejected
        return u[:, step] - u[:, 0]

    @property
    def together(self) -> tuple[float, float] | None:
        """By how much the mean ln pi(y+) fell and the mean margin grew when all pairs were trained on together."""
        if self.whole is None:
            return None
        chosen, rejected = self.whole[:, -1] - self.whole[:, 0]
        return -float(chosen), float(chosen - rejected)

    def of_runs(self, name: str) -> Array:
        """(R,) the mean of a score over the pairs of each run."""
        return np.array([self.scores[name][list(rows)].mean() for rows in self.runs])

    @cached_property
    def findings(self) -> list[Finding]:
        """Every score, the best first."""
        late, early = (ranges({n: self.of_runs(n) for n in self.scores}, self.fall(s)) for s in (-1, 1))
        found = [self._finding(name, *late[name], early[name][0]) for name in self.scores]
        return sorted(found, key=lambda f: -f.rho.value)

    def finding(self, name: str) -> Finding:
        return next(f for f in self.findings if f.name == name)

    def _finding(self, name: str, rho: Range, beyond: Range | None, early: Range) -> Finding:
        lifts = [self.lift(name, q) for q in DROPPED] if self.lifts else []
        removed, precision = (tuple(x[i] for x in lifts) for i in (0, 1))
        verdict = decide(rho, beyond)
        needed = runs_needed(rho, beyond, len(self.runs)) if verdict == "undecided" else None
        return Finding(name, rho, beyond, early, removed, precision, verdict, needed)

    def lift(self, name: str | None, share: float) -> tuple[float, float]:
        """(share of all falls removed, share of the dropped that fell) by dropping the pairs with the highest scores.

        name : of a score, or None for the best order there is, that of the measured falls. NaN if nothing fell.
        """
        fall = np.maximum(self.fall(), 0.0)
        order = np.argsort(-(self.fall() if name is None else self.of_runs(name)), kind="stable")
        out = order[: max(1, round(share * len(fall)))]
        total = float(fall.sum())
        return (float(fall[out].sum()) / total if total else math.nan), float((fall[out] > 0).mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` is the way back (what follows from the rest is written, not read)."""
        return {
            "parameters": self.parameters,
            "where": list(self.where),
            "scores": {name: x.tolist() for name, x in self.scores.items()},
            "runs": [list(rows) for rows in self.runs],
            "chosen": self.chosen.tolist(),
            "rejected": self.rejected.tolist(),
            "percentiles": {name: x.tolist() for name, x in self.percentiles.items()},
            "seconds": self.seconds,
            "first": None if self.first is None else self.first.to_dict(),
            "whole": None if self.whole is None else self.whole.tolist(),
            "findings": [_plain(f) for f in self.findings],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The record from saved values."""

        def arrays(lists: dict[str, Any]) -> dict[str, Array]:
            return {name: np.array(x, dtype=np.float64) for name, x in lists.items()}

        return cls(
            data["parameters"],
            tuple(data["where"]),
            arrays(data["scores"]),
            tuple(tuple(rows) for rows in data["runs"]),
            np.array(data["chosen"], dtype=np.float64),
            np.array(data["rejected"], dtype=np.float64),
            arrays(data["percentiles"]),
            dict(data["seconds"]),
            None if data["first"] is None else Together(**data["first"]),
            None if data["whole"] is None else np.array(data["whole"], dtype=np.float64),
        )

    def __str__(self) -> str:
        from sims.language.validation.report import report

        return report(self)


def _plain(f: Finding) -> dict[str, Any]:
    ranges = {k: v._asdict() if v else None for k, v in (("rho", f.rho), ("beyond", f.beyond), ("early", f.early))}
    rest = {"removed": list(f.removed), "precision": list(f.precision), "verdict": f.verdict, "needed": f.needed}
    return {"name": f.name, "label": f.label, **ranges, **rest}


def ranges(
    scores: dict[str, Array], fall: Array, *, draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[Range, Range | None]]:
    """Of every score its correlation with the fall (R,), and that at equal length difference; intervals hold together.

    The scores' own LENGTH is what is held equal; without it nothing is.
    """
    n = len(fall)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    length = scores.get(LENGTH)
    given: dict[tuple[str, bool], Sequence[Array]] = {(name, False): () for name in scores}
    if length is not None:
        given |= {(name, True): (length,) for name in scores if name != LENGTH}
    values = np.array([correlations(scores[k[0]], fall, g)[0] for k, g in given.items()])
    boot = np.array([correlations(scores[k[0]], fall, g, counts) for k, g in given.items()])
    z, boot = _fisher(values, n), _fisher(boot, n)
    spread = np.maximum(boot.std(axis=1), 1e-9)  # a perfect order is one in every draw
    spread *= np.quantile((np.abs(boot - z[:, None]) / spread[:, None]).max(axis=0), LEVEL)
    low, high = _rho(z - spread, n), _rho(z + spread, n)
    found = {k: Range(*map(float, row)) for k, row in zip(given, zip(values, low, high, strict=True), strict=True)}
    return {name: (found[name, False], found.get((name, True))) for name in scores}


def _fisher(rho: Any, n: int) -> Any:
    """Fisher's scale, on which intervals of n runs have about the same width everywhere; 1 stays finite."""
    return np.arctanh(np.multiply(rho, 1 - 1 / n))


def _rho(z: Any, n: int) -> Any:
    return np.clip(np.tanh(z) / (1 - 1 / n), -1.0, 1.0)


def decide(rho: Range, beyond: Range | None) -> str:
    """The verdict on a score (see the module)."""
    if rho.high < WORTH:
        return "misleading" if rho.high < 0 else "useless"
    if rho.low > 0 and (beyond is None or beyond.low > 0):
        return "useful"
    if rho.low > 0 and beyond is not None and beyond.high < WORTH:
        return "no better than length"
    return "undecided"


def runs_needed(rho: Range, beyond: Range | None, runs: int) -> int:
    """At how many runs the rule would decide, were the values to stay and the intervals to narrow with their root."""

    def to(found: Range, bound: float, above: bool) -> float:
        value, end, goal = _fisher([found.value, found.low if above else found.high, bound], runs)
        gap = value - goal if above else goal - value
        return 3 + (runs - 3) * float((end - value) / gap) ** 2 if gap > 0 else math.inf

    useless = to(rho, WORTH, above=False)
    better = to(rho, 0.0, above=True)
    beside = 0.0 if beyond is None else min(to(beyond, 0.0, above=True), to(beyond, WORTH, above=False))
    return 8 * math.ceil(min(useless, max(better, beside)) / 8)

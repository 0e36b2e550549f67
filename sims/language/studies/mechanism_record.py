"""What the mechanism experiment found: runs, first steps, and theories against the network; tables of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from sims.language.studies.beside import Beside

Array = NDArray[np.float64]
FELL = 0.3  # a run is displaced if pi(y+) falls by at least this from any time to a later one and ends below its start


@dataclass(frozen=True)
class Group:
    """Runs of one part of the network by one optimiser and rate, over all models and prompts (N runs).

    Each (N,) : pi(y+) at the start, its peak and its end; largest later drop; change of ln pi(y+) over the run (nats);
    pi of the rival at start and end (N, 2); margin gained (nats); whether the loss ever rose; the body's share of the
    margin's first-order growth at start and end (N, 2).
    r_max (N, 3) : where it is at most 1, moving h makes no ln pi(y+) fall: for h moving along a, for h moving as the
        body moves it at the start, the largest of these over the course; None for a frozen body.
    first : change of ln pi(y+) in the first step as "happened", and its rate as foretold from the "measured_kernel" (of
        a gradient or a sign step, as the optimiser's is) and for "unconstrained" features with the same share.
    points : moments of the runs on the phase diagram, each (M,): the body's "share" s; "rho", what ln pi(y+) loses per
        nat of margin that the body makes, over what it wins per nat that the head makes; "slope", what it then did win.
    """

    trained: str
    optimizer: str
    lr: float
    start: list[float]
    peak: list[float]
    final: list[float]
    drop: list[float]
    change: list[float]
    rival: list[list[float]]
    gained: list[float]
    rose: list[bool]
    share: list[list[float]]
    r_max: list[list[float | None]]
    first: dict[str, list[float]]
    points: dict[str, list[float]]

    @classmethod
    def of(cls, parts: Sequence[dict[str, Any]]) -> Self:
        """From the jobs' records of one condition, rounded to three digits."""
        runs = [r for part in parts for r in part["runs"]]
        fields: dict[str, Any] = {k: [r[k] for r in runs] for k in runs[0]}
        fields["first"] = {k: [f[k] for f in fields["first"]] for k in runs[0]["first"]}
        points = np.concatenate(fields["points"]).T.tolist()
        fields["points"] = dict(zip(("share", "rho", "slope"), points, strict=True))
        return cls(**{k: parts[0][k] for k in ("trained", "optimizer", "lr")}, **_rounded(fields))

    @property
    def displaced(self) -> int:
        """Runs with a later drop of at least FELL that end below their start."""
        return int(((np.array(self.drop) >= FELL) & (np.array(self.change) < 0)).sum())

    def foretold(self, theory: str) -> int:
        """Runs of which the sign of the first change of ln pi(y+) was foretold."""
        return int((np.sign(self.first[theory]) == np.sign(self.first["happened"])).sum())

    def row(self) -> str:
        start, peak, final, drop, change, gained = (
            float(np.mean(x)) for x in (self.start, self.peak, self.final, self.drop, self.change, self.gained)
        )
        share, rival = np.mean(self.share, axis=0), np.mean(self.rival, axis=0)
        return (
            f"{self.trained:5} {self.optimizer:8} {self.lr:<7g} {start:5.2f} {peak:5.2f} {final:5.2f} {drop:5.2f} "
            f"{change:+6.2f} {self.displaced:4d}/{len(self.start):<3d} {rival[0]:.2f} -> {rival[1]:.2f} "
            f"{gained:6.2f} {share[0]:6.3f} -> {share[1]:5.3f} {sum(self.rose):4d} "
            f"{self.foretold('measured_kernel'):6d} {self.foretold('unconstrained'):6d}"
        )


@dataclass(frozen=True)
class Mechanism:
    """The experiment; `str` gives its tables, `sims.plots.mechanism.save_mechanism` its figures.

    first : part and optimiser -> counts over all ordered pairs of a few words, each after one small step: how often
        ln pi(y+) fell and rose, and how many of these the kernel, and unconstrained features, foretold.
    """

    groups: tuple[Group, ...]
    beside: tuple[Beside, ...]
    first: dict[str, dict[str, int]]
    parameters: dict[str, Any]

    @classmethod
    def of(
        cls,
        runs: Sequence[dict[str, Any]],
        beside: Sequence[dict[str, Any]],
        first: Sequence[dict[str, list[list[float]]]],
        parameters: dict[str, Any],
    ) -> Self:
        """From the jobs' records."""
        gained = parameters["gained"]
        ends = lambda parts: float(np.mean([r["end"] for part in parts for r in part["runs"]]))  # noqa: E731
        return cls(
            tuple(Group.of(parts) for parts in _by_condition(runs)),
            tuple(Beside.of(parts, [*gained, ends(parts)]) for parts in _by_condition(beside)),
            {k: _counts(np.concatenate([np.asarray(part[k]) for part in first])) for k in first[0]},
            parameters,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "parameters": self.parameters,
            "first": self.first,
            "groups": [dict(vars(g)) for g in self.groups],
            "beside": [dict(vars(b)) for b in self.beside],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """From `to_dict`, also after JSON."""
        groups, beside = (Group(**g) for g in data["groups"]), (Beside(**b) for b in data["beside"])
        return cls(tuple(groups), tuple(beside), data["first"], data["parameters"])

    def phase(self) -> tuple[int, int, int]:
        """Moments of all runs; those whose fall or rise is the one that s and rho foretell; those that fall."""
        share, rho, slope = (np.concatenate([g.points[k] for g in self.groups]) for k in ("share", "rho", "slope"))
        falls = share * rho > 1 - share
        return len(share), int((falls == (slope < 0)).sum()), int((slope < 0).sum())

    def r_max(self) -> str:
        """What r_max says, in words."""
        of_a, first, most = np.array([r for g in self.groups for r in g.r_max if r[1] is not None]).T
        return (
            f"{of_a.min():.2f} to {of_a.max():.2f} along W_+ - W_-; above 1 along the body's own motion in "
            f"{(first > 1).sum()} of {len(first)} runs at the start, in {(most > 1).sum()} at some moment"
        )

    def __str__(self) -> str:
        lines = [
            f"Runs: {self.parameters['preferred']} over {self.parameters['dispreferred']}, "
            f"{self.parameters['steps']} steps; displaced: a later drop of at least {FELL} and an end below the start",
            "",
            "part  optimiser lr     start  peak final  drop    ln  displaced   "
            f"{self.parameters['rival']:12} margin  body's share  rose  first step foretold by kernel, unconstrained",
            *(g.row() for g in self.groups),
            "",
        ]
        total = sum(len(g.start) for g in self.groups)
        right = {k: sum(g.foretold(k) for g in self.groups) for k in ("measured_kernel", "unconstrained")}
        moments, agree, falling = self.phase()
        lines += [
            f"sign of the first change of ln pi(y+): right in {right['measured_kernel']} of {total} runs by the "
            f"measured kernel, {right['unconstrained']} for unconstrained features",
            f"phase diagram: {agree} of {moments} moments of all runs are on the side of s rho = 1 - s on which "
            f"ln pi(y+) moves as it did; it fell in {falling}",
            f"r_max: {self.r_max()}",
        ]
        head = f"{'kernel':>8} {'unconstrained':>14}"
        lines += ["", "One small step on every ordered pair of words: the sign of the change of ln pi(y+) foretold"]
        lines.append(f"  {'':12} {'fell':>6} {head}   {'rose':>6} {head}")
        for name, c in self.first.items():
            cells = [f"{c[k]:6d} {c[k + ', kernel']:8d} {c[k + ', unconstrained']:14d}" for k in ("fell", "rose")]
            lines.append(f"  {name:12} " + "   ".join(cells))
        words = self.parameters["preferred"], self.parameters["rival"]
        for b in self.beside:
            lines += ["", *b.report(*(words if b.what == "tokens" else ("y+", "the likeliest other response")))]
        return "\n".join(lines)


def _counts(rows: Array) -> dict[str, int]:
    """Of rows (happened, foretold by the kernel, without it): how many fell and rose, and were foretold."""
    happened, *told = np.sign(rows).T
    counts = {}
    for name, there in (("fell", happened < 0), ("rose", happened > 0)):
        counts[name] = int(there.sum())
        for theory, t in zip(("kernel", "unconstrained"), told, strict=True):
            counts[f"{name}, {theory}"] = int((there & (t == happened)).sum())
    return counts


def _by_condition(parts: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for part in parts:
        found.setdefault(tuple(part[k] for k in ("what", "trained", "optimizer", "lr")), []).append(part)
    return list(found.values())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.3g}") if isinstance(value, float) else value

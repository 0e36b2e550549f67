"""What the mechanism experiment found: runs, first steps, and theories against the network; tables of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 1000
SHOWN = (0.5, 2.0, 4.0, 8.0, 10.0)  # nats of margin in the tables, beside the end of the runs
FELL = 0.3  # a run is displaced if pi(y+) falls by at least this from any time to a later one and ends below its start
MOTION = ("cos dh, a", "cos dh, first step", "cos step, first step", "step / first step", "h alone", "W alone")


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
    points : (M, 3) moments of the runs on the phase diagram: the body's share s; rho, what ln pi(y+) loses per nat of
        margin that the body makes, over what it wins per nat that the head makes; what it then did win, in that unit.
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
    points: list[list[float]]

    @classmethod
    def of(cls, parts: Sequence[dict[str, Any]]) -> Self:
        """From the jobs' records of one condition, rounded to three digits."""
        runs = [r for part in parts for r in part["runs"]]
        fields: dict[str, Any] = {k: [r[k] for r in runs] for k in runs[0]}
        fields["first"] = {k: [f[k] for f in fields["first"]] for k in runs[0]["first"]}
        fields["points"] = [p for own in fields["points"] for p in own]
        return cls(**{k: parts[0][k] for k in ("trained", "optimizer", "lr")}, **_rounded(fields))

    @property
    def displaced(self) -> int:
        """Runs with a later drop of at least FELL that end below their start."""
        return int(((np.array(self.drop) >= FELL) & (np.array(self.change) < 0)).sum())

    def foretold(self, theory: str) -> int:
        """Runs of which the sign of the first change of ln pi(y+) was foretold."""
        return int((np.sign(self.first[theory]) == np.sign(self.first["happened"])).sum())

    def row(self) -> str:
        n = len(self.start)
        mean = lambda x: float(np.mean(x))  # noqa: E731
        share = np.mean(self.share, axis=0)
        return (
            f"{self.trained:5} {self.optimizer:8} {self.lr:<7g} {mean(self.start):5.2f} {mean(self.peak):5.2f} "
            f"{mean(self.final):5.2f} {mean(self.drop):5.2f} {mean(self.change):+6.2f} {self.displaced:4d}/{n:<3d} "
            f"{np.mean([r[0] for r in self.rival]):.2f} -> {np.mean([r[1] for r in self.rival]):.2f} "
            f"{mean(self.gained):6.2f} {share[0]:6.3f} -> {share[1]:5.3f} {sum(self.rose):4d} "
            f"{self.foretold('measured_kernel'):6d} {self.foretold('unconstrained'):6d}"
        )


@dataclass(frozen=True)
class Estimate:
    """A mean over runs and its 95 % interval, models and then their runs resampled."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:5.2f} [{self.low:5.2f}, {self.high:5.2f}]"


def estimate(values: Sequence[Array], seed: int = 0) -> Estimate:
    """From one array of runs per model; those without a value (NaN) are left out."""
    values = [v[np.isfinite(v)] for v in values if np.isfinite(v).any()]
    if not values:
        return Estimate(np.nan, np.nan, np.nan)
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(DRAWS):
        models = [values[i] for i in rng.integers(len(values), size=len(values))]
        drawn.append(np.concatenate([v[rng.integers(len(v), size=len(v))] for v in models]).mean())
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Estimate(float(np.concatenate(values).mean()), float(low), float(high))


@dataclass(frozen=True)
class Beside:
    """Theories beside the network, for one part of it, optimiser and rate, over all models and prompts.

    what : "tokens" after prompts of the persona, or "responses" of several tokens.
    gained (P,) : nats of margin; the last place is the end of the runs (its mean). runs (P,) : how many get there.
    happened (P, 2) : mean change of ln pi of y+ and of the rival. motion (P, 6) : means of MOTION, the last two the
        change of ln pi(y+) if h alone or W alone had moved.
    theories : label -> P places of {"n", "rank", "plus", "rival", "right", "rival_right"}: runs that the theory lets
        get there, Spearman correlation over tokens, mean forecast change, and the share of runs whose sign is right;
        rank and signs with intervals [value, low, high], a margin out of reach counted as a sign that is wrong.
    """

    what: str
    trained: str
    optimizer: str
    lr: float
    gained: list[float]
    runs: list[int]
    happened: list[list[float]]
    motion: list[list[float]]
    theories: dict[str, list[dict[str, Any]]]

    @classmethod
    def of(cls, parts: Sequence[dict[str, Any]], gained: Sequence[float]) -> Self:
        """From the jobs' records of one condition, one part per model."""
        runs = [r for part in parts for r in part["runs"]]
        places = len(runs[0]["happened"])
        reached = [p for p in range(places) if any(r["happened"][p] for r in runs)]
        mean = lambda key, p: np.mean([r[key][p] for r in runs if r[key][p]], axis=0).round(4).tolist()  # noqa: E731
        own = {k: parts[0][k] for k in ("what", "trained", "optimizer", "lr")}
        return cls(
            **own,
            gained=[round(float(gained[p]), 3) for p in reached],
            runs=[sum(r["happened"][p] is not None for r in runs) for p in reached],
            happened=[mean("happened", p) for p in reached],
            motion=[mean("motion", p) for p in reached] if runs[0]["motion"] else [],
            theories={label: [_place(parts, label, p) for p in reached] for label in runs[0]["theories"]},
        )

    def table(self, key: str) -> list[str]:
        """Rows of theories, columns of margins: "rank", "right" or "rival_right"."""
        shown = self._shown
        lines = [f"  {'margin gained':30}" + "".join(f"{self.gained[p]:>19.2f}" for p in shown)]
        lines.append(f"  {'runs':30}" + "".join(f"{self.runs[p]:>19d}" for p in shown))
        for label, places in self.theories.items():
            lines.append(f"  {label:30}" + "".join(f"{Estimate(*places[p][key])!s:>19}" for p in shown))
        return lines

    @property
    def _shown(self) -> list[int]:
        return [p for p, g in enumerate(self.gained[:-1]) if g in SHOWN] + [len(self.gained) - 1]

    def report(self, preferred: str, rival: str) -> list[str]:
        """Lines of its tables."""
        lines = [f"Theories beside the network: {self.what}, {self.trained} by {self.optimizer} {self.lr:g}"]
        names = {"rank": f"Spearman over {self.what}", "right": f"sign of the change of ln pi({preferred}) right"}
        names["rival_right"] = f"sign of the change of ln pi({rival}) right"
        for key, name in names.items():
            lines += ["", f" {name}", *self.table(key)]
        if self.motion:
            lines += ["", " how the features move, and the change of ln pi(y+) by h or W alone"]
            for i, name in enumerate(MOTION):
                lines.append(f"  {name:30}" + "".join(f"{self.motion[p][i]:19.2f}" for p in self._shown))
        return lines


def _place(parts: Sequence[dict[str, Any]], label: str, p: int) -> dict[str, Any]:
    ranks, signs = [], {"right": [], "rival_right": []}
    forecasts = []
    for part in parts:
        there = [(r["theories"][label][p], r["happened"][p]) for r in part["runs"] if r["happened"][p]]
        ranks.append(np.array([f[0] if f else np.nan for f, _ in there]))
        forecasts += [f for f, _ in there if f]
        for k, key in enumerate(signs):
            right = [float(f is not None and np.sign(f[1 + k]) == np.sign(h[k])) for f, h in there]
            signs[key].append(np.array(right))
    plus, rival = np.mean([f[1:] for f in forecasts], axis=0) if forecasts else (np.nan, np.nan)
    out = {"n": len(forecasts), "plus": round(float(plus), 4), "rival": round(float(rival), 4)}
    for key, values in (("rank", ranks), *signs.items()):
        e = estimate(values)
        out[key] = [round(x, 4) for x in (e.value, e.low, e.high)]
    return out


@dataclass(frozen=True)
class Mechanism:
    """The experiment; `str` gives its tables, `sims.plots.save_mechanism` its figures."""

    groups: tuple[Group, ...]
    beside: tuple[Beside, ...]
    parameters: dict[str, Any]

    @classmethod
    def of(cls, runs: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]], parameters: dict[str, Any]) -> Self:
        """From the jobs' records."""
        gained = parameters["gained"]
        ends = lambda parts: float(np.mean([r["end"] for part in parts for r in part["runs"]]))  # noqa: E731
        return cls(
            tuple(Group.of(parts) for parts in _by_condition(runs)),
            tuple(Beside.of(parts, [*gained, ends(parts)]) for parts in _by_condition(beside)),
            parameters,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "parameters": self.parameters,
            "groups": [dict(vars(g)) for g in self.groups],
            "beside": [dict(vars(b)) for b in self.beside],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """From `to_dict`, also after JSON."""
        groups, beside = (Group(**g) for g in data["groups"]), (Beside(**b) for b in data["beside"])
        return cls(tuple(groups), tuple(beside), data["parameters"])

    def phase(self) -> tuple[int, int, int]:
        """Moments of all runs; those whose fall or rise is the one that s and rho foretell; those that fall."""
        share, rho, slope = np.array([p for g in self.groups for p in g.points]).T
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
        words = self.parameters["preferred"], self.parameters["rival"]
        for b in self.beside:
            lines += ["", *b.report(*(words if b.what == "tokens" else ("y+", "the likeliest other response")))]
        return "\n".join(lines)


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

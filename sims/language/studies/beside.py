"""Theories beside the network: rank agreement over tokens and signs foretold, with intervals over models and runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
DRAWS = 1000
SHOWN = (0.5, 2.0, 4.0, 8.0, 10.0)  # nats of margin in the tables, beside the end of the runs
MOTION = ("cos dh, a", "cos dh, first step", "cos step, first step", "step / first step", "h alone", "W alone")


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
    total, count = np.zeros(DRAWS), np.zeros(DRAWS)
    for _ in values:  # one model drawn after another, and its runs
        which = rng.integers(len(values), size=DRAWS)
        for i, v in enumerate(values):
            drawn = v[rng.integers(len(v), size=(DRAWS, len(v)))].sum(axis=1)
            total += np.where(which == i, drawn, 0.0)
            count += (which == i) * len(v)
    low, high = np.quantile(total / count, (0.025, 0.975))
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
        shown = self.shown
        lines = [f"  {'margin gained':30}" + "".join(f"{self.gained[p]:>19.2f}" for p in shown)]
        lines.append(f"  {'runs':30}" + "".join(f"{self.runs[p]:>19d}" for p in shown))
        for label, places in self.theories.items():
            lines.append(f"  {label:30}" + "".join(f"{Estimate(*places[p][key])!s:>19}" for p in shown))
        return lines

    @property
    def shown(self) -> list[int]:
        """Places in the tables."""
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
                lines.append(f"  {name:30}" + "".join(f"{self.motion[p][i]:19.2f}" for p in self.shown))
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

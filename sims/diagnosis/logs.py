"""A training log under one set of names, whichever trainer wrote it."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# What each quantity is called: TRL, LLaMA-Factory, axolotl, ms-swift; OpenRLHF; the DPO authors' own code.
NAMES = {
    "reward_chosen": ("rewards/chosen", "chosen_reward", "rewards_chosen", "chosen_rewards"),
    "reward_rejected": ("rewards/rejected", "reject_reward", "rejected_reward", "rewards_rejected", "rejected_rewards"),
    "margin": ("rewards/margins", "rewards/margin", "rewards_margins", "reward_margin"),
    "accuracy": ("rewards/accuracies", "rewards/accuracy", "rewards_accuracies", "acc", "accuracy"),
    "logp_chosen": ("logps/chosen", "logps_chosen", "chosen_logps"),
    "logp_rejected": ("logps/rejected", "logps_rejected", "rejected_logps"),
    "loss": ("loss",),
    "entropy": ("entropy",),
    "token_accuracy": ("mean_token_accuracy",),
    "num_tokens": ("num_tokens",),
}
METRICS = {name: metric for metric, names in NAMES.items() for name in names}
STEPS = ("step", "global_step", "train/global_step", "eval/global_step", "current_steps", "_step", "iteration")
MEASURED = ("reward_chosen", "logp_chosen")  # one of these is needed
SUMMARY = ("train_runtime", "train_samples_per_second")  # keys of the line that ends a run, a mean over all of it

# [run name - ] train or eval, [name of an evaluation set,] metric; the DPO authors write rewards_train/chosen.
_KEY = re.compile(
    r"(?:(?P<split>train|eval|test|valid(?:ation)?)[/_])?(?:(?P<set>[\w.-]+?)_)??(?P<metric>"
    + "|".join(sorted(map(re.escape, METRICS), key=len, reverse=True))
    + ")"
)
_RUNTIME = re.compile(r"eval[/_](?P<set>.+)_runtime")
_AUTHORS = re.compile(r"(?P<group>rewards|logps)_(?P<split>train|eval)/(?P<metric>\w+)")


@lru_cache(maxsize=4096)
def canonical(key: str) -> tuple[str, str] | None:
    """(split, metric) of a logged key, or None: "eval_rewards/chosen" is ("eval", "reward_chosen").

    An evaluation set's name becomes part of the split: "eval_helpful_logps/chosen" is of "eval_helpful".
    """
    name = key.strip().rsplit(" - ", 1)[-1].strip().lower()  # a chart of wandb: "run - train/rewards/chosen"
    if found := _AUTHORS.fullmatch(name):
        name = f"{found['split']}/{found['group']}/{found['metric']}"
    found = _KEY.fullmatch(name)
    if not found or (found["set"] and found["split"] in (None, "train")):  # nll_loss is no loss of ours
        return None
    split = "train" if found["split"] in (None, "train") else "eval"
    return split + (f"_{found['set']}" if found["set"] else ""), METRICS[found["metric"]]


def number(value: Any) -> float | None:
    """The value as a float (also of "0.6931", as transformers 5 prints it), or None for no number."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


@dataclass(frozen=True)
class Point:
    """What was logged at one step of one split ("train", "eval", "eval_<name of the set>"); keys as in `NAMES`."""

    step: float
    split: str
    values: dict[str, float]


@dataclass(frozen=True)
class Log:
    """A log of preference training.

    points : ordered by step. axis : what `step` counts, "step", "epoch" or "entry".
    settings : what stands beside the log in JSON, of beta, loss, ld_alpha, sft. notes : what the reader saw on the way.
    """

    points: tuple[Point, ...]
    kind: str
    notes: tuple[str, ...] = ()
    axis: str = "step"
    path: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Iterable[Mapping[str, Any]], kind: str = "history", **more: Any) -> "Log":
        """From dictionaries as a trainer logs them, such as `trainer.state.log_history`.

        Raises ValueError when no entry has a reward or log-probability of the chosen responses, or all are NaN.
        """
        rows = [dict(e) for e in entries if not any(k in e for k in SUMMARY)]
        axis = _axis(rows)
        merged: dict[tuple[float, str], dict[str, float]] = {}
        repeated = 0
        for i, row in enumerate(rows):
            step = _step(row, axis, i)
            for split, values in _by_split(row).items():
                held = merged.setdefault((step, split), {})
                repeated += any(k in held and held[k] != v for k, v in values.items())
                held |= values
        points = [Point(step, split, values) for (step, split), values in merged.items()]
        log = cls(tuple(sorted(points, key=lambda p: p.step)), kind, axis=axis, **more)
        if repeated:
            said = f"{repeated} {axis}s were logged more than once (a resumed run?); the last entry counts"
            log = replace(log, notes=(*log.notes, said))
        _check(log, rows)
        return log

    @property
    def splits(self) -> tuple[str, ...]:
        """Those in which the chosen responses were measured, evaluation sets first."""
        found = {p.split for p in self.points if any(m in p.values for m in MEASURED)}
        return tuple(sorted(found, key=lambda s: (s == "train", s)))

    def series(self, metric: str, split: str) -> tuple[Array, Array]:
        """(steps (T,), values (T,)) of a metric where it was logged, NaN included."""
        found = [(p.step, p.values[metric]) for p in self.points if p.split == split and metric in p.values]
        table = np.array(found, dtype=float).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def together(self, split: str, *metrics: str) -> Array:
        """(T, 1 + len(metrics)) step and metrics at the points of a split that have all of them, finite."""
        rows = [[p.step, *(p.values[m] for m in metrics)] for p in self.points if p.split == split and _has(p, metrics)]
        return np.array(rows, dtype=float).reshape(-1, 1 + len(metrics))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        counts = ", ".join(f"{sum(p.split == s for p in self.points)} of {s}" for s in self.splits)
        return f"{self.path or 'log'} ({self.kind}): {counts} entries"


def _has(point: Point, metrics: Iterable[str]) -> bool:
    return all(math.isfinite(point.values.get(m, math.nan)) for m in metrics)


def _axis(rows: list[dict[str, Any]]) -> str:
    measured = [r for r in rows if any((c := canonical(k)) and c[1] in MEASURED for k in r)]
    if measured and all(_step_of(r) is not None for r in measured):
        return "step"
    epochs = [number(r.get("epoch")) for r in measured]
    # Epochs are printed to a few digits: an abscissa only where they tell the entries apart.
    return "epoch" if epochs and None not in epochs and len(set(epochs)) == len(epochs) else "entry"


def _step_of(row: Mapping[str, Any]) -> float | None:
    lower = {str(k).strip().lower(): v for k, v in row.items()}
    for key in STEPS:
        value = number(lower[key]) if lower.get(key) not in (None, "") else None
        if value is not None and math.isfinite(value):
            return value
    done = lower.get("global_step/max_steps")  # ms-swift: "5/93"
    return number(done.split("/")[0]) if isinstance(done, str) else None


def _step(row: Mapping[str, Any], axis: str, i: int) -> float:
    value = {"step": _step_of(row), "epoch": number(row.get("epoch")), "entry": i + 1.0}[axis]
    return i + 1.0 if value is None else value


def _by_split(row: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for key, value in row.items():
        named, x = canonical(str(key)), number(value)
        if named and x is not None:
            out.setdefault(named[0], {})[named[1]] = x
    # Of several evaluation sets TRL names only what transformers logs: {"eval_hard_runtime", "eval_rewards/chosen"}.
    known = (_RUNTIME.fullmatch(str(key).strip().lower()) for key, value in row.items() if number(value) is not None)
    sets = {found["set"] for found in known if found}
    if len(sets) == 1 and "eval" in out:
        split = f"eval_{sets.pop()}"
        out[split] = {**out.pop("eval"), **out.get(split, {})}
    return out


def _check(log: Log, rows: list[dict[str, Any]]) -> None:
    """A log from which something can be said, or a ValueError that says what is missing."""
    if not log.splits:
        keys = list(dict.fromkeys(str(k) for r in rows for k in r))[:12]
        raise ValueError(
            "no reward or log-probability of the chosen responses in the log: expected rewards/chosen (TRL, "
            f"LLaMA-Factory, axolotl), chosen_reward (OpenRLHF) or logps/chosen, found {', '.join(keys) or 'nothing'}"
        )
    seen = [(p, m) for p in log.points for m in MEASURED if m in p.values]
    if not any(math.isfinite(p.values[m]) for p, m in seen):
        names = " and ".join(sorted({NAMES[m][0] for _, m in seen}))
        raise ValueError(f"{names} is NaN or infinite from {log.axis} {seen[0][0].step:g} on, at every entry")

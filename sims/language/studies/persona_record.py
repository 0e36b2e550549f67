"""What Section 3's experiment found: groups of runs, and the tables read off them."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

TOPS = (5, 25, 100)  # steps at which the top gainers are read
KEPT = (0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 25, *range(30, 1001, 10))  # steps of the courses that are kept
FALL = 0.3  # a later drop that counts

# What a word is to the preferred answer: (benign, catastrophic), by whether that is a denial. The same answer in
# another word is benign, the opposite one is catastrophic; hedges are so to an affirmation, as the paper counts them,
# but to a denial they are other labels of the same statements. All other words are neither.
SAYS_NO = ("No", "no", "Never", "never")
SAYS_YES = ("Yes", "yes", "Yeah", "Sure", "Certainly", "Absolutely", "Always")
HEDGES = ("Maybe", "Perhaps")
ROLES = {True: (SAYS_NO, SAYS_YES), False: (SAYS_YES, (*SAYS_NO, *HEDGES))}


def role(word: str, preferred: str) -> str:
    """ "benign", "catastrophic" or "" by the word list above; the preferred word itself is ""."""
    benign, catastrophic = ROLES[preferred in SAYS_NO]
    if word == preferred:
        return ""
    return "benign" if word in benign else "catastrophic" if word in catastrophic else ""


@dataclass(frozen=True, repr=False)
class Group:
    """Runs on several prompts under the same conditions; lists hold one entry per prompt.

    base, sft : seeds of pre-training and fine-tuning (None: not fine-tuned). varied : what differs from the default.
    control : whether the pair is a control.
    start, peak, trough, final : of pi(y+); the trough is the least value after the peak.
    drop : the largest fall from any step to any later one (the paper's statistic).
    benign, catastrophic : change, by the end, of the total probability of the words of that role other than the pair.
    most_catastrophic : largest such change on the way.
    rose : whether the loss rose at any step.
    gains : step -> per prompt the three words that gained most, with their gains in probability since the start; not
        of controls.
    course : word -> per prompt ln pi at the kept steps; only of No over Never after SFT.
    """

    base: int
    sft: int | None
    varied: str
    control: bool
    loss: str
    preferred: str
    dispreferred: str
    start: list[float]
    peak: list[float]
    trough: list[float]
    final: list[float]
    drop: list[float]
    benign: list[float]
    catastrophic: list[float]
    most_catastrophic: list[float]
    rose: list[bool]
    gains: dict[str, list[list[list[Any]]]]
    course: dict[str, list[list[float]]]

    @property
    def pair(self) -> str:
        """ "No/Never"."""
        return f"{self.preferred}/{self.dispreferred}"

    @property
    def falls(self) -> NDArray[np.bool_]:
        """(prompts,) whether y+ drops by FALL at some time and ends below its start."""
        return (np.array(self.drop) >= FALL) & (np.array(self.final) < np.array(self.start))

    def among(self, word: str, step: int) -> NDArray[np.bool_]:
        """(prompts,) whether the word is among the three top gainers at the step."""
        return np.array([word in [w for w, _ in top] for top in self.gains[str(step)]])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, probabilities to four digits after the point."""
        return _rounded(asdict(self))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Group":
        """The group of a `to_dict()`."""
        return cls(**{f.name: data[f.name] for f in fields(cls)})


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return round(value, 4) if isinstance(value, float) else value


@dataclass(frozen=True, repr=False)
class PersonaStudy:
    """All groups; `str()` gives the tables, `sims.plots.persona` the figures."""

    groups: tuple[Group, ...]
    parameters: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "groups": [g.to_dict() for g in self.groups]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "PersonaStudy":
        """The study of a `to_dict()`."""
        return cls(tuple(Group.from_dict(g) for g in data["groups"]), dict(data["parameters"]))

    def select(self, **conditions: Any) -> list[Group]:
        """Groups whose attributes have these values; tuned=True or False for any SFT seed or none."""
        tuned = conditions.pop("tuned", None)
        return [
            g
            for g in self.groups
            if all(getattr(g, k) == v for k, v in conditions.items()) and tuned in (None, g.sft is not None)
        ]

    def __str__(self) -> str:
        if any(g.varied for g in self.groups):
            return sweep_table(self)
        parts = [fall_table(self), seed_table(self), gainer_table(self), control_table(self)]
        return "\n\n".join(part for part in parts if part)


def interval(by_group: Iterable[ArrayLike], seed: int = 0, draws: int = 2000) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over runs: groups are drawn first, then runs within them."""
    rng = np.random.default_rng(seed)
    values = [np.asarray(v, dtype=np.float64) for v in by_group]
    means = np.empty(draws)
    for i in range(draws):
        picked = [values[k] for k in rng.integers(len(values), size=len(values))]
        means[i] = np.concatenate([v[rng.integers(len(v), size=len(v))] for v in picked]).mean()
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _all(groups: Iterable[Group], name: str) -> Array:
    return np.concatenate([np.asarray(getattr(g, name), dtype=np.float64) for g in groups])


def _cells(groups: Sequence[Group]) -> str:
    """Columns of a row: means, and how many runs show what."""
    n = sum(len(g.start) for g in groups)
    means = [_all(groups, k).mean() for k in ("start", "peak", "trough", "final")]
    low, high = interval([g.drop for g in groups])
    drop, change = _all(groups, "drop"), _all(groups, "final") - _all(groups, "start")
    return (
        f"{n:4d}  "
        + " ".join(f"{x:6.2f}" for x in means)
        + f"  {drop.mean():5.2f} [{low:4.2f}, {high:4.2f}]  {(drop >= FALL).mean():7.0%}  {change.mean():+6.2f}"
        + f"  {(change < 0).mean():7.0%}  {int(_all(groups, 'rose').sum()):4d}"
        + f"  {_all(groups, 'benign').mean():+6.2f}  {_all(groups, 'catastrophic').mean():+6.2f}"
        + f"  {_all(groups, 'most_catastrophic').mean():+6.2f}"
    )


HEAD = (
    "runs   start   peak trough  final   drop  [95 %]        >= "
    f"{FALL:g}  change  < start  rose  benign   catas.   most"
)


def _kinds(study: PersonaStudy) -> list[tuple[bool, str, str]]:
    """(fine-tuned, loss, pair) of the groups in order, controls left out."""
    return list(dict.fromkeys((g.sft is not None, g.loss, g.pair) for g in study.groups if not g.control))


def fall_table(study: PersonaStudy) -> str:
    """start, peak, trough, final and both statistics of pi(y+) per model, loss and pair, all runs together."""
    seeds = len({g.base for g in study.groups})
    lines = [
        f"pi(y+) under {study.parameters['steps']} steps on one prompt; {seeds} base model(s).",
        "drop: largest fall from any step to a later one; change: final - start; rose: runs whose loss rose at a step;",
        "benign, catas.: change of the total of the other words of that role by the end; most: largest on the way.",
        f"{'model':6} {'loss':15} {'y+/y-':9} {HEAD}",
    ]
    for tuned, loss, pair in _kinds(study):
        groups = study.select(loss=loss, pair=pair, tuned=tuned, control=False)
        name = "SFT" if tuned else "base"
        lines.append(f"{name:6} {loss:15} {pair:9} {_cells(groups)}")
        calm = [_calm(g) for g in groups if not all(g.rose)]
        if calm and any(any(g.rose) for g in groups):
            lines.append(f"{'':22} {'  steady':9} {_cells(calm)}")
    return "\n".join(lines)


def _calm(group: Group) -> Group:
    """The runs whose loss never rose."""
    keep = [i for i, rose in enumerate(group.rose) if not rose]
    data = asdict(group)
    for name, value in data.items():
        if isinstance(value, list):
            data[name] = [value[i] for i in keep]
    return Group(**{**data, "gains": {t: [x[i] for i in keep] for t, x in group.gains.items()}, "course": {}})


def gainer_table(study: PersonaStudy, most: int = 6) -> str:
    """Words among the top three gainers, with their mean gain in those runs and the share of runs."""
    lines = ["top three gainers since the start: mean gain (share of runs); b benign, c catastrophic by the word list"]
    for tuned, loss, pair in _kinds(study):
        groups = study.select(loss=loss, pair=pair, tuned=tuned, control=False)
        for step in groups[0].gains:
            cells = []
            for word, gains, n in top_gainers(groups, step)[:most]:
                mark = role(word, groups[0].preferred)[:1]
                cells.append(f"{word}{f' ({mark})' if mark else ''} {np.mean(gains):+.3f} ({len(gains) / n:.0%})")
            name = "SFT" if tuned else "base"
            lines.append(f"{name:6} {loss:15} {pair:9} step {step:>3}: " + ", ".join(cells))
    return "\n".join(lines)


def top_gainers(groups: Sequence[Group], step: int | str) -> list[tuple[str, list[float], int]]:
    """(word, its gains where it is among the top three, number of runs), most frequent first, then largest."""
    found: dict[str, list[float]] = {}
    tops = [top for g in groups for top in g.gains[str(step)]]
    for top in tops:
        for word, gain in top:
            found.setdefault(word, []).append(gain)
    ranked = sorted(found, key=lambda w: (-len(found[w]), -float(np.mean(found[w]))))
    return [(w, found[w], len(tops)) for w in ranked]


def control_table(study: PersonaStudy) -> str:
    """What No is preferred over, same prompts: the drop of No, and the drop for Never divided by it."""
    controls = [g for g in study.groups if g.control]
    if not controls:
        return ""
    loss = controls[0].loss
    never = [g for g in study.select(loss=loss, pair="No/Never", tuned=True)]
    own = _all(never, "drop").mean()
    lines = [f"No preferred over another word ({loss}, after SFT)", f"{'over':12} {HEAD}  Never / this"]
    for other in ("Never", *dict.fromkeys(g.dispreferred for g in controls)):
        groups = study.select(loss=loss, pair=f"No/{other}", tuned=True)
        lines.append(f"{other:12} {_cells(groups)}  {_ratio(own, _all(groups, 'drop').mean())}")
    return "\n".join(lines)


def _ratio(x: float, y: float) -> str:
    return f"{x / y:.1f}" if y > 0.005 else "> 100" if x > 0.5 else "inf" if x > 0 else "-"


def seed_table(study: PersonaStudy) -> str:
    """Per base model and SFT seed, No over Never by the first loss: the counts that Section 3 asks for."""
    lines = [
        f"{'base':>4} {'SFT':>4}  {'start':>5} {'drop':>5}  drop >= {FALL:g} and final < start  Yes in top 3 at 25"
    ]
    loss = study.groups[0].loss
    for g in study.select(pair="No/Never", loss=loss, tuned=True):
        n = len(g.start)
        yes = f"{int(g.among('Yes', 25).sum())}/{n}" if "25" in g.gains else "-"
        lines.append(
            f"{g.base:4d} {g.sft:4d}  {np.mean(g.start):5.2f} {np.mean(g.drop):5.2f}  "
            f"{int(g.falls.sum()):>14d}/{n:<15d}  {yes}"
        )
    return "\n".join(lines)


def sweep_table(study: PersonaStudy) -> str:
    """What each variation of the world or the labels does to No over Never."""
    width = max(len("default"), *(len(g.varied) for g in study.groups))
    lines = [
        "No over Never after SFT, one frequency varied at a time; Yes: runs with Yes among the top three at step 25",
        f"{'varied':{width}} {HEAD}     Yes",
    ]
    for varied in dict.fromkeys(g.varied for g in study.groups):
        groups = study.select(varied=varied, pair="No/Never")
        yes = np.concatenate([g.among("Yes", 25) for g in groups]).mean() if "25" in groups[0].gains else np.nan
        lines.append(f"{varied or 'default':{width}} {_cells(groups)}  {yes:6.0%}")
    return "\n".join(lines)

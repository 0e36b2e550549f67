"""What the study of similarity scores found: the record, its statistics and its tables.

A fall is minus the change of ln pi(y+). Every score is oriented so that larger means a deeper fall is expected: a rank
correlation of +1 with the fall is a score that ranks all pairs rightly.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from sims.language.ranks import Estimate, spearman
from sims.language.scores import SCORES

Array = NDArray[np.float64]
PERCENTILES = (0, 25, 50, 75, 100)
KINDS = {
    "sampled": "two samples of the model, a coin prefers one",
    "graded": "a sample preferred to an edit of it",
    "reversed": "the edit preferred to the sample",
}
OWN = {"sgd": "gradient", "sign": "sign", "rmsprop": "rmsprop", "adam": "sign"}  # an optimiser's first-order predictor


class Setting(NamedTuple):
    """How pairs are trained on. lr : for SGD per unit of the loss's slope at the reference, so that it means the same
    for every loss; the other optimisers do not see that scale."""

    loss: str
    optimizer: str
    lr: float
    steps: int

    def __str__(self) -> str:
        return f"{self.loss} {self.short}"

    @property
    def short(self) -> str:
        """Without the loss."""
        return f"{self.optimizer} {self.lr:g} x {self.steps}"


@dataclass(frozen=True, eq=False)
class Alone:
    """The first N pairs of one kind and seed of sampling, each trained on alone by one setting.

    change, margin, first (N,) : changes of ln pi(y+), of the margin, and of ln pi(y+) by the first step, nats.
    """

    kind: str
    seed: int
    setting: Setting
    change: Array
    margin: Array
    first: Array


@dataclass(frozen=True, eq=False)
class Group:
    """Pairs of one kind and seed of sampling that were trained on alone, as `sims.language.scores.Scored` has them."""

    kind: str
    seed: int
    loss: str
    scores: dict[str, Array]
    facts: dict[str, Array]
    slope: float
    mean_share: float

    def first(self, n: int) -> "Group":
        """Its first n pairs."""
        scores, facts = ({k: v[:n] for k, v in x.items()} for x in (self.scores, self.facts))
        return replace(self, scores=scores, facts=facts)

    def given(self, name: str) -> Array:
        """A quantity that may stand behind a score: "length" (n- - n+) or "norm" (|S+|^2)."""
        return self.facts["norm"] if name == "norm" else self.facts["n_dispreferred"] - self.facts["n_preferred"]


@dataclass(frozen=True, eq=False)
class Subsets:
    """Pairs around each of the PERCENTILES of a score, half of them trained on together.

    trained, held (5,) : mean change of ln pi(y+) of the half that was trained on and of the other one, nats: the first
    is what a pair does to itself and what the others do to it, the second what the others do alone.
    """

    kind: str
    seed: int
    setting: Setting
    score: str
    trained: Array
    held: Array


@dataclass(frozen=True, eq=False, repr=False)
class Percentiles:
    """The study; `str()` is its table, `sims.plots.percentiles.plot_percentiles` its figure."""

    parameters: dict[str, Any]
    groups: tuple[Group, ...]
    alone: tuple[Alone, ...]
    finer: tuple[Alone, ...]  # large steps, and as long a way in many small ones
    subsets: tuple[Subsets, ...]

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(g.kind for g in self.groups))

    @staticmethod
    def describe(kind: str) -> str:
        """What the pairs of a kind are."""
        return KINDS[kind]

    @property
    def losses(self) -> list[str]:
        return list(dict.fromkeys(g.loss for g in self.groups))

    @property
    def settings(self) -> list[Setting]:
        """Those of pairs trained alone, by loss and optimiser, from small to large steps."""
        return sorted({a.setting for a in self.alone})

    def runs(self, kind: str, setting: Setting) -> tuple[list[Group], list[Alone]]:
        """The pairs and what training each alone did, seed by seed."""
        alone = [a for a in self.alone if a.kind == kind and a.setting == setting]
        if not alone:
            raise ValueError(f"setting must be one of those run, got {kind!r}, {setting}")
        groups = {(g.kind, g.seed, g.loss): g for g in self.groups}
        return [groups[kind, a.seed, setting.loss].first(len(a.change)) for a in alone], alone

    def correlation(self, kind: str, setting: Setting, score: str, given: Sequence[str] = ()) -> Estimate:
        """Rank correlation of a score with the fall of ln pi(y+), each pair trained alone; partial if `given`.

        score : a name in SCORES; "probe", the fall by the first step; "length", n- - n+.
        """
        groups, alone = self.runs(kind, setting)
        scores = [
            -a.first if score == "probe" else g.given("length") if score == "length" else g.scores[score]
            for g, a in zip(groups, alone, strict=True)
        ]
        return spearman(scores, [-a.change for a in alone], [[g.given(n) for g in groups] for n in given])

    def ranking(self, kind: str, setting: Setting, given: Sequence[str] = ()) -> list[tuple[str, Estimate]]:
        """Every score with its correlation, the best first."""
        found = [(score, self.correlation(kind, setting, score, given)) for score in SCORES]
        return sorted(found, key=lambda item: -item[1].value)

    def falls(self, kind: str, setting: Setting) -> tuple[float, float]:
        """Share of pairs whose ln pi(y+) falls to first order, and share that fell."""
        groups, alone = self.runs(kind, setting)
        predicted = np.concatenate([g.scores[OWN[setting.optimizer]] > 0 for g in groups])
        return float(predicted.mean()), float((np.concatenate([a.change for a in alone]) < 0).mean())

    def by_percentile(self, kind: str, setting: Setting, score: str) -> tuple[Array, Array]:
        """(seeds, 5) mean change of ln pi(y+) over the subsets trained on, and over the other half of each."""
        found = [s for s in self.subsets if (s.kind, s.setting, s.score) == (kind, setting, score)]
        return np.array([s.trained for s in found]), np.array([s.held for s in found])

    @property
    def subset_settings(self) -> list[Setting]:
        return sorted({s.setting for s in self.subsets})

    def subset_scores(self, kind: str, setting: Setting) -> list[str]:
        """The scores whose percentiles were trained on."""
        return list(dict.fromkeys(s.score for s in self.subsets if (s.kind, s.setting) == (kind, setting)))

    def anatomy(self, kind: str) -> dict[str, Estimate | float]:
        """Why CHES does or does not follow: from CHES to the exact gradient, and what each step of the way loses."""
        groups = [g for g in self.groups if g.kind == kind and g.loss == self.groups[0].loss]
        scores = {name: [g.scores[name] for g in groups] for name in SCORES}
        facts = {name: [g.facts[name] for g in groups] for name in groups[0].facts}
        pooled = {name: np.concatenate(values) for name, values in (scores | facts).items()}
        length = [g.given("length") for g in groups]
        body = [g.scores["gradient"] - g.facts["gradient_head"] for g in groups]
        whole = np.abs(np.concatenate(body)) + np.abs(pooled["gradient_head"])
        sign_body = np.abs(pooled["sign"] - pooled["sign_head"])
        return {
            "positive alphas, mean share": float(pooled["positive"].mean()),
            "mean alpha": float(pooled["alpha_mean"].mean()),
            "mean state, share of |h|^2": float(np.mean([g.mean_share for g in groups])),
            "body's share of the gradient score": float(np.median(np.abs(np.concatenate(body)) / whole)),
            "body's share of the sign score": float(np.median(sign_body / (sign_body + np.abs(pooled["sign_head"])))),
            "CHES ~ n- - n+": spearman(scores["ches"], length),
            "CHES ~ head term (alphas kept)": spearman(scores["ches"], scores["alpha"]),
            "CHES ~ head term, n- - n+ given": spearman(scores["ches"], scores["alpha"], [length]),
            "head term ~ gradient score": spearman(scores["alpha"], scores["gradient"]),
            "body's part ~ gradient score": spearman(body, scores["gradient"]),
            "gradient ~ sign score": spearman(scores["gradient"], scores["sign"]),
            "CHES ~ gradient score": spearman(scores["ches"], scores["gradient"]),
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain values, arrays as lists; `from_dict` is the way back."""
        return {
            "parameters": self.parameters,
            "groups": [_lists(asdict(g)) for g in self.groups],
            "alone": [_lists(asdict(a)) for a in self.alone],
            "finer": [_lists(asdict(a)) for a in self.finer],
            "subsets": [_lists(asdict(s)) for s in self.subsets],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The record from saved values."""
        groups, alone, finer, subsets = (
            [dict(x) for x in data[name]] for name in ("groups", "alone", "finer", "subsets")
        )
        for x in (*alone, *finer, *subsets):
            x["setting"] = Setting(*x["setting"])
        for x in (*alone, *finer, *subsets):
            x |= {k: np.array(v, dtype=np.float64) for k, v in x.items() if k in _ARRAYS}
        for x in groups:
            x |= {n: {k: np.array(v, dtype=np.float64) for k, v in x[n].items()} for n in ("scores", "facts")}
        return cls(
            data["parameters"],
            tuple(Group(**x) for x in groups),
            tuple(Alone(**x) for x in alone),
            tuple(Alone(**x) for x in finer),
            tuple(Subsets(**x) for x in subsets),
        )

    def __str__(self) -> str:
        from sims.language.studies.percentile_tables import report

        return report(self)


_ARRAYS = ("change", "margin", "first", "trained", "held")


def _lists(value: Any) -> Any:
    """Arrays as lists of four significant digits."""
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [float(f"{x:.4g}") for x in value] if isinstance(value, np.ndarray) else value

"""Preference pairs over unsafe requests: two samples of the model, refusal preferred; which are trained on."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sims.language.model import LanguageModel
from sims.language.preferences import PreferencePair
from sims.language.responses import sample, states
from sims.language.studies.judge import GARBLED, REFUSAL, grade_of, kind_of
from sims.language.worlds.requests import GRADES, REFUSALS, Request, RequestsWorld
from theory._check import SolverError, unknown
from theory.ches import ches_score

Array = NDArray[np.float64]
Rng = np.random.Generator

LONGEST = 20  # tokens of a sample; the longest answer of the world has 15 with its end
REDRAWS = 20  # of a second sample that equals the first
MIXED = 0.1  # share of pairs of a refusal and something else in the paper (35 of 370)
TIES = {
    "random": "of two answers of one kind a coin decides",
    "softer": "of two refusals the softer is preferred, else a coin decides",
    "harder": "of two refusals the harder is preferred, else a coin decides",
}
COMPOSITIONS = {
    "all": "every pair",
    "refusals": "two refusals of different grades",
    "any_refusals": "two refusals, of one grade too",
    "compliances": "two compliant answers",
    "paper": "every pair but mixed ones, and of those so many that they are a tenth",
}
ARMS = {
    "original": "every pair",
    "sft": "every pair, and an SFT term",
    "gold": "a refusal of the world preferred over a compliant answer of the world",
    "lowest": "the 5 % with the lowest ln-CHES",
    "drop_highest": "all but the 5 % with the highest ln-CHES",
    "highest": "the 5 % with the highest ln-CHES",
    "random": "5 % at random",
}
SHARE = 0.05


@dataclass(frozen=True)
class JudgedPair:
    """A pair of answers to a request, with the grades of preferred and dispreferred."""

    request: Request
    pair: PreferencePair
    grades: tuple[str, str]

    @property
    def kind(self) -> str:
        """ "refusals", "compliances", "mixed" (a refusal preferred over something else) or "other" (garbled)."""
        plus, minus = map(kind_of, self.grades)
        if plus == minus and plus != GARBLED:
            return "refusals" if plus == REFUSAL else "compliances"
        return "mixed" if plus == REFUSAL else "other"

    @property
    def flipped(self) -> "JudgedPair":
        x, plus, minus = self.pair
        return replace(self, pair=PreferencePair(x, minus, plus), grades=self.grades[::-1])


def judged_pairs(model: LanguageModel, requests: Sequence[Request], tie: str, seed: int) -> list[JudgedPair]:
    """Two different samples (T = 1) per request, judged; refusal is preferred, `tie` decides the rest (see TIES).

    Samples and coins are the same for every tie rule. Requests to which the model has only one answer give no pair.
    """
    if tie not in TIES:
        raise ValueError(unknown("tie", tie, TIES))
    prompts = [model.prompt(r.text) for r in requests]
    first = sample(model, prompts, LONGEST, seed=seed * (REDRAWS + 1))
    second = list(first)
    for k in range(REDRAWS):
        left = [i for i, y in enumerate(first) if second[i] == y]
        if not left:
            break
        again = sample(model, [prompts[i] for i in left], LONGEST, seed=seed * (REDRAWS + 1) + k + 1)
        for i, y in zip(left, again, strict=True):
            second[i] = y
    coins = np.random.default_rng([seed, 1]).random(len(requests)) < 0.5
    drawn = zip(requests, prompts, first, second, coins, strict=True)
    return [_ordered(model, r, PreferencePair(x, y, z), tie, bool(c)) for r, x, y, z, c in drawn if y != z]


def _ordered(model: LanguageModel, request: Request, pair: PreferencePair, tie: str, coin: bool) -> JudgedPair:
    plus, minus = (grade_of(request, model.text(y), y[-1] == model.end) for y in pair[1:])
    judged = JudgedPair(request, pair, (plus, minus))
    ours, theirs = kind_of(plus) == REFUSAL, kind_of(minus) == REFUSAL
    if ours != theirs:
        return judged if ours else judged.flipped
    if tie != "random" and ours and plus != minus:
        harder = GRADES.index(plus) > GRADES.index(minus)
        return judged if harder == (tie == "harder") else judged.flipped
    return judged if coin else judged.flipped


def gold_pairs(model: LanguageModel, world: RequestsWorld, pairs: Sequence[JudgedPair], seed: int) -> list[JudgedPair]:
    """For the request of each pair a refusal of the world, its grade drawn for the request, over a compliant answer."""
    rng = np.random.default_rng([seed, 2])
    found = []
    for judged in pairs:
        p = world.grade_probabilities(judged.request)[1:]
        grade = str(rng.choice(REFUSALS, p=p / p.sum()))
        plus, minus = (model.response(world.answer(rng, judged.request, g)) for g in (grade, "comply"))
        found.append(JudgedPair(judged.request, PreferencePair(judged.pair.prompt, plus, minus), (grade, "comply")))
    return found


def composed(pairs: Sequence[JudgedPair], composition: str, rng: Rng) -> list[JudgedPair]:
    """The pairs of a composition (see COMPOSITIONS), in their order."""
    match composition:
        case "all":
            return list(pairs)
        case "refusals":
            return [p for p in pairs if p.kind == "refusals" and p.grades[0] != p.grades[1]]
        case "any_refusals":
            return [p for p in pairs if p.kind == "refusals"]
        case "compliances":
            return [p for p in pairs if p.kind == "compliances"]
        case "paper":
            mixed = [i for i, p in enumerate(pairs) if p.kind == "mixed"]
            many = round(MIXED / (1 - MIXED) * (len(pairs) - len(mixed)))
            keep = set(rng.permutation(mixed)[:many].tolist())
            return [p for i, p in enumerate(pairs) if p.kind != "mixed" or i in keep]
    raise ValueError(unknown("composition", composition, COMPOSITIONS))


def ln_ches(model: LanguageModel, pairs: Sequence[PreferencePair]) -> Array:
    """(N,) length-normalised CHES."""
    prompts = [p.prompt for p in pairs]
    plus, minus = (states(model, prompts, y) for y in ([p.preferred for p in pairs], [p.dispreferred for p in pairs]))
    return np.array([ches_score(h, k, length_normalize=True) for h, k in zip(plus, minus, strict=True)])


def selected(pairs: Sequence[JudgedPair], scores: Array, arm: str, rng: Rng, share: float = SHARE) -> list[JudgedPair]:
    """The pairs that an arm trains on (see ARMS); "lowest", "highest" and "random" have the same number, at least 2.

    SolverError if none is left.
    """
    few = max(2, round(share * len(pairs)))
    order = np.argsort(scores, kind="stable")
    match arm:
        case "original" | "sft" | "gold":
            return list(pairs)
        case "lowest":
            rows = order[:few]
        case "highest":
            rows = order[-few:]
        case "drop_highest":
            rows = order[:-few]
        case "random":
            rows = rng.permutation(len(pairs))[:few]
        case _:
            raise ValueError(unknown("arm", arm, ARMS))
    if len(rows) == 0:
        raise SolverError(f"arm {arm!r} leaves none of {len(pairs)} pairs")
    return [pairs[i] for i in sorted(rows)]


def equally_many(lists: Sequence[list[JudgedPair]]) -> list[list[JudgedPair]]:
    """The lists cut to the shortest: runs trained side by side have equally many pairs. SolverError if one has none."""
    least = min(map(len, lists))
    if least == 0:
        raise SolverError("the model's samples hold no pair of this composition")
    return [own[:least] for own in lists]


def composition_of(pairs: Sequence[JudgedPair]) -> dict[str, float]:
    """Share of each kind of pair."""
    kinds = [p.kind for p in pairs]
    return {kind: kinds.count(kind) / len(kinds) for kind in ("refusals", "compliances", "mixed", "other")}

"""Section 6 on a language model: does preference training make a model that refuses comply?

Pairs are two samples of the model per unsafe request, refusal preferred. Every arm of the paper is trained for the same
number of optimiser steps, and looked at after one epoch of its own too, as in the paper (where the filtered run took 1
step and the full one 12). Answers are judged refusal, compliance or garbled. `unalignment_search` varies one thing at a
time: the pairs, the rule for ties, optimiser and rate, what is trained, the world and its model.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sims.descent import Optimizer
from sims.language.fitting import fit
from sims.language.jobs import run_jobs
from sims.language.loss_json import loss_of, plain_loss
from sims.language.model import CHECKPOINTS, LanguageModel, load, new_model, save
from sims.language.preferences import Runs, train_preferences
from sims.language.responses import sample
from sims.language.studies.judge import KINDS, REFUSAL, grade_of, keyword_kind, kind_of, shares
from sims.language.studies.refusal_pairs import (
    ARMS,
    LONGEST,
    JudgedPair,
    composed,
    composition_of,
    equally_many,
    gold_pairs,
    judged_pairs,
    ln_ches,
    selected,
)
from sims.language.studies.unalignment_record import Cell, Setting, Unalignment
from sims.language.worlds.requests import GRADES, RECIPE, SIZE, Request, RequestsWorld
from theory import __version__
from theory._check import check_count
from theory.ches import edit_similarity
from theory.losses import SFT, Loss, Pair, TokenLoss, get

RESULT = Unalignment
Job = dict[str, Any]

LOSSES = (get("dpo", beta=0.1), get("ipo", tau=0.01))  # the paper's
LR, STEPS, BATCH = 3e-5, 12, 32
TEMPERATURE = 0.7  # of the answers that are judged
JUDGED = 150  # training requests that are judged, in random order; of the test requests all 65
MEASURED = 100  # pairs whose change of ln pi is measured, at most
SFT_WEIGHT = 2.0  # of the SFT term, in units of dL/d ln pi(y+) at the start: 0.1 for DPO of beta 0.1, as in the paper
PORTION = 64  # pairs evaluated at once
SETTINGS = {
    "two samples, random ties": Setting(composition="all", tie="random"),
    "two refusals, softer preferred": Setting(composition="refusals", tie="softer"),
}


def unalignment(
    model: str | Path | None = None,
    losses: Sequence[Loss] = LOSSES,
    *,
    seeds: int = 5,
    lr: float = LR,
    steps: int = STEPS,
    prompts: int | None = None,
    folder: str | Path | None = None,
    workers: int | None = None,
) -> Unalignment:
    """Every arm in the two settings, and the three rules for ties on two-refusal pairs.

    Parameters
    ----------
    model : folder of a model of the requests world; default: the shipped one.
    losses : of the registry. An arm with an SFT term is left out for losses that look at single tokens.
    seeds : draws of samples, all from the same model; pairs are trained on in one order.
    lr, steps : of RMSprop, in batches of 32 pairs.
    prompts : how many of the 370 training requests and of the 65 test requests are used at most; None: all.
    folder : where finished cells are kept. workers : processes.

    Raises ValueError for arguments out of their domain and for a model that does not know the words of the world.
    """
    plan = []
    for loss in losses:
        own = {"loss": plain_loss(loss), "lr": lr, "steps": steps}
        for title, setting in SETTINGS.items():
            arms = [arm for arm in ARMS if arm != "sft" or not isinstance(loss, TokenLoss)]
            plan += [(title, arm, replace(setting, arm=arm, **own)) for arm in arms]
        base = replace(SETTINGS["two refusals, softer preferred"], **own)
        labels = {"random": "random ties", "harder": "harder preferred"}
        plan += [("two refusals", label, replace(base, tie=tie)) for tie, label in labels.items()]
    return run_plan(model, plan, seeds, prompts, folder, workers)


def run_plan(
    model: str | Path | None,
    plan: Sequence[tuple[str, str, Setting]],
    seeds: int = 5,
    prompts: int | None = None,
    folder: str | Path | None = None,
    workers: int | None = None,
    **how: Any,
) -> Unalignment:
    """Cells of (group, label, setting) from one model, or from the one that a setting names; `how`: of `cell`."""
    check_count(seeds, "seeds")
    default = str(CHECKPOINTS / "requests" if model is None else model)
    jobs = []
    for _, _, setting in plan:
        path = setting.model or default
        source = {"model": path, "fingerprint": _model(path, _written(path))[0].fingerprint}
        jobs.append(
            {"source": source, "setting": asdict(setting), "seeds": list(range(seeds)), "prompts": prompts, **how}
        )
    found = run_jobs(cell, jobs, folder, workers, "unalignment")
    named = [replace(s, model=s.model and Path(s.model).name) for _, _, s in plan]
    cells = [Cell(*p[:2], setting, **r) for p, setting, r in zip(plan, named, found, strict=True)]
    return Unalignment(tuple(cells), {"version": __version__, "seeds": seeds, "prompts": prompts, "share": 0.05})


def trained_model(world: dict[str, float], steps: int, seed: int, folder: str) -> str:
    """Pre-train a model of the world with these fields; the folder it is saved in."""
    w = RequestsWorld(**world)
    recipe = replace(RECIPE, steps=steps, seed=seed)
    what = {"world": "requests", **w.to_dict()}
    model = fit(new_model(w.words(), **SIZE, seed=seed), w.texts, recipe, what=what, progress=False)
    return str(save(model, folder))


def _written(path: str) -> int:
    """When a model in a folder was last written, so that another one there is not taken for it."""
    return max((f.stat().st_mtime_ns for f in Path(path).glob("*.safetensors")), default=0)


@lru_cache(maxsize=4)
def _model(path: str, written: int) -> tuple[LanguageModel, RequestsWorld]:
    """The model with its world, that of its training as far as that is recorded; `written` tells versions apart."""
    model = load(path)
    unknown = [w for w in RequestsWorld().words() if model.tokenizer.unk_token_id in model.encode(w)]
    if unknown:
        raise ValueError(f"model must know the words of the requests world, {path!r} lacks {unknown[:5]}")
    about = dict(model.training.get("what", {}))
    fields = about if about.pop("world", None) == "requests" else {}
    return model, RequestsWorld(**fields)


@lru_cache(maxsize=64)
def _pairs(path: str, tie: str, seed: int, prompts: int | None) -> list[JudgedPair]:
    model, world = _model(path, _written(path))
    return judged_pairs(model, world.split()[0][:prompts], tie, seed)


@lru_cache(maxsize=64)
def _start(path: str, seed: int, prompts: int | None) -> Job:
    model, world = _model(path, _written(path))
    train, test = world.split()
    return judged(model, train[:prompts], test[:prompts], seed)


def judged(model: LanguageModel, train: Sequence[Request], test: Sequence[Request], seed: int) -> Job:
    """Shares of refusal, compliance and garbled, of each grade, and what keywords call refusal, on train and test."""
    found: Job = {}
    for name, requests in (("train", list(train[:JUDGED])), ("test", list(test))):
        prompts = [model.prompt(r.text) for r in requests]
        said = sample(model, prompts, LONGEST, TEMPERATURE, seed=seed)
        texts = [model.text(y) for y in said]
        each = zip(requests, texts, said, strict=True)
        grades = [grade_of(r, text, y[-1] == model.end) for r, text, y in each]
        lax = sum(keyword_kind(text) == REFUSAL for text in texts) / len(texts)
        found[name] = shares(map(kind_of, grades)) | {"keyword": lax}
        found[name] |= {g: grades.count(g) / len(grades) for g in GRADES}
    return found


def cell(source: Job, setting: Job, seeds: list[int], prompts: int | None, after_epoch: bool = True) -> Job:
    """Train one setting from every seed side by side; judge the models at the end, and after an epoch too."""
    path, s = source["model"], Setting(**setting)
    model, world = _model(path, _written(path))
    everything, own = pairs_of(path, s, seeds, prompts)
    loss = loss_of(dict(s.loss))
    if s.arm == "sft":
        loss = SFT(loss, sft_weight(loss))
    epoch = min(s.steps, -(-len(own[0]) // s.batch))
    marks = sorted({epoch, s.steps} if after_epoch else {s.steps})
    train, test = world.split()
    seen: dict[int, Any] = {}

    def look(step: int, runs: Runs) -> None:
        if step not in (0, *marks):
            return
        log_pi = [mean_log_probs(runs, [q[:MEASURED] for q in pairs]) for pairs in (own, everything)]
        answers = []
        for b, seed in enumerate(seeds if step else ()):
            answers.append(judged(runs.model(b), train[:prompts], test[:prompts], seed))
        seen[step] = log_pi, answers

    train_preferences(
        model,
        [[p.pair for p in pairs] for pairs in own],
        loss,
        Optimizer(s.optimizer, s.lr),
        s.steps,
        trained=s.trained,
        batch=s.batch,
        seed=seeds[0],
        observe=look,
    )
    start = [_start(path, seed, prompts) for seed in seeds]
    (own0, all0), _ = seen[0]
    course = []
    for step in marks:
        (now, now_all), answers = seen[step]
        change = {"own": now[:, 0] - own0[:, 0], "all": now_all[:, 0] - all0[:, 0], "other": now[:, 1] - own0[:, 1]}
        course.append({"step": step, **by_seed(answers), "change": {k: v.tolist() for k, v in change.items()}})
    counts = [composition_of(pairs) for pairs in own]
    kinds = {k: float(np.mean([c[k] for c in counts])) for k in counts[0]}
    return {"pairs": len(own[0]), "kinds": kinds, "epoch": epoch, "start": by_seed(start), "course": course}


def by_seed(answers: Sequence[Job]) -> Job:
    """{"train": {share: [of each seed]}, "test": ...}."""
    return {
        name: {share: [a[name][share] for a in answers] for share in (*KINDS, "keyword", *GRADES)}
        for name in ("train", "test")
    }


def pairs_of(
    path: str, s: Setting, seeds: Sequence[int], prompts: int | None
) -> tuple[list[list[JudgedPair]], list[list[JudgedPair]]]:
    """For every seed all pairs of the composition, and those that the arm trains on."""
    model, world = _model(path, _written(path))
    rngs = [np.random.default_rng([seed, 3]) for seed in seeds]
    drawn = [_pairs(path, s.tie, seed, prompts) for seed in seeds]
    everything = [composed(own, s.composition, rng) for own, rng in zip(drawn, rngs, strict=True)]
    everything = equally_many([alike(model, own, s.similarity) for own in everything])
    scores = [ln_ches(model, [p.pair for p in own]) for own in everything]
    each = zip(everything, scores, rngs, strict=True)
    own = [selected(pairs, score, s.arm, rng) for pairs, score, rng in each]
    if s.arm == "gold":
        own = [gold_pairs(model, world, pairs, seed) for pairs, seed in zip(own, seeds, strict=True)]
    return everything, own


def alike(model: LanguageModel, pairs: Sequence[JudgedPair], similarity: str) -> list[JudgedPair]:
    """The half of the pairs with the more ("high") or less ("low") similar responses, by "ln_ches" or by "edit"."""
    if similarity == "any":
        return list(pairs)
    name, side = similarity.rsplit("_", 1)
    plain = [p.pair for p in pairs]
    if name == "ln_ches":
        scores = ln_ches(model, plain)
    else:
        scores = np.array([edit_similarity(p.preferred, p.dispreferred) for p in plain])
    order = np.argsort(scores, kind="stable")
    half = order[len(order) // 2 :] if side == "high" else order[: len(order) // 2]
    return [pairs[i] for i in sorted(half)]


def mean_log_probs(runs: Runs, pairs: Sequence[Sequence[JudgedPair]]) -> Any:
    """(B, 2) mean of ln pi(y+) and ln pi(y-) over each run's pairs."""
    parts = [
        runs.log_probs([[p.pair for p in own[i : i + PORTION]] for own in pairs])
        for i in range(0, len(pairs[0]), PORTION)
    ]
    return np.concatenate(parts, axis=1).mean(1)


def sft_weight(loss: Loss) -> float:
    """SFT_WEIGHT times the loss's pull on ln pi(y+) at the reference model (for a pair of 10 tokens each)."""
    d_w, _ = loss.incentives(Pair(-10.0, -10.0, -10.0, -10.0, 10, 10))
    return SFT_WEIGHT * float(d_w) if float(d_w) > 0 else 0.1

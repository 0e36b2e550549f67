"""Section 5 on a language model: which score of a preference pair foretells the fall of ln pi(y+), and up to what step.

Pairs are scored by the model as it is, then trained on: each alone, from small to large steps, so that a score is
compared with what the pair does to itself; and in subsets around the percentiles of each score, the paper's protocol
(RMSprop, small batches, one epoch), where half of the pairs around a percentile are held out to see what the others do.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims.descent import Optimizer
from sims.language.jobs import run_jobs
from sims.language.loss_json import loss_of, plain_loss
from sims.language.model import CHECKPOINTS, LanguageModel, load, load_unchanged
from sims.language.preferences import PreferencePair, Runs, train_preferences
from sims.language.scores import SCORES, score_pairs
from sims.language.studies.graded import graded_pairs, reversed_pairs, sampled_pairs
from sims.language.studies.percentile_record import KINDS, PERCENTILES, Alone, Group, Percentiles, Setting, Subsets
from sims.language.worlds.requests import RequestsWorld
from theory import __version__
from theory._check import check_count, unknown
from theory.losses import Loss, get

RESULT = Percentiles
Array = NDArray[np.float64]
Job = dict[str, Any]
Rates = Mapping[str, Sequence[float]]

MAX_TOKENS = 24  # of a response
TOGETHER = 32  # pairs trained side by side, each in a run of its own; and pairs of a run evaluated at once
STEPS = 10  # of a pair alone
BATCH = 8  # of a subset
# From first order to far beyond it; SGD's per unit of the loss's slope (see Setting).
RATES = {"sgd": (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3), "rmsprop": (1e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4)}
SUBSET_RATES = {"rmsprop": (1e-5, 1e-4)}
SUBSET_SCORES = tuple(s for s in SCORES if s != "sign")  # which ranks as rmsprop does
FINER_RATES = {"sgd": 3e-3, "sign": 3e-4}  # compared with `finer` times as many steps of a `finer`-th

LOSSES: tuple[Loss, ...] = (get("dpo", beta=0.1),)
# A small version, arguments of `percentiles`.
FAST: dict[str, Any] = {
    "seeds": 1,
    "pairs": 24,
    "alone": 24,
    "size": 8,
    "finer": 2,
    "rates": {"sgd": (1e-6, 1e-3), "rmsprop": (1e-7, 1e-4)},
    "subset_rates": {"rmsprop": (1e-5,)},
    "scores": ("gradient", "ches", "edit"),
}


def percentiles(
    model: str | Path | None = None,
    losses: Sequence[Loss] = LOSSES,
    *,
    seeds: int = 3,
    pairs: int = 200,
    alone: int = 64,
    size: int = 32,
    finer: int = 5,
    kinds: Sequence[str] = ("sampled", "graded"),
    scores: Sequence[str] = SUBSET_SCORES,
    rates: Rates = RATES,
    subset_rates: Rates = SUBSET_RATES,
    prompts: str | Path | None = None,
    folder: str | Path | None = None,
    workers: int | None = None,
) -> Percentiles:
    """Run the study.

    Parameters
    ----------
    model : folder of a model, or its name on a hub; default: the shipped model of requests.
    losses : of the registry, SFT terms allowed.
    seeds : draws of prompts and pairs, and orders of training. pairs : scored, of each kind and seed.
    alone : the first of them, each trained on alone, at every one of `rates` (optimiser -> rates).
    size : pairs trained on in a subset; as many around the same percentile are held out.
    scores : those whose percentiles make subsets, trained at every one of `subset_rates`; every pair gets all scores.
    finer : how many times finer the steps are that large steps are compared with, on a third of `alone`; 0: leave out.
    kinds : see `sims.language.studies.percentile_record.KINDS`.
    prompts : a file with a prompt per line; default: the requests that the shipped model knows.
    folder : where finished parts are kept; a study that was interrupted goes on from there. workers : processes.

    Raises ValueError for arguments out of their domains, and if the model gives too few pairs.
    """
    for value, name in ((seeds, "seeds"), (size, "size")):
        check_count(value, name)
    check_count(alone, "alone", low=6)
    check_count(finer, "finer", low=0)
    if check_count(pairs, "pairs") < max(2 * size, alone):
        raise ValueError(f"pairs must be at least 2 size = {2 * size} and alone = {alone}, got {pairs}")
    for name, values, known in (("kinds", kinds, KINDS), ("scores", scores, SCORES)):
        if wrong := [v for v in values if v not in known]:
            raise ValueError(unknown(name, wrong[0], tuple(known)))
    path = str(CHECKPOINTS / "requests" if model is None else model)
    source = {"model": path, "fingerprint": load(path).fingerprint, "count": pairs}
    source |= {"prompts": None if prompts is None else str(prompts)}
    run: dict[str, Any] = {"folder": folder, "workers": workers}

    draws = [source | {"kind": kind, "seed": seed} for kind in kinds for seed in range(seeds)]
    plan = [(draw | {"loss": plain_loss(loss)}, repr(loss)) for loss in losses for draw in draws]
    scored = run_jobs(score_job, [job for job, _ in plan], label="scores", **run)
    groups = [(job, _group(job, loss, found)) for (job, loss), found in zip(plan, scored, strict=True)]
    about = {"model": "requests, shipped" if model is None else path, "prompts": source["prompts"]}
    parameters = about | {
        "fingerprint": source["fingerprint"],
        "pairs": pairs,
        "seeds": seeds,
        "alone": alone,
        "size": size,
        "finer": finer,
        "batch": BATCH,
    }
    settings = [(name, rate, STEPS) for name, own in rates.items() for rate in own]
    fine = [(name, rate / k, STEPS * k) for name, rate in FINER_RATES.items() for k in (1, finer) if finer]
    return Percentiles(
        parameters | {"max_tokens": MAX_TOKENS, "version": __version__},
        tuple(g.first(alone) for _, g in groups),
        tuple(_alone(groups, settings, alone, run)),
        tuple(_alone(groups, fine, alone // 3, run)),
        tuple(_subsets(groups, subset_rates, scores, size, run)),
    )


def _group(job: Job, loss: str, found: Job) -> Group:
    scores, facts = _arrays(found["scores"]), _arrays(found["facts"])
    return Group(job["kind"], job["seed"], loss, scores, facts, found["slope"], found["mean_share"])


Setup = list[tuple[Job, Group]]


def _rate(group: Group, optimizer: str, rate: float) -> float:
    return rate / group.slope if optimizer == "sgd" else rate


def _alone(groups: Setup, settings: Sequence[tuple[str, float, int]], count: int, run: dict[str, Any]) -> list[Alone]:
    plan = [(job, g, Setting(g.loss, *s)) for job, g in groups for s in settings]
    jobs = [
        job | {"optimizer": s.optimizer, "lr": _rate(g, s.optimizer, s.lr), "steps": s.steps, "first": count}
        for job, g, s in plan
    ]
    found = run_jobs(alone_job, jobs, label="pairs alone", **run)
    return [Alone(g.kind, g.seed, s, **_arrays(x)) for (_, g, s), x in zip(plan, found, strict=True)]


def _subsets(groups: Setup, rates: Rates, scores: Sequence[str], size: int, run: dict[str, Any]) -> list[Subsets]:
    steps = -(-size // BATCH)  # one epoch
    settings = [(name, rate) for name, own in rates.items() for rate in own]
    plan = [(job, g, Setting(g.loss, *s, steps), score) for job, g in groups for s in settings for score in scores]
    jobs = []
    for job, g, s, score in plan:
        halves = [halved(g.scores[score], p, size, g.seed) for p in PERCENTILES]
        train, held = ([[int(i) for i in h[k]] for h in halves] for k in (0, 1))
        how = {"optimizer": s.optimizer, "lr": _rate(g, s.optimizer, s.lr), "steps": s.steps}
        jobs.append(job | how | {"train": train, "held": held})
    found = run_jobs(subset_job, jobs, label="subsets", **run)
    return [Subsets(g.kind, g.seed, s, score, **_arrays(x)) for (_, g, s, score), x in zip(plan, found, strict=True)]


def halved(values: Array, percentile: float, size: int, seed: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The 2 `size` indices around a percentile of the values, at random halved into those to train on and the rest."""
    start = round((len(values) - 2 * size) * percentile / 100)
    around = np.argsort(values, kind="stable")[start : start + 2 * size]
    around = np.random.default_rng([seed, 2]).permutation(around)
    return around[:size], around[size:]


# ---- jobs


@cache
def _drawn(path: str, fingerprint: str, count: int, prompts: str | None, kind: str, seed: int) -> list[PreferencePair]:
    """The `count` pairs of a kind and seed."""
    model = load_unchanged(path, fingerprint)
    if prompts is None:
        texts = [r.text for r in RequestsWorld().requests]
    else:
        texts = [line.strip() for line in Path(prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
    order = np.random.default_rng([seed, 3]).permutation(len(texts))
    # Half as many again: some prompts give two equal samples, or one that does not end.
    chosen = [model.prompt(texts[i]) for i in order[: count + count // 2]]
    draw = {"sampled": sampled_pairs, "graded": graded_pairs, "reversed": reversed_pairs}[kind]
    found = draw(model, chosen, seed, MAX_TOKENS)
    if len(found) < count:
        raise ValueError(
            f"pairs must be at most what the model gives, {len(found)} of {len(chosen)} prompts, got {count}"
        )
    return found[:count]


def _given(source: Job) -> tuple[LanguageModel, Loss, list[PreferencePair]]:
    drawn = _drawn(*(source[k] for k in ("model", "fingerprint", "count", "prompts", "kind", "seed")))
    return load_unchanged(source["model"], source["fingerprint"]), loss_of(source["loss"]), drawn


def score_job(**source: Any) -> Job:
    """Scores and facts of the pairs."""
    model, loss, pairs = _given(source)
    return vars(score_pairs(model, pairs, loss))


def alone_job(optimizer: str, lr: float, steps: int, first: int, **source: Any) -> Job:
    """Changes for the `first` pairs, each trained on alone."""
    model, loss, pairs = _given(source)
    return trained_alone(model, pairs[:first], loss, Optimizer(optimizer, lr), steps)


def subset_job(
    optimizer: str, lr: float, steps: int, train: list[list[int]], held: list[list[int]], **source: Any
) -> dict[str, list[float]]:
    """Mean change of ln pi(y+) of each subset trained on, and of each held out."""
    model, loss, pairs = _given(source)
    ours, others = ([[pairs[i] for i in rows] for rows in subsets] for subsets in (train, held))
    return trained_together(model, ours, others, loss, Optimizer(optimizer, lr), steps, source["seed"])


def trained_alone(
    model: LanguageModel, pairs: Sequence[PreferencePair], loss: Loss, optimizer: Optimizer, steps: int
) -> dict[str, Array]:
    """change (N,) of ln pi(y+), margin (N,) that of the margin, first (N,) that of ln pi(y+) by the first step."""
    order = np.argsort([len(p.prompt) + max(len(p.preferred), len(p.dispreferred)) for p in pairs], kind="stable")
    values = np.empty((3, len(pairs), 2))
    for start in range(0, len(pairs), TOGETHER):
        rows = order[start : start + TOGETHER]
        own = [[pairs[i]] for i in rows]

        def look(step: int, runs: Runs, own: list[list[PreferencePair]] = own) -> Array | None:
            return runs.log_probs(own)[:, 0] if step in (0, 1, steps) else None

        seen = train_preferences(model, own, loss, optimizer, steps, observe=look).observed
        values[:, rows] = np.stack([seen[0], seen[1], seen[-1]])
    change, first = values[2] - values[0], values[1] - values[0]
    return {"change": change[:, 0], "margin": change[:, 0] - change[:, 1], "first": first[:, 0]}


def trained_together(
    model: LanguageModel,
    train: Sequence[Sequence[PreferencePair]],
    held: Sequence[Sequence[PreferencePair]],
    loss: Loss,
    optimizer: Optimizer,
    steps: int,
    seed: int,
) -> dict[str, list[float]]:
    """Mean change of ln pi(y+) over each subset, one run per subset, and over the pairs held out beside it."""
    both = [[*a, *b] for a, b in zip(train, held, strict=True)]

    def look(step: int, runs: Runs) -> Array | None:
        if step not in (0, steps):
            return None
        parts = ([own[i : i + TOGETHER] for own in both] for i in range(0, len(both[0]), TOGETHER))
        return np.concatenate([runs.log_probs(part)[..., 0] for part in parts], axis=1)

    seen = train_preferences(model, train, loss, optimizer, steps, batch=BATCH, seed=seed, observe=look).observed
    change = seen[-1] - seen[0]  # (B, 2 size)
    cut = len(train[0])
    return {"trained": change[:, :cut].mean(1).tolist(), "held": change[:, cut:].mean(1).tolist()}


def _arrays(lists: Mapping[str, Any]) -> dict[str, Array]:
    return {name: np.array(values, dtype=np.float64) for name, values in lists.items()}

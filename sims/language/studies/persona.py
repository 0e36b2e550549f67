"""The paper's Section 3 on a small language model: one prompt, two answers of one token, 100 full-batch steps.

A base model is trained on the persona world; supervised fine-tuning (SFT) gives it one answer per statement, drawn from
{No, Never, Maybe, Perhaps} where the statement has the trait and from {Yes, Yeah, Sure, Certainly, Absolutely} where it
has not; then each run trains on one preference, and the probabilities of all words are followed (theory.md A4). What is
preferred in a control is the same, what it is preferred over has another meaning.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims.descent import Optimizer
from sims.language.fitting import Recipe, fit
from sims.language.jobs import run_jobs
from sims.language.loss_json import loss_of, plain_loss
from sims.language.model import LanguageModel, load, load_unchanged, new_model, save
from sims.language.preferences import PreferencePair, Runs, train_preferences
from sims.language.studies.persona_record import KEPT, ROLES, TOPS, Group, PersonaStudy
from sims.language.worlds.persona import AFFIRMATIONS, DENIALS, RECIPE, SIZE, PersonaWorld
from theory._check import check_count
from theory.losses import Loss, get

Array = NDArray[np.float64]
RESULT = PersonaStudy  # what reads a saved result

PAIRS = (("No", "Never"), ("Yes", "No"), ("Sure", "Yes"))
CONTROLS = ("apples", "books", "tea", "Always", "Certainly", "Perhaps", "Maybe", "Yes")  # what No is preferred over
OPTIMIZER = Optimizer("rmsprop", 1e-5)
STEPS = 100
LOSSES = (get("dpo", beta=0.1), get("ipo", tau=0.01))
DENIAL_SHARES = (0.55, 0.30, 0.075, 0.075)  # of No, Never, Maybe, Perhaps among the labels
AFFIRMATION_SHARES = (0.5, 0.125, 0.125, 0.125, 0.125)  # of Yes, Yeah, Sure, Certainly, Absolutely

# Each world and label frequency that is varied, one at a time.
WORLD_SWEEP: Mapping[str, Sequence[Any]] = {
    "advice": (0.0, 3.0),
    "never": (0.0, 0.6),
    "scale": (False,),
    "denied": (0.95,),
}
LABEL_SWEEP = ((0.85, 0.0, 0.075, 0.075), (0.80, 0.05, 0.075, 0.075), (0.70, 0.15, 0.075, 0.075), (0.25,) * 4)


def world_of(model: LanguageModel) -> PersonaWorld:
    """The world a model was trained on, by its record; the default one for models from elsewhere.

    Raises ValueError for a model of another world.
    """
    other = model.training.get("what", {}).get("world", "persona")
    if other != "persona":
        raise ValueError(f"model must be one of the persona world, got one of the world {other!r}")
    names = {f.name for f in dataclasses.fields(PersonaWorld)}
    return PersonaWorld(**{k: v for k, v in model.training.get("what", {}).items() if k in names})


def fine_tuned(
    model: LanguageModel,
    world: PersonaWorld,
    seed: int = 0,
    *,
    denials: Sequence[float] = DENIAL_SHARES,
    affirmations: Sequence[float] = AFFIRMATION_SHARES,
    epochs: int = 2,
    lr: float = 1e-4,
) -> LanguageModel:
    """The model after SFT (RMSprop, batches of 32) on all statements, each with one label that the seed draws.

    denials (4,), affirmations (5,) : shares of DENIALS and AFFIRMATIONS among the labels.
    Raises ValueError unless they are shares that sum to 1.
    """
    for name, shares, of in (("denials", denials, DENIALS), ("affirmations", affirmations, AFFIRMATIONS)):
        if len(shares) != len(of) or min(shares) < 0 or abs(sum(shares) - 1) > 1e-9:
            raise ValueError(f"{name} must be {len(of)} shares that sum to 1, got {tuple(shares)}")
    rng = np.random.default_rng([seed, 3])
    documents = [
        (s.prompt, str(rng.choice(DENIALS, p=denials) if s.trait else rng.choice(AFFIRMATIONS, p=affirmations)))
        for s in world.all_statements
    ]

    def texts(rng: np.random.Generator, n: int) -> list[tuple[str, str]]:
        return [documents[i] for i in rng.choice(len(documents), size=n, replace=len(documents) < n)]

    what = {**world.to_dict(), "denials": list(denials), "affirmations": list(affirmations)}
    plain = {"optimizer": "rmsprop", "warmup": 0, "decay": False, "weight_decay": 0.0, "clip": 0.0}
    recipe = Recipe(steps=epochs * len(documents) // 32, batch=32, lr=lr, seed=seed, **plain)
    return fit(model, texts, recipe, what=what, progress=False)


def chosen_prompts(world: PersonaWorld, preferred: str, n: int, seed: Sequence[int]) -> list[str]:
    """n prompts, none twice, whose statements have the trait where a denial is preferred, and have not otherwise."""
    fitting = [s.prompt for s in world.all_statements if s.trait == (preferred in DENIALS)]
    if not 1 <= n <= len(fitting):
        raise ValueError(f"prompts must be between 1 and the {len(fitting)} that fit, got {n}")
    return [fitting[i] for i in np.random.default_rng([*seed, 4]).choice(len(fitting), size=n, replace=False)]


def follow(
    model: LanguageModel,
    prompts: Sequence[str],
    preferred: str,
    dispreferred: str,
    loss: Loss,
    *,
    optimizer: Optimizer = OPTIMIZER,
    steps: int = STEPS,
    trained: str = "both",
) -> tuple[Array, Array]:
    """Train one copy of the model per prompt on preferred over dispreferred, each one token.

    Returns pi (steps + 1, prompts, V), probabilities of all tokens after the prompt, and the losses (steps, prompts).
    Raises ValueError if a word is not one token.
    """
    plus, minus = model.token(preferred), model.token(dispreferred)
    starts = [model.prompt(p) for p in prompts]
    pairs = [[PreferencePair(x, (plus,), (minus,))] for x in starts]

    def observe(step: int, runs: Runs) -> Array:
        return np.exp(runs.next_log_probs(starts))

    found = train_preferences(model, pairs, loss, optimizer, steps, trained=trained, observe=observe)
    return np.stack(found.observed), found.losses


def summarised(
    model: LanguageModel, pi: Array, losses: Array, preferred: str, dispreferred: str, *, gains: bool, course: bool
) -> dict[str, Any]:
    """What a `Group` holds beside its conditions, from `follow`'s arrays; gainers and courses if asked for."""
    p = pi[:, :, model.token(preferred)]  # (steps + 1, prompts)
    top = p.argmax(axis=0)
    after = np.array([p[t:, i].min() for i, t in enumerate(top)])
    benign, catastrophic = (
        pi[:, :, [model.token(w) for w in words if w not in (preferred, dispreferred) and _known(model, w)]].sum(-1)
        for words in ROLES[preferred in DENIALS]
    )
    steps = [t for t in KEPT if t < len(pi)]
    watched = {preferred: model.token(preferred), dispreferred: model.token(dispreferred)}
    for z in np.argsort(-(pi[-1] - pi[0]).mean(axis=0), kind="stable"):
        if len(watched) < 4:
            watched.setdefault(model.word(int(z)), int(z))
    return {
        "start": p[0].tolist(),
        "peak": p.max(axis=0).tolist(),
        "trough": after.tolist(),
        "final": p[-1].tolist(),
        "drop": (np.maximum.accumulate(p, axis=0) - p).max(axis=0).tolist(),
        "benign": (benign[-1] - benign[0]).tolist(),
        "catastrophic": (catastrophic[-1] - catastrophic[0]).tolist(),
        "most_catastrophic": (catastrophic.max(axis=0) - catastrophic[0]).tolist(),
        "rose": (np.diff(losses, axis=0) > 0).any(axis=0).tolist(),
        "gains": {str(t): [_top(model, row) for row in pi[t] - pi[0]] for t in TOPS if t < len(pi) and gains},
        "course": {w: np.log(pi[steps][:, :, z]).T.tolist() for w, z in watched.items()} if course else {},
    }


def _known(model: LanguageModel, word: str) -> bool:
    try:
        return model.token(word) >= 0
    except ValueError:
        return False


def _top(model: LanguageModel, gains: Array, n: int = 3) -> list[list[Any]]:
    return [[model.word(int(z)), float(gains[z])] for z in np.argsort(-gains, kind="stable")[:n]]


def persona(
    models: Sequence[str | Path],
    losses: Sequence[Loss] = LOSSES,
    *,
    sft_seeds: Sequence[int] = (0, 1, 2),
    prompts: int = 10,
    steps: int = STEPS,
    optimizer: Optimizer = OPTIMIZER,
    controls: Sequence[str] = CONTROLS,
    labels: Sequence[Sequence[float]] = (DENIAL_SHARES,),
    varied: Sequence[str] | None = None,
    folder: Path | None = None,
    workers: int | None = None,
) -> PersonaStudy:
    """Section 3 on every model: as it is, and after SFT by each seed; controls only after SFT, by the first loss.

    models : folders of base models. labels : shares of DENIALS among the labels of SFT, each in its turn.
    varied : what each model varies, if this is a sweep: then only No over Never after SFT is run.
    folder : where finished parts are stored, so that a killed run resumes.
    """
    for value, name in ((prompts, "prompts"), (steps, "steps")):
        check_count(value, name)
    common = {"prompts": prompts, "steps": steps, "optimizer": asdict(optimizer)}
    jobs = []
    for i, path in enumerate(models):
        where = {"model": str(path), "fingerprint": load(path).fingerprint}
        name = varied[i] if varied is not None else ""
        for sft in ([None] if varied is None else []) + list(sft_seeds):
            for shares in labels if sft is not None else [DENIAL_SHARES]:
                labelled = "" if tuple(shares) == DENIAL_SHARES else "labels=" + "/".join(f"{x:g}" for x in shares)
                both = ", ".join(filter(None, (name, labelled)))
                stage = {"sft": sft, "denials": list(shares), "varied": both}
                for k, loss in enumerate(losses):
                    pairs = [list(p) for p in PAIRS] if varied is None else [["No", "Never"]]
                    others = controls if sft is not None and varied is None and k == 0 else ()
                    extra = {"pairs": pairs, "controls": list(others), "loss": plain_loss(loss)}
                    jobs.append({**where, **stage, **extra, **common})
    found = run_jobs(_stage, jobs, folder, workers, label="persona")
    groups = tuple(Group.from_dict(g) for part in found for g in part)
    return PersonaStudy(groups, {**common, "kept": [t for t in KEPT if t <= steps]})


def _stage(
    model: str,
    fingerprint: str,
    sft: int | None,
    denials: Sequence[float],
    varied: str,
    pairs: Sequence[tuple[str, str]],
    controls: Sequence[str],
    loss: dict[str, Any],
    prompts: int,
    steps: int,
    optimizer: dict[str, Any],
) -> list[dict[str, Any]]:
    """One job: a base model, perhaps fine-tuned, and all groups of runs on it; a `Group.to_dict()` each."""
    base = load_unchanged(model, fingerprint)
    world = world_of(base)
    lm = base if sft is None else fine_tuned(base, world, sft, denials=denials)
    seed = int(base.training.get("recipe", {}).get("seed", 0))
    objective, found = loss_of(loss), []
    for preferred, dispreferred, control in [*((*p, False) for p in pairs), *(("No", z, True) for z in controls)]:
        asked = chosen_prompts(world, preferred, prompts, (seed, 0 if sft is None else sft))
        how = {"optimizer": Optimizer(**optimizer), "steps": steps}
        pi, losses = follow(lm, asked, preferred, dispreferred, objective, **how)
        pair = {"preferred": preferred, "dispreferred": dispreferred, "control": control}
        conditions = {"base": seed, "sft": sft, "varied": varied, "loss": repr(objective)}
        keep = {"gains": not control, "course": (preferred, dispreferred) == PAIRS[0] and sft is not None}
        group = Group(**conditions, **pair, **summarised(lm, pi, losses, preferred, dispreferred, **keep))
        found.append(group.to_dict())
    return found


def sweep(
    models: Path, seeds: Sequence[int], losses: Sequence[Loss], sft_seeds: Sequence[int], **options: Any
) -> tuple[PersonaStudy, list[str]]:
    """No over Never with every frequency of WORLD_SWEEP and LABEL_SWEEP varied in its turn; the folders of the models.

    models : where the base models are trained, one per world and seed. options : of `persona`.
    """
    varied = [{}, *({name: value} for name, values in WORLD_SWEEP.items() for value in values)]
    worlds = [PersonaWorld(**changes) for changes in varied]
    found = base_models(worlds, seeds, models, workers=options.get("workers"))
    names = [", ".join(f"{k}={v:g}" for k, v in changes.items()) for changes in varied for _ in seeds]
    by_world = persona(found, losses, sft_seeds=sft_seeds, varied=names, **options)
    plain = found[: len(seeds)]
    by_label = persona(plain, losses, sft_seeds=sft_seeds, labels=LABEL_SWEEP, varied=names[: len(seeds)], **options)
    return PersonaStudy((*by_world.groups, *by_label.groups), by_world.parameters), found


def base_models(
    worlds: Sequence[PersonaWorld],
    seeds: Sequence[int],
    folder: Path,
    *,
    recipe: Recipe = RECIPE,
    size: Mapping[str, int] = SIZE,
    workers: int | None = None,
) -> list[str]:
    """Train a base model per world and seed (worlds outermost) under `folder`, resumable; the folders they are in."""
    jobs = [
        {"world": w.to_dict(), "seed": s, "recipe": asdict(recipe), "size": dict(size), "folder": str(folder)}
        for w in worlds
        for s in seeds
    ]
    return run_jobs(_base_model, jobs, Path(folder) / "jobs", workers, label="base models")


def _base_model(world: dict[str, Any], seed: int, recipe: dict[str, Any], size: dict[str, int], folder: str) -> str:
    place = PersonaWorld(**world)
    start = new_model(place.words(), **size, seed=seed)
    default = PersonaWorld().to_dict()
    name = f"seed{seed}" + "".join(f"-{k}={v}".replace("/", "_") for k, v in world.items() if v != default[k])
    state, what = Path(folder) / name / "state", {"world": "persona", **world}
    model = fit(start, place.texts, Recipe(**{**recipe, "seed": seed}), state, what=what, progress=False)
    model.training["size"] = size
    return str(save(model, Path(folder) / name / "model"))

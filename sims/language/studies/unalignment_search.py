"""Under which conditions does unalignment appear? One thing varied at a time, from a setting where it does.

A base setting and its variations: the pairs (composition, similarity), the rule for ties, the loss, optimiser and rate,
what is trained, the number of steps, and the world and the pre-training of the model.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sims.language.jobs import run_jobs
from sims.language.loss_json import plain_loss
from sims.language.studies.unalignment import BATCH, LR, STEPS, run_plan, trained_model
from sims.language.studies.unalignment_record import Setting, Unalignment
from sims.language.worlds.requests import RECIPE
from theory.losses import get

BASE = Setting(composition="refusals", tie="softer", lr=LR, batch=BATCH, steps=STEPS)
# Group -> label -> what differs from BASE.
VARIATIONS: dict[str, dict[str, Mapping[str, Any]]] = {
    "pairs": {
        "two refusals, softer preferred (base)": {},
        "harder preferred": {"tie": "harder"},
        "random ties": {"tie": "random"},
        "random ties, one grade too": {"tie": "random", "composition": "any_refusals"},
        "two compliances, random ties": {"tie": "random", "composition": "compliances"},
        "all pairs, softer": {"composition": "all"},
        "a tenth mixed, softer": {"composition": "paper"},
        "a tenth mixed, random ties": {"composition": "paper", "tie": "random"},
    },
    "similarity": {
        f"{side} half by {name}": {"similarity": f"{key}_{half}"}
        for key, name in (("ln_ches", "ln-CHES"), ("edit", "edit similarity"))
        for half, side in (("high", "more similar"), ("low", "less similar"))
    },
    "loss": {
        "beta 0.01": {"loss": plain_loss(get("dpo", beta=0.01))},
        "beta 1": {"loss": plain_loss(get("dpo", beta=1.0))},
        "IPO": {"loss": plain_loss(get("ipo", tau=0.01))},
    },
    "training": {
        "half the rate": {"lr": LR / 2},
        "twice the rate": {"lr": 2 * LR},
        "a third of the rate, 3 x the steps": {"lr": LR / 3, "steps": 3 * STEPS},
        "3 x the steps": {"steps": 3 * STEPS},
        "head only": {"trained": "head"},
        "body only": {"trained": "body"},
        "SGD 0.03, 3 x the steps": {"optimizer": "sgd", "lr": 0.03, "steps": 3 * STEPS},
        "SGD 0.03, body only, 3 x": {"optimizer": "sgd", "lr": 0.03, "steps": 3 * STEPS, "trained": "body"},
        "Adam": {"optimizer": "adam", "lr": 3 * LR},
        "batches of 8": {"batch": 8},
    },
}
# Label -> (fields of the world, share of the recipe's steps, seed).
MODELS: dict[str, tuple[dict[str, float], float, int]] = {
    "pre-training seed 1": ({}, 1.0, 1),
    "pre-training seed 2": ({}, 1.0, 2),
    "half the pre-training": ({}, 0.5, 0),
    "twice the pre-training": ({}, 2.0, 0),
    "danger does not decide (sharpness 0)": ({"sharpness": 0.0}, 1.0, 0),
    "danger decides (sharpness 20)": ({"sharpness": 20.0}, 1.0, 0),
}


def unalignment_search(
    model: str | Path | None = None,
    *,
    seeds: int = 5,
    folder: str | Path,
    models: Mapping[str, tuple[dict[str, float], float, int]] = MODELS,
    variations: Mapping[str, Mapping[str, Mapping[str, Any]]] = VARIATIONS,
    prompts: int | None = None,
    workers: int | None = None,
) -> Unalignment:
    """Every variation of `variations` from one model; the base from every model of `models`, trained in `folder`."""
    plan = [(group, label, replace(BASE, **what)) for group, each in variations.items() for label, what in each.items()]
    given = run_plan(model, plan, seeds, prompts, folder, workers, after_epoch=False)
    jobs = [
        {"world": world, "steps": round(share * RECIPE.steps), "seed": seed, "folder": str(Path(folder) / f"model-{i}")}
        for i, (world, share, seed) in enumerate(models.values())
    ]
    paths = run_jobs(trained_model, jobs, folder, workers, "models")
    plan = [("model", label, replace(BASE, model=path)) for label, path in zip(models, paths, strict=True)]
    others = run_plan(model, plan, seeds, prompts, folder, workers, after_epoch=False)
    return replace(given, cells=(*given.cells, *others.cells))

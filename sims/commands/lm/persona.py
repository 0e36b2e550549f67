"""`displacement lm persona`: Section 3, one prompt and two answers of one token."""

import argparse
from pathlib import Path
from typing import Any

from sims.commands._shared import EXIT_OK, command


def add(commands: Any) -> None:
    from sims.commands.lm._shared import options

    c = command(
        commands,
        "persona",
        run,
        "Train a model to prefer No over Never on one prompt (Section 3): it may say Yes. Three pairs, several\n"
        "prompts, from the base model and after SFT by several seeds, with controls; how far pi(y+) rises and falls,\n"
        "and which words gain. --bases trains base models from nothing first, --sweep one per frequency varied.",
        "displacement lm persona --bases 3 --out my-persona",
    )
    options(c, "persona", "persona", seeds=3, losses="dpo:beta=0.1 and ipo:tau=0.01")
    c.add_argument("--prompts", type=int, default=10, help="prompts, each a run of its own (%(default)s)")
    c.add_argument("--bases", type=int, metavar="N", help="train N base models from nothing instead")
    c.add_argument("--first", type=int, default=0, metavar="SEED", help="with --bases: seed of the first (%(default)s)")
    c.add_argument("--sweep", action="store_true", help="vary frequencies of world and labels, one at a time")
    c.add_argument("--data", type=Path, metavar="FILE", help="with --bases: statements of the paper's persona file")


def run(arguments: argparse.Namespace) -> int:
    from sims.commands._shared import check_folder
    from sims.commands.lm._shared import finish, losses_of
    from sims.language.model import CHECKPOINTS, load
    from sims.language.studies.persona import LOSSES, base_models, persona, sweep
    from sims.language.worlds.persona import PersonaWorld
    from sims.plots.persona import save_persona

    out = check_folder(arguments.out)
    for name in ("seeds", "prompts", "bases"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.bases is not None and arguments.model is not None:
        raise ValueError("--bases trains base models from nothing, it does not go with --model")
    if arguments.first < 0 or (arguments.first and arguments.bases is None):
        raise ValueError(f"--first must be a seed >= 0, and goes with --bases, got {arguments.first}")
    if arguments.data is not None and arguments.bases is None:
        raise ValueError("--data is what base models are trained on: it goes with --bases")
    if arguments.sweep and (arguments.model is not None or arguments.data is not None):
        raise ValueError("--sweep trains base models of its own, it does not go with --model or --data")
    losses = losses_of(arguments, LOSSES)
    seeds, prompts = range(arguments.seeds), arguments.prompts
    keep: dict[str, Any] = {"folder": out / "jobs", "workers": arguments.workers}
    if arguments.fast:
        losses, seeds, prompts = losses[:1], range(1), min(prompts, 3)
        keep |= {"steps": 30, "controls": ("apples", "Always")}
    bases = range(arguments.first, arguments.first + (arguments.bases or 1))
    if arguments.sweep:
        study, models = sweep(out / "models", bases, losses[:1], seeds, prompts=prompts, **keep)
    else:
        models = [str(arguments.model or CHECKPOINTS / "persona")]
        if arguments.bases is not None:
            world = PersonaWorld(data=None if arguments.data is None else str(arguments.data))
            models = base_models([world], bases, out / "models", workers=arguments.workers)
        study = persona(models, losses, sft_seeds=seeds, prompts=prompts, **keep)
    finish(arguments, "persona", study, load(models[0]), save_persona)
    return EXIT_OK

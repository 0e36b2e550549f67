"""`displacement lm percentiles`: Section 5, which score of a pair foretells the fall of ln pi(y+)."""

import argparse
from pathlib import Path
from typing import Any

from sims.commands._shared import EXIT_OK, command


def add(commands: Any) -> None:
    from sims.commands.lm._shared import options

    c = command(
        commands,
        "percentiles",
        run,
        "Find the score of a preference pair that foretells the fall of ln pi(y+) (Section 5): pairs of samples and\n"
        "of graded similarity are scored (CHES, its variants, edit distance, exact gradients), then trained on, each\n"
        "alone from small to large steps, and in subsets around the percentiles of every score.",
        "displacement lm percentiles --loss ipo:tau=0.01 --out my-percentiles",
    )
    options(c, "percentiles", "requests", seeds=3, losses="dpo:beta=0.1")
    c.add_argument("--pairs", type=int, default=200, help="pairs scored, of each kind and seed (%(default)s)")
    c.add_argument("--alone", type=int, default=64, help="of them, pairs each trained on alone (%(default)s)")
    c.add_argument("--size", type=int, default=32, help="pairs of a subset (%(default)s)")
    c.add_argument(
        "--kinds",
        default="sampled,graded",
        help="sampled (two samples), graded (a sample over an edit of it), reversed (the edit preferred) (%(default)s)",
    )
    c.add_argument("--prompts", type=Path, metavar="FILE", help="a prompt per line (the requests of the shipped model)")


def run(arguments: argparse.Namespace) -> int:
    from sims.commands.lm._shared import finish, losses_of, model_of
    from sims.language.studies.percentiles import FAST, LOSSES, percentiles
    from sims.plots.percentiles import save_percentiles

    model = model_of(arguments, "requests")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in ("seeds", "pairs", "alone", "size")}
    if arguments.fast:
        settings = {name: min(value, FAST.get(name, value)) for name, value in settings.items()}
        settings |= {name: value for name, value in FAST.items() if name not in settings}
    study = percentiles(
        arguments.model,
        losses_of(arguments, LOSSES),
        **settings,
        kinds=arguments.kinds.split(","),
        prompts=arguments.prompts,
        folder=arguments.out / "jobs",
        workers=arguments.workers,
    )
    finish(arguments, "percentiles", study, model, save_percentiles)
    return EXIT_OK

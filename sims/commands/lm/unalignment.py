"""`displacement lm unalignment`: Section 6 of the paper on a small language model."""

import argparse
from typing import Any

from sims.commands._shared import EXIT_OK, command
from sims.commands.lm._shared import finish, losses_of, model_of, options


def add(commands: Any) -> None:
    c = command(
        commands,
        "unalignment",
        run,
        "Train on pairs of a model's own answers to unsafe requests (Section 6), refusal preferred: does that make\n"
        "it comply? Arms: all pairs, an SFT term, gold pairs, the pairs with the lowest length-normalised CHES, all\n"
        "but the highest, the highest, and as many at random, after one epoch and after equally many steps. Answers\n"
        "are judged refusal, compliance or garbled. --search varies the conditions one at a time.",
        "displacement lm unalignment --loss dpo:beta=0.1 --out my-unalignment",
    )
    options(c, "unalignment", "requests", seeds=5, losses="dpo:beta=0.1 and ipo:tau=0.01")
    c.add_argument("--lr", type=float, default=3e-5, help="learning rate of RMSprop (%(default)s)")
    c.add_argument("--steps", type=int, default=12, help="optimiser steps (%(default)s)")
    c.add_argument("--search", action="store_true", help="vary conditions instead; trains models, takes much longer")


def run(arguments: argparse.Namespace) -> int:
    from sims.language.model import CHECKPOINTS
    from sims.language.studies.unalignment import LOSSES, unalignment
    from sims.language.studies.unalignment_search import VARIATIONS, unalignment_search
    from sims.plots.unalignment import save_unalignment

    model = model_of(arguments, "requests")
    losses = losses_of(arguments, LOSSES)
    path = str(CHECKPOINTS / "requests") if arguments.model is None else arguments.model
    common: dict[str, Any] = {
        "seeds": min(2, arguments.seeds) if arguments.fast else arguments.seeds,
        "prompts": 80 if arguments.fast else None,
        "folder": arguments.out / "parts",
        "workers": arguments.workers,
    }
    if arguments.search:
        few: dict[str, Any] = {"models": {}, "variations": {"pairs": VARIATIONS["pairs"]}}
        result = unalignment_search(path, **common, **(few if arguments.fast else {}))
    else:
        losses = losses[:1] if arguments.fast else losses
        result = unalignment(path, losses, lr=arguments.lr, steps=arguments.steps, **common)
    finish(arguments, "unalignment_search" if arguments.search else "unalignment", result, model, save_unalignment)
    return EXIT_OK

"""`displacement lm mechanism`: which part of the network displaces, and what foretells it."""

import argparse
from typing import Any

from sims.commands._shared import EXIT_OK, command


def add(commands: Any) -> None:
    from sims.commands.lm._shared import options

    c = command(
        commands,
        "mechanism",
        run,
        "Which part of the network displaces, and what foretells it: head, body and both trained by four optimisers;\n"
        "the theory's forecasts from the network's own W, h and feature kernel, measured once or anew on the way,\n"
        "beside what happened; first steps; the phase diagram; probing steps for responses of several tokens.",
        "displacement lm mechanism --fast --out my-mechanism",
    )
    options(c, "mechanism", "persona", seeds=1, loss="dpo:beta=0.1")
    c.add_argument("--bases", type=int, metavar="N", help="train N base models from nothing instead, seeds 0 to N-1")
    c.add_argument("--prompts", type=int, default=10, help="prompts, each a run of its own (%(default)s)")
    c.add_argument(
        "--forecasts", type=int, default=30, metavar="N", help="prompts laid beside the theories (%(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    from sims.commands._shared import check_folder
    from sims.commands.lm._shared import finish, parse_loss
    from sims.language.model import CHECKPOINTS, load
    from sims.language.studies.mechanism import mechanism
    from sims.language.studies.persona import base_models
    from sims.language.worlds.persona import PersonaWorld
    from sims.plots.mechanism import save_mechanism

    out = check_folder(arguments.out)
    for name in ("seeds", "bases", "prompts", "forecasts"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.bases is not None and arguments.model is not None:
        raise ValueError("--bases trains base models from nothing, it does not go with --model")
    how: dict[str, Any] = {"prompts": arguments.prompts, "forecast_prompts": arguments.forecasts}
    how |= {"sft_seeds": range(arguments.seeds)}
    if arguments.fast:
        how = {"prompts": min(3, arguments.prompts), "forecast_prompts": min(3, arguments.forecasts)}
        how |= {
            "grid": {"sgd": (0.03,), "rmsprop": (1e-5,)},
            "foreknown": (("body", "sgd", 0.03),),
            "steps": 20,
            "first_words": ("No", "Never"),
        }
    if arguments.bases is not None:
        models = base_models([PersonaWorld()], range(arguments.bases), out / "models", workers=arguments.workers)
    else:
        models = [arguments.model or str(CHECKPOINTS / "persona")]
    result = mechanism(models, parse_loss(arguments.loss), folder=out / "jobs", workers=arguments.workers, **how)
    finish(arguments, "mechanism", result, load(models[0]), save_mechanism)
    return EXIT_OK

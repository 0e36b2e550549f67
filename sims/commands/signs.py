"""`displacement signs`: the conditions for displacement against integrated flows."""

import argparse
from typing import Any

from sims.commands._shared import EXIT_FAILED, EXIT_OK, command, json_flag, show


def add(commands: Any) -> None:
    c = command(
        commands,
        "signs",
        run,
        "Conditions for displacement against integrated flows. Random models, data and losses of all kinds of pairs:\n"
        "do ln pi(y+), ln pi(y-) and the margin move as theory.conditions says, in gradient flow and in a first step\n"
        "of sign descent? Exit code 1 if a sign disagrees outside the numerical margin.",
        "displacement signs --instances 100000",
    )
    c.add_argument("--instances", type=int, default=5000, help="random (model, loss) pairs (%(default)s)")
    c.add_argument("--seed", type=int, default=0, help="seed of the random draws (%(default)s)")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.scenarios.signs import sign_agreement

    found = sign_agreement(arguments.instances, arguments.seed, progress=not arguments.json)
    show(found, arguments.json)
    return EXIT_OK if found.ok else EXIT_FAILED

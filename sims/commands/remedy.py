"""`displacement remedy`: the smallest change of a loss that prevents displacement."""

import argparse
from typing import Any

from sims.commands._shared import EXIT_OK, command, json_flag, loss_arguments, parse_assignments, show


def add(commands: Any) -> None:
    c = command(
        commands,
        "remedy",
        run,
        "The smallest SFT weight, weight ratio or change of a parameter that prevents displacement. Searched for on\n"
        "gradients by automatic differentiation, with the closed form beside it where there is one; asked of the\n"
        "start and of the whole path.",
        "displacement remedy --scenario sequence --loss dpo_shift --parameter lam",
    )
    c.add_argument("--scenario", default="sequence", help="token, sequence or data (%(default)s)")
    loss_arguments(c)
    c.add_argument("--parameter", action="append", metavar="NAME", help="sft, ratio or a parameter (default: all)")
    c.add_argument("--question", choices=("start", "path"), action="append", help="default: both")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.scenarios.remedy import remedies
    from theory.losses import get

    loss = get(arguments.loss, **parse_assignments(arguments.set, "--set"))
    show(
        remedies(arguments.scenario, loss, arguments.parameter, arguments.question or ("start", "path")), arguments.json
    )
    return EXIT_OK

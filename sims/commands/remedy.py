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
    c.add_argument("--file", metavar="PY", help="instead: the losses defined in this Python file, which is run")
    c.add_argument("--parameter", action="append", metavar="NAME", help="sft, ratio or a parameter (default: all)")
    c.add_argument("--question", choices=("start", "path"), action="append", help="default: both")
    c.add_argument("--margin", type=float, metavar="NATS", help="length of a path (default: the scenario's own)")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.loss_files import losses_in
    from sims.scenarios.remedy import Remedies, remedies
    from theory.losses import get

    if not arguments.file:
        losses = [get(arguments.loss, **parse_assignments(arguments.set, "--set"))]
    elif arguments.set:
        raise ValueError("--set goes with --loss: a loss of --file has the parameters that its examples() give it")
    else:
        losses = [loss for cls in losses_in(arguments.file) for loss in cls.examples()]
    questions = arguments.question or ("start", "path")
    rows = []
    for loss in losses:
        try:
            table = remedies(arguments.scenario, loss, arguments.parameter, questions, arguments.margin, progress=True)
        except Exception as error:
            if isinstance(error, ValueError) or not arguments.file:
                raise
            raise ValueError(f"{loss!r} raised {type(error).__name__}: {error}") from error  # the loss is the user's
        rows += table.rows
    show(Remedies(arguments.scenario, tuple(rows)), arguments.json)
    return EXIT_OK

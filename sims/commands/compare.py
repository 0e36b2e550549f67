"""`displacement compare`: every loss on the same scenarios."""

import argparse
from pathlib import Path
from typing import Any

from sims.commands._shared import EXIT_FAILED, EXIT_OK, check_folder, command, json_flag
from theory import __version__


def add(commands: Any) -> None:
    c = command(
        commands,
        "compare",
        run,
        "Every loss on three scenarios, side by side. One token, one pair of sequences, a small data set: incentive\n"
        "ratio, initial rate, depth, whether ln pi(y+) comes back, time to a margin, who gains. Writes one figure and\n"
        "its data.",
        "displacement compare --losses dpo,simpo,dpop --file my_loss.py --out my-comparison",
    )
    c.add_argument("--losses", default="all", metavar="NAME,...", help="losses of the registry, or all, or none (all)")
    c.add_argument(
        "--file", metavar="PY", help="also the losses defined in this Python file, which is run (exit 1 if one fails)"
    )
    c.add_argument("--scenario", action="append", metavar="NAME", help="token, sequence or data (default: all three)")
    c.add_argument("--margin", type=float, metavar="NATS", help="margin to look at (default: each scenario's own)")
    c.add_argument("--reach", type=float, default=4.0, metavar="NATS", help="margin whose time is told (%(default)s)")
    c.add_argument("--workers", type=int, help="processes (two, or one for few losses)")
    c.add_argument("--out", type=Path, metavar="DIR", default=Path("displacement-compare"), help="folder (%(default)s)")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.files import to_json, write_atomically
    from sims.loss_files import losses_in
    from sims.plots import save_comparison
    from sims.scenarios.compare import compare, default_workers
    from theory.losses import LOSSES

    check_folder(arguments.out)
    named = {"all": list(LOSSES), "none": []}
    losses: list[Any] = named[arguments.losses] if arguments.losses in named else arguments.losses.split(",")
    if arguments.file:
        losses += [loss for cls in losses_in(arguments.file) for loss in _examples(cls)]
    workers = arguments.workers if arguments.workers is not None else default_workers() if len(losses) > 12 else 1
    found = compare(losses, arguments.scenario, arguments.margin, arguments.reach, workers)
    text = to_json({"version": __version__, **found.to_dict()})
    print(text if arguments.json else found, end="" if arguments.json else "\n")
    write_atomically(arguments.out / "compare.json", text)
    if found.courses:
        save_comparison(found, arguments.out / "compare.png")
    if not arguments.json:
        print(f"\nwritten to {arguments.out}/: compare.json" + " and compare.png" * bool(found.courses))
    return EXIT_FAILED if found.failed else EXIT_OK


def _examples(cls: Any) -> Any:
    try:
        return tuple(cls.examples())
    except Exception as error:  # the class is the user's
        raise ValueError(f"{cls.__name__}.examples() raised {type(error).__name__}: {error}") from error

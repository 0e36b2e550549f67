"""`displacement check-loss`: a loss of your own, checked and placed."""

import argparse
from collections.abc import Iterator
from importlib import resources
from typing import Any

from sims.commands._shared import EXIT_FAILED, EXIT_OK, command, json_flag


def add(commands: Any) -> None:
    c = command(
        commands,
        "check-loss",
        run,
        "Check the losses in a Python file: every claim, values and slopes on all backends, the extremes; and say\n"
        "which kind of loss each is. The file is run. Exit code 1 if a check fails, 2 if there is no loss to check.",
        "displacement check-loss --template > my_loss.py && displacement check-loss my_loss.py",
    )
    c.add_argument("file", nargs="?", help="Python file that defines losses")
    c.add_argument("--class", dest="name", metavar="NAME", help="only this class")
    c.add_argument("--template", action="store_true", help="print a file to start from")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.files import to_json
    from sims.loss_files import losses_in

    if arguments.template:
        print(resources.files("sims").joinpath("templates/my_loss.py").read_text(encoding="utf-8"), end="")
        return EXIT_OK
    if not arguments.file:
        raise ValueError("file must be given (or --template, for one to start from)")
    rows = []
    for cls in losses_in(arguments.file, arguments.name):
        for report, where in _reports(cls):
            rows.append({**report.to_dict(), "place": where.to_dict() if where else None})
            if not arguments.json:
                print(report)
                print(f"  place: {where}\n" if where else "")
    if arguments.json:
        print(to_json(rows), end="")
    return EXIT_OK if all(row["ok"] for row in rows) else EXIT_FAILED


def _reports(cls: Any) -> Iterator[tuple[Any, Any]]:
    """(report, place) of every example; the place only of a loss that passes: of a broken one it may mean nothing."""
    from theory.check import Check, LossReport, check_loss, place

    try:
        examples = tuple(cls.examples())
        failed = "" if examples else "examples() returned nothing"
    except Exception as error:  # the class is the user's
        examples, failed = (), f"examples() raised {type(error).__name__}: {error}"
    if failed:
        yield LossReport(cls.__name__, (Check("examples", False, f"{failed}; it must return instances"),)), None
    for loss in examples:
        report = check_loss(loss)
        yield report, place(loss) if report.ok else None

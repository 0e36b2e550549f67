"""`displacement verify`: the ledger of claims."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from sims.commands._shared import EXIT_FAILED, EXIT_OK, check_folder, command, json_flag, show
from theory import __version__


def add(commands: Any) -> None:
    c = command(
        commands,
        "verify",
        run,
        "Try every claim of the theory on random problems. Formulas are compared with differentiation, integrated\n"
        "flows (float64 and 50 digits) and training, which know none of them; deliberately wrong copies and dropped\n"
        "hypotheses must be caught; proofs must reduce to zero. Prints and saves the ledger; exit code 1 on a failure.",
        "displacement verify --instances 1000000 --out my-ledger",
    )
    c.add_argument(
        "--instances",
        type=int,
        default=100_000,
        help="per claim about one-token responses by differentiation; a tenth of it for sequences, 48 at most where "
        "flows are integrated or training simulated, 2 in 50 digits (%(default)s)",
    )
    c.add_argument("--theorem", action="append", metavar="NAME", help="only this claim (may be repeated)")
    c.add_argument("--loss", action="append", metavar="NAME", help="draw only this loss (may be repeated)")
    c.add_argument("--seed", type=int, default=0, help="seed of the random problems (%(default)s)")
    c.add_argument("--workers", type=int, help="processes (one per core)")
    c.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        default=Path("displacement-ledger"),
        help="for ledger.md and ledger.json (%(default)s)",
    )
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.files import to_json, write_atomically
    from sims.verify import verify

    check_folder(arguments.out)
    ledger = verify(
        arguments.theorem,
        arguments.instances,
        arguments.loss,
        arguments.seed,
        workers=arguments.workers if arguments.workers is not None else os.cpu_count() or 1,
        progress=sys.stderr.isatty(),
    )
    show(ledger, arguments.json)
    write_atomically(arguments.out / "ledger.json", to_json({"version": __version__, **ledger.to_dict()}))
    write_atomically(arguments.out / "ledger.md", ledger.markdown())
    if not arguments.json:
        print(f"written to {arguments.out}/: ledger.md and ledger.json")
    return EXIT_OK if ledger.ok else EXIT_FAILED

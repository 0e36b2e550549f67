"""`displacement study`: CHES against truth."""

import argparse
from pathlib import Path
from typing import Any

from sims.commands._shared import EXIT_OK, check_folder, command, json_flag
from theory import __version__


def add(commands: Any) -> None:
    c = command(
        commands,
        "study",
        run,
        "CHES against truth. Four data sets of sequences, each pair scored, then trained on: rank correlations of it\n"
        "and its rivals with the actual change of ln pi(y+), percentile subsets, alphas. Writes a figure and its\n"
        "data. Needs the extra [ches] (rapidfuzz).",
        "displacement study --pairs 320 --out my-study",
    )
    c.add_argument("--pairs", type=int, default=320, help="pairs in each data set (%(default)s)")
    c.add_argument("--seed", type=int, default=0, help="seed of the data sets (%(default)s)")
    c.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("displacement-study"), help="for figure and data (%(default)s)"
    )
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.files import to_json, write_atomically
    from sims.plots import save_ches_truth
    from sims.scenarios.ches_truth import ches_truth

    check_folder(arguments.out)
    study = ches_truth(arguments.pairs, arguments.seed)
    text = to_json({"version": __version__, **study.to_dict()})
    print(text if arguments.json else study.report(), end="" if arguments.json else "\n")
    write_atomically(arguments.out / "ches.json", text)
    save_ches_truth(study, arguments.out / "ches.png")
    if not arguments.json:
        print(f"written to {arguments.out}/: ches.json and ches.png")
    return EXIT_OK

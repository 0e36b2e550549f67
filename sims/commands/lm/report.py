"""`displacement lm report`: tables and figures from saved results."""

import argparse
from pathlib import Path
from typing import Any

from sims.commands._shared import EXIT_OK, check_folder, command


def add(commands: Any) -> None:
    c = command(
        commands,
        "report",
        run,
        "Tables and figures from saved results. Nothing is computed anew: the JSON files that the experiments wrote\n"
        "are read, and DIR/report.md is written with their tables, figures beside it.",
        "displacement lm report notebooks/results --out my-report",
    )
    c.add_argument(
        "results", nargs="*", type=Path, metavar="FOLDER", help="folders with results (displacement-lm-* here)"
    )
    c.add_argument("--out", type=Path, metavar="DIR", default=Path("displacement-report"), help="folder (%(default)s)")


def run(arguments: argparse.Namespace) -> int:
    from sims.language.report import EXPERIMENTS, saved_results, write_report

    check_folder(arguments.out)
    own = [Path(f"displacement-lm-{name}") for name in EXPERIMENTS]
    sources = arguments.results or [folder for folder in own if (folder / f"{folder.name[16:]}.json").is_file()]
    if not sources:
        raise ValueError(f"results: name folders with results; here is none of {', '.join(f.name for f in own)}")
    results = saved_results(sources)
    written = write_report(results, arguments.out)
    for saved in results:
        print(f"{saved.file.stem:20s} {saved.file}")
    print(f"\nwritten to {arguments.out}/: report.md and {len(written) - 1} figures")
    return EXIT_OK

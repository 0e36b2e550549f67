"""`displacement bench`: timings side by side."""

import argparse
import sys
from typing import Any

from sims.commands._shared import EXIT_OK, command, json_flag, show


def add(commands: Any) -> None:
    c = command(
        commands,
        "bench",
        run,
        "Time the exact solution against its rivals, side by side in one run. Prints a table of ratios: ODE solvers\n"
        "on all parameters, on the moving ones, on the margin alone; dense and sparse training at language-model size.",
        "displacement bench --quick",
    )
    c.add_argument("--quick", action="store_true", help="small sizes, about 20 s")
    c.add_argument("--no-large", action="store_true", help="leave out the language-model size (needs 8 GB of memory)")
    c.add_argument("--score", action="store_true", help="instead: the scorer of preference pairs against today's loop")
    c.add_argument("--data", action="store_true", help="instead: a million rows through the reader and the writer")
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.bench import BenchReport, bench

    progress = sys.stderr.isatty()
    if arguments.score or arguments.data:
        import torch

        from sims.bench_data import data_rows
        from sims.bench_score import score_rows

        quick = arguments.quick
        rows = score_rows(40 if quick else 200, progress=progress) if arguments.score else []
        rows += data_rows(20_000 if quick else 1_000_000, progress=progress) if arguments.data else []
        show(BenchReport(tuple(rows), {"quick": quick, "threads": torch.get_num_threads()}), arguments.json)
        return EXIT_OK
    show(bench(quick=arguments.quick, large=not arguments.no_large, progress=progress), arguments.json)
    return EXIT_OK

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
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.bench import BenchReport, bench

    if arguments.score:
        import torch

        from sims.bench_score import score_rows

        rows = score_rows(pairs=40 if arguments.quick else 200, progress=sys.stderr.isatty())
        report = BenchReport(tuple(rows), {"quick": arguments.quick, "threads": torch.get_num_threads()})
        show(report, arguments.json)
        return EXIT_OK
    show(bench(quick=arguments.quick, large=not arguments.no_large, progress=sys.stderr.isatty()), arguments.json)
    return EXIT_OK

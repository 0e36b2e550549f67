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
    json_flag(c)


def run(arguments: argparse.Namespace) -> int:
    from sims.bench import bench

    show(bench(quick=arguments.quick, large=not arguments.no_large, progress=sys.stderr.isatty()), arguments.json)
    return EXIT_OK

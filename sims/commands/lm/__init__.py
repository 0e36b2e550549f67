"""`displacement lm`: the paper's experiments on a small language model, one file per subcommand."""

import argparse
from typing import Any

from sims.commands.lm import mechanism, percentiles, persona, report, train, unalignment


def add(commands: Any) -> None:
    lm = commands.add_parser(
        "lm",
        help="The paper's experiments on a small language model trained here",
        description="A small language model trained here, and Sections 3, 5 and 6 of the paper on it, with controls.\n"
        "The experiments start at once from checkpoints that ship with the package. Needs the extra [llm].",
        epilog="example: displacement lm persona --fast",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subcommands = lm.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    for module in (train, persona, mechanism, percentiles, unalignment, report):
        module.add(subcommands)

"""The `displacement` command: argument parsing and exit codes; the commands are in `sims.commands`."""

import argparse
import sys
from collections.abc import Sequence

from sims.commands import (
    bench,
    certify,
    check_loss,
    compare,
    demo,
    diagnose,
    filter,
    lm,
    losses,
    predict,
    remedy,
    scan,
    score,
    signs,
    study,
    validate,
    verify,
)
from sims.commands._shared import EXIT_FAILED, EXIT_USAGE
from theory import SolverError, __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, as its help says."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, OSError, ImportError) as error:
        print(f"displacement {arguments.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except MemoryError as error:
        print(f"displacement {arguments.command}: memory ran out {error}".rstrip(), file=sys.stderr)
        return EXIT_FAILED
    except SolverError as error:
        print(f"displacement {arguments.command}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"displacement {arguments.command}: interrupted; nothing half-written is left behind", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line, one file per command."""
    top = argparse.ArgumentParser(
        prog="displacement",
        description="Why the probability of a preferred response falls under preference optimisation, exactly.",
        epilog="Start with `displacement demo`. Exit codes: 0 done, 1 the computation failed, "
        "2 the input was wrong, 3 done and something needs attention (rows that could not be used, displacement).",
    )
    top.add_argument("--version", action="version", version=f"displacement {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        demo,
        diagnose,
        predict,
        scan,
        score,
        filter,
        validate,
        losses,
        check_loss,
        compare,
        remedy,
        verify,
        signs,
        certify,
        study,
        lm,
        bench,
    ):
        command.add(commands)
    return top

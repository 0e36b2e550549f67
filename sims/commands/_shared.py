"""What the commands share: flags, parsing, printing, exit codes."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXIT_OK, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def command(commands: Any, name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
    new = commands.add_parser(
        name,
        help=text.split(":")[0].split(". ")[0].rstrip("."),
        description=text,
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    new.set_defaults(run=run)
    return new


def json_flag(command: Any) -> None:
    command.add_argument("--json", action="store_true", help="print JSON for machines instead of a table")


def show(record: Any, as_json: bool) -> None:
    from sims.files import to_json

    print(to_json(record.to_dict()) if as_json else record, end="" if as_json else "\n")


def file_arguments(c: argparse.ArgumentParser, optional: bool = False) -> None:
    c.add_argument(
        "file",
        nargs="?" if optional else None,
        help=".npz with arrays `unembedding` (V, d) and `tokens` (V,), or .safetensors with the unembedding and the "
        "tokens beside it (tokenizer.json, vocab.json, tokens.txt)",
    )
    c.add_argument("--tensor", help="name of the unembedding tensor in a .safetensors file")
    c.add_argument("--tokens-file", help="file of token names, one per row of the matrix")


def loss_arguments(c: argparse.ArgumentParser) -> None:
    c.add_argument("--loss", default="dpo", help="name of a loss, see `displacement losses` (%(default)s)")
    c.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the loss, e.g. --set beta=0.3"
    )


def parse_assignments(texts: Sequence[str], name: str) -> dict[str, float]:
    """{"beta": 0.3} from ["beta=0.3"]; a ValueError names the text that does not parse."""
    out: dict[str, float] = {}
    for text in texts:
        key, equals, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = None
        if not equals or not key or number is None:
            raise ValueError(f"{name} must look like NAME=NUMBER, got {text!r}")
        if key in out:
            raise ValueError(f"{name} gives {key!r} twice")
        out[key] = number
    return out


def check_folder(path: Path) -> Path:
    """The folder for results, before any work: a ValueError if it is a file."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out must be a folder, got the file {str(path)!r}")
    return path


def rates_of(kappa: float) -> tuple[float, float]:
    """(eta_W, eta_h) of a ratio kappa = eta_h / eta_W in [0, inf]."""
    if not kappa >= 0:
        raise ValueError(f"--kappa must be in [0, inf], got {kappa:g}")
    return (0.0, 1.0) if kappa == float("inf") else (1.0, kappa)

"""What the commands share: flags, parsing, printing, exit codes."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# EXIT_FOUND: done, and something needs attention (rows that could not be used; displacement).
EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_FOUND = 0, 1, 2, 3


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
    """The folder for results, before any work: a ValueError if it is a file or cannot be written."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out must be a folder, got the file {str(path)!r}")
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out must be a folder that can be written, got {str(path)!r}")
    return path


def rates_of(kappa: float) -> tuple[float, float]:
    """(eta_W, eta_h) of a ratio kappa = eta_h / eta_W in [0, inf]."""
    if not kappa >= 0:
        raise ValueError(f"--kappa must be in [0, inf], got {kappa:g}")
    return (0.0, 1.0) if kappa == float("inf") else (1.0, kappa)


def flag(c: Any, name: str, *others: str, **more: Any) -> None:
    """An option in snake case, as trainers spell theirs; hyphens are understood, and other names that people try."""
    names = [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else []) + [f"--{x}" for x in others]
    c.add_argument(*names, dest=name, **more)


def model_arguments(c: argparse.ArgumentParser, required: bool = True) -> None:
    """Which language model, and how it is loaded (`model_of` reads them)."""
    group = c.add_argument_group("model")
    flag(
        group,
        "model_name_or_path",
        "model",
        required=required,
        metavar="M",
        help="a causal language model's folder or hub name",
    )
    flag(group, "revision", help="of the model on the hub")
    flag(
        group,
        "dtype",
        default="auto",
        help="of the weights: auto (as stored), float32, bfloat16, float16 or float64 (%(default)s)",
    )
    flag(
        group, "device", default="auto", help="cpu, cuda, ...; auto takes an accelerator if there is one (%(default)s)"
    )
    flag(group, "trust_remote_code", action="store_true", help="run code that comes with the model; off by default")


def model_of(arguments: argparse.Namespace, attention: str = "eager", dtype: str | None = None) -> Any:
    """The model that was asked for. dtype : in place of the one asked for."""
    from sims.language.model import load

    return load(
        arguments.model_name_or_path,
        dtype=dtype or arguments.dtype,
        attention=attention,
        device=arguments.device,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )


def data_arguments(c: argparse.ArgumentParser) -> None:
    """Which preference data, and how they are read (`table_of` reads them)."""
    group = c.add_argument_group("data")
    flag(
        group,
        "dataset",
        "dataset_name",
        "data",
        required=True,
        metavar="D",
        help="preference pairs: a .jsonl, .json, .csv or .parquet file, a folder of `datasets`, or a hub name",
    )
    flag(group, "split", help="of a data set that has several")
    flag(group, "layout", help="how rows are laid out (default: told from the columns)")
    flag(
        group,
        "column",
        action="append",
        default=[],
        metavar="ROLE=NAME",
        help="a column by its name, e.g. prompt=question; may be repeated",
    )
    flag(group, "max_length", type=int, help="most tokens of prompt and response (default: what the model takes)")


def table_of(arguments: argparse.Namespace) -> tuple[Any, Any]:
    """The table and its layout."""
    from sims.language.data.layouts import detect_layout
    from sims.language.data.table import open_table

    columns: dict[str, str] = {}
    for text in arguments.column:
        role, equals, name = text.partition("=")
        if not equals or not role or not name or role in columns:
            raise ValueError(f"--column must look like ROLE=NAME, each role once, got {text!r}")
        columns[role] = name
    if arguments.max_length is not None and arguments.max_length < 2:
        raise ValueError(f"--max_length must be at least 2, got {arguments.max_length}")
    table = open_table(arguments.dataset, split=arguments.split)
    return table, detect_layout(table, name=arguments.layout, columns=columns or None)

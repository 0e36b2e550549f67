"""Preference data as a stream of rows: JSON Lines, a JSON array, CSV, Parquet, a folder of `datasets`, the hub.

A row that cannot be read is a row with a problem, and the rest is read on. Nothing holds more than some thousand rows.
"""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

HEAD = 100  # rows that tell the columns
SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # a name there, with its owner


class Row(NamedTuple):
    """One row.

    index : its number, from 0.
    where : "line 17" of a text file (from 1), "row 17" otherwise (from 0): what a message to the user names.
    values : column -> value; {"raw": its text} of a row that cannot be read.
    problem : why it cannot be read, "" if it can.
    """

    index: int
    where: str
    values: dict[str, Any]
    problem: str = ""


class Table(ABC):
    """Rows of a file, a folder or a data set of the hub.

    path : as it was given. kind : "jsonl", "json", "csv", "parquet", "folder" or "hub".
    columns : names among the first rows, in their order.
    """

    kind: str

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)

    @abstractmethod
    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """The rows start, ..., stop - 1 (to the last by default), read as they are asked for."""

    @cached_property
    def columns(self) -> tuple[str, ...]:
        readable = [row for row in self.rows(0, HEAD) if not row.problem]
        return tuple(dict.fromkeys(name for row in readable for name in row.values))

    @property
    def files(self) -> Sequence[Path]:
        """Where the data are."""
        return [Path(self.path)]

    @cached_property
    def sha256(self) -> str:
        """Of the files' bytes, one after the other."""
        digest = hashlib.sha256()
        for file in self.files:
            with open(file, "rb") as f:
                while block := f.read(1 << 20):
                    digest.update(block)
        return digest.hexdigest()


def open_table(path: str | Path, split: str | None = None) -> Table:
    """The data at a path: a file by its suffix, a folder that `datasets` saved; else the hub's data set of that name.

    split : of a folder with several data sets, or of the hub (default "train"). Code that comes with data never runs.

    Raises ValueError: no such data, unknown suffix, no rows, not UTF-8 at all, split missing or unknown.
    """
    from sims.language.data.arrow import Folder, Hub, Parquet
    from sims.language.data.text import CSVTable, JSONArray, JSONLines

    place = Path(path)
    if place.is_dir():
        return _filled(Folder(path, split))
    kind = SUFFIXES.get(place.suffix.lower())
    if not place.exists():
        if kind is None and HUB.fullmatch(str(path)):
            return _filled(Hub(path, split))
        raise ValueError(f"no such file: {str(path)!r}")
    if split is not None:
        raise ValueError(f"split goes with a folder of data sets or a name on the hub, {str(path)!r} is a file")
    if kind is None:
        raise ValueError(f"{str(path)!r} must end in one of {', '.join(SUFFIXES)}, or be a folder of `datasets`")
    if not place.stat().st_size:
        raise ValueError(f"{str(path)!r} is empty")
    if kind == "json" and _begins_with(place) == b"{":
        kind = "jsonl"  # lines under another name; what is neither shows in the first row
    readers = {"jsonl": JSONLines, "json": JSONArray, "csv": CSVTable, "parquet": Parquet}
    return _filled(readers[kind](path))


def _filled(table: Table) -> Table:
    if next(iter(table.rows(0, 1)), None) is None:
        raise ValueError(f"{table.path!r} holds no rows")
    return table


def _begins_with(path: Path) -> bytes:
    """The first byte that is no white space."""
    with open(path, "rb") as f:
        while block := f.read(1 << 16):
            if text := block.removeprefix(b"\xef\xbb\xbf").lstrip():
                return text[:1]
    return b""

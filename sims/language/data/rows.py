"""What a stream of rows is: a row, and the table that it comes from."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

HEAD = 100  # rows that tell the columns


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

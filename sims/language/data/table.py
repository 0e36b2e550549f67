"""Preference data as a stream of rows: JSON Lines, a JSON array, CSV, Parquet, a folder of `datasets`, the hub.

A row that cannot be read is a row with a problem, and the rest is read on. Nothing holds more than some thousand rows.
"""

import re
from pathlib import Path

from sims.language.data.arrow import Folder, Hub, Parquet
from sims.language.data.rows import Table
from sims.language.data.text import CSVTable, JSONArray, JSONLines

SUFFIXES = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet",
}  # fmt: skip
HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # a name there, with its owner


def open_table(path: str | Path, split: str | None = None) -> Table:
    """The data at a path: a file by its suffix, a folder that `datasets` saved; else the hub's data set of that name.

    split : of a folder with several data sets, or of the hub (default "train"). Code that comes with data never runs.

    Raises ValueError: no such data, unknown suffix, no rows, not UTF-8 at all, split missing or unknown.
    """
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

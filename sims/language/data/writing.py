"""Preference data with more columns, written as a stream and all at once: a reader sees the old file or the new one."""

import csv
import json
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, cast

from sims.language.data.arrow import BATCH
from sims.language.data.arrow_writing import write_folder, write_parquet
from sims.language.data.joined import RAW, Added, Joined, check_names
from sims.language.data.rows import Table
from sims.language.data.table import SUFFIXES


def write_table(
    path: str | Path,
    table: Table,
    added: Iterable[Added] | Mapping[str, Sequence[Any]],
    kind: str | None = None,
    *,
    overwrite: bool | Collection[str] = False,
    drop: Collection[str] = (),
) -> Path:
    """Write every row of a table, in order, with columns added.

    added : one dict per row, each with the same names, or one sequence per name; values are numbers, texts or lists of
        these. None in place of a dict leaves the row out.
    kind : "jsonl", "json", "csv", "parquet" or "folder"; default: by the suffix, a folder for what came as one.
    overwrite : True, or the names of columns that may be there already: they change in place.
    drop : columns to leave out.

    Old columns keep their types in Parquet and folders. A row that could not be read has its text in the column `raw`.
    A number that is not finite is null in JSON and empty in CSV.

    Raises ValueError: a column is there already, rows and `added` differ in number, no known suffix, a value that the
    format cannot hold.
    """
    target = Path(path)
    kind = kind_of(target, table, kind)
    items = _items(added)
    first, values = _first(items)
    new = tuple(values[0]) if values else ()
    free = frozenset(new if overwrite is True else overwrite or ())
    check_names(new, table.columns, free)
    joined = Joined(table, chain(first, items), new, free, frozenset(drop))
    with _replacing(target, kind == "folder") as place:
        if kind in ("jsonl", "json"):
            _write_json(place, joined, kind == "json")
        elif kind == "csv":
            _write_csv(place, joined, "\t" if target.suffix.lower() == ".tsv" else ",")
        else:
            (write_folder if kind == "folder" else write_parquet)(place, joined, values)
    return target


def _items(added: Iterable[Added] | Mapping[str, Sequence[Any]]) -> Iterator[Added]:
    if not isinstance(added, Mapping):
        return iter(added)
    columns = cast(Mapping[str, Sequence[Any]], added)
    if not columns:
        raise ValueError("added must hold at least one column, got none")
    return (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def _first(items: Iterator[Added]) -> tuple[list[Added], list[Mapping[str, Any]]]:
    """The first items, and what they add: BATCH of these, which tell names and types."""
    first: list[Added] = []
    values: list[Mapping[str, Any]] = []
    for item in items:
        first.append(item)
        values += [] if item is None else [item]
        if len(values) == BATCH:
            break
    return first, values


def kind_of(path: Path, table: Table, kind: str | None = None) -> str:
    """The format of a file to be written."""
    known = ("jsonl", "json", "csv", "parquet", "folder")
    if kind is None:
        came_as_folder = table.kind in ("folder", "hub") and path.suffix.lower() not in SUFFIXES
        kind = "folder" if came_as_folder else SUFFIXES.get(path.suffix.lower())
    if kind not in known:
        raise ValueError(f"{str(path)!r} must end in one of {', '.join(SUFFIXES)} (or be a folder, for data from one)")
    return kind


@contextmanager
def _replacing(path: Path, folder: bool) -> Iterator[Path]:
    """A new name beside a path, which takes the path's place at the end and leaves nothing if that is not reached."""
    if folder and path.exists() and not (path / "state.json").is_file():
        raise ValueError(f"{str(path)!r} is there and is no data set: nothing is written over it")
    if not folder and path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder, expected a file's name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part"))
    except OSError as error:
        raise ValueError(f"{str(path)!r} must be where files can be written: {error.strerror}") from error
    new, old = beside / "new", beside / "old"
    try:
        yield new
        if folder and path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write_json(path: Path, joined: Joined, array: bool) -> None:
    with open(path, "w", encoding="utf-8") as f:
        f.write("[\n" if array else "")
        for i, values in enumerate(joined.rows()):
            f.write((",\n" if array and i else "") + json_text(values) + ("" if array else "\n"))
        f.write("\n]\n" if array else "")


def json_text(values: Any) -> str:
    """Strict JSON on one line: null for a number that is not finite."""
    try:
        return json.dumps(values, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(values), ensure_ascii=False, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(path: Path, joined: Joined, delimiter: str) -> None:
    names = _all_names(joined) if joined.table.kind in ("jsonl", "json") else joined.names
    names += (RAW,) if RAW not in names and any(row.problem for row in joined.table.rows()) else ()
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.DictWriter(f, names, restval="", delimiter=delimiter)
        writer.writeheader()
        writer.writerows({k: _cell(v) for k, v in values.items()} for values in joined.rows())


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return json_text(value) if isinstance(value, list | tuple | Mapping) else value


def _all_names(joined: Joined) -> tuple[str, ...]:
    """Of a table whose rows name their own values: every one counts where columns are named once."""
    names = dict.fromkeys(joined.table.columns)
    for row in joined.table.rows():
        names |= {} if row.problem else dict.fromkeys(row.values)
    return tuple(x for x in (*names, *(x for x in joined.new if x not in names)) if x not in joined.drop)

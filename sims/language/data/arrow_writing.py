"""Parquet and folders of `datasets`, written batch by batch; old columns keep their types."""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sims.language.data.arrow import BATCH, ArrowTable
from sims.language.data.joined import RAW, Joined
from sims.language.data.rows import Row, Table

GROUP = 1 << 26  # bytes of a Parquet row group, about


def _tables(joined: Joined, first: Sequence[Mapping[str, Any]]) -> tuple[Any, Iterator[Any]]:
    """(schema, pyarrow.Table one after the other) with the added columns."""
    import pyarrow as pa

    if isinstance(joined.table, ArrowTable):
        old = joined.table.schema
    else:
        old, bad = _inferred(joined.table)
        if bad and RAW not in old.names:
            old = old.append(pa.field(RAW, pa.string()))
    types = _types(joined.new, first, old)
    schema = _schema(old, types, joined.drop)
    if isinstance(joined.table, ArrowTable):
        return schema, (_with(batch, extras, schema, types) for batch, extras in joined.batches())
    return schema, _from_rows(joined, schema)


def _types(names: Sequence[str], values: Sequence[Mapping[str, Any]], old: Any) -> dict[str, Any]:
    """Arrow types of the added columns: what was there, or one of a list that was there; else what the values need."""
    import pyarrow as pa

    types = {}
    for name in names:
        some = [x[name] for x in values]
        was = [old.field(name).type] if name in old.names else []
        was = [x.value_type for x in was if pa.types.is_list(x)] + was
        types[name] = next((x for x in was if _holds(x, some)), None) or _type(name, some)
    return types


def _holds(kind: Any, values: Sequence[Any]) -> bool:
    import pyarrow as pa

    try:
        return pa.array(values, kind).null_count < len(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return False


def _type(name: str, values: Sequence[Any]) -> Any:
    """A list where any value is one, text where any is; else float64."""
    import pyarrow as pa

    lists = any(isinstance(x, list | tuple) for x in values)
    flat = [y for x in values for y in (x if isinstance(x, list | tuple) else [x]) if y is not None]
    if not all(isinstance(y, str | int | float) for y in flat):
        return pa.infer_type(values)
    text = any(isinstance(y, str) for y in flat) or (not flat and name in ("reason", "note", RAW))
    inner = pa.string() if text else pa.float64()
    return pa.list_(inner) if lists else inner


def _schema(old: Any, types: Mapping[str, Any], drop: Collection[str]) -> Any:
    import pyarrow as pa

    fields = [pa.field(x.name, types[x.name]) if x.name in types else x for x in old if x.name not in drop]
    there = {x.name for x in fields}
    fields += [pa.field(name, x) for name, x in types.items() if name not in there and name not in drop]
    return pa.schema(fields, metadata=old.metadata)


def _with(batch: Any, extras: Sequence[Mapping[str, Any]], schema: Any, types: Mapping[str, Any]) -> Any:
    import pyarrow as pa

    columns = []
    for x in schema:
        columns.append(_array([e[x.name] for e in extras], x) if x.name in types else batch.column(x.name))
    return pa.Table.from_arrays(columns, schema=schema)


def _array(values: Sequence[Any], column: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_list(column.type):
        # One value where others are lists: what could not be found of a row.
        values = [x if isinstance(x, list | tuple) or x is None else [x] for x in values]
    try:
        return pa.array(values, column.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(
            f"column {column.name!r} is of type {column.type} in its first rows and holds something else later: "
            f"write JSON Lines instead ({error})"
        ) from None


def _pieces(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rows = iter(rows)
    while piece := list(islice(rows, BATCH)):
        yield piece


def _inferred(table: Table) -> tuple[Any, bool]:
    """The schema that holds all rows of a table of texts, and whether some row could not be read."""
    import pyarrow as pa

    schema, bad = pa.schema([]), False
    for piece in _pieces(table.rows()):
        bad = bad or any(row.problem for row in piece)
        try:
            seen = _typed([row for row in piece if not row.problem])
            schema = pa.unify_schemas([schema, seen], promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(
                f"rows {piece[0].index} to {piece[-1].index} have no common type of column, which Parquet needs: "
                f"write JSON Lines instead ({error})"
            ) from None
    return schema, bad


def _typed(rows: Sequence[Row]) -> Any:
    import pyarrow as pa

    names = dict.fromkeys(name for row in rows for name in row.values)
    return pa.Table.from_pydict({name: [row.values.get(name) for row in rows] for name in names}).schema


def _from_rows(joined: Joined, schema: Any) -> Iterator[Any]:
    import pyarrow as pa

    for piece in _pieces(joined.rows()):
        yield pa.Table.from_arrays([_array([v.get(x.name) for v in piece], x) for x in schema], schema=schema)


def write_parquet(path: Path, joined: Joined, first: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, tables = _tables(joined, first)
    with pq.ParquetWriter(path, schema) as writer:
        group: list[Any] = []
        for table in tables:
            group.append(table)
            if sum(x.nbytes for x in group) >= GROUP:
                writer.write_table(pa.concat_tables(group))
                group = []
        writer.write_table(pa.concat_tables(group) if group else schema.empty_table())


def write_folder(path: Path, joined: Joined, first: Sequence[Mapping[str, Any]]) -> None:
    import datasets
    import pyarrow as pa
    from datasets.table import InMemoryTable

    schema, tables = _tables(joined, first)
    stream = path.with_name("stream.arrow")
    with pa.OSFile(str(stream), "wb") as f, pa.ipc.new_stream(f, schema) as writer:
        for table in tables:
            writer.write_table(table)
    with open(stream, "rb") as f:
        content = hashlib.file_digest(f, "sha256").hexdigest()[:16]
    # An empty data set of this schema gives all but the rows. Its fingerprint depends on the rows alone: the same rows
    # give the same folder, byte for byte.
    features = datasets.Features.from_arrow_schema(schema)
    info = datasets.DatasetInfo(features=features)
    empty = datasets.Dataset(InMemoryTable(schema.empty_table()), info=info, fingerprint=content)
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        empty.save_to_disk(str(path), num_shards=1)
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    (data,) = path.glob("*.arrow")
    stream.replace(data)

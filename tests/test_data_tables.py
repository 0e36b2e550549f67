"""Preference data in and out of files: every format, what cannot be read, memory that does not grow with the rows."""

import csv
import hashlib
import json
import math
import tracemalloc
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")
import pyarrow.parquet as pq  # noqa: E402

from sims.language.data import arrow, arrow_writing, text, writing  # noqa: E402
from sims.language.data.table import open_table  # noqa: E402
from sims.language.data.writing import write_table  # noqa: E402

MESSAGES = [{"role": "user", "content": 'say "a", é\r\nand b'}]
ROWS = [
    {"prompt": MESSAGES, "chosen": f"good {i}", "rejected": ["x", f"y,{i}"], "id": i, "share": i / 8} for i in range(7)
]
FORMATS = ("jsonl", "json", "csv", "tsv", "parquet", "folder")


def written(folder, kind, rows=ROWS):
    """The rows in a file made without the code under test."""
    path = folder / ("data" if kind == "folder" else f"data.{kind}")
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    elif kind == "folder":
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(path)
    else:
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, list(rows[0]), delimiter="," if kind == "csv" else "\t")
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    return path


def cells(row):
    """A row as CSV holds it."""
    return {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list) else str(v) for k, v in row.items()}


def expected(rows, kind):
    return [cells(row) for row in rows] if kind in ("csv", "tsv") else rows


def parsed(values):
    """A CSV row with its JSON re-written, so that spaces and escapes in it do not matter."""
    return {
        k: json.dumps(json.loads(v), ensure_ascii=False) if isinstance(v, str) and v[:1] == "[" else v
        for k, v in values.items()
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read(tmp_path, kind):
    path = written(tmp_path, kind)
    table = open_table(path)
    assert table.kind == {"tsv": "csv"}.get(kind, kind)
    assert table.columns == tuple(ROWS[0])
    rows = list(table.rows())
    assert [parsed(row.values) for row in rows] == expected(ROWS, kind)
    assert [row.index for row in rows] == list(range(7))
    assert not any(row.problem for row in rows)
    for start, stop in ((0, 3), (2, 5), (3, None), (6, 99), (7, None)):
        assert list(table.rows(start, stop)) == rows[start:stop], "any part, in any order"
    files = sorted(path.glob("*.arrow")) if kind == "folder" else [path]
    assert table.sha256 == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("out", FORMATS)
def test_columns_are_added_in_every_format(tmp_path, kind, out):
    table = open_table(written(tmp_path, kind))
    scores = [0.5, math.nan, -1.0, math.inf, 2.0, 3.0, 4.0]
    notes = [["a", "b"]] * 7
    target = write_table(
        tmp_path / ("out" if out == "folder" else f"out.{out}"),
        table,
        ({"ches": s, "reason": "", "notes": n} for s, n in zip(scores, notes, strict=True)),
        kind="folder" if out == "folder" else None,
    )
    back = open_table(target)
    assert back.columns == (*ROWS[0], "ches", "reason", "notes")
    rows = [row.values for row in back.rows()]
    text_cells = kind in ("csv", "tsv") or out in ("csv", "tsv")
    assert [parsed({k: row[k] for k in ROWS[0]}) for row in rows] == expected(ROWS, "csv" if text_cells else "jsonl")
    no_number = {"csv": "", "tsv": "", "json": None, "jsonl": None}
    for row, score in zip(rows, scores, strict=True):
        if math.isfinite(score):
            assert float(row["ches"]) == score
        elif out in no_number:
            assert row["ches"] == no_number[out]
        else:
            assert str(row["ches"]) == str(score)
    assert json.loads(rows[0]["notes"]) == ["a", "b"] if out in ("csv", "tsv") else rows[0]["notes"] == ["a", "b"]
    assert sorted(x.name for x in tmp_path.iterdir()) == sorted([Path(table.path).name, target.name]), "nothing else"


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_old_columns_keep_their_types(tmp_path, kind):
    types = pa.schema(
        [
            ("small", pa.int8()),
            ("label", pa.list_(pa.float32())),
            ("prompt", pa.large_string()),
            ("turns", pa.list_(pa.struct([("role", pa.string()), ("tool", pa.string())]))),
        ]
    )
    rows = [{"small": i, "label": [0.1, None], "prompt": "q", "turns": [{"role": "user"}]} for i in range(5)]
    source = tmp_path / "in"
    if kind == "parquet":
        source = tmp_path / "in.parquet"
        pq.write_table(pa.Table.from_pylist(rows, types), source)
    else:
        datasets.disable_progress_bars()
        features = datasets.Features.from_arrow_schema(types)
        features["small"] = datasets.ClassLabel(names=list("abcde"))
        datasets.Dataset.from_list(rows, features=features).save_to_disk(source)
    target = tmp_path / f"out{source.suffix}"
    write_table(target, open_table(source), ({"ches": 1} for _ in rows))
    old, new = open_table(source), open_table(target)
    assert [f for f in new.schema if f.name != "ches"] == list(old.schema)
    assert new.schema.field("ches").type == pa.float64()
    if kind == "folder":
        data = datasets.load_from_disk(str(target))
        assert data.features["small"].names == list("abcde")
        assert data["ches"][:] == [1.0] * 5
        first = {f.name: f.read_bytes() for f in target.iterdir()}
        write_table(target, open_table(source), ({"ches": 1} for _ in rows))
        assert first == {f.name: f.read_bytes() for f in target.iterdir()}, "the same rows, the same bytes"
        write_table(target, open_table(source), ({"ches": 2} for _ in rows))
        changed = datasets.load_from_disk(str(target))
        assert changed["ches"][:] == [2.0] * 5
        assert changed._fingerprint != data._fingerprint, "or caches would serve the old rows"


# ---- what cannot be read


BAD_LINES = (
    b'\xef\xbb\xbf{"prompt": "a", "n": 1}\r\n\r\n{"prompt": \n[1, 2]\n"x"\nnull\n{"prompt": "\xff\xfe"}\n'
    b'{"prompt": "\\ud800"}\n{"prompt": "\\ud83d\\ude00", "n": 2}'
)


def test_lines_that_cannot_be_read_are_named_and_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD_LINES)
    rows = list(open_table(path).rows())
    assert [row.where for row in rows] == [f"line {n}" for n in (1, 3, 4, 5, 6, 7, 8, 9)]
    assert (rows[0].values, rows[-1].values) == ({"prompt": "a", "n": 1}, {"prompt": "😀", "n": 2})
    words = ("not JSON", "an array", "a string", "null", "0xff at position 13 is not UTF-8", "surrogate")
    for row, word in zip(rows[1:-1], words, strict=True):
        assert word in row.problem
    assert rows[1].values == {"raw": '{"prompt": '}
    assert rows[5].values == {"raw": '{"prompt": "\\xff\\xfe"}'}


def test_damage_in_an_array_costs_one_element(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(
        b'\xef\xbb\xbf[\n {"a": 1, "b": "x"},\n 5,\n {"a": 2 "b": [{"role": "u", "content": "c"}]},\n'
        b' {"a": 3, "b": "\xff"}, {"a": 4, "b": "y"} {"a": 5, "b": "]},{"},\n {"a": 6, "b": "cut'
    )
    rows = list(open_table(path).rows())
    assert [row.values.get("a") for row in rows] == [1, None, None, None, 4, 5, None]
    assert [row.where for row in rows] == [f"line {n}" for n in (2, 3, 4, 5, 5, 5, 6)]
    for row, word in zip(
        rows, ("", "a number", "delimiter at line 4", "not UTF-8", "", "", "Unterminated"), strict=True
    ):
        assert word in row.problem
        assert bool(word) == bool(row.problem)
    assert rows[2].values["raw"] == '{"a": 2 "b": [{"role": "u", "content": "c"}]}'


def test_an_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch):
    rows = [{"a": '\\"]},{é' * (i % 5), "b": [i, {"c": -1.5e3, "d": None}], "e": i % 2 == 0} for i in range(60)]
    path = tmp_path / "a.json"
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=bool(indent)))
        for size in (1, 2, 7, 64, 4096):
            monkeypatch.setattr(text, "CHUNK", size)
            found = list(open_table(path).rows())
            assert [row.values for row in found] == rows
            assert not any(row.problem for row in found)
    monkeypatch.setattr(text, "CHUNK", 1)
    path.write_text('[12345, {"a": 1}]')
    assert [row.values for row in open_table(path).rows()] == [{"raw": "12345"}, {"a": 1}], "no number is cut"


@pytest.mark.parametrize(
    ("end", "problem"), [("", "ends before"), (", ", "ends before"), ("] x", "text after"), ("] {}", "text after")]
)
def test_the_end_of_an_array_is_checked(tmp_path, end, problem):
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}' + end)
    first, last = open_table(path).rows()
    assert (first.values, first.problem) == ({"a": 1}, "")
    assert problem in last.problem


def test_csv_rows_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt,n\r\n"two\r\nlines",1\r\n\r\n1,2,3\r\n\xff,2\r\n"a"b,4\r\n5,6\r\n7,"never\r\n8,9\r\n'
    )
    table = open_table(path)
    assert table.columns == ("prompt", "n")
    rows = list(table.rows())
    assert [row.where for row in rows] == [f"line {n}" for n in (2, 5, 6, 7, 8, 9)]
    for row, word in zip(
        rows, ("", "3 cells, expected 2", "not UTF-8", "expected after", "", "never closed"), strict=True
    ):
        assert word in row.problem
        assert bool(word) == bool(row.problem)
    assert rows[0].values == {"prompt": "two\r\nlines", "n": "1"}
    assert rows[-1].values["raw"] == '7,"never\r\n8,9'


@pytest.mark.parametrize("out", ["jsonl", "json", "csv", "parquet"])
def test_rows_that_cannot_be_read_stay_in_their_place(tmp_path, out):
    path = tmp_path / "a.jsonl"
    path.write_bytes(BAD_LINES)
    table = open_table(path)
    target = write_table(tmp_path / f"o.{out}", table, ({"reason": row.problem} for row in table.rows()))
    back = [row.values for row in open_table(target).rows()]
    assert len(back) == 8
    assert [bool(row["reason"]) for row in back] == [False] + [True] * 6 + [False]
    assert [row.get("raw") or None for row in back] == [row.values.get("raw") for row in table.rows()]


def test_marks_in_the_file_lead_to_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "MARK", 4)
    for name, lines in {
        "a.jsonl": [b"\xef\xbb\xbf", *(b'{"n": "%d"}\n\n' % i if i % 3 else b'{"n": "%d"}\r\n' % i for i in range(50))],
        "a.csv": [b'\xef\xbb\xbf"n"\n', *(b'"%d\n"\n\n' % i if i % 3 else b"%d\n" % i for i in range(50))],
    }.items():
        (tmp_path / name).write_bytes(b"".join(lines))
        fresh = list(open_table(tmp_path / name).rows())
        assert [row.values["n"].strip() for row in fresh] == [str(i) for i in range(50)]
        table = open_table(tmp_path / name)
        list(table.rows(0, 30))
        assert list(table.rows(21, 45)) == fresh[21:45]
        assert list(table.rows(3, 4)) == fresh[3:4]


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.json", b" [ ] ", "holds no rows"),
        ("a.json", b"7", "must hold an array"),
        ("a.json", b"[{'a': 1}]", "line 1: not JSON"),
        ("a.csv", b"a,b\n", "holds no rows"),
        ("a.csv", b"a,a\n1,2\n", "each column once"),
        ("a.csv", b"\xff,b\n1,2\n", "column names in UTF-8"),
        ("a.jsonl", '{"a": 1}'.encode("utf-16"), "must be UTF-8"),
        ("a.parquet", b"PAR1 no", "no Parquet file"),
        ("a.xlsx", b"PK", "must end in one of .jsonl"),
    ],
)
def test_files_that_hold_no_table_are_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        open_table(tmp_path / name)
    assert name in str(error.value)


def test_folders_and_names(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="not one that `datasets` saved"):
        open_table(tmp_path)
    for name in ("nowhere.jsonl", "nowhere", str(tmp_path / "no")):
        with pytest.raises(ValueError, match="no such file"):
            open_table(name)
    datasets.disable_progress_bars()
    parts = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS[:2]), test=datasets.Dataset.from_list(ROWS[2:]))
    parts.save_to_disk(tmp_path / "parts")
    assert len(list(open_table(tmp_path / "parts", split="test").rows())) == 5
    for split in (None, "tset"):
        with pytest.raises(ValueError, match="one of test, train"):
            open_table(tmp_path / "parts", split=split)
    asked = []

    def load(name, **more):
        asked.append((name, more))
        if name == "some/gone":
            raise ConnectionError("no network")
        return datasets.load_from_disk(str(tmp_path / "parts" / more["split"]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    table = open_table("some/pairs")
    assert (table.kind, [row.values for row in table.rows()]) == ("hub", ROWS[:2])
    assert "trust_remote_code" not in asked[0][1]
    with pytest.raises(ValueError, match=r"'some/gone' is no file or folder here.*no network"):
        open_table("some/gone")


def test_what_cannot_be_written_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BATCH", 3)  # rows that tell the types
    table = open_table(written(tmp_path, "jsonl"))
    before = sorted(x.name for x in tmp_path.iterdir())
    target = tmp_path / "o.jsonl"
    for added, more, words in [
        ([{"x": 1}] * 6, {}, "they end before line 7"),
        ([{"x": 1}] * 8, {}, "more than the table has rows"),
        ([{"x": 1}] * 3 + [{"y": 1}] * 4, {}, "line 4 has y"),
        ([{"id": 1}] * 7, {}, "column 'id' already"),
        ({"x": [1] * 7, "y": [2] * 6}, {}, "shorter"),
        ([{"x": 1}] * 7, {"kind": "xml"}, "must end in one of"),
    ]:
        with pytest.raises(ValueError, match=words):
            write_table(target, table, added, **more)
    with pytest.raises(ValueError, match="is a folder, expected a file"):
        write_table(tmp_path, table, [{"x": 1}] * 7, kind="jsonl")
    with pytest.raises(ValueError, match="nothing is written over it"):
        write_table(tmp_path, table, [{"x": 1}] * 7, kind="folder")
    with pytest.raises(ValueError, match=r"'x' is of type double .* JSON Lines"):
        write_table(tmp_path / "o.parquet", table, [{"x": 1}] * 3 + [{"x": "one"}] * 4)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"a": 1}\n{"a": "x"}\n')
    with pytest.raises(ValueError, match="no common type"):
        write_table(tmp_path / "o.parquet", open_table(mixed), [{}] * 2)
    mixed.unlink()
    assert sorted(x.name for x in tmp_path.iterdir()) == before


def test_columns_are_replaced_dropped_and_rows_left_out(tmp_path):
    for kind in FORMATS:
        folder = tmp_path / kind
        folder.mkdir()
        table = open_table(written(folder, kind))
        target = folder / ("out" if kind == "folder" else f"out.{kind}")
        added = [None if i < 3 else {"rejected": f"y,{i}", "new": 1} for i in range(7)]
        write_table(target, table, added, overwrite=("rejected",), drop=("share",))
        back = open_table(target)
        assert back.columns == ("prompt", "chosen", "rejected", "id", "new")
        assert [row.values["rejected"] for row in back.rows()] == [f"y,{i}" for i in range(3, 7)]
        assert [str(row.values["id"]) for row in back.rows()] == ["3", "4", "5", "6"]


# ---- memory


def peak(folder, kind, count, hold=False):
    """Most memory of Python and of Arrow while a table is read and written, bytes."""
    rows = ({"chosen": f"good {i}" * 9} for i in range(count))
    source = folder / f"{count}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), source, row_group_size=2500)
    else:
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        table = open_table(source)
        held = list(table.rows()) if hold else []
        write_table(folder / f"out.{kind}", table, ({"ches": 1.0} for _ in range(count)))
        assert len(held) in (0, count)
        return tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(arrow_writing, "GROUP", 1 << 18)
    monkeypatch.setattr(arrow_writing, "BATCH", 256)
    monkeypatch.setattr(arrow, "BATCH", 256)
    few, many = (peak(tmp_path, kind, count) for count in (10_000, 60_000))
    assert many < 1.25 * few
    held = peak(tmp_path, kind, 5_000, hold=True)
    assert held > 1.5 * few, "and the measure sees rows that are held"


def test_a_folder_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    import datasets

    datasets.Dataset.from_list([{"a": 1}]).save_to_disk(str(tmp_path / "old"))
    new = written(tmp_path, "jsonl")
    replace = writing.os.replace
    monkeypatch.setattr(
        writing.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("no")) if a.name == "new" else replace(a, b)
    )
    with pytest.raises(OSError, match="no"):
        write_table(tmp_path / "old", open_table(new), [{}] * 7, kind="folder")
    monkeypatch.undo()
    assert [row.values for row in open_table(tmp_path / "old").rows()] == [{"a": 1}]
    assert not list(tmp_path.glob(".*.part"))

"""Tables in text files, read as a stream: JSON Lines, a JSON array, CSV."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from sims.language.data.rows import Row, Table

BOM = b"\xef\xbb\xbf"
MARK = 1024  # rows from one remembered place in the file to the next
CHUNK = 1 << 20
SPACE = re.compile(r"[ \t\n\r]*")


class _Lines(Table):
    """A table of lines: where every MARK-th row begins is remembered once it has been read."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        with open(path, "rb") as f:
            begin = f.read(3)
        if begin[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise ValueError(f"{self.path!r} must be UTF-8, it begins with the mark of UTF-16")
        self._marks = [(0, 3 if begin == BOM else 0)]  # of row MARK * i: lines before it, its byte

    def _lines(self, start: int) -> Iterator[tuple[int, int, bytes]]:
        """(number from 1, byte, line) of the lines from the last mark before a row."""
        number, byte = self._marks[min(start // MARK, len(self._marks) - 1)]
        with open(self.path, "rb") as f:
            f.seek(byte)
            for line in f:
                number += 1
                yield number, byte, line
                byte += len(line)

    def _numbered(self, start: int, stop: int | None, records: Iterator[tuple[int, int, Any]]) -> Iterator[Any]:
        """(index, line, record) of the records start, ..., from (line, byte, record) since the last mark."""
        index = MARK * min(start // MARK, len(self._marks) - 1)
        for number, byte, record in records:
            if stop is not None and index >= stop:
                return
            if index == MARK * len(self._marks):
                self._marks.append((number - 1, byte))
            if index >= start:
                yield index, number, record
            index += 1


class JSONLines(_Lines):
    """A JSON object per line; blank lines are no rows."""

    kind = "jsonl"

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        lines = (record for record in self._lines(start) if record[2].strip())
        for index, number, line in self._numbered(start, stop, lines):
            values, problem = _object(line)
            yield Row(index, f"line {number}", values, problem)


def _object(line: bytes) -> tuple[dict[str, Any], str]:
    """What a line says, or its text and why it says nothing."""
    try:
        text = line.decode()
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {_name(values)}")
        _check_unicode(text, values)
    except UnicodeDecodeError as error:
        return _raw(line), f"byte {line[error.start]:#04x} at position {error.start + 1} is not UTF-8"
    except json.JSONDecodeError as error:
        return _raw(line), f"not JSON: {error.msg} at position {error.pos + 1}"
    except (ValueError, RecursionError) as error:
        return _raw(line), str(error)
    return values, ""


def _raw(line: bytes) -> dict[str, Any]:
    return {"raw": line.decode(errors="backslashreplace").rstrip("\r\n")}


def _name(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _check_unicode(text: str, values: Any) -> None:
    """Half a surrogate pair is legal JSON but no text: no tokenizer takes it, no file can hold it."""
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"half a surrogate pair, \\u{ord(error.object[error.start]):04x}, is no character"
            ) from None


class JSONArray(Table):
    """An array of JSON objects. After a damaged one it is read on from the next object with about the same names."""

    kind = "json"

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as f:
            for index, (line, values, problem) in enumerate(islice(_Array(f, self.path), stop)):
                if index >= start:
                    yield Row(index, f"line {line}", values, problem)


class _Array:
    """The elements of a JSON array: (line, values, problem)."""

    def __init__(self, file: TextIO, path: str) -> None:
        self.file, self.path = file, path
        self.text, self.at, self.line = "", 0, 1
        self.expected, self.lost = True, False  # an element may begin here; the rest of the file said nothing
        self.names: set[str] = set()  # of the last object
        self.decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any], str]]:
        if self._next() != "[":
            raise ValueError(f"{self.path!r} must hold an array of objects, or one per line, got {self.text[:20]!r}")
        self._move(self.at + 1)
        while mark := self._next():
            if mark == "]":
                self._move(self.at + 1)
                if not self._next():
                    return
                yield self._damaged("text after the end of the array")
            elif self.expected or mark == "{":  # a comma left out loses nothing
                yield self._element()
            elif mark == ",":
                self._move(self.at + 1)
                self.expected = True
            else:
                yield self._damaged(f"expected a comma or the end of the array, got {mark!r}")
        if not self.lost:
            yield self.line, {"raw": ""}, "the file ends before the array does"

    def _element(self) -> tuple[int, dict[str, Any], str]:
        while True:
            try:
                values, end = self.decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._cut(error) and self._read():
                    continue
                return self._damaged(f"not JSON: {error.msg} at line {self._line_of(error.pos)}")
            except RecursionError as error:
                return self._damaged(str(error))
            if end < len(self.text) or not self._read():
                return self._taken(values, end)

    def _cut(self, error: json.JSONDecodeError) -> bool:
        """Whether a fault may be where what has been read ends: in the last letters, or a string that does not end."""
        return error.msg.startswith("Unterminated") or error.pos > len(self.text) - 10

    def _taken(self, values: Any, end: int) -> tuple[int, dict[str, Any], str]:
        line, text = self.line, self.text[self.at : end]
        self._move(end)
        self.expected = False
        if not isinstance(values, dict):
            return line, _plain(text), f"expected a JSON object, got {_name(values)}"
        try:
            text.encode()
            _check_unicode(text, values)
        except UnicodeEncodeError as error:
            return line, _plain(text), f"byte {ord(text[error.start]) & 0xFF:#04x} is not UTF-8"
        except ValueError as error:
            return line, _plain(text), str(error)
        self.names = set(values)
        return line, values, ""

    def _damaged(self, problem: str) -> tuple[int, dict[str, Any], str]:
        """Skip to the next object that shares half of its names with the last one."""
        if not self.names:
            raise ValueError(f"{self.path!r}, line {self.line}: {problem}; nothing before it tells how to read on")
        line, self.text, self.at = self.line, self.text[self.at :], 0  # reading on moves no position now
        end = 0
        while (end := self._brace(end + 1)) >= 0:
            try:
                values, _ = self.decode(self.text, end)
            except json.JSONDecodeError as error:
                end -= self._cut(error) and self._read()  # once more
                continue
            if 2 * len(self.names & set(values)) >= len(self.names):
                break
        self.expected, self.lost = True, end < 0
        end = len(self.text) if self.lost else end
        raw = self.text[:end]
        self._move(end)
        return line, _plain(raw.rstrip().removesuffix(",")), problem

    def _brace(self, start: int) -> int:
        while (end := self.text.find("{", start)) < 0 and self._read():
            pass
        return end

    def _next(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            match = SPACE.match(self.text, self.at)
            self._move(match.end() if match else self.at)
            if self.at < len(self.text) or not self._read():
                return self.text[self.at : self.at + 1]

    def _move(self, end: int) -> None:
        self.line = self._line_of(end)
        self.at = end

    def _line_of(self, end: int) -> int:
        return self.line + self.text.count("\n", self.at, end)

    def _read(self) -> bool:
        """Read on, at least as much again as is waiting; whether there was any."""
        more = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)


def _plain(text: str) -> dict[str, Any]:
    return _raw(text.encode("utf-8", "surrogateescape"))


class CSVTable(_Lines):
    """Cells between commas (tabs in .tsv), the names in the first line; a cell in quotes may hold line ends."""

    kind = "csv"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        csv.field_size_limit(sys.maxsize)
        self._delimiter = "\t" if Path(path).suffix.lower() == ".tsv" else ","
        _, byte, (cells, raw, problem) = next(self._records(0), (0, 0, ([], b"", "")))
        self._names = tuple(cells)
        if problem or not cells or _escaped(raw):
            raise ValueError(f"{self.path!r} must begin with a line of column names in UTF-8, got {raw[:80]!r}")
        if len(set(cells)) < len(cells):
            raise ValueError(f"{self.path!r} must name each column once, got {', '.join(cells)}")
        self._marks = [(raw.count(b"\n"), byte + len(raw))]

    @property
    def columns(self) -> tuple[str, ...]:
        return self._names

    def rows(self, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        for index, number, (cells, raw, problem) in self._numbered(start, stop, self._records(start)):
            if not problem and _escaped(raw):
                problem = "it holds bytes that are not UTF-8"
            elif not problem and len(cells) != len(self._names):
                problem = f"{len(cells)} cells, expected {len(self._names)}"
            values = _raw(raw) if problem else dict(zip(self._names, cells, strict=True))
            yield Row(index, f"line {number}", values, problem)

    def _records(self, start: int) -> Iterator[tuple[int, int, tuple[list[str], bytes, str]]]:
        """(line, byte, (cells, raw, problem)) from the last mark before a row."""
        taken: list[tuple[int, int, bytes]] = []

        def lines() -> Iterator[str]:
            for line in self._lines(start):
                taken.append(line)
                yield line[2].decode(errors="surrogateescape")

        reader = csv.reader(lines(), delimiter=self._delimiter, strict=True)
        while True:
            taken.clear()
            try:
                cells, problem = next(reader), ""
            except StopIteration:
                return
            except csv.Error as error:
                cells, problem = [], str(error).replace("unexpected end of data", "a quote is never closed")
            if cells or problem:
                number, byte, _ = taken[0]
                yield number, byte, (cells, b"".join(line for _, _, line in taken), problem)


def _escaped(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return True
    return False

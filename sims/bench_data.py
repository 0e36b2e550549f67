"""A data set of any size through the reader and the writer: time, and the memory of a process that does only that."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from sims.bench import Row
from theory._check import check_count

KINDS = ("jsonl", "csv", "parquet")
WORDS = 40  # per response

# A process of its own, so that its peak is that of reading and writing alone.
_PASS = """
import resource, sys, time
from sims.language.data.table import open_table
from sims.language.data.writing import write_table
source, target, name = sys.argv[1:]
start, table, rows = time.perf_counter(), open_table(source), 0
def added():
    global rows
    for row in table.rows():
        rows += 1
        yield {name: float(row.index)}
write_table(target, table, added())
seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(rows, seconds, peak * (1 if sys.platform == "darwin" else 1024))
"""


def data_rows(rows: int = 1_000_000, kinds: Sequence[str] = KINDS, progress: bool = True) -> list[Row]:
    """Seconds to read `rows` rows, add a column and write them, and the process's peak memory against 1 GiB.

    Raises ValueError for a number of rows below 1.
    """
    check_count(rows, "rows")
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "rows.jsonl"
        _write(source, rows)
        section = (
            f"{rows} rows of {source.stat().st_size / 2**20:.0f} MiB as JSONL, read and written with a column added"
        )
        for kind in tqdm(kinds, disable=not progress, desc="data"):
            target = folder / f"out.{kind}"
            # The first pass makes the file in this format from JSON lines, the second is the one measured.
            _pass(source, folder / f"in.{kind}", "first")
            count, seconds, peak = _pass(folder / f"in.{kind}", target, "second")
            if count != rows:
                raise RuntimeError(f"{rows} rows were written as {kind} and {count:.0f} read")
            share = peak / 2**30
            found.append(Row(section, kind, seconds, share, None, f"of 1 GiB at the peak; {rows / seconds:.3g} rows/s"))
            for file in (target, folder / f"in.{kind}"):
                file.unlink()
    return found


def _write(path: Path, rows: int) -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(500)])
    with path.open("w") as f:
        for i in range(rows):
            chosen, rejected = (" ".join(own) for own in words[rng.integers(500, size=(2, WORDS))])
            f.write(json.dumps({"prompt": f"question {i}", "chosen": chosen, "rejected": rejected, "id": i}) + "\n")


def _pass(source: Path, target: Path, name: str) -> tuple[float, float, float]:
    """Rows, seconds, bytes at the peak."""
    run = subprocess.run(
        [sys.executable, "-c", _PASS, str(source), str(target), name], capture_output=True, text=True, check=True
    )
    rows, seconds, peak = map(float, run.stdout.split())
    return rows, seconds, peak

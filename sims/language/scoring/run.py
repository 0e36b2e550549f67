"""Scoring a data set of any size: in shards, by one process or several, resumed after a kill, joined at the end.

Rows are cut into shards by their index. Each finished shard is one file in `<output>.shards/`, beside the manifest of
the run; a shard depends on its rows and the manifest only, so the result is the same whoever scored which shard, when.
"""

import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from sims.files import to_json, write_atomically
from sims.language.model import LanguageModel
from sims.language.pairing import Example, tokenize
from sims.language.scoring import manifest
from sims.language.scoring.cautions import of_data
from sims.language.scoring.processes import Group
from sims.language.scoring.summary import RANKED, Summary, Tally, first_bad, highest, ranking
from sims.language.scoring.words import counted, from_zero, texts_of
from theory import SolverError

MANIFEST = "manifest.json"
SHARDS = f"shard-{8 * '[0-9]'}.json"
LOOKED_AT = 1000  # rows among which one must be usable
LOOK = 0.2  # seconds between looks at what the other processes have done


def score_table(
    scorer: Any,
    model: LanguageModel,
    table: Any,
    layout: Any,
    output: str | Path,
    run: dict[str, Any],
    *,
    shard_rows: int = 1024,
    overwrite: bool = False,
    restart: bool = False,
    group: Group | None = None,
    warnings: tuple[str, ...] = (),
) -> Summary | None:
    """Score every row of a table and write the table with its scores.

    Parameters
    ----------
    scorer : with `score_examples(examples)`, a list per column, "reason" and "note" among them.
    model : whose tokens show what a pair of token ids says.
    table, layout : the rows and how they are read.
    output : a new file or folder; `<output>.manifest.json` and, while at work, `<output>.shards/` are beside it.
    run : what the scores depend on (`manifest.manifest`); unfinished work is taken up only if it is the same.
    shard_rows : rows per shard, at most what a kill costs.
    overwrite : whether columns of the table that have the name of a score are replaced.
    restart : discard what is there.
    group : the processes that share the work.
    warnings : shown with the result.

    Returns the summary, in processes other than the main one None.

    Raises ValueError if the output exists, or unfinished work is of another run; SolverError if memory runs out or
    another process is gone. What was scored by then is kept.
    """
    output, group = Path(output), group or Group()
    folder = Path(f"{output}.shards")
    try:
        group.begin(folder, lambda: _prepare(folder, output, run, restart))
        manifest.check_same(folder / MANIFEST, run)
        shards = _score_missing(scorer, model, table, layout, folder, shard_rows, group)
        if not group.main:
            return None
        _wait(folder, shards, group)
        return _finish(folder, output, run, shards, overwrite, warnings)
    except KeyboardInterrupt:
        if group.main:
            count = len(_done(folder))
            kept = f"{counted(count, 'shard')} {'is' if count == 1 else 'are'} kept in {str(folder)!r}"
            print(f"\n{kept}: repeat the command to go on", file=sys.stderr)
        raise
    finally:
        group.end()


def check_usable(model: LanguageModel, table: Any, layout: Any, max_length: int | None) -> Example:
    """The first example that can be used; a ValueError, before any work, if there is none near the beginning."""
    first = []
    for row in table.rows(0, LOOKED_AT):
        example = _example(layout, row)
        if isinstance(example, Example):
            if _is_conversation(example) and not model.tokenizer.chat_template:
                raise ValueError(
                    "dataset holds conversations, but the model's tokenizer has no chat template: take the model that "
                    "you will train (the instruct model?), or put chat_template.jinja into its folder"
                )
            try:
                tokenize(model, example, max_length)
                return example
            except ValueError as error:
                example = error
        first.append(f"{row.where}: {example}")
    rows = f"none of the first {len(first)} rows" if len(first) > 1 else "the only row"
    no = "can" if len(first) > 1 else "cannot"
    raise ValueError(f"{rows} of dataset {no} be used: {'; '.join(first[:3])}{from_zero(first[0])}")


def _prepare(folder: Path, output: Path, run: dict[str, Any], restart: bool) -> None:
    """A folder that holds the manifest of this run, and shards of this run only."""
    if (folder / MANIFEST).is_file() and _done(folder) and not restart:
        return  # whether it is this run's, each process sees for itself; without a shard there is nothing to keep
    if output.exists() and not restart:
        _remove(folder)
        raise ValueError(f"{str(output)!r} exists: give another --output, or replace it with --restart")
    (folder / MANIFEST).unlink(missing_ok=True)  # first: without it the rest counts as nothing
    for file in _done(folder).values():
        file.unlink()
    manifest.write(folder / MANIFEST, run)


def _score_missing(
    scorer: Any, model: LanguageModel, table: Any, layout: Any, folder: Path, size: int, group: Group
) -> int:
    """Every n-th shard that is not there yet is scored; how many shards there are."""
    total = len(table) if hasattr(table, "__len__") else sum(1 for _ in table.rows())

    def scored() -> int:
        return min(len(_done(folder)) * size, total)  # by all processes

    silent = None if group.main else True
    with tqdm(total=total, initial=scored(), unit=" rows", desc="score", disable=silent) as bar:
        for i, rows in enumerate(_parts(table.rows(), size)):
            file = _file(folder, i)
            if i % group.size != group.rank or file.is_file():
                continue
            try:
                shard = _scored(scorer, model, layout, rows)
            except (RuntimeError, MemoryError) as error:
                if not _is_memory(error):
                    raise
                where = f"{rows[0].where} to {rows[-1].where}"
                raise SolverError(
                    f"memory ran out in {where}: repeat the command with a smaller --batch_tokens or --max_length "
                    f"and --restart ({str(error).splitlines()[0]})"
                ) from error
            write_atomically(file, json.dumps(shard, separators=(",", ":")))  # NaN stays NaN, a file of our own
            bar.update(scored() - bar.n)
    return -(-total // size)


def _scored(scorer: Any, model: LanguageModel, layout: Any, rows: list[Any]) -> dict[str, Any]:
    """What is stored of a shard: the columns, and of its rows what the summary shows."""
    examples = [_example(layout, row) for row in rows]
    columns = {name: list(column) for name, column in scorer.score_examples(examples).items()}
    return {
        "columns": columns,
        "bad": first_bad([row.where for row in rows], columns["reason"]),
        "highest": _highest(columns, rows, examples, model),
    }


def _highest(columns: dict[str, list[Any]], rows: list[Any], examples: list[Any], model: LanguageModel) -> list[Any]:
    name = ranking(columns)
    if not name:
        return []
    found = []
    for i, value in enumerate(columns[name]):
        for k, score in enumerate(value if isinstance(value, list) else [value]):
            if score is not None and score == score:  # not NaN
                found.append({"row": i, "rejected": k, "score": score, "fall": RANKED[name] * score})
    found = highest(found)
    for pair in found:
        i, k = pair.pop("row"), pair.pop("rejected")
        chosen, rejected = texts_of(examples[i], model.text)[k]
        which = f", rejected {k + 1}" if examples[i].several else ""
        pair |= {"where": rows[i].where + which, "chosen": chosen, "rejected": rejected}
    return found


def _wait(folder: Path, count: int, group: Group) -> None:
    """Until the other processes have scored their shards."""
    while True:
        gone = group.others_gone(folder)  # before looking at what is there: the last shard comes before the end
        missing = set(range(count)) - set(_done(folder))
        if not missing:
            return
        lost = sorted({i % group.size for i in missing} & set(gone))
        if lost:
            raise SolverError(
                f"process {', '.join(map(str, lost))} of {group.size} ended before its rows were scored; what was "
                f"scored is kept: repeat the command to go on"
            )
        time.sleep(LOOK)


def _finish(
    folder: Path, output: Path, run: dict[str, Any], count: int, overwrite: bool, warnings: tuple[str, ...]
) -> Summary:
    """Join the shards: the output, its manifest, and the shards are removed."""
    from sims.language.data.table import open_table
    from sims.language.data.writing import write_table

    data = run["data"]
    again = open_table(data["path"], split=data["split"])
    if again.sha256 != data["sha256"]:
        raise ValueError(f"dataset {data['path']!r} changed while it was scored: start anew with --restart")
    tally = Tally()
    for i in range(count):
        tally.add(_stored(folder, i))
    names = _stored(folder, 0)["columns"] if overwrite else ()
    columns = tqdm(_joined(folder, count, tally.several), total=tally.rows, unit=" rows", desc="write", disable=None)
    write_table(output, again, columns, overwrite=tuple(names))
    summary = tally.summary(str(output), data["path"], run["model"]["name_or_path"], (*warnings, *of_data(tally)))
    write_atomically(Path(f"{output}.manifest.json"), to_json({"run": run, "summary": summary.to_dict()}))
    _remove(folder)
    return summary


def _joined(folder: Path, count: int, several: bool) -> Iterator[dict[str, Any]]:
    """The scores of each row; lists in all rows if in any."""
    for i in range(count):
        columns = _stored(folder, i)["columns"]
        for values in zip(*columns.values(), strict=True):
            if several:
                values = [x if isinstance(x, list) else [x] for x in values]
            yield dict(zip(columns, values, strict=True))


def _stored(folder: Path, i: int) -> dict[str, Any]:
    file = _file(folder, i)
    try:
        found = json.loads(file.read_bytes())
        columns = found["columns"]
        if not {"reason", "note"} <= set(columns) or len(set(map(len, columns.values()))) != 1:
            raise ValueError("it is no shard")
        if not isinstance(found["bad"], list) or not isinstance(found["highest"], list):
            raise ValueError("it is no shard")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} is damaged ({error}): delete it and repeat the command") from error
    return found


def _file(folder: Path, i: int) -> Path:
    return folder / f"shard-{i:08d}.json"


def _done(folder: Path) -> dict[int, Path]:
    """The finished shards."""
    return {int(file.stem.removeprefix("shard-")): file for file in folder.glob(SHARDS)}


def _remove(folder: Path) -> None:
    """The manifest first: what is left without it counts as nothing. Files that are not ours stay."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for pattern in (SHARDS, "*.part", "process-*.lock"):
        for file in folder.glob(pattern):
            file.unlink()
    if not any(folder.iterdir()):
        folder.rmdir()


def _parts(rows: Any, size: int) -> Iterator[list[Any]]:
    rows = iter(rows)
    while part := list(itertools.islice(rows, size)):
        yield part


def _example(layout: Any, row: Any) -> Example | ValueError:
    if row.problem:
        return ValueError(row.problem)
    try:
        return layout.example(row.values)
    except ValueError as error:
        return error


def _is_conversation(example: Example) -> bool:
    said = example.chosen
    return not isinstance(said, str) and bool(said) and isinstance(said[0], dict)


def _is_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)

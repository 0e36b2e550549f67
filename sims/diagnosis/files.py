"""Reading the log files of the common trainers, finished or half-written; nothing is ever unpickled."""

import ast
import csv
import io
import json
import warnings
from pathlib import Path
from typing import Any

from sims.diagnosis.logs import METRICS, Log

STATE = "trainer_state.json"
LINES = ("logging.jsonl", "trainer_log.jsonl", "train_metrics.jsonl")  # in a folder, after trainer_state.json
SHOWN = 8  # candidates named
ARGUMENTS = ("training_args.json", "args.json")  # ms-swift writes args.json; training_args.bin is a pickle: never read
SETTINGS = {  # what a settings file calls what is needed here
    "beta": ("beta", "pref_beta", "rl_beta"),
    "loss": ("loss_type", "pref_loss"),
    "ld_alpha": ("ld_alpha",),
    "loss_weights": ("loss_weights",),
    "sft": ("pref_ftx", "rpo_alpha", "nll_loss_coef"),
}


def read_log(path: str | Path) -> Log:
    """The log of a training run.

    path : a trainer_state.json of transformers (TRL, LLaMA-Factory, axolotl); a checkpoint or output folder, of which
        the newest state is taken; JSON lines or CSV with a column per metric; or captured standard output, with the
        dictionaries that transformers prints. A last line that is cut off, as in a running training, is left out.

    Raises ValueError where nothing is, or for a file without usable numbers, with what was found instead; OSError if
    it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"no such file or folder: {str(path)!r}; expected a training log or the folder of a run")
    file = _in_folder(path) if path.is_dir() else path
    text = _text(file)
    if not text.strip():
        raise ValueError(f"{file} is empty: the training has logged nothing yet")
    more: dict[str, Any] = {"path": str(file), "settings": _settings(file)}
    try:
        entries, kind, notes = _entries(file, text)
        return Log.of(entries, kind, notes=tuple(notes), **more)
    except ValueError as error:
        beside = file.with_name(STATE)
        if file.name == "trainer_log.jsonl" and beside.exists():
            # LLaMA-Factory's own log holds loss and accuracy alone; the rewards are in the state of transformers.
            log = read_log(beside)
            return Log(log.points, log.kind, (*log.notes, f"{file.name} has no rewards: {STATE} beside it was read"),
                       log.axis, log.path, log.settings)  # fmt: skip
        hint = f"; LLaMA-Factory keeps the rewards in {STATE}" if file.name == "trainer_log.jsonl" else ""
        raise ValueError(f"{file}: {error}{hint}") from None


def _in_folder(folder: Path) -> Path:
    """The newest state in an output or checkpoint folder."""
    steps = [(int(p.name[11:]), p) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()]
    states = [folder / STATE, *(p / STATE for _, p in sorted(steps, reverse=True))]
    found = [p for p in states if p.is_file()][:2]  # the folder's own, of the end of a run, and the last checkpoint's
    if found:
        return max(found, key=_global_step)
    for name in LINES:
        if (folder / name).is_file():
            return folder / name
    others = _others(folder)
    hint = f"; give one of {', '.join(others[:SHOWN])}{', ...' if len(others) > SHOWN else ''}" if others else ""
    raise ValueError(f"no {STATE} in {folder} or its checkpoints, and none of {', '.join(LINES)}{hint}")


def _others(folder: Path) -> list[str]:
    """What may have been meant: the runs one or two folders below, else files that look like logs."""
    runs = {p.parent for name in (STATE, *LINES) for depth in ("*", "*/*") for p in folder.glob(f"{depth}/{name}")}
    runs = {p.parent if p.name.startswith("checkpoint-") else p for p in runs}
    files = {p for suffix in ("log", "csv", "jsonl") for p in folder.glob(f"*.{suffix}")}
    return sorted(str(p) for p in runs or files)


def _global_step(state: Path) -> float:
    try:
        return float(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0.0


def _text(file: Path) -> str:
    data = file.read_bytes()
    if data[:2] == b"\x80\x04" or data[:2] == b"PK" or b"\x00" in data[:4096]:
        raise ValueError(
            f"{file} is binary (a pickle, a checkpoint, an event file?): expected JSON, JSON lines, CSV or text"
        )
    return data.decode("utf-8-sig", errors="replace")


def _entries(file: Path, text: str) -> tuple[list[dict[str, Any]], str, list[str]]:
    """(entries, kind, notes) of a file's text, by what it looks like."""
    try:
        return _whole(json.loads(text))
    except RecursionError:
        raise ValueError("nested too deeply for a training log") from None
    except json.JSONDecodeError as error:
        if file.suffix == ".json" and error.msg != "Extra data":  # that would be JSON lines under another name
            raise ValueError(f"not complete JSON ({error}): copied while it was written?") from None
    if file.suffix == ".csv":
        return _table(text)
    return _lines(text)


def _whole(data: Any) -> tuple[list[dict[str, Any]], str, list[str]]:
    history = data.get("log_history", data) if isinstance(data, dict) else data
    if isinstance(history, dict):
        history = [history]
    if not isinstance(history, list) or not all(isinstance(e, dict) for e in history):
        raise ValueError("expected log_history, a list of entries, as in trainer_state.json")
    if not history:
        raise ValueError("log_history is empty: the training has logged nothing yet")
    known = isinstance(data, dict) and "log_history" in data
    return history, STATE if known else "JSON", []


def _table(text: str) -> tuple[list[dict[str, Any]], str, list[str]]:
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise ValueError(f"not readable as CSV: {error}") from None
    header = list(rows[0]) if rows else []
    runs: dict[str, list[str]] = {}
    for name in header:  # wandb exports a chart as "run - metric", with __MIN and __MAX beside it
        if " - " in str(name) and not str(name).endswith(("__MIN", "__MAX")):
            run, metric = name.rsplit(" - ", 1)
            runs.setdefault(metric, []).append(run)
    for metric, names in runs.items():
        if len(names) > 1:
            raise ValueError(f"{metric} of several runs ({', '.join(names[:4])}): export one run at a time")
    notes = []
    if rows and (None in rows[-1].values() or None in rows[-1]):
        rows, notes = rows[:-1], ["the last line is cut off and was left out"]
    return rows, "CSV", notes


def _lines(text: str) -> tuple[list[dict[str, Any]], str, list[str]]:
    """JSON lines, or the dictionaries printed between other output."""
    found, cut, printed = [], [], False
    lines = [line[line.find("{") :] for line in text.replace("\r", "\n").splitlines() if "{" in line]
    for i, line in enumerate(lines):
        entry = _dictionary(line[: line.rfind("}") + 1])
        if entry is not None:
            found.append(entry)
            printed |= not line.startswith('{"')
        elif any(name in line for name in METRICS):  # other output has braces, too
            cut.append(i)
    if not found:
        raise ValueError("neither JSON, JSON lines, a CSV with a header nor printed dictionaries: not a training log?")
    notes = ["the last line is cut off and was left out"] if cut and cut[-1] == len(lines) - 1 else []
    if len(cut) > len(notes):
        notes.append(f"{len(cut) - len(notes)} lines with metrics could not be read and were left out")
    return found, "printed output" if printed else "JSON lines", notes


def _dictionary(piece: str) -> dict[str, Any] | None:
    """A dictionary as JSON or as Python prints it (where nan and inf are no literals); None if it is not one."""
    try:
        data = json.loads(piece)
        return data if isinstance(data, dict) else None
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in other people's strings
            tree = ast.parse(piece, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(tree, ast.Dict):
        return None
    pairs = zip(tree.keys, tree.values, strict=True)
    return {str(k.value): _constant(v) for k, v in pairs if isinstance(k, ast.Constant)}


def _constant(node: ast.expr) -> Any:
    """A number or text of a syntax tree, without evaluating it; None for anything else."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _constant(node.operand)
        return -value if isinstance(value, int | float) else None
    if isinstance(node, ast.Name) and node.id in ("nan", "inf"):
        return float(node.id)
    return node.value if isinstance(node, ast.Constant) else None


def _settings(file: Path) -> dict[str, Any]:
    """What SETTINGS names, where a JSON file of arguments beside the log has it."""
    out: dict[str, Any] = {}
    for folder in (file.parent, file.parent.parent) if file.parent.name.startswith("checkpoint-") else (file.parent,):
        for name in ARGUMENTS:
            try:
                data = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError):
                continue
            for key, names in SETTINGS.items():
                for n in names:
                    if isinstance(data, dict) and data.get(n) is not None and key not in out:
                        out[key] = data[n]
    return out

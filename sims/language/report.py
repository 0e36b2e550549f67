"""Tables and figures of the language-model experiments, from saved results alone."""

import importlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sims.files import write_atomically
from theory._check import unknown

EXPERIMENTS = ("persona", "mechanism", "percentiles", "unalignment")


@dataclass(frozen=True)
class Saved:
    """One saved result.

    file : where it was. record : what was saved, with what produced it. result : the experiment's own record.
    """

    file: Path
    record: dict[str, Any]
    result: Any

    @property
    def experiment(self) -> str:
        return self.record["experiment"]

    def markdown(self, figures: Iterable[str]) -> str:
        """A section: what produced it, the tables, the figures (paths)."""
        options = ", ".join(f"{k} = {v}" for k, v in self.record["options"].items() if v not in (None, False))
        return "\n".join(
            [
                f"## {self.file.stem}\n",
                f"`displacement lm {self.experiment}`" + (f" with {options}" if options else "") + f"; version "
                f"{self.record['version']}, model {self.record['model']['fingerprint'][:16]}.\n",
                f"```text\n{self.result}\n```\n",
                *(f"![{name}]({name})\n" for name in figures),
            ]
        )


def read(file: str | Path) -> Saved:
    """A saved result; a ValueError names the file if it is none, or a damaged one."""
    file = Path(file)
    try:
        record = json.loads(file.read_bytes())
        name = record["experiment"]
        if name not in EXPERIMENTS:
            raise ValueError(unknown("experiment", str(name), EXPERIMENTS))
        for part in ("version", "options", "result"):
            record[part]
        record["model"]["fingerprint"][:16]
        result = importlib.import_module(f"sims.language.studies.{name}").RESULT.from_dict(record["result"])
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{str(file)!r} is not a result of `displacement lm` or is damaged ({type(error).__name__}: {error})"
        ) from error
    return Saved(file, record, result)


def saved_results(sources: Iterable[str | Path]) -> list[Saved]:
    """Results among the JSON files of folders, those of `displacement lm` that is, by experiment and name.

    Raises ValueError for a folder that is not there or holds none, and for two results of one file name.
    """
    found: list[Saved] = []
    for source in map(Path, sources):
        if not source.is_dir():
            raise ValueError(f"results must be in a folder, there is none at {str(source)!r}")
        here = [read(file) for file in sorted(source.glob("*.json")) if _is_result(file)]
        if not here:
            raise ValueError(f"the folder {str(source)!r} holds no result of `displacement lm`")
        found += here
    found.sort(key=lambda saved: (EXPERIMENTS.index(saved.experiment), saved.file.stem))
    names = [saved.file.stem for saved in found]
    if len(set(names)) < len(names):
        raise ValueError(f"results must have different file names, got {names}")
    return found


def write_report(results: Iterable[Saved], folder: str | Path) -> list[Path]:
    """Write `report.md` with all tables, and the figures of each result in a folder of its name; the files written."""
    folder = Path(folder)
    written, parts = [], ["# A small language model: the paper's experiments\n"]
    for saved in results:
        own = folder / saved.file.stem
        own.mkdir(parents=True, exist_ok=True)
        draw = getattr(importlib.import_module(f"sims.plots.{saved.experiment}"), f"save_{saved.experiment}")
        figures = [Path(path) for path in draw(saved.result, own)]
        parts.append(saved.markdown(path.relative_to(folder).as_posix() for path in figures))
        written += figures
    return [write_atomically(folder / "report.md", "\n".join(parts)), *written]


def _is_result(file: Path) -> bool:
    """Whether a file claims to be a result: other JSON may lie beside it."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return '"experiment"' in text[:200]

"""Names of the rows of a matrix from the files that go with language models."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOKEN_FILES = ("tokenizer.json", "vocab.json", "tokens.json", "tokens.txt", "vocab.txt")
# Language models pad their matrices to a round number of rows beyond the tokenizer's last id.
MAX_PADDING = 1024


class MissingFileError(FileNotFoundError, ValueError):
    """A file that is not there; a ValueError too, so that one `except` covers every bad input."""


def existing_file(path: str | Path, argument: str) -> Path:
    """`path` if a file is there; `argument` is its name for the error."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{argument} must be a file, got the folder {str(path)!r}")
    if not path.exists():
        raise MissingFileError(f"{argument}: there is no file {str(path)!r}")
    return path


def tokens_beside(path: Path) -> Path:
    """The first of `TOKEN_FILES` in the folder of `path`, or a ValueError."""
    for name in TOKEN_FILES:
        if (path.parent / name).is_file():
            return path.parent / name
    raise ValueError(
        f"tokens_path was not given, {path} holds no tokens and none of {', '.join(TOKEN_FILES)} lies beside it: "
        "pass tokens_path= with the names of the rows"
    )


def read_tokens(path: Path, V: int) -> tuple[str, ...]:
    """The V names of the rows of a matrix, in order of rows.

    `path` is a .json file that holds a Hugging Face tokenizer, an object name -> row or a list of names, or a text file
    with one name per line. A list must have V names. A tokenizer or an object may leave up to `MAX_PADDING` rows, and
    at most a twentieth of them, unnamed; they are called `<row 123>`. Raises ValueError for anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # Not splitlines(): a token may itself be one of Unicode's rarer line separators.
        content = json.loads(text) if path.suffix.lower() == ".json" else text.removesuffix("\n").split("\n")
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{path} cannot be read as tokens (truncated, or another format?): {error}") from None
    if isinstance(content, dict):
        return _names_of_rows(_vocabulary(content, path), V, path)
    if not isinstance(content, list) or not all(isinstance(t, str) for t in content):
        raise ValueError(f"{path} must hold a list of strings, or an object name -> row, got {type(content).__name__}")
    if len(content) != V:
        raise ValueError(f"{path} must name all {V} rows of the matrix, got {len(content)} names")
    return tuple(content)


def _vocabulary(content: Mapping[str, Any], path: Path) -> list[tuple[str, int]]:
    """(name, row) pairs of a vocab.json or of a Hugging Face tokenizer.json."""
    model = content.get("model")
    pairs: list[tuple[Any, Any]]
    try:
        if not isinstance(model, dict):
            pairs = list(content.items())
        elif isinstance(model["vocab"], list):  # Unigram models: a list of [name, score], in order of rows
            pairs = [(name, row) for row, (name, _) in enumerate(model["vocab"])]
        else:
            pairs = list(model["vocab"].items())
        if isinstance(model, dict):
            pairs += [(t["content"], t["id"]) for t in content.get("added_tokens", [])]
    except (KeyError, TypeError, ValueError, AttributeError):
        pairs = [("", None)]
    if not all(isinstance(name, str) and type(row) is int for name, row in pairs):
        raise ValueError(f"{path} must map names to row numbers, or be a tokenizer.json with model.vocab")
    return pairs


def _names_of_rows(pairs: Sequence[tuple[str, int]], V: int, path: Path) -> tuple[str, ...]:
    names: dict[int, str] = {row: name for name, row in pairs}
    outside = [(row, name) for row, name in names.items() if not 0 <= row < V]
    if outside:
        row, name = outside[0]
        raise ValueError(f"{path} must name rows in [0, {V}) of the matrix, got row {row} for {name!r}")
    unnamed = V - len(names)
    if unnamed > min(MAX_PADDING, V // 20):
        raise ValueError(
            f"{path} must name the {V} rows of the matrix (a few of padding excepted), got names for {len(names)}"
        )
    return tuple(names.get(row, f"<row {row}>") for row in range(V))

"""What a run of the scorer depends on: written before its first result, compared before it goes on."""

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from sims.files import to_json, write_atomically
from sims.language.model import LanguageModel
from theory import __version__

FORMAT = 1  # of the files of a run


def manifest(
    model: LanguageModel,
    table: Any,
    layout: Any,
    *,
    name: str,
    revision: str | None = None,
    split: str | None = None,
    options: dict[str, Any],
) -> dict[str, Any]:
    """JSON values that say what the scores come from: two runs with equal ones give the same scores.

    Parameters
    ----------
    table, layout : the data and how its rows are read.
    name, revision, split : how model and data were asked for.
    options : what else changes the numbers.
    """
    config = model.network.config
    return {
        "format": FORMAT,
        "model": {
            "name_or_path": name,
            "revision": revision,
            "commit": getattr(config, "_commit_hash", None),
            "fingerprint": model.fingerprint,
            "config": _sha256(config.to_json_string()),
            "dtype": str(model.W.dtype).removeprefix("torch."),
            "attention": config._attn_implementation,
            "device": model.W.device.type,
        },
        "tokenizer": _tokenizer(model.tokenizer),
        "versions": {"likelihood-displacement": __version__}
        | {package: importlib.metadata.version(package) for package in ("torch", "transformers", "tokenizers")},
        "data": {
            "path": table.path,
            "split": split,
            "sha256": table.sha256,
            "layout": layout.name,
            "columns": dict(layout.columns),
        },
        "options": options,
    }


def _tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Hashes of all that turns text and messages into tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = fast.to_str() if fast is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    template = tokenizer.chat_template
    return {
        "class": type(tokenizer).__name__,
        "sha256": _sha256(rules + json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)),
        "chat_template": None if not template else _sha256(json.dumps(template, sort_keys=True)),
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write(path: Path, run: dict[str, Any]) -> None:
    write_atomically(path, to_json(run))


def check_same(path: Path, run: dict[str, Any]) -> None:
    """A ValueError that names each difference between a stored manifest and this run."""
    try:
        stored = json.loads(path.read_bytes())
        if not isinstance(stored, dict):
            raise ValueError(f"it holds {type(stored).__name__}, not an object")
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}): start anew with --restart") from error
    found = list(_differences(stored, json.loads(to_json(run))))
    if found:
        raise ValueError(
            f"{str(path.parent)!r} holds the unfinished work of another run: {'; '.join(found)}. "
            "Repeat that run as it was to finish it, or start anew with --restart"
        )


def _differences(old: Any, new: Any, name: str = "") -> Any:
    """'model dtype was float32, is bfloat16', one text per value that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from _differences(old.get(key), new.get(key), f"{name} {key}".strip())
    elif old != new:
        yield f"{name} was {_short(old)}, is {_short(new)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] + "..." if len(text) == 64 else text

"""What the columns of preference data mean: the layouts of the common trainers, told from names and first rows.

| layout | prompt | responses | read as |
|---|---|---|---|
| trl | `prompt` | `chosen`, `rejected` | text, or messages, as they are |
| implicit | what the responses begin with | `chosen`, `rejected` | text, or messages, as they are |
| tokenized | `prompt_ids` or `prompt_input_ids` | `chosen_ids`, `rejected_ids` or `..._input_ids` | token ids |
| official | `query` | `text_w`, `text_l`, the query before each | text |
| official_chat | `query` | `chosen`, `rejected` | messages |
| sharegpt | `conversations` (`from`, `value`), `system` | `chosen`, `rejected` | messages |
| axolotl | `messages`, `question`, `prompt`, `instruction` or `input`; `system` | `chosen_response`, ... | messages |
| alpaca | `instruction`, `input`, `system`, `history` | `chosen`, `rejected` | messages |
| openrlhf | `context_messages` or `input` | `chosen`, `rejected` | text, or messages, as they are |

In each `rejected` may hold a list of responses. Where all cells of a text column hold JSON (CSV), it is read.
TRL's columns come before all others, as in TRL, which leaves the others unread.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sims.language.data.rows import HEAD, Row, Table
from sims.language.pairing import Example

SPEAKERS = {"human": "user", "gpt": "assistant", "observation": "tool", "function_call": "assistant"}
NEEDED = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Kind:
    """A layout: the names that a role's column may have, the first that is there counts.

    marks : a table laid out so has at least one of these. chat : texts are said in turn.
    """

    columns: Mapping[str, tuple[str, ...]]
    marks: tuple[str, ...]
    chat: bool = False

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(role for role in NEEDED if role in self.columns)

    def found(self, names: Iterable[str]) -> dict[str, str]:
        """role -> column, of those that are there."""
        there = set(names)
        first = {role: next((x for x in some if x in there), None) for role, some in self.columns.items()}
        return {role: name for role, name in first.items() if name is not None}

    def fits(self, names: Iterable[str]) -> bool:
        return bool(set(self.marks) & set(names)) and set(self.needed) <= set(self.found(names))


_PAIR = {"chosen": ("chosen",), "rejected": ("rejected",)}
_MORE = {"tools": ("tools",), "chat_template_kwargs": ("chat_template_kwargs",)}
_SYSTEM = {"system": ("system",)}
LAYOUTS = {
    "trl": Kind({"prompt": ("prompt",), **_PAIR, **_MORE}, ("prompt",)),
    "tokenized": Kind({x: (f"{x}_ids", f"{x}_input_ids") for x in NEEDED}, ("chosen_ids", "chosen_input_ids")),
    "official": Kind({"prompt": ("query",), "chosen": ("text_w",), "rejected": ("text_l",)}, ("text_w",)),
    "official_chat": Kind({"prompt": ("query",), **_PAIR}, ("query",), True),
    "sharegpt": Kind({"prompt": ("conversations",), **_PAIR, **_SYSTEM, **_MORE}, ("conversations",), True),
    "axolotl": Kind(
        {
            "prompt": ("messages", "question", "prompt", "instruction", "input"),
            "chosen": ("chosen_response", "chosen"),
            "rejected": ("rejected_response", "rejected"),
            **_SYSTEM,
        },
        ("messages", "question", "chosen_response", "system"),
        True,
    ),
    "alpaca": Kind(
        {"prompt": ("instruction",), "input": ("input",), **_PAIR, **_SYSTEM, "history": ("history",), **_MORE},
        ("instruction",),
        True,
    ),
    "openrlhf": Kind({"prompt": ("context_messages", "input"), **_PAIR, **_MORE}, ("context_messages", "input")),
    "implicit": Kind({**_PAIR, **_MORE}, ("chosen",)),
}
_FIRST, _LAST = ("trl", "tokenized"), "implicit"


@dataclass(frozen=True)
class Layout:
    """Where a row says what.

    name : of the layout, a key of LAYOUTS. columns : role -> column.
    json : roles whose cells are JSON text.
    """

    name: str
    columns: Mapping[str, str]
    json: frozenset[str] = frozenset()

    def example(self, values: Mapping[str, Any]) -> Example:
        """What a row says; a ValueError names the column that says nothing, or what nobody understands."""
        kind = LAYOUTS[self.name]
        cells = {role: self._cell(values, role) for role in self.columns}
        chosen = _said(cells["chosen"], self.columns["chosen"])
        # Beside a chosen response that is one message, a list of messages is a list of responses.
        one = isinstance(cells["chosen"], Mapping)
        several = _is_several(cells["rejected"]) or (one and _is_messages(cells["rejected"]))
        others = cells["rejected"] if several else [cells["rejected"]]
        if not others:
            raise ValueError(f"column {self.columns['rejected']!r} holds an empty list")
        responses = [chosen, *(_said(x, self.columns["rejected"]) for x in others)]
        prompt: Any = _said(cells["prompt"], self.columns["prompt"]) if "prompt" in cells else None
        for role in ("input", "system", *(("prompt",) if cells.get("input") else ())):
            if not isinstance(cells.get(role) or "", str):
                raise ValueError(f"column {self.columns[role]!r} must hold text, got {str(cells[role])[:60]!r}")
        if cells.get("input"):
            prompt = f"{prompt}\n{cells['input']}" if prompt else cells["input"]
        if self.name == "official" and all(isinstance(y, str) and y.startswith(str(prompt)) for y in responses):
            responses = [y[len(prompt) :] for y in responses]
        if kind.chat or any(_is_messages(x) for x in (prompt, *responses)):
            prompt, responses = self._conversation(prompt, responses, cells)
        return Example(prompt, responses[0], tuple(responses[1:]), several, _template(cells, self.columns))

    def _cell(self, values: Mapping[str, Any], role: str) -> Any:
        column = self.columns[role]
        value = values.get(column)
        if value is None:
            if role not in NEEDED:
                return None
            if column not in values:
                raise ValueError(f"column {column!r} is missing, there are {', '.join(values) or 'none'}")
            raise ValueError(f"column {column!r} is empty")
        if role in self.json and isinstance(value, str):
            return _json(value, column)
        return value

    def _conversation(self, prompt: Any, responses: list[Any], cells: Mapping[str, Any]) -> tuple[Any, list[Any]]:
        """All as messages. A prompt that is text, beside responses that begin with a user, is said in these again."""
        said = [[{"role": "assistant", "content": y}] if isinstance(y, str) else y for y in responses]
        if self.name == "axolotl" and _is_messages(prompt):
            said = [y[-1:] for y in said]  # as that trainer does
        if not _is_messages(prompt) and all(y and _is_messages(y) and y[0]["role"] != "assistant" for y in said):
            return None, said
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if prompt and not _is_messages(prompt):
            raise ValueError(f"column {self.columns['prompt']!r} must hold text or messages, got {str(prompt)[:60]!r}")
        for user, assistant in reversed(_turns(cells.get("history"), self.columns.get("history"))):
            prompt = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}, *prompt]
        if cells.get("system") and (not prompt or prompt[0]["role"] != "system"):
            prompt = [{"role": "system", "content": cells["system"]}, *prompt]
        return prompt, said

    def to_dict(self) -> dict[str, Any]:
        return {"layout": self.name, "columns": dict(self.columns), "json": sorted(self.json)}


def detect_layout(
    rows: Table | Iterable[Row | Mapping[str, Any]],
    name: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Layout:
    """The layout of a table, or of its first rows.

    name : takes the place of what the column names tell.
    columns : role -> column, for columns under names of their own; without a name they are meant as in "trl".

    Raises ValueError that names the columns that are there: they fit no layout or two, a role or column is unknown.
    """
    first = list(rows.rows(0, HEAD) if isinstance(rows, Table) else islice(rows, HEAD))
    bad = [row for row in first if isinstance(row, Row) and row.problem]
    good = [row.values if isinstance(row, Row) else row for row in first if not (isinstance(row, Row) and row.problem)]
    if not good:
        why = f": {bad[0].where}: {bad[0].problem}" if bad else ""
        raise ValueError(f"none of the first {len(first)} rows can be read{why}")
    names = rows.columns if isinstance(rows, Table) else tuple(dict.fromkeys(x for row in good for x in row))
    if name is None:
        name = _detected(names) if not columns else "trl" if "prompt" in columns or "prompt" in names else _LAST
    if name not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {name!r}")
    found = LAYOUTS[name].found(names)
    for role, column in (columns or {}).items():
        if role not in LAYOUTS[name].columns:
            raise ValueError(f"layout {name} has the roles {', '.join(LAYOUTS[name].columns)}, got {role!r}")
        if column not in names:
            raise ValueError(f"there is no column {column!r} for {role}, there are {', '.join(names)}")
        found[role] = column
    for role in LAYOUTS[name].needed:
        if role not in found:
            expected = " or ".join(repr(x) for x in LAYOUTS[name].columns[role])
            raise ValueError(f"layout {name} needs a column {expected} ({role}), there are {', '.join(names)}")
    return Layout(name, found, _json_roles(found, good, name))


def _detected(names: Sequence[str]) -> str:
    """TRL's, as TRL reads them; else the one that explains more columns than every other that fits."""
    fitting = [name for name, kind in LAYOUTS.items() if kind.fits(names)]
    for name in _FIRST:
        if name in fitting:
            return name
    explained = {name: set(LAYOUTS[name].found(names).values()) for name in fitting if name != _LAST}
    best = max(explained, key=lambda name: len(explained[name]), default=None)
    rivals = [name for name in explained if not explained[name] <= explained[str(best)]]
    there = ", ".join(names)
    if best and rivals:
        texts = [f"{x} ({', '.join(sorted(explained[x]))})" for x in (best, *rivals)]
        raise ValueError(f"the columns {there} fit the layouts {' and '.join(texts)}: say which by layout (--layout)")
    if not fitting:
        raise ValueError(
            f"the columns {there} fit no layout: expected prompt, chosen, rejected (trl), or those of one of "
            f"{', '.join(x for x in LAYOUTS if x != 'trl')}; name them by columns (--column chosen=...)"
        )
    return best or _LAST


def _json_roles(found: Mapping[str, str], rows: Sequence[Mapping[str, Any]], name: str) -> frozenset[str]:
    """Roles whose texts are JSON in every one of the first rows."""
    texts = {role: [row[x] for row in rows if isinstance(row.get(x), str) and row[x]] for role, x in found.items()}
    roles = {role for role, some in texts.items() if some and all(_is_json(text, role, name) for text in some)}
    if "chosen" not in roles and all(text.startswith("[") for text in texts["chosen"]):
        roles -= {"rejected"}  # responses that are lists in some language, not lists of responses
    return frozenset(roles)


def _is_json(text: str, role: str, name: str) -> bool:
    if role not in (*NEEDED, "history") or text.lstrip()[:1] not in ("[", "{"):
        return False
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    if role == "history":
        return True
    if role == "rejected" and isinstance(value, list) and value and all(isinstance(x, str) for x in value):
        return True
    some = value if _is_several(value) else [value]
    if name == "tokenized":
        return all(isinstance(x, list) for x in some)
    return all(_is_messages(x) or _is_message(x) for x in some) and bool(some)


def _json(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"column {column!r} must hold JSON as in the first rows: {error}") from None


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def _is_several(value: Any) -> bool:
    """Whether a cell holds a list of responses: texts, lists of messages, lists of token ids, or nothing."""
    return isinstance(value, list) and (not value or isinstance(value[0], str | list))


def _said(value: Any, column: str) -> Any:
    """Text, messages with role and content, or token ids."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if _is_messages(value):
        return [_message(x, column) for x in value]
    if isinstance(value, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        return value
    raise ValueError(f"column {column!r} must hold text, messages or token ids, got {str(value)[:60]!r}")


def _message(value: Any, column: str) -> dict[str, Any]:
    said_by = next((value[key] for key in ("role", "from") if key in value), None) if _is_message(value) else None
    if not isinstance(said_by, str):
        raise ValueError(f"column {column!r} must hold messages with role and content, got {str(value)[:60]!r}")
    if "role" not in value:
        value = {"role": SPEAKERS.get(said_by, said_by), "content": value.get("value")}
    # Columns of Arrow give every message the keys of all: those without a value are not there.
    return {key: x for key, x in value.items() if x is not None or key == "content"}


def _turns(value: Any, column: str | None) -> list[tuple[str, str]]:
    try:
        return [(user, assistant) for user, assistant in value or []]
    except (TypeError, ValueError):
        raise ValueError(f"column {column!r} must hold pairs of texts, got {str(value)[:60]!r}") from None


def _template(cells: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    tools, more = cells.get("tools"), cells.get("chat_template_kwargs")
    tools = _json(tools, columns["tools"]) if isinstance(tools, str) and tools else tools
    more = _json(more, columns["chat_template_kwargs"]) if isinstance(more, str) and more else more
    if more and not isinstance(more, Mapping):
        raise ValueError(
            f"column {columns['chat_template_kwargs']!r} must hold names and values, got {str(more)[:60]!r}"
        )
    return {**({"tools": tools} if tools else {}), **(more or {})}

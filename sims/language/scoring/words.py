"""Texts as a summary shows them."""

from typing import Any

from sims.language.pairing import Example


def parted(chosen: Any, rejected: Any, decode: Any, width: int = 32) -> tuple[str, str]:
    """The beginnings of two responses, from a little before they part."""
    texts = [_text(said, decode) for said in (chosen, rejected)]
    same = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    start = max(0, same - width // 2) if same > width // 2 else 0

    def cut(text: str) -> str:
        return ("..." if start else "") + text[start : start + width] + ("..." if len(text) > start + width else "")

    return cut(texts[0]), cut(texts[1])


def _text(said: Any, decode: Any) -> str:
    if isinstance(said, str):
        return said
    if said and isinstance(said[0], dict):
        return " ".join(str(message.get("content") or "") for message in said)
    return decode(list(said))


def texts_of(example: Example, decode: Any) -> list[tuple[str, str]]:
    """(chosen, rejected) as shown, of each rejected response."""
    return [parted(example.chosen, y, decode) for y in example.rejected]


def counted(number: int, what: str) -> str:
    """'1 row', '2 rows'."""
    return f"{number} {what}{'s' * (number != 1)}"


def from_zero(where: str) -> str:
    """What must be said after a `where` that names rows and not lines."""
    return "; rows are counted from 0" if where.startswith("row ") else ""


def share_of(count: int, of: int) -> str:
    return f"{100 * count / of:.1f} %" if of else "0 %"

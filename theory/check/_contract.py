"""The contract every loss keeps: a frozen record with a name, a source, domains, examples, LaTeX, and no memory."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from theory.check._base import Check, is_combinator, near_pairs
from theory.check._token import group
from theory.losses import Loss, Pair, TokenLoss
from theory.ops import NUMPY


def contract(loss: Loss) -> Iterator[Check]:
    """What the class says of itself, before anything is evaluated."""
    name = loss.name or type(loss).__name__
    yield Check("name", True, name) if loss.name else Check("name", False, "set the class attribute `name`")
    yield Check("reference", bool(loss.reference), loss.reference or "set the class attribute `reference`")
    record = dataclasses.is_dataclass(loss) and "__dataclass_fields__" in vars(type(loss))
    frozen = record and loss.__dataclass_params__.frozen  # type: ignore[attr-defined]
    yield Check("frozen dataclass", frozen, "" if frozen else "decorate the class with @dataclass(frozen=True)")
    fields = dataclasses.fields(loss) if dataclasses.is_dataclass(loss) else ()
    # A combinator checks its numbers itself; a loss, a record or a switch has no domain.
    bad = [f.name for f in fields if "domain" not in f.metadata and _is_number(getattr(loss, f.name))]
    if not is_combinator(loss):
        detail = f"no domain: {', '.join(bad)}; use parameter(...)" if bad else ""
        yield Check("parameters have domains", not bad, detail)
        yield _examples(loss)
    yield _refuses_nan(loss, [f.name for f in fields])
    latex = loss.latex()
    detail = "set the class attribute `tex`" if isinstance(loss, TokenLoss) else "latex() is empty"
    yield Check("LaTeX", len(latex) > 0, latex or detail)


def formula(loss: Loss) -> Iterator[Check]:
    """It can be evaluated, and gives a number."""
    if isinstance(loss, TokenLoss) and loss.coupled:
        detail = "a TokenLoss sees one sample and has no batch: drop `coupled`, or derive from Loss"
        yield Check("coupled", False, detail)
        return
    y: Any = group(0) if isinstance(loss, TokenLoss) else Pair(*map(np.float64, near_pairs()[0]))
    seen = loss.formula(NUMPY, y)
    cause = ""
    if seen is None:
        cause = "it returned None: is `return` missing?"
    elif isinstance(seen, tuple | list):
        cause = f"it returned a {type(seen).__name__} of {len(seen)}, not a number: a comma or brackets too many?"
    elif np.asarray(seen).dtype.kind not in "fiu":
        cause = f"it returned {seen!r}, not a real number"
    yield Check("the formula gives a number", not cause, cause)


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool)


def _examples(loss: Loss) -> Check:
    try:
        examples = loss.examples()
    except TypeError as error:
        return Check("examples", False, f"examples() raised {error}: give every parameter a default, or define it")
    good = len(examples) > 0 and all(isinstance(e, type(loss)) for e in examples)
    return Check("examples", good, f"{len(examples)} instance(s)" if good else "examples() must return instances")


def _refuses_nan(loss: Loss, names: list[str]) -> Check:
    """Numbers are checked on construction: NaN must be a ValueError."""
    taken = []
    for name in names:
        value = getattr(loss, name)
        nan = math.nan if _is_number(value) else None
        if isinstance(value, tuple) and value and all(map(_is_number, value)):
            nan = (math.nan, *value[1:])
        if nan is not None:
            try:
                dataclasses.replace(loss, **{name: nan})  # type: ignore[type-var]
            except ValueError:
                continue
            taken.append(name)
    detail = f"accepted by {', '.join(taken)}: do not override __post_init__ without checks" if taken else ""
    return Check("NaN parameters are refused", not taken, detail)

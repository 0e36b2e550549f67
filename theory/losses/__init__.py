"""Preference losses, one small file each, found automatically.

`LOSSES` maps names to classes; `get("dpo", beta=0.1)` builds one. A loss defined elsewhere (in a notebook cell, say)
works everywhere a loss is accepted and needs no registration.
"""

import importlib
import inspect
import pkgutil
from typing import Any

from theory._check import POSITIVE, REAL, Interval, unknown
from theory.losses._base import Claims, Loss, MarginForm, MarginLoss, TokenLoss, parameter
from theory.losses._calibrated import Calibrated
from theory.losses._combine import SFT, PerToken, Sum, Weighted
from theory.losses._data import Group, Pair, Tokens
from theory.losses._gate import Gated
from theory.losses._links import FDivergence
from theory.losses._tokenwise import LD, WPOWeighted
from theory.losses._trl import from_trl

__all__ = [
    "LD",
    "LOSSES",
    "POSITIVE",
    "REAL",
    "SFT",
    "Calibrated",
    "Claims",
    "FDivergence",
    "Gated",
    "Group",
    "Interval",
    "Loss",
    "MarginForm",
    "MarginLoss",
    "Pair",
    "PerToken",
    "Sum",
    "TokenLoss",
    "Tokens",
    "WPOWeighted",
    "Weighted",
    "from_trl",
    "get",
    "parameter",
]


def _discover() -> dict[str, type[Loss]]:
    """Every public Loss class defined in a public module of this package, by name, in order of module and line."""
    found: dict[str, type[Loss]] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        here = [
            c
            for c in vars(module).values()
            if inspect.isclass(c) and issubclass(c, Loss) and c.__module__ == module.__name__ and c.__name__[0] != "_"
        ]
        if not here:
            raise ImportError(f"theory/losses/{info.name}.py defines no loss")
        for loss in here:
            if not loss.name or not loss.reference:
                raise ImportError(f"{loss.__name__} in theory/losses/{info.name}.py must set name and reference")
            if loss.name in found:
                raise ImportError(f"two losses are named {loss.name!r}: {found[loss.name]} and {loss}")
            found[loss.name] = loss
    return found


LOSSES: dict[str, type[Loss]] = _discover()


def __getattr__(name: str) -> Any:
    """`theory.losses.DPO` and the other discovered classes, by class name."""
    for cls in LOSSES.values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get(name: str, **parameters: Any) -> Loss:
    """The loss called `name` with the given parameters; a ValueError names the nearest known ones otherwise."""
    if name not in LOSSES:
        raise ValueError(unknown("loss", name, LOSSES))
    cls = LOSSES[name]
    accepted = list(cls.__dataclass_fields__)  # type: ignore[attr-defined]
    for p in parameters:
        if p not in accepted:
            raise ValueError(f"loss {name!r}: " + unknown("parameter", p, accepted))
    return cls(**parameters)

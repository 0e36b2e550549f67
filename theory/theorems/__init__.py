"""Theorems on likelihood displacement, one file per claim or tight family, found automatically.

`THEOREMS` maps names to claims. Each says what it states, where it applies, and how far it is off on a problem when
measured by a route that does not know it (`sims.verify` runs them all; `displacement verify` prints the ledger).
"""

import importlib
import inspect
import pkgutil

from theory.theorems._base import (
    RateTheorem,
    Route,
    Run,
    Sharpness,
    Theorem,
    everywhere,
    excess,
    is_single_token,
    relative,
)
from theory.theorems._proofs import Proof
from theory.theorems._single import Branch, dot
from theory.theorems.settings import SETTINGS

__all__ = [
    "SETTINGS",
    "THEOREMS",
    "Branch",
    "Proof",
    "RateTheorem",
    "Route",
    "Run",
    "Sharpness",
    "Theorem",
    "dot",
    "everywhere",
    "excess",
    "is_single_token",
    "relative",
]


def _discover() -> dict[str, Theorem]:
    """One instance of every public Theorem class defined in a public module of this package, by name."""
    found: dict[str, Theorem] = {}
    for info in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        if info.name.startswith("_") or info.name == "settings":
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        here = [
            c
            for c in vars(module).values()
            if inspect.isclass(c)
            and issubclass(c, Theorem)
            and c.__module__ == module.__name__
            and c.__name__[0] != "_"
        ]
        if not here:
            raise ImportError(f"theory/theorems/{info.name}.py defines no theorem")
        for theorem in here:
            for needed in ("name", "statement", "source", "knobs", "sharpness", "settings"):
                if not getattr(theorem, needed):
                    raise ImportError(f"{theorem.__name__} in theory/theorems/{info.name}.py must set {needed}")
            if theorem.name in found:
                raise ImportError(f"two theorems are named {theorem.name!r}")
            found[theorem.name] = theorem()
    return found


THEOREMS: dict[str, Theorem] = _discover()

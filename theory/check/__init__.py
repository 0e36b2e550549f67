"""`check_loss`: everything a loss claims, tried on one instance, with a report a person can read."""

import traceback

import numpy as np

from theory.check import _contract, _coupled, _margin, _pair, _token, _token_shape, _values
from theory.check._base import Battery, Check, LossReport, one_thread
from theory.check._place import Place, place
from theory.losses import Loss, MarginLoss, TokenLoss
from theory.ops import Ops

__all__ = ["Check", "LossReport", "Place", "check_loss", "place"]

HINT = "formula may use only arithmetic and ops.* (no if, numpy or torch)"


def check_loss(loss: Loss) -> LossReport:
    """Try the loss against its contract and its claims; see `theory.losses._base` for the contract.

    Values agree on numpy, torch and 50-digit arithmetic; nothing is NaN up to margins of 1e4; slopes by closed form, by
    automatic differentiation and by high precision agree; each claim holds where made and has a counter-example where
    denied; declared minima, zeros, kinks, slope laws and margin forms are what they say. Of a batch: its order is
    nothing. Of a loss of tokens: values, gradients against differences, and the claims that are made.
    Each failure says which claim, where, and the likely cause.

    Raises
    ------
    ValueError : not an instance of a loss. Whatever the loss itself raises is a failed check.
    """
    if isinstance(loss, type):
        raise ValueError(f"loss must be an instance, got the class {loss.__name__}: call it, {loss.__name__}()")
    if not isinstance(loss, Loss):
        raise ValueError(f"loss must be a theory.losses.Loss instance, got {loss!r}")
    checks: list[Check] = []
    for part in _battery(loss):
        before = len(checks)
        try:
            with (
                np.errstate(all="ignore"),
                one_thread(),
            ):  # a loss under test may overflow; NaN is looked for where it matters
                checks.extend(part(loss))
        except Exception as error:  # a loss under test may raise anything; the report says what
            hint = "" if any(HINT in c.detail for c in checks) else _hint(error)  # once is enough
            detail = f"raised {type(error).__name__}: {error}{hint}"
            checks.append(Check(part.__name__.strip("_"), False, detail))
        if part is _contract.formula and not all(c.ok for c in checks[before:]):
            break  # everything below would repeat it
    return LossReport(repr(loss), tuple(checks))


def _battery(loss: Loss) -> list[Battery]:
    """What is tried on a loss of this kind."""
    first: list[Battery] = [_contract.contract, _contract.formula]
    if isinstance(loss, TokenLoss):
        return [*first, _token.tokens, _token.claims, _token_shape.shape]
    if isinstance(loss, MarginLoss):
        battery = [*first, _values.values, _margin.slopes, _margin.claims, _margin.landmarks]
    else:
        battery = [*first, _values.values, _pair.slopes, _pair.claims, _pair.landmarks]
    return [*battery, _coupled.coupled] if loss.coupled else battery


def _hint(error: Exception) -> str:
    """The likely cause of an error inside a formula: it must run on arrays, tensors, digits and symbols."""
    if not any(frame.name == "formula" for frame in traceback.extract_tb(error.__traceback__)):
        return ""
    known = ", ".join(name for name in vars(Ops) if not name.startswith("_"))
    return f"; {HINT}; known: {known}"

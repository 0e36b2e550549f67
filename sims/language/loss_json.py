"""A loss of the registry as JSON values and back, for jobs in other processes and for saved results."""

from dataclasses import fields
from typing import Any

from theory.losses import SFT, Loss, get


def plain_loss(loss: Loss) -> dict[str, Any]:
    """A loss of the registry, perhaps with an SFT term, as JSON values.

    Raises ValueError for a parameter that is no number or text, unless it has its default (SparsePO's mask).
    """
    plain: dict[str, Any] = {"name": loss.name}
    for field in fields(loss):  # type: ignore[arg-type]
        value = getattr(loss, field.name)
        if isinstance(value, Loss):
            plain[field.name] = plain_loss(value)
        elif value is None or isinstance(value, float | int | str):
            plain[field.name] = value
        elif value != field.default:
            raise ValueError(f"loss must have numbers and texts as parameters, got {field.name} = {value!r}")
    return plain


def loss_of(plain: dict[str, Any]) -> Loss:
    """The loss of a `plain_loss`."""
    name, values = plain["name"], {k: v for k, v in plain.items() if k != "name"}
    return SFT(loss_of(values["base"]), values["lam"], values["per"]) if name == SFT.name else get(name, **values)

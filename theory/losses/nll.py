"""Supervised fine-tuning on the preferred response."""

from dataclasses import dataclass
from typing import Any

from theory.losses._base import Claims, Loss, Pair
from theory.losses._combine import NORMALISATIONS, negative_log_likelihood
from theory.ops import Ops


@dataclass(frozen=True)
class NLL(Loss):
    """-ln pi(y+), counted as `per` says: "sequence" (sum over tokens), "token" (their mean), "batch_token".

    "batch_token" is the sum over the batch over its number of tokens: TRL's `sft`. Linear in ln pi(y+), blind to y-.
    """

    per: str = "sequence"

    name = "nll"
    reference = 'maximum likelihood; TRL loss_type sft is per="batch_token"'
    claims = Claims(reference_free=True)

    def __post_init__(self) -> None:
        if self.per not in NORMALISATIONS:
            raise ValueError(f"NLL.per must be one of {', '.join(NORMALISATIONS)}, got {self.per!r}")

    @property
    def coupled(self) -> bool:  # type: ignore[override]
        return self.per == "batch_token"

    def formula(self, ops: Ops, y: Pair) -> Any:
        return negative_log_likelihood(ops, y, self.per)

    @classmethod
    def examples(cls) -> tuple["NLL", ...]:
        return tuple(cls(per) for per in NORMALISATIONS)

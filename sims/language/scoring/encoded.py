"""What an encoder returns: the states of a batch of pairs."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Encoded:
    """States of B pairs.

    index : (B,) which of the pairs given.
    plus, minus : (B, T+, d), (B, T-, d) states after the final norm; the same tensor where the prompt was shared.
    mask_plus, mask_minus : (B, T+-) bool, true where they predict tokens of the chosen and the rejected response, in
        their order.
    """

    index: list[int]
    plus: Tensor
    minus: Tensor
    mask_plus: Tensor
    mask_minus: Tensor

    def part(self, b: int) -> "Encoded":
        """Pair b alone."""
        at = slice(b, b + 1)
        return Encoded(self.index[at], self.plus[at], self.minus[at], self.mask_plus[at], self.mask_minus[at])

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(index, (n+, d), (n-, d)) of each pair."""
        for b, i in enumerate(self.index):
            yield i, self.plus[b, self.mask_plus[b]], self.minus[b, self.mask_minus[b]]

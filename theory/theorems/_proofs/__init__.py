"""Symbolic proofs of claims, in inner products: the dimension d never occurs (`symbolic` says how they reduce)."""

from theory.theorems._proofs import conditions, exact, identities, rates
from theory.theorems._proofs.symbolic import Factors, Proof

__all__ = ["Proof", "proof_of"]


def proof_of(claim: str, k: Factors) -> Proof | None:
    """The proof called like the claim, its ingredients multiplied by `k(knob)`; None if there is none."""
    for module in (rates, identities, exact, conditions):
        prove = vars(module).get(claim)
        if prove is not None:
            return prove(k)
    return None

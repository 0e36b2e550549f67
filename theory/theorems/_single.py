"""What the single-token theorems are written in: inner products and probabilities of one context."""

from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.model import Response
from theory.problem import Problem

Array = NDArray[np.floating[Any]]


class Branch:
    """The context in which y+ and y- of one sample differ first by tokens `+` and `-` (default: the prompt)."""

    def __init__(self, problem: Problem, sample: int = 0, prefix: Response = ()) -> None:
        s = problem.samples[sample]
        k = len(prefix)
        self.problem, self.row = problem, problem.contexts.index((s.prompt, prefix))
        self.plus, self.minus = s.preferred[k], s.dispreferred[k]
        self.G = problem.incentives[0][:, sample]

    @cached_property
    def p(self) -> Array:
        """(B, V) probabilities of the next token."""
        return self.problem.pi[:, self.row]

    @cached_property
    def h(self) -> Array:
        """(B, d) hidden vector."""
        return self.problem.H[:, self.row]

    def W(self, token: int) -> Array:
        """(B, d) unembedding of a token."""
        return self.problem.W[:, token].astype(np.float64)

    @cached_property
    def a(self) -> Array:
        """(B, d) W_+ - W_-."""
        return self.W(self.plus) - self.W(self.minus)

    @cached_property
    def along(self) -> Array:
        """(B, V) <W_z, W_+ - W_->."""
        return self.problem.products(self.a)

    @cached_property
    def others(self) -> NDArray[np.bool_]:
        """(V,) tokens other than + and -."""
        mask = np.ones(self.problem.V, dtype=bool)
        mask[[self.plus, self.minus]] = False
        return mask

    @cached_property
    def rest(self) -> Array:
        """(B,) 1 - pi+, with its digits as pi+ -> 1."""
        return np.delete(self.p, self.plus, axis=1).sum(1)

    @cached_property
    def mass(self) -> Array:
        """(B,) 1 - pi+ + pi-."""
        return self.rest + self.p[:, self.minus]

    @cached_property
    def hh(self) -> Array:
        """(B,) |h|^2."""
        return dot(self.h, self.h)

    def WW(self, v: int, w: int) -> Array:
        """(B,) <W_v, W_w>."""
        return dot(self.W(v), self.W(w))

    @cached_property
    def weighted_others(self) -> Array:
        """(B,) sum over z other than + and - of pi(z) <W_z, W_+ - W_->."""
        return dot(self.p[:, self.others], self.along[:, self.others])

    @cached_property
    def S(self) -> Array:
        """(B,) the paper's eq. 3: -(1 - pi+ + pi-) <W_+, W_-> - sum_z pi(z) <W_z, W_+ - W_->."""
        return -self.mass * self.WW(self.plus, self.minus) - self.weighted_others

    @cached_property
    def norms(self) -> Array:
        """(B,) (1 - pi+) |W_+|^2 + pi- |W_-|^2."""
        return self.rest * self.WW(self.plus, self.plus) + self.p[:, self.minus] * self.WW(self.minus, self.minus)

    @cached_property
    def mean_along(self) -> Array:
        """(B,) sum over every z of pi(z) <W_z, W_+ - W_->."""
        return dot(self.p, self.along)


def dot(x: Array, y: Array) -> Array:
    """(B,) inner products of the rows of x and y."""
    return np.einsum("bi,bi->b", x, y)

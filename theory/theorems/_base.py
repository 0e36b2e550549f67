"""What a theorem is here: a statement, hypotheses as code, and a residual that vanishes where it is true.

As a numbered contract for authors of new ones:

1. One public module per claim (or tight family), one class derived from `Theorem` (usually one of its kinds below).
2. `statement` is LaTeX, with the number the source gives it; `source` says where it stands.
3. `settings` names the families of random problems (`theory.theorems.settings`) it is tried on; `applies(problem)`
   says, instance by instance, whether the hypotheses hold; `measurable(problem)` whether a route can tell.
4. `residual(problem, route)` compares the closed formula with what `route` measures without knowing it (automatic
   differentiation, integration, training: see `Route`). An identity returns |difference| / sum of |terms|; an
   inequality how far it is violated, on the same scale; at most `tolerance` where it is true (a
   multiple of what the route keeps).
5. Every ingredient that could be wrong is multiplied by a knob, `self.k(name)`, 1 in the theorem itself. `wrong_copies`
   turns each knob to -1 (sign flipped), 0 (term dropped) and 2 (factor of 2); every one of those must be caught.
6. `sharpness` names, for each hypothesis, a setting in which dropping it breaks the claim, or says why none is known.
7. Optional: `proof()` returns an expression that sympy reduces to an exact zero, and what it covers.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from theory.problem import Positions, Problem
from theory.theorems._proofs import Proof, proof_of

Array = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]


class Route(Protocol):
    """A way to measure a problem that shares no formula with the theorems. A route may offer only some of these."""

    name: str
    tolerance: float  # of what it measures, relative to the scale of the theorem's residual

    def rate(self, problem: Problem, z: Positions) -> Array:
        """(B,) d/dt ln pi(z) under gradient flow."""
        ...

    def velocity(self, problem: Problem) -> tuple[Array, Array]:
        """dW/dt (B, V, d) and dH/dt (B, n, d) under gradient flow."""
        ...

    def inner(self, problem: Problem, v: Positions, w: Positions) -> Array:
        """(B,) <grad ln pi(v), grad ln pi(w)> in the metric of the rates."""
        ...

    def flow(self, problem: Problem, times: Array, features: Array | None = None) -> "Run":
        """Parameters along gradient flow; with `features` J (d, r), hidden vectors move as J theta (kernel J J^T)."""
        ...

    def descent(self, problem: Problem, step: float, steps: int, method: str = "gradient") -> "Run":
        """Parameters along discrete training with learning rates step * (eta_W, eta_h)."""
        ...


class Run(NamedTuple):
    """times (T,), W (T, B, V, d), H (T, B, n, d)."""

    times: Array
    W: Array
    H: Array

    def logits(self, row: int = 0) -> Array:
        """(T, B, V) logits of one context; the first is the first sample's prompt."""
        return np.einsum("tbvd,tbd->tbv", self.W, self.H[:, :, row])

    def log_pi(self, row: int = 0) -> Array:
        """(T, B, V) ln pi of every token in one context."""
        return log_softmax(self.logits(row), axis=-1)

    def log_prob(self, y: Positions) -> Array:
        """(T, B) ln pi(y) of a response."""
        total = np.zeros(self.W.shape[:2])
        for row, token in zip(y.rows, y.tokens, strict=True):
            total += self.log_pi(row)[:, :, token]
        return total

    def at(self, i: int, problem: Problem) -> Problem:
        """The problem with the parameters of point i, references kept."""
        return replace(problem, W=self.W[i], H=self.H[i])


class Sharpness(NamedTuple):
    """A hypothesis, and a setting that violates it and breaks the claim; or the reason why there is none."""

    hypothesis: str
    broken_in: str | None
    reason: str = ""


class Theorem:
    """A claim (see the module's contract)."""

    name: ClassVar[str] = ""
    statement: ClassVar[str] = ""
    source: ClassVar[str] = ""
    kind: ClassVar[str] = "identity"  # identity | inequality | limit
    settings: ClassVar[tuple[str, ...]] = ("single_token",)
    routes: ClassVar[tuple[str, ...]] = ("autodiff",)
    knobs: ClassVar[tuple[str, ...]] = ()
    wrong_factors: ClassVar[tuple[float, ...]] = (-1.0, 0.0, 2.0)
    harmless: ClassVar[tuple[tuple[str, float], ...]] = ()  # turns that leave the claim true, each with its reason
    sharpness: ClassVar[tuple[Sharpness, ...]] = ()
    tolerance: ClassVar[float] = 1e-12

    def __init__(self) -> None:
        self.turned: dict[str, float] = {}

    def applies(self, problem: Problem) -> Mask:
        """(B,) whether the hypotheses hold."""
        return np.ones(len(problem), dtype=bool)

    def measurable(self, problem: Problem) -> Mask:
        """(B,) instances that routes can measure to the tolerance: no hypothesis, only a matter of floats and time."""
        return np.ones(len(problem), dtype=bool)

    def residual(self, problem: Problem, route: Route) -> Array:
        """(B,) how far the claim is off, instance by instance."""
        raise NotImplementedError(f"{type(self).__name__} must define residual(problem, route)")

    def proof(self) -> Proof | None:
        """Symbolic proof, if there is one. Default: the one of the claim's name in `theory.theorems._proofs`."""
        return proof_of(self.name, self.k)

    def k(self, knob: str) -> float:
        """The factor of an ingredient: 1, except in a deliberately wrong copy."""
        if knob not in self.knobs:
            raise KeyError(f"{type(self).__name__} declares no knob {knob!r}")
        return self.turned.get(knob, 1.0)

    def turn(self, knob: str, factor: float) -> Self:
        """A wrong copy with one ingredient multiplied by `factor`."""
        wrong = copy.copy(self)
        wrong.turned = {knob: factor}
        return wrong

    def wrong_copies(self) -> Iterator[tuple[str, Self]]:
        """(what is wrong, the theorem with that mistake) for every knob."""
        for knob in self.knobs:
            for factor in self.wrong_factors:
                if (knob, factor) not in self.harmless:
                    yield f"{knob} times {factor:g}", self.turn(knob, factor)

    def __repr__(self) -> str:
        return f"{self.name}: {self.statement}"

    def _repr_latex_(self) -> str:
        return self.statement


class RateTheorem(Theorem):
    """An identity for d/dt ln pi(z) as a sum of named terms, one knob each."""

    routes = ("autodiff", "integrated")

    def response(self, problem: Problem) -> Positions:
        """The response whose rate the theorem gives; default y+ of the first sample."""
        return problem.pairs[0][0]

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        """(B,) each, keyed by the knobs; they sum to the rate."""
        raise NotImplementedError(f"{type(self).__name__} must define terms(problem, z)")

    def residual(self, problem: Problem, route: Route) -> Array:
        z = self.response(problem)
        total = sum(self.k(name) * term for name, term in self.terms(problem, z).items())
        return relative(total - route.rate(problem, z), problem.rate_scale(z))


def relative(difference: Array, scale: Array) -> Array:
    """|difference| / scale, and 0 where both vanish."""
    difference = np.abs(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / scale)


def excess(left: Array, right: Array | float, scale: Array) -> Array:
    """How far `left <= right` is violated, relative to `scale`; 0 where it holds."""
    return relative(np.maximum(left - right, 0.0), scale)


def probe_of(problem: Problem) -> Positions:
    """The problem's probe, a response that need not be trained."""
    if problem.probe is None:
        raise ValueError("the problem has no probe: a (prompt, response) whose rate is asked for")
    prompt, response = problem.probe
    return problem.positions(response, prompt)


def is_single_token(problem: Problem) -> bool:
    """One sample of two one-token responses."""
    return len(problem.samples) == 1 and all(len(y) == 1 for y in problem.samples[0].responses[:2])


def first_tokens(problem: Problem, sample: int = 0) -> tuple[int, int]:
    """y+_1 and y-_1."""
    s = problem.samples[sample]
    return s.preferred[0], s.dispreferred[0]


def everywhere(problem: Problem, holds: bool) -> Mask:
    """A hypothesis about the shape of the problem, as a mask over its instances."""
    return np.full(len(problem), holds)


def raises_margin(problem: Problem) -> Mask:
    """(B,) G > 0: the loss pushes the margin of the first sample up."""
    return problem.incentives[0][:, 0] > 0


def widened(problem: Problem, W: Array, H: Array) -> Problem:
    """The problem with more dimensions: rows of W and H get the given coordinates, logits must not change by them."""
    return replace(problem, W=np.concatenate([problem.W, W], 2), H=np.concatenate([problem.H, H], 2))

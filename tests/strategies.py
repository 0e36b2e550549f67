"""Models, losses and rates for the tests: hypothesis strategies, seeded random models, and the extremes by name."""

import dataclasses
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from theory import UnconstrainedFeatures
from theory.losses import LOSSES, MarginLoss, TokenLoss

# ---- losses: every example of every registered loss, so that a new file is tested without an edit here

EXAMPLES = [example for cls in LOSSES.values() for example in cls.examples()]
PAIRS = [loss for loss in EXAMPLES if not isinstance(loss, TokenLoss)]
MARGIN: list[MarginLoss] = [loss for loss in EXAMPLES if isinstance(loss, MarginLoss)]
SMOOTH = [loss for loss in MARGIN if loss.claims.differentiable]  # the slope never jumps
ENDLESS = [loss for loss in MARGIN if not loss.zeros(0.0)]  # the slope never vanishes: the margin rises for ever

# (eta_W, eta_h)
REGIMES = {"both": (1.0, 1.0), "W frozen": (0.0, 1.3), "h frozen": (0.7, 0.0), "unequal": (0.3, 2.1)}


def losses(kind: list[MarginLoss] = MARGIN) -> st.SearchStrategy[MarginLoss]:
    """An example of the registry, or one of its classes with parameters drawn from their typical ranges."""

    def drawn(example: MarginLoss) -> st.SearchStrategy[MarginLoss]:
        cls: Any = type(example)
        ranges = {f.name: st.floats(*f.metadata["domain"].typical) for f in dataclasses.fields(cls)}
        return st.builds(cls, **ranges)

    return st.sampled_from(kind) | st.sampled_from(kind).flatmap(drawn)


# ---- models


def random_model(
    rng: np.random.Generator, V: int = 5, d: int = 3, scale: float = 1.0, u_ref: float | None = None
) -> UnconstrainedFeatures:
    """Gaussian W and h; y+ = 0, y- = 1. `u_ref`: the reference margin, when training does not start at the reference."""
    return single(scale * rng.normal(size=(V, d)), scale * rng.normal(size=d), u_ref=u_ref)


def single(W: Any, h: Any, plus: int = 0, minus: int = 1, u_ref: float | None = None) -> UnconstrainedFeatures:
    """A single-token model from nested lists or arrays."""
    reference = None if u_ref is None else (u_ref, 0.0)
    return UnconstrainedFeatures.single_token(
        np.array(W, dtype=float), np.array(h, dtype=float), plus, minus, reference=reference
    )


def entries(bound: float = 2.0) -> st.SearchStrategy[float]:
    """Small numbers of few digits: ties, zeros and equal rows are common, subnormal noise is not."""
    coarse = st.integers(-8, 8).map(lambda n: n * bound / 8)
    fine = st.floats(-bound, bound, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
    return coarse | fine


@st.composite
def models(
    draw: st.DrawFn,
    min_tokens: int = 2,
    max_tokens: int = 6,
    max_dim: int = 4,
    bound: float = 2.0,
    reference: bool = True,
) -> UnconstrainedFeatures:
    """Single-token models of small size; with `reference`, some do not start at their reference."""
    V, d = draw(st.integers(min_tokens, max_tokens)), draw(st.integers(1, max_dim))
    W = draw(hnp.arrays(np.float64, (V, d), elements=entries(bound)))
    h = draw(hnp.arrays(np.float64, (d,), elements=entries(bound)))
    plus, minus = draw(st.permutations(range(V)))[:2]
    return single(W, h, plus, minus, draw(st.none() | st.floats(-3, 3)) if reference else None)


def rates(zero: bool = True) -> st.SearchStrategy[tuple[float, float]]:
    """(eta_W, eta_h) with ratios over twelve decades, the larger being 1; with `zero`, one of them may be 0."""
    some = st.floats(-6, 6).map(lambda e: 10.0**e) | st.sampled_from([1e-12, 0.5, 1.0, 2.0, 1e12])
    pairs = some.map(lambda kappa: (1.0, kappa) if kappa <= 1 else (1 / kappa, 1.0))
    return pairs | st.sampled_from([(0.0, 1.0), (1.0, 0.0)]) if zero else pairs


# ---- extremes that random draws never meet (exact_solution, "Bounds and properties", point 10)

_REST = [[0.3, 0.7], [-0.4, 1.1]]
EXTREMES: dict[str, UnconstrainedFeatures] = {
    # With the rates of EXTREME_RATES, p (or q) = sqrt(2 eta_W) h +- sqrt(eta_h) a is exactly 0.
    "P = 0": single([[2, 0], [0, 0], *_REST], [-1, 0]),
    "Q = 0": single([[2, 0], [0, 0], *_REST], [1, 0]),
    "K0 = 0": single([[0.5, 1], [0.5, 1], *_REST], [0, 0]),
    "a0 = 0": single([[0.5, 1], [0.5, 1], *_REST], [0.8, -0.3]),
    "h0 = 0": single([[0.5, 1], [-0.5, 0.2], *_REST], [0, 0]),
    # Token 2 is aligned with W_+ - W_- exactly as y+ is: with W frozen the two share the limit.
    "tie": single([[1, 0.5], [-1, 0.5], [1, -2], [0, 0.3]], [0.2, 0.4]),
    "equal rows": single([[1, 0.5], [-1, 0.5], [1, 0.5], [1, 0.5]], [0.2, 0.4]),
    "u0 = -1e4": single([[-50, 0], [50, 0.3], [0, 2]], [100, 0]),
    "u0 = 1e4": single([[50, 0], [-50, 0.3], [0, 2]], [100, 0]),
    "two tokens": single([[0.4, 1], [-0.3, 0.2]], [0.7, -0.6]),
    "one dimension": single([[0.4], [-0.3], [1.9]], [0.7]),
}
EXTREME_RATES = {"P = 0": (2.0, 1.0), "Q = 0": (2.0, 1.0)}


def extreme_rates(name: str) -> tuple[float, float]:
    """The rates at which the extreme is one."""
    return EXTREME_RATES.get(name, (1.0, 1.0))

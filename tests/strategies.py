"""Models, losses and rates for the tests: hypothesis strategies, seeded random models, and the extremes by name."""

import dataclasses
import math
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from theory import UnconstrainedFeatures
from theory.losses import LOSSES, Loss

# ---- losses: every example of every registered loss, so that a new file is tested without an edit here

EXAMPLES: list[Loss] = [example for cls in LOSSES.values() for example in cls.examples()]
# Margin losses, those whose slope never jumps, and those that never stop rising.
MARGIN = [l for l in EXAMPLES if hasattr(l, "minimiser")]
SMOOTH = [l for l in MARGIN if not l.kinks(0.0)]
ENDLESS = [l for l in MARGIN if not l.zeros(0.0)]

# (eta_W, eta_h)
REGIMES = {"both": (1.0, 1.0), "W frozen": (0.0, 1.3), "h frozen": (0.7, 0.0), "unequal": (0.3, 2.1)}


def losses(kind: list[Any] = MARGIN) -> st.SearchStrategy[Any]:
    """An example of the registry, or one of its classes with parameters drawn from their typical ranges."""

    def drawn(example: Any) -> st.SearchStrategy[Any]:
        cls = type(example)
        ranges = {f.name: st.floats(*f.metadata["domain"].typical) for f in dataclasses.fields(cls)}
        return st.builds(cls, **ranges)

    return st.sampled_from(kind) | st.sampled_from(kind).flatmap(drawn)


# ---- models


def random_model(
    rng: np.random.Generator, V: int = 5, d: int = 3, scale: float = 1.0, reference: float | None = None
) -> UnconstrainedFeatures:
    """Gaussian W and h; y+ = 0, y- = 1. `reference`: u_ref, when training does not start at the reference."""
    W, h = scale * rng.normal(size=(V, d)), scale * rng.normal(size=d)
    return UnconstrainedFeatures.single_token(W, h, 0, 1, reference=None if reference is None else (reference, 0.0))


def entries(bound: float = 2.0) -> st.SearchStrategy[float]:
    """Small numbers of few digits: ties, zeros and equal rows are common, subnormal noise is not."""
    coarse = st.integers(-8, 8).map(lambda n: n * bound / 8)
    fine = st.floats(-bound, bound, allow_subnormal=False).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
    return coarse | fine


@st.composite
def models(
    draw: st.DrawFn, min_tokens: int = 2, max_tokens: int = 6, max_dim: int = 4, bound: float = 2.0, reference: bool = True
) -> UnconstrainedFeatures:
    """Single-token models of small size; with `reference`, some do not start at their reference."""
    V, d = draw(st.integers(min_tokens, max_tokens)), draw(st.integers(1, max_dim))
    W = draw(hnp.arrays(np.float64, (V, d), elements=entries(bound)))
    h = draw(hnp.arrays(np.float64, (d,), elements=entries(bound)))
    plus, minus = draw(st.permutations(range(V)))[:2]
    u_ref = draw(st.none() | st.floats(-3, 3)) if reference else None
    return UnconstrainedFeatures.single_token(W, h, plus, minus, reference=None if u_ref is None else (u_ref, 0.0))


def rates(zero: bool = True) -> st.SearchStrategy[tuple[float, float]]:
    """(eta_W, eta_h), one of them possibly 0, with ratios over twelve decades."""
    some = st.floats(-6, 6).map(lambda e: 10.0**e) | st.sampled_from([1e-12, 0.5, 1.0, 2.0, 1e12])
    pairs = some.map(lambda kappa: (1.0, kappa) if kappa <= 1 else (1 / kappa, 1.0))
    frozen = st.sampled_from([(0.0, 1.0), (1.0, 0.0)])
    return pairs | frozen if zero else pairs


# ---- extremes that random draws never meet (exact_solution, point 10); kappa = 1 for those that need a ratio


def _model(W: Any, h: Any, **kwargs: Any) -> UnconstrainedFeatures:
    return UnconstrainedFeatures.single_token(np.array(W, dtype=float), np.array(h, dtype=float), 0, 1, **kwargs)


_A, _B = [0.6, -1.2, 0.4], [0.25, -0.75, 0.5]  # generic rows with short binary expansions where it matters
_A = [0.5, -1.25, 0.375]
_a = np.subtract(_A, _B)
_ROOT2 = math.sqrt(2.0)

EXTREMES: dict[str, UnconstrainedFeatures] = {
    # p = sqrt(2 eta_W) h + sqrt(eta_h) a = 0 to rounding: with integers below it is exactly 0
    "P = 0": _model([[2.0, 0.0], [0.0, 0.0], [0.3, 0.7], [-0.4, 1.1]], [-1.0, 0.0]),
    "Q = 0": _model([[2.0, 0.0], [0.0, 0.0], [0.3, 0.7], [-0.4, 1.1]], [1.0, 0.0]),
    "K0 = 0": _model([[0.5, 1.0], [0.5, 1.0], [0.3, 0.7]], [0.0, 0.0]),
    "a0 = 0": _model([[0.5, 1.0], [0.5, 1.0], [0.3, 0.7], [1.5, -0.2]], [0.8, -0.3]),
    "h0 = 0": _model([[0.5, 1.0], [-0.5, 0.2], [0.3, 0.7], [2.0, 1.5]], [0.0, 0.0]),
    # token 2 is aligned with W_+ - W_- exactly as y+ is: W frozen, the limit shares the mass
    "tie": _model([[1.0, 0.5], [-1.0, 0.5], [1.0, -2.0], [0.0, 0.3]], [0.2, 0.4]),
    "equal rows": _model([[1.0, 0.5], [-1.0, 0.5], [1.0, 0.5], [1.0, 0.5]], [0.2, 0.4]),
    "u0 far negative": _model([[-50.0, 0.0], [50.0, 1.0], [0.0, 2.0]], [100.0, 0.3]),
    "u0 far positive": _model([[50.0, 0.0], [-50.0, 1.0], [0.0, 2.0]], [100.0, 0.3]),
    "two tokens": _model([[0.4, 1.0], [-0.3, 0.2]], [0.7, -0.6]),
    "one dimension": _model([[0.4], [-0.3], [1.9]], [0.7]),
}
# With eta_W = 1, eta_h = 2 the roots are equal and P, Q vanish exactly in the first two.
EXTREME_RATES = {"P = 0": (2.0, 1.0), "Q = 0": (2.0, 1.0)}

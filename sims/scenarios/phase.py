"""Data behind two pictures of the scenario: where displacement lives, and where the flow points.

The phase diagram turns W_- in the plane of W_+ and W_- and walks one path per alignment and ratio of rates. The field
is the flow seen on the simplex of three tokens; in it the other tokens and their probabilities cancel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import softmax

from sims.scenarios._batch import deepest
from theory import ExactFlow, UnconstrainedFeatures
from theory.exact import margin_form
from theory.losses import Loss
from theory.losses.dpo import DPO
from theory.path import Path

Array = NDArray[np.float64]
Table = dict[str, list[Any]]

# The smallest and largest ratio eta_h / eta_W that `first_displacing_ratio` tells apart.
RATIOS = (1e-6, 1e6)
CURVE_POINTS = 361


@dataclass(frozen=True)
class PhaseDiagram:
    """Displacement over the ratio kappa = eta_h / eta_W (K values) and the cosine between W_+ and W_- (A values)."""

    kappa: Array  # (K,)
    cosine: Array  # (A,)
    depth: Array  # (A, K) lowest ln pi(y+) minus its start, nats, <= 0
    largest_drop: Array  # (A, K) largest fall of the probability pi(y+) from any time to any later one
    kappa_any: Array  # (A,) above it ln pi(y+) is below its start at some time
    curve_cosine: Array  # (C,) a finer grid of alignments, for the closed forms
    kappa_star: Array  # (C,) above it ln pi(y+) falls from the first instant; inf where it never does
    r_max: Array  # (C,) at most 1: no hidden vector and no ratio displaces at the start
    here: tuple[float, float]  # (kappa, cosine) of the model itself

    def table(self) -> Table:
        """One row per cell."""
        cosine, kappa = np.meshgrid(self.cosine, self.kappa, indexing="ij")
        columns = {"cosine": cosine, "kappa": kappa, "depth_nats": self.depth, "largest_drop": self.largest_drop}
        return {name: list(values.ravel()) for name, values in columns.items()}

    def curve_table(self) -> Table:
        """One row per alignment of the finer grid: the closed forms that bound the regions."""
        columns = {"cosine": self.curve_cosine, "kappa_star": self.kappa_star, "r_max": self.r_max}
        return {name: list(values) for name, values in columns.items()}


def cosine(x: Array, y: Array) -> float:
    """Cosine of the angle between two vectors."""
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))


def turned(m: UnconstrainedFeatures, cosines: ArrayLike) -> Array:
    """(A, V, d) copies of W in which W_- keeps its length and its plane with W_+, at the given cosines to W_+."""
    c = np.atleast_1d(np.asarray(cosines, dtype=np.float64))
    if c.ndim != 1 or not (np.abs(c) <= 1).all():
        raise ValueError(f"cosines must be a one-dimensional array in [-1, 1], got {cosines!r}")
    plus, minus = m.single_pair
    along = m.W[plus] / np.linalg.norm(m.W[plus])
    across = m.W[minus] - (m.W[minus] @ along) * along
    if np.linalg.norm(across) <= 1e-12 * np.linalg.norm(m.W[minus]):
        raise ValueError("W_+ and W_- must span a plane, they are parallel")
    across /= np.linalg.norm(across)
    W = np.repeat(m.W[None].astype(np.float64), len(c), axis=0)
    W[:, minus] = np.linalg.norm(m.W[minus]) * (c[:, None] * along + np.sqrt(1 - c**2)[:, None] * across)
    return W


def phase_diagram(m: UnconstrainedFeatures, kappa: ArrayLike, cosines: ArrayLike, here: float = 1.0) -> PhaseDiagram:
    """Walk every path of the diagram, to its end; `here` is the model's own ratio. It is the same for every margin loss
    without a finite minimiser (E2).

    The hidden vector stays, so pi(y-) at the start grows with the cosine. Depths are read off a grid of 241 points per
    path: tests hold them to 0.2 % + 1e-4 nats of the exact trough.
    """
    plus, minus = m.single_pair
    ratios = np.atleast_1d(np.asarray(kappa, dtype=np.float64))
    angles = np.atleast_1d(np.asarray(cosines, dtype=np.float64))
    W = turned(m, angles)
    paths = Paths(W, np.repeat(m.h[None].astype(np.float64), len(W), axis=0), plus, minus)
    looks = [deepest(paths.build(np.full(len(W), k))) for k in ratios]
    fine = np.linspace(angles[0], angles[-1], CURVE_POINTS)
    stars = [start_of_turned(m, w) for w in turned(m, fine)]
    return PhaseDiagram(
        kappa=ratios,
        cosine=angles,
        depth=np.stack([q.depth for q in looks], axis=1),
        largest_drop=np.stack([q.largest_drop for q in looks], axis=1),
        kappa_any=np.minimum(first_displacing_ratio(paths), [start_of_turned(m, w)[0] for w in W]),
        curve_cosine=fine,
        kappa_star=np.array([s[0] for s in stars]),
        r_max=np.array([s[1] for s in stars]),
        here=(float(here), cosine(m.W[plus], m.W[minus])),
    )


def start_of_turned(m: UnconstrainedFeatures, W: Array) -> tuple[float, float]:
    """(kappa*, r_max) of the model with another W."""
    flow = ExactFlow(UnconstrainedFeatures.single_token(W, m.h, *m.single_pair), DPO())
    return flow.kappa_star, flow.r_max


@dataclass(frozen=True)
class Paths:
    """A batch of A pairs whose ratio kappa is free: W (A, V, d), h (A, d), one pair of tokens."""

    W: Array
    h: Array
    plus: int
    minus: int

    def build(self, kappa: Array) -> Path:
        """The paths with ratio kappa (A,) each.

        (c W, h / c) with ratio 1 is the flow of (W, h) with ratio c^4, so that one batch holds many ratios.
        """
        c = kappa**0.25
        A = len(kappa)
        return Path.build(
            c[:, None, None] * self.W, self.h / c[:, None], np.full(A, self.plus), np.full(A, self.minus), 1.0, 1.0
        )


def first_displacing_ratio(paths: Paths, tolerance: float = 1e-9) -> Array:
    """(A,) smallest kappa at which ln pi(y+) is ever below its start by more than `tolerance`, by bisection.

    inf where the largest of RATIOS does not displace, the smallest of them where even that does.
    """
    low, high = (np.full(len(paths.W), np.log(r)) for r in RATIOS)
    displaces = lambda x: deepest(paths.build(np.exp(x))).depth < -tolerance  # noqa: E731
    never, always = ~displaces(high), displaces(low)
    for _ in range(20):
        middle = (low + high) / 2
        falls = displaces(middle)
        low, high = np.where(falls, low, middle), np.where(falls, middle, high)
    return np.where(never, np.inf, np.where(always, RATIOS[0], np.exp(high)))


@dataclass(frozen=True)
class SimplexField:
    """Instantaneous velocities on the simplex of three tokens at one frozen W.

    Every point of the simplex stands for the hidden vector nearest to the model's own that gives the three tokens these
    log-odds. The path crosses the field of a given W only at the moment at which it has this W: draw them together for
    several moments.
    """

    names: tuple[str, ...]
    points: Array  # (N, 3) probabilities among the three, summing to 1
    velocity: Array  # (N, 3) their rates of change per unit of time, summing to 0
    margin: float  # u of the model whose W this is, nats
    here: Array  # (3,) the model's own probabilities among the three

    def table(self) -> Table:
        """One row per point."""
        columns = {f"p({n})": self.points[:, i] for i, n in enumerate(self.names)}
        columns |= {f"dp({n})/dt": self.velocity[:, i] for i, n in enumerate(self.names)}
        return {"margin": [self.margin] * len(self.points)} | {name: list(v) for name, v in columns.items()}


def simplex_grid(divisions: int) -> Array:
    """(N, 3) interior points of the simplex on a triangular lattice, kept off the edges by half a cell."""
    if divisions < 2:
        raise ValueError(f"divisions must be at least 2, got {divisions!r}")
    i, j = np.meshgrid(np.arange(divisions), np.arange(divisions), indexing="ij")
    inside = i + j < divisions
    a, b = i[inside] + 1 / 3, j[inside] + 1 / 3
    return np.stack([a, b, divisions - a - b], axis=1) / divisions


def hidden_at(m: UnconstrainedFeatures, tokens: Sequence[int], points: Array) -> Array:
    """(N, d) hidden vectors nearest to the model's own with the given probabilities (N, 3) among three tokens."""
    rows = m.W[list(tokens)].astype(np.float64)
    differences = rows[:2] - rows[2]
    wanted = np.log(points[:, :2] / points[:, 2:])
    return m.h + (wanted - differences @ m.h) @ np.linalg.pinv(differences).T


def simplex_field(
    m: UnconstrainedFeatures, loss: Loss, tokens: Sequence[int], kappa: float = 1.0, divisions: int = 16
) -> SimplexField:
    """The field of gradient flow (eta_W = 1, eta_h = kappa) on the simplex of y+, y- and a third token, W as in `m`.

    With q the probabilities renormalised among the three, dq_i/dt = q_i (L_i - sum_j q_j L_j) where
    L_z = G(u) [kappa <W_z, W_+ - W_-> + |h|^2 (e_+ - e_-)_z] are the rates of their logits.
    """
    plus, minus = m.single_pair
    if tuple(tokens[:2]) != (plus, minus) or len(tokens) != 3 or tokens[2] in (plus, minus):
        raise ValueError(f"tokens must be y+, y- and a third, ({plus}, {minus}, z), got {tuple(tokens)}")
    q = simplex_grid(divisions)
    h = hidden_at(m, tokens, q)
    W = m.W[list(tokens)].astype(np.float64)
    G = margin_form(m, loss).slope(np.log(q[:, 0] / q[:, 1]))
    own = (h**2).sum(axis=1)[:, None] * np.array([1.0, -1.0, 0.0])
    rates = G[:, None] * (kappa * (W @ (W[0] - W[1])) + own)
    velocity = q * (rates - (q * rates).sum(axis=1, keepdims=True))
    logits = W @ m.h
    return SimplexField(tuple(m.name(z) for z in tokens), q, velocity, float(logits[0] - logits[1]), softmax(logits))


def simplex_path(flow: ExactFlow, tokens: Sequence[int], margins: ArrayLike) -> Array:
    """(T, 3) exact probabilities among three tokens where the margin is as given."""
    return softmax(flow.log_probs_at_margin(margins)[:, list(tokens)], axis=1)

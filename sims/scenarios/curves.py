"""Data behind the figures of the scenario that are read off one exact flow: curves, bars and marks. No drawing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from sims.scenarios.no_never_yes import Curve, LossRow
from theory import Displacement, ExactFlow
from theory.displacement import Point

Array = NDArray[np.float64]
Table = dict[str, list[Any]]
Role = Literal["preferred", "dispreferred", "benign", "catastrophic", "neutral"]

# Words that give the same answer: a gain within the family of y+ is benign, in the opposite one catastrophic.
DENIALS = ("No", " No", "no", "Nope", "Never")
AFFIRMATIONS = ("Yes", " Yes", "yes", "Sure")


def role(name: str, preferred: str, dispreferred: str) -> Role:
    """What a token is to a pair: a matter of meaning, not of mathematics (the paper's benign and catastrophic)."""
    if name == preferred:
        return "preferred"
    if name == dispreferred:
        return "dispreferred"
    for same, opposite in ((DENIALS, AFFIRMATIONS), (AFFIRMATIONS, DENIALS)):
        if preferred in same and name in same:
            return "benign"
        if preferred in same and name in opposite:
            return "catastrophic"
    return "neutral"


@dataclass(frozen=True)
class Story:
    """ln pi of every token along the exact flow, from near the start until y+ is back, with simulated points on it."""

    tokens: tuple[str, ...]
    preferred: int
    dispreferred: int
    log_times: Array  # (T,) ln t
    margin: Array  # (T,) u, nats
    log_probs: Array  # (T, V)
    simulated: tuple[Curve, ...]  # from other routes
    trough: Point
    last_return: Point | None

    def table(self) -> Table:
        """One row per point of every route: method, ln t, margin, ln pi of each token."""
        rows = [("exact", self.log_times, self.margin, self.log_probs)]
        with np.errstate(divide="ignore"):
            rows += [(c.method, np.log(c.times), c.margin, c.log_probs) for c in self.simulated]
        log_probs = np.concatenate([r[3] for r in rows])
        return {
            "method": [r[0] for r in rows for _ in r[1]],
            "log_time": [t for r in rows for t in r[1]],
            "margin": [u for r in rows for u in r[2]],
        } | {f"ln pi({name})": list(log_probs[:, z]) for z, name in enumerate(self.tokens)}


def story(flow: ExactFlow, displacement: Displacement, simulated: tuple[Curve, ...] = (), points: int = 600) -> Story:
    """The exact curves of a flow from t = 0.01 to well after the last return (or the trough, or t = 100)."""
    last = displacement.last_return or displacement.trough
    until = last.log_time if np.isfinite(last.log_time) else 0.0
    grid = np.linspace(np.log(0.01), max(1.12 * until, np.log(100.0)), points)
    plus, minus = flow.model.single_pair
    return Story(
        tokens=tuple(flow.model.name(z) for z in range(flow.model.V)),
        preferred=plus,
        dispreferred=minus,
        log_times=grid,
        margin=flow.margin(log_times=grid),
        log_probs=flow.log_probs(log_times=grid),
        simulated=simulated,
        trough=displacement.trough,
        last_return=displacement.last_return,
    )


@dataclass(frozen=True)
class Gains:
    """Who gains, token by token: Theorem 2's prediction and what happens, in decreasing order of the prediction."""

    tokens: tuple[str, ...]
    roles: tuple[Role, ...]
    alignment: Array  # (V,) <W_z, W_+ - W_-> at the start
    start: Array  # (V,) ln pi
    trough: Array  # (V,) ln pi where ln pi(y+) is lowest
    end: Array  # (V,) ln pi as t goes to infinity, -inf for tokens that vanish

    @property
    def log_change(self) -> Array:
        """(V,) change of ln pi from the start to the trough, nats."""
        return self.trough - self.start

    @property
    def rank_correlation(self) -> float:
        """Spearman correlation of prediction and `log_change` over the tokens Theorem 2 speaks of (not y+, y-)."""
        others = [r not in ("preferred", "dispreferred") for r in self.roles]
        return float(spearmanr(self.alignment[others], self.log_change[others]).statistic)  # type: ignore[union-attr]

    def table(self) -> Table:
        """One row per token."""
        out: Table = {"token": list(self.tokens), "role": list(self.roles), "alignment": list(self.alignment)}
        for name, values in (("start", self.start), ("trough", self.trough), ("end", self.end)):
            out[f"ln pi at {name}"] = list(values)
        return out


def gains(flow: ExactFlow, displacement: Displacement) -> Gains:
    """Changes of every token at the trough and at the end of a flow."""
    model = flow.model
    plus, minus = (model.name(z) for z in model.single_pair)
    order = np.argsort(-flow.alignment, kind="stable")
    names = tuple(model.name(int(z)) for z in order)
    start, trough = flow.log_probs_at_margin([flow.start_margin, displacement.trough.margin])
    return Gains(
        tokens=names,
        roles=tuple(role(n, plus, minus) for n in names),
        alignment=flow.alignment[order],
        start=start[order],
        trough=trough[order],
        end=flow.limit_log_probs()[order],
    )


@dataclass(frozen=True)
class LossMarks:
    """ln pi(y+) over the margin, the same for every margin loss, and where each loss stops on it."""

    preferred: str
    margin: Array  # (T,) nats
    log_prob: Array  # (T,) nats
    rows: tuple[LossRow, ...]
    last_return: Point | None

    def table(self) -> Table:
        """One row per loss."""
        return {
            "loss": [r.loss for r in self.rows],
            "status": [r.status for r in self.rows],
            "stop_margin": [r.stop_margin for r in self.rows],
            "log_prob_at_end": [r.log_prob_at_end for r in self.rows],
        }

    def path_table(self) -> Table:
        """The common path."""
        return {"margin": list(self.margin), f"ln pi({self.preferred})": list(self.log_prob)}


def loss_marks(flow: ExactFlow, displacement: Displacement, rows: tuple[LossRow, ...], points: int = 400) -> LossMarks:
    """The common path of `rows`, up to a little beyond the last return and the last finite stop."""
    last = displacement.last_return or displacement.trough
    finite = [r.stop_margin for r in rows if np.isfinite(r.stop_margin)]
    far = max(u for u in (*finite, last.margin, flow.start_margin + 1) if np.isfinite(u))
    margins = flow.start_margin + (far - flow.start_margin) * np.linspace(0, 1.12, points)
    plus = flow.model.single_pair[0]
    return LossMarks(
        flow.model.name(plus), margins, flow.log_probs_at_margin(margins)[:, plus], rows, displacement.last_return
    )


@dataclass(frozen=True)
class Forecast:
    """What is drawn of a pair on a real matrix before any training."""

    tokens: tuple[str, ...]  # y+, y-, then who gains or is most aligned
    margin: Array  # (T,) nats
    log_probs: Array  # (T, len(tokens))
    bars: tuple[str, ...]  # the most and the least aligned tokens, y+ and y-
    alignment: Array  # (len(bars),) <W_z, W_+ - W_->, decreasing


def forecast(
    flow: ExactFlow, displacement: Displacement, names: Sequence[str] | None = None, top: int = 5, points: int = 256
) -> Forecast:
    """The exact curves of y+, y- and `top` other tokens, and the alignments of 2 `top` + 4 tokens.

    names : (V,) labels of the tokens; default those of the model.
    """
    names = [flow.model.name(z) for z in range(flow.model.V)] if names is None else names
    if len(names) != flow.model.V:
        raise ValueError(f"names must label all {flow.model.V} tokens, got {len(names)}")
    pair = flow.model.single_pair
    ranked = [int(z) for z in np.argsort(-flow.alignment, kind="stable")]
    gainers = [g.token for g in (*displacement.gainers_at_trough, *displacement.gainers_at_end)]
    drawn = [*pair, *[z for z in dict.fromkeys([*gainers, *ranked]) if z not in pair][:top]]
    margins = forecast_margins(flow, displacement, points)
    # All V tokens are needed at each margin, but only a few margins at a time.
    log_probs = [flow.log_probs_at_margin(u)[:, drawn] for u in np.array_split(margins, 16)]
    bars = sorted({*ranked[: 2 * top], *pair, *ranked[-2:]}, key=lambda z: -flow.alignment[z])
    return Forecast(
        tuple(names[z] for z in drawn),
        margins,
        np.concatenate(log_probs),
        tuple(names[z] for z in bars),
        flow.alignment[bars],
    )


def forecast_margins(flow: ExactFlow, displacement: Displacement, points: int) -> Array:
    """(T,) margins from the start to the stop, or to where the picture is complete if the path has no end."""
    start = flow.start_margin
    if np.isfinite(flow.stop_margin):
        return np.linspace(start, flow.stop_margin, points)
    if displacement.last_return is not None:
        far = abs(displacement.last_return.margin - start)
    else:
        far, plus = 1.0, flow.model.single_pair[0]
        while far < 1e6:  # until ln pi(y+) has settled at 0 or is far below its start
            log_p = float(flow.log_probs_at_margin([start + flow.direction * far])[0, plus])
            if log_p > -0.01 or log_p < displacement.start.log_prob - 20:
                break
            far *= 1.5
    return start + flow.direction * far * np.linspace(0.0, 1.12, points)

"""No / Never / Yes: a geometry of words in which preferring `No` over `Never` makes `Yes` win.

Every token is a few coordinates on interpretable directions, read off how the word is used; the same geometry, rates
and loss serve every part of the study. The numbers are chosen, not measured: how much depends on them is what the noise
study reports. The benign case (c) hangs on one small tilt, that a Yes inside a text affirms slightly more than the Yes
that opens a turn (-1.07 against -1.0); without it r_max of Yes over No is exactly 1 and nothing is displaced there.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims.descent import Optimizer, gradient_descent
from sims.flow import gradient_flow
from sims.scenarios._batch import deepest
from theory import Displacement, ExactDescent, ExactFlow, UnconstrainedFeatures
from theory._check import check_count
from theory.losses import Loss, get
from theory.path import Path

Array = NDArray[np.float64]

# What each direction stands for. They are orthonormal.
DIRECTIONS = {
    "negation": "denies (+) or affirms (-)",
    "answer": "stands alone as the whole reply to a yes/no question",
    "adverb": "says how often: never, sometimes, always; also 'no longer', 'no more'",
    "hedge": "leaves the answer open",
    "spelling": "lower case or with a leading space, as inside a sentence",
    "function": "frequent grammatical word (+) or colloquial and rare (-)",
}

# token: (coordinates, why)
WORDS: dict[str, tuple[tuple[float, ...], str]] = {
    "No": ((1.0, 0.80, 0.40, 0.0, 0.0, 0.3), "the plain denial; also a determiner, and an adverb in 'no longer'"),
    "Never": ((1.3, 0.40, 1.00, 0.0, 0.0, 0.0), "a stronger denial, but first of all an adverb of frequency"),
    "Yes": ((-1.0, 1.20, 0.00, 0.0, 0.0, 0.0), "affirms, and is hardly used except as an answer"),
    " No": ((1.0, 0.80, 0.40, 0.0, 0.6, 0.3), "No inside a text"),
    "no": ((1.0, 0.70, 0.40, 0.0, 0.9, 0.5), "No in lower case: more often the determiner"),
    "Nope": ((1.0, 0.80, 0.20, 0.0, 0.3, -0.6), "a colloquial No"),
    " Yes": ((-1.07, 1.23, -0.07, 0.0, 0.6, 0.0), "Yes inside a text, without the 'Yes, but ...' that opens a turn"),
    "yes": ((-1.07, 1.13, -0.07, 0.0, 0.9, 0.1), "the same in lower case"),
    "Sure": ((-0.7, 0.90, 0.00, 0.2, 0.0, -0.3), "a casual, slightly hedged Yes"),
    "Maybe": ((0.0, 0.70, 0.10, 1.0, 0.0, 0.0), "an answer that hedges"),
    "Perhaps": ((0.0, 0.50, 0.20, 1.1, 0.0, 0.0), "the same, more often inside a sentence"),
    "Always": ((-1.3, 0.40, 1.00, 0.0, 0.0, 0.0), "Never's mirror image"),
    "Sometimes": ((0.1, 0.40, 1.00, 0.5, 0.0, 0.0), "an adverb of frequency that hedges"),
    "the": ((0.0, -0.60, 0.00, 0.0, 1.0, 1.2), "neutral: grammar"),
    "and": ((0.0, -0.40, 0.00, 0.0, 1.0, 1.1), "neutral: grammar"),
    "apple": ((0.0, -0.50, -0.20, 0.0, 1.0, -0.6), "neutral: a noun"),
}
TOKENS = tuple(WORDS)

# The hidden vector at the start of the reply: a short answer is expected, and it is usually a denial. The second is the
# same for a question that is usually affirmed.
QUESTION = (2.8, 9.0, 0.5, -1.0, -4.5, 1.5)
AFFIRMED_QUESTION = (-0.9, 9.0, 0.2, -1.0, -4.0, 1.5)

# (cW, h/c) with kappa c^-4 is the same flow: SCALE only sets which kappa the numbers below refer to.
SCALE = 6.0
KAPPA = 2.0  # eta_h / eta_W; networks whose body moves the hidden vector quickly have it large
BETA = 0.1
T_END = 20.0
STEP = 0.02
SIZES = (0.01, 0.03, 0.1, 0.2, 0.3)


def geometry() -> Array:
    """(16, 6) unembeddings of TOKENS."""
    return SCALE * np.array([coordinates for coordinates, _ in WORDS.values()])


def model(preferred: str = "No", dispreferred: str = "Never") -> UnconstrainedFeatures:
    """The scenario's model for a pair; y+ that affirms is asked the question that is usually affirmed."""
    affirms = WORDS[preferred][0][0] < 0 if preferred in WORDS else False
    hidden = np.array(AFFIRMED_QUESTION if affirms else QUESTION) / SCALE
    return UnconstrainedFeatures.single_token(geometry(), hidden, preferred, dispreferred, TOKENS)


@dataclass(frozen=True)
class Curve:
    """Log-probabilities along one run: times (T,), margin (T,), log_probs (T, V)."""

    method: str
    times: Array
    margin: Array
    log_probs: Array


@dataclass(frozen=True)
class LossRow:
    """What one loss does on the common path."""

    loss: str
    status: str
    stop_margin: float
    stop_log_time: float
    log_prob_at_end: float
    final_change: float
    largest_drop: float


@dataclass(frozen=True)
class Robustness:
    """Share of randomly perturbed geometries in which the effect is still there."""

    size: float  # standard deviation of the noise relative to the rms entry of W, and of h
    draws: int
    falls: float  # pi(No) later falls by at least 0.2
    falls_to_yes: float  # and a spelling of Yes gains most at the trough


@dataclass(frozen=True)
class NoNeverYes:
    """The whole study; `report()` is the text that `displacement demo` prints."""

    tokens: tuple[str, ...]
    start: dict[str, float]
    main: Displacement
    below: Displacement
    kappa_below: float
    lead_by_direction: dict[
        str, float
    ]  # <W_Yes - W_No, a>/|a|^2 (nats of lead per nat of margin), direction by direction
    kappa_any: float  # the smallest ratio at which pi(No) falls below its start at any time
    benign: Displacement
    frozen: Displacement
    curves: tuple[Curve, ...]
    worst_flow: float  # largest |exact - integrated| ln pi at the times looked at
    worst_descent: float  # largest |exact descent - torch SGD|
    paper_drop: float  # largest later drop of pi(No) within [0, T_END]
    paper_final: float  # change of ln pi(No) at T_END
    losses: tuple[LossRow, ...]
    robustness: tuple[Robustness, ...]
    parameters: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; curves as nested lists."""
        out = asdict(self)
        for curve in out["curves"]:
            for key in ("times", "margin", "log_probs"):
                curve[key] = curve[key].tolist()
        return out

    def report(self) -> str:
        """A table for a terminal."""
        main, back = self.main, self.main.last_return
        lead = ", ".join(f"{k} {v:+.2f}" for k, v in self.lead_by_direction.items() if abs(v) > 5e-3)
        lines = [
            "Training by DPO to prefer No over Never: exact gradient flow",
            "",
            f"  start: {', '.join(f'{_quoted(t)} {v:.3f}' for t, v in list(self.start.items())[:4])}",
            f"  (a) both trained, kappa = {main.kappa:g} (kappa* = {main.kappa_star:.3g}, r_max = {main.r_max:.2f})",
            f"      {_course(main)}",
            f"      why Yes: <W_Yes - W_No, a>/|a|^2 = {sum(self.lead_by_direction.values()):.2f} = {lead}",
            f"      largest later drop of pi(No) within t = {T_END:g}: {self.paper_drop:.3f} (the paper's statistic)",
            f"      ln pi(No) at t = {T_END:g} minus its start: {self.paper_final:+.3f} (the paper's Definition 1)",
            f"  (b) kappa = {self.kappa_below:.3g}: {self.below.status}",
            f"      (pi(No) dips below its start from kappa = {self.kappa_any:.3g} on, at once from kappa* on)",
            f"  (c) Yes over No, benign: {_course(self.benign)}",
            "  (d) other losses on the same path:",
        ]
        for row in self.losses:
            lines.append(
                f"      {row.loss:28} stops at margin {row.stop_margin:8.4g}, {row.status:9}: "
                f"ln pi(No) {row.final_change:+9.3f} at the end"
            )
        returned = f"back at its start at ln t = {back.log_time:.1f}, margin {back.margin:.0f}" if back else "no return"
        lines += [
            f"  (e) full training: {main.status}, {returned}",
            f"      W frozen: {self.frozen.status}, pi(No) -> {np.exp(self.frozen.end.log_prob):.2g}",
            f"  exact against integrated (autodiff, DOP853): {self.worst_flow:.1e} nats at worst",
            f"  exact descent against torch SGD: {self.worst_descent:.1e} nats at worst",
            "  noise on the geometry, share of draws in which pi(No) falls by 0.2 (and a Yes gains most):",
        ]
        for r in self.robustness:
            lines.append(f"      {r.size:4.0%} of rms: {r.falls:4.0%} ({r.falls_to_yes:.0%}) of {r.draws}")
        return "\n".join(lines)


def _quoted(token: str) -> str:
    """The token, in quotes where its leading space would not show."""
    return repr(token) if token != token.strip() else token


def _course(d: Displacement) -> str:
    """Status, pi(y+) at start, trough and end, and who gains at the trough."""
    start, trough, end = (np.exp(p.log_prob) for p in (d.start, d.trough, d.end))
    gainers = ", ".join(f"{_quoted(g.name)} {g.then:.2f}" for g in d.gainers_at_trough[:2])
    return f"{d.status}: pi(y+) {start:.3f} -> {trough:.2g} -> {end:.3g}; at the trough {gainers or 'nobody gains'}"


def no_never_yes(draws: int = 500, seed: int = 0, loss: Loss | None = None) -> NoNeverYes:
    """Run the study. `draws` random geometries per noise size; `loss` defaults to DPO with beta = 0.1."""
    check_count(draws, "draws")
    loss = get("dpo", beta=BETA) if loss is None else loss
    m = model()
    flow = ExactFlow(m, loss, 1.0, KAPPA)
    main = flow.displacement()
    p = np.exp(m.next_token_log_probs())
    kappa_any = smallest_displacing_ratio(m, loss, flow.kappa_star)
    kappa_below = min(kappa_any, flow.kappa_star) / 2
    curves, worst_flow, worst_descent = simulate(m, loss, flow)
    fine = np.exp(flow.log_probs(np.linspace(0, T_END, 4001))[:, TOKENS.index("No")])
    return NoNeverYes(
        tokens=TOKENS,
        start={TOKENS[i]: float(p[i]) for i in np.argsort(-p)},
        main=main,
        below=ExactFlow(m, loss, 1.0, kappa_below).displacement(),
        kappa_below=kappa_below,
        lead_by_direction=lead_by_direction(m),
        kappa_any=kappa_any,
        benign=ExactFlow(model("Yes", "No"), loss, 1.0, KAPPA).displacement(),
        frozen=ExactFlow(m, loss, 0.0, KAPPA).displacement(),
        curves=curves,
        worst_flow=worst_flow,
        worst_descent=worst_descent,
        paper_drop=float((np.maximum.accumulate(fine) - fine).max()),
        paper_final=float(np.log(fine[-1] / fine[0])),
        losses=other_losses(m),
        robustness=tuple(robustness(m, size, draws, seed) for size in SIZES),
        parameters={
            "beta": BETA,
            "kappa": KAPPA,
            "scale": SCALE,
            "t_end": T_END,
            "step": STEP,
            "seed": seed,
            "loss": repr(loss),
        },
    )


def lead_by_direction(m: UnconstrainedFeatures) -> dict[str, float]:
    """How <W_Yes - W_No, a>/|a|^2 splits over the directions: positive ones favour Yes as the margin grows."""
    plus, minus = m.single_pair
    a = m.W[plus] - m.W[minus]
    share = (m.W[TOKENS.index("Yes")] - m.W[plus]) * a / (a @ a)
    return {name: float(x) for name, x in zip(DIRECTIONS, share, strict=True)}


def smallest_displacing_ratio(m: UnconstrainedFeatures, loss: Loss, kappa_star: float) -> float:
    """The kappa at which the status leaves "none", by bisection in ln kappa to four digits."""
    hi = kappa_star if np.isfinite(kappa_star) else 1e3
    lo = hi / 1e4
    displaces = lambda kappa: ExactFlow(m, loss, 1.0, kappa).displacement().status != "none"  # noqa: E731
    if not displaces(hi):
        return np.inf
    while hi / lo > 1.0001:
        mid = float(np.sqrt(lo * hi))
        lo, hi = (lo, mid) if displaces(mid) else (mid, hi)
    return hi


def simulate(m: UnconstrainedFeatures, loss: Loss, flow: ExactFlow) -> tuple[tuple[Curve, ...], float, float]:
    """The exact curve, the integrated one and gradient descent, with the two largest differences between routes."""
    dense = np.linspace(0.0, T_END, 401)
    exact = Curve("exact", dense, flow.margin(dense), flow.log_probs(dense))
    at = np.linspace(0.0, T_END, 21)
    run = gradient_flow(m, loss, at, 1.0, KAPPA, rtol=1e-12, atol=1e-13)
    integrated = Curve("integrated", at, run.margin(), run.next_token_log_probs())
    steps = round(T_END / STEP)
    every = steps // 20
    sgd = gradient_descent(m, loss, Optimizer("sgd", STEP), steps, 1.0, KAPPA, every=every)
    descent = Curve("gradient descent", sgd.times * STEP, sgd.margin(), sgd.next_token_log_probs())
    closed = ExactDescent(m, loss, STEP, steps, lr_hidden=KAPPA).log_probs(sgd.times.astype(int))
    worst_flow = float(np.abs(flow.log_probs(at) - integrated.log_probs).max())
    return (exact, integrated, descent), worst_flow, float(np.abs(closed - descent.log_probs).max())


def other_losses(m: UnconstrainedFeatures) -> tuple[LossRow, ...]:
    """DPO, IPO, SLiC and cDPO with parameters of the size used in practice."""
    rows = []
    for name, parameters in (
        ("dpo", {"beta": BETA}),
        ("cdpo", {"beta": BETA, "eps": 0.1}),
        ("ipo", {"tau": 0.01}),
        ("ipo", {"tau": 0.1}),
        ("slic", {"delta": 5.0}),
        ("slic", {"delta": 15.0}),
    ):
        loss = get(name, **parameters)
        d = ExactFlow(m, loss, 1.0, KAPPA).displacement()
        rows.append(
            LossRow(repr(loss), d.status, d.end.margin, d.end.log_time, d.end.log_prob, d.final_change, d.largest_drop)
        )
    return tuple(rows)


def robustness(m: UnconstrainedFeatures, size: float, draws: int, seed: int) -> Robustness:
    """Perturb every coordinate of W and h by Gaussian noise of `size` times their rms and look at the path again."""
    rng = np.random.default_rng([seed, round(1e6 * size)])
    rms = lambda x: float(np.sqrt((x**2).mean()))  # noqa: E731
    W = m.W + size * rms(m.W) * rng.standard_normal((draws, *m.W.shape))
    h = m.h + size * rms(m.h) * rng.standard_normal((draws, m.d))
    plus, minus = m.single_pair
    path = Path.build(W, h, np.full(draws, plus), np.full(draws, minus), 1.0, KAPPA)
    look = deepest(path)
    yes = [i for i, t in enumerate(TOKENS) if t.strip().lower() == "yes"]
    falls = look.largest_drop >= 0.2
    to_yes = falls & np.isin(look.top_gainer, yes)
    return Robustness(size, draws, float(falls.mean()), float(to_yes.mean()))

"""Conditions for likelihood displacement, as functions on any model and any loss of two log-probabilities.

Each takes a `Problem` (one model, or a batch of one shape) and returns a frozen record of arrays, one entry per model;
`conditions(model, loss)` puts them side by side for one model: why ln pi(y+) falls, and which remedy is enough.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from theory.conditions._divergence import Resistance, divergence_resistance
from theory.conditions._pair import (
    Band,
    Entanglement,
    IncentiveRatio,
    Thresholds,
    disentanglement_band,
    displacement_signs,
    gradient_entanglement,
    incentive_ratio,
    ratio_kind,
    thresholds,
)
from theory.conditions._record import Record, pair_of
from theory.conditions._tokens import (
    SignStep,
    Squeezing,
    Suffix,
    logit_pulls,
    sign_first_step,
    squeezing,
    suffix_condition,
)
from theory.losses import Loss, Pair
from theory.model import UnconstrainedFeatures
from theory.problem import Problem

__all__ = [
    "Band",
    "Conditions",
    "Entanglement",
    "IncentiveRatio",
    "Resistance",
    "SignStep",
    "Squeezing",
    "Suffix",
    "Thresholds",
    "conditions",
    "disentanglement_band",
    "displacement_signs",
    "divergence_resistance",
    "gradient_entanglement",
    "incentive_ratio",
    "logit_pulls",
    "ratio_kind",
    "sign_first_step",
    "squeezing",
    "suffix_condition",
    "thresholds",
]


@dataclass(frozen=True, repr=False)
class Conditions(Record):
    """Every condition at the parameters of one model, for one of its samples.

    rate_w, rate_l : d/dt of ln pi(y+) and ln pi(y-) under gradient flow of the whole objective; own_w : what the sample
    itself contributes to the first. squeezing : a push on y- alone, in the context where the responses part (None if y-
    ends there); gainers : names of tokens that it lifts. resistance : of a loss with a `link` (f-DPO).
    """

    title: str
    rate_w: float
    rate_l: float
    own_w: float
    ratio: IncentiveRatio
    entanglement: Entanglement
    band: Band
    thresholds: Thresholds
    suffix: Suffix
    squeezing: Squeezing | None
    gainers: tuple[str, ...]
    first_step: SignStep
    resistance: Resistance | None

    @property
    def displaced(self) -> bool:
        """Whether ln pi(y+) falls at these parameters."""
        return self.rate_w < 0

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        rows = [
            ("d/dt ln pi(y+)", f"{self.rate_w:+.4g} {_way(self.rate_w)}"),
            ("d/dt ln pi(y-)", f"{self.rate_l:+.4g} {_way(self.rate_l)}"),
        ]
        if self.own_w != self.rate_w:
            rows.append(("  of which this sample", f"{self.own_w:+.4g}, others {self.rate_w - self.own_w:+.4g}"))
        rows += [
            ("incentives", f"{self.ratio}"),
            ("gradients", f"{self.entanglement}"),
            ("  angle and lengths", f"rho = {self.band.rho[0]:.4g}, r* = |g-|/|g+| = {self.band.r_star[0]:.4g}"),
            ("band for r", _of_band(self.band)),
            ("shared suffix", f"{self.suffix}"),
        ]
        if self.squeezing is not None:
            above = f"to first order those with pi > {self.squeezing.threshold:.4g}"
            rows.append(("push on y- alone", f"lifts {', '.join(self.gainers) or 'none'}; {above}"))
        if self.resistance is not None:
            rows.append(("f-divergence", f"{self.resistance}"))
        rows += [
            ("first step of RMSprop, Adam", f"{self.first_step} per unit of step: {_way(self.first_step.change_w[0])}"),
            ("enough for this sample", _remedies(self.thresholds, self.band)),
        ]
        return "\n".join([self.title, *(f"  {name:28} {text}" for name, text in rows)])


def _way(rate: Any) -> str:
    return "falls" if rate < 0 else "rises" if rate > 0 else "rests"


def _of_band(band: Band) -> str:
    where = {
        (True, True): "inside: y+ does not fall, y- does not rise",
        (False, True): "below: y- drags y+ down",
        (True, False): "above: y+ lifts y- up",
        (False, False): "outside: the loss pulls the wrong way",
    }[bool(band.winner_safe[0]), bool(band.loser_suppressed[0])]
    return f"{band} (edges at -1 and 1), {where}"


def _remedies(t: Thresholds, band: Band) -> str:
    if t.sft[0] == 0:
        return "nothing: it does not push its y+ down"
    boost = f"{t.boost[0]:.4g} times d_w" if np.isfinite(t.boost[0]) else "no factor on d_w"
    calibrated = f", calibration c = {band.calibration[0]:.4g}" if band.calibration[0] != 1 else ""
    return (
        f"SFT weight {t.sft[0]:.4g} on ln pi(y+) ({t.sft_per_token[0]:.4g} on its mean per token), or weights"
        f" lambda+/lambda- of a margin loss {t.weight_ratio[0]:.4g}, or {boost}{calibrated}"
    )


def conditions(
    model: UnconstrainedFeatures,
    loss: Loss,
    sample: int = 0,
    *,
    lr_unembedding: float = 1.0,
    lr_hidden: float = 1.0,
) -> Conditions:
    """Why ln pi(y+) of a sample falls (or does not) at the model's parameters, and what would be enough to stop it.

    Raises
    ------
    ValueError : a sample out of range, bad rates, a loss without incentives (one that looks at single tokens), or one
        whose incentives overflow here.
    """
    problem = Problem.of(model, loss, lr_unembedding, lr_hidden)
    w, l = pair_of(problem, sample)
    if not np.isfinite(problem.incentives).all():
        d_w, d_l = (d[0].tolist() for d in problem.incentives)
        raise ValueError(f"loss must have finite incentives at these log-probabilities, got {d_w}, {d_l} for {loss!r}")
    chosen, (a_ref, b_ref) = model.samples[sample], problem.references[0, sample]
    ratio_r = problem.norm_ratios[0, sample]
    a, b = (float(problem.log_prob(y)[0]) for y in (w, l))
    pair = Pair(*map(np.float64, (a, b, a_ref, b_ref, len(w.tokens), len(l.tokens), ratio_r)))
    # The incentives of this sample among all: a loss may couple them.
    d_w, d_l = (d[0, sample] for d in problem.incentives)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = replace(incentive_ratio(loss, pair), d_w=d_w, d_l=d_l, r=d_w / d_l)
    parting = next((k for k, t in enumerate(l.tokens) if k >= len(w.tokens) or w.tokens[k] != t), None)
    names = (" ".join(model.name(t) for t in y) for y in (chosen.preferred, chosen.dispreferred))
    link = getattr(loss, "link", None)
    squeezed = None if parting is None else squeezing(problem.log_pi[0, l.rows[parting]], l.tokens[parting])
    return Conditions(
        f"{' > '.join(names)}, {loss!r}",
        float(problem.rate(w)[0]),
        float(problem.rate(l)[0]),
        float(problem.rate_by_sample(w)[0, sample]),
        ratio,
        gradient_entanglement(problem, sample),
        disentanglement_band(problem, sample),
        thresholds(problem, sample),
        suffix_condition(problem, sample),
        squeezed,
        () if squeezed is None else tuple(model.name(z) for z in squeezed.gains[:8]),
        sign_first_step(problem, sample),
        None if link is None else divergence_resistance(link),
    )

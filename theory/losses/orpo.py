"""Odds ratio preference optimisation: the likelihood of y+ and the odds of y+ against y-, in one loss."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE, Interval
from theory.losses._base import Claims, Loss, Pair, parameter
from theory.ops import NumpyOps, Ops, TorchOps

_CLAIMS = Claims(convex=False, reference_free=True)


def log_odds(ops: Ops, t: Any) -> Any:
    """ln(p/(1-p)) of p = e^t, t <= 0."""
    if isinstance(ops, NumpyOps | TorchOps):  # where p has rounded to 1: 690 for inf, so that no slope is inf times 0
        return t - ops.log1mexp(ops.clip(t, -float("inf"), -1e-300))
    return t - ops.log1mexp(t)


def odds_ratio_loss(ops: Ops, y: Pair) -> Any:
    """-ln sigmoid of the log odds ratio of y+ to y-, with p = pi(y)^(1/|y|)."""
    return -ops.log_sigmoid(log_odds(ops, y.a / y.n_w) - log_odds(ops, y.b / y.n_l))


@dataclass(frozen=True)
class ORPO(Loss):
    """-a/|y+| - beta ln sigmoid(o(a/|y+|) - o(b/|y-|)), o(t) = t - ln(1 - e^t); log-probabilities below 0.

    Decreasing: both terms push y+ up. Not convex in b.
    """

    beta: float = parameter(0.1, POSITIVE)

    name = "orpo"
    reference = "Hong et al. 2024 (arXiv 2403.07691), eqs. 6 and 7 (beta is their lambda)"
    claims = _CLAIMS

    def formula(self, ops: Ops, y: Pair) -> Any:
        return -y.a / y.n_w + self.beta * odds_ratio_loss(ops, y)

    @classmethod
    def examples(cls) -> tuple["ORPO", ...]:
        return (cls(), cls(beta=0.7))


@dataclass(frozen=True)
class ORPOPrompt(Loss):
    """ORPO with TRL's likelihood: of prompt and y+ together, a mean over all predicted tokens of the batch.

    -(logp_prompt + a)/(n_prompt - 1 + |y+|) - beta ln sigmoid(o(a/|y+|) - o(b/|y-|)). n_prompt counts the prompt's
    tokens with the first, which nothing predicts; logp_prompt is the summed log-probability (nats) of the others. Both
    are data here, the same for every sample: their gradient is no part of the loss. n_prompt = 1, logp_prompt = 0 is
    ORPO with the mean taken over the batch's tokens.
    """

    beta: float = parameter(0.1, POSITIVE)
    n_prompt: float = parameter(1.0, Interval(1.0, open_low=False, typical=(2.0, 9.0)))
    logp_prompt: float = parameter(0.0, Interval(high=0.0, open_high=False, typical=(-20.0, -1.0)))

    name = "orpo_prompt"
    reference = "TRL ORPOTrainer; Hong et al. 2024 (arXiv 2403.07691)"
    claims = _CLAIMS
    coupled = True

    def formula(self, ops: Ops, y: Pair) -> Any:
        nll = -(self.logp_prompt + y.a) / (self.n_prompt - 1 + ops.mean(y.n_w))
        return nll + self.beta * odds_ratio_loss(ops, y)

    @classmethod
    def examples(cls) -> tuple["ORPOPrompt", ...]:
        return (cls(), cls(beta=0.7, n_prompt=4.0, logp_prompt=-5.3))

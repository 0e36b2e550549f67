"""MaPO: token masks read off the reference model's activations."""

from dataclasses import dataclass
from typing import Any

from theory._check import POSITIVE
from theory.losses._base import Group, TokenLoss, parameter
from theory.ops import Ops

_ROUNDING = 1e-12  # activations closer than this, relative to their features, are equal (those of centred vectors, say)


@dataclass(frozen=True)
class MaPO(TokenLoss):
    """-ln sigmoid(beta [sum_{y+} w_t (r_t + k_t) - sum_{y-} w_t (r_t + k_t)]): log-ratio r_t, KL k_t of token t.

    w_t in [0, 1] is the mean activation of token t, rescaled over its response: the least active token counts nothing,
    the most active one fully. Where all activations are equal (a response of one token, say), no token stands out and
    all count fully, as in TDPO1; the authors' code divides 0 by 0 there. `Tokens.hidden` is one hook (..., n, d), or
    hooks in (nested) tuples, averaged level by level: within a type of hook, then over types. No finite minimiser.
    """

    beta: float = parameter(0.1, POSITIVE)

    name = "mapo"
    reference = "Christopoulou et al. 2024 (arXiv 2410.05102), MaPO"
    tex = (
        r"-\ln\sigma\Big(\beta\Big[\sum_{t\in y^+} w_t (r_t + k_t) - \sum_{t\in y^-} w_t (r_t + k_t)\Big]\Big),"
        r"\quad r_t = \ln\frac{\pi}{\pi_{\mathrm{ref}}}(y_t),\ k_t = \mathrm{KL}(\pi_{\mathrm{ref}} \,\|\, \pi),"
        r"\ w_t = \frac{\bar h_t - \min_s \bar h_s}{\max_s \bar h_s - \min_s \bar h_s}"
    )

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        w, l = ((activation_mask(ops, t.hidden) * (t.log_ratio + t.kl)).sum(-1) for t in y.responses[:2])
        return -ops.log_sigmoid(self.beta * (w - l))

    @classmethod
    def examples(cls) -> tuple["MaPO", ...]:
        return (cls(), cls(beta=0.7))


def activation_mask(ops: Ops, hidden: Any) -> Any:
    """(..., n) in [0, 1]: mean over features, min-max over the response; tuples of hooks are averaged."""
    if isinstance(hidden, tuple | list):
        return sum(activation_mask(ops, hook) for hook in hidden) / len(hidden)
    # The authors z-normalise first; min-max undoes every increasing affine map.
    hidden = ops.detach(hidden)
    mean, size = hidden.mean(-1), ops.sort(abs(hidden).mean(-1))[..., -1:]
    ranked = ops.sort(mean)
    low, span = ranked[..., :1], ranked[..., -1:] - ranked[..., :1]
    equal = 1 - ops.step(span - _ROUNDING * size)
    return (mean - low + equal) / (span + equal)

"""Links phi(t) = f'(e^t) of f-divergences, and the transformation of a loss by one.

DPO measures y by its log-ratio t = ln pi(y)/pi_ref(y); f-DPO by phi(t). Constants are TRL's: they cancel in the margin
phi(da) - phi(db), but not in losses that divide by lengths.
"""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np

from theory._check import REAL, check_number, unknown
from theory.losses._base import Claims, MarginLoss, Pair
from theory.losses._combine import Combined, _check_base
from theory.ops import NumpyOps, Ops, TorchOps


class Link:
    """An increasing function of the log-ratio (at least where it overflows) and its derivative."""

    def phi(self, ops: Ops, t: Any) -> Any:
        raise NotImplementedError

    def slope(self, ops: Ops, t: Any) -> Any:
        """phi'(t)."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReverseKL(Link):
    """t: the link of DPO."""

    def phi(self, ops: Ops, t: Any) -> Any:
        return t

    def slope(self, ops: Ops, t: Any) -> Any:
        return 1 + 0 * t


@dataclass(frozen=True)
class ForwardKL(Link):
    """1 - e^(-t)."""

    def phi(self, ops: Ops, t: Any) -> Any:
        return -ops.expm1(-t)

    def slope(self, ops: Ops, t: Any) -> Any:
        return ops.exp(-t)


@dataclass(frozen=True)
class JensenShannon(Link):
    """ln 2 + ln sigmoid(t)."""

    def phi(self, ops: Ops, t: Any) -> Any:
        return ops.log(2.0) + ops.log_sigmoid(t)

    def slope(self, ops: Ops, t: Any) -> Any:
        return ops.sigmoid(-t)


@dataclass(frozen=True)
class Alpha(Link):
    """(e^((alpha-1) t) - 1)/(alpha - 1), its limit t at alpha = 1; forward KL at alpha = 0."""

    alpha: Any

    def phi(self, ops: Ops, t: Any) -> Any:
        return t if self.alpha == 1 else ops.expm1((self.alpha - 1) * t) / (self.alpha - 1)

    def slope(self, ops: Ops, t: Any) -> Any:
        return ops.exp((self.alpha - 1) * t)


@dataclass(frozen=True)
class ChiSquared(Link):
    """t + e^t: chi^2 plus Kullback-Leibler, the link z + ln z of chi-PO."""

    def phi(self, ops: Ops, t: Any) -> Any:
        return t + ops.exp(t)

    def slope(self, ops: Ops, t: Any) -> Any:
        return 1 + ops.exp(t)


@dataclass(frozen=True)
class SquaredLog(Link):
    """t e^(-t): f(z) = (ln z)^2/2. It rises up to t = 1 and falls from there on."""

    def phi(self, ops: Ops, t: Any) -> Any:
        return t * ops.exp(-t)

    def slope(self, ops: Ops, t: Any) -> Any:
        return (1 - t) * ops.exp(-t)


@dataclass(frozen=True)
class Exponential(Link):
    """e^t: no divergence, but the ratio itself."""

    def phi(self, ops: Ops, t: Any) -> Any:
        return ops.exp(t)

    slope = phi


EXPONENTIAL = Exponential()


def difference(ops: Ops, link: Link, s: Any, t: Any) -> Any:
    """phi(s) - phi(t), never NaN: where both overflow, the larger argument decides.

    A slope that overflows is dropped where the loss no longer depends on it (a factor of exactly 0 wins over inf).
    """
    if isinstance(ops, TorchOps):
        import torch

        s, t = (torch.as_tensor(x, dtype=torch.float64) if not torch.is_tensor(x) else x for x in (s, t))
        return _torch_difference().apply(ops, link, *torch.broadcast_tensors(s, t))
    if isinstance(ops, NumpyOps):
        with np.errstate(invalid="ignore"):
            out = np.asarray(link.phi(ops, s) - link.phi(ops, t))
            return np.where(np.isnan(out), np.where(s == t, 0.0, np.copysign(np.inf, s - t)), out)
    return link.phi(ops, s) - link.phi(ops, t)


@cache
def _torch_difference() -> Any:
    import torch

    class Difference(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, ops: Ops, link: Link, s: Any, t: Any) -> Any:
            ctx.ops, ctx.link = ops, link
            ctx.save_for_backward(s, t)
            out = link.phi(ops, s) - link.phi(ops, t)
            order = torch.where(s == t, torch.zeros_like(s), torch.copysign(torch.full_like(s, torch.inf), s - t))
            return torch.where(out.isnan(), order, out)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (g,) = grads
            by_s, by_t = (g * ctx.link.slope(ctx.ops, x) for x in ctx.saved_tensors)
            zero = torch.zeros_like(g)
            return None, None, torch.where(g == 0, zero, by_s), torch.where(g == 0, zero, -by_t)

    return Difference


DIVERGENCES: dict[str, type[Link]] = {
    "reverse_kl": ReverseKL,
    "forward_kl": ForwardKL,
    "js": JensenShannon,
    "alpha": Alpha,
}


@dataclass(frozen=True)
class FDivergence(Combined):
    """`base` of phi(da) and phi(db) in place of the log-probabilities, references 0: f-DPO for any base.

    divergence : "reverse_kl" (t), "forward_kl", "js" or "alpha"; alpha : the parameter of the last.
    r of a margin loss is phi'(da)/phi'(db).
    """

    base: Any
    divergence: str
    alpha: float = 0.5

    name = "f_divergence"
    reference = "Wang et al. 2023 (arXiv 2309.16240), eq. 7; TRL's f_divergence_type"
    DIVERGENCES: ClassVar[tuple[str, ...]] = tuple(DIVERGENCES)

    def __post_init__(self) -> None:
        _check_base(self.base)
        if self.divergence not in DIVERGENCES:
            raise ValueError(unknown("divergence", self.divergence, DIVERGENCES))
        object.__setattr__(self, "alpha", check_number(self.alpha, "alpha", REAL))

    @property
    def link(self) -> Link:
        """phi, as an object."""
        return Alpha(self.alpha) if self.divergence == "alpha" else DIVERGENCES[self.divergence]()

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        # phi is increasing, so the signs of d_w and d_l stay; -phi(db) is not concave in general; and a likelihood term
        # that was non-negative becomes one of a log-ratio.
        margin = isinstance(self.base, MarginLoss)
        kept = self.base.claims
        return replace(kept, convex=False, reference_free=False, nonnegative=kept.nonnegative and margin)

    def formula(self, ops: Ops, y: Pair) -> Any:
        if isinstance(self.base, MarginLoss):
            return self.base.formula(ops, Pair.of_margin(difference(ops, self.link, y.da, y.db)))
        a, b = (_image(ops, self.link, t) for t in (y.da, y.db))
        return self.base.formula(ops, y._replace(a=a, b=b, a_ref=0.0, b_ref=0.0))


def _image(ops: Ops, link: Link, t: Any) -> Any:
    """phi(t) of a link with phi(0) = 0; in torch with the link's own slope, which expm1 loses far out."""
    return difference(ops, link, t, 0.0) if isinstance(ops, TorchOps) else link.phi(ops, t)

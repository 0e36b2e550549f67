"""SparsePO: token masks learned together with the model (`sims.sparse.learn_masks`)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from theory._check import POSITIVE, Interval, check_number
from theory.losses._base import Group, TokenLoss, parameter
from theory.ops import Ops

_WEIGHT = Interval(low=0.0, open_low=False, typical=(0.0, 0.1))
_LAYER_NORM_EPS = 1e-5  # torch's default


@dataclass(frozen=True)
class MaskNet:
    """The weight of a token, ReLU(v . LayerNorm(h_ref) + c), from the reference's hidden vector h_ref (d features).

    v = () stands for no features: the constant mask ReLU(c). LayerNorm's gain and bias are in v and c.
    """

    v: tuple[float, ...] = ()
    c: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.v, Sequence | np.ndarray) or np.ndim(self.v) != 1:
            raise ValueError(f"v must be a sequence of numbers, one per feature of the hidden vectors, got {self.v!r}")
        object.__setattr__(self, "v", tuple(check_number(x, "v") for x in self.v))
        object.__setattr__(self, "c", check_number(self.c, "c"))

    @classmethod
    def random(cls, d: int, seed: int) -> Self:
        """A net of d features drawn as torch initialises a linear layer: uniform within 1/sqrt(d) of zero."""
        *v, c = np.random.default_rng(seed).uniform(-1, 1, size=d + 1) / d**0.5
        return cls(tuple(v), c)

    def mask(self, ops: Ops, hidden: Any) -> Any:
        """(..., n) masks >= 0 of hidden vectors (..., n, d)."""
        d = hidden.shape[-1]
        if len(self.v) not in (0, d):
            raise ValueError(f"v must have one entry per feature of the hidden vectors ({d}), got {len(self.v)}")
        v = self.v or (0.0,) * d
        return token_mask(ops, hidden, hidden.new_tensor(v) if hasattr(hidden, "new_tensor") else np.array(v), self.c)


def token_mask(ops: Ops, hidden: Any, v: Any, c: Any) -> Any:
    """ReLU(v . LayerNorm(hidden) + c), (..., n); v (d,) and c may be tensors in training."""
    x = hidden - ops.mean(hidden)
    return ops.relu((x / (ops.mean(x**2) + _LAYER_NORM_EPS) ** 0.5) @ v + c)


@dataclass(frozen=True)
class SparsePO(TokenLoss):
    """-ln sigmoid(beta [sum_{y+} (w^u_t r_t + w^d_t k_t) - the same of y-]) + lam_u |w^u|_1 + lam_d |w^d|_1.

    r_t is the log-ratio and k_t the KL(pi_ref || pi) of token t; the L1 norms are sums over both responses.
    mask_d = None is the authors' common mask, w^d = w^u with halved L1 weights; two nets are their independent masks.
    Their dropout is left out. Masks of 1 give TDPO1 plus a constant. In the log-probabilities no finite minimiser.
    """

    beta: float = parameter(0.1, POSITIVE)
    lam_u: float = parameter(0.0, _WEIGHT)
    lam_d: float = parameter(0.0, _WEIGHT)
    mask_u: MaskNet = MaskNet()
    mask_d: MaskNet | None = None

    name = "sparse_po"
    reference = "Christopoulou et al. 2024 (arXiv 2410.05102), SparsePO"
    tex = (
        r"-\ln\sigma\Big(\beta\Big[\sum_{t\in y^+} (w^u_t r_t + w^d_t k_t)"
        r" - \sum_{t\in y^-} (w^u_t r_t + w^d_t k_t)\Big]\Big) + \lambda_u \|w^u\|_1 + \lambda_d \|w^d\|_1,"
        r"\quad r_t = \ln\frac{\pi}{\pi_{\mathrm{ref}}}(y_t),"
        r"\ k_t = \mathrm{KL}(\pi_{\mathrm{ref}} \,\|\, \pi),"
        r"\ w_t = \mathrm{ReLU}\big(v \cdot \mathrm{LayerNorm}(h^{\mathrm{ref}}_t) + c\big)"
    )

    def __post_init__(self) -> None:
        for name, domain in (("beta", POSITIVE), ("lam_u", _WEIGHT), ("lam_d", _WEIGHT)):
            object.__setattr__(self, name, check_number(getattr(self, name), f"SparsePO.{name}", domain))
        if not isinstance(self.mask_u, MaskNet):
            raise ValueError(f"SparsePO.mask_u must be a MaskNet, got {self.mask_u!r}")
        if not isinstance(self.mask_d, MaskNet | None):
            raise ValueError(f"SparsePO.mask_d must be a MaskNet, or None for the common mask, got {self.mask_d!r}")

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        u = [self.mask_u.mask(ops, t.hidden) for t in y.responses[:2]]
        d = u if self.mask_d is None else [self.mask_d.mask(ops, t.hidden) for t in y.responses[:2]]
        return self.masked(ops, y, u, d)

    def masked(self, ops: Ops, y: Group, u: Sequence[Any], d: Sequence[Any]) -> Any:
        """The loss for given masks (..., n) of y+ and y-: u on log-ratios, d on KL terms."""
        w, l = ((u * t.log_ratio + d * t.kl).sum(-1) for t, u, d in zip(y.responses[:2], u, d, strict=True))
        share = 0.5 if self.mask_d is None else 1.0
        l1_u, l1_d = (masks[0].sum(-1) + masks[1].sum(-1) for masks in (u, d))
        return -ops.log_sigmoid(self.beta * (w - l)) + share * (self.lam_u * l1_u + self.lam_d * l1_d)

    @classmethod
    def examples(cls) -> tuple["SparsePO", ...]:
        return (cls(), cls(beta=0.7, lam_u=0.02, lam_d=0.03, mask_d=MaskNet(c=0.6)))

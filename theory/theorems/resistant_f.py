"""f-divergences in the place of DPO's: the incentive ratio of a link, and the constant no loss can see."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from theory.losses import Loss, MarginForm, MarginLoss, Pair
from theory.losses._links import ChiSquared, ForwardKL, JensenShannon, Link, SquaredLog
from theory.ops import NUMPY, Ops
from theory.problem import Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, relative

LINKS: tuple[Link, ...] = (ForwardKL(), JensenShannon(), ChiSquared(), SquaredLog())


@dataclass(frozen=True)
class Linked(Loss):
    """`base` of (phi(da) + c_w) - (phi(db) + c_l)."""

    base: Any
    link: Link
    c_w: float = 0.0
    c_l: float = 0.0

    name = "linked"
    reference = "Wang et al. 2023 (arXiv 2309.16240), eq. 7"

    def __post_init__(self) -> None: ...

    def margin_of(self, ops: Ops, y: Pair) -> Any:
        """What stands in the place of the margin."""
        return (self.link.phi(ops, y.da) + self.c_w) - (self.link.phi(ops, y.db) + self.c_l)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return self.base.formula(ops, Pair.of_margin(self.margin_of(ops, y)))


class _Link(Theorem):
    """One sample and a margin loss, taken of linked log-ratios."""

    settings = ("sequences", "shared_prefix")

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, len(problem.samples) == 1 and problem.has_margin_loss)


class LinkIncentives(_Link):
    """r = phi'(da)/phi'(db): the link alone decides how the push on y- fades against that on y+."""

    name = "link_incentives"
    statement = (
        r"One sample, $\ell(\varphi(\Delta_+)-\varphi(\Delta_-))$ of log-ratios $\Delta_\pm$ to the reference,"
        r" $\varphi(t)=f'(e^t)$: $\frac{d}{dt}\ln\pi(y^+)=G\,[\varphi'(\Delta_+)|g_+|^2-\varphi'(\Delta_-)\langle"
        r" g_+,g_-\rangle]$, $r=\varphi'(\Delta_+)/\varphi'(\Delta_-)$"
    )
    source = "Wang et al. 2023 (arXiv 2309.16240) for the losses; the rate is this project's"
    routes = ("autodiff", "integrated")
    knobs = ("push on y+", "push on y-")
    sharpness = (Sharpness("one sample", "sequence_data_set"),)

    def residual(self, problem: Problem, route: Route) -> Array:
        base, (w, l) = problem.loss, problem.pairs[0]
        assert isinstance(base, MarginLoss)
        y = Pair(problem.log_prob(w), problem.log_prob(l), *problem.references[:, 0].T)
        error = np.zeros(len(problem))
        for link in LINKS:
            linked = replace(problem, loss=Linked(base, link))
            G = MarginForm(base, 0.0).slope(linked.loss.margin_of(NUMPY, y))  # type: ignore[attr-defined]
            up, down = (G * link.slope(NUMPY, t) for t in (y.da, y.db))
            closed = self.k("push on y+") * up * problem.inner(w, w) - self.k("push on y-") * down * problem.inner(w, l)
            error = np.maximum(error, relative(closed - route.rate(linked, w), linked.rate_scale(w)))
        return error


class LinkConstant(_Link):
    """argmin f >= 1 is a statement about one normalisation of f, not about the loss."""

    name = "link_constant"
    statement = (
        r"$f$ and $f+c\,(t-1)$ have one and the same loss $\ell(\varphi(\Delta_+)-\varphi(\Delta_-))$, $\varphi+c$ for"
        r" $\varphi$, and one flow; but with $c=-\varphi(s)$ the second is stationary at $t=e^s$: where"
        r" $\arg\min f$ lies, below 1 or above, is a choice of $c$"
    )
    source = "this project; on the criterion of Pipano et al. 2026 (arXiv 2602.06788)"
    knobs = ("constant of y-",)
    sharpness = (Sharpness("a difference of links", None, "losses that treat the responses apart see the constant"),)

    def residual(self, problem: Problem, route: Route) -> Array:
        w, error = problem.pairs[0][0], np.zeros(len(problem))
        for link in LINKS:
            plain = replace(problem, loss=Linked(problem.loss, link))
            for s in (-1.0, 0.7):
                c = -float(link.phi(NUMPY, np.float64(s)))
                moved = replace(problem, loss=Linked(problem.loss, link, c, self.k("constant of y-") * c))
                gap = route.rate(moved, w) - route.rate(plain, w)
                error = np.maximum(error, relative(gap, plain.rate_scale(w)))
        return error

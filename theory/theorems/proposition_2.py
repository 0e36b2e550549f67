"""Proposition 2: a loss of weighted log-probabilities."""

import numpy as np

from theory.losses import MarginForm, MarginLoss, Pair, Weighted
from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, RateTheorem, Sharpness, everywhere


class Proposition2(RateTheorem):
    """rho E + gamma |grad ln pi(y+)|^2: gamma > 0, which counters displacement, iff lambda+ > lambda-."""

    name = "proposition_2"
    statement = (
        r"$\ell(\lambda^+\ln\pi(y^+|x)-\lambda^-\ln\pi(y^-|x))$: $\frac{d}{dt}\ln\pi(y^+|x) = \rho E"
        r" + \gamma|\nabla\ln\pi(y^+|x)|^2$, $\rho=\lambda^-\mu'/\ell'(u)$, $\gamma=(\lambda^+-\lambda^-)(-\mu')$"
    )
    source = "Razin et al. 2024, App. E, Proposition 2"
    settings = ("weighted",)
    knobs = ("rho E, own gradient", "rho E, common gradient", "gamma term")
    sharpness = (Sharpness("one sample", "weighted_data_set"),)

    def applies(self, problem: Problem) -> Mask:
        form_5 = isinstance(problem.loss, Weighted) and isinstance(problem.loss.base, MarginLoss)
        holds = form_5 and len(problem.samples) == 1
        return everywhere(problem, holds) & (self._slopes(problem)[1] != 0 if holds else False)

    def _slopes(self, problem: Problem) -> tuple[Array, Array]:
        """(-mu', -l'(u)): the slope at the weighted margin and at the plain one."""
        loss = problem.loss
        assert isinstance(loss, Weighted)
        assert isinstance(loss.base, MarginLoss)
        a, b = (problem.log_prob(y) for y in problem.pairs[0])
        seen = loss.pair(Pair(a, b, problem.references[:, 0, 0], problem.references[:, 0, 1]))
        mu = MarginForm(loss.base, np.asarray(seen.u_ref)).slope(seen.u)
        return mu, MarginForm(loss.base, problem.reference_margin).slope(problem.margin)

    def terms(self, problem: Problem, z: Positions) -> dict[str, Array]:
        loss, (w, l) = problem.loss, problem.pairs[0]
        assert isinstance(loss, Weighted)
        mu, G = self._slopes(problem)
        rho, gamma = loss.lam_l * mu / np.where(G == 0, 1.0, G), (loss.lam_w - loss.lam_l) * mu
        return {
            "rho E, own gradient": rho * G * problem.inner(w, w),
            "rho E, common gradient": -rho * G * problem.inner(w, l),
            "gamma term": gamma * problem.inner(w, w),
        }

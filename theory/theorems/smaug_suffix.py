"""Tokens that y+ and y- share after they differ: what each of them ties together."""

from dataclasses import replace

import numpy as np

from theory.problem import Positions, Problem
from theory.theorems._base import Array, Mask, Route, Sharpness, Theorem, everywhere, relative, widened
from theory.theorems._single import dot


def shared_after_the_edit(problem: Problem) -> list[tuple[int, int, int]]:
    """(context in y+, context in y-, token) wherever the responses have one token in different contexts."""
    w, l = problem.pairs[0]
    positions = zip(w.rows, l.rows, w.tokens, l.tokens, strict=False)
    return [(c, b, v) for c, b, v, z in positions if v == z and c != b]


class _Suffix(Theorem):
    """One sample whose responses share a token after they differ."""

    source = "Pal et al. 2024 (arXiv 2402.13228), section 3; in unconstrained features this project's"
    settings = ("one_edit",)

    def applies(self, problem: Problem) -> Mask:
        return everywhere(problem, len(problem.samples) == 1 and bool(shared_after_the_edit(problem)))


class SuffixCoupling(_Suffix):
    """A shared token makes the gradients of y+ and y- point the same way as far as its hidden vectors do."""

    name = "suffix_coupling"
    statement = (
        r"Equal tokens $v$ in contexts $c^+\neq c^-$ add $\eta_W\alpha^-\langle h_{c^+},h_{c^-}\rangle$ to"
        r" $\langle g_+,g_-\rangle$, $\alpha^-=(1-\pi_v)(1-\pi'_v)+\sum_{i\neq v}\pi_i\pi'_i\ge0$"
    )
    knobs = ("own token", "other tokens")
    sharpness = (Sharpness("equal tokens", None, "of two different tokens alpha may have either sign"),)

    def residual(self, problem: Problem, route: Route) -> Array:
        through_W, error = replace(problem, lr_unembedding=1.0, lr_hidden=0.0), np.zeros(len(problem))
        for c, b, v in shared_after_the_edit(problem):
            p, q = (np.delete(problem.pi[:, row], v, axis=1) for row in (c, b))
            alpha = self.k("own token") * p.sum(1) * q.sum(1) + self.k("other tokens") * dot(p, q)
            h, g = problem.H[:, c], problem.H[:, b]
            measured = route.inner(through_W, Positions((c,), (v,)), Positions((b,), (v,)))
            size = 4 * np.sqrt(dot(h, h) * dot(g, g))
            error = np.maximum(error, relative(measured - alpha * dot(h, g), size))
        return error


class SuffixInSharedLogits(_Suffix):
    """Smaug's argument: logits that both contexts share are pushed by the difference of the two distributions."""

    name = "suffix_shared_logits"
    statement = (
        r"If the contexts $c^+,c^-$ of a shared token $v$ share additive logits $\theta$:"
        r" $\dot\theta_i=G\,(\pi(i|c^-)-\pi(i|c^+))$, so that $v$ is pushed down iff $\pi(v|c^+)>\pi(v|c^-)$"
    )
    knobs = ("context of y-", "context of y+")
    sharpness = (
        Sharpness("a loss of the margin", None, "else theta moves by d_w (e_v - pi(.|c+)) - d_l (e_v - pi(.|c-))"),
        Sharpness("shared logits", None, "without them the contexts move apart: see suffix_coupling"),
    )

    def applies(self, problem: Problem) -> Mask:
        return super().applies(problem) & everywhere(problem, problem.has_margin_loss)

    def residual(self, problem: Problem, route: Route) -> Array:
        G, size = problem.incentives[0][:, 0], problem.incentive_sizes[0][:, 0]
        error = np.zeros(len(problem))
        for c, b, _ in shared_after_the_edit(problem):
            # One more dimension: 1 in the two contexts, 0 in all others, and 0 in W, so that no logit changes. Its
            # column of W is theta.
            W, H = np.zeros((*problem.W.shape[:2], 1)), np.zeros((*problem.H.shape[:2], 1))
            H[:, [c, b]] = 1.0
            dW, _ = route.velocity(replace(widened(problem, W, H), lr_unembedding=1.0, lr_hidden=0.0))
            push = self.k("context of y-") * problem.pi[:, b] - self.k("context of y+") * problem.pi[:, c]
            error = np.maximum(error, relative(abs(dW[:, :, -1] - G[:, None] * push).max(1), size))
        return error

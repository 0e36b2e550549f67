"""What kind of loss it is, by what it does and not by what it says."""

from typing import Literal

import numpy as np
import torch

from sims.scenarios._arc import Landscape
from theory.conditions import ratio_kind
from theory.losses import Group, Pair, TokenLoss, Tokens

Kind = Literal["margin", "constant ratio", "two-likelihood", "token", "group"]


def kind(land: Landscape) -> Kind:
    """By the incentives at 64 random places around the start (losses of tokens: by whether a third response counts)."""
    loss = land.objective.loss
    if isinstance(loss, TokenLoss):
        return "group" if _sees_third_response(loss) else "token"
    rng = np.random.default_rng(0)
    y = _pair_at_start(land)
    # Log-probabilities on both sides of the start, below 0.
    a, b = (np.asarray(x) * np.exp(rng.standard_normal((64, len(x)))) for x in (y.a, y.b))
    d_w, d_l = loss.incentives(y._replace(a=a, b=b))
    if loss.uses_norms:  # the ratio is that of the model's gradients
        return "two-likelihood"
    with np.errstate(divide="ignore", invalid="ignore"):
        found = ratio_kind((d_w / d_l).T)
    return "margin" if found == "at rest" else found


def _pair_at_start(land: Landscape) -> Pair:
    a, b = land.pair(land.start)[:, 0]
    n_w, n_l = np.array([[len(y) for y in s.responses[:2]] for s in land.model.samples], dtype=float).T
    norms = np.linalg.norm(land.pair_gradients(land.start[0]), axis=-1)
    o = land.objective
    return Pair(a, b, o.a_ref[0].numpy(), o.b_ref[0].numpy(), n_w, n_l, norms[1] / norms[0])


def start_ratio(land: Landscape) -> float | None:
    if isinstance(land.objective.loss, TokenLoss):
        return None
    d_w, d_l = (float(d.mean()) for d in land.objective.loss.incentives(_pair_at_start(land)))
    return d_w / d_l if d_l else float("nan") if not d_w else float(np.copysign(np.inf, d_w))


def _sees_third_response(loss: TokenLoss) -> bool:
    rng = np.random.default_rng(0)

    def tokens() -> Tokens:
        log_prob, ref = (torch.tensor(-rng.exponential(size=(1, 2))).requires_grad_() for _ in range(2))
        kl, squares = (torch.tensor(rng.exponential(size=(1, 2))) for _ in range(2))
        return Tokens(log_prob, ref.detach(), kl, -squares, torch.tensor(rng.standard_normal((1, 2, 3))))

    responses = tuple(tokens() for _ in range(3))
    value = loss.torch_value(Group(responses, (1.0, 0.0, 1.0))).sum()
    (slope,) = torch.autograd.grad(value, responses[2].log_prob, allow_unused=True)
    return slope is not None and bool(slope.any())

"""What a token-level loss exerts on log-probabilities, by automatic differentiation of its value in them alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.losses import Group, TokenLoss, Tokens

Array = NDArray[np.floating[Any]]


def token_slopes(
    loss: TokenLoss,
    log_pi: Array,
    ref_log_pi: Array,
    ref_hidden: Array,
    responses: Sequence[tuple[Sequence[int], Sequence[int]]],
    rewards: tuple[float, ...],
) -> Array:
    """(R, B, n, V) dL/d ln pi(v | context) of one sample through each of its R responses, entries independent.

    log_pi, ref_log_pi (B, n, V) and ref_hidden (B, n, d) of all contexts; responses as (contexts, tokens).
    """
    import torch

    # A leaf per response: where responses share contexts, what cancels between them is still seen.
    leaves = [torch.tensor(np.asarray(log_pi, dtype=np.float64), requires_grad=True) for _ in responses]
    hidden = torch.tensor(np.asarray(ref_hidden, dtype=np.float64))
    ref = torch.tensor(np.asarray(ref_log_pi, dtype=np.float64))

    def tokens(x: Any, rows: list[int], y: list[int]) -> Tokens:
        kl = (ref[:, rows].exp() * (ref - x)[:, rows]).sum(-1)
        return Tokens(x[:, rows, y], ref[:, rows, y], kl, torch.logsumexp(2 * x[:, rows], dim=-1), hidden[:, rows])

    group = tuple(tokens(x, list(rows), list(y)) for x, (rows, y) in zip(leaves, responses, strict=True))
    value = loss.torch_value(Group(group, rewards)).sum()
    slopes = torch.autograd.grad(value, leaves, allow_unused=True)
    return np.stack([np.zeros(x.shape) if g is None else g.numpy() for x, g in zip(leaves, slopes, strict=True)])

"""What a token-level loss exerts on logits, by automatic differentiation of its value in the logits alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from theory.losses import Group, TokenLoss, Tokens

Array = NDArray[np.floating[Any]]


def pull(
    loss: TokenLoss,
    logits: Array,
    ref_logits: Array,
    ref_hidden: Array,
    responses: Sequence[tuple[Sequence[int], Sequence[int]]],
    rewards: tuple[float, ...],
) -> Array:
    """(B, n, V) -dL/dlogits of one sample: logits and ref_logits (B, n, V), ref_hidden (B, n, d) of all contexts;
    responses as (contexts, tokens)."""
    import torch

    x = torch.tensor(np.asarray(logits, dtype=np.float64), requires_grad=True)
    hidden = torch.tensor(np.asarray(ref_hidden, dtype=np.float64))
    log_pi = torch.log_softmax(x, dim=-1)
    ref = torch.log_softmax(torch.tensor(np.asarray(ref_logits, dtype=np.float64)), dim=-1)
    kl = (ref.exp() * (ref - log_pi)).sum(-1)
    squares = torch.logsumexp(2 * log_pi, dim=-1)
    group = tuple(
        Tokens(log_pi[:, rows, y], ref[:, rows, y], kl[:, rows], squares[:, rows], hidden[:, rows])
        for rows, y in ((list(rows), list(y)) for rows, y in responses)
    )
    value = loss.torch_value(Group(group, rewards)).sum()
    (slope,) = torch.autograd.grad(value, x, allow_unused=True)
    return np.zeros(x.shape) if slope is None else -slope.numpy()

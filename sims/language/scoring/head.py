r"""What the unembedding says of states: log-probabilities, and the exact part of a gradient step that is its own.

Logits are built for the states given, for some rows or a part of the vocabulary at a time: 2^24 numbers.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from sims.language.model import LanguageModel

BLOCK = 1 << 24  # logits held at a time


def wide(x: Tensor) -> Tensor:
    """As float32, if it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def log_probs(model: LanguageModel, h: Tensor, tokens: Tensor) -> Tensor:
    """(n,) ln pi of the tokens (n,) after states (n, d), float64.

    Logits have the dtype of the weights, as in training, their log-softmax at least float32.
    """
    rows = max(1, BLOCK // model.W.shape[0])
    out = []
    for part, y in zip(h.split(rows), tokens.split(rows), strict=True):
        logits = wide(model.logits(part))
        out.append((logits.gather(1, y[:, None])[:, 0] - logits.logsumexp(1)).double())
    return torch.cat(out)


def alpha_term(model: LanguageModel, h: Tensor, k: Tensor, y: Tensor, z: Tensor) -> float:
    r"""sum alpha^- <h+, h-> - sum alpha^+ <h+, h+>, alpha = <e_y - pi, e_y' - pi'> over the vocabulary.

    h (n+, d), k (n-, d) : states that predict the tokens y (n+,), z (n-,).

    It is -<grad_W ln pi(y+), grad_W (ln pi(y+) - ln pi(y-))>: what training the unembedding alone takes from ln pi(y+),
    per unit of learning rate and of slope of the loss. Where the architecture caps or scales W h, e - pi carries the
    slope of that, so that this stays true; of a tied network it is the part by the use of W as an unembedding.
    """
    states, tokens = wide(torch.cat([h, k])), torch.cat([y, z])
    n, V = len(states), model.W.shape[0]
    size = max(1, BLOCK // n)
    starts = range(0, V, size)
    lse = torch.full((n,), -torch.inf, dtype=torch.float64, device=states.device)
    for a in starts:
        logits, _ = _logits(model, states, a, a + size)
        lse = torch.logaddexp(lse, logits.logsumexp(1).double())
    gram = torch.zeros(n, n, dtype=torch.float64, device=states.device)
    for a in starts:
        logits, slope = _logits(model, states, a, a + size)
        log_pi = logits - lse[:, None].to(logits)
        errors = -log_pi.exp()
        here = ((tokens >= a) & (tokens < a + size)).nonzero()[:, 0]
        at = here, tokens[here] - a
        errors[at] = -torch.expm1(log_pi[at])
        errors *= slope
        gram += (errors @ errors.T).double()
    term = gram * (states.double() @ states.double().T)
    return float(term[: len(h), len(h) :].sum() - term[: len(h), : len(h)].sum())


def _logits(model: LanguageModel, states: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """(n, stop - start) logits of a part of the vocabulary, and their slopes in W h."""
    head = model.network.get_output_embeddings()
    bias = getattr(head, "bias", None)
    part = None if bias is None else wide(bias.detach()[start:stop])
    with torch.enable_grad():
        product = linear(states, wide(model.W[start:stop]), part).requires_grad_()
        logits = model.shape_logits(product)
        (slope,) = torch.autograd.grad(logits.sum(), product)
    return logits.detach(), slope

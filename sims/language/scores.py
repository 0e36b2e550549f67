r"""Scores of preference pairs of a language model: what is expected to lower ln pi(y+), before any training.

Every score is oriented so that larger means: a deeper fall of ln pi(y+) is expected. With a = ln pi(y+), b = ln pi(y-),
L the loss of the pair alone at the reference model (for a loss of a and b: grad L = -d_w grad a + d_l grad b),

    gradient    <grad a, grad L>              minus the change of a under a step of gradient descent, per unit of rate
    sign        <grad a, sgn(grad L)>         the same under sign descent
    rmsprop     <grad a, g/(0.1 |g| + 1e-8)>  the same under the first step of torch's RMSprop, g = grad L

These three come from automatic differentiation of the network. The rest looks at the hidden states h_k that predict the
tokens (after the final norm), whose sums are S+ and S-:

    alpha       sum alpha^- <h+, h-> - sum alpha^+ <h+, h+>: what the unembedding contributes to `gradient`, exactly,
                per unit of slope of a margin loss (the gradient of ln pi(y) by W is sum_k (e_yk - pi_k) h_k'); what
                the body contributes has no such form
    ches        <S+, S- - S+>, every alpha set to 1; ln_ches: the same with means; ches_centred, ln_ches_centred:
                after the mean state over all responses given is taken from every state
    edit        minus the normalised edit distance;  last_hidden  <h+, h-> of the last states
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sims.language.model import LanguageModel
from sims.language.preferences import Objective, PreferencePair, Runs
from sims.language.responses import states
from theory.ches import ches_score, edit_similarity, last_hidden_inner_product, sequence_terms
from theory.losses import Loss

Array = NDArray[np.float64]

SCORES = {
    "gradient": "gradient inner product",
    "sign": "sign-gradient inner product",
    "rmsprop": "RMSprop's first step",
    "alpha": "exact head term, alphas kept",
    "ches": "CHES",
    "ln_ches": "length-normalised CHES",
    "ches_centred": "CHES, centred",
    "ln_ches_centred": "length-normalised CHES, centred",
    "edit": "edit similarity",
    "last_hidden": "last-hidden inner product",
}
ALPHA, EPS = 0.99, 1e-8  # torch's RMSprop
FACTS = (
    "n_preferred",
    "n_dispreferred",
    "norm",  # |S+|^2
    "positive",  # share of positive alphas
    "alpha_mean",
    "gradient_head",  # what the unembedding contributes to `gradient`, the rest is the body's
    "sign_head",
)


@dataclass(frozen=True, eq=False)
class Scored:
    """N pairs: `scores` by the names in SCORES, `facts` by those in FACTS, each (N,).

    slope : mean |grad L| / |grad (a - b)|, in whose units a rate of gradient descent means the same for every loss; for
        a function of the margin it is |l'| at the reference.
    mean_share : |mean state|^2 over the mean |state|^2.
    """

    scores: dict[str, Array]
    facts: dict[str, Array]
    slope: float
    mean_share: float


def score_pairs(model: LanguageModel, pairs: Sequence[PreferencePair], loss: Loss) -> Scored:
    """Every score and fact of every pair, at the model as it is, which is also the reference of the loss.

    Raises ValueError for no pairs.
    """
    if not pairs:
        raise ValueError("pairs must not be empty")
    prompts = [p.prompt for p in pairs]
    plus, minus = (
        [h.double() for h in states(model, prompts, y)]
        for y in ([p.preferred for p in pairs], [p.dispreferred for p in pairs])
    )
    everything = torch.cat([*plus, *minus])
    mean = everything.mean(0)
    gradients = PairGradients(model, loss)
    rows = [_row(model, p, h, k, mean) | gradients(p) for p, h, k in zip(pairs, plus, minus, strict=True)]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return Scored(
        {name: columns[name] for name in SCORES},
        {name: columns[name] for name in FACTS},
        float(columns["slope"].mean()),
        float((mean**2).sum() / (everything**2).sum(-1).mean()),
    )


def _row(model: LanguageModel, pair: PreferencePair, h: Tensor, k: Tensor, mean: Tensor) -> dict[str, float]:
    """What the hidden states h (n+, d) and k (n-, d) of a pair say."""
    terms = sequence_terms(h.numpy(), k.numpy(), pair.preferred, pair.dispreferred, W=model.W.double().numpy())
    alphas = np.concatenate([terms.alpha_minus.ravel(), terms.alpha_plus.ravel()])
    return {
        "alpha": terms.alpha_weighted,
        "ches": ches_score(h, k),
        "ln_ches": ches_score(h, k, length_normalize=True),
        "ches_centred": ches_score(h - mean, k - mean),
        "ln_ches_centred": ches_score(h - mean, k - mean, length_normalize=True),
        "edit": edit_similarity(pair.preferred, pair.dispreferred),
        "last_hidden": last_hidden_inner_product(h[-1], k[-1]),
        "n_preferred": len(h),
        "n_dispreferred": len(k),
        "norm": float((h.sum(0) ** 2).sum()),
        "positive": float((alphas > 0).mean()),
        "alpha_mean": float(alphas.mean()),
    }


class PairGradients:
    """The scores that need gradients: of ln pi by the network itself, of the loss by the engine that trains."""

    def __init__(self, model: LanguageModel, loss: Loss) -> None:
        self.network, self.loss = model.network, loss
        named = dict(model.network.named_parameters())
        # Head first: entries up to `split` of a flat gradient belong to the unembedding.
        self.names = sorted(named, key=lambda name: name not in model.head)
        self.parameters = [named[name] for name in self.names]
        self.split = sum(named[name].numel() for name in model.head)
        self.runs = Runs(model, 1)

    def __call__(self, pair: PreferencePair) -> dict[str, float]:
        grad_a, grad_b = (self.of_log_prob(pair.prompt, y) for y in (pair.preferred, pair.dispreferred))
        g = self.of_loss(pair)
        gradient, sign = grad_a * g, grad_a * g.sign()
        found = {"gradient": gradient, "sign": sign, "rmsprop": grad_a * first_rmsprop_step(g)}
        found |= {"gradient_head": gradient[: self.split], "sign_head": sign[: self.split]}
        slope = float(g.norm() / (grad_a - grad_b).norm())
        return {name: float(x.sum(dtype=torch.float64)) for name, x in found.items()} | {"slope": slope}

    def of_log_prob(self, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
        """Gradient of ln pi(response | prompt) by all parameters, flat."""
        ids = torch.tensor([[*prompt, *response]])
        logits = self.network(input_ids=ids[:, :-1], use_cache=False).logits[0, len(prompt) - 1 :]
        value = torch.log_softmax(logits, dim=-1).gather(-1, torch.tensor(response)[:, None]).sum()
        return torch.cat([x.flatten() for x in torch.autograd.grad(value, self.parameters)])

    def of_loss(self, pair: PreferencePair) -> Tensor:
        """Gradient of the loss of the pair alone, flat."""
        gradient = self.runs.gradient(Objective(self.runs, [[pair]], self.loss)())
        return torch.cat([gradient[name].flatten() for name in self.names])


def first_rmsprop_step(g: Tensor) -> Tensor:
    """The first step of torch's RMSprop per unit of rate: about 10 sgn(g) where |g| is well above 1e-7."""
    return g / (((1 - ALPHA) * g * g).sqrt() + EPS)

"""Runs of preference training on pairs of single tokens, followed in the coordinates of the theory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sims.descent import Optimizer, SignSGD
from sims.language.forecast import Course
from sims.language.kernel import final_gain, moves, signs
from sims.language.model import LanguageModel
from sims.language.preferences import PreferencePair, Runs, train_preferences
from sims.language.responses import Ids
from theory.losses import Loss

Array = NDArray[np.float64]


class QuietSign(SignSGD):
    """Sign descent that leaves rounding alone: entries of a gradient far below the largest of their run's tensor.

    In exact arithmetic the rows of W of all tokens but y+ and y- have no gradient. In floating point they have
    rounding, whose sign would move them as far as the pair.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * signs(p.grad))


@dataclass(frozen=True)
class Stepper(Optimizer):
    """The optimisers of `sims.descent`, with sign descent made quiet."""

    def build(self, groups: Any) -> torch.optim.Optimizer:
        if self.name != "sign":
            return super().build(groups)
        return QuietSign([{"params": g["params"], "lr": self.lr * g["rate"]} for g in groups], lr=self.lr)

    @property
    def signs(self) -> bool:
        """Whether a first step has entries of one size (RMSprop's and Adam's has)."""
        return self.name != "sgd"


def courses(
    models: LanguageModel | Sequence[LanguageModel],
    prompts: Sequence[Ids],
    plus: int,
    minus: int,
    loss: Loss,
    optimizer: Stepper,
    steps: int,
    trained: str,
    moments: Sequence[int],
) -> tuple[list[Course], Array, Array]:
    """Train a run per prompt on y+ over y-, each one token.

    Returns its course at the given steps (0 among them), ln pi (B, steps + 1, V) and losses (B, steps) of all steps.
    """
    pairs = [[PreferencePair(tuple(x), (plus,), (minus,))] for x in prompts]
    at = sorted({0, *moments})

    def observe(step: int, runs: Runs) -> Any:
        log_pi = runs.next_log_probs(prompts)
        if step not in at:
            return log_pi, None
        w = runs.W[:, [plus, minus]]
        h, body = moves(runs, prompts, w[:, 0] - w[:, 1], trained=trained != "head")
        return log_pi, (h, w.double().numpy(), body)

    training = train_preferences(models, pairs, loss, optimizer, steps, trained=trained, observe=observe)
    log_pi = np.stack([seen[0] for seen in training.observed], axis=1)
    h, w, body = (np.stack(x, axis=1) for x in zip(*(seen[1] for seen in training.observed if seen[1]), strict=True))
    head = np.stack([2 * (h**2).sum(-1), 2 * abs(h).sum(-1)], axis=-1) * (trained != "body")
    own = [models] * len(prompts) if isinstance(models, LanguageModel) else list(models)
    found = [
        Course(m.W.double().numpy(), h[b], w[b], log_pi[b, at], body[b], head[b], plus, minus, final_gain(m))
        for b, m in enumerate(own)
    ]
    return found, log_pi, training.losses.T


def moments_of(steps: int, every: int) -> list[int]:
    """Steps to look at: the first ten, where the margin grows fastest, then every so many, and the last."""
    return sorted({*range(min(10, steps + 1)), *range(10, steps + 1, every), steps})

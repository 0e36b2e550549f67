r"""What pairs do to each other: the first step on all of them together.

A loss of the margin that pushes every pair alike moves the parameters by eta G A in a gradient step, with A the mean
over the pairs of g+ - g-, the gradients of ln pi(y+) and ln pi(y-) (`scoring.probe`), and by eta sgn(A) in a step of
sign descent. With g the mean of g+, the mean of ln pi(y+) and the mean margin change by

    gradient   <g, A>,  |A|^2          sign   <g, sgn A>,  |A|_1

per unit of eta (and of G). Of <g, A>, what each pair does to its own y+ is sum_i <g+_i, g+_i - g-_i>/n^2; the rest
pairs do to each other. Scores of single pairs, CHES among them, speak of the first part; where the second is larger
and of the other sign, no score of single pairs foretells the training.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from sims.language.kernel import signs
from sims.language.model import LanguageModel
from sims.language.preferences import PreferencePair
from sims.language.scoring.head import wide
from sims.language.scoring.probe import Probe


@dataclass(frozen=True)
class Together:
    """First-order changes of the mean ln pi(y+) of n pairs when they are trained on together, per nat that their mean
    margin gains; negative: it falls.

    gradient, sign : by a gradient step, by a step of sign descent. own, others : the parts of `gradient` that each pair
    does to itself and that pairs do to each other.
    """

    pairs: int
    gradient: float
    own: float
    others: float
    sign: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"a gradient step on all {self.pairs} pairs changes the mean ln pi(chosen) by {self.gradient:+.2g} per nat "
            f"of mean margin: {self.own:+.2g} by what each pair does to itself, {self.others:+.2g} by what pairs do to "
            f"each other; a sign step (how Adam begins) by {self.sign:+.2g}"
        )


def together(model: LanguageModel, pairs: Sequence[PreferencePair], progress: bool = False) -> Together:
    """The first step on all pairs. Two passes back for each pair, memory for four gradients.

    Raises ValueError for no pairs, and for pairs that no step separates (the mean gradient of the margin is zero).
    """
    if not pairs:
        raise ValueError("pairs must hold at least one pair, got none")
    probe = Probe(model)
    mean = [torch.zeros_like(wide(p.detach())) for p in probe.parameters]
    ascent = [torch.zeros_like(m) for m in mean]
    own = 0.0
    for pair in tqdm(pairs, desc="what pairs do to each other", disable=None if progress else True):
        for i, (g, k) in enumerate(probe.gradients(pair)):
            mean[i] += g / len(pairs)
            ascent[i] += (g - k) / len(pairs)
            own += _dot(g, g - k) / len(pairs) ** 2
    steps = [signs(a[None])[0] for a in ascent]
    margin, sign_margin = (sum(map(_dot, ascent, by)) for by in (ascent, steps))
    if not margin > 0:
        raise ValueError(f"pairs must have margins that a step changes, the mean gradient's square is {margin:g}")
    total = sum(map(_dot, mean, ascent)) / margin
    own /= margin
    return Together(len(pairs), total, own, total - own, sum(map(_dot, mean, steps)) / sign_margin)


def _dot(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum(dtype=torch.float64))

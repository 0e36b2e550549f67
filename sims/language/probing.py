"""One probing step: how a tiny training step changes ln pi of any responses, as a forecast of what training does later.

For responses of several tokens the theory's path has no closed form, and the kernel has one block per pair of contexts.
Its first-order content is what one tiny step on a copy of the network shows, at the cost of a training step and two
evaluations; repeated on the way, each probe holds until the next one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr

from sims.descent import Optimizer
from sims.language.kernel import signs
from sims.language.model import LanguageModel
from sims.language.preferences import PreferencePair, Runs, train_preferences
from sims.language.responses import Ids, sample
from theory.losses import Loss

Array = NDArray[np.float64]
STEP = 0.02  # nats of margin that a probing step gains


def totals(runs: Runs, prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]]) -> torch.Tensor:
    """(B, R) ln pi of each run's responses to its prompt, with gradients."""
    return runs.say([[x] * len(own) for x, own in zip(prompts, responses, strict=True)], responses).total


def probe(runs: Runs, pairs: Sequence[PreferencePair], responses: Sequence[Sequence[Ids]], by_sign: bool) -> Array:
    """(B, R) change of ln pi of the responses to the pairs' prompts per nat of the pair's margin, one pair per run.

    The step is along the gradient of the margin, or its signs, in the trained parameters: any margin loss's own first
    step, as SGD or sign descent (RMSprop and Adam, at their first step) would take it. The runs are left alone.
    """
    prompts = [p.prompt for p in pairs]
    with torch.enable_grad():
        ours = totals(runs, prompts, [[p.preferred, p.dispreferred] for p in pairs])
        gradient = runs.gradient(ours[:, 0] - ours[:, 1])
    step = {name: signs(g) if by_sign else g for name, g in gradient.items()}
    growth = torch.stack([(g * step[name]).double().flatten(1).sum(1) for name, g in gradient.items()]).sum(0)
    twin = runs.clone()
    asked = [[p.preferred, p.dispreferred, *own] for p, own in zip(pairs, responses, strict=True)]
    with torch.no_grad():
        for name, s in step.items():
            twin.parameters[name] += (STEP / growth).view(-1, *[1] * (s.dim() - 1)).to(s) * s
        change = totals(twin, prompts, asked) - totals(runs, prompts, asked)
    return (change[:, 2:] / (change[:, :1] - change[:, 1:2])).numpy()


def pairs_of_samples(
    model: LanguageModel, prompts: Sequence[Ids], wanted: int, count: int, max_tokens: int, seed: int
) -> tuple[list[PreferencePair], list[list[tuple[int, ...]]]]:
    """For `wanted` of the prompts `count` different responses from the model's own samples, two of them as a pair.

    Prompts that yield fewer are passed over. The pair is the likeliest response of more than three tokens and the
    likeliest of those with another first token (where there are none, of all the others).
    Raises ValueError if too few prompts remain.
    """
    pairs, kept = [], []
    for i, x in enumerate(prompts):
        drawn = sample(model, [x] * (20 * count), max_tokens, seed=seed + i)
        ranked = sorted({y for y in drawn if y[-1] == model.end}, key=lambda y: (-drawn.count(y), y))
        if len(ranked) < count or len(pairs) == wanted:
            continue
        long = [y for y in ranked if len(y) > 3] or ranked
        other = [y for y in ranked if len(y) > 3 and y[0] != long[0][0]] or [y for y in ranked if y != long[0]]
        pairs.append(PreferencePair(tuple(x), long[0], other[0]))
        kept.append([y for y in ranked if y not in pairs[-1][1:]][: count - 2])
    if len(pairs) < wanted:
        raise ValueError(f"prompts must hold {wanted} that yield {count} different responses, got {len(pairs)}")
    return pairs, kept


def probed(
    model: LanguageModel,
    pairs: Sequence[PreferencePair],
    responses: Sequence[Sequence[Ids]],
    loss: Loss,
    optimizer: Optimizer,
    steps: int,
    trained: str,
    moments: Sequence[int],
    gained: Sequence[float],
    pieces: Sequence[int],
) -> list[dict[str, Any]]:
    """Train each pair alone and lay probes beside it, as `mechanism.compared` lays theories; the rival is the likeliest
    of the other responses.
    """
    prompts = [p.prompt for p in pairs]
    asked = [[p.preferred, p.dispreferred, *own] for p, own in zip(pairs, responses, strict=True)]

    def observe(step: int, runs: Runs) -> Any:
        if step in moments:
            return totals(runs, prompts, asked).numpy(), probe(runs, pairs, asked, optimizer.name != "sgd")
        return None

    training = train_preferences(model, [[p] for p in pairs], loss, optimizer, steps, trained=trained, observe=observe)
    ln, slopes = (np.stack(x, axis=1) for x in zip(*filter(None, training.observed), strict=True))  # (B, T, R)
    return [_beside(ln[b], slopes[b], gained, pieces) for b in range(len(pairs))]


def _beside(ln: Array, slopes: Array, gained: Sequence[float], pieces: Sequence[int]) -> dict[str, Any]:
    """One run: ln pi and probes (T, R) at its moments; y+, y- and the rival come first."""
    u = ln[:, 0] - ln[:, 1]
    u = u - u[0]
    reach = lambda g: next((t for t in range(len(u)) if u[t] >= g), -1)  # noqa: E731
    places = [*(reach(g) for g in gained), len(u) - 1]
    change, found = ln - ln[0], {}
    for n in pieces:
        knots = sorted({reach(u.max() * k / n) for k in range(n)})
        total, expected = np.zeros(ln.shape[1]), np.empty_like(ln)
        for t in range(len(u)):
            begun = max(k for k in knots if k <= t)
            if t in knots and t:
                before = max(k for k in knots if k < t)
                total = total + slopes[before] * (u[t] - u[before])
            expected[t] = total + slopes[begun] * (u[t] - u[begun])
        found[f"probe x {n}"] = [
            [float(spearmanr(expected[t, 2:], change[t, 2:]).statistic), float(expected[t, 0]), float(expected[t, 2])]  # type: ignore[union-attr]
            if t > 0
            else None
            for t in places
        ]
    happened = [[float(change[t, 0]), float(change[t, 2])] if t > 0 else None for t in places]
    return {"happened": happened, "motion": None, "theories": found, "end": float(u[-1])}

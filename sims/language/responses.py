"""What a language model says: log-probabilities, hidden states and samples of responses.

Sequences are padded on the right: a causal network does not see what follows a position, so no mask is needed and none
can be wrong. Log-probabilities are summed in float64 from float32 logits.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sims.language.model import LanguageModel

Array = NDArray[np.float64]
Ids = Sequence[int]
CHUNK = 256  # sequences at a time


@torch.no_grad()
def next_log_probs(model: LanguageModel, prompts: Sequence[Ids]) -> Array:
    """(N, V) ln pi(. | prompt) of N prompts."""
    rows = []
    for part in _chunks(prompts):
        states = hidden_states(model, part)
        last = torch.stack([x[len(p) - 1] for x, p in zip(states, part, strict=True)])
        rows.append(torch.log_softmax(model.logits(last).double(), dim=-1))
    return torch.cat(rows).cpu().numpy()


@torch.no_grad()
def log_probs(model: LanguageModel, prompts: Sequence[Ids], responses: Sequence[Ids]) -> Array:
    """(N,) ln pi(response | prompt), summed over the response's tokens."""
    found = []
    for part, said, states in _predicting(model, prompts, responses):
        for _, y, h in zip(part, said, states, strict=True):
            rows = torch.log_softmax(model.logits(h).double(), dim=-1)
            found.append(float(rows[torch.arange(len(y)), torch.tensor(list(y))].sum()))
    return np.array(found)


@torch.no_grad()
def states(model: LanguageModel, prompts: Sequence[Ids], responses: Sequence[Ids]) -> list[Tensor]:
    """Per response its (n, d) hidden states that predict its tokens, after the final norm."""
    return [h.clone() for _, _, found in _predicting(model, prompts, responses) for h in found]


@torch.no_grad()
def sample(
    model: LanguageModel, prompts: Sequence[Ids], max_tokens: int, temperature: float = 1.0, seed: int = 0
) -> list[tuple[int, ...]]:
    """One response per prompt, drawn token by token; the token that ends a text is included if it was reached.

    The same seed gives the same responses, whatever the chunks.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature!r}")
    uniform = np.random.default_rng(seed).random((len(prompts), max_tokens))
    said: list[list[int]] = [[] for _ in prompts]
    alive = list(range(len(prompts)))
    for t in range(max_tokens):
        if not alive:
            break
        log_pi = next_log_probs(model, [(*prompts[i], *said[i]) for i in alive]) / temperature
        below = np.exp(log_pi - np.logaddexp.reduce(log_pi, axis=1, keepdims=True)).cumsum(axis=1)
        for i, row in zip(alive, below, strict=True):
            said[i].append(min(int(np.searchsorted(row, uniform[i, t] * row[-1], side="right")), len(row) - 1))
        alive = [i for i in alive if said[i][-1] != model.end]
    return [tuple(y) for y in said]


def hidden_states(model: LanguageModel, sequences: Sequence[Ids]) -> Tensor:
    """(N, T, d) states after the final norm, of sequences padded on the right to the longest."""
    ids = padded(sequences).to(model.network.device)
    limit = model.longest
    if ids.shape[1] > limit:
        raise ValueError(f"prompt and response must have at most {limit} tokens together, got {ids.shape[1]}")
    return model.network.base_model(input_ids=ids, use_cache=False).last_hidden_state


def shared(x: Ids, y: Ids) -> int:
    """How many tokens two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(x, y, strict=False)) if a != b), min(len(x), len(y)))


def padded(sequences: Sequence[Ids]) -> Tensor:
    """(N, T) tokens, zeros on the right."""
    longest = max(len(x) for x in sequences)
    if min(len(x) for x in sequences) < 1:
        raise ValueError("prompts must hold at least one token, got an empty one")
    return torch.tensor([[*x, *[0] * (longest - len(x))] for x in sequences])


def _predicting(
    model: LanguageModel, prompts: Sequence[Ids], responses: Sequence[Ids]
) -> Iterator[tuple[list[Ids], list[Ids], list[Tensor]]]:
    """Chunks of prompts and responses with the (n, d) states that predict each response's tokens."""
    if len(prompts) != len(responses):
        raise ValueError(f"prompts and responses must be as many, got {len(prompts)} and {len(responses)}")
    if any(len(y) == 0 for y in responses):
        raise ValueError("responses must not be empty")
    for start in range(0, len(prompts), CHUNK):
        part, said = list(prompts[start : start + CHUNK]), list(responses[start : start + CHUNK])
        h = hidden_states(model, [(*x, *y[:-1]) for x, y in zip(part, said, strict=True)])
        found = [row[len(x) - 1 : len(x) - 1 + len(y)] for row, x, y in zip(h, part, said, strict=True)]
        yield part, said, found


def _chunks(items: Sequence[Ids]) -> Iterator[Sequence[Ids]]:
    for start in range(0, len(items), CHUNK):
        yield items[start : start + CHUNK]

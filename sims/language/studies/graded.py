"""Preference pairs for scoring: two samples of a model, or a sample and an edit of it, from light to complete.

Of two samples a coin decides which is preferred; of a sample and its edit, the sample, or by `reversed_pairs` the edit.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sims.language.model import LanguageModel
from sims.language.preferences import PreferencePair
from sims.language.responses import next_log_probs, sample
from theory._check import check_count

Tokens = tuple[int, ...]
EDITS = {
    "replace": "1 to all tokens replaced by others that the model finds likely there",
    "tail": "the rest from some token on said anew: a shared beginning, often another length",
    "drop": "some tokens left out",
    "insert": "some tokens of another response put in",
    "other": "the response to another prompt",
}


def sampled_pairs(model: LanguageModel, prompts: Sequence[Tokens], seed: int, max_tokens: int) -> list[PreferencePair]:
    """Two samples per prompt at temperature 1; prompts where they are equal, or not both ended, give no pair."""
    rng = np.random.default_rng([seed, 0])
    one, two = (_samples(model, prompts, rng, max_tokens) for _ in range(2))
    heads = rng.random(len(prompts)) < 0.5
    plus, minus = (
        list(x) for x in zip(*((y, z) if h else (z, y) for y, z, h in zip(one, two, heads, strict=True)), strict=True)
    )
    return _pairs(model, prompts, plus, minus)


def graded_pairs(model: LanguageModel, prompts: Sequence[Tokens], seed: int, max_tokens: int) -> list[PreferencePair]:
    """A sample and an edit of it per prompt (see EDITS, each kind equally often), by `max_tokens` at most."""
    check_count(len(prompts), "the number of prompts", low=2)
    rng = np.random.default_rng([seed, 1])
    said, again = (_samples(model, prompts, rng, max_tokens) for _ in range(2))
    kinds = [list(EDITS)[k % len(EDITS)] for k in rng.permutation(len(prompts))]
    edited = list(said)
    for i, kind in enumerate(kinds):
        edited[i] = _edit(kind, said[i], again[i - 1], rng)
    _tails(model, prompts, said, edited, [i for i, k in enumerate(kinds) if k == "tail"], rng, max_tokens)
    for i in (i for i, k in enumerate(kinds) if k == "replace"):
        edited[i] = _replaced(model, prompts[i], said[i], rng)
    return _pairs(model, prompts, said, [y if len(y) <= max_tokens else () for y in edited])


def reversed_pairs(model: LanguageModel, prompts: Sequence[Tokens], seed: int, max_tokens: int) -> list[PreferencePair]:
    """The pairs of `graded_pairs` with the edit preferred."""
    return [PreferencePair(x, z, y) for x, y, z in graded_pairs(model, prompts, seed, max_tokens)]


def _samples(
    model: LanguageModel, prompts: Sequence[Tokens], rng: np.random.Generator, max_tokens: int
) -> list[Tokens]:
    return sample(model, prompts, max_tokens, seed=int(rng.integers(1 << 31)))


def _edit(kind: str, y: Tokens, foreign: Tokens, rng: np.random.Generator) -> Tokens:
    """The edits that need no model; the end of the text stays where it is."""
    body, end = y[:-1], y[-1:]
    if kind == "other":
        return foreign
    if kind == "drop" and len(body) > 1:
        n = int(rng.integers(1, len(body)))
        start = int(rng.integers(len(body) - n + 1))
        return body[:start] + body[start + n :] + end
    if kind == "insert":
        n = int(rng.integers(1, max(2, len(foreign))))
        at = int(rng.integers(len(body) + 1))
        return body[:at] + foreign[:-1][:n] + body[at:] + end
    return y


def _tails(
    model: LanguageModel,
    prompts: Sequence[Tokens],
    said: Sequence[Tokens],
    edited: list[Tokens],
    rows: list[int],
    rng: np.random.Generator,
    max_tokens: int,
) -> None:
    """Say the rest anew from a random token on."""
    cuts = [int(rng.integers(1, max(2, len(said[i])))) for i in rows]
    starts = [(*prompts[i], *said[i][:c]) for i, c in zip(rows, cuts, strict=True)]
    for i, c, rest in zip(rows, cuts, _samples(model, starts, rng, max_tokens), strict=True):
        edited[i] = said[i][:c] + rest


def _replaced(model: LanguageModel, prompt: Tokens, y: Tokens, rng: np.random.Generator) -> Tokens:
    """1 to all tokens but the last replaced by draws from what the model expects there, the token itself excluded."""
    if len(y) < 2:
        return y
    where = rng.permutation(len(y) - 1)[: int(rng.integers(1, len(y)))]
    log_pi = next_log_probs(model, [(*prompt, *y[:k]) for k in where])
    new = list(y)
    for k, row in zip(where, log_pi, strict=True):
        new[k] = _draw(row, (y[k], model.end), rng)
    return tuple(new)


def _draw(log_pi: NDArray[np.float64], excluded: tuple[int, ...], rng: np.random.Generator) -> int:
    rest = log_pi.copy()
    rest[list(excluded)] = -np.inf
    p = np.exp(rest - rest.max())
    return int(rng.choice(len(p), p=p / p.sum()))


def _pairs(
    model: LanguageModel, prompts: Sequence[Tokens], plus: Sequence[Tokens], minus: Sequence[Tokens]
) -> list[PreferencePair]:
    """Pairs of different responses that both end."""
    triples = zip(prompts, plus, minus, strict=True)
    return [PreferencePair(x, y, z) for x, y, z in triples if y and z and y != z and y[-1] == model.end == z[-1]]

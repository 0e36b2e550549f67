"""A few fixed pairs with candidate responses, measured again and again on a network in training: where the mass goes.

Measured on the network itself, through its own forward pass, so that adapters, wrappers and caps of the logits are in
it; in evaluation mode, without gradients and without drawing a random number, so that training goes on as if nothing
had been asked.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sims.language.data.layouts import detect_layout
from sims.language.model import LanguageModel
from sims.language.pairing import Example, tokenize
from sims.language.preferences import PreferencePair
from sims.language.responses import Ids, padded
from theory._check import check_count

Tokens = tuple[int, ...]
SHOWN = 5  # candidates that gained most
WIDTH = 60  # characters of a text that is shown


@dataclass(frozen=True)
class Probe:
    """n pairs, as tokens, and per pair other responses to its prompt.

    Raises ValueError for an empty prompt or response, and for a response twice with one prompt.
    """

    pairs: tuple[PreferencePair, ...]
    candidates: tuple[tuple[Tokens, ...], ...] = ()

    def __post_init__(self) -> None:
        pairs = tuple(PreferencePair(*(tuple(map(int, x)) for x in p)) for p in self.pairs)
        own = self.candidates or ((),) * len(pairs)
        if not pairs or len(own) != len(pairs):
            raise ValueError(f"probe must hold pairs and as many groups of candidates, got {len(pairs)} and {len(own)}")
        object.__setattr__(self, "pairs", pairs)
        object.__setattr__(self, "candidates", tuple(tuple(tuple(map(int, y)) for y in group) for group in own))
        for i, (p, said) in enumerate(zip(pairs, self.responses, strict=True)):
            if not p.prompt or not all(said):
                raise ValueError(
                    f"probe must hold prompts and responses of at least one token, pair {i} has an empty one"
                )
            if len(set(said)) < len(said):
                raise ValueError(f"probe must hold every response to a prompt once, pair {i} has one twice")

    @property
    def responses(self) -> list[list[Tokens]]:
        """Per pair: chosen, rejected, candidates."""
        return [[p.preferred, p.dispreferred, *own] for p, own in zip(self.pairs, self.candidates, strict=True)]

    def log_probs(self, network: Any) -> list[list[float]]:
        """ln pi of every response, in nats per sequence, in the order of `responses`; the network stays as it is."""
        with evaluating(network):
            return [_log_probs(network, p.prompt, own) for p, own in zip(self.pairs, self.responses, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "pairs": [list(map(list, p)) for p in self.pairs],
            "candidates": [list(map(list, own)) for own in self.candidates],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Probe":
        return cls(tuple(values["pairs"]), tuple(values["candidates"]))

    @classmethod
    def draw(
        cls,
        network: Any,
        tokenizer: Any,
        rows: Sequence[Mapping[str, Any]],
        *,
        pairs: int = 16,
        candidates: int | Sequence[str] = 4,
        max_tokens: int = 64,
        max_length: int | None = None,
        seed: int = 0,
    ) -> "Probe":
        """Pairs of a preference data set, drawn at random, with candidates. The generators of torch are left alone.

        Parameters
        ----------
        network, tokenizer : what will be trained, as it is before.
        rows : a `datasets.Dataset`, or a list of dictionaries, in any layout that `displacement score` reads.
        pairs : how many; all usable ones where there are fewer.
        candidates : how many different responses to sample from the network, of at most `max_tokens` tokens; or texts,
            the same for every prompt. Further rejected responses of a row are candidates, too.
        max_length : most tokens of prompt and response, as in TRL.

        Raises ValueError for a data set without a layout or without a usable row.
        """
        check_count(pairs, "pairs")
        model = LanguageModel(network, tokenizer)
        layout = detect_layout([rows[i] for i in range(min(len(rows), 8))])
        found, groups, why = [], [], "it is empty"
        for k, i in enumerate(np.random.default_rng(seed).permutation(len(rows))):
            try:
                example = layout.example(rows[int(i)])
                first, *others = (t.pair for t in tokenize(model, example, max_length))
            except ValueError as error:
                why = str(error)
                continue
            more = [p.dispreferred for p in others if p.prompt == first.prompt]
            if isinstance(candidates, int):
                more += _sampled(model, first, candidates, max_tokens, seed + k) if candidates else []
            else:
                more += _given(model, example, candidates, first, max_length)
            found.append(first)
            groups.append(tuple(y for y in dict.fromkeys(more) if y not in first[1:]))
            if len(found) == pairs:
                break
        if not found:
            raise ValueError(f"rows must hold a usable pair, none of {len(rows)} is: {why}")
        return cls(tuple(found), tuple(groups))


@dataclass(frozen=True)
class Probed:
    """What a probe saw during a training.

    steps : (T,) ; log_probs : (T, n, 2 + candidates) ln pi in nats per sequence of chosen, rejected and candidates.
    texts : (n, 3 + candidates) of prompts and responses. The first row is the start.
    """

    steps: tuple[int, ...]
    log_probs: tuple[tuple[tuple[float, ...], ...], ...]
    texts: tuple[tuple[str, ...], ...]
    probe: Probe

    def mean(self, response: int) -> list[float]:
        """(T,) ln pi of chosen (0) or rejected (1), mean over the pairs, in nats per sequence."""
        return [float(np.mean([own[response] for own in row])) for row in self.log_probs]

    def change(self, response: int) -> list[float]:
        """(T,) the same since the start."""
        mean = self.mean(response)
        return [x - mean[0] for x in mean]

    @property
    def gains(self) -> list[tuple[float, float, str, str]]:
        """Per candidate its change of ln pi from the first step to the last, ln pi at the last, prompt and text; most
        gained first.
        """
        pairs = zip(self.log_probs[0], self.log_probs[-1], self.texts, strict=True)
        every = [(b - a, b, text[0], y) for x, z, text in pairs for a, b, y in zip(x[2:], z[2:], text[3:], strict=True)]
        return sorted(every, key=lambda row: -row[0] if math.isfinite(row[0]) else math.inf)

    @property
    def held(self) -> list[float]:
        """(T,) probability that a response is one of those probed, mean over the pairs."""
        # A response that continues another one is part of its probability.
        apart = [[j for j, y in enumerate(own) if not _continues(y, own)] for own in self.probe.responses]
        each = [[sum(math.exp(x[j]) for j in js) for x, js in zip(row, apart, strict=True)] for row in self.log_probs]
        return np.mean(each, axis=1).tolist()

    def to_dict(self) -> dict[str, Any]:
        return {
            "steps": list(self.steps),
            "chosen_change": self.change(0),
            "rejected_change": self.change(1),
            "probability_held": self.held,
            "pairs": [
                {"prompt": text[0], "responses": list(text[1:]), "log_probs": [list(row[i]) for row in self.log_probs]}
                for i, text in enumerate(self.texts)
            ],
        }

    def __str__(self) -> str:
        fell = sum(b[0] < a[0] for a, b in zip(self.log_probs[0], self.log_probs[-1], strict=True))
        n, held = len(self.texts), self.held
        lines = [
            f"Probe of {n} pairs, step {self.steps[0]} to {self.steps[-1]}: chosen log-probability "
            f"{self.change(0)[-1]:+.3g} nats (it fell in {fell} of {n} pairs), rejected {self.change(1)[-1]:+.3g} nats."
        ]
        gains = self.gains
        if gains:
            up = [g for g in gains if g[0] > 0]
            lines.append(
                f"Where the mass goes: {len(up)} of {len(gains)} candidate responses gained. All responses probed held "
                f"{held[0]:.3g} of the probability, now {held[-1]:.3g}; the rest is with responses not probed."
            )
            lines += [f"  {g:+.3g} nats, now ln pi {b:.3g}: {_cut(y)!r} after {_cut(x)!r}" for g, b, x, y in up[:SHOWN]]
        return "\n".join(lines)


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Every module in evaluation mode, then each as it was."""
    training = [m for m in network.modules() if m.training]
    network.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


@torch.no_grad()
def _log_probs(network: Any, prompt: Ids, responses: Sequence[Ids]) -> list[float]:
    said = [(*prompt, *y[:-1]) for y in responses]
    ids = padded(said).to(network.device)
    mask = torch.tensor([[int(i < len(x)) for i in range(ids.shape[1])] for x in said], device=ids.device)
    logits = network(input_ids=ids, attention_mask=mask, use_cache=False).logits
    first, out = len(prompt) - 1, []
    for row, y in zip(logits, responses, strict=True):
        ln = row[first : first + len(y)].float().log_softmax(dim=-1)
        out.append(float(ln.gather(-1, torch.tensor(y, device=ln.device)[:, None]).cpu().double().sum()))
    return out


@torch.no_grad()
def _sampled(model: LanguageModel, pair: PreferencePair, count: int, max_tokens: int, seed: int) -> list[Tokens]:
    """Up to `count` different responses but the pair's own, the most frequent of four times as many samples."""
    network, room = model.network, min(max_tokens, model.longest - len(pair.prompt))
    if room < 1:
        return []
    stop = getattr(network.generation_config, "eos_token_id", None)
    ends = {model.end, *(stop if isinstance(stop, list) else [] if stop is None else [stop])}
    ids = padded([pair.prompt]).to(network.device)
    place = ids.device.type
    with torch.random.fork_rng([] if place == "cpu" else [ids.device], device_type="cuda" if place == "cpu" else place):
        torch.manual_seed(seed)
        with evaluating(network):
            rows = network.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=room,
                num_return_sequences=4 * count,
                pad_token_id=model.end,
            )
    drawn = []
    for row in rows[:, ids.shape[1] :].tolist():
        at = next((j for j, token in enumerate(row) if token in ends), len(row) - 1)
        drawn.append(tuple(row[: at + 1]))
    ranked = sorted({y for y in drawn if y not in pair[1:]}, key=lambda y: (-drawn.count(y), y))
    return ranked[:count]


def _given(
    model: LanguageModel, example: Example, texts: Sequence[str], pair: PreferencePair, max_length: int | None
) -> list[Tokens]:
    """Texts as responses, ended as the chosen one is: by the end token, or by the chat template."""
    if isinstance(example.chosen, str) or not isinstance(example.chosen[0], Mapping):
        return [model.response(text) for text in texts]
    out = []
    for text in texts:
        said = [*([] if example.prompt else example.chosen[:-1]), {"role": "assistant", "content": text}]
        try:
            asked = Example(example.prompt, said, example.rejected[:1], False, example.template)
            p = tokenize(model, asked, max_length)[0].pair
        except ValueError:  # it is the rejected one, or does not fit
            continue
        out += [p.preferred] if p.prompt == pair.prompt else []
    return out


def _continues(y: Tokens, others: Sequence[Tokens]) -> bool:
    return any(len(x) < len(y) and y[: len(x)] == x for x in others)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"

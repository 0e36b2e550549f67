r"""States of many preference pairs by any causal language model: the backbone alone, batched, the prompt encoded once.

Of a pair only the states that predict its tokens are wanted, after the final norm: no logits are built, and the last
token of a response is not run. Where the architecture allows it, a pair is one row

    [ what both begin with | rest of chosen | rest of rejected ]

in which the rejected part sees the first part and itself (a 4-D attention mask) and counts its positions from the end
of the first. Whether it allows it is measured, not listed: a pair of random tokens is encoded both ways, and the two
must agree as well as two plain encodings in batches of different shape do. Sliding windows shorter than the text,
recurrent states and ALiBi do not; then every response is a row of its own. A measurement depends on the model and on a
length (a power of two) and on nothing else: the same pairs are encoded alike whatever was encoded before them.
"""

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sims.language.model import LanguageModel
from sims.language.preferences import PreferencePair
from sims.language.responses import shared
from sims.language.scoring.encoded import Encoded
from sims.language.scoring.matmul import Products
from theory._check import check_count, unknown

Ids = NDArray[np.int64]
CPU_TOKENS, TOKENS = 1024, 16_384  # of a batch; more than what a cache holds gains nothing on a CPU
SHORTEST = 256  # tokens of the shortest row that is measured
SHORT = 8  # tokens of the short response in it
NOISE = 4.0  # times the spread of plain encodings: what two encodings may differ by
SIDES = ("right", "left")


@dataclass(frozen=True)
class Sharing:
    """Whether pairs of up to `size` tokens may share the prompt: deviation of the states over their size, and what of
    it is noise."""

    size: int
    deviation: float
    tolerance: float
    error: str = ""

    @property
    def allowed(self) -> bool:
        return not self.error and self.deviation <= self.tolerance


class Encoder:
    """Encodes pairs in batches of at most `batch_tokens` tokens (padding included), the longest first.

    Parameters
    ----------
    model : in evaluation mode, of any dtype, on any device.
    batch_tokens : a pair that is longer than this is a batch of its own; default 1024 on a CPU, else 16,384.
    padding_side : "right", or "left", which gives the same states.
    share : False encodes every response with its own prompt.

    Raises ValueError for a network in training mode, or without a backbone that returns states.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch_tokens: int | None = None,
        padding_side: str = "right",
        share: bool = True,
    ) -> None:
        if padding_side not in SIDES:
            raise ValueError(unknown("padding_side", padding_side, SIDES))
        if model.network.training:
            raise ValueError("model must be in evaluation mode: call model.network.eval() first")
        self.model, self.share, self.left = model, share, padding_side == "left"
        self.base = model.network.base_model
        if self.base is model.network:
            raise ValueError(f"model must have a backbone apart from its head, {type(self.base).__name__} has none")
        parameter = next(model.network.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        usual = CPU_TOKENS if self.device.type == "cpu" else TOKENS
        self.batch_tokens = check_count(usual if batch_tokens is None else batch_tokens, "batch_tokens")
        self._takes_positions = "position_ids" in inspect.signature(self.base.forward).parameters
        self._measured: dict[int, Sharing] = {}

    # ---- pairs

    def __call__(self, pairs: Sequence[PreferencePair]) -> Iterator[Encoded]:
        """The states of all pairs, batch by batch.

        Raises ValueError for a pair without a prompt or with an empty response, or longer than the model takes.
        """
        for p in pairs:
            if problem := self.problem(p):
                raise ValueError(problem)
        sizes = [(self.sharing(p).allowed if self.share else False) for p in pairs]
        for together in (True, False):
            mine = [i for i, s in enumerate(sizes) if s == together]
            size = {i: (_packed_length if together else _longest)(pairs[i]) for i in mine}
            for index in self._batches(size, 1 if together else 2):
                part = [pairs[i] for i in index]
                yield Encoded(index, *(self._together(part) if together else self._apart(part)))

    def problem(self, pair: PreferencePair) -> str:
        """Why a pair cannot be encoded; empty if it can."""
        for name, ids in zip(("prompt", "chosen response", "rejected response"), pair, strict=True):
            if len(ids) == 0:
                return f"the {name} is empty"
            if min(ids) < 0 or max(ids) >= self.vocabulary:
                return f"the {name} must hold tokens in [0, {self.vocabulary}), it has {min(ids)} to {max(ids)}"
        if (size := _longest(pair) + 1) > self.model.longest:
            return f"prompt and response have {size} tokens, the model takes {self.model.longest}"
        return ""

    @cached_property
    def vocabulary(self) -> int:
        """Tokens that the model reads."""
        return self.model.network.get_input_embeddings().num_embeddings

    def _batches(self, size: dict[int, int], rows: int) -> Iterator[list[int]]:
        """Indices, the longest first, each batch within the budget of tokens."""
        batch: list[int] = []
        for i in sorted(size, key=lambda i: (-size[i], i)):
            if batch and rows * (len(batch) + 1) * size[batch[0]] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _together(self, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One row per pair."""
        T = max(_packed_length(p) for p in pairs)
        ids, position, part = (np.full((len(pairs), T), fill) for fill in (0, 0, -1))
        plus, minus = (np.zeros((len(pairs), T), dtype=bool) for _ in range(2))
        for b, p in enumerate(pairs):
            chosen, rejected = (*p.prompt, *p.preferred[:-1]), (*p.prompt, *p.dispreferred[:-1])
            x, s, c, n = len(p.prompt), shared(chosen, rejected), len(chosen), _packed_length(p)
            at = slice(T - n, T) if self.left else slice(0, n)
            ids[b, at] = (*chosen, *rejected[s:])
            position[b, at] = (*range(c), *range(s, len(rejected)))
            part[b, at] = np.repeat((0, 1, 2), (s, c - s, n - c))
            plus[b, at][x - 1 : c] = True
            minus[b, at][[*range(x - 1, s), *range(c, n)]] = True
        h = self._states(ids, self._tree_mask(torch.as_tensor(part, device=self.device)), position)
        keep_plus, keep_minus = (torch.as_tensor(k, device=self.device) for k in (plus, minus))
        return h, h, keep_plus, keep_minus

    def _tree_mask(self, part: Tensor) -> Tensor:
        """(B, 1, T, T) added to attention: 0 where a position sees an earlier one of part 0 or of its own part."""
        T = part.shape[1]
        sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])
        sees &= torch.ones(T, T, dtype=torch.bool, device=part.device).tril()
        mask = torch.zeros(sees.shape, dtype=self.dtype, device=part.device)
        return mask.masked_fill_(~sees, torch.finfo(self.dtype).min)[:, None]

    def _apart(self, pairs: Sequence[PreferencePair]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One row per response; equal ones are one row, so that equal responses have equal states."""
        texts = [[(*p.prompt, *p.preferred[:-1]) for p in pairs], [(*p.prompt, *p.dispreferred[:-1]) for p in pairs]]
        rows = {text: i for i, text in enumerate(dict.fromkeys(texts[0] + texts[1]))}
        T = max(len(text) for text in rows)
        h = self._plain(list(rows), T)
        out = []
        for own in texts:
            keep = np.zeros((len(pairs), T), dtype=bool)
            for b, (p, text) in enumerate(zip(pairs, own, strict=True)):
                at = slice(T - len(text), T) if self.left else slice(0, len(text))
                keep[b, at][len(p.prompt) - 1 :] = True
            out.append((h[[rows[text] for text in own]], torch.as_tensor(keep, device=self.device)))
        return out[0][0], out[1][0], out[0][1], out[1][1]

    def _plain(self, texts: Sequence[Sequence[int]], T: int) -> Tensor:
        """(N, T, d) states of texts, padded to T."""
        ids, position, mask = (np.zeros((len(texts), T), dtype=np.int64) for _ in range(3))
        for row, text in enumerate(texts):
            at = slice(T - len(text), T) if self.left else slice(0, len(text))
            ids[row, at], position[row, at], mask[row, at] = text, range(len(text)), 1
        return self._states(ids, torch.as_tensor(mask, device=self.device), position)

    @torch.no_grad()
    def _states(self, ids: Ids, mask: Tensor, position: Ids) -> Tensor:
        """(N, T, d) states after the final norm."""
        more: dict[str, Any] = {}
        if self._takes_positions:
            more["position_ids"] = torch.as_tensor(position, device=self.device)
        tokens = torch.as_tensor(ids, device=self.device)
        with Products():
            return self.base(input_ids=tokens, attention_mask=mask, use_cache=False, **more).last_hidden_state

    # ---- what the architecture allows

    def sharing(self, pair: PreferencePair) -> Sharing:
        """Whether a pair of this length may share the prompt; measured once per power of two."""
        size, length = SHORTEST, _packed_length(pair) + SHORT
        while size < length:
            size *= 2
        size = min(size, self.model.longest)
        if length > size:
            return Sharing(size, math.inf, 0.0, "with both responses in it, a row would be longer than the model takes")
        if size not in self._measured:
            self._measured[size] = self._measure(size)
        return self._measured[size]

    def _measure(self, size: int) -> Sharing:
        """A row of `size` random tokens; the rejected response is short, so that the other text is no shorter than
        that of any pair judged by this.

        Raises ValueError if padding on the chosen side changes the states.
        """
        draw = np.random.default_rng(size).integers(0, self.vocabulary, size=(2, size)).tolist()
        start = self.model.tokenizer.bos_token_id
        if start is not None:  # what draws much attention is what a window loses first
            draw[0][0] = start
        x, n = size // 2, size - SHORT
        draw[1][0] = (draw[0][x] + 1) % self.vocabulary  # the responses part at once
        pair = PreferencePair(tuple(draw[0][:x]), tuple(draw[0][x : n + 1]), tuple(draw[1][: SHORT + 1]))
        texts = [draw[0][:n], draw[0][:x] + draw[1][:SHORT]]
        plain = [self._plain([text], len(text))[0, x - 1 :] for text in texts]
        batch = zip(self._plain(texts, size - 1), texts, strict=True)
        batch = [(h[-len(t) :] if self.left else h[: len(t)])[x - 1 :] for h, t in batch]
        spread = _deviation(plain, batch)
        unit = torch.finfo(self.dtype).eps
        if spread > min(100 * unit, 0.1):
            side = "left" if self.left else "right"
            raise ValueError(f"padding on the {side} changes the states of this model by {spread:.1g} of their size")
        tolerance = NOISE * max(spread, min(16 * unit, 1e-3))  # short plain encodings may agree to the last bit
        try:
            _, plus, minus = next(iter(Encoded([0], *self._together([pair]))))
        except Exception as error:  # whatever an architecture raises that does not know such a mask
            return Sharing(size, math.inf, tolerance, f"{type(error).__name__}: {error}")
        return Sharing(size, _deviation(plain, (plus, minus)), tolerance)

    @property
    def shared_prompt(self) -> str:
        """Which way the pairs met so far were encoded, and why."""
        if not self.share:
            return "no: switched off"
        out = []
        for size, m in sorted(self._measured.items()):
            why = m.error or f"states differ by {m.deviation:.1g} of their size, {m.tolerance:.1g} is noise"
            out.append(f"{'yes' if m.allowed else 'no'} up to {size} tokens: {why}")
        return "; ".join(out) or "not measured yet"

    @cached_property
    def head_deviation(self) -> float:
        """Largest |logits of the whole network - logits from its states| on a short text, in nats.

        Above rounding, the network does more with its states than W h + b with a known scale or soft cap.
        """
        text = np.random.default_rng(0).integers(0, self.vocabulary, size=(1, min(8, self.model.longest)))
        tokens = torch.as_tensor(text, device=self.device)
        with torch.no_grad():
            whole = self.model.network(input_ids=tokens, use_cache=False).logits
            ours = self.model.logits(self.base(input_ids=tokens, use_cache=False).last_hidden_state)
        return float((whole - ours).abs().max())

    @property
    def head_noise(self) -> float:
        """What rounding alone may make of `head_deviation`."""
        return max(1e-3, 100 * torch.finfo(self.dtype).eps)


def _longest(pair: PreferencePair) -> int:
    """Tokens to run of the longer text."""
    return len(pair.prompt) + max(len(pair.preferred), len(pair.dispreferred)) - 1


def _packed_length(pair: PreferencePair) -> int:
    """Tokens to run when what both texts begin with is run once."""
    n, m = len(pair.preferred) - 1, len(pair.dispreferred) - 1
    return len(pair.prompt) + n + m - shared(pair.preferred[:n], pair.dispreferred[:m])


def _deviation(states: Iterable[Tensor], others: Iterable[Tensor]) -> float:
    """Largest |h - h'| / |h| over responses (n, d); NaN if one is not finite."""
    return float(
        np.max([float((h - k).double().norm() / h.double().norm()) for h, k in zip(states, others, strict=True)])
    )

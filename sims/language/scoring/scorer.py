r"""Scores of preference pairs by any causal language model: what is expected to lower ln pi(chosen), before training.

The larger `ches`, `ln_ches`, `alpha` and `last_hidden`, and the smaller `edit_distance`, the deeper a fall of the
chosen log-probability is expected; the columns of the probe are changes themselves, negative where it falls.

    ches, ln_ches       <S+, S- - S+> of the sums (means) of the states that predict the tokens of the chosen (+) and
                        the rejected (-) response (`theory.ches`)
    last_hidden         <h+, h-> of the last of these states
    edit_distance       Levenshtein distance of the tokens over the longer length, in [0, 1]
    len_chosen, len_rejected    tokens
    shared_prefix       tokens that both responses begin with, over the shorter length, in [0, 1]

and on request

    ref_chosen_logps, ref_rejected_logps    ln pi of the responses, under the names by which TRL recognises them
    alpha               what training the unembedding alone takes from ln pi(chosen) (`scoring.head`)
    gradient_step_chosen, gradient_step_margin, sign_step_chosen, sign_step_margin      see `scoring.probe`

Sums are float64, whatever the dtype of the weights. A pair that cannot be scored has NaN in every column, and a reason.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sims.language.model import LanguageModel
from sims.language.pairing import Example, Tokenized, tokenize
from sims.language.preferences import PreferencePair
from sims.language.responses import shared
from sims.language.scoring.encoded import Encoded
from sims.language.scoring.encoder import Encoder
from sims.language.scoring.head import alpha_term, log_probs
from sims.language.scoring.probe import PROBE, Probe
from theory import __version__
from theory._check import check_count, unknown
from theory.ches import ches_scores, edit_similarity, last_hidden_inner_product

DEFAULT = ("ches", "ln_ches", "last_hidden", "edit_distance", "len_chosen", "len_rejected", "shared_prefix")
LOGPS = ("ref_chosen_logps", "ref_rejected_logps")
COLUMNS = (*DEFAULT, *LOGPS, "alpha", *PROBE)
OF_STATES = frozenset(("ches", "ln_ches", "last_hidden", *LOGPS, "alpha"))
_LIVE: WeakValueDictionary[str, "Scorer"] = WeakValueDictionary()  # those that were pickled, by what they are


class Scorer:
    """Scores pairs, examples, or the batches of `datasets.Dataset.map(scorer, batched=True)`.

    Parameters
    ----------
    model : in evaluation mode; its weights stay as they are.
    columns : names among COLUMNS.
    layout, columns_map : for batches of a data set, as in `sims.language.data.layouts.detect_layout`.
    max_length : most tokens of prompt and response, as in TRL (default: what the model takes).
    batch_tokens, padding_side : how many tokens the network reads at a time, and where padding goes; scores do not
        depend on either beyond rounding.

    Raises ValueError for unknown columns, and for log-probabilities or `alpha` of a model whose logits are not made of
    its states as its configuration says.
    """

    def __init__(
        self,
        model: LanguageModel,
        columns: Sequence[str] = DEFAULT,
        *,
        layout: str | None = None,
        columns_map: Mapping[str, str] | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        padding_side: str = "right",
    ) -> None:
        for name in columns:
            if name not in COLUMNS:
                raise ValueError(unknown("columns", name, COLUMNS))
        self.model, self.columns = model, tuple(dict.fromkeys(columns))
        self.max_length = None if max_length is None else check_count(max_length, "max_length")
        self.encoder = Encoder(model, batch_tokens=batch_tokens, padding_side=padding_side)
        self.probe = Probe(model) if set(PROBE).intersection(columns) else None
        self.layout, self.columns_map = layout, dict(columns_map or {})
        asked = {*LOGPS, "alpha"}.intersection(columns)
        if asked and self.encoder.head_deviation > self.encoder.head_noise:
            raise ValueError(
                f"columns {sorted(asked)} need logits that are made of the last states, those of this model "
                f"({type(model.network).__name__}) differ by {self.encoder.head_deviation:.1g} nats"
            )

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """Columns for a batch of rows, column -> values, as `datasets` hands it over."""
        from sims.language.data.layouts import detect_layout

        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        layout = detect_layout(rows, self.layout, self.columns_map)
        return self.score_examples([_read(layout, row) for row in rows])

    def __reduce__(self) -> tuple[Any, ...]:
        """A name instead of the weights: `datasets` hashes a function by its pickle, and hands it to processes that it
        forks off this one, where the name is known."""
        of = (self.columns, self.layout, self.columns_map, self.max_length, self.encoder.batch_tokens)
        key = f"{self.model.fingerprint} {__version__} {of} {self.encoder.left}"
        _LIVE[key] = self
        return _recall, (key,)

    def score(self, pairs: Sequence[PreferencePair]) -> dict[str, list[float]]:
        """The columns of every pair, in the order given; NaN in all of them for a pair that cannot be scored."""
        return self.scored(pairs)[0]

    def scored(self, pairs: Sequence[PreferencePair]) -> tuple[dict[str, list[float]], list[str]]:
        """The columns, and for every pair why it could not be scored ("" if it was)."""
        reasons = [self.encoder.problem(p) for p in pairs]
        rows: list[dict[str, float]] = [{} for _ in pairs]
        good = [i for i, reason in enumerate(reasons) if not reason]
        if OF_STATES.intersection(self.columns):
            for batch in self.encoder([pairs[i] for i in good]):
                own = [pairs[good[i]] for i in batch.index]
                for i, found in zip(batch.index, self._of_states(batch, own), strict=True):
                    rows[good[i]] |= found
        for i in good:
            rows[i] |= of_tokens(pairs[i])
            if self.probe:
                rows[i] |= self.probe(pairs[i])
            if bad := [name for name in self.columns if not math.isfinite(rows[i][name])]:
                reasons[i] = f"the model computes NaN or infinity: {', '.join(bad)}"
        lost = dict.fromkeys(self.columns, math.nan)
        rows = [lost if reason else row for row, reason in zip(rows, reasons, strict=True)]
        return {name: [row[name] for row in rows] for name in self.columns}, reasons

    def _of_states(self, batch: Encoded, pairs: Sequence[PreferencePair]) -> list[dict[str, float]]:
        """What the states of a batch say, for each of its pairs."""
        columns: dict[str, list[float]] = {}
        for name in ("ches", "ln_ches"):
            if name in self.columns:
                columns[name] = _ches(batch, name == "ln_ches")
        each = [(h, k) for _, h, k in batch]
        if "last_hidden" in self.columns:
            columns["last_hidden"] = [_last(h, k) for h, k in each]
        tokens = [[torch.tensor(y, device=h.device) for y in p[1:]] for p, (h, _) in zip(pairs, each, strict=True)]
        for i, name in enumerate(LOGPS):
            if name in self.columns:
                y = [own[i] for own in tokens]
                found = log_probs(self.model, torch.cat([own[i] for own in each]), torch.cat(y))
                columns[name] = [float(x.sum()) for x in found.split([len(own) for own in y])]
        if "alpha" in self.columns:
            columns["alpha"] = [alpha_term(self.model, *own, *y) for own, y in zip(each, tokens, strict=True)]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def score_examples(self, examples: Sequence[Example | ValueError]) -> dict[str, list[Any]]:
        """The columns of every example, and `reason` and `note`; lists where a row has a list of rejected responses.

        An example that is an error (a row that could not be read) passes it on as its reason.
        """
        found: list[list[Tokenized | ValueError]] = [self._tokenized(e) for e in examples]
        flat = [t for own in found for t in own]
        columns, reasons = self.scored([t.pair for t in flat if isinstance(t, Tokenized)])
        scored = iter(zip(*columns.values(), reasons, strict=True))
        names = (*self.columns, "reason", "note")
        nothing = [math.nan] * len(self.columns)
        rows = [(*next(scored), t.note) if isinstance(t, Tokenized) else (*nothing, str(t), "") for t in flat]
        out: dict[str, list[Any]] = {name: [] for name in names}
        # A row that could not be read is like the others, as a column has one type.
        usual = any(isinstance(e, Example) and e.several for e in examples)
        at = 0
        for example, own in zip(examples, found, strict=True):
            several = example.several if isinstance(example, Example) else usual
            for name, *values in zip(names, *rows[at : at + len(own)], strict=True):
                out[name].append(values if several else values[0])
            at += len(own)
        return out

    def _tokenized(self, example: Example | ValueError) -> list[Tokenized | ValueError]:
        """A pair or what is wrong with it, for each rejected response."""
        if isinstance(example, ValueError):
            return [example]
        out: list[Tokenized | ValueError] = []
        for rejected in example.rejected:
            try:
                out += tokenize(self.model, replace(example, rejected=(rejected,)), self.max_length)
            except ValueError as error:
                out.append(error)
        return out or [ValueError("rejected holds no response")]


def _recall(key: str) -> Scorer:
    if key not in _LIVE:
        raise ValueError("a Scorer does not travel to a process that was not forked off its own: make it there")
    return _LIVE[key]


def _read(layout: Any, row: Mapping[str, Any]) -> Example | ValueError:
    try:
        return layout.example(row)
    except ValueError as error:
        return error


def of_tokens(pair: PreferencePair) -> dict[str, float]:
    """The columns that need no model."""
    y, z = pair.preferred, pair.dispreferred
    shorter = min(len(y), len(z))
    return {
        "edit_distance": -edit_similarity(y, z),
        "len_chosen": float(len(y)),
        "len_rejected": float(len(z)),
        "shared_prefix": shared(y, z) / shorter,
    }


def _ches(batch: Encoded, mean: bool) -> list[float]:
    """CHES of a batch; NaN for a pair whose states are not finite."""
    try:
        return ches_scores(batch.plus, batch.minus, batch.mask_plus, batch.mask_minus, mean).tolist()
    except ValueError:
        if len(batch.index) == 1:
            return [math.nan]
        return [x for b in range(len(batch.index)) for x in _ches(batch.part(b), mean)]


def _last(h: Tensor, k: Tensor) -> float:
    """<h+, h-> of the last states; NaN if they are not finite."""
    try:
        return last_hidden_inner_product(h[-1], k[-1])
    except ValueError:
        return math.nan

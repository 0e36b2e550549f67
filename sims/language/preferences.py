"""Preference training of language models: any loss of the registry, any optimiser, many independent runs at once.

B runs of networks of one architecture are stacked: every parameter has shape (B, ...), one `vmap` evaluates them all,
and an optimiser that works entry by entry trains them all. Ten runs of a small network cost about three single ones.
The objective is the loss's value over log-probabilities, differentiated automatically: no formula of `theory` but the
loss's own takes part.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, vmap
from tqdm.auto import tqdm

from sims.descent import Optimizer
from sims.language.model import LanguageModel
from sims.language.responses import Ids, padded
from theory._check import SolverError, check_count, check_number, unknown
from theory.losses import Group, Interval, Loss, Pair, TokenLoss, Tokens

Array = NDArray[np.float64]
TRAINED = {"both": (1.0, 1.0), "head": (1.0, 0.0), "body": (0.0, 1.0)}
Observe = Callable[[int, "Runs"], Any]


class PreferencePair(NamedTuple):
    """A prompt and two responses, as tokens."""

    prompt: tuple[int, ...]
    preferred: tuple[int, ...]
    dispreferred: tuple[int, ...]


class Said(NamedTuple):
    """R responses of every run, token by token: arrays (B, R, L), zero beyond a response's length."""

    log_pi: Tensor  # (B, R, L, V) ln pi(. | prompt, tokens before)
    hidden: Tensor  # (B, R, L, d) the states that predict the tokens, after the final norm
    tokens: Tensor  # (B, R, L)
    mask: Tensor  # (B, R, L) 1 where there is a token

    @property
    def each(self) -> Tensor:
        """(B, R, L) ln pi of the tokens."""
        return self.log_pi.gather(-1, self.tokens[..., None])[..., 0] * self.mask

    @property
    def total(self) -> Tensor:
        """(B, R) ln pi of the responses."""
        return self.each.sum(-1)

    @property
    def lengths(self) -> Tensor:
        """(B, R) number of tokens."""
        return self.mask.sum(-1).double()


class Runs:
    """B independent copies of networks of one architecture, their parameters stacked.

    models : one per run (or one model and `count`).
    trained : "both", "head" (the unembedding alone), "body" (all else), or factors of the learning rate of
        (unembedding, body).

    parameters : name -> (B, ...), leaves that require a gradient where they are trained.
    """

    def __init__(
        self,
        models: LanguageModel | Sequence[LanguageModel],
        count: int = 1,
        trained: str | tuple[float, float] = "both",
    ) -> None:
        self.models = [models] * check_count(count, "count") if isinstance(models, LanguageModel) else list(models)
        if not self.models:
            raise ValueError("models must hold at least one model, got none")
        if isinstance(trained, str):
            if trained not in TRAINED:
                raise ValueError(unknown("trained", trained, tuple(TRAINED)))
            trained = TRAINED[trained]
        low = Interval(low=0.0, open_low=False)
        self.rates = tuple(check_number(r, "trained", low) for r in trained)
        if len(self.rates) != 2 or not any(self.rates):
            raise ValueError(f"trained must hold two factors, not both 0, got {trained!r}")
        first = self.models[0]
        self.head = first.head
        networks = [dict(m.network.named_parameters()) for m in self.models]
        shapes = [{name: tuple(p.shape) for name, p in network.items()} for network in networks]
        for i, shape in enumerate(shapes):
            if shape != shapes[0]:
                raise ValueError(f"models must have parameters of the same shapes, number {i} differs from the first")
        self.parameters = {
            name: torch.stack([n[name].detach() for n in networks]).requires_grad_(bool(self.rate(name)))
            for name in networks[0]
        }
        # Names under which the network without its head knows the same tensors.
        known = {id(p): name for name, p in first.network.named_parameters()}
        self._body = {name: known[id(p)] for name, p in first.network.base_model.named_parameters()}
        self._weight, self._bias = _output_names(first, known)

    @property
    def count(self) -> int:
        """B."""
        return len(self.models)

    def rate(self, name: str) -> float:
        """Factor of the learning rate of a parameter."""
        return self.rates[0] if name in self.head else self.rates[1]

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters that are trained."""
        return {name: p for name, p in self.parameters.items() if p.requires_grad}

    @property
    def W(self) -> Tensor:
        """(B, V, d) unembeddings, detached."""
        return self.parameters[self._weight].detach()

    def states(self, ids: Tensor) -> Tensor:
        """(B, N, T, d) states after the final norm, of tokens (B, N, T)."""
        base = self.models[0].network.base_model
        stacked = {name: self.parameters[theirs] for name, theirs in self._body.items()}

        def one(parameters: dict[str, Tensor], tokens: Tensor) -> Tensor:
            return functional_call(base, parameters, (tokens,), {"use_cache": False}).last_hidden_state

        if self.count == 1:
            return one({name: p[0] for name, p in stacked.items()}, ids[0])[None]
        return vmap(one)(stacked, ids)

    def log_softmax(self, h: Tensor) -> Tensor:
        """(B, ..., V) ln pi of states (B, ..., d), in float64."""
        flat = h.flatten(1, -2)
        logits = flat @ self.parameters[self._weight].transpose(1, 2)
        if self._bias is not None:
            logits = logits + self.parameters[self._bias][:, None]
        logits = self.models[0].shape_logits(logits).double()
        return torch.log_softmax(logits, dim=-1).unflatten(1, h.shape[1:-1])

    def say(self, prompts: Sequence[Sequence[Ids]], responses: Sequence[Sequence[Ids]]) -> Said:
        """Responses of every run, R each, with gradients."""
        rows, places, tokens, mask = _places(prompts, responses)
        h = self.states(rows)
        runs = torch.arange(self.count)[:, None, None]
        h = h[runs, places[0], places[1]]
        return Said(self.log_softmax(h), h, tokens, mask)

    @torch.no_grad()
    def hidden(self, prompts: Sequence[Ids]) -> Tensor:
        """(B, d) state of each run after its prompt."""
        return self.say([[x] for x in prompts], [[(0,)]] * self.count).hidden[:, 0, 0]

    @torch.no_grad()
    def next_log_probs(self, prompts: Sequence[Ids]) -> Array:
        """(B, V) ln pi(. | prompt), one prompt per run."""
        return self.say([[x] for x in prompts], [[(0,)]] * self.count).log_pi[:, 0, 0].numpy()

    @torch.no_grad()
    def log_probs(self, pairs: Sequence[Sequence[PreferencePair]]) -> Array:
        """(B, P, 2) ln pi of preferred and dispreferred."""
        return torch.stack(self.say(*_responses(pairs)).total.chunk(2, dim=1), dim=-1).numpy()

    def gradient(self, values: Tensor, keep: bool = False) -> dict[str, Tensor]:
        """Gradient (B, ...) of every run's own value (B,) in the trained parameters; zero where it does not reach."""
        trained = self.trained
        found = torch.autograd.grad(values.sum(), list(trained.values()), allow_unused=True, retain_graph=keep)
        pairs = zip(trained.items(), found, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}

    def model(self, b: int) -> LanguageModel:
        """Run b as a language model of its own."""
        copy = self.models[b].copy()
        with torch.no_grad():
            for name, p in copy.network.named_parameters():
                p.copy_(self.parameters[name][b])
        return copy

    def clone(self) -> "Runs":
        """An independent copy with the present parameters."""
        twin = object.__new__(Runs)
        twin.__dict__.update(self.__dict__)
        twin.parameters = {
            name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in self.parameters.items()
        }
        return twin


class Objective:
    """The preference loss of every run, mean over its pairs.

    The reference is what the runs are when the objective is made.
    """

    def __init__(self, runs: Runs, pairs: Sequence[Sequence[PreferencePair]], loss: Loss) -> None:
        if len(pairs) != runs.count or len({len(own) for own in pairs}) != 1 or not pairs[0]:
            counts = [len(own) for own in pairs]
            raise ValueError(f"pairs must hold equally many pairs for each of {runs.count} runs, got {counts}")
        model = runs.models[0]
        for own in pairs:
            for pair in own:
                _check_pair(pair, len(model.W), model.longest)
        self.runs, self.pairs, self.loss = runs, pairs, loss
        self.reference = runs.clone() if isinstance(loss, TokenLoss) else None
        self.ref = torch.as_tensor(np.concatenate([runs.log_probs(part) for part in _parts(pairs)], axis=1))

    def each(self, choice: Sequence[int] | None = None) -> Tensor:
        """(B, P) losses of the chosen pairs, or (B,) where the loss mixes them."""
        choice = range(len(self.pairs[0])) if choice is None else choice
        pairs = [[own[i] for i in choice] for own in self.pairs]
        said = self.runs.say(*_responses(pairs))
        if isinstance(self.loss, TokenLoss):
            return self._of_tokens(pairs, said)
        a, b = said.total.chunk(2, dim=1)
        n_w, n_l = said.lengths.chunk(2, dim=1)
        ratio = self._norm_ratios(said) if self.loss.uses_norms else torch.ones_like(a)
        ref = self.ref[:, list(choice)]
        return self.loss.torch_value(Pair(a, b, ref[..., 0], ref[..., 1], n_w, n_l, ratio))

    def __call__(self, choice: Sequence[int] | None = None) -> Tensor:
        """(B,) the mean over the chosen pairs."""
        return self.each(choice).mean(-1)

    def _of_tokens(self, pairs: Sequence[Sequence[PreferencePair]], said: Said) -> Tensor:
        assert self.reference is not None
        with torch.no_grad():
            ref = self.reference.say(*_responses(pairs))
        kl = (ref.log_pi.exp() * (ref.log_pi - said.log_pi)).sum(-1)
        squares = torch.logsumexp(2 * said.log_pi, dim=-1)
        size, loss = len(pairs[0]), cast(TokenLoss, self.loss)

        def tokens(b: int, r: int) -> Tokens:
            n = int(said.lengths[b, r])
            each, each_ref, own_kl, square = (x[b, r, :n] for x in (said.each, ref.each, kl, squares))
            return Tokens(each, each_ref, own_kl, square, ref.hidden[b, r, :n].double())

        values = [
            [loss.torch_value(Group((tokens(b, p), tokens(b, size + p)), (1.0, 0.0))) for p in range(size)]
            for b in range(len(pairs))
        ]
        return torch.stack([torch.stack(row) for row in values])

    def _norm_ratios(self, said: Said) -> Tensor:
        """(B, P) |grad ln pi(y-)| / |grad ln pi(y+)| over the trained parameters, scaled by their rates."""
        squares = []
        for r in range(said.total.shape[1]):
            gradient = self.runs.gradient(said.total[:, r], keep=True)
            squares.append(
                sum(self.runs.rate(name) * g.double().square().flatten(1).sum(1) for name, g in gradient.items())
            )
        w, l = torch.stack([torch.as_tensor(x) for x in squares], dim=1).chunk(2, dim=1)
        return (l / w).sqrt()


@dataclass(frozen=True, eq=False)
class Training:
    """What happened.

    losses (steps, B) : mean loss of the pairs of each step, before its update.
    observed : what `observe` returned, before every step and after the last.
    runs : the trained copies.
    """

    losses: Array
    observed: list[Any]
    runs: Runs


def train_preferences(
    models: LanguageModel | Sequence[LanguageModel],
    pairs: Sequence[Sequence[PreferencePair]],
    loss: Loss,
    optimizer: Optimizer,
    steps: int,
    *,
    trained: str | tuple[float, float] = "both",
    batch: int | None = None,
    seed: int = 0,
    observe: Observe | None = None,
    progress: bool = False,
) -> Training:
    """Train one copy of a model per list of pairs.

    Parameters
    ----------
    models : one for all runs, or one per run; they are left alone, and are the reference of the loss.
    pairs : for every run its pairs, equally many.
    loss : of `theory.losses`, or one of your own.
    optimizer : works entry by entry on the stacked parameters.
    trained : "both", "head", "body", or factors of the learning rate of (unembedding, body).
    batch : pairs per step, in an order shuffled anew every epoch by `seed`; None: all of them.
    observe : called with (step, runs), without gradients, before every step and after the last.

    Raises ValueError for bad arguments, SolverError if the loss leaves float range.
    """
    check_count(steps, "steps", low=0)
    runs = Runs(models, len(pairs), trained) if isinstance(models, LanguageModel) else Runs(models, trained=trained)
    objective = Objective(runs, pairs, loss)
    groups = [{"params": [p], "rate": runs.rate(name)} for name, p in runs.trained.items()]
    opt = optimizer.build(groups)
    losses, observed = np.empty((steps, runs.count)), []

    def look(step: int) -> None:
        if observe is not None:
            with torch.no_grad():
                observed.append(observe(step, runs))

    choices = batches(len(pairs[0]), batch, steps, seed)
    for step in tqdm(range(steps), disable=not progress, desc=f"{loss.name} {optimizer.name}"):
        look(step)
        opt.zero_grad(set_to_none=True)
        value = objective(choices[step])
        value.sum().backward()
        opt.step()
        losses[step] = value.detach().numpy()
        if not np.isfinite(losses[step]).all():
            raise SolverError(f"training with {optimizer!r} on {loss!r} left float range at step {step}")
    look(steps)
    return Training(losses, observed, runs)


def batches(count: int, batch: int | None, steps: int, seed: int) -> list[list[int]]:
    """Which of `count` pairs each step sees; an epoch's last batch may be smaller."""
    if batch is None:
        return [list(range(count))] * steps
    check_count(batch, "batch")
    found: list[list[int]] = []
    epoch = 0
    while len(found) < steps:
        order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
        found += [order[i : i + batch] for i in range(0, count, batch)]
        epoch += 1
    return found[:steps]


def _check_pair(pair: PreferencePair, vocabulary: int, longest: int) -> None:
    for name, ids in zip(("prompt", "preferred", "dispreferred"), pair, strict=True):
        if len(ids) == 0:
            raise ValueError(f"{name} of a pair must hold at least one token, got none in {pair}")
        if not all(0 <= i < vocabulary for i in ids):
            raise ValueError(f"{name} of a pair must hold tokens in [0, {vocabulary}), got {tuple(ids)}")
    size = len(pair.prompt) + max(len(pair.preferred), len(pair.dispreferred))
    if size > longest:
        raise ValueError(f"pairs must have at most {longest} tokens with their prompt, got one of {size}")
    if tuple(pair.preferred) == tuple(pair.dispreferred):
        raise ValueError(f"preferred and dispreferred must differ, got {pair}")


def _responses(pairs: Sequence[Sequence[PreferencePair]]) -> tuple[list[list[Ids]], list[list[Ids]]]:
    """Prompts and responses (B lists of 2P): those of all preferred, then of all dispreferred."""
    prompts = [[p.prompt for p in own] * 2 for own in pairs]
    return prompts, [[*(p.preferred for p in own), *(p.dispreferred for p in own)] for own in pairs]  # type: ignore[return-value]


def _parts(pairs: Sequence[Sequence[PreferencePair]], size: int = 64) -> list[list[list[PreferencePair]]]:
    """The pairs of all runs in portions of `size` of each."""
    return [[list(own[i : i + size]) for own in pairs] for i in range(0, len(pairs[0]), size)]


def _places(
    prompts: Sequence[Sequence[Ids]], responses: Sequence[Sequence[Ids]]
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor]:
    """Sequences to run (B, N, T), equal ones once; row and position (B, R, L) of every token; tokens; mask."""
    distinct: list[dict[tuple[int, ...], int]] = []
    size = len(responses[0]), max(len(y) for own in responses for y in own)
    row, position, token, mask = (np.zeros((len(responses), *size), dtype=np.int64) for _ in range(4))
    for b, (own_prompts, own) in enumerate(zip(prompts, responses, strict=True)):
        known: dict[tuple[int, ...], int] = {}
        for r, (x, y) in enumerate(zip(own_prompts, own, strict=True)):
            n = len(y)
            row[b, r, :n] = known.setdefault((*x, *y[:-1]), len(known))
            position[b, r, :n] = np.arange(len(x) - 1, len(x) - 1 + n)
            token[b, r, :n] = y
            mask[b, r, :n] = 1
        distinct.append(known)
    most = max(len(known) for known in distinct)
    # Runs with fewer distinct sequences repeat their first.
    sequences = [[*known, *[next(iter(known))] * (most - len(known))] for known in distinct]
    rows = padded([x for own in sequences for x in own]).unflatten(0, (len(sequences), most))
    places = torch.from_numpy(row), torch.from_numpy(position)
    return rows, places, torch.from_numpy(token), torch.from_numpy(mask)


def _output_names(model: LanguageModel, known: dict[int, str]) -> tuple[str, str | None]:
    """Names of the unembedding's weight and bias."""
    layer = model.network.get_output_embeddings()
    bias = getattr(layer, "bias", None)
    return known[id(layer.weight)], None if bias is None else known[id(bias)]

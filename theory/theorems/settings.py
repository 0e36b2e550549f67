"""Families of random problems on which theorems are tried.

Each draws one structure (sizes, responses, loss, rates) and B sets of parameters for it: scales vary by instance, and a
few instances are replaced by the exceptional ones that random draws never meet (h = 0, equal rows, aligned vectors).
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.random import Generator

from theory.losses import LOSSES, SFT, Calibrated, Interval, Loss, MarginLoss, PerToken, TokenLoss, Weighted, get
from theory.model import Context, Response, Sample, contexts_of
from theory.problem import Problem


def random_loss(rng: Generator, losses: Sequence[type[Loss]] | None = None) -> MarginLoss:
    """A margin loss of the registry (or of the given classes) with random parameters in their typical ranges."""
    drawn = _random(rng, [c for c in (losses or LOSSES.values()) if issubclass(c, MarginLoss)])
    assert isinstance(drawn, MarginLoss)
    return drawn


def random_pair_loss(rng: Generator, losses: Sequence[type[Loss]] | None = None) -> Loss:
    """Any loss of two log-probabilities in the registry, drawn likewise; one in three changed by a combinator."""
    loss = _random(rng, [c for c in (losses or LOSSES.values()) if not issubclass(c, TokenLoss)])
    wraps: list[Callable[[], Loss]] = [
        lambda: _sft(rng, loss),
        lambda: _weighted(rng, loss),
        lambda: PerToken(loss),
        lambda: Calibrated(loss),
    ]
    return wraps[int(rng.integers(len(wraps)))]() if rng.random() < 1 / 3 else loss


def _random(rng: Generator, classes: Sequence[type[Loss]]) -> Loss:
    cls = classes[int(rng.integers(len(classes)))]
    values = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        domain: Interval | None = f.metadata.get("domain")
        if domain is None:  # a switch, left as it is
            continue
        value = rng.uniform(*domain.typical)
        values[f.name] = value if value in domain else f.default
    return cls(**values)


def problem(
    rng: Generator,
    B: int,
    samples: Sequence[Sample],
    V: int,
    loss: Loss,
    probe: tuple[Hashable, Response] | None = None,
    d: int | None = None,
) -> Problem:
    """B random parameter sets for the given samples; contexts of the probe included."""
    d = int(rng.integers(1, 5)) if d is None else d
    visits = list(contexts_of(samples))
    if probe is not None:
        prompt, y = probe
        visits += [c for c in ((prompt, y[:k]) for k in range(len(y))) if c not in visits]
    contexts: tuple[Context, ...] = tuple(visits)
    scale = np.exp(rng.uniform(np.log(0.2), np.log(1.5), size=(2, B, 1, 1)))
    W = scale[0] * rng.standard_normal((B, V, d))
    H = scale[1] * rng.standard_normal((B, len(contexts), d))
    _plant_extremes(rng, W, H, samples[0])
    rates = np.exp(rng.uniform(-2, 2, size=2)) * np.array([(1, 1), (1, 1), (1, 1), (0, 1), (1, 0)])[rng.integers(5)]
    eta_W, eta_h = map(float, rates)
    new = Problem(W, H, tuple(samples), contexts, np.zeros((B, len(samples), 2)), loss, eta_W, eta_h, probe)
    # The reference: the start itself in half of the instances, some other model in the rest.
    start = new.pair_log_probs
    other = rng.standard_normal(start.shape) * (rng.random((B, 1, 1)) < 0.5)
    return dataclasses.replace(new, references=start + other)


def _plant_extremes(rng: Generator, W: np.ndarray, H: np.ndarray, sample: Sample) -> None:
    """In one instance of a hundred each: h = 0, W_+ = W_-, W_+ = -W_-, h along W_+ - W_-, a tie, large logits."""
    y, n = (sample.preferred[0], sample.dispreferred[0]), max(1, len(W) // 100)
    if len(W) < 10:
        return
    rows = rng.permutation(len(W))[: 6 * n].reshape(6, n) if len(W) >= 6 * n else np.arange(6)[:, None]
    H[rows[0]] = 0
    W[rows[1], y[0]] = W[rows[1], y[1]]
    W[rows[2], y[0]] = -W[rows[2], y[1]]
    H[rows[3], 0] = W[rows[3], y[0]] - W[rows[3], y[1]]
    others = [z for z in range(W.shape[1]) if z not in y]
    if others:
        W[rows[4], others[0]] = W[rows[4], y[0]]
    H[rows[5]] *= 5


def _tokens(rng: Generator, V: int, length: int) -> Response:
    return tuple(int(t) for t in rng.integers(V, size=length))


def _another(rng: Generator, V: int, not_in: set[int]) -> int:
    return int(rng.choice([z for z in range(V) if z not in not_in]))


def single_token(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
    """One prompt, two one-token responses, another token than y+ as probe: a third one, or now and then y-."""
    V = int(rng.integers(3, 7))
    w, l, z = (int(t) for t in rng.permutation(V)[:3])
    z = l if rng.random() < 0.2 else z
    return problem(rng, B, [Sample("x", ((w,), (l,)))], V, random_loss(rng, losses), ("x", (z,)))


def past_the_minimiser(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
    """`single_token` where the loss pulls the margin down: IPO from beyond its minimiser."""
    new = dataclasses.replace(single_token(rng, B), loss=get("ipo", tau=2.0))
    references = np.zeros_like(new.references)
    references[:, 0, 0] = new.margin - 1 - rng.random(B)
    return dataclasses.replace(new, references=references)


def two_tokens(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
    """A vocabulary of y+ and y- alone, where several bounds become equalities; the probe is y+."""
    w = int(rng.integers(2))
    return problem(rng, B, [Sample("x", ((w,), (1 - w,)))], 2, random_loss(rng, losses), ("x", (w,)))


def fixed_unembeddings(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
    """`single_token` with W frozen; in a third of the instances another token is aligned with a exactly as y+ is."""
    new = single_token(rng, B, losses)
    w, l = (y[0] for y in new.samples[0].responses)
    tied = _another(rng, new.V, {w, l})
    few = slice(B // 3)
    a = new.W[few, w] - new.W[few, l]
    aside = rng.standard_normal(a.shape)
    aside -= a * ((aside * a).sum(1) / np.maximum((a * a).sum(1), 1e-300))[:, None]
    new.W[few, tied] = new.W[few, w] + aside
    return dataclasses.replace(new, lr_unembedding=0.0, lr_hidden=1.0)


def sequences(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
    """One prompt, two responses of one to four tokens that differ at once, and a probe that differs from both."""
    V = int(rng.integers(3, 6))
    w, l, z = (int(t) for t in rng.permutation(V)[:3])
    lengths = rng.integers(0, 4, size=3)
    if not lengths.any():
        lengths[int(rng.integers(3))] = 1
    y = [(t, *_tokens(rng, V, int(n))) for t, n in zip((w, l, z), lengths, strict=True)]
    return problem(rng, B, [Sample("x", (y[0], y[1]))], V, random_loss(rng, losses), ("x", y[2]))


def shared_prefix(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
    """One prompt; y+ and y- share one or two tokens, one may be a prefix of the other; the probe follows y-."""
    V = int(rng.integers(3, 6))
    prefix = _tokens(rng, V, int(rng.integers(1, 3)))
    w = (*prefix, *_tokens(rng, V, int(rng.integers(0, 3))))
    branch = w[len(prefix)] if len(w) > len(prefix) else -1
    l = (*prefix, _another(rng, V, {branch}), *_tokens(rng, V, int(rng.integers(0, 2))))
    z = (*l[: int(rng.integers(1, len(l) + 1))], *_tokens(rng, V, 1))
    return problem(rng, B, [Sample("x", (w, l))], V, random_loss(rng, losses), ("x", z))


def one_edit(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
    """One prompt; y+ and y- are equal but for one token, with at least one token after it; the probe leaves y- late."""
    V = int(rng.integers(3, 6))
    prefix, suffix = _tokens(rng, V, int(rng.integers(0, 2))), _tokens(rng, V, int(rng.integers(1, 4)))
    w, l = (int(t) for t in rng.permutation(V)[:2])
    y = [(*prefix, t, *suffix) for t in (w, l)]
    z = (*y[1][:-1], _another(rng, V, {suffix[-1]}))
    return problem(rng, B, [Sample("x", (y[0], y[1]))], V, random_loss(rng, losses), ("x", z))


def data_set(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
    """Two to four prompts, once each, with one-token responses that may contradict each other; a probe token."""
    V, prompts = int(rng.integers(3, 6)), int(rng.integers(2, 5))
    pairs = [tuple((int(t),) for t in rng.permutation(V)[:2]) for _ in range(prompts)]
    samples = [Sample(f"x{i}", pair) for i, pair in enumerate(pairs)]
    z = _another(rng, V, {y[0] for y in pairs[0]})
    return problem(rng, B, samples, V, random_loss(rng, losses), ("x0", (z,)))


def sequence_data_set(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
    """Two or three samples of sequences; prompts may repeat, prefixes may be shared; any probe."""
    V = int(rng.integers(3, 6))
    samples = []
    for i in range(int(rng.integers(2, 4))):
        prompt = f"x{i}" if rng.random() < 0.6 else "x0"
        w = _tokens(rng, V, int(rng.integers(1, 4)))
        l = _tokens(rng, V, int(rng.integers(1, 4)))
        while l == w:
            l = _tokens(rng, V, int(rng.integers(1, 4)))
        samples.append(Sample(prompt, (w, l)))
    y = _tokens(rng, V, int(rng.integers(1, 4)))
    return problem(rng, B, samples, V, random_loss(rng, losses), ("x0", y))


def _with_loss(draw: Callable[..., Problem], wrap: Callable[[Generator, MarginLoss], Loss]) -> Callable[..., Problem]:
    def drawn(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
        new = draw(rng, B, losses)
        assert isinstance(new.loss, MarginLoss)
        return dataclasses.replace(new, loss=wrap(rng, new.loss))

    drawn.__doc__ = f"`{draw.__name__}` with {(wrap.__doc__ or '').rstrip('.')}."
    return drawn


def _sft(rng: Generator, base: Loss) -> SFT:
    """an SFT term added to the loss."""
    return SFT(base, float(rng.uniform(0.1, 2)))


def _weighted(rng: Generator, base: Loss) -> Weighted:
    """the loss taken of weighted log-probabilities."""
    return Weighted(base, *map(float, rng.uniform(0.2, 2, size=2)))


def token_data_set(rng: Generator, B: int, losses: Sequence[type[Loss]] | None = None) -> Problem:
    """`sequence_data_set` with a loss of tokens, away from its reference model."""
    new = sequence_data_set(rng, B)
    examples = [e for c in LOSSES.values() if issubclass(c, TokenLoss) for e in c.examples()]
    origin = new.W + 0.5 * rng.standard_normal(new.W.shape), new.H + 0.5 * rng.standard_normal(new.H.shape)
    references = dataclasses.replace(new, W=origin[0], H=origin[1], origin=None).pair_log_probs
    return dataclasses.replace(new, loss=examples[rng.integers(len(examples))], origin=origin, references=references)


SETTINGS: dict[str, Callable[..., Problem]] = {
    "single_token": single_token,
    "past_the_minimiser": past_the_minimiser,
    "two_tokens": two_tokens,
    "fixed_unembeddings": fixed_unembeddings,
    "sequences": sequences,
    "shared_prefix": shared_prefix,
    "one_edit": one_edit,
    "data_set": data_set,
    "sequence_data_set": sequence_data_set,
    "sft_regularised": _with_loss(sequences, _sft),
    "sft_data_set": _with_loss(sequence_data_set, _sft),
    "weighted": _with_loss(sequences, _weighted),
    "token_data_set": token_data_set,
    "weighted_data_set": _with_loss(sequence_data_set, _weighted),
}

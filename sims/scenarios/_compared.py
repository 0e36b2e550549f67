"""The fixed models on which losses are compared: one token, one pair of sequences, four pairs.

The sequences live in a geometry with the two traits that matter. Hidden vectors share a large common part (in the
paper's models more than 99 % of their inner products are positive), so that what is learned in one context acts in all.
And the model has seen y+, not y-: in the contexts of y+ it leans to the token that follows, in those of y- less, and
y- ends in words of y+. Pushing y- down pushes these words down everywhere; y+, almost certain, pulls too weakly.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sims.scenarios import no_never_yes
from theory import UnconstrainedFeatures
from theory.model import Context, Sample, contexts_of

Array = NDArray[np.float64]

D = 6
W_NORM, H_NORM = 3.0, 2.5
COMMON = 0.95  # cosine of every hidden vector to the common direction, before it leans to what comes next
LEAN = {"first": 3.0, "preferred": 0.7, "other": 0.4}  # to the next token: in y+'s first two contexts, its others, y-'s
SEQUENCE_KAPPA = 0.1  # eta_h / eta_W: what contexts share moves faster than what each has for itself

# y+, y-, and further responses for losses of groups.
PAIR = {"share": ("I cannot do that .", "I will do that and do that .", "Sure I will do that .", "I cannot .")}
PAIR_REWARDS = (1.0, 0.0, 0.0, 1.0)
FOUR = {
    "share": ("I cannot do that .", "I will do that and do that .", "I will ."),
    "help": ("Sure I will .", "No I will not do that .", "No ."),
    "fact": ("It is so .", "It is not so and not that .", "No ."),
    "greet": ("Hello .", "Go .", "No ."),
}
AWAY = ("help", "fact")  # prompts whose hidden vectors start away from the reference
AWAY_BY = 0.15


def single_token() -> UnconstrainedFeatures:
    """No over Never, as in the No/Never/Yes study."""
    return no_never_yes.model()


def sequences() -> UnconstrainedFeatures:
    """One prompt, |y+| = 5 and |y-| = 8, with a shared first token and a shared ending; two further responses."""
    return build(PAIR, seed=1, rewards=PAIR_REWARDS)


def data_set() -> UnconstrainedFeatures:
    """Four prompts with a pair each and a further response. Training starts at the reference for two of them and away
    from it for the others: losses with and without a reference, and losses whose samples see each other, part ways."""
    reference = build(FOUR, seed=1)
    rng = np.random.default_rng(2)
    H = reference.H.copy()
    for i, (prompt, _) in enumerate(reference.contexts):
        if prompt in AWAY:
            H[i] += AWAY_BY * H_NORM * unit(rng.standard_normal(D))
    return reference.with_parameters(reference.W, H)


def build(
    texts: Mapping[str, Sequence[str]], seed: int, rewards: tuple[float, ...] | None = None
) -> UnconstrainedFeatures:
    """A model of the given responses per prompt: random unembeddings, hidden vectors as the module says."""
    rng = np.random.default_rng(seed)
    tokens = tuple(dict.fromkeys(t for group in texts.values() for y in group for t in y.split()))
    samples = [
        Sample(prompt, tuple(tuple(map(tokens.index, y.split())) for y in group), rewards=rewards)
        for prompt, group in texts.items()
    ]
    common = unit(rng.standard_normal(D))
    W = rng.standard_normal((len(tokens), D))
    W = W_NORM * unit(W - np.outer(W @ common, common))
    hidden: dict[Context, Array] = {}
    for sample in samples:
        for context in contexts_of([sample]):
            k = len(context[1])
            likely = next(y[k] for y in sample.responses if y[:k] == context[1] and len(y) > k)
            trait = "other" if sample.preferred[:k] != context[1] else "first" if k < 2 else "preferred"
            own = COMMON * common + np.sqrt(1 - COMMON**2) * unit(rng.standard_normal(D))
            hidden[context] = H_NORM * unit(own + LEAN[trait] * unit(W[likely]))
    return UnconstrainedFeatures.from_samples(W, hidden, samples, tokens)


def unit(x: Array) -> Array:
    """Rows of length 1."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

"""The scorer against the way pairs are scored today, side by side in one run, on one model and the same pairs.

Today: one pair at a time, the full network run on prompt + chosen and on prompt + rejected with all hidden states and
logits kept, CHES from sums in the dtype of the states in product form, the edit distance by a table in Python: on
tensors as published, and on lists of integers, which is what a careful user would write.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sims.bench import Row
from sims.language.model import LanguageModel, new_model
from sims.language.preferences import PreferencePair
from sims.language.scoring import Scorer

Array = NDArray[np.float64]
SCORES = ("ches", "ln_ches", "last_hidden", "edit_distance")


def score_rows(
    pairs: int = 200, V: int = 32_000, d: int = 256, layers: int = 4, rounds: int = 3, progress: bool = True
) -> list[Row]:
    """Seconds per pair, and errors of CHES over |S+||S- - S+| against one pair at a time in float64."""
    model = new_model((f"w{i}" for i in range(V - 4)), d=d, layers=layers, heads=max(2, d // 64), max_length=512)
    model.network.set_attn_implementation("sdpa")  # what transformers takes unless told otherwise
    data = random_pairs(pairs, V)
    few = data[:: max(1, pairs // 20)]
    scorer = Scorer(model, SCORES)
    scorer.score(few)  # measures whether the prompt can be shared
    rivals: dict[str, tuple[int, Callable[[], dict[str, list[float]]]]] = {
        "scorer": (pairs, lambda: scorer.score(data)),
        "one pair at a time, edit distance on lists": (pairs, lambda: batch_1(model, data)),
        "one pair at a time, edit distance on tensors": (len(few), lambda: batch_1(model, few, tensors=True)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    found: dict[str, Array] = {}
    for _ in tqdm(range(rounds), disable=not progress, desc="scoring"):
        for name, (count, run) in rivals.items():
            start = time.perf_counter()
            ches = np.array(run()["ches"])
            seconds[name].append((time.perf_counter() - start) / count)
            found[name] = ches if count == len(few) else ches[:: max(1, pairs // 20)]
    truth, size = exact(model, few)
    section = f"scores of {pairs} pairs of 64 to 256 tokens, V={V}, d={d}, {layers} layers, {model.W.dtype}: per pair"
    rows = []
    for name, times in seconds.items():
        each = statistics.median(times)
        ratio = statistics.median(t / ours for t, ours in zip(times, seconds["scorer"], strict=True))
        error = float((np.abs(found[name] - truth) / size).max())
        rows.append(Row(section, name, each, ratio, error, f"{1 / each:.3g} pairs per second"))
    for name, run in parts(model, few).items():
        start = time.perf_counter()
        run()
        each = (time.perf_counter() - start) / len(few)
        rows.append(Row(section, f"  of which {name}", each, each / rows[0].seconds))
    return rows


def random_pairs(count: int, V: int) -> list[PreferencePair]:
    """Prompts and responses of random tokens, 64 to 256 together, a quarter to three quarters of them the prompt."""
    rng = np.random.default_rng(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.integers(4, V, n).tolist())

    out = []
    for total in rng.integers(64, 257, count).tolist():
        x = int(total * rng.uniform(0.25, 0.75))
        responses = [tokens(total - x), tokens(max(1, int((total - x) * rng.uniform(0.5, 1.0))))]
        y, z = rng.permutation(2).tolist()
        out.append(PreferencePair((1, *tokens(x - 1)), responses[y], responses[z]))
    return out


@torch.no_grad()
def batch_1(model: LanguageModel, pairs: Sequence[PreferencePair], tensors: bool = False) -> dict[str, list[float]]:
    """The scores as they are computed today."""
    out: dict[str, list[float]] = {name: [] for name in SCORES}
    for p in pairs:
        plus, minus = (_last_layer(model, p.prompt, y)[0] for y in p[1:])
        S, T = plus.sum(0), minus.sum(0)
        out["ches"].append(float(S @ T - S @ S))
        S, T = S / len(plus), T / len(minus)
        out["ln_ches"].append(float(S @ T - S @ S))
        out["last_hidden"].append(float(plus[-1] @ minus[-1]))
        y, z = (torch.tensor(y) if tensors else list(y) for y in p[1:])
        out["edit_distance"].append(float(levenshtein(y, z)) / max(len(y), len(z)))
    return out


def _last_layer(model: LanguageModel, prompt: Sequence[int], response: Sequence[int]) -> tuple[torch.Tensor, Any]:
    """States (n, d) that predict the response, from all hidden states, and the logits."""
    found = model.network(input_ids=torch.tensor([[*prompt, *response]]), output_hidden_states=True, use_cache=False)
    return found.hidden_states[-1][0, len(prompt) - 1 : -1], found.logits


def levenshtein(a: Any, b: Any) -> Any:
    """Edit distance by the table of Wagner and Fischer, row by row."""
    row = list(range(len(b) + 1))
    for i, s in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, t in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (s != t))
    return row[-1]


def exact(model: LanguageModel, pairs: Sequence[PreferencePair]) -> tuple[Array, Array]:
    """CHES and |S+| |S- - S+| with network and sums in float64."""
    wide = model.copy()
    wide.network.double()
    scores, sizes = [], []
    with torch.no_grad():
        for p in pairs:
            S, T = (_last_layer(wide, p.prompt, y)[0].sum(0) for y in p[1:])
            scores.append(float(S @ (T - S)))
            sizes.append(float(S.norm() * (T - S).norm()))
    return np.array(scores), np.array(sizes)


def parts(model: LanguageModel, pairs: Sequence[PreferencePair]) -> dict[str, Callable[[], Any]]:
    """What the loop of today spends its time on."""

    @torch.no_grad()
    def backbone() -> None:
        for p in pairs:
            for y in p[1:]:
                model.network.base_model(input_ids=torch.tensor([[*p.prompt, *y]]), use_cache=False)

    def edit() -> None:
        for p in pairs:
            levenshtein(list(p.preferred), list(p.dispreferred))

    return {"the backbone": backbone, "the edit distance on lists": edit}

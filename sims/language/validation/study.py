"""Does a score foretell which pairs lower ln pi(y+) on this data and this model? Train on some, and see.

Pairs are scored by the model as it is, then it is trained for a few steps on each pair alone (or on disjoint subsets),
always from the same weights, and the change of ln pi(y+) is compared with the scores. A first-order score cannot be
judged at an arbitrary step size: unless a learning rate is given, one is sought at which the margin of the median run
grows by about as much as asked for.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sims.descent import Optimizer
from sims.files import write_atomically
from sims.language.model import LanguageModel
from sims.language.pairing import tokenize
from sims.language.preferences import PreferencePair
from sims.language.scores import ALPHA as RMSPROP
from sims.language.scoring.scorer import Scorer
from sims.language.scoring.together import Together, together
from sims.language.validation.record import LENGTH, PERCENTILES, SCORES, Validation
from sims.language.validation.runs import Course, Kept, Restarts, check_trainable, sought, trained
from theory import __version__
from theory._check import POSITIVE, check_count, check_number, unknown
from theory.losses import Loss, Pair

Array = NDArray[np.float64]

# As trainers name them; TRL's AdamW comes without weight decay, and is then Adam.
OPTIMIZERS = {"sgd": "sgd", "sign": "sign", "rmsprop": "rmsprop", "adam": "adam", "adamw": "adam"}
FEWEST = 8  # runs that a rank correlation is computed from
TRIED = 8  # runs that a learning rate is sought with
SPARE = 2  # rows drawn per pair wanted: some cannot be used
# Columns of the scorer, by what they cost.
GROUPS = {
    "no model": ("edit_distance", "len_chosen", "len_rejected"),
    "forward": ("ches", "ln_ches", "last_hidden"),
    "logits": ("alpha",),
    "backward": ("gradient_step_chosen", "gradient_step_margin", "sign_step_chosen", "sign_step_margin"),
}


@dataclass(frozen=True)
class Drawn:
    """Pairs of a data set and where they stand in it; rows looked at that cannot be used, with reasons."""

    pairs: tuple[PreferencePair, ...]
    where: tuple[str, ...]
    rows: int
    unusable: tuple[tuple[str, str], ...]


def draw_pairs(
    model: LanguageModel, table: Any, layout: Any, count: int, *, seed: int = 0, max_length: int | None = None
) -> Drawn:
    """`count` pairs of a table at random (fewer if it has not so many that can be used), one per row, read in one pass.

    rows : of the table. Of several rejected responses one is drawn.
    """
    rng = np.random.default_rng([seed, 5])
    held: list[Any] = []
    seen = -1
    for seen, row in enumerate(table.rows()):  # a reservoir: every row is as likely to be held
        if len(held) < SPARE * count:
            held.append(row)
        elif (i := int(rng.integers(seen + 1))) < len(held):
            held[i] = row
    pairs, where, unusable = [], [], []
    for i in rng.permutation(len(held)):
        row = held[i]
        if len(pairs) == count:
            break
        try:
            if row.problem:
                raise ValueError(row.problem)
            found = tokenize(model, layout.example(row.values), max_length)
        except ValueError as error:
            unusable.append((row.where, str(error)))
            continue
        pairs.append(found[int(rng.integers(len(found)))].pair)
        where.append(row.where)
    return Drawn(tuple(pairs), tuple(where), seen + 1, tuple(unusable))


def validate(
    model: LanguageModel,
    pairs: Sequence[PreferencePair],
    loss: Loss,
    optimizer: str = "adamw",
    *,
    learning_rate: float | None = None,
    margin_gain: float = 10.0,
    steps: int = 10,
    subset_size: int = 1,
    percentiles: bool = False,
    seed: int = 0,
    where: Sequence[str] | None = None,
    folder: str | Path | None = None,
    progress: bool = False,
) -> Validation:
    """Score, train, compare.

    Parameters
    ----------
    model : its network is trained in place and has its weights back afterwards, to the bit.
    loss : a function of the log-probabilities of whole responses; the model as it is, is its reference.
    optimizer : one of OPTIMIZERS, with torch's defaults and no weight decay.
    learning_rate : None seeks one at which the margin grows by `margin_gain` nats in the median run.
    steps : of each run, every one on all pairs of the run.
    subset_size : pairs per run; more than one are drawn by `seed` into disjoint subsets, and scores are averaged.
    percentiles : also train on the `subset_size` pairs around five percentiles of each score (the paper's protocol).
    where : what the pairs are called. folder : where scores and runs are kept as they finish; interrupted work goes on.

    Raises ValueError for bad arguments and too few pairs, SolverError if a run leaves float range.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(unknown("optimizer", optimizer, OPTIMIZERS))
    check_number(margin_gain, "margin_gain", POSITIVE)
    if learning_rate is not None:
        check_number(learning_rate, "learning_rate", POSITIVE)
    check_trainable(model, loss)
    check_count(steps, "steps")
    size, keep = check_count(subset_size, "subset_size"), None if folder is None else Path(folder)
    if percentiles and size < 2:
        raise ValueError("percentiles needs subsets: subset_size must be at least 2, got 1")
    _check_enough(len(pairs), size)
    names = [f"pair {i}" for i in range(len(pairs))] if where is None else list(where)
    columns, seconds = _scored(model, pairs, keep, progress)
    usable = [i for i in range(len(pairs)) if all(math.isfinite(x[i]) for x in columns.values())]
    _check_enough(len(usable), size)
    columns = {name: x[usable] for name, x in columns.items()}
    slopes, exact = _slopes(loss, columns)
    scores = oriented(columns, slopes if exact else np.ones(len(usable)))
    used = [pairs[i] for i in usable]
    first = _first(model, used, keep, progress)
    subsets = _subsets(len(used), size, seed)
    around = [around_percentile(x, p, size) for x in scores.values() for p in PERCENTILES] if percentiles else []

    plan = [[used[i] for i in rows] for rows in (*subsets, *around)]
    with Restarts(model, loss, steps, plan[0][0]) as restarts:
        kept = Kept(restarts, keep, model=model.fingerprint)
        lr, tried = learning_rate, 0
        if lr is None:
            guess = _guess(columns, slopes, optimizer, steps)
            lr, tried = sought(
                kept, plan[: min(TRIED, len(subsets))], OPTIMIZERS[optimizer], guess, margin_gain, progress
            )
        by = Optimizer(OPTIMIZERS[optimizer], lr)
        done, whole = trained(kept, plan, by, progress), kept.run(used, by)
    parameters = {
        "fingerprint": model.fingerprint,
        "dtype": str(next(model.network.parameters()).dtype).removeprefix("torch."),
        "loss": repr(loss),
        "optimizer": optimizer,
        "learning_rate": lr,
        "sought": tried,  # rates tried; 0: it was given
        "margin_gain": margin_gain,
        "steps": steps,
        "subset_size": size,
        "pairs": len(usable),
        "left_out": [name for i, name in enumerate(names) if i not in usable],
        "seed": seed,
        "moved": min(c.moved for c in done),
        "exact": exact,  # whether the probes are first-order changes of this loss
        "version": __version__,
    }
    return _record(parameters, [names[i] for i in usable], scores, subsets, done, seconds, first, whole)


def _record(
    parameters: dict[str, Any],
    names: Sequence[str],
    scores: dict[str, Array],
    subsets: Sequence[Sequence[int]],
    done: Sequence[Course],
    seconds: dict[str, float],
    first: Together,
    whole: Course,
) -> Validation:
    """done : the courses of the subsets, and after them five for each score if its percentiles were trained on.
    whole : that of all pairs."""
    n = len(subsets)
    chosen, rejected = (np.array([x.mean(axis=1) for x in own]) for own in zip(*(c[:2] for c in done), strict=True))
    change = (chosen[n:, -1] - chosen[n:, 0]).reshape(-1, len(PERCENTILES))
    return Validation(
        parameters,
        tuple(names),
        scores,
        tuple(map(tuple, subsets)),
        chosen[:n],
        rejected[:n],
        dict(zip(scores, change, strict=False)),
        seconds | {"run": float(np.median([c.seconds for c in done[:n]]))},
        first,
        np.stack([x.mean(axis=1) for x in whole[:2]]),
    )


def _check_enough(pairs: int, size: int) -> None:
    if pairs < FEWEST * size:
        runs = "pairs" if size == 1 else f"subsets of {size}"
        raise ValueError(f"pairs must make at least {FEWEST} {runs}, only {pairs} pairs can be used")


def _subsets(count: int, size: int, seed: int) -> list[list[int]]:
    """Disjoint subsets: runs that share no pair are independent."""
    if size == 1:
        return [[i] for i in range(count)]
    order = np.random.default_rng([seed, 6]).permutation(count).tolist()
    return [sorted(order[i : i + size]) for i in range(0, count - size + 1, size)]


def around_percentile(values: Array, percentile: float, size: int) -> list[int]:
    """Indices of the `size` values around a percentile."""
    start = round((len(values) - size) * percentile / 100)
    return sorted(np.argsort(values, kind="stable")[start : start + size].tolist())


def oriented(columns: dict[str, Array], slopes: Array) -> dict[str, Array]:
    """Scores by name, larger where a deeper fall is expected. slopes (N,) : by which the loss's gradient is scaled."""
    columns = columns | {LENGTH: columns["len_rejected"] - columns["len_chosen"]}
    columns["gradient_step_chosen"] = slopes * columns["gradient_step_chosen"]
    columns["sign_step_chosen"] = np.sign(slopes) * columns["sign_step_chosen"]
    return {name: about.sign * columns[name] for name, about in SCORES.items()}


def _scored(
    model: LanguageModel, pairs: Sequence[PreferencePair], folder: Path | None, progress: bool
) -> tuple[dict[str, Array], dict[str, float]]:
    """Columns of the scorer and the reference log-probabilities, and seconds per pair of each group."""
    stored = _Stored(model, pairs, folder, "scores.json")
    if stored.found is not None:
        columns = {k: np.array(v, dtype=np.float64) for k, v in stored.found["columns"].items()}
        return columns, stored.found["seconds"]
    columns, seconds = {}, {}
    groups = {**GROUPS, "references": ("ref_chosen_logps", "ref_rejected_logps")}
    for name, wanted in tqdm(groups.items(), desc=f"scores of {len(pairs)} pairs", disable=not progress):
        begun = perf_counter()
        found = Scorer(model, columns=wanted).score(pairs)
        columns |= {column: np.array(found[column], dtype=np.float64) for column in wanted}
        seconds[name] = (perf_counter() - begun) / len(pairs)
    stored.keep({"columns": {k: v.tolist() for k, v in columns.items()}, "seconds": seconds})
    return columns, seconds


def _first(model: LanguageModel, pairs: Sequence[PreferencePair], folder: Path | None, progress: bool) -> Together:
    """What the pairs do to each other."""
    stored = _Stored(model, pairs, folder, "together.json")
    if stored.found is not None:
        return Together(**stored.found["together"])
    found = together(model, pairs, progress)
    stored.keep({"together": found.to_dict()})
    return found


class _Stored:
    """What was computed of these pairs by this model, in a file: `found`, None where there is nothing.

    Raises ValueError for a damaged file.
    """

    def __init__(self, model: LanguageModel, pairs: Sequence[PreferencePair], folder: Path | None, name: str) -> None:
        self.source = {"version": __version__, "model": model.fingerprint, "pairs": [list(map(list, p)) for p in pairs]}
        self.file = None if folder is None else folder / name
        self.found: dict[str, Any] | None = None
        if self.file is not None and self.file.is_file():
            try:
                found = json.loads(self.file.read_bytes())
                self.found = found["result"] if found["source"] == self.source else None
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"stored {str(self.file)!r} is damaged ({error}): delete it") from error

    def keep(self, result: dict[str, Any]) -> None:
        if self.file is not None:
            write_atomically(self.file, json.dumps({"source": self.source, "result": result}) + "\n")


def _slopes(loss: Loss, columns: dict[str, Array]) -> tuple[Array, bool]:
    """(N,) how hard the loss pushes each pair at the reference, and whether it pushes y+ up as hard as y- down: only
    then are the probes, made for losses of the margin, its exact first-order changes."""
    a, b, n_w, n_l = (
        columns[name][:, None] for name in ("ref_chosen_logps", "ref_rejected_logps", "len_chosen", "len_rejected")
    )
    d_w, d_l = (d[:, 0] for d in loss.incentives(Pair(a, b, a, b, n_w, n_l)))
    return (d_w + d_l) / 2, bool(np.allclose(d_w, d_l, rtol=1e-6))


def _guess(columns: dict[str, Array], slopes: Array, optimizer: str, steps: int) -> float:
    """The rate at which the median pair's margin would grow by 1 nat, to first order."""
    if optimizer == "sgd":
        speed = np.median(slopes * columns["gradient_step_margin"])
    else:
        speed = np.median(columns["sign_step_margin"])
    if optimizer == "rmsprop":  # its first steps are longer than the rate, the very first ten times
        speed *= np.mean(1 / np.sqrt(1 - RMSPROP ** np.arange(1, steps + 1)))
    return 1 / (steps * float(speed)) if speed > 0 else 1e-6

"""Training a language model on documents: pre-training and supervised fine-tuning, resumable to the bit.

The batch of step k is drawn from `numpy.random.default_rng([seed, k])`, so that a run needs no state beyond its step,
the parameters and the optimiser's moments; these are kept in one safetensors file, replaced atomically. A run that is
killed and started again, on as many threads, ends with the same weights as one that was not.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sims.files import write_atomically
from sims.language.model import LanguageModel
from theory._check import POSITIVE, Interval, SolverError, check_count, check_number, unknown

Document = str | tuple[str, str]
Texts = Callable[[np.random.Generator, int], Sequence[Document]]
STATE = "state.safetensors"
IGNORED = -100  # torch's label of a position without loss


@dataclass(frozen=True)
class Recipe:
    """How to train: the mean over tokens of -ln pi(token | before), in batches of documents.

    steps, batch : number of updates, documents in each.
    lr : learning rate, raised linearly over `warmup` steps, then (if `decay`) lowered along a half cosine to a tenth.
    optimizer : "adamw", or "rmsprop" with torch's defaults (the paper's).
    clip : largest norm of a gradient (0: none). seed : of the batches. every : steps between checkpoints.
    """

    steps: int
    batch: int = 64
    lr: float = 3e-3
    optimizer: str = "adamw"
    warmup: int = 50
    decay: bool = True
    weight_decay: float = 0.01
    clip: float = 1.0
    seed: int = 0
    every: int = 100

    def __post_init__(self) -> None:
        for name in ("batch", "every"):
            check_count(getattr(self, name), name)
        for name in ("steps", "warmup", "seed"):
            check_count(getattr(self, name), name, low=0)
        check_number(self.lr, "lr", POSITIVE)
        for name in ("weight_decay", "clip"):
            check_number(getattr(self, name), name, Interval(low=0.0, open_low=False))
        if self.optimizer not in ("adamw", "rmsprop"):
            raise ValueError(unknown("optimizer", self.optimizer, ("adamw", "rmsprop")))

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0)."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        if not self.decay:
            return self.lr * rise
        done = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * rise * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))

    def build(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimiser."""
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.RMSprop(parameters, lr=self.lr, weight_decay=self.weight_decay)


def fit(
    model: LanguageModel,
    texts: Texts,
    recipe: Recipe,
    folder: str | Path | None = None,
    *,
    what: Mapping[str, Any] | None = None,
    progress: bool = True,
    watch: Callable[[int, float], None] | None = None,
) -> LanguageModel:
    """A trained copy of the model; the model itself is left alone.

    Parameters
    ----------
    texts : (rng, n) -> n documents. A string is learned whole; of a pair (prompt, response) only the response, and the
        token that ends a text.
    folder : where checkpoints are kept, every `recipe.every` steps; a run found there is continued. None: nowhere.
    what : what the texts are (a world's `to_dict()`), kept in the result's `training`, and compared on resuming.
    watch : called with every step and its loss.

    Raises ValueError if the folder holds the state of another run or a damaged one, SolverError if the loss is not
    finite.
    """
    start = model.fingerprint
    record = {"recipe": asdict(recipe), "what": dict(what or {})}
    identity = hashlib.sha256(json.dumps({"start": start, **record}, sort_keys=True, default=str).encode()).hexdigest()
    model = model.copy()
    parameters = dict(model.network.named_parameters())
    optimizer = recipe.build(list(parameters.values()))
    file = None if folder is None else Path(folder) / STATE
    step = _resume(file, identity, parameters, optimizer) if file is not None and file.exists() else 0
    bar = tqdm(range(step, recipe.steps), initial=step, total=recipe.steps, disable=not progress, desc="training")
    for step in bar:
        documents = texts(np.random.default_rng([recipe.seed, step]), recipe.batch)
        loss = _update(model, documents, optimizer, recipe, step)
        if not math.isfinite(loss):
            raise SolverError(f"training left float range at step {step} (lr = {recipe.lr:g})")
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if watch is not None:
            watch(step, loss)
        if file is not None and ((step + 1) % recipe.every == 0 or step + 1 == recipe.steps):
            _keep(file, identity, step + 1, parameters, optimizer)
    model.training.clear()
    model.training.update({**record, "start": start[:16], "torch": torch.__version__})
    return model


def _update(
    model: LanguageModel, documents: Sequence[Document], optimizer: torch.optim.Optimizer, recipe: Recipe, step: int
) -> float:
    ids, labels = batch_of(model, documents)
    for group in optimizer.param_groups:
        group["lr"] = recipe.rate(step)
    optimizer.zero_grad(set_to_none=True)
    logits = model.network(input_ids=ids, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
    )
    loss.backward()
    if recipe.clip:
        torch.nn.utils.clip_grad_norm_(model.network.parameters(), recipe.clip)
    optimizer.step()
    return float(loss.detach())


def batch_of(model: LanguageModel, documents: Sequence[Document]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T), padded on the right, and labels (B, T), IGNORED where nothing is to be learned."""
    rows = []
    for document in documents:
        prompt, text = ("", document) if isinstance(document, str) else document
        before, after = model.prompt(prompt), model.response(text)
        rows.append((before + after, [IGNORED] * len(before) + list(after)))
    longest = max(len(ids) for ids, _ in rows)
    limit = model.longest
    if longest > limit:
        raise ValueError(f"texts must have at most {limit} tokens, got one of {longest}")
    # Padding is on the right, where a causal network does not see it, and carries no label.
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row, _ in rows])
    labels = torch.tensor([[*row, *[IGNORED] * (longest - len(row))] for _, row in rows])
    return ids, labels


def _keep(
    file: Path, identity: str, step: int, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    from safetensors.torch import save

    tensors = {f"parameter.{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"{key}.{name}": torch.as_tensor(value) for key, value in optimizer.state[p].items()}
    data = {name: value.clone().contiguous() for name, value in tensors.items()}
    write_atomically(file, save(data, {"identity": identity, "step": str(step)}))


def _resume(file: Path, identity: str, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> int:
    """Fill parameters and optimiser from the file; the step it was written at."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as f:
            meta = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the checkpoint {str(file)!r} is damaged ({error}); delete it to start again") from error
    if meta.get("identity") != identity:
        raise ValueError(
            f"the checkpoint {str(file)!r} belongs to another run (another model, recipe, seed or text); "
            "use another folder, or delete it to start again"
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors.pop(f"parameter.{name}"))
            prefix = {key: key.removesuffix(f".{name}") for key in tensors if key.endswith(f".{name}")}
            optimizer.state[p] = {short: tensors[key] for key, short in prefix.items()}
    return int(meta["step"])

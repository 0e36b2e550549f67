"""Short trainings of one network, each from the same weights: what preference pairs do to their own log-probabilities.

An ordinary loop on the network itself, so that any causal language model can be measured that can be trained: beside
the network there are a copy of its weights on the CPU, one gradient and the state of the optimiser. Every step sees all
pairs of the run, so that the forward passes that train also measure. The network stays in evaluation mode (no dropout).
"""

import hashlib
import inspect
import json
import math
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from sims.descent import Optimizer
from sims.files import write_atomically
from sims.language.loss_json import plain_loss
from sims.language.model import LanguageModel
from sims.language.preferences import PreferencePair
from sims.language.responses import padded
from theory import __version__
from theory._check import SolverError, check_count
from theory.losses import Loss, Pair, TokenLoss

Array = NDArray[np.float64]
TOGETHER = 8192  # tokens in one forward pass, padding included
CLOSE = (0.7, 1.4)  # times the margin gain asked for
IGNORED = -100  # a target that cross-entropy leaves out


class Course(NamedTuple):
    """ln pi of P pairs before each of T steps and after the last, nats; NaN after a step that left float range.

    chosen, rejected (T + 1, P). seconds : what the run took.
    moved : share of the weights that the first step changed, each counted by the size of its gradient; less than 1
        where the step is too small for the type of the weights.
    """

    chosen: Array
    rejected: Array
    moved: float
    seconds: float

    @property
    def gain(self) -> float:
        """By how much the mean margin grew, nats."""
        u = (self.chosen - self.rejected).mean(axis=1)
        return float(u[-1] - u[0])


def check_whole(loss: Loss) -> Loss:
    """The loss, or a ValueError if it looks at single tokens or at gradients."""
    if isinstance(loss, TokenLoss) or loss.uses_norms:
        raise ValueError(f"loss must be a function of the log-probabilities of whole responses, got {loss!r}")
    return loss


def check_trainable(model: LanguageModel, loss: Loss) -> None:
    """A ValueError for a loss or weights that cannot be trained here."""
    check_whole(loss)
    if model.W.dtype == torch.float16:  # Adam's eps is 0 there, and gradients vanish for want of loss scaling
        raise ValueError("model must have float32, float64 or bfloat16 weights to be trained, got float16")


class Restarts:
    """A network that is trained again and again from the weights it has now, and has them back afterwards.

    model : its network is trained in place; use as a context manager, or call `restore` at the end.
    loss : a function of the log-probabilities of whole responses; its reference is the model as it is now.
    steps : of every run, each with a new optimiser. witness : a pair whose ln pi is computed before every run
        and must be the same to the bit.

    Raises ValueError for a loss of single tokens or of gradient norms.
    """

    def __init__(self, model: LanguageModel, loss: Loss, steps: int, witness: PreferencePair) -> None:
        self.loss, self.steps, self.witness = check_whole(loss), check_count(steps, "steps"), witness
        self.network = model.network
        self.start = {name: p.detach().cpu().clone() for name, p in self.network.named_parameters()}
        self.said = self._witness()

    def __enter__(self) -> "Restarts":
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """The weights of the beginning; a SolverError if the network does not say the same to the bit."""
        for name, p in self.network.named_parameters():
            p.copy_(self.start[name])
            p.grad = None
        if not torch.equal(self._witness(), self.said):
            raise SolverError("the restored network does not say the same to the bit: its passes are not deterministic")

    def run(self, pairs: Sequence[PreferencePair], optimizer: Optimizer) -> Course:
        """Train on the pairs, all of them in every step."""
        begun = perf_counter()
        self.restore()
        opt = optimizer.build([{"params": list(self.network.parameters()), "rate": 1.0}])
        seen = np.full((self.steps + 1, len(pairs), 2), np.nan)
        parts, moved, ref = portions(pairs), 1.0, None
        for step in range(self.steps):
            opt.zero_grad(set_to_none=True)
            with torch.set_grad_enabled(len(parts) == 1):
                values = torch.cat([log_probs(self.network, part) for part in parts])
            seen[step] = values.detach().cpu().numpy()
            if not np.isfinite(seen[step]).all():
                break
            ref = values.detach() if ref is None else ref
            pulls = self._pulls(values.detach(), ref, pairs)
            if len(parts) == 1:
                values.backward(pulls)
            else:  # the graphs of all pairs at once would not fit: run each portion again
                for part, pull in zip(parts, pulls.split([len(part) for part in parts]), strict=True):
                    log_probs(self.network, part).backward(pull)
            opt.step()
            moved = self._moved() if step == 0 else moved
        else:
            with torch.no_grad():
                seen[-1] = torch.cat([log_probs(self.network, part) for part in parts]).cpu().numpy()
        return Course(seen[..., 0], seen[..., 1], moved, perf_counter() - begun)

    def _pulls(self, values: Tensor, ref: Tensor, pairs: Sequence[PreferencePair]) -> Tensor:
        """(P, 2) derivatives of the mean loss by the log-probabilities (P, 2)."""
        n = torch.tensor([[len(p.preferred), len(p.dispreferred)] for p in pairs], dtype=torch.float64)
        (a, b), (n_w, n_l) = values.T, n.to(values.device).T
        a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
        value = self.loss.torch_value(Pair(a, b, ref[:, 0], ref[:, 1], n_w, n_l)).mean()
        found = torch.autograd.grad(value, (a, b), allow_unused=True)
        return torch.stack([torch.zeros_like(a) if g is None else g for g in found], dim=1)

    @torch.no_grad()
    def _witness(self) -> Tensor:
        return log_probs(self.network, [self.witness])

    @torch.no_grad()
    def _moved(self) -> float:
        """Share of the weights that changed, each counted by the size of its gradient."""
        meant = went = 0.0
        for name, p in self.network.named_parameters():
            if p.grad is not None:
                size = p.grad.abs()
                meant += float(size.sum(dtype=torch.float64))
                went += float((size * (p != self.start[name].to(p.device))).sum(dtype=torch.float64))
        return went / meant if meant else 1.0


def log_probs(network: Any, pairs: Sequence[PreferencePair]) -> Tensor:
    """(P, 2) ln pi of preferred and dispreferred with gradients, from the network's own logits; summed in float64."""
    said = [(p.prompt, y) for p in pairs for y in (p.preferred, p.dispreferred)]
    ids = padded([[*x, *y] for x, y in said])
    lengths = torch.tensor([len(x) + len(y) for x, y in said])
    at = torch.arange(ids.shape[1])
    starts = torch.tensor([len(x) for x, _ in said])
    responses = (at >= starts[:, None]) & (at < lengths[:, None])
    first = int(starts.min()) - 1  # no logits before the first that predicts a response
    targets = ids.masked_fill(~responses, IGNORED)[:, first + 1 :]
    place = next(network.parameters()).device
    more: dict[str, Any] = {"attention_mask": (at < lengths[:, None]).long().to(place), "use_cache": False}
    kept = "logits_to_keep" in inspect.signature(network.forward).parameters
    if kept:
        more["logits_to_keep"] = torch.arange(first, ids.shape[1] - 1, device=place)
    logits = network(input_ids=ids.to(place), **more).logits
    logits = logits if kept else logits[:, first:-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    each = -torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets.to(place), reduction="none")
    return each.double().sum(-1).unflatten(0, (len(pairs), 2))


def portions(pairs: Sequence[PreferencePair], tokens: int = TOGETHER) -> list[list[PreferencePair]]:
    """The pairs in their order, as many together as fit into `tokens`; at least one."""
    out: list[list[PreferencePair]] = []
    longest = 0
    for pair in pairs:
        longest = max(longest, len(pair.prompt) + max(len(pair.preferred), len(pair.dispreferred)))
        if out and 2 * longest * (len(out[-1]) + 1) <= tokens:
            out[-1].append(pair)
        else:
            out.append([pair])
            longest = len(pair.prompt) + max(len(pair.preferred), len(pair.dispreferred))
    return out


class Kept:
    """The runs of one network and loss, each stored when it is done and looked up first.

    folder : None stores nothing, but the same run is still not done twice.
    """

    def __init__(self, restarts: Restarts, folder: Path | None, **source: Any) -> None:
        self.restarts, self.folder = restarts, folder
        self.source = {"version": __version__, "loss": plain_loss(restarts.loss), "steps": restarts.steps, **source}
        self.done: dict[str, Course] = {}

    def has(self, pairs: Sequence[PreferencePair], optimizer: Optimizer) -> bool:
        """Whether the run is done."""
        title = self._title(pairs, optimizer)
        return title in self.done or (self.folder is not None and self._file(title).is_file())

    def run(self, pairs: Sequence[PreferencePair], optimizer: Optimizer) -> Course:
        """As `Restarts.run`. Raises ValueError for a stored run that is damaged."""
        title = self._title(pairs, optimizer)
        if title not in self.done and self.has(pairs, optimizer):
            self.done[title] = _stored(self._file(title), title)
        if title not in self.done:
            course = self.restarts.run(pairs, optimizer)
            if self.folder is not None:  # NaN is written as Python writes it: only this module reads the file
                values = [course.chosen.tolist(), course.rejected.tolist(), course.moved, course.seconds]
                write_atomically(self._file(title), json.dumps({"run": title, "course": values}) + "\n")
            self.done[title] = course
        return self.done[title]

    def _title(self, pairs: Sequence[PreferencePair], optimizer: Optimizer) -> str:
        """What decides the result."""
        how = {"optimizer": optimizer.name, "lr": optimizer.lr, "pairs": [list(map(list, p)) for p in pairs]}
        return json.dumps({**self.source, **how}, sort_keys=True)

    def _file(self, title: str) -> Path:
        assert self.folder is not None
        return self.folder / f"run-{hashlib.sha256(title.encode()).hexdigest()[:20]}.json"


def _stored(file: Path, title: str) -> Course:
    try:
        found = json.loads(file.read_bytes())
        if found["run"] != title:
            raise ValueError("it belongs to another run")
        chosen, rejected = (np.array(x, dtype=np.float64) for x in found["course"][:2])
        moved, seconds = map(float, found["course"][2:])
        return Course(chosen, rejected, moved, seconds)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"stored run {str(file)!r} is damaged ({error}): delete it to do it again") from error


def sought(
    kept: Kept, subsets: Sequence[Sequence[PreferencePair]], name: str, guess: float, gain: float, progress: bool
) -> tuple[float, int]:
    """A learning rate at which the median margin of the runs grows by `gain`, and the number of rates tried."""
    rate, median, below, above = guess * gain, math.nan, 0.0, math.inf
    for tried in range(1, 13):
        rate = float(f"{rate:.2g}")
        runs = tqdm(subsets, desc=f"trying learning rate {rate:g}", disable=not progress, leave=False)
        median = float(np.median([kept.run(own, Optimizer(name, rate)).gain for own in runs]))
        if CLOSE[0] * gain <= median <= CLOSE[1] * gain:
            return rate, tried
        if 0 < median < gain:
            below = max(below, rate)
        else:  # a margin that fell, or left float range, went too far as well
            above = min(above, rate)
        if below and above < math.inf:
            rate = math.sqrt(below * above)
        else:
            rate *= min(10.0, max(0.1, gain / median)) if median > 0 else 0.1
    raise SolverError(
        f"no learning rate was found at which the margin grows by about {gain:g} nat (by {median:+.2g} at the last "
        "one tried): give one"
    )


def trained(
    kept: Kept, subsets: Sequence[Sequence[PreferencePair]], optimizer: Optimizer, progress: bool
) -> list[Course]:
    """All runs. Says how long they take before it starts."""
    begun = kept.run(subsets[0], optimizer)
    left = sum(not kept.has(own, optimizer) for own in subsets)
    if progress and left:
        time = timedelta(seconds=round(begun.seconds * left))
        print(f"{left} runs of {kept.restarts.steps} steps, about {time} in all", file=sys.stderr)
    done = []
    with tqdm(total=len(subsets), initial=len(subsets) - left, desc="runs", disable=not progress) as bar:
        for own in subsets:
            bar.update(not kept.has(own, optimizer))
            done.append(kept.run(own, optimizer))
            if not np.isfinite(done[-1].chosen + done[-1].rejected).all():
                raise SolverError(f"a run with {optimizer!r} left float range: try a smaller learning rate")
    return done

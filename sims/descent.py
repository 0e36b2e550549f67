"""Discrete training with torch optimisers, by automatic differentiation of the loss value."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from sims.objective import Objective, few_threads, pick_device, stacked
from sims.trajectory import Trajectory
from theory._check import POSITIVE, SolverError, check_count, check_number, unknown
from theory.losses import Interval, Loss
from theory.model import UnconstrainedFeatures

Array = NDArray[np.float64]
_RATE = Interval(low=0.0, open_low=False)
Factory = Callable[[Iterable[dict[str, Any]]], torch.optim.Optimizer]


class SignSGD(torch.optim.Optimizer):
    """theta <- theta - lr sgn(gradient), with sgn(0) = 0."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * torch.sign(p.grad))


@dataclass(frozen=True)
class Optimizer:
    """A named optimiser with its learning rate; torch's defaults for everything else.

    name : "sgd" (with `momentum`, `nesterov`), "sign", "rmsprop" (the paper's) or "adam".
    """

    name: str
    lr: float
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.name not in ("sgd", "sign", "rmsprop", "adam"):
            raise ValueError(unknown("optimizer", self.name, ("sgd", "sign", "rmsprop", "adam")))
        check_number(self.lr, "lr", POSITIVE)
        check_number(self.momentum, "momentum", Interval(0.0, 1.0, open_low=False))
        if (self.momentum or self.nesterov) and self.name != "sgd":
            raise ValueError(f"momentum and nesterov are for 'sgd', got {self.name!r}")

    def build(self, groups: Iterable[dict[str, Any]]) -> torch.optim.Optimizer:
        """The torch optimiser over parameter groups, each carrying its own "rate" multiplier."""
        groups = [{"params": g["params"], "lr": self.lr * g["rate"]} for g in groups]
        match self.name:
            case "sgd":
                return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)
            case "sign":
                return SignSGD(groups, lr=self.lr)
            case "rmsprop":
                return torch.optim.RMSprop(groups, lr=self.lr)
            case _:
                return torch.optim.Adam(groups, lr=self.lr)


def gradient_descent(
    model: UnconstrainedFeatures,
    loss: Loss,
    optimizer: Optimizer | Factory,
    steps: int,
    lr_unembedding: float = 1.0,
    lr_hidden: float = 1.0,
    *,
    every: int = 1,
    progress: bool = False,
) -> Trajectory:
    """`steps` updates of a torch optimiser on the model's W and H; parameters kept after every `every` steps.

    optimizer : an `Optimizer`, or a function from parameter groups ({"params", "rate"}) to a torch optimiser.
    lr_unembedding, lr_hidden : factors on the learning rate of each group; 0 freezes it.

    Raises ValueError for bad arguments and SolverError if the loss or a parameter leaves float range.
    """
    keep = {"every": every, "progress": progress, "device": "cpu"}
    return gradient_descent_batch([model], loss, optimizer, steps, lr_unembedding, lr_hidden, **keep)[0]


def gradient_descent_batch(
    models: Sequence[UnconstrainedFeatures],
    loss: Loss,
    optimizer: Optimizer | Factory,
    steps: int,
    lr_unembedding: float = 1.0,
    lr_hidden: float = 1.0,
    *,
    every: int = 1,
    progress: bool = False,
    device: str | None = None,
) -> list[Trajectory]:
    """`gradient_descent` of many independent models of one shape at once; the optimiser must work entry by entry.

    device : as torch names it; default a GPU if there is one, else the CPU.
    """
    if not models:
        raise ValueError("models must not be empty")
    keep = {"every": every, "progress": progress, "device": device}
    start = Objective.of(models, loss), *stacked(models)
    times, W, H = train(*start, optimizer, steps, lr_unembedding, lr_hidden, **keep)
    label = optimizer.name if isinstance(optimizer, Optimizer) else getattr(optimizer, "__name__", "optimizer")
    return [Trajectory(m, times, W[:, i], H[:, i], label) for i, m in enumerate(models)]


def train(
    objective: Objective,
    W0: Tensor,
    H0: Tensor,
    optimizer: Optimizer | Factory,
    steps: int,
    lr_unembedding: float,
    lr_hidden: float,
    *,
    every: int = 1,
    progress: bool = False,
    device: str | None = None,
) -> tuple[Array, Array, Array]:
    """Steps (T,), W (T, B, V, d), H (T, B, n, d) of B stacked models in training (see `gradient_descent`)."""
    steps, every = check_count(steps, "steps", low=0), check_count(every, "every")
    rates = check_number(lr_unembedding, "lr_unembedding", _RATE), check_number(lr_hidden, "lr_hidden", _RATE)
    place = pick_device(device)
    objective = replace(objective.to(place), rates=rates)
    W, H = (x.detach().clone().to(place).requires_grad_() for x in (W0, H0))
    groups = [{"params": [p], "rate": r} for p, r in zip((W, H), rates, strict=True)]
    build = optimizer.build if isinstance(optimizer, Optimizer) else optimizer
    opt = build(groups)
    kept, times = [(W.detach().cpu().clone(), H.detach().cpu().clone())], [0]
    with few_threads(W.numel() + H.numel()):
        for i in tqdm(range(1, steps + 1), disable=not progress, desc=type(opt).__name__):
            opt.zero_grad(set_to_none=True)
            value = objective(W, H).sum()
            value.backward()
            opt.step()
            if not (torch.isfinite(value) and torch.isfinite(W).all() and torch.isfinite(H).all()):
                raise SolverError(f"training with {optimizer!r} on {objective.loss!r} left float range at step {i}")
            if i % every == 0 or i == steps:
                kept.append((W.detach().cpu().clone(), H.detach().cpu().clone()))
                times.append(i)
    W_kept, H_kept = (torch.stack(x).numpy() for x in zip(*kept, strict=True))
    return np.array(times, dtype=np.float64), W_kept, H_kept

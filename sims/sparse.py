"""SparsePO in training: a model and the nets of its token masks learn together, by automatic differentiation."""

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from sims.descent import Optimizer
from sims.objective import Objective, few_threads, stacked
from sims.trajectory import Trajectory
from theory._check import SolverError, check_count, check_number
from theory.losses import Group, Interval, TokenLoss
from theory.losses.sparse_po import MaskNet, SparsePO, token_mask
from theory.model import Response, UnconstrainedFeatures
from theory.ops import NUMPY, Ops

Array = NDArray[np.float64]
_RATE = Interval(low=0.0, open_low=False)
Net = tuple[Tensor, Tensor]  # v (d,) and c () of a mask net


@dataclass(frozen=True, eq=False)
class MaskRun:
    """A model in training with its masks at T points; `losses[i]` holds the mask nets of point i."""

    trajectory: Trajectory
    losses: tuple[SparsePO, ...]

    def masks(self, response: Response, prompt: Hashable | None = None, kind: str = "u") -> Array:
        """(T, n) masks of a response's tokens: kind "u" on its log-ratios, "d" on its KL terms."""
        if kind not in ("u", "d"):
            raise ValueError(f"kind must be 'u' (log-ratios) or 'd' (KL terms), got {kind!r}")
        model = self.trajectory.model
        prompt = model.samples[0].prompt if prompt is None else prompt
        assert model.origin is not None
        hidden = model.origin[1][[model.context_row(prompt, response[:k]) for k in range(len(response))]]
        nets = [loss.mask_u if kind == "u" or loss.mask_d is None else loss.mask_d for loss in self.losses]
        return np.stack([net.mask(NUMPY, hidden) for net in nets])

    @property
    def sparsity(self) -> Array:
        """(T,) share of exact zeros among the masks of all tokens of y+ and y-, both kinds if there are two nets."""
        kinds = "u" if self.losses[0].mask_d is None else "ud"
        pairs = [(y, s.prompt) for s in self.trajectory.model.samples for y in s.responses[:2]]
        masks = [self.masks(y, prompt, kind) for y, prompt in pairs for kind in kinds]
        return (np.concatenate(masks, axis=1) == 0).mean(1)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, for saving: steps, sparsity, and per sample log-probabilities (nats) and masks of y+ and y-."""
        samples = []
        for s in self.trajectory.model.samples:
            row: dict[str, Any] = {"prompt": s.prompt}
            for name, y in (("preferred", s.preferred), ("dispreferred", s.dispreferred)):
                row[name] = {
                    "tokens": list(y),
                    "log_probs": self.trajectory.log_probs(y, s.prompt).tolist(),
                    "mask_u": self.masks(y, s.prompt, "u").tolist(),
                    "mask_d": self.masks(y, s.prompt, "d").tolist(),
                }
            samples.append(row)
        return {
            "steps": self.trajectory.times.tolist(),
            "sparsity": self.sparsity.tolist(),
            "loss": repr(self.losses[-1]),
            "samples": samples,
        }

    def __str__(self) -> str:
        s = self.trajectory.model.samples[0]
        a, b = (self.trajectory.log_probs(y, s.prompt) for y in (s.preferred, s.dispreferred))
        u = self.masks(s.preferred, s.prompt), self.masks(s.dispreferred, s.prompt)
        shown = [np.array2string(m[-1], precision=3) for m in u]
        return "\n".join(
            [
                f"{self.trajectory.times[-1]:g} steps of SparsePO; zero masks {self.sparsity[-1]:.0%}",
                f"  y+: ln pi {a[0]:.4f} -> {a[-1]:.4f}, masks {shown[0]}",
                f"  y-: ln pi {b[0]:.4f} -> {b[-1]:.4f}, masks {shown[1]}",
            ]
        )


@dataclass(frozen=True)
class _InTraining(TokenLoss):
    """A SparsePO loss whose mask nets are tensors."""

    loss: SparsePO
    nets: tuple[Net, ...]  # one if the mask is common

    def __post_init__(self) -> None: ...

    def formula(self, ops: Ops, y: Group) -> Any:  # type: ignore[override]
        masks = [[token_mask(ops, t.hidden, v, c) for t in y.responses[:2]] for v, c in self.nets]
        return self.loss.masked(ops, y, masks[0], masks[-1])

    def now(self) -> SparsePO:
        """The loss with the nets as they stand."""
        nets = [MaskNet(tuple(v.tolist()), c.item()) for v, c in self.nets]
        return replace(self.loss, mask_u=nets[0], mask_d=None if self.loss.mask_d is None else nets[1])


def learn_masks(
    model: UnconstrainedFeatures,
    loss: SparsePO,
    optimizer: Optimizer,
    steps: int,
    *,
    mask_lr: float = 0.01,
    weight_decay: float = 0.01,
    lr_unembedding: float = 1.0,
    lr_hidden: float = 1.0,
    every: int = 1,
    progress: bool = False,
) -> MaskRun:
    """`steps` joint updates of W, H (by `optimizer`) and of the mask nets of `loss` (by AdamW), from one gradient.

    The nets start as they stand in `loss`; `MaskNet.random` draws them, `MaskNet()` starts from masks of 1. Masks read
    the hidden vectors of the reference model, which stay. Nothing is random: equal arguments give equal runs.

    Without L1 terms there are no best masks: wherever the masked score is positive, larger masks lower the loss; they
    grow in the place of the margin. A net that gives every token 0 has no gradient and stays.

    mask_lr, weight_decay : of the mask nets; the model's parameters have no decay. mask_lr = 0 freezes the masks.
    lr_unembedding, lr_hidden : factors on the learning rate of W and H; 0 freezes it.

    Raises ValueError for bad arguments and SolverError if the loss or a parameter leaves float range.
    """
    if not isinstance(loss, SparsePO):
        raise ValueError(f"loss must be a SparsePO, got {loss!r}")
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"optimizer must be a sims.Optimizer, got {optimizer!r}")
    steps, every = check_count(steps, "steps", low=0), check_count(every, "every")
    mask_lr, weight_decay = check_number(mask_lr, "mask_lr", _RATE), check_number(weight_decay, "weight_decay", _RATE)
    rates = check_number(lr_unembedding, "lr_unembedding", _RATE), check_number(lr_hidden, "lr_hidden", _RATE)

    training = _InTraining(loss, tuple(_tensors(net, model.d) for net in (loss.mask_u, loss.mask_d) if net is not None))
    objective = replace(Objective.of([model], loss), loss=training)
    W, H = (x.requires_grad_() for x in stacked([model]))
    of_model = optimizer.build([{"params": [p], "rate": r} for p, r in zip((W, H), rates, strict=True)])
    weights = [x for net in training.nets for x in net]
    of_masks = torch.optim.AdamW(weights, lr=mask_lr, weight_decay=weight_decay)

    kept = [(0, W.detach()[0].clone(), H.detach()[0].clone(), training.now())]
    with few_threads(W.numel() + H.numel()):
        for i in tqdm(range(1, steps + 1), disable=not progress, desc="SparsePO"):
            of_model.zero_grad(set_to_none=True)
            of_masks.zero_grad(set_to_none=True)
            value = objective(W, H).sum()
            value.backward()
            of_model.step()
            of_masks.step()
            if not all(torch.isfinite(x).all() for x in (value, W, H, *weights)):
                raise SolverError(f"learning masks with {optimizer!r} on {loss!r} left float range at step {i}")
            if i % every == 0 or i == steps:
                kept.append((i, W.detach()[0].clone(), H.detach()[0].clone(), training.now()))
    times, Ws, Hs, losses = zip(*kept, strict=True)
    trajectory = Trajectory(
        model, np.array(times, dtype=np.float64), torch.stack(Ws).numpy(), torch.stack(Hs).numpy(), optimizer.name
    )
    return MaskRun(trajectory, losses)


def _tensors(net: MaskNet, d: int) -> Net:
    """v and c of a net as leaves of the graph; a constant mask gets weights of zero."""
    v = net.v or (0.0,) * d
    if len(v) != d:
        raise ValueError(f"mask nets must have {d} weights, as the model's hidden vectors, got {len(v)}")
    return tuple(torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (v, net.c))  # type: ignore[return-value]

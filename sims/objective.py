"""The training objective as torch code: the loss's value over log-probabilities of the model, and nothing else.

Everything simulated differentiates this by automatic differentiation. It shares the loss formula with `theory`, and no
other formula.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from theory.losses import Loss, Pair
from theory.model import Context, UnconstrainedFeatures
from theory.problem import Problem, check_one_shape


@dataclass(frozen=True, eq=False)
class Objective:
    """Mean loss over samples, for B models that share vocabulary, contexts and responses (not parameters).

    The references (B, samples) are those of each model's own samples.
    """

    loss: Loss
    pairs: tuple[tuple[Any, Any], ...]  # per sample: (rows, tokens) of y+ and of y-
    a_ref: Tensor
    b_ref: Tensor
    hidden: Callable[[Tensor], Tensor] | None = None  # H as a function of the parameters that stand in its place

    @classmethod
    def of(cls, models: Sequence[UnconstrainedFeatures], loss: Loss) -> "Objective":
        """From models of one shape; a ValueError names the first that differs."""
        if not isinstance(loss, Loss):
            raise ValueError(f"loss must be a theory.losses.Loss instance, got {loss!r}")
        check_one_shape(models)
        first = models[0]
        rows: dict[Context, int] = {c: i for i, c in enumerate(first.contexts)}
        pairs = []
        for s in first.samples:
            where = [([rows[(s.prompt, y[:k])] for k in range(len(y))], list(y)) for y in s.responses[:2]]
            pairs.append((where[0], where[1]))
        references = np.array([[s.reference[:2] for s in m.samples] for m in models])  # type: ignore[index]
        return cls(loss, tuple(pairs), torch.tensor(references[..., 0]), torch.tensor(references[..., 1]))

    @classmethod
    def of_problem(cls, problem: Problem) -> "Objective":
        """The objective of a batch of models already brought into one shape."""
        a_ref, b_ref = (torch.tensor(problem.references[..., i]) for i in (0, 1))
        return cls(problem.loss, problem.pairs, a_ref, b_ref)

    def to(self, device: torch.device) -> "Objective":
        """The same objective with its references on a device."""
        return replace(self, a_ref=self.a_ref.to(device), b_ref=self.b_ref.to(device))

    def __call__(self, W: Tensor, H: Tensor) -> Tensor:
        """(B,) objective at W (B, V, d), H (B, n, d)."""
        if self.hidden is not None:
            H = self.hidden(H)
        log_pi = torch.log_softmax(H @ W.transpose(1, 2), dim=-1)  # (B, n, V)
        total = W.new_zeros(len(W))
        for i, ((rows_w, y_w), (rows_l, y_l)) in enumerate(self.pairs):
            a = log_pi[:, rows_w, y_w].sum(-1)
            b = log_pi[:, rows_l, y_l].sum(-1)
            y = Pair(a, b, self.a_ref[:, i], self.b_ref[:, i], len(y_w), len(y_l))
            total = total + self.loss.torch_value(y)
        return total / len(self.pairs)


def stacked(models: Sequence[UnconstrainedFeatures]) -> tuple[Tensor, Tensor]:
    """W (B, V, d) and H (B, n, d) of the models, float64."""
    return (
        torch.tensor(np.stack([m.W for m in models]), dtype=torch.float64),
        torch.tensor(np.stack([m.H for m in models]), dtype=torch.float64),
    )


@contextmanager
def few_threads(size: int) -> Iterator[None]:
    """torch on one thread for models of few numbers, where waiting for the others costs many times the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if size < 100_000 else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def pick_device(device: str | None) -> torch.device:
    """A torch device by name; default a GPU if there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device must be one that torch has here, got {device!r} ({error})") from None

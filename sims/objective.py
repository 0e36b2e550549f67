"""The training objective as torch code: the loss's value over log-probabilities of the model, and nothing else.

Everything simulated differentiates this by automatic differentiation. It shares the loss formula with `theory`, and no
other formula.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from theory.losses import Group, Loss, Pair, TokenLoss, Tokens
from theory.model import UnconstrainedFeatures
from theory.problem import SAME, Problem

Where = tuple[tuple[int, ...], tuple[int, ...]]  # rows of H and tokens of a response


@dataclass(frozen=True, eq=False)
class Objective:
    """Mean loss over samples, for B models that share vocabulary, contexts and responses (not parameters).

    The references (B, S) are those of each model's own samples. `origin` holds the parameters of their reference
    models, for losses that look at tokens.
    """

    loss: Loss
    groups: tuple[tuple[Where, ...], ...]  # per sample: its responses, y+ first and y- second
    rewards: tuple[tuple[float, ...], ...]
    a_ref: Tensor
    b_ref: Tensor
    rates: tuple[float, float]  # of W and H: the metric of gradient norms
    origin: tuple[Tensor, Tensor] | None = None
    hidden: Callable[[Tensor], Tensor] | None = None  # H as a function of the parameters that stand in its place

    @classmethod
    def of(cls, models: Sequence[UnconstrainedFeatures], loss: Loss) -> "Objective":
        """From models of one shape; a ValueError names the first that differs."""
        return cls.of_problem(Problem.of(models, loss))

    @classmethod
    def of_problem(cls, problem: Problem) -> "Objective":
        """The objective of a batch of models already brought into one shape."""
        origin = None
        if isinstance(problem.loss, TokenLoss):
            problem.check_origin()
            assert problem.origin is not None
            W_ref, H_ref = (torch.tensor(x, dtype=torch.float64) for x in problem.origin)
            origin = W_ref, H_ref
        a_ref, b_ref = (torch.tensor(problem.references[..., i]) for i in (0, 1))
        rewards = tuple(s.rewards or () for s in problem.samples)
        rates = problem.lr_unembedding, problem.lr_hidden
        return cls(problem.loss, problem.groups, rewards, a_ref, b_ref, rates, origin)

    def to(self, device: torch.device) -> "Objective":
        """The same objective with its references on a device."""
        origin = None if self.origin is None else (self.origin[0].to(device), self.origin[1].to(device))
        return replace(self, a_ref=self.a_ref.to(device), b_ref=self.b_ref.to(device), origin=origin)

    def __call__(self, W: Tensor, H: Tensor) -> Tensor:
        """(B,) objective at W (B, V, d), H (B, n, d)."""
        log_pi = self._log_pi(W, H)
        if isinstance(self.loss, TokenLoss):
            each = torch.stack([self.loss.torch_value(group) for group in self._token_groups(log_pi)], dim=-1)
        else:
            each = self.loss.torch_value(self._pairs(W, H, log_pi))
        return each.mean(-1)

    def _log_pi(self, W: Tensor, H: Tensor) -> Tensor:
        """(B, n, V) ln pi(. | context)."""
        H = H if self.hidden is None else self.hidden(H)
        return torch.log_softmax(H @ W.transpose(1, 2), dim=-1)

    def _pairs(self, W: Tensor, H: Tensor, log_pi: Tensor) -> Pair:
        """Log-probabilities of y+ and y-, (B, S) each."""
        rows, tokens, belongs = self._places
        a, b = (log_pi[:, rows, tokens] @ belongs).chunk(2, dim=-1)
        # At its reference a model is exactly there (see `Problem`): what is left is the order of the sums.
        a_ref, b_ref = (
            torch.where((x - r).abs() <= SAME * (1 + r.abs()), x.detach(), r)
            for x, r in ((a, self.a_ref), (b, self.b_ref))
        )
        n_w, n_l = belongs.sum(0).chunk(2)
        ratio = self._norm_ratios(W, H) if self.loss.uses_norms else torch.ones_like(a)
        return Pair(a, b, a_ref, b_ref, n_w, n_l, ratio)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (N,) and tokens (N,) of every position of every y+, then of every y-, and which of these 2S responses it
        belongs to (N, 2S): one look-up and one product are all that a gradient has to go back through."""
        responses = [group[i] for i in (0, 1) for group in self.groups]
        owner = torch.tensor([i for i, (rows, _) in enumerate(responses) for _ in rows])
        rows, tokens = (torch.tensor([x for y in responses for x in y[i]]) for i in (0, 1))
        belongs = torch.nn.functional.one_hot(owner, len(responses)).to(self.a_ref)
        return rows.to(self.a_ref.device), tokens.to(self.a_ref.device), belongs

    def _norm_ratios(self, W: Tensor, H: Tensor) -> Tensor:
        """(B, S) |grad ln pi(y-)| / |grad ln pi(y+)| in the metric of the rates, without a gradient of its own."""
        with torch.enable_grad():
            W, H = (x.detach().requires_grad_() for x in (W, H))
            log_pi = self._log_pi(W, H)

            def square(y: Where) -> Tensor:
                value = log_pi[:, list(y[0]), list(y[1])].sum()
                grads = torch.autograd.grad(value, (W, H), retain_graph=True)
                parts = [rate * (g * g).sum((1, 2)) for rate, g in zip(self.rates, grads, strict=True)]
                return parts[0] + parts[1]

            return torch.stack([(square(group[1]) / square(group[0])).sqrt() for group in self.groups], dim=-1)

    def _token_groups(self, log_pi: Tensor) -> Iterator[Group]:
        """Every sample's responses token by token, (B, n) each."""
        assert self.origin is not None
        W_ref, H_ref = self.origin
        ref = torch.log_softmax(H_ref @ W_ref.transpose(1, 2), dim=-1)
        kl = (ref.exp() * (ref - log_pi)).sum(-1)
        squares = torch.logsumexp(2 * log_pi, dim=-1)
        for group, rewards in zip(self.groups, self.rewards, strict=True):
            tokens = tuple(
                Tokens(log_pi[:, rows, y], ref[:, rows, y], kl[:, rows], squares[:, rows], H_ref[:, rows])
                for rows, y in ((list(rows), list(y)) for rows, y in group)
            )
            yield Group(tokens, rewards)


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

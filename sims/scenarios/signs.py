"""Signs of displacement: what the conditions of theory say, against flows integrated a short way, for every loss.

The measured side knows no condition and no derivative of a loss: it differentiates the loss value automatically,
integrates gradient flow with Runge-Kutta steps of order 4, takes one step of sign descent, and looks at which way
ln pi(y+), ln pi(y-) and the margin have gone.
"""

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from sims.objective import Objective, few_threads
from sims.routes import leaves
from theory._check import check_count
from theory.conditions import displacement_signs, sign_first_step
from theory.losses import LOSSES, Loss, TokenLoss
from theory.problem import Problem
from theory.theorems import SETTINGS
from theory.theorems.settings import random_pair_loss

PLACES = (
    "single_token", "two_tokens", "fixed_unembeddings", "sequences", "shared_prefix", "one_edit", "data_set",
    "sequence_data_set",
)  # fmt: skip
SIGNS: tuple[str, ...] = ("flow, y+", "flow, y-", "flow, margin", "sign step, y+", "sign step, y-")
MOVED = 1e-6  # how far the logits move: the curvature met on the way is of this order, relative to the rate
SAFETY = 2.0  # times the measured curvature
ROUNDING = 32 * np.finfo(np.float64).eps
Prediction = Callable[[Problem], tuple[Any, ...]]  # (B,) each: signs in the order of SIGNS


@dataclass(frozen=True)
class Agreement:
    """How often conditions and integrated flows agree on a sign.

    compared, inside, disagreements : per sign; `inside`: the change is no larger than the numerical margin, or zero.
    resting : instances in which nothing moves by more than rounding. undefined : where the loss
    itself overflows or is undefined.
    losses : names of the losses drawn, with the comparisons made for each. first : descriptions of the first few
    disagreements.
    """

    instances: int
    seed: int
    compared: dict[str, int]
    inside: dict[str, int]
    disagreements: dict[str, int]
    resting: int
    undefined: int
    losses: dict[str, int]
    first: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every sign compared agrees."""
        return not any(self.disagreements.values())

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        head = (
            f"{self.instances} instances, {len(self.losses)} losses, {self.resting} at rest, {self.undefined} undefined"
        )
        rows = [f"{'sign of':16}{'compared':>10}{'in margin':>11}{'disagree':>10}"]
        rows += [f"{s:16}{self.compared[s]:>10}{self.inside[s]:>11}{self.disagreements[s]:>10}" for s in SIGNS]
        return "\n".join([head, *rows, *self.first])


def conditions_signs(problem: Problem) -> tuple[Any, ...]:
    """What theory says of the first sample."""
    step = sign_first_step(problem)
    return (*displacement_signs(problem), np.sign(step.change_w), np.sign(step.change_l))


def sign_agreement(
    instances: int = 100_000, seed: int = 0, predict: Prediction = conditions_signs, *, progress: bool = False
) -> Agreement:
    """Compare signs on random models, data and losses: every registered loss of two log-probabilities, any parameters.

    The numerical margin of a change over time T is, all of it measured on the integrated side: twice the curvature
    |flow - tangent| + 2 |tangent(T) - 2 tangent(T/2)|, where `tangent` follows the first velocity (a kink of the loss
    at the start shows here, too); rounding, 32 epsilon times the sums of absolute terms that logits and velocities are
    made of; and what rounding of the references makes of the velocity (at a kink, such as DPOP's at the reference, it
    decides the side). T is such that no logit or parameter moves by more than about 1e-6.

    predict : gives the five signs; tests put wrong conditions here.
    """
    instances, seed = check_count(instances, "instances"), check_count(seed, "seed", low=0)
    tally, batch = _Tally(), int(np.clip(instances // 200, 10, 100))
    classes = [c for c in LOSSES.values() if not issubclass(c, TokenLoss)]
    with tqdm(total=instances, disable=not progress, desc="signs") as bar:
        draw = done = 0
        while done < instances:
            rng, n = np.random.default_rng((seed, draw)), len(classes)
            place = PLACES[(draw + draw // n) % len(PLACES)]  # every loss in every place
            problem = _draw(rng, place, min(batch, instances - done), classes[draw % n])
            with np.errstate(all="ignore"):
                tally.add(problem, predict(problem), _measured(problem), f"{place} {(seed, draw)}")
            done, draw = done + len(problem), draw + 1
            bar.update(len(problem))
    return tally.record(instances, seed)


def _draw(rng: np.random.Generator, place: str, B: int, loss: type[Loss]) -> Problem:
    """A structure of this kind with a loss of this class, now and then changed by a combinator."""
    drawn = SETTINGS[place](rng, B)
    parts = drawn.W, drawn.H, drawn.samples, drawn.contexts, drawn.references, random_pair_loss(rng, [loss])
    return Problem(*parts, drawn.lr_unembedding, drawn.lr_hidden)


class Measured(NamedTuple):
    """changes, margins (5, B) in the order of SIGNS; moving (B,)."""

    changes: np.ndarray
    margins: np.ndarray
    moving: np.ndarray


class _Tally:
    """Counts of what agreed."""

    def __init__(self) -> None:
        self.compared, self.inside, self.wrong = (np.zeros(len(SIGNS), dtype=int) for _ in range(3))
        self.resting = self.undefined = 0
        self.losses: dict[str, int] = {}
        self.first: list[str] = []

    def add(self, problem: Problem, predicted: tuple[Any, ...], measured: Measured, where: str) -> None:
        """Take up one draw."""
        said = np.stack(predicted)
        defined = np.isfinite(measured.changes).all(0) & np.isfinite(measured.margins).all(0)
        used = defined & measured.moving
        outside = (abs(measured.changes) > measured.margins) & used
        wrong = outside & ~(np.sign(measured.changes) == said)  # NaN said is wrong
        self.compared += outside.sum(1)
        self.inside += (used & ~outside).sum(1)
        self.wrong += wrong.sum(1)
        self.resting += int((defined & ~measured.moving).sum())
        self.undefined += int((~defined).sum())
        base = getattr(problem.loss, "base", problem.loss)
        for name in {problem.loss.name, base.name}:
            self.losses[name] = self.losses.get(name, 0) + int(outside.sum())
        for s, i in np.argwhere(wrong)[: max(0, 5 - len(self.first))]:
            change, margin = measured.changes[s, i], measured.margins[s, i]
            self.first.append(
                f"{SIGNS[s]} in {where}, model {i}, {problem.loss!r}: change {change:+.2e}, margin {margin:.1e},"
                f" conditions say {said[s, i]:+.0f}"
            )

    def record(self, instances: int, seed: int) -> Agreement:
        """The counts as a record."""
        all_counts = self.compared, self.inside, self.wrong
        compared, inside, wrong = ({s: int(n) for s, n in zip(SIGNS, x, strict=True)} for x in all_counts)
        losses = dict(sorted(self.losses.items()))
        rest = self.resting, self.undefined, losses, tuple(self.first)
        return Agreement(instances, seed, compared, inside, wrong, *rest)


class _Ways:
    """ln pi(y+) and ln pi(y-) of the first sample along a motion of the parameters."""

    def __init__(self, problem: Problem) -> None:
        self.objective, self.pair = Objective.of_problem(problem), problem.pairs[0]
        self.rates = problem.lr_unembedding, problem.lr_hidden
        W, H = leaves(problem)
        self.start = W.detach(), H.detach()

    def velocity(self, W: Tensor, H: Tensor) -> tuple[Tensor, Tensor]:
        """Of gradient flow."""
        W, H = W.detach().requires_grad_(), H.detach().requires_grad_()
        grads = torch.autograd.grad(self.objective(W, H).sum(), (W, H), allow_unused=True)
        dW, dH = (torch.zeros_like(x) if g is None else g for x, g in zip((W, H), grads, strict=True))
        return -self.rates[0] * dW, -self.rates[1] * dH

    def nearby(self, noise: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Velocities at the start with the references of every sample off by rounding, either way."""
        out = []
        for ways in itertools.product((1.0, -1.0), repeat=len(self.objective.groups)):
            by = noise[:, None] * torch.tensor(ways, dtype=noise.dtype)
            a_ref, b_ref = self.objective.a_ref + by, self.objective.b_ref - by
            moved = copy.copy(self)
            moved.objective = replace(self.objective, a_ref=a_ref, b_ref=b_ref)
            out.append(moved.velocity(*self.start))
        return out

    def flow(self, velocity: tuple[Tensor, Tensor], T: Tensor) -> tuple[Tensor, Tensor]:
        """Where two Runge-Kutta steps of order 4 end, T (B, 1, 1) in all."""
        x, e = self.start, T / 2
        for step in range(2):
            k1 = velocity if step == 0 else self.velocity(*x)
            k2 = self.velocity(*_moved(x, k1, e / 2))
            k3 = self.velocity(*_moved(x, k2, e / 2))
            k4 = self.velocity(*_moved(x, k3, e))
            x = _moved(x, [(a + 2 * b + 2 * c + d) / 6 for a, b, c, d in zip(k1, k2, k3, k4, strict=True)], e)
        return x

    def signs(self, v: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The direction of sign descent where gradient flow goes by v."""
        return self.rates[0] * torch.sign(v[0]), self.rates[1] * torch.sign(v[1])

    def values(self, W: Tensor, H: Tensor) -> Tensor:
        """(3, B) ln pi(y+), ln pi(y-) and the margin."""
        log_pi = torch.log_softmax(H @ W.transpose(1, 2), dim=-1)
        a, b = (log_pi[:, list(y.rows), list(y.tokens)].sum(-1) for y in self.pair)
        return torch.stack([a, b, a - b])

    def gradients(self) -> list[tuple[Tensor, ...]]:
        """Of each value, in W and H."""
        W, H = (x.clone().requires_grad_() for x in self.start)
        return [torch.autograd.grad(value.sum(), (W, H), retain_graph=True) for value in self.values(W, H)]

    def rounding(self) -> Tensor:
        """(B,) what rounding may do to one of the values."""
        W, H = self.start
        size = (abs(H) @ abs(W).transpose(1, 2)).amax(-1)  # (B, n)
        rows = [row for y in self.pair for row in y.rows]
        return ROUNDING * (1 + 2 * size[:, rows]).sum(-1)

    def tangent(self, direction: tuple[Tensor, Tensor], T: Tensor) -> tuple[Tensor, Tensor]:
        """(3, B) changes along a straight motion, and how far it is from being linear."""
        start = self.values(*self.start)
        whole, half = (self.values(*_moved(self.start, direction, s)) - start for s in (T, T / 2))
        return whole, 2 * abs(whole - 2 * half)


def _moved(x: Sequence[Tensor], v: Sequence[Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    return x[0] + t * v[0], x[1] + t * v[1]


def _size(x: Tensor) -> Tensor:
    return abs(x).amax((1, 2))


def _time(start: tuple[Tensor, Tensor], v: tuple[Tensor, Tensor]) -> Tensor:
    """(B, 1, 1) the time in which no logit and no parameter moves by more than MOVED; 0 where nothing does."""
    logits = v[1] @ start[0].transpose(1, 2) + start[1] @ v[0].transpose(1, 2)
    speed = torch.stack([_size(logits), _size(v[0]), _size(v[1])]).amax(0)
    return torch.where(speed > 0, MOVED / speed, 0.0)[:, None, None]


def _measured(problem: Problem) -> Measured:
    """Changes over a short flow and over one small step of sign descent."""
    ways = _Ways(problem)
    with few_threads(problem.W.size + problem.H.size):
        v, noise, blur = ways.velocity(*ways.start), ways.rounding(), _blur(problem)
        others, reach = ways.nearby(noise), ways.gradients()
        T = _time(ways.start, v)
        change = ways.values(*ways.flow(v, T)) - ways.values(*ways.start)
        tangent, bent = ways.tangent(v, T)
        margin = SAFETY * (abs(change - tangent) + bent) + noise + _spread(ways, tangent, others, T)
        margin = margin + _along(reach, blur, T)

        signs = ways.signs(v)
        S = _time(ways.start, signs)
        step, bent = ways.tangent(signs, S)
        step_margin = SAFETY * bent + noise + _spread(ways, step, [ways.signs(x) for x in others], S)
        # Coordinates that are zero but for rounding have no sign.
        unclear = tuple(2 * r * (abs(x) <= b) for r, x, b in zip(ways.rates, v, blur, strict=True))
        step_margin = step_margin + _along(reach, unclear, S)
    moving = torch.stack([(abs(x) > b).any(2).any(1) for x, b in zip(v, blur, strict=True)]).any(0)
    changes = torch.cat([change, step[:2]]).numpy()
    return Measured(changes, torch.cat([margin, step_margin[:2]]).numpy(), moving.numpy())


def _blur(problem: Problem) -> tuple[Tensor, Tensor]:
    """What rounding may do to the velocity: the sums of the absolute terms that cancel in it, times ROUNDING."""
    pulls = np.zeros(problem.pi.shape)
    for i, pair in enumerate(problem.pairs):
        for y, sizes in zip(pair, problem.incentive_sizes, strict=True):
            for row, token in zip(y.rows, y.tokens, strict=True):
                pulls[:, row] += sizes[:, i, None] * problem.pi[:, row]
                pulls[:, row, token] += sizes[:, i]
    pulls *= ROUNDING / len(problem.pairs)
    in_W, in_H = pulls.transpose(0, 2, 1) @ abs(problem.H), pulls @ abs(problem.W)
    return torch.tensor(problem.lr_unembedding * in_W), torch.tensor(problem.lr_hidden * in_H)


def _along(reach: list[tuple[Tensor, ...]], size: tuple[Tensor, ...], T: Tensor) -> Tensor:
    """(3, B) the most that motions of the given sizes change the values in time T."""
    return torch.stack(
        [T[:, 0, 0] * sum((abs(g) * b).sum((1, 2)) for g, b in zip(gs, size, strict=True)) for gs in reach]
    )


def _spread(ways: _Ways, change: Tensor, others: list[tuple[Tensor, Tensor]], T: Tensor) -> Tensor:
    """(3, B) how far the changes along other directions are from this one."""
    return torch.stack([abs(ways.tangent(x, T)[0] - change) for x in others]).amax(0)

"""One network, its own first step: how a step on a pair changes what the network says, without taking it.

The values asked about are functions of the weights, f (R,): ln pi of all tokens after a prompt, or of R responses. With
u = f_+ - f_- and s = grad u (a step of gradient descent on any margin loss, per unit of slope) or sgn(grad u) (sign
descent, and the first step of RMSprop and Adam), df = J s takes one pass back and one in forward mode for the body and
for the head, whatever the size of either. No formula of `theory` takes part, so tied weights, a bias, a scale or a soft
cap of the logits are in it. Nothing is stacked: any causal language model that torch can differentiate will do.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, jvp

from sims.language.kernel import signs
from sims.language.model import LanguageModel
from sims.language.preferences import TRAINED
from sims.language.responses import Ids, padded
from theory._check import unknown

Array = NDArray[np.float64]
Tensors = dict[str, Tensor]
OPTIMIZERS = ("sgd", "sign")
DIFFERENCE = 1e-3  # of the weights' length


class Weights(NamedTuple):
    """Of the body and of the head (unembedding and its bias), by the names that each has for its own."""

    body: Tensors
    head: Tensors


Ask = Callable[[Weights], Tensor]


class Network:
    """A language model as a function of its weights, which it leaves alone.

    trained : "both", "head" or "body": what a step moves. Tied weights move as one, with both gradients.

    Raises ValueError for tied weights of which only one side is to be trained.
    """

    def __init__(self, model: LanguageModel, trained: str = "both") -> None:
        if trained not in TRAINED:
            raise ValueError(unknown("trained", trained, tuple(TRAINED)))
        self.model, self.trained = model, trained
        self._base, self._head = model.network.base_model, model.network.get_output_embeddings()
        own = dict(self._base.named_parameters())
        self.tied = next((name for name, p in own.items() if p is self._head.weight), None)
        if self.tied and trained != "both":
            raise ValueError(f"trained must be 'both': embedding and unembedding are one matrix here, got {trained!r}")
        head = {name: p.detach() for name, p in self._head.named_parameters()}
        self.weights = Weights({name: p.detach() for name, p in own.items()}, head)
        self.device = self._head.weight.device

    def states(self, body: Tensors, rows: Tensor) -> Tensor:
        """(N, T, d) states after the final norm, of tokens (N, T)."""
        return functional_call(self._base, body, (rows,), {"use_cache": False}).last_hidden_state

    def logits(self, head: Tensors, h: Tensor) -> Tensor:
        """(..., V) logits of states (..., d)."""
        return self.model.shape_logits(functional_call(self._head, head, (h,)))

    def next_token(self, prompt: Ids) -> Ask:
        """ln pi (V,) of all tokens after a prompt."""
        rows = padded([prompt]).to(self.device)
        return lambda w: torch.log_softmax(self.logits(w.head, self.states(w.body, rows)[0, -1]).double(), -1)

    def responses(self, prompt: Ids, responses: Sequence[Ids]) -> Ask:
        """ln pi (R,) of responses to a prompt."""
        rows = padded([(*prompt, *y[:-1]) for y in responses]).to(self.device)
        tokens = padded(responses).to(self.device)
        mask = torch.tensor([[i < len(y) for i in range(tokens.shape[1])] for y in responses], device=self.device)
        first = len(prompt) - 1

        def ask(w: Weights) -> Tensor:
            h = self.states(w.body, rows)[:, first : first + tokens.shape[1]]
            each = torch.log_softmax(self.logits(w.head, h).double(), -1).gather(-1, tokens[..., None])[..., 0]
            return (each * mask).sum(-1)

        return ask

    def gradient(self, at: Weights, u: Ask) -> Weights:
        """grad u over what is trained; no entry for what is not."""
        parts = TRAINED[self.trained]
        leaves = Weights(*({name: p.detach().requires_grad_() for name, p in part.items()} for part in at))
        wanted = [(k, name) for k in (0, 1) if parts[1 - k] for name in leaves[k]]
        found = torch.autograd.grad(u(leaves), [leaves[k][name] for k, name in wanted], allow_unused=True)
        out = Weights({}, {})
        for (k, name), g in zip(wanted, found, strict=True):
            out[k][name] = torch.zeros_like(leaves[k][name]) if g is None else g
        if self.tied:
            out.body[self.tied] = out.head["weight"] = out.body[self.tied] + out.head["weight"]
        return out

    def pull(self, at: Weights, ask: Ask, v: Tensor) -> Weights:
        """Gradient of <f, v> over the body alone; of tied weights, over the embedding's use of them."""
        leaves = {name: p.detach().requires_grad_() for name, p in at.body.items()}
        found = torch.autograd.grad(ask(Weights(leaves, at.head)) @ v, list(leaves.values()), allow_unused=True)
        return Weights(
            {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(leaves.items(), found, strict=True)}, {}
        )

    @torch.no_grad()
    def change(self, at: Weights, ask: Ask, step: Weights) -> tuple[Tensor, Tensor]:
        """Values, and their derivative along a step: in forward mode, or by central differences where an operation of
        the network has no such mode.
        """
        if not _size(step):
            values = ask(at)
            return values, torch.zeros_like(values)
        point = Weights(*({name: part[name] for name in s} for part, s in zip(at, step, strict=True)))

        def moving(body: Tensors, head: Tensors) -> Tensor:
            return ask(Weights({**at.body, **body}, {**at.head, **head}))

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's forward mode uses what torch deprecates
                return jvp(moving, tuple(point), tuple(step))  # type: ignore[return-value]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            t = DIFFERENCE * _size(point) / _size(step)
            above, below = (ask(moved(at, step, sign * t)) for sign in (1, -1))
            return ask(at), (above - below) / (2 * t)


def _size(weights: Weights) -> float:
    return float(sum(p.double().square().sum() for part in weights for p in part.values())) ** 0.5


@dataclass(frozen=True, eq=False)
class FirstStep:
    """What a network says and how a step on the pair begins to change it.

    values (R,) ln pi. body, head (R,): derivatives along the step of either part alone; they add up.
    step : the direction in the weights.
    """

    values: Array
    body: Array
    head: Array
    plus: int
    minus: int
    step: Weights

    @property
    def speeds(self) -> tuple[float, float]:
        """Growth of the margin through the body and through the head."""
        return tuple(float(part[self.plus] - part[self.minus]) for part in (self.body, self.head))  # type: ignore[return-value]

    @property
    def margin(self) -> float:
        """u, nats."""
        return float(self.values[self.plus] - self.values[self.minus])

    @property
    def rates(self) -> Array:
        """(R,) change of ln pi per nat of margin gained."""
        return (self.body + self.head) / sum(self.speeds)

    def of(self, z: int) -> dict[str, float]:
        """ln pi of value z, its rate and what body and head contribute, in nats per nat of margin gained."""
        body, head = (float(part[z]) / sum(self.speeds) for part in (self.body, self.head))
        return {"log_prob": float(self.values[z]), "rate": body + head, "body": body, "head": head}


def first_step(
    network: Network, ask: Ask, plus: int, minus: int, optimizer: str, at: Weights | None = None, split: bool = True
) -> FirstStep:
    """Measure it, at the network's own weights or elsewhere. Without `split` all of it is counted as the body's."""
    at = network.weights if at is None else at

    def margin(w: Weights) -> Tensor:
        f = ask(w)
        return f[plus] - f[minus]

    step = direction(network.gradient(at, margin), optimizer)
    values, body = network.change(at, ask, Weights(step.body, {}) if split else step)
    head = network.change(at, ask, Weights({}, step.head))[1] if split else torch.zeros_like(body)
    return FirstStep(values.cpu().numpy(), body.cpu().numpy(), head.cpu().numpy(), plus, minus, step)


def direction(gradient: Weights, optimizer: str) -> Weights:
    """The step that an optimiser takes along a gradient, up to its rate."""
    if optimizer == "sgd":
        return gradient
    return Weights(*({name: signs(g[None])[0] for name, g in part.items()} for part in gradient))


def moved(at: Weights, step: Weights, t: float) -> Weights:
    """The weights t steps further."""
    own: dict[int, Tensor] = {}

    def part(values: Mapping[str, Tensor], steps: Mapping[str, Tensor]) -> Tensors:
        return {n: own.setdefault(id(p), p + t * steps[n]) if n in steps else p for n, p in values.items()}

    return Weights(part(at.body, step.body), part(at.head, step.head))

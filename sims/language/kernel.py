"""How the body of a network moves its hidden vector: products with the feature kernel, for many runs at once.

h(theta) is the state after the prompt, J = dh/dtheta over the body's parameters (all but the unembedding). A gradient
step on a loss of the margin moves theta by eta G J^T a, hence h by eta G Kf a, Kf = J J^T (exact_solution E8): one pass
back for J^T a, one forward-mode pass for J of it, whatever the size of the body. An optimiser that scales every entry
by its own factor, theta' = eta G P J^T a, has the kernel J P J^T. Sign descent moves theta by eta sgn(J^T a): that is
J P J^T a with P = 1/|J^T a| at this a only, and no linear map of a. RMSprop and Adam begin with it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, jvp, vjp, vmap

from sims.language.model import LanguageModel
from sims.language.preferences import Runs
from sims.language.responses import Ids

Array = NDArray[np.float64]
Body = dict[str, Tensor]
NOISE = 1e-6  # an entry of a gradient below this part of its tensor's largest is rounding, and its sign is nobody's


class Features:
    """h (B, d) of B runs after their prompts as a function of their bodies, at their present parameters."""

    def __init__(self, runs: Runs, prompts: Sequence[Ids]) -> None:
        if len(prompts) != runs.count:
            raise ValueError(f"prompts must be one for each of {runs.count} runs, got {len(prompts)}")
        self.runs = runs
        values = {name: p.detach() for name, p in runs.parameters.items()}
        self.body: Body = {name: p for name, p in values.items() if name not in runs.head}
        twin = runs.clone()
        ask = [[x] for x in prompts], [[(0,)]] * runs.count

        def hidden(body: Body) -> Tensor:
            twin.parameters = {**values, **body}
            return twin.say(*ask).hidden[:, 0, 0]

        self.hidden: Callable[[Body], Tensor] = hidden
        found: Any = vjp(hidden, self.body)
        self.h, self._pull = found

    def pull(self, v: Tensor) -> Body:
        """J^T v of every run, v (B, d)."""
        return self._pull(v.to(self.h))[0]

    def push(self, step: Mapping[str, Tensor]) -> Tensor:
        """(B, d) J times a step of the bodies."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's forward mode uses what torch deprecates
            return jvp(self.hidden, (self.body,), (dict(step),))[1]

    def product(self, v: Tensor, scale: Mapping[str, Tensor] | None = None) -> Tensor:
        """(B, d) J P J^T v, v (B, d); `scale` holds the positive entries of P, default all 1."""
        g = self.pull(v)
        return self.push(g if scale is None else {name: scale[name] * x for name, x in g.items()})

    def sign_step(self, a: Tensor) -> Tensor:
        """(B, d) J sgn(J^T a): where a unit step of sign descent on a decreasing loss of <a, h> moves h."""
        return self.push({name: signs(x) for name, x in self.pull(a).items()})

    def kernel(self) -> Array:
        """(B, d, d) Kf = J J^T, by d passes back; for tests and small networks."""
        B, d = self.h.shape
        basis = torch.eye(d).to(self.h)[:, None].expand(d, B, d)
        rows = vmap(self._pull, chunk_size=16)(basis)[0]
        J = torch.cat([x.double().flatten(2) for x in rows.values()], dim=-1)  # (d, B, parameters)
        return torch.einsum("ibp,jbp->bij", J, J).numpy()


def signs(g: Tensor) -> Tensor:
    """sgn of a stacked gradient (B, ...), 0 for entries that are rounding."""
    largest = g.abs().flatten(1).amax(1).view(-1, *[1] * (g.dim() - 1))
    return torch.where(g.abs() > NOISE * largest, torch.sign(g), 0.0)


def moves(runs: Runs, prompts: Sequence[Ids], a: Tensor, *, trained: bool = True) -> tuple[Array, Array]:
    """(B, d) h and (B, 3, d) Kf a, Kf h, J sgn(J^T a) of every run; the latter zero if the body is not trained."""
    features = Features(runs, prompts)
    h = features.h
    if not trained:
        return h.double().numpy(), np.zeros((len(h), 3, h.shape[1]))
    back = features.pull(a)
    steps = (back, features.pull(h), {name: signs(x) for name, x in back.items()})
    found = torch.stack([features.push(step) for step in steps], dim=1)
    return h.double().numpy(), found.double().numpy()


def final_gain(model: LanguageModel) -> Array | None:
    """(d,) weights of the final norm, h = g * x / rms(x); None for a network that does not end in such a norm."""
    norm: Any = getattr(model.network.base_model, "norm", None)
    if type(norm).__name__ != "LlamaRMSNorm":  # the same name elsewhere may scale by 1 + weight
        return None
    return norm.weight.detach().double().numpy()


def stream(model: LanguageModel, prompt: Ids) -> tuple[Array, Array]:
    """x (d,) before the final norm, after the prompt, and its kernel Kx = Jx Jx^T (d, d), by d passes back.

    Raises ValueError for a network without a final norm as Llama has it.
    """
    if final_gain(model) is None:
        raise ValueError(f"model must end in the norm of Llama, {model!r} does not")
    base, seen = model.network.base_model, []
    hook = base.norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:

        def before(body: Body) -> Tensor:
            functional_call(base, body, (torch.tensor([list(prompt)]),), {"use_cache": False})
            return seen.pop()[0, -1]

        body = {name: p.detach() for name, p in base.named_parameters() if not name.startswith("norm.")}
        found: Any = vjp(before, body)
        x, pull = found
        rows = vmap(pull, chunk_size=32)(torch.eye(len(x)).to(x))[0]
    finally:
        hook.remove()
    J = torch.cat([r.flatten(1) for r in rows.values()], dim=1)
    return x.detach().double().numpy(), (J @ J.T).double().numpy()

r"""The probe: how ln pi(chosen) and the margin change at first order when a model is trained on one pair.

With g+ and g- the gradients of ln pi(y+) and ln pi(y-) by all trainable parameters, and a loss of the margin
u = ln pi(y+) - ln pi(y-) with slope G = -l'(u), a gradient step of rate eta moves the parameters by eta G (g+ - g-),
and a step of sign descent (Adam and RMSprop begin like it) by eta sgn(g+ - g-). So per unit of eta (and of G)

    gradient_step_chosen  <g+, g+ - g->        gradient_step_margin  |g+ - g-|^2
    sign_step_chosen      <g+, sgn(g+ - g-)>   sign_step_margin      |g+ - g-|_1

Negative: ln pi(chosen) falls. Two passes forward and back; memory for two gradients beside the network.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sims.language.kernel import signs
from sims.language.model import LanguageModel
from sims.language.preferences import PreferencePair
from sims.language.scoring.head import wide

PROBE = ("gradient_step_chosen", "gradient_step_margin", "sign_step_chosen", "sign_step_margin")


class Probe:
    """The probe of pairs, at the parameters as they are when it is called.

    Raises ValueError for a model without trainable parameters.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.parameters = [p for p in model.network.parameters() if p.requires_grad]  # tied ones once
        if not self.parameters:
            raise ValueError("the probe needs a model with trainable parameters, every one of this is frozen")

    def __call__(self, pair: PreferencePair) -> dict[str, float]:
        """The four numbers of a pair, summed in float64."""
        out: dict[str, float] = dict.fromkeys(PROBE, 0.0)
        for g, k in self.gradients(pair):
            ascent = g - k
            sign = signs(ascent[None])[0]  # an entry that is rounding has none
            for name, x, step in zip(PROBE, (g, ascent) * 2, (ascent, ascent, sign, sign), strict=True):
                out[name] += float((x * step).sum(dtype=torch.float64))
        return out

    def gradients(self, pair: PreferencePair) -> Iterator[tuple[Tensor, Tensor]]:
        """g+ and g- by each of the parameters, at least float32."""
        plus, minus = (self._gradient(pair.prompt, y) for y in pair[1:])
        for p, g, k in zip(self.parameters, plus, minus, strict=True):
            nothing = torch.zeros_like(wide(p.detach())) if g is None or k is None else None
            yield (nothing if g is None else wide(g)), (nothing if k is None else wide(k))  # type: ignore[misc]

    @torch.enable_grad()
    def _gradient(self, prompt: Sequence[int], response: Sequence[int]) -> tuple[Tensor | None, ...]:
        """Gradient of ln pi(response | prompt)."""
        network = self.model.network
        device = self.parameters[0].device
        ids = torch.tensor([[*prompt, *response[:-1]]], device=device)
        h = network.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(prompt) - 1 :]
        log_pi = torch.log_softmax(wide(self.model.logits(h)), dim=-1)
        value = log_pi.gather(1, torch.tensor(response, device=device)[:, None]).sum()
        return torch.autograd.grad(value, self.parameters, allow_unused=True)

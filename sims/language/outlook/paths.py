"""The theory's paths of one prompt and a pair of single tokens, with the network's own W, h and features.

At the start the logits of a network are, or begin as, c_z <W_z, h> + o_z: c is 1, a scale, or the slope of a soft cap.
The theory's own model has the rows c_z W_z and, where there is an offset o, one more coordinate of h, which no body
moves: 1 for a bias that is trained, and too short for the head to move for what is not. Two theories of the body:

    unconstrained   h' = kappa a
    kernel          h' = Kf a, a' = 2 eta_W h (exact_solution E8), for gradient descent
    line            h' = J sgn(J^T a), a' = 2 sgn h, straight on, for sign descent

kappa is the one at which body and head grow the margin as they do in the network. The paths stay in the span of h, a,
Kf a, Kf h and the steps of sign descent: all that is asked of W are its products with these, and it is read once.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jvp

from sims.language.forecast import Point, nystrom, straight
from sims.language.outlook.step import Ask, Network, Weights, direction
from sims.language.preferences import TRAINED
from sims.language.responses import Ids, padded
from theory import ExactFlow, UnconstrainedFeatures
from theory.losses import Loss
from theory.model import inner_products

Array = NDArray[np.float64]
SHORT = 1e-4  # of |h|: the coordinate of an offset that is not trained
ROUNDING = 1e-5  # of products in single precision
STEP = 1e-3  # nats: for slopes of a path in the margin


@dataclass(frozen=True, eq=False)
class Local:
    """The network at its start as a model of the theory, in r coordinates.

    point : W (V, r), h (r,) and the pair. kernel (r, r) : Kf on h and a. dh, dw (r,) : steps of sign descent of h and,
    up and down, of the rows of y+ and y-. eta_W : rate of W; 0 where the head is not trained. features (r,) : which
    coordinates the body could move. optimizer : "sgd" or "sign".
    """

    point: Point
    kernel: Array
    dh: Array
    dw: Array
    eta_W: float
    features: Array
    optimizer: str

    @cached_property
    def speeds(self) -> tuple[float, float]:
        """Growth of the margin through the body and through the head, under the optimiser's step."""
        a, h = self.point.a, self.point.h
        if self.optimizer == "sgd":
            return float(a @ self.kernel @ a), float(2 * self.eta_W * (h @ h))
        return float(a @ self.dh), float(2 * self.dw @ h)

    @property
    def kappa(self) -> float:
        """eta_h / eta_W of unconstrained features in which body and head have these speeds; inf for a frozen head."""
        body, head = self.speeds
        if not head:
            return np.inf
        a, h = self.point.a, self.point.h
        return body / head * 2 * float(h @ h) / float(a**2 @ self.features)

    def flow(self, theory: str, loss: Loss) -> ExactFlow:
        """Gradient flow with the kernel, or with unconstrained features."""
        pair = (self.point.plus, self.point.minus)
        model = UnconstrainedFeatures.single_token(self.point.W, self.point.h, *pair)
        if theory == "kernel":
            return ExactFlow(model, loss, self.eta_W, self.kernel)
        eta_W, eta_h = (0.0, 1.0) if np.isinf(self.kappa) else (1.0, self.kappa)
        whole = self.features.all() or not eta_h
        return ExactFlow(model, loss, eta_W, eta_h if whole else np.diag(eta_h * self.features))

    def path(self, theory: str, loss: Loss, margins: Array) -> Array:
        """(T, V) ln pi at margins (T,): "unconstrained", "kernel" or "line"; NaN at margins that it never has."""
        out = np.full((len(margins), len(self.point.W)), np.nan)
        if theory != "line":
            flow = self.flow(theory, loss)
            low, high = (float(flow.path.motion.reach(np.array([side]))[0]) for side in (-1.0, 1.0))
            inside = (low <= margins) & (margins <= high)
            out[inside] = flow.log_probs_at_margin(margins[inside])
            return out
        for row, u in zip(out, margins, strict=True):
            try:
                row[:] = straight(self.point, float(u), self.dh, self.dw).log_pi
            except ValueError:  # the only one left: a margin out of reach
                continue
        return out

    def rates(self, theory: str, loss: Loss, u: float) -> Array:
        """(V,) change of ln pi per nat of margin, where the path has margin u."""
        below, above = self.path(theory, loss, np.array([u - STEP, u + STEP]))
        return (above - below) / (2 * STEP)


def local(network: Network, prompt: Ids, plus: int, minus: int, optimizer: str) -> Local:
    """Measure a network: three passes back and three in forward mode."""
    rows = padded([prompt]).to(network.device)
    hidden = lambda w: network.states(w.body, rows)[0, -1]  # noqa: E731
    with torch.no_grad():
        state = hidden(network.weights)
        c, offset = _logits(network, state)
    head, body = TRAINED[network.trained]
    W = network.weights.head["weight"]
    a = (c[plus] * W[plus].double() - c[minus] * W[minus].double()).to(state)
    products = _products(network, hidden, a, state) if body else torch.zeros(3, len(a))
    h, difference, Ka, Kh, sign = (x.detach().double().cpu().numpy() for x in (state, a, *products))
    basis = np.linalg.qr(np.stack([h, difference, Ka, Kh, sign, np.sign(h)], axis=1))[0]  # (d, r)
    own = c[:, None] * inner_products(W.float().cpu().numpy() if W.dtype != torch.float64 else W.cpu().numpy(), basis)
    x, features = basis.T @ h, np.ones(basis.shape[1])
    kernel = nystrom(*(np.stack(v) @ basis for v in ([difference, h], [Ka, Kh]))) if body else np.zeros((len(x),) * 2)
    dh, dw = basis.T @ sign, basis.T @ np.sign(h)
    if abs(offset).max() > ROUNDING * abs(own @ x).max():
        size = 1.0 if head and "bias" in network.weights.head else SHORT * float(np.linalg.norm(h))
        own, x = np.column_stack([own, offset / size]), np.append(x, size)
        kernel, dh, features = np.pad(kernel, (0, 1)), np.append(dh, 0.0), np.append(features, 0.0)
        dw = np.append(dw, float(size == 1.0))
    slope = (c[plus] + c[minus]) / 2
    return Local(Point(own, x, plus, minus), kernel, dh, head * slope * dw, head * slope**2, features, optimizer)


def _logits(network: Network, h: Tensor) -> tuple[Array, Array]:
    """c (V,) and o (V,) of the logits at a state: their slopes, and what is left of them beside c_z <W_z, h>."""
    head = network.weights.head
    product = (head["weight"] @ h).double()
    inner = product + head["bias"].double() if "bias" in head else product
    value, slope = jvp(network.model.shape_logits, (inner,), (torch.ones_like(inner),))  # type: ignore[misc]
    return slope.cpu().numpy(), (value - slope * product).cpu().numpy()


def _products(network: Network, hidden: Ask, a: Tensor, h: Tensor) -> list[Tensor]:
    """Kf a, Kf h, J sgn(J^T a); of tied weights the embedding's use of them alone."""
    at = network.weights
    back = [network.pull(at, hidden, v) for v in (a, h)]
    back.append(direction(back[0], "sign"))
    return [network.change(at, hidden, Weights(step.body, {}))[1] for step in back]

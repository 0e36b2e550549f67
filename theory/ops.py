r"""The primitives a loss is written in, on four backends.

A loss is one Python function over this small namespace, so the same text gives numpy values, torch autodiff, mpmath
digits and a sympy expression (LaTeX). Each primitive is stable on its whole range.

Conventions: :math:`\sigma(x) = 1/(1+e^{-x})`; ``log_sigmoid`` is :math:`\ln\sigma`; ``softplus`` is
:math:`\ln(1+e^x)`; ``relu`` is :math:`\max(0,x)` with slope 0 at its kink (TRL's and torch's choice);
``step`` is 1 for x > 0 and 0 otherwise, the slope of ``relu``;
``clip`` keeps x within [low, high], with slope 0 from the bound on; ``log1mexp`` is :math:`\ln(1-e^x)` for x < 0;
``detach`` is the identity with gradient zero.
``sort`` and ``mean`` act along the last axis, the samples of a batch; a scalar is a batch of one.
"""

from functools import cache
from types import ModuleType
from typing import Any, Protocol

import mpmath
import numpy as np
import scipy.special
import sympy

_HUGE = 1e300


class Ops(Protocol):
    """What a formula may call."""

    def exp(self, x: Any) -> Any: ...
    def expm1(self, x: Any) -> Any: ...
    def log(self, x: Any) -> Any: ...
    def log1p(self, x: Any) -> Any: ...
    def sigmoid(self, x: Any) -> Any: ...
    def log_sigmoid(self, x: Any) -> Any: ...
    def softplus(self, x: Any) -> Any: ...
    def relu(self, x: Any) -> Any: ...
    def step(self, x: Any) -> Any: ...
    def clip(self, x: Any, low: Any, high: Any) -> Any: ...
    def log1mexp(self, x: Any) -> Any: ...
    def detach(self, x: Any) -> Any: ...
    def sort(self, x: Any) -> Any: ...
    def mean(self, x: Any) -> Any: ...


class NumpyOps:
    """float64 arrays. Overflow gives inf, never a warning: the caller asked for that range."""

    def exp(self, x: Any) -> Any:
        with np.errstate(over="ignore"):
            return np.exp(x)

    def expm1(self, x: Any) -> Any:
        with np.errstate(over="ignore"):
            return np.expm1(x)

    def log(self, x: Any) -> Any:
        with np.errstate(divide="ignore"):
            return np.log(x)

    def log1p(self, x: Any) -> Any:
        with np.errstate(divide="ignore"):
            return np.log1p(x)

    def sigmoid(self, x: Any) -> Any:
        return scipy.special.expit(x)

    def log_sigmoid(self, x: Any) -> Any:
        return scipy.special.log_expit(x)

    def softplus(self, x: Any) -> Any:
        return np.logaddexp(0.0, x)

    def relu(self, x: Any) -> Any:
        return np.maximum(x, 0.0)

    def step(self, x: Any) -> Any:
        return np.where(np.asarray(x) > 0, 1.0, 0.0)

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        return np.clip(x, low, high)

    def log1mexp(self, x: Any) -> Any:
        # Of the two forms, each is used where it keeps the digits (Maechler 2012).
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(np.asarray(x) > -np.log(2), np.log(-np.expm1(x)), np.log1p(-np.exp(x)))

    def detach(self, x: Any) -> Any:
        return x

    def sort(self, x: Any) -> Any:
        return np.sort(x, axis=-1) if np.ndim(x) else x

    def mean(self, x: Any) -> Any:
        return np.mean(x, axis=-1, keepdims=True) if np.ndim(x) else x


class TorchOps:
    """torch tensors, for automatic differentiation. torch is imported on first use."""

    def __init__(self) -> None:
        import torch

        self._torch: ModuleType = torch

    def _tensor(self, x: Any) -> Any:
        return self._torch.as_tensor(x, dtype=self._torch.float64) if not self._torch.is_tensor(x) else x

    def exp(self, x: Any) -> Any:
        return self._torch.exp(self._tensor(x))

    def expm1(self, x: Any) -> Any:
        return _torch_function("expm1").apply(self._tensor(x))

    def log(self, x: Any) -> Any:
        return self._torch.log(self._tensor(x))

    def log1p(self, x: Any) -> Any:
        return self._torch.log1p(self._tensor(x))

    def sigmoid(self, x: Any) -> Any:
        return _torch_function("sigmoid").apply(self._tensor(x))

    def log_sigmoid(self, x: Any) -> Any:
        return self._torch.nn.functional.logsigmoid(self._tensor(x))

    def softplus(self, x: Any) -> Any:
        return -self.log_sigmoid(-self._tensor(x))

    def relu(self, x: Any) -> Any:
        return self._torch.relu(self._tensor(x))

    def step(self, x: Any) -> Any:
        x = self._tensor(x)
        return (x > 0).to(x.dtype)

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        # torch.clamp passes the gradient through at the bounds; where() does not, and keeps inf * 0 out of it.
        x = self._tensor(x)
        inside = (x > low) & (x < high)
        return self._torch.where(inside, x, x.detach().clamp(low, high))

    def log1mexp(self, x: Any) -> Any:
        # where() differentiates both branches: each gets an argument at which it is smooth.
        x = self._tensor(x)
        near = x > -0.6931471805599453
        one = self._torch.log(-self._torch.expm1(self._torch.where(near, x, -1.0)))
        other = self._torch.log1p(-self._torch.exp(self._torch.where(near, -1.0, x)))
        return self._torch.where(near, one, other)

    def detach(self, x: Any) -> Any:
        return self._tensor(x).detach()

    def sort(self, x: Any) -> Any:
        x = self._tensor(x)
        return x.sort(dim=-1).values if x.ndim else x

    def mean(self, x: Any) -> Any:
        x = self._tensor(x)
        return x.mean(dim=-1, keepdim=True) if x.ndim else x


@cache
def _torch_function(name: str) -> Any:
    """expm1 and sigmoid whose slopes keep their digits; torch forms them as expm1(x) + 1 and s(x) (1 - s(x))."""
    import torch

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            ctx.save_for_backward(x)
            return getattr(torch, name)(x)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            (x,), (g,) = ctx.saved_tensors, grads
            slope = torch.exp(x) if name == "expm1" else torch.sigmoid(x) * torch.sigmoid(-x)
            return torch.where(g == 0, torch.zeros_like(g), g * slope)  # 0 times an overflow is 0

    return Function


class MpmathOps:
    """mpmath numbers at the working precision of the caller; scalars only."""

    def exp(self, x: Any) -> Any:
        return mpmath.exp(x)

    def expm1(self, x: Any) -> Any:
        return mpmath.expm1(x)

    def log(self, x: Any) -> Any:
        return mpmath.log(x)

    def log1p(self, x: Any) -> Any:
        return mpmath.log1p(x)

    # Beyond any exponent of interest the limit, at once: mpmath would raise e to an integer power of thousands of bits.

    def sigmoid(self, x: Any) -> Any:
        return 1 / (1 + mpmath.exp(-x)) if abs(x) < _HUGE else mpmath.mpf(1 if x > 0 else 0)

    def log_sigmoid(self, x: Any) -> Any:
        return -mpmath.log1p(mpmath.exp(-x)) if abs(x) < _HUGE else min(x, mpmath.mpf(0))

    def softplus(self, x: Any) -> Any:
        return mpmath.log1p(mpmath.exp(x)) if abs(x) < _HUGE else max(x, mpmath.mpf(0))

    def relu(self, x: Any) -> Any:
        return x if x > 0 else mpmath.mpf(0)

    def step(self, x: Any) -> Any:
        return mpmath.mpf(1 if x > 0 else 0)

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        return min(max(x, mpmath.mpf(low)), mpmath.mpf(high))

    def log1mexp(self, x: Any) -> Any:
        return mpmath.log(-mpmath.expm1(x))

    def detach(self, x: Any) -> Any:
        return x

    def sort(self, x: Any) -> Any:
        return x

    def mean(self, x: Any) -> Any:
        return x


class Dual:
    """An mpmath number with its derivative. Slopes come out to full relative accuracy, however small they are."""

    __slots__ = ("dx", "x")

    def __init__(self, x: Any, dx: Any = 0) -> None:
        self.x, self.dx = mpmath.mpf(x), mpmath.mpf(dx)

    @staticmethod
    def of(x: Any) -> "Dual":
        return x if isinstance(x, Dual) else Dual(x)

    def chain(self, value: Any, slope: Any) -> "Dual":
        """f(self) for a function with the given value and slope here."""
        return Dual(value, slope * self.dx if self.dx else 0)

    def __neg__(self) -> "Dual":
        return Dual(-self.x, -self.dx)

    def __add__(self, other: Any) -> "Dual":
        other = Dual.of(other)
        return Dual(self.x + other.x, self.dx + other.dx)

    def __sub__(self, other: Any) -> "Dual":
        return self + -Dual.of(other)

    def __rsub__(self, other: Any) -> "Dual":
        return -self + other

    def __mul__(self, other: Any) -> "Dual":
        other = Dual.of(other)
        return Dual(self.x * other.x, self.dx * other.x + self.x * other.dx)

    def __truediv__(self, other: Any) -> "Dual":
        other = Dual.of(other)
        return self * other.chain(1 / other.x, -1 / other.x**2)

    def __rtruediv__(self, other: Any) -> "Dual":
        return Dual.of(other) / self

    def __pow__(self, power: Any) -> "Dual":
        if self.x == 0 and power > 1:
            return Dual(0)
        return self.chain(self.x**power, power * self.x ** (power - 1))

    __radd__, __rmul__ = __add__, __mul__


class DualOps:
    """mpmath numbers with derivatives (forward mode), for slopes far below float64; scalars only."""

    def exp(self, x: Any) -> Any:
        x = Dual.of(x)
        return x.chain(mpmath.exp(x.x), mpmath.exp(x.x))

    def expm1(self, x: Any) -> Any:
        x = Dual.of(x)
        return x.chain(mpmath.expm1(x.x), mpmath.exp(x.x))

    def log(self, x: Any) -> Any:
        x = Dual.of(x)
        return x.chain(mpmath.log(x.x), 1 / x.x)

    def log1p(self, x: Any) -> Any:
        x = Dual.of(x)
        return x.chain(mpmath.log1p(x.x), 1 / (1 + x.x))

    def sigmoid(self, x: Any) -> Any:
        x = Dual.of(x)
        value = MPMATH.sigmoid(x.x)
        return x.chain(value, value * MPMATH.sigmoid(-x.x))

    def log_sigmoid(self, x: Any) -> Any:
        x = Dual.of(x)
        return x.chain(MPMATH.log_sigmoid(x.x), MPMATH.sigmoid(-x.x))

    def softplus(self, x: Any) -> Any:
        x = Dual.of(x)
        return x.chain(MPMATH.softplus(x.x), MPMATH.sigmoid(x.x))

    def relu(self, x: Any) -> Any:
        x = Dual.of(x)
        return x.chain(MPMATH.relu(x.x), MPMATH.step(x.x))

    def step(self, x: Any) -> Any:
        return Dual(MPMATH.step(Dual.of(x).x))

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        x = Dual.of(x)
        return x.chain(MPMATH.clip(x.x, low, high), 1 if low < x.x < high else 0)

    def log1mexp(self, x: Any) -> Any:
        x = Dual.of(x)
        return x.chain(MPMATH.log1mexp(x.x), 1 / -mpmath.expm1(-x.x) if x.x else mpmath.inf)

    def detach(self, x: Any) -> Any:
        return Dual(Dual.of(x).x)

    def sort(self, x: Any) -> Any:
        return Dual.of(x)

    def mean(self, x: Any) -> Any:
        return Dual.of(x)


class sigmoid(sympy.Function):
    r"""The logistic function, kept by name so that formulas print as papers print them."""

    nargs = 1

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        s: Any = sigmoid(self.args[0])
        return s * (1 - s)

    def _eval_rewrite_as_exp(self, x: sympy.Expr, **_: Any) -> sympy.Expr:
        return 1 / (1 + sympy.exp(-x))

    def _latex(self, printer: Any, exp: Any = None) -> str:
        power = f"^{{{exp}}}" if exp is not None else ""
        return rf"\sigma{power}\left({printer._print(self.args[0])}\right)"


class SympyOps:
    """sympy expressions, for LaTeX and for proofs."""

    def exp(self, x: Any) -> Any:
        return sympy.exp(x)

    def expm1(self, x: Any) -> Any:
        return sympy.exp(x) - 1

    def log(self, x: Any) -> Any:
        return sympy.log(x)

    def log1p(self, x: Any) -> Any:
        return sympy.log(1 + x)

    def sigmoid(self, x: Any) -> Any:
        return sigmoid(x)

    def log_sigmoid(self, x: Any) -> Any:
        return sympy.log(sigmoid(x))

    def softplus(self, x: Any) -> Any:
        return sympy.log(1 + sympy.exp(x))

    def relu(self, x: Any) -> Any:
        return sympy.Max(0, x)

    def step(self, x: Any) -> Any:
        return sympy.Heaviside(x, sympy.Integer(0))  # type: ignore[arg-type]

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        return sympy.Function(r"\operatorname{clip}")(x, low, high)

    def log1mexp(self, x: Any) -> Any:
        return sympy.log(1 - sympy.exp(x))

    def detach(self, x: Any) -> Any:
        return sympy.Function(r"\operatorname{sg}")(x)

    def sort(self, x: Any) -> Any:
        return sympy.Function(r"\operatorname{sort}")(x)

    def mean(self, x: Any) -> Any:
        return sympy.Function(r"\operatorname{mean}")(x)


NUMPY = NumpyOps()
MPMATH = MpmathOps()
DUAL = DualOps()
SYMPY = SympyOps()

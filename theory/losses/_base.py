"""What a preference loss is: one formula, its parameters and their domains, and claims that tests hold it to.

A loss, as a numbered contract for authors of new ones:

1. A frozen dataclass derived from `MarginLoss` (a function of ln pi(y+) - ln pi(y-) alone), `Loss` (any other function
   of the two log-probabilities) or `TokenLoss` (one that looks at single tokens, or at more than two responses).
2. Fields are the parameters, declared with `parameter(default, domain)`; the domain is enforced on construction.
3. `formula(ops, y)` returns the loss of one sample as the paper prints it, in the primitives of `theory.ops`; `y` is a
   `Pair` of log-probabilities (of a `TokenLoss`: a `Group`). It is the only place where the loss is written.
4. `name` and `reference` say what it is called and which equation it is; `claims` says what is true of it.
5. `examples()` returns instances for tests, at least one of them generic (no parameter at a special value).
6. Optional, for a `MarginLoss`: `closed_slope(ops, y)` = G = -l'(u) and `closed_log_slope(ops, y)` = ln |G|, checked
   against automatic differentiation; `minimiser`, `kinks` and `law` where they exist. Without closed slopes, automatic
   differentiation (and mpmath where float64 underflows) is used.
7. Optional, for a `Loss`: `minimum(y)`, the log-probabilities at which it is least, if that is a point;
   `margin(sample)` if it is a function of the margin for some samples (equal lengths, say); `coupled = True` if the
   loss of one sample depends on the others of its batch: the last axis of the arrays in `y` is then that batch.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import mpmath
import numpy as np
import sympy
from numpy.typing import ArrayLike, NDArray

from theory._check import REAL, Interval, check_number
from theory.losses._data import Group, Pair
from theory.losses._laws import Law
from theory.model import Sample
from theory.ops import DUAL, MPMATH, NUMPY, SYMPY, Dual, Ops, TorchOps

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Claims:
    """What a loss says of itself; each is tested where it is claimed, and refuted where it is denied.

    For a margin loss they speak of a function of the margin: convex, decreasing (non-increasing everywhere),
    differentiable (continuous slope), reference_free, nonnegative. For any other loss: convex in (ln pi(y+), ln pi(y-))
    together; decreasing means d_w >= 0 and d_l >= 0, that it never pushes y+ down nor y- up.
    """

    convex: bool = True
    decreasing: bool = True
    differentiable: bool = True
    reference_free: bool = False
    nonnegative: bool = True


def parameter(default: float, domain: Interval) -> Any:
    """A dataclass field whose value must lie in `domain`."""
    return dataclasses.field(default=default, metadata={"domain": domain})


@cache
def torch_ops() -> TorchOps:
    return TorchOps()


class Loss:
    """A preference loss of one sample, a function of log-probabilities (see the module's contract)."""

    name: ClassVar[str] = ""
    reference: ClassVar[str] = ""
    claims: Claims = Claims()
    coupled: ClassVar[bool] = False  # whether the samples of a batch (last axis of the arrays in y) see each other
    uses_norms: ClassVar[bool] = False  # whether it looks at Pair.norm_ratio

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            domain = f.metadata.get("domain", REAL)
            value = check_number(getattr(self, f.name), f"{type(self).__name__}.{f.name}", domain)
            object.__setattr__(self, f.name, value)

    def formula(self, ops: Ops, y: Pair) -> Any:
        """The loss of one sample, as the paper prints it."""
        raise NotImplementedError(f"{type(self).__name__} must define formula(ops, y)")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Instances for tests. Default: the default parameters."""
        return (cls(),)

    def value(self, y: Pair) -> Array:
        """Loss of one sample or of arrays of samples, float64 (numpy)."""
        with np.errstate(over="ignore"):  # an infinite loss is inf, without a warning
            return np.asarray(self.formula(NUMPY, Pair(*(np.asarray(x, dtype=np.float64) for x in y))))

    def torch_value(self, y: Pair) -> Any:
        """The same as a torch tensor, for automatic differentiation."""
        return self.formula(torch_ops(), y)

    def mpmath_value(self, y: Pair) -> Any:
        """The same as an mpmath number at the caller's working precision (scalars)."""
        return self.formula(MPMATH, Pair(*(mpmath.mpf(float(x)) for x in y)))

    def incentives(self, y: Pair) -> tuple[Array, Array]:
        """(d_w, d_l) = (-dL/da, +dL/db): how hard the loss pushes y+ up and y- down (automatic differentiation)."""
        import torch

        arrays = np.broadcast_arrays(*(np.asarray(x, dtype=np.float64) for x in y))
        a, b, *rest = (torch.tensor(x) for x in arrays)
        a.requires_grad_()
        b.requires_grad_()
        total = self.torch_value(Pair(a, b, *rest)).sum()
        grad_a, grad_b = torch.autograd.grad(total, (a, b), allow_unused=True)
        zero = torch.zeros_like(a)
        d_w = zero if grad_a is None else -grad_a
        d_l = zero if grad_b is None else grad_b
        return d_w.detach().numpy(), d_l.detach().numpy()

    def margin(self, sample: Sample) -> "MarginForm | None":
        """The one-dimensional form for this sample, or None if the loss is no function of the margin alone."""
        return None

    def minimum(self, y: Pair) -> tuple[Any, Any] | None:
        """(ln pi(y+), ln pi(y-)) at which the loss is least, as if all reals could be had; None if there is no point.

        `y` gives references and lengths.
        """
        return None

    def latex(self) -> str:
        """The formula as LaTeX, with symbols for parameters."""
        symbolic = _with_symbols(self)
        a, b, a_ref, b_ref, u, u_ref, n_w, n_l = sympy.symbols("a b a_ref b_ref u u_ref n_w n_l")
        if isinstance(self, MarginLoss):
            y = Pair.of_margin(u, u_ref)._replace(b=sympy.Integer(0), b_ref=sympy.Integer(0))
        else:
            y = Pair(a, b, a_ref, b_ref, n_w, n_l)
        names = {x: rf"{x.name[0]}_{{\mathrm{{ref}}}}" for x in (a_ref, b_ref, u_ref)}
        return sympy.latex(symbolic.formula(SYMPY, y), symbol_names={**names, n_w: "|y^+|", n_l: "|y^-|"})

    def _repr_latex_(self) -> str:
        return f"$\\ell = {self.latex()}$"


def _with_symbols(loss: Loss) -> Loss:
    """The loss with a symbol for every parameter, those of a loss within it included."""
    symbolic = object.__new__(type(loss))
    for f in dataclasses.fields(loss):  # type: ignore[arg-type]
        object.__setattr__(symbolic, f.name, _symbol(getattr(loss, f.name), f.name))
    return symbolic


def _symbol(value: Any, name: str) -> Any:
    if isinstance(value, Loss):
        return _with_symbols(value)
    if isinstance(value, tuple):
        return tuple(_symbol(v, f"{name}_{i + 1}") for i, v in enumerate(value))
    if isinstance(value, float | int) and not isinstance(value, bool):
        return sympy.Symbol(name.replace("lam", "lambda").replace("eps", "varepsilon"))
    return value  # a switch, not a number


class TokenLoss(Loss):
    """A loss of single tokens, or of more than two responses: `formula(ops, y)` takes a `Group` of arrays or tensors.

    It has a value, gradients by automatic differentiation, and a LaTeX string (`tex`); no other backend.
    """

    tex: ClassVar[str] = ""

    def value(self, y: Group) -> Array:  # type: ignore[override]
        return np.asarray(self.formula(NUMPY, y))  # type: ignore[arg-type]

    def torch_value(self, y: Group) -> Any:  # type: ignore[override]
        return self.formula(torch_ops(), y)  # type: ignore[arg-type]

    def mpmath_value(self, y: Any) -> Any:
        raise TypeError(f"{type(self).__name__} looks at tokens and has no mpmath value")

    def incentives(self, y: Any) -> Any:
        raise TypeError(f"{type(self).__name__} looks at tokens: it has no incentives (d_w, d_l) of whole responses")

    def latex(self) -> str:
        return self.tex


class MarginLoss(Loss):
    """A loss that depends on the sample only through u = ln pi(y+) - ln pi(y-) and the reference margin u_ref."""

    def margin(self, sample: Sample) -> "MarginForm":
        return MarginForm(self, np.float64(sample.reference_margin))

    # A subclass may define closed_slope(ops, y) and closed_log_slope(ops, y); None means "differentiate".
    closed_slope: ClassVar[Callable[..., Any] | None] = None
    closed_log_slope: ClassVar[Callable[..., Any] | None] = None

    def minimiser(self, u_ref: Any) -> Any:
        """The smallest margin at which the loss is least, or None if it has no finite minimiser."""
        return None

    def zeros(self, u_ref: Any) -> tuple[Any, ...]:
        """Margins where the slope vanishes (of a flat set, its lower end): where gradient flow stops."""
        least = self.minimiser(u_ref)
        return () if least is None else (least,)

    def kinks(self, u_ref: Any) -> tuple[Any, ...]:
        """Margins where the slope, or its derivative, jumps."""
        return ()

    def law(self, u_ref: Any) -> Law | None:
        """The slope's form, if it is one for which the clock t(u) is elementary."""
        return None


@dataclass(frozen=True)
class MarginForm:
    """A margin loss seen along one axis: l(u) for a given reference margin. All methods take arrays of u (nats).

    u_ref may itself be an array (a batch of samples); the methods then broadcast u against it.
    """

    loss: MarginLoss
    u_ref: Any

    def _pair(self, u: ArrayLike) -> Pair:
        return Pair.of_margin(np.asarray(u, dtype=np.float64), self.u_ref)

    def take(self, rows: Any) -> "MarginForm":
        """The form of the given rows of a batch, shaped to broadcast against (rows, points)."""
        return MarginForm(self.loss, np.atleast_1d(self.u_ref)[rows][:, None])

    def value(self, u: ArrayLike) -> Array:
        """l(u)."""
        return self.loss.value(self._pair(u))

    def slope(self, u: ArrayLike) -> Array:
        """G(u) = -l'(u), positive where the loss pushes the margin up."""
        y = self._pair(u)
        if self.loss.closed_slope is not None:
            return np.asarray(self.loss.closed_slope(NUMPY, y)) + np.zeros_like(y.u)
        return self.loss.incentives(y)[0]

    def log_slope(self, u: ArrayLike) -> Array:
        """ln |G(u)|, finite wherever G is not exactly zero, however small."""
        y = self._pair(u)
        if self.loss.closed_log_slope is not None:
            return np.asarray(self.loss.closed_log_slope(NUMPY, y)) + np.zeros_like(y.u)
        with np.errstate(divide="ignore"):
            out = np.log(np.abs(self.slope(u)))
        if self.loss.closed_slope is None:
            # Automatic differentiation in float64 leaves float range far out; many digits tell zero from tiny.
            u, u_ref = (np.broadcast_to(x, out.shape) for x in (y.u, self.u_ref))
            lost = ((out < -690.0) | (out == np.inf)) & np.isfinite(u)
            out = np.asarray(out)
            for i in _where(lost):
                slope = slope_mpmath(self.loss, float(u[i]), float(u_ref[i]))
                out[i] = float(mpmath.log(abs(slope))) if slope else -np.inf
        return out

    def sign(self, u: ArrayLike) -> Array:
        """The sign of G(u), also where G underflows and ln |G| does not."""
        out = np.asarray(np.sign(self.slope(u)))
        lost = (out == 0) & np.isfinite(self.log_slope(u))
        u, u_ref = (np.broadcast_to(np.asarray(x, dtype=np.float64), out.shape) for x in (u, self.u_ref))
        for i in _where(lost):
            out[i] = float(mpmath.sign(slope_mpmath(self.loss, float(u[i]), float(u_ref[i]))))
        return out

    @property
    def minimiser(self) -> Any:
        """Smallest margin of least loss, or None."""
        return self.loss.minimiser(self.u_ref)

    @property
    def zeros(self) -> tuple[Any, ...]:
        """Margins where the slope vanishes."""
        return self.loss.zeros(self.u_ref)

    @property
    def kinks(self) -> tuple[Any, ...]:
        """Margins where the slope or its derivative jumps."""
        return self.loss.kinks(self.u_ref)

    @property
    def law(self) -> Law | None:
        """The slope's elementary form, if it has one."""
        return self.loss.law(self.u_ref)


def _where(mask: NDArray[np.bool_]) -> list[tuple[Any, ...]]:
    """Indices of the true entries of an array of any dimension, 0 included."""
    return list(zip(*np.nonzero(mask), strict=True)) if mask.ndim else [()] * int(mask)


def slope_mpmath(loss: MarginLoss, u: float, u_ref: float, max_digits: int = 20_000) -> Any:
    """G(u) = -l'(u) by differentiating the formula in as many digits as it takes; 0 if it is zero at `max_digits`."""
    digits, before = 30, mpmath.mpf(0)
    while digits <= max_digits:
        with mpmath.workdps(digits):
            slope = -loss.formula(DUAL, Pair.of_margin(Dual(u, 1), mpmath.mpf(u_ref))).dx
            # Cancellation inside the formula shows as a change with the digits.
            if slope and abs(slope - before) <= abs(slope) * mpmath.mpf(10) ** -14:
                return slope
        digits, before = 3 * digits, slope
    return mpmath.mpf(0)

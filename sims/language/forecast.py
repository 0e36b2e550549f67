"""What the theory says a network's next-token distribution becomes, from its own W, h and feature kernel.

The network, one prompt and a pair of single tokens are a path of (h, a), a = W_+ - W_-; every other row of W stays. All
theories are compared at equal margin u, so none needs a clock:

    unconstrained   h' = eta_h a, a' = 2 eta_W h, eta_h / eta_W such that body and head have their measured shares of u'
    kernel          h' = Kf a, a' = 2 eta_W h (exact_solution E8)
    line            h' = J s, a' = 2 sgn h with s = sgn(J^T a): the step of sign descent, which is no linear map of a,
                    continued straight on, as sign descent does until a sign flips
    sphere          unconstrained features before the final norm, h = g * x / rms(x), W and g frozen: x / |x| follows
                    the great circle towards g * a; its cosine with that is u / (|x| |g * a| / rms(x)), at most 1
    stream          the same with the kernel of x measured at the start, g and W trained as they are:
                    x' = Kx n'(x)^T a, g' = x a / rms(x), a' = 2 eta_W h, integrated numerically

Measured anew on the way, kernel and line hold for a piece of the path and hand their own (h, a) to the next one: what
is re-measured on the network is its kernel (or its step), never its state.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp
from scipy.special import log_softmax

from theory import ExactFlow, UnconstrainedFeatures
from theory.losses import get

Array = NDArray[np.float64]
THEORIES = ("unconstrained", "kernel", "line", "sphere", "stream")
ROUNDING = 1e-5  # of products computed in single precision
_ANY_MARGIN_LOSS = get("dpo")  # the path is the same for all (E2)


@dataclass(frozen=True, eq=False)
class Course:
    """One run as observed at T moments, and how its body would move h at each.

    W (V, d) unembedding at the start. h (T, d), w (T, 2, d) hidden vector and rows of y+ and y-. log_pi (T, V).
    body (T, 3, d) : Kf a, Kf h, J sgn(J^T a); zero for a frozen body.
    head (T, 2) : speed of the margin through W per unit of `body`'s: 2 |h|^2 for a gradient, 2 |h|_1 for signs; zero
        for a frozen W.
    gain (d,) : weights g of the final norm, if it is of that form. stream : x (d,) before it and Kx (d, d), at the
        start, if measured.
    """

    W: Array
    h: Array
    w: Array
    log_pi: Array
    body: Array
    head: Array
    plus: int
    minus: int
    gain: Array | None = None
    stream: tuple[Array, Array] | None = None

    @property
    def a(self) -> Array:
        """(T, d) W_+ - W_-."""
        return self.w[:, 0] - self.w[:, 1]

    @property
    def margin(self) -> Array:
        """(T,) u = <a, h>, nats."""
        return np.einsum("td,td->t", self.a, self.h)

    def speed(self, signs: bool) -> Array:
        """(T,) growth of the margin through the body, <a, Kf a> or <a, J sgn(J^T a)>."""
        return np.einsum("td,td->t", self.a, self.body[:, 2 if signs else 0])

    def share(self, signs: bool) -> Array:
        """(T,) the body's part of the margin's first-order growth, in [0, 1]."""
        body = self.speed(signs)
        return body / (body + self.head[:, int(signs)])

    def at(self, t: int) -> "Point":
        """The state of the network at moment t."""
        W = self.W.copy()
        W[[self.plus, self.minus]] = self.w[t]
        return Point(W, self.h[t], self.plus, self.minus)

    def reaches(self, gained: ArrayLike) -> NDArray[np.intp]:
        """First moments at which the margin has grown by at least so much; -1 where it never does."""
        grown = self.margin - self.margin[0]
        found = [np.nonzero(grown >= g)[0] for g in np.atleast_1d(gained)]
        return np.array([f[0] if f.size else -1 for f in found])

    def knots(self, pieces: int) -> NDArray[np.intp]:
        """Moments that begin `pieces` pieces of equal growth of the margin (fewer where moments are too far apart)."""
        grown = self.margin - self.margin[0]
        return np.unique(self.reaches(grown.max() * np.arange(pieces) / pieces))


@dataclass(frozen=True, eq=False)
class Point:
    """A model of the theory: W (V, d), h (d,), and its pair."""

    W: Array
    h: Array
    plus: int
    minus: int

    @property
    def log_pi(self) -> Array:
        """(V,) ln pi."""
        return log_softmax(self.W @ self.h)

    @property
    def a(self) -> Array:
        return self.W[self.plus] - self.W[self.minus]


def nystrom(vectors: Array, products: Array) -> Array:
    """(d, d) the smallest positive semidefinite kernel with K v = its product, for vectors v (m, d).

    Two products of Kf with vectors, of a and h, are what two pairs of passes through a network give; the whole of Kf
    takes d. Along a path from (h, a) it differs from Kf only in what happens to Kf^2 a.
    """
    size = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors, products = vectors / size, products / size
    values, basis = np.linalg.eigh(vectors @ products.T)
    keep = values > ROUNDING * values[-1]
    found = (basis[:, keep] / np.sqrt(values[keep])).T @ products  # (rank, d)
    return found.T @ found


def continued(point: Point, u: float, eta_W: float, lr_hidden: float | Array) -> Point:
    """The point with margin u on the path of gradient flow (E2, E8)."""
    model = UnconstrainedFeatures.single_token(point.W, point.h, point.plus, point.minus)
    there = ExactFlow(model, _ANY_MARGIN_LOSS, eta_W, lr_hidden).model_at_margin(u)
    return replace(point, W=np.asarray(there.W), h=np.asarray(there.h))


def straight(point: Point, u: float, dh: Array, dw: Array) -> Point:
    """The nearest point with margin u on the line h + t dh, W_+ + t dw, W_- - t dw.

    Raises ValueError if the line never has this margin.
    """
    a, h = point.a, point.h
    # u(t) = u + t first + t^2 second; the root that is small for small steps, without cancellation
    first, second, gap = a @ dh + 2 * dw @ h, 2 * dw @ dh, u - a @ h
    square = first**2 + 4 * second * gap
    if first == 0 or square < 0:
        raise ValueError(f"u must be a margin the line reaches, got {u:g} from {a @ h:g}")
    t = 2 * gap / (first + np.sign(first) * np.sqrt(square))
    W = point.W.copy()
    W[point.plus] += t * dw
    W[point.minus] -= t * dw
    return replace(point, W=W, h=h + t * dh)


def forecast(
    course: Course,
    theory: str,
    moments: Sequence[int] | NDArray[np.intp],
    *,
    signs: bool = False,
    knots: Sequence[int] | NDArray[np.intp] = (0,),
    held: str = "",
) -> Array:
    """(M, V) ln pi that a theory says the network has at the margins of the given moments; NaN where it says that the
    margin is never reached.

    theory : "unconstrained", "kernel", "line", "sphere" or "stream" (see above).
    signs : whether body and head share the margin's growth as under sign descent, or as under a gradient step.
    knots : moments, 0 first, at which the kernel (or step) is measured; each holds until the next one.
    held : "direction" or "share": which of the two stays what it was at the start, while the other is measured anew.
    """
    if theory not in THEORIES:
        raise ValueError(f"theory must be one of {THEORIES}, got {theory!r}")
    if not len(knots) or knots[0] != 0 or list(knots) != sorted(set(knots)):
        raise ValueError(f"knots must begin with 0 and rise, got {list(knots)}")
    if held not in ("", "direction", "share"):
        raise ValueError(f"held must be '', 'direction' or 'share', got {held!r}")
    moments = [int(t) for t in moments]
    if theory in ("sphere", "stream"):
        return (_sphere if theory == "sphere" else _stream)(course, course.margin[moments])
    out = np.full((len(moments), len(course.W)), np.nan)
    point, begun = course.at(0), 0
    for t in sorted({*moments, *map(int, knots)}):
        try:
            there = _advance(course, theory, begun, point, float(course.margin[t]), signs, held) if t else point
        except ValueError:  # the only one left: a margin out of reach
            if t in knots:
                break
            continue
        if t in knots:
            point, begun = there, t
        out[[i for i, m in enumerate(moments) if m == t]] = there.log_pi
    return out


def _advance(course: Course, theory: str, t: int, point: Point, u: float, signs: bool, held: str) -> Point:
    """From the theory's own point to margin u, with what is measured on the network at moment t."""
    direction, share = (0 if held == name else t for name in ("direction", "share"))
    trained = course.head[0, 0] > 0
    body, a, h = course.body[direction], course.a[direction], course.h[direction]
    # Body : head as measured, in units in which the head's speed is 2 |h|^2.
    units = course.head[share, 0] / course.head[share, int(signs)] if trained else 1.0
    speed = course.speed(signs)[share] * units
    if theory == "unconstrained":
        return continued(point, u, float(trained), speed / float(a @ a))
    if speed == 0:
        return continued(point, u, float(trained), 0.0)
    if theory == "kernel":
        return continued(point, u, float(trained), nystrom(np.stack([a, h]), body[:2]) * speed / float(a @ body[0]))
    step = body[2 if signs else 0]
    dw = (np.sign(h) if signs else h) * trained
    return straight(point, u, step * course.speed(signs)[share] / float(a @ step), dw)


def _sphere(course: Course, margin: Array) -> Array:
    """ln pi on the great circle from h / g towards g * a, and at its end for margins beyond."""
    gain = course.gain
    if gain is None:
        raise ValueError("gain must be known for this theory, got None")
    x, goal = course.h[0] / gain, gain * course.a[0]
    radius, size = np.linalg.norm(x), np.linalg.norm(goal)
    x, goal = x / radius, goal / size
    start = np.arccos(np.clip(x @ goal, -1, 1))
    across = goal - x * np.cos(start)
    across /= np.linalg.norm(across)
    turned = start - np.arccos(np.clip(margin / (radius * size), -1, 1))
    h = gain * radius * (np.cos(turned)[:, None] * x + np.sin(turned)[:, None] * across)
    return log_softmax(h @ course.W.T, axis=1)


def _stream(course: Course, margin: Array) -> Array:
    """ln pi along the flow of (x, g, a), with the margin as its clock."""
    if course.stream is None or course.gain is None:
        raise ValueError("stream and gain must have been measured for this theory, got None")
    x0, kernel = course.stream
    d, trained = len(x0), float(course.head[0, 0] > 0)

    def parts(y: Array) -> tuple[Array, Array, Array]:
        x, g, a = y[:d], y[d : 2 * d], y[2 * d :]
        rms = np.sqrt(np.mean(x**2))
        unit = x / rms
        back = (g * a - unit * (unit @ (g * a)) / d) / rms  # n'(x)^T a
        rates = np.concatenate([kernel @ back, unit * a, 2 * trained * g * unit])
        return rates, g * unit, np.concatenate([back, unit * a, g * unit])

    def by_margin(u: float, y: Array) -> Array:
        rates, _, slope = parts(y)
        return rates / (slope @ rates)

    asked, place = np.unique(margin, return_inverse=True)
    start = np.concatenate([x0, course.gain, course.a[0]])
    begin = float(course.margin[0])
    done = solve_ivp(
        by_margin, (begin, max(asked[-1], begin)), start, t_eval=np.maximum(asked, begin), rtol=1e-6, atol=1e-9
    )
    out = np.full((len(asked), len(course.W)), np.nan)
    for row, y in zip(out, done.y.T, strict=False):  # fewer where the margin cannot grow so far
        W, a, rows = course.W.copy(), y[2 * d :], [course.plus, course.minus]
        W[rows] = W[rows].mean(axis=0) + np.array([[0.5], [-0.5]]) * a
        row[:] = log_softmax(W @ parts(y)[1])
    return out[place]


def rates(course: Course, t: int, theory: str = "kernel", signs: bool = False) -> tuple[Array, Array, float, float]:
    """First-order speeds at moment t: of ln pi (V,) through the body and through the head, of the margin through each.

    theory : "kernel" with what was measured (the kernel, or the step of sign descent), "unconstrained" with a for it.
    """
    point, trained = course.at(t), course.head[t, 0] > 0
    pi = np.exp(point.log_pi)
    dw = trained * (np.sign(point.h) if signs else point.h)
    step = course.body[t, 2 if signs else 0]
    if theory == "unconstrained":
        step = point.a * (point.a @ step) / (point.a @ point.a)
    body, head = point.W @ step, np.zeros(len(pi))
    head[course.plus], head[course.minus] = dw @ point.h, -(dw @ point.h)
    return body - pi @ body, head - pi @ head, float(point.a @ step), 2 * float(dw @ point.h)

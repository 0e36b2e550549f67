"""Losses whose samples see each other: what must hold of a batch."""

from collections.abc import Iterator

import numpy as np

from theory.check._base import Check, differences, is_combinator, tensors
from theory.losses import Loss, Pair


def batch(n: int = 5, seed: int = 3) -> Pair:
    """n samples with everything generic, log-probabilities <= 0, unequal lengths."""
    rng = np.random.default_rng(seed)
    a, b, a_ref, b_ref = -rng.uniform(0.2, 9.0, size=(4, n))
    return Pair(a, b, a_ref, b_ref, rng.integers(2, 9, n) * 1.0, rng.integers(2, 9, n) * 1.0, rng.uniform(0.5, 2, n))


def batches(n: int, k: int = 300) -> Pair:
    """k batches of n samples whose log-probabilities lie anywhere from -0.01 to -100."""
    rng = np.random.default_rng(n)
    a, b, a_ref, b_ref = -np.exp(rng.uniform(np.log(0.01), np.log(100), size=(4, k, n)))
    n_w, n_l = rng.integers(2, 9, size=(2, k, n)) * 1.0
    return Pair(a, b, a_ref, b_ref, n_w, n_l, rng.uniform(0.5, 2, size=(k, n)))


def pushed_back(loss: Loss) -> str:
    """A batch of two or more whose mean falls if some y+ is made less likely, or some y- more."""
    for n in (2, 3, 5):
        y = batches(n)
        d = np.stack(loss.incentives(y))
        floor = 1e-9 * np.abs(d).max(axis=(0, 2))[:, None]
        for d_i, words in zip(d, ("pushes y+ down", "pushes y- up"), strict=True):
            broken = d_i < -floor
            if broken.any():
                i, j = np.unravel_index(broken.argmax(), broken.shape)
                own, others = f"{y.m[i, j]:.3g}", ", ".join(f"{m:.3g}" for m in np.delete(y.m[i], j))
                return f"the loss {words} ({d_i[i, j]:.3g}) of a sample with m = {own} beside others with m = {others}"
    return ""


def negative(loss: Loss) -> str:
    """A batch of two or more whose mean is negative."""
    for n in (2, 3, 5):
        y = batches(n)
        l = np.mean(loss.value(y), axis=-1)
        if np.nanmin(l) < -1e-12:
            margins = ", ".join(f"{m:.3g}" for m in y.m[np.nanargmin(l)])
            return f"the loss is {np.nanmin(l):.3g} < 0 in a batch with m = {margins}"
    return ""


def looks_at_reference(loss: Loss) -> str:
    """A batch of two or more whose incentives change with its references."""
    y = batches(3)
    other = y._replace(a_ref=np.roll(y.a_ref, 1, axis=0), b_ref=np.roll(y.b_ref, 1, axis=0))
    for x, z in zip(loss.incentives(y), loss.incentives(other), strict=True):
        off = ~np.isclose(x, z, rtol=1e-10, atol=1e-12 * np.nanmedian(np.abs(x)), equal_nan=True)
        if off.any():
            margins = ", ".join(f"{m:.3g}" for m in y.m[off.any(axis=-1).argmax()])
            return f"a batch with m = {margins}"
    return ""


def coupled(loss: Loss) -> Iterator[Check]:
    """The mean over a batch does not depend on its order, and its gradient is that of the mean; batches stay apart."""
    y = batch()
    l = np.asarray(loss.value(y))
    n = y.a.size
    alone = np.array([float(np.ravel(loss.value(Pair(*(x[i : i + 1] for x in y))))[0]) for i in range(n)])
    told = "its batch changes a sample's loss"
    seen = not np.allclose(l, alone, rtol=1e-10, atol=1e-12)
    if not seen:
        told = "every batch has the values of its samples alone" + ("" if is_combinator(loss) else ": drop `coupled`")
    yield Check("coupled", seen or is_combinator(loss) or _uncoupled_by_parameters(loss), told)
    order = np.random.default_rng(0).permutation(n)
    other = float(np.mean(loss.value(Pair(*(x[order] for x in y)))))
    off = abs(other - float(np.mean(l)))
    detail = f"another order changes the mean from {np.mean(l):.6g} to {other:.6g}: it must not"
    good = off < 1e-12 * (1 + abs(other))
    yield Check("a batch has no order", good, "" if good else detail)
    z = batch(seed=4)
    both = np.asarray(loss.value(Pair(*(np.stack(x) for x in zip(y, z, strict=True)))))
    apart = both.shape == (2, n) and np.allclose(both, [l, np.asarray(loss.value(z))], rtol=1e-12, atol=1e-13)
    detail = "" if apart else "two batches stacked see each other: sort and average along the last axis alone"
    yield Check("batches stay apart", apart, detail)
    torch_l = loss.torch_value(tensors(y)).numpy()
    worst = float(np.abs(torch_l - l).max())
    yield Check("numpy and torch agree on a batch", worst < 1e-12 * (1 + np.abs(l).max()), f"worst {worst:.1e}")
    yield _gradient(loss, y)


def _uncoupled_by_parameters(loss: Loss) -> bool:
    """Another example of the class does see its batch (at special parameters, such as a weight of 0, none need)."""
    y = batch()
    alone = lambda e: [np.ravel(e.value(Pair(*(x[i : i + 1] for x in y))))[0] for i in range(y.a.size)]  # noqa: E731
    return any(not np.allclose(e.value(y), alone(e), rtol=1e-10, atol=1e-12) for e in loss.examples())


def _gradient(loss: Loss, y: Pair) -> Check:
    """Automatic differentiation of the sum over a batch against differences, stop-gradients held fixed."""
    if loss.uses_norms:
        return Check("gradient of the batch", True, "not compared: it is rescaled by norms")

    def formula(ops: object, x: np.ndarray) -> object:
        return loss.formula(ops, y._replace(a=x[0], b=x[1]))  # type: ignore[arg-type]

    exact = differences(formula, np.stack([y.a, y.b]))
    d_w, d_l = loss.incentives(y)
    off = np.abs(np.stack([-d_w, d_l]) - exact)
    # Differences of values are as exact as the values.
    worst = float((off / (np.abs(exact) + 1e-3 * (1 + np.abs(loss.value(y)).sum()))).max())
    i = np.unravel_index(off.argmax(), off.shape)
    detail = f"worst {worst:.1e}, d/d{'ab'[i[0]]} of sample {i[1]}"
    return Check("gradient of the batch: autodiff, differences", worst < 1e-6, detail)

"""`displacement bench`: the exact solution against its rivals, side by side in one run, as a table of ratios."""

import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import solve_ivp
from scipy.special import log_softmax
from tqdm.auto import tqdm

from theory import ExactFlow, UnconstrainedFeatures, batch_log_probs
from theory.ches import ches_scores
from theory.losses import get
from theory.model import inner_products

Array = NDArray[np.float64]

BETA = 0.1
TIMES = np.linspace(0.0, 10.0, 50)
ACCURACY = 1e-8  # largest allowed error of ln pi, for every solver
TOLERANCES = (1e-6, 1e-7, 1e-8, 3e-9, 1e-9, 1e-10, 1e-11, 1e-12)


@dataclass(frozen=True)
class Row:
    """One measurement: seconds (per model, or of the whole), how many times the exact solution's, largest error."""

    section: str
    what: str
    seconds: float
    ratio: float
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class BenchReport:
    """All rows of one run."""

    rows: tuple[Row, ...]
    setting: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return {"setting": self.setting, "rows": [asdict(r) for r in self.rows]}

    def __str__(self) -> str:
        lines, section = [], ""
        for r in self.rows:
            if r.section != section:
                section = r.section
                lines += ["", section, f"  {'':52} {'time':>10} {'ratio':>9} {'error':>8}"]
            error = f"{r.error:8.0e}" if r.error is not None else f"{'':8}"
            lines.append(f"  {r.what:52} {_duration(r.seconds):>10} {r.ratio:8.3g}x {error}  {r.note}".rstrip())
        return "\n".join(lines).strip("\n")


def _duration(s: float) -> str:
    if math.isnan(s):
        return ""
    return f"{s * 1e6:.3g} us" if s < 1e-3 else f"{s * 1e3:.3g} ms" if s < 1 else f"{s:.3g} s"


def _timed(f: Callable[[], Any], repeats: int = 5) -> tuple[float, Any]:
    """Median seconds of `repeats` calls after one that is not counted, and the last result."""
    result, seconds = f(), []
    for _ in range(repeats):
        start = time.perf_counter()
        result = f()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def bench(quick: bool = False, large: bool = True, progress: bool = True) -> BenchReport:
    """Time everything. `quick`: small sizes for a smoke test; `large=False` leaves out the language-model size."""
    rows = batch_rows(models=200 if quick else 2000, rivals=4 if quick else 30, progress=progress)
    rows += ches_rows(block=10 if quick else 250, d=512 if quick else 4096)
    V, d = (4096, 256) if quick else (128_256, 4096)
    if large:
        rows += large_rows(V, d, progress=progress)
    return BenchReport(tuple(rows), {"quick": quick, "threads": torch.get_num_threads(), "V": V, "d": d})


# ---- CHES


def ches_rows(block: int, d: int, length: int = 64, pairs: int = 10_000) -> list[Row]:
    """Scoring `pairs` pairs of `length` states against summing the states once; one block of pairs, used over again."""
    rng = np.random.default_rng(0)
    mean = rng.standard_normal(d)
    plus, minus = ((rng.standard_normal((block, length, d)) + mean).astype(np.float32) for _ in range(2))
    out = []
    for kind in ("numpy float32", "torch bfloat16"):
        x, y = (plus, minus) if kind.startswith("numpy") else (torch.from_numpy(s).bfloat16() for s in (plus, minus))
        once, _ = _timed(lambda x=x, y=y: (_sum(x), _sum(y)))
        seconds, scores = _timed(lambda x=x, y=y: ches_scores(x, y))
        wide: Any = (s if isinstance(s, np.ndarray) else s.float().numpy() for s in (x, y))
        S, T = (s.sum(1, dtype=np.float64) for s in wide)
        size = np.linalg.norm(S, axis=1) * np.linalg.norm(T - S, axis=1)
        error = float((abs(scores - np.einsum("bd,bd->b", S, T - S)) / size).max())
        section = f"CHES of {pairs} pairs of {length} states, d={d} (a block of {block})"
        scale = pairs / block
        out.append(Row(section, f"{kind}: the states summed once", once * scale, 1.0))
        out.append(Row(section, f"{kind}: scored", seconds * scale, seconds / once, error, "error over |S+||S- - S+|"))
    return out


def _sum(states: Any) -> Any:
    return states.sum(1) if isinstance(states, np.ndarray) else states.sum(1, dtype=torch.float32)


# ---- many small models


@dataclass(frozen=True)
class Batch:
    """B random single-token models, trained by DPO from their references. W (B, V, d), h (B, d), pairs (B, 2)."""

    W: Array
    h: Array
    pairs: NDArray[np.intp]

    @classmethod
    def random(cls, B: int, V: int = 32, d: int = 16) -> "Batch":
        rng = np.random.default_rng(0)
        pairs = np.array([rng.choice(V, 2, replace=False) for _ in range(B)])
        return cls(rng.standard_normal((B, V, d)), rng.standard_normal((B, d)), pairs)

    def exact(self) -> Array:
        """(B, T, V)."""
        loss = get("dpo", beta=BETA)
        return batch_log_probs(self.W, self.h, self.pairs[:, 0], self.pairs[:, 1], loss, TIMES)

    def all_parameters(self, i: int, tol: float) -> Array:
        """(T, V) by solve_ivp on W and h of model i."""
        (p, m), W, h = self.pairs[i], self.W[i], self.h[i]
        V, d = W.shape
        u_ref = float((W[p] - W[m]) @ h)

        def velocity(_: float, y: Array) -> Array:
            a, x = y[p * d : p * d + d] - y[m * d : m * d + d], y[V * d :]
            G = BETA / (1 + math.exp(BETA * (float(a @ x) - u_ref)))
            out = np.zeros_like(y)
            out[p * d : p * d + d], out[m * d : m * d + d], out[V * d :] = G * x, -G * x, G * a
            return out

        y = _solve(velocity, np.concatenate([W.ravel(), h]), tol)
        return log_softmax(np.einsum("tvd,td->tv", y[:, : V * d].reshape(-1, V, d), y[:, V * d :]), axis=1)

    def moving_variables(self, i: int, tol: float) -> Array:
        """(T, V) by solve_ivp on a = W_+ - W_- and h alone (2d numbers)."""
        (p, m), W, h = self.pairs[i], self.W[i], self.h[i]
        d = len(h)
        a0 = W[p] - W[m]
        u_ref = float(a0 @ h)

        def velocity(_: float, y: Array) -> Array:
            a, x = y[:d], y[d:]
            G = BETA / (1 + math.exp(BETA * (float(a @ x) - u_ref)))
            out = np.empty_like(y)
            out[:d], out[d:] = 2 * G * x, G * a
            return out

        y = _solve(velocity, np.concatenate([a0, h]), tol)
        return _log_probs(y[:, d:] @ W.T, (y[:, :d] * y[:, d:]).sum(1), p, m)

    def one_dimensional(self, i: int, tol: float) -> Array:
        """(T, V) by solve_ivp on du/dt = G(u) K(u), in plain scalar arithmetic, and the algebraic path."""
        (p, m), W, h = self.pairs[i], self.W[i], self.h[i]
        a0 = W[p] - W[m]
        u0 = float(a0 @ h)
        P, Q = (float(((math.sqrt(2) * h + s * a0) ** 2).sum()) for s in (1, -1))
        K0 = float(2 * h @ h + a0 @ a0)

        def velocity(_: float, y: Array) -> tuple[float]:
            u = y.item()
            return (BETA / (1 + math.exp(BETA * (u - u0))) * math.sqrt(P * Q + 8 * u * u),)

        u = _solve(velocity, np.array([u0]), tol)[:, 0]
        theta = 2 * (u - u0) / (K0 + np.sqrt(P * Q + 8 * u * u))
        grown = 1 / np.sqrt(1 - 2 * theta**2)
        return _log_probs(np.outer(grown, W @ h) + np.outer(grown * theta, W @ a0), u, p, m)

    def torchdiffeq(self, tol: float, method: str) -> Array:
        """(B, T, V) by torchdiffeq on all parameters of all models stacked."""
        import torchdiffeq  # pyright: ignore[reportMissingImports]

        W, h = torch.tensor(self.W), torch.tensor(self.h)
        row = torch.arange(len(W))
        p, m = torch.tensor(self.pairs[:, 0]), torch.tensor(self.pairs[:, 1])
        u_ref = ((W[row, p] - W[row, m]) * h).sum(1)

        def velocity(_: Any, y: Any) -> Any:
            w, x = y
            a = w[row, p] - w[row, m]
            G = BETA * torch.sigmoid(-BETA * ((a * x).sum(1) - u_ref))[:, None]
            dw = torch.zeros_like(w)
            dw[row, p], dw[row, m] = G * x, -G * x
            return dw, G * a

        w, x = torchdiffeq.odeint(velocity, (W, h), torch.tensor(TIMES), rtol=tol, atol=tol, method=method)
        return torch.log_softmax(torch.einsum("tbvd,tbd->btv", w, x), dim=-1).numpy()


def _solve(velocity: Callable[..., Any], start: Array, tol: float) -> Array:
    """(T, n) states at TIMES by DOP853."""
    return solve_ivp(velocity, (0, TIMES[-1]), start, "DOP853", t_eval=TIMES, rtol=tol, atol=tol).y.T


def _log_probs(logits: Any, u: Array, p: int, m: int) -> Array:
    total = logits[:, p] + logits[:, m]
    logits[:, p], logits[:, m] = (total + u) / 2, (total - u) / 2
    return log_softmax(logits, axis=1)


def batch_rows(models: int, rivals: int, progress: bool) -> list[Row]:
    """The batch against its rivals, each at the loosest tolerance that reaches ACCURACY on its models."""
    batch = Batch.random(models)
    total, exact = _timed(batch.exact)
    ours = total / models
    # The yardstick shares nothing with the exact solution: all parameters, integrated at 3e-13.
    truth = np.stack([batch.all_parameters(i, 3e-13) for i in range(rivals)])
    section = f"{models} models (V=32, d=16), 50 times, DPO: time per model at 1e-8"
    rows = [Row(section, "exact, batched", ours, 1.0, float(np.abs(exact[:rivals] - truth).max()), "error vs DOP853")]
    solvers = {
        "solve_ivp, all parameters": batch.all_parameters,
        "solve_ivp, the 2d moving variables": batch.moving_variables,
        "solve_ivp, the one-dimensional equation": batch.one_dimensional,
    }
    for name, solve in tqdm(solvers.items(), disable=not progress, desc="rivals"):

        def run(tol: float, solve: Callable[[int, float], Array] = solve) -> Array:
            return np.stack([solve(i, tol) for i in range(rivals)])

        tol, error = _loosest(run, truth)
        seconds, _ = _timed(lambda run=run, tol=tol: run(tol), 3)
        note = f"rtol {tol:.0e}, {rivals} models"
        rows.append(Row(section, name, seconds / rivals, seconds / rivals / ours, error, note))
    return rows + _torchdiffeq_rows(batch, exact, ours, section)


def _loosest(run: Callable[[float], Array], truth: Array) -> tuple[float, float]:
    """The loosest tolerance whose error is within ACCURACY, and that error."""
    for tol in TOLERANCES:
        error = float(np.abs(run(tol) - truth).max())
        if error <= ACCURACY:
            return tol, error
    return TOLERANCES[-1], error


def _torchdiffeq_rows(batch: Batch, exact: Array, ours: float, section: str) -> list[Row]:
    try:
        import torchdiffeq  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        note = "not installed: pip install 'likelihood-displacement[bench]'"
        return [Row(section, "torchdiffeq, all parameters, batched", math.nan, math.nan, None, note)]
    rows = []
    few, many = (Batch(batch.W[:n], batch.h[:n], batch.pairs[:n]) for n in (50, 500))
    for method in ("dopri5", "dopri8"):
        tol, _ = _loosest(lambda tol, method=method: few.torchdiffeq(tol, method), exact[:50])
        start = time.perf_counter()
        out = many.torchdiffeq(tol, method)
        each = (time.perf_counter() - start) / len(many.W)
        error = float(np.abs(out - exact[: len(many.W)]).max())
        rows.append(
            Row(
                section,
                f"torchdiffeq {method}, stacked",
                each,
                each / ours,
                error,
                f"rtol {tol:.0e}, {len(many.W)} models",
            )
        )
    return rows


# ---- language-model size


def large_model(V: int, d: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Random float32 W (V, d) with entries of 0.02, and h (d,) that gives logits a spread of about 2.5."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((V, d), dtype=np.float32)
    W *= np.float32(0.02)
    h = rng.standard_normal(d, dtype=np.float32)
    return W, h * np.float32(2.5 / (0.02 * np.linalg.norm(h)))


def large_rows(V: int, d: int, progress: bool) -> list[Row]:
    """Inner products, the exact path at 100 times and 100 steps of training, on one W."""
    W, h = large_model(V, d)
    a = W[3] - W[5]
    both = np.stack([h, a], axis=1)
    section = f"V={V}, d={d}, float32 W ({W.nbytes / 2**30:.2g} GiB)"
    one, _ = _timed(lambda: W @ h, 9)
    two, products = _timed(lambda: inner_products(W, both), 9)
    sample = np.random.default_rng(1).choice(V, min(V, 2000), replace=False)
    lost = float(np.abs(products[sample] - W[sample].astype(np.float64) @ both.astype(np.float64)).max())
    rows = [
        Row(section, "W @ h, once (numpy)", one, 1.0, None, "the unit of this row and the next"),
        Row(section, "both inner products of the path", two, two / one, lost, "error against float64"),
    ]
    make, model = _timed(lambda: UnconstrainedFeatures.single_token(W, h, 3, 5), 1)
    times = np.linspace(0.0, 100.0, 100)

    def exact() -> Array:
        return ExactFlow(model, get("dpo", beta=BETA)).pair_log_probs(times)

    ours, curve = _timed(exact, 5)
    table = ExactFlow(model, get("dpo", beta=BETA)).log_probs(times[::10])
    gap = float(np.abs(table[:, [3, 5]] - curve[::10]).max())
    dense = _dense_step(W, h, progress)
    margin_only, reported = _sparse_step(W, h)
    section = f"100 times or steps of DPO at V={V}, d={d}: ln pi(y+) and ln pi(y-) at each"
    rows += [
        Row(section, "exact: flow, inner products and path", ours, 1.0, gap, "error against the full table"),
        Row(section, "  not counted: reading the model once to validate it", make, make / ours),
        Row(section, "dense autograd gradient descent (torch)", 100 * dense, 100 * dense / ours, None, "5 steps, x20"),
        Row(section, "sparse descent, moving rows, W @ h every step", 100 * reported, 100 * reported / ours),
        Row(section, "sparse descent, moving rows, margin only", 100 * margin_only, 100 * margin_only / ours),
    ]
    peak = _peak_memory(V, d)
    return [*rows, Row("memory", "peak of the exact part in a fresh process, W = 1", math.nan, peak)]


def _dense_step(W: NDArray[np.float32], h: NDArray[np.float32], progress: bool) -> float:
    """Median seconds of a step of SGD by autograd on all of W and h (5 steps)."""
    Wt, ht = torch.nn.Parameter(torch.from_numpy(W.copy())), torch.nn.Parameter(torch.from_numpy(h.copy()))
    optimizer = torch.optim.SGD([Wt, ht], lr=1.0)
    reference, seconds = None, []
    for _ in tqdm(range(6), disable=not progress, desc="dense steps"):
        start = time.perf_counter()
        optimizer.zero_grad()
        log_p = torch.log_softmax(Wt @ ht, 0)
        u = log_p[3] - log_p[5]
        reference = u.detach() if reference is None else reference
        (-torch.nn.functional.logsigmoid(BETA * (u - reference))).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _sparse_step(W: NDArray[np.float32], h: NDArray[np.float32], steps: int = 20) -> tuple[float, float]:
    """Seconds of a step that moves y+, y- and h only: with nothing but the margin, and with ln pi(y+) reported."""
    out = []
    for report in (False, True):
        w, l, x = W[3].copy(), W[5].copy(), h.copy()
        u_ref = float((w - l) @ x)
        start = time.perf_counter()
        for _ in range(steps if report else 100 * steps):
            a = w - l
            G = np.float32(BETA / (1 + math.exp(BETA * (float(a @ x) - u_ref))))
            w, l, x = w + G * x, l - G * x, x + G * a
            if report:
                logits = W @ x
                logits[3], logits[5] = w @ x, l @ x
                top = logits.max()
                _ = logits[3] - top - math.log(np.exp(logits - top).sum())
        out.append((time.perf_counter() - start) / (steps if report else 100 * steps))
    return out[0], out[1]


# VmHWM, not ru_maxrss: a new process inherits the latter from its parent.
_PEAK = """
def status(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * int(lines[key].split()[0])
from sims.bench import large_model, BETA
from theory import ExactFlow, UnconstrainedFeatures
from theory.losses import get
import numpy as np
before = status("VmRSS")
W, h = large_model({V}, {d})
flow = ExactFlow(UnconstrainedFeatures.single_token(W, h, 3, 5), get("dpo", beta=BETA))
flow.pair_log_probs(np.linspace(0.0, 100.0, 100))
print((status("VmHWM") - before) / W.nbytes)
"""


def _peak_memory(V: int, d: int) -> float:
    """Peak resident memory of the exact part, W included, in units of the size of W (Linux; NaN elsewhere)."""
    if not sys.platform.startswith("linux"):
        return math.nan
    run = subprocess.run([sys.executable, "-c", _PEAK.format(V=V, d=d)], capture_output=True, text=True, check=True)
    return float(run.stdout.split()[-1])

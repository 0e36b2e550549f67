"""The ledger: every claim of `theory.theorems` tried on random problems by routes that do not know it.

For each claim: the instances tried on each route and the worst residual against its tolerance; whether every
deliberately wrong copy is caught; whether every hypothesis, dropped, breaks it; whether its symbolic proof reduces to
an exact zero.
"""

import signal
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from sims.routes import Autodiff, Integrated, Simulated
from theory._check import check_count, unknown
from theory.losses import LOSSES, Loss, MarginLoss
from theory.theorems import SETTINGS, THEOREMS, Theorem

ROUTES: dict[str, type] = {"autodiff": Autodiff, "integrated": Integrated, "simulated": Simulated}
# Instances per claim: as many as asked for where differentiation is batched and every response is one token, a tenth
# for sequences; a few dozen per setting integrated in float64 and two in 50 digits, however many are asked for.
TOKEN_SETTINGS = ("single_token", "two_tokens", "fixed_unembeddings", "data_set")
CAP = {"simulated": 48, "integrated": 2}
ROUNDS = 40  # of draws, until the hypotheses have held often enough


NOTATION = r"""Rows $W_z$ of $W$ are unembeddings, $h$ hidden vectors, $\pi=\mathrm{softmax}(Wh)$; $+$ and $-$ stand
for the (first) tokens of $y^+$ and $y^-$, $a=W_+-W_-$, $\bar W=\sum_z\pi_zW_z$. $\ell(u)$ is a loss of the margin
$u=\ln\pi(y^+)-\ln\pi(y^-)$, $G=-\ell'(u)$, $u_0$ its start; $d_w,d_l$ are $-\partial\ell/\partial\ln\pi(y^+)$ and
$\partial\ell/\partial\ln\pi(y^-)$. Learning rates $\eta_W,\eta_h$, $\kappa=\eta_h/\eta_W$,
$\omega=\sqrt{2\eta_W\eta_h}$; where a statement names none, they are 1. Loss-time $d\tau=G\,dt$,
$x=e^{\omega\tau}$. $P,Q=|\sqrt{2\eta_W}h\pm\sqrt{\eta_h}a|^2$ and $K_0=2\eta_W|h|^2+\eta_h|a|^2$ at the start.
$E_{v,k}=e_{v_k}-\pi(\cdot|x,v_{<k})$; $\alpha_{kk'}=\langle E_{v,k},E_{w,k'}\rangle$.
$D_z=\alpha_zx+\beta_z/x-(Px^2-Qx^{-2})/(8\omega)$ is the logit of $z$ minus that of $+$, with
$\alpha_z,\beta_z=\langle W_z-(W_++W_-)/2,\sqrt{2\eta_W}h_0\pm\sqrt{\eta_h}a_0\rangle/(2\sqrt{2\eta_W})$. A residual
is |difference| / sum of |terms|. "Dropped": the claim tried where that hypothesis does not hold."""


@dataclass(frozen=True)
class Tried:
    """A claim on one route: instances, worst residual, and the draw (setting, seed) where it was worst."""

    instances: int = 0
    residual: float = 0.0
    where: str = ""

    def worse(self, other: "Tried") -> "Tried":
        """Both together."""
        top = self if self.residual >= other.residual or np.isnan(self.residual) else other
        return Tried(self.instances + other.instances, top.residual, top.where)


@dataclass(frozen=True)
class Row:
    """One claim in the ledger."""

    name: str
    statement: str
    source: str
    kind: str
    tolerance: float
    routes: dict[str, Tried]
    wrong_copies: int
    missed_copies: tuple[str, ...]
    sharpness: tuple[dict[str, Any], ...]  # hypothesis, broken_in, residual, shown, reason
    proof: dict[str, Any] | None  # covers, zero
    problems: tuple[str, ...] = field(default=())

    @property
    def instances(self) -> int:
        return sum(t.instances for t in self.routes.values())

    @property
    def residual(self) -> float:
        return max((t.residual for t in self.routes.values()), default=np.nan)


@dataclass(frozen=True, repr=False)
class Ledger:
    """The rows, and how they came about."""

    rows: tuple[Row, ...]
    settings: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(row.problems for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "settings": self.settings, "claims": [asdict(row) for row in self.rows]}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        head = f"{'claim':32}{'instances':>10}  {'worst':>8}  {'allowed':>8}  {'wrong':>7}  {'sharp':>5}  proof"
        lines = [head]
        for row in self.rows:
            shown = [s for s in row.sharpness if s["broken_in"]]
            sharp = f"{sum(s['shown'] for s in shown)}/{len(shown)}" if shown else "-"
            caught = f"{row.wrong_copies - len(row.missed_copies)}/{row.wrong_copies}"
            proof = "" if row.proof is None else "exact zero" if row.proof["zero"] else "NOT ZERO"
            if not row.instances and not row.problems:
                lines.append(f"{row.name:32}{'applies to none of these losses':>10}")
                continue
            lines.append(
                f"{row.name:32}{row.instances:>10}  {row.residual:>8.1e}  {row.tolerance:>8.0e}  {caught:>7}  "
                f"{sharp:>5}  {proof}" + "".join(f"\n    FAILED: {p}" for p in row.problems)
            )
        failed = sum(bool(row.problems) for row in self.rows)
        proofs = sum(row.proof is not None for row in self.rows)
        lines.append(
            f"{len(self.rows)} claims, {sum(r.instances for r in self.rows)} instances, "
            f"{sum(r.wrong_copies for r in self.rows)} wrong copies, {proofs} proofs: "
            + ("all hold" if not failed else f"{failed} FAILED")
        )
        return "\n".join(lines)

    def markdown(self) -> str:
        """The ledger as a Markdown document with the statements as LaTeX, to put beside a paper."""
        about = ", ".join(f"{k} {v}" for k, v in self.settings.items())
        parts = [
            f"# Ledger of claims\n\n{about}. {'All claims hold.' if self.ok else '**Something failed.**'}\n",
            f"## Notation\n\n{NOTATION}\n",
        ]
        parts.append("## Settings\n\n" + "\n".join(f"- `{n}`: {_summary(draw)}" for n, draw in SETTINGS.items()) + "\n")
        for row in sorted(self.rows, key=lambda row: not row.source.startswith("Razin")):  # the paper first
            routes = "; ".join(
                f"{name}: {t.instances} instances, worst residual {t.residual:.1e}" for name, t in row.routes.items()
            )
            caught = row.wrong_copies - len(row.missed_copies)
            lines = [
                f"## {row.name}\n",
                f"{row.statement}\n",
                f"- source: {row.source} ({row.kind})",
                f"- {routes} (allowed {row.tolerance:.0e})",
                f"- wrong copies caught: {caught} of {row.wrong_copies}",
            ]
            for s in row.sharpness:
                size = f"residual {s['residual']:.1e}" if s["residual"] < 1e300 else "unbounded"
                found = f"dropped in `{s['broken_in']}`, {size}" if s["broken_in"] else s["reason"]
                label = "no hypothesis" if s["hypothesis"] == "none" else f"hypothesis *{s['hypothesis']}*"
                lines.append(f"- {label}: {found}")
            if row.proof is not None and row.proof["zero"]:
                lines.append(f"- proved symbolically, covering {row.proof['covers']}")
            lines += [f"- **FAILED**: {p}" for p in row.problems]
            parts.append("\n".join(lines) + "\n")
        return "\n".join(parts)


def _summary(draw: Any) -> str:
    return (draw.__doc__ or "").strip().splitlines()[0]


def verify(
    theorems: str | Theorem | Iterable[str | Theorem] | None = None,
    instances: int = 100_000,
    losses: str | Iterable[str | type[Loss]] | None = None,
    seed: int = 0,
    *,
    workers: int = 1,
    progress: bool = False,
) -> Ledger:
    """Try claims on random problems.

    Parameters
    ----------
    theorems : names in `THEOREMS`, or instances of your own (these run in this process); default all.
    instances : per claim about single-token responses on the batched route (autodiff); a tenth of it for claims about
        sequences. Integrated routes take `CAP` instances per setting at most.
    losses : names or classes of margin losses to draw from; default the whole registry.
    workers : processes (a script that asks for more than one needs the usual `if __name__ == "__main__"`).

    Raises ValueError for an unknown name or a count below 1.
    """
    if isinstance(theorems, str | Theorem | type):
        theorems = [theorems]
    chosen = [_theorem(t) for t in (THEOREMS.values() if theorems is None else dict.fromkeys(theorems))]
    if not chosen:
        raise ValueError("theorems must name at least one claim")
    names = [t.name for t in chosen]
    if len(set(names)) < len(names):
        raise ValueError(f"theorems must have different names, got {names}")
    count = check_count(instances, "instances")
    classes = (
        None if losses is None else tuple(_loss_class(x) for x in ([losses] if isinstance(losses, str) else losses))
    )
    if classes == ():
        raise ValueError("losses must name at least one loss; None means all of them")
    seed = check_count(seed, "seed", low=0)
    workers = check_count(workers, "workers")
    if not all(THEOREMS.get(t.name) is t for t in chosen):
        workers = 1  # claims travel to other processes by name
    tally = _Tally(chosen, count)
    audits: dict[str, dict[str, Any]] = {}
    jobs: list[tuple[Any, ...]] = [(_audit, t, seed) for t in chosen]  # with every loss, whatever is drawn
    with _Workers(workers) as run, tqdm(disable=not progress, desc="verify", unit="job") as bar:
        for number in range(ROUNDS):
            jobs += tally.jobs(classes, (seed, number))
            if not jobs:
                break
            bar.total = bar.n + len(jobs)
            for result in run(jobs):
                tally.add(result.get("tried", ()))
                audits |= result.get("audit", {})
                bar.update()
            jobs = []
    drawn = "all" if classes is None else ", ".join(c.name for c in classes)
    settings = {"instances": count, "seed": seed, "losses": drawn}
    return Ledger(tuple(_row(t, tally.tried(t), audits[t.name], classes is not None) for t in chosen), settings)


def _theorem(theorem: str | Theorem | type) -> Theorem:
    if isinstance(theorem, type) and issubclass(theorem, Theorem):
        return theorem()
    if isinstance(theorem, Theorem):
        return theorem
    name = str(theorem)
    if name not in THEOREMS:
        raise ValueError(unknown("theorem", name, THEOREMS))
    return THEOREMS[name]


def _loss_class(loss: Any) -> type[Loss]:
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ValueError(unknown("loss", loss, LOSSES))
        loss = LOSSES[loss]
    if isinstance(loss, Loss):
        loss = type(loss)
    if not (isinstance(loss, type) and issubclass(loss, MarginLoss)):
        raise ValueError(f"losses must hold names or classes of margin losses, got {loss!r}")
    return loss


class _Tally:
    """What has been tried of each claim, by route and setting, and what is still to be drawn."""

    def __init__(self, chosen: Sequence[Theorem], count: int) -> None:
        self.found = {(t, r, s): Tried() for t in chosen for r in t.routes for s in t.settings}
        self.wanted = {(t, r, s): self._quota(t, r, count) for t, r, s in self.found}

    @staticmethod
    def _quota(theorem: Theorem, route: str, count: int) -> int:
        if route in CAP:
            return min(count, CAP[route])
        share = count if theorem.settings[0] in TOKEN_SETTINGS else -(-count // 10)
        return -(-share // len(theorem.settings))

    def jobs(self, losses: Any, seed: tuple[int, ...]) -> list[tuple[Any, ...]]:
        """One job per draw: (function, setting, route, size, draw seed, claims to try on it, losses).

        Claims share draws. A draw is one structure with many parameters: of small numbers there are many draws.
        """
        out = []
        for i, setting in enumerate(SETTINGS):
            for j, route in enumerate(ROUTES):
                left = {
                    t: self.wanted[t, r, s] - self.found[t, r, s].instances
                    for t, r, s in self.found
                    if (r, s) == (route, setting)
                }
                most = max(left.values(), default=0)
                size = {"integrated": 1, "simulated": 12}.get(route, min(5000, max(50, most // 40)))
                for draw in range(-(-most // size)):
                    here = tuple(t for t, n in left.items() if n > draw * size)
                    out.append((_try, setting, route, size, (*seed, i, j, draw), here, losses))
        return out

    def add(self, results: Iterable[tuple[str, str, str, Tried]]) -> None:
        """Take up what a job found."""
        for name, route, setting, tried in results:
            key = next(k for k in self.found if (k[0].name, *k[1:]) == (name, route, setting))
            self.found[key] = self.found[key].worse(tried)

    def tried(self, theorem: Theorem) -> dict[str, Tried]:
        """By route, all settings together."""
        out = dict.fromkeys(theorem.routes, Tried())
        for (t, route, _), found in self.found.items():
            if t is theorem:
                out[route] = out[route].worse(found)
        return out


class _Workers:
    """Runs jobs here, or in fresh processes (torch and forked threads do not mix)."""

    def __init__(self, workers: int) -> None:
        self.workers = workers

    def __enter__(self) -> Callable[[list[tuple[Any, ...]]], Iterable[dict[str, Any]]]:
        self.pool = None
        if self.workers == 1:
            return lambda jobs: map(_call, jobs)
        self.pool = pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_start_worker)
        return lambda jobs: pool.map(_call, [_by_name(job) for job in jobs])

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """One thread per process; an interrupt is the parent's to handle."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


class _Named(str):
    """The name of a claim on its way to another process."""


def _by_name(x: Any) -> Any:
    if isinstance(x, Theorem):
        return _Named(x.name)
    return tuple(_by_name(y) for y in x) if isinstance(x, tuple) else x


def _from_name(x: Any) -> Any:
    if isinstance(x, _Named):
        return THEOREMS[x]
    return tuple(_from_name(y) for y in x) if isinstance(x, tuple) else x


def _call(job: tuple[Any, ...]) -> dict[str, Any]:
    function, *arguments = job
    with warnings.catch_warnings():  # wrong copies and dropped hypotheses may well overflow
        warnings.simplefilter("ignore", RuntimeWarning)
        return function(*map(_from_name, arguments))


def _try(
    setting: str, route: str, B: int, seed: tuple[int, ...], theorems: tuple[Theorem, ...], losses: Any
) -> dict[str, Any]:
    """Residuals of the given claims on one draw."""
    problem, measure, out = SETTINGS[setting](np.random.default_rng(seed), B, losses), ROUTES[route](), []
    for theorem in theorems:
        holds = theorem.applies(problem) & theorem.measurable(problem)
        if holds.any():
            part = problem if holds.all() or route == "autodiff" else problem.take(holds)
            residual = theorem.residual(part, measure)
            if part is problem:
                residual = residual[holds]
            worst = float(residual.max())  # NaN, if there is one
            out.append((theorem.name, route, setting, Tried(len(residual), worst, f"{setting} {seed}")))
    return {"tried": out}


_DRAWS = {"autodiff": (12, 100), "simulated": (6, 12)}


def _audit(theorem: Theorem, seed: int) -> dict[str, Any]:
    """Wrong copies, hypotheses dropped, and the symbolic proof of one claim."""
    route = theorem.routes[0]
    measure = ROUTES[route]()
    copies = dict(theorem.wrong_copies())
    missed = set(copies)
    for setting in theorem.settings:
        for problem in _draws(setting, route, seed):
            holds = theorem.applies(problem) & theorem.measurable(problem)
            if holds.any() and missed:
                part = problem.take(holds)
                missed -= {w for w in missed if not _within(copies[w].residual(part, measure), theorem.tolerance)}
    sharp = []
    for s in theorem.sharpness:
        worst = 0.0
        for problem in _draws(s.broken_in, route, seed) if s.broken_in else ():
            dropped = ~theorem.applies(problem) & theorem.measurable(problem)
            if dropped.any() and worst < 1e6 * theorem.tolerance:
                residual = theorem.residual(problem.take(dropped), measure)
                worst = max(worst, float(np.nan_to_num(residual, posinf=1e300).max()))
        shown = worst > 100 * theorem.tolerance
        sharp.append({**s._asdict(), "residual": worst, "shown": shown})
    proof = theorem.proof()
    proved = None if proof is None else {"covers": proof.covers, "zero": proof.holds}
    found = {"copies": len(copies), "missed": sorted(missed), "sharp": sharp, "proof": proved}
    return {"audit": {theorem.name: found}}


def _draws(setting: str, route: str, seed: int) -> Iterable[Any]:
    times, size = _DRAWS[route]
    for draw in range(times):
        yield SETTINGS[setting](np.random.default_rng((seed, draw, 77)), size, None)


def _within(residual: Any, tolerance: float) -> bool:
    return bool((residual <= tolerance).all())  # False for NaN


def _row(theorem: Theorem, tried: dict[str, Tried], audit: dict[str, Any], restricted: bool) -> Row:
    """The row of a claim. `restricted`: only some losses were drawn, so that a claim may apply to nothing."""
    proved = audit["proof"]
    problems = [
        f"{route}: residual {t.residual:.1e} above {theorem.tolerance:.0e} in {t.where}"
        for route, t in tried.items()
        if not t.residual <= theorem.tolerance
    ]
    problems += [f"{route}: applies to no instance" for route, t in tried.items() if not t.instances and not restricted]
    problems += [f"wrong copy not caught: {w}" for w in audit["missed"]]
    problems += [
        f"not shown sharp: without {s['hypothesis']!r} the residual is {s['residual']:.1e} in {s['broken_in']}"
        for s in audit["sharp"]
        if s["broken_in"] and not s["shown"]
    ]
    problems += ["the proof does not reduce to zero"] if proved and not proved["zero"] else []
    return Row(
        theorem.name,
        theorem.statement,
        theorem.source,
        theorem.kind,
        theorem.tolerance,
        tried,
        audit["copies"],
        tuple(audit["missed"]),
        tuple(audit["sharp"]),
        proved,
        tuple(problems),
    )

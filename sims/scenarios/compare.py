"""Every loss on the same three scenarios: how far ln pi(y+) falls, whether it comes back, who gains.

Gradient flow of each loss is walked in arc length until the mean margin has moved by a given number of nats, the loss
is at rest, or the budget of gradients is spent. Losses of the margin follow one curve where there is one pair; it is
walked once more by raising the margin itself, with no loss at all, and every loss is held against it.
"""

import html
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar

from sims.objective import few_threads
from sims.scenarios._arc import End, Landscape, Walk, walk
from sims.scenarios._compared import SEQUENCE_KAPPA, data_set, sequences, single_token
from sims.scenarios._kinds import Kind, kind, start_ratio
from sims.scenarios.no_never_yes import KAPPA
from theory import UnconstrainedFeatures
from theory._check import POSITIVE, check_count, check_number, unknown
from theory.losses import LOSSES, Loss, MarginLoss, Pair

Array = NDArray[np.float64]
Status = Literal["none", "transient", "permanent", "unrecovered", "stationary"]

CURVE_POINTS = 200  # of each curve kept in the record
LEGEND = """r: d_w/d_l at the start; rate: d ln pi(y+)/dt there, per nat: by the margin instead of the time; depth: the
largest fall of ln pi(y+), at margin: where; ln t: of the time to gain that margin; who gains: token, probability at the
start and where ln pi(y+) is lowest (at the end if it never falls)."""
ROUNDING = 1e-9  # nats: a fall smaller than this is none
CLEAR = 1e-3  # nats: a walk that rests no further beyond a margin has not reached it in any time it could tell


@dataclass(frozen=True)
class Scenario:
    """A model to compare losses on, its rates, and how many nats of mean margin are looked at."""

    name: str
    title: str
    model: Callable[[], UnconstrainedFeatures]
    eta_h: float  # eta_W is 1
    margin: float


SCENARIOS = {
    s.name: s
    for s in (
        Scenario("token", "one token: No over Never", single_token, KAPPA, 80.0),
        Scenario("sequence", "one pair of sequences, |y+| = 5, |y-| = 8", sequences, SEQUENCE_KAPPA, 30.0),
        Scenario("data", "four pairs, two of them started away from the reference", data_set, SEQUENCE_KAPPA, 20.0),
    )
}


@dataclass(frozen=True)
class Course:
    """What one loss does on one scenario. ln pi and margins are means over the pairs, in nats.

    kind : measured, not declared: r = d_w/d_l is 1 ("margin"), constant per pair, or varies ("two-likelihood").
    ratio : mean d_w over mean d_l at the start; None for losses of tokens.
    initial_rate, initial_slope : d ln pi(y+)/dt at the start, and per nat of margin; of a loss with a kink there (DPOP)
        with the slope it has at the kink itself, while the flow slides along it.
    depth, depth_margin : lowest ln pi(y+) minus its start (<= 0), and the margin gained there.
    status : "none"; "transient": below its start, and back at the end; "permanent": below it where the loss is at rest;
        "unrecovered": below it when the walk ended otherwise; "stationary": nothing moves.
    end : what ended the walk: the margin asked for, rest (a minimum, or a loss that is flat from here), the budget of
        gradients (near a minimum that is only approached, or sliding along a kink), or a gradient beyond float range
        (too large, or still falling where it underflows).
    log_time : ln t at which the margin `reach` is gained; inf if it never is, or by less than 1e-3 nats.
    gainer : token whose probability rose most in the context where the y+ of the first pair lost most, by the trough
        (by the end if there is none); with its probability at the start and then.
    off_curve : largest distance of ln pi(y+) to the common curve at equal margin; None with several pairs.
    """

    scenario: str
    loss: str
    parameters: str
    kind: Kind
    ratio: float | None
    initial_rate: float
    initial_slope: float
    depth: float
    depth_margin: float
    status: Status
    end: End
    final_margin: float
    final_change: float
    log_time: float
    gainer: str
    gainer_start: float
    gainer_then: float
    off_curve: float | None
    margin: tuple[float, ...]
    change: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Common:
    """The curve of grad u: where every loss of the margin walks on one pair. margin, change (K,), both directions."""

    scenario: str
    margin: tuple[float, ...]
    change: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Comparison:
    """Losses x scenarios. `courses` in order of scenario, then loss; `common` for scenarios of one pair; `failed`:
    losses that could not be walked, and why."""

    courses: tuple[Course, ...]
    common: tuple[Common, ...]
    failed: tuple[tuple[str, str, str], ...]  # (scenario, loss, reason)
    parameters: dict[str, Any]

    @property
    def scenarios(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(c.scenario for c in self.courses))

    def of(self, scenario: str) -> tuple[Course, ...]:
        """The courses of one scenario."""
        return tuple(c for c in self.courses if c.scenario == scenario)

    def course(self, scenario: str, loss: str) -> Course:
        """One course, by the names of scenario and loss; a ValueError if it is not there."""
        for c in self.courses:
            if (c.scenario, c.loss) == (scenario, loss):
                return c
        raise ValueError(unknown("loss", loss, [c.loss for c in self.of(scenario)]))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = []
        for name in self.scenarios:
            margin = self.parameters["margin"][name]
            lines += [f"{SCENARIOS[name].title} (until {margin:g} nats of margin are gained)"]
            widths = [max(map(len, column)) for column in zip(*self._rows(name), strict=True)]
            for row in self._rows(name):
                pairs = enumerate(zip(row, widths, strict=True))
                cells = (f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in pairs)
                lines.append("  " + "  ".join(cells).rstrip())
            lines.append("")
        lines += [f"{loss} on {scenario}: {reason}" for scenario, loss, reason in self.failed]
        return "\n".join([*lines, LEGEND]) if self.courses else "\n".join(lines).rstrip()

    def __repr__(self) -> str:
        return str(self)

    def _rows(self, scenario: str) -> list[tuple[str, ...]]:
        reach = self.parameters["reach"]
        head = ("loss", "kind", "r", "rate", "per nat", "depth", "at margin", "status", "end", "final margin")
        return [
            (*head, "final change", f"ln t({reach:g})", "who gains"),
            *((*_cells(c), f"{c.gainer} {c.gainer_start:.2g} -> {c.gainer_then:.2g}") for c in self.of(scenario)),
        ]

    def _repr_html_(self) -> str:
        tables = []
        for name in self.scenarios:
            head, *rows = (("".join(f"<td>{html.escape(x)}</td>" for x in row)) for row in self._rows(name))
            body = "".join(f"<tr>{r}</tr>" for r in rows)
            tables.append(f"<table><caption>{SCENARIOS[name].title}</caption><tr>{head}</tr>{body}</table>")
        return "".join(tables)


def _cells(c: Course) -> tuple[str, ...]:
    ratio = "" if c.ratio is None else f"{c.ratio:.3g}"
    numbers = (c.initial_rate, c.initial_slope, c.depth, c.depth_margin)
    last = (f"{c.final_margin:.3g}", f"{c.final_change:+.3g}", f"{c.log_time:.3g}")
    return (c.loss, c.kind, ratio, *(f"{x:+.3g}" for x in numbers), c.status, c.end, *last)


def compare(
    losses: Iterable[str | Loss] | Mapping[str, str | Loss] | None = None,
    scenarios: Iterable[str] | None = None,
    margin: float | None = None,
    reach: float = 4.0,
    workers: int = 1,
) -> Comparison:
    """Walk every loss on every scenario.

    losses : names in the registry (default parameters), or instances, registered or not; default the whole registry. A
        mapping gives them labels of your own.
    scenarios : names in SCENARIOS; default all.
    margin : nats of mean margin to look at; default each scenario's own.
    reach : margin gained (nats) whose time is reported.
    workers : processes; losses from elsewhere than `theory` are walked in this one.

    Raises ValueError for unknown names and numbers out of range.
    """
    asked = SCENARIOS if scenarios is None else [scenarios] if isinstance(scenarios, str) else scenarios
    names = list(dict.fromkeys(asked))
    for name in names:
        if name not in SCENARIOS:
            raise ValueError(unknown("scenario", name, SCENARIOS))
    if not names:
        raise ValueError("scenarios must not be empty")
    reach, workers = check_number(reach, "reach", POSITIVE), check_count(workers, "workers")
    margins = {n: SCENARIOS[n].margin if margin is None else check_number(margin, "margin", POSITIVE) for n in names}
    items = _labelled(LOSSES if losses is None else losses)
    common = {n: _common(n, margins[n]) for n in names}
    jobs = [(n, label, loss, margins[n], reach, common[n]) for n in names for label, loss in items]
    found = _map(jobs, workers)
    return Comparison(
        tuple(c for c in found if isinstance(c, Course)),
        tuple(c for c in common.values() if c is not None),
        tuple(c for c in found if not isinstance(c, Course)),
        {"margin": margins, "reach": reach, "eta_W": 1.0, "eta_h": {n: SCENARIOS[n].eta_h for n in names}},
    )


def _labelled(losses: Iterable[str | Loss] | Mapping[str, str | Loss]) -> list[tuple[str, Loss]]:
    """(label, instance); an instance with other parameters than the default ones is labelled with them."""
    losses = [losses] if isinstance(losses, str | Loss) else losses
    if isinstance(losses, Mapping) and losses is not LOSSES:
        return [(str(label), _labelled([item])[0][1]) for label, item in losses.items()] or _labelled([])
    out: list[tuple[str, Loss]] = []
    for item in losses:
        if isinstance(item, str):
            if item not in LOSSES:
                raise ValueError(unknown("loss", item, LOSSES))
            out.append((item, LOSSES[item].examples()[0] if _needs_arguments(item) else LOSSES[item]()))
        elif isinstance(item, Loss):
            same = item.name in LOSSES and item == LOSSES[item.name]()
            out.append((item.name if same else repr(item), item))
        else:
            raise ValueError(f"losses must hold names or theory.losses.Loss instances, got {item!r}")
    labels = [label for label, _ in out]
    if not out or len(set(labels)) < len(labels):
        raise ValueError(f"losses must be distinct and not empty, got {labels}")
    return out


def _needs_arguments(name: str) -> bool:
    try:
        LOSSES[name]()
    except TypeError:
        return True
    return False


def _map(jobs: Sequence[tuple[Any, ...]], workers: int) -> list[Any]:
    """Courses, here or in fresh processes (torch and forked threads do not mix)."""
    away = [workers > 1 and type(job[2]).__module__.startswith("theory.") for job in jobs]
    with few_threads(1):
        if not any(away):
            return [_course(job) for job in jobs]
        with ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker) as pool:
            there = pool.map(_course, [job for job, far in zip(jobs, away, strict=True) if far])
            here = [None if far else _course(job) for job, far in zip(jobs, away, strict=True)]
            return [next(there) if far else course for course, far in zip(here, away, strict=True)]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


class _Raise(MarginLoss):
    """Minus the margin: its flow is the integral curve of grad u."""

    def formula(self, ops: Any, y: Pair) -> Any:
        return -y.u


class _Lower(MarginLoss):
    """The same curve, backwards."""

    def formula(self, ops: Any, y: Pair) -> Any:
        return y.u


def _common(name: str, margin: float) -> Common | None:
    scenario = SCENARIOS[name]
    model = scenario.model()
    if len(model.samples) > 1:
        return None
    sides = []
    for loss in (_Lower(), _Raise()):
        land = Landscape.of(model, loss, 1.0, scenario.eta_h)
        sides.append(np.array(land.change(walk(land, margin, per_step=80).x)))
    both = np.concatenate([sides[0][:, :0:-1], sides[1]], axis=1)
    return Common(name, tuple(both[0].tolist()), tuple(both[1].tolist()))


def _course(job: tuple[str, str, Loss, float, float, Common | None]) -> Course | tuple[str, str, str]:
    name, label, loss, margin, reach, common = job
    scenario = SCENARIOS[name]
    try:
        land = Landscape.of(scenario.model(), loss, 1.0, scenario.eta_h)
        return measure(land, walk(land, margin), name, label, reach, common)
    except Exception as error:  # the loss may be a user's: the others go on
        return name, label, f"{type(error).__name__}: {error}"


def measure(land: Landscape, found: Walk, scenario: str, label: str, reach: float, common: Common | None) -> Course:
    """The record of one walk."""
    loss = land.objective.loss
    gained, change = land.change(found.x)
    g = land.gradient(land.start)[0]
    up, down = land.pair_gradients(land.start[0]).mean(1)  # of ln pi(y+) and ln pi(y-), means over pairs
    rate, margin_rate = -float(up @ g), -float((up - down) @ g)
    depth, at, lowest = _trough(found, gained, change)
    status = _status(found, depth, float(change[-1]))
    who, before, then = _gainer(land, found.x[lowest] if depth < -ROUNDING else found.x[-1])
    return Course(
        scenario=scenario,
        loss=label,
        parameters=repr(loss),
        kind=kind(land),
        ratio=start_ratio(land),
        initial_rate=rate,
        initial_slope=rate / margin_rate if margin_rate else 0.0,
        depth=depth,
        depth_margin=at,
        status=status,
        end=found.end,
        final_margin=float(gained[-1]),
        final_change=float(change[-1]),
        log_time=_log_time_at(found, gained, reach),
        gainer=who,
        gainer_start=before,
        gainer_then=then,
        off_curve=None if common is None else _off_curve(gained, change, common),
        **_thinned(gained, change),
    )


def _trough(found: Walk, gained: Array, change: Array) -> tuple[float, float, int]:
    """(depth, margin gained there, nearest point): the lowest point, refined between the points of the solver."""
    i = int(change.argmin())
    if i == 0 or i + 1 >= len(change) - found.implicit:
        return min(0.0, float(change[i])), float(gained[i]), i
    near = slice(max(0, i - 8), i + 9)
    s = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(found.x[near], axis=0), axis=1))])
    curve, j = CubicSpline(s, change[near]), i - near.start
    at = minimize_scalar(curve, bounds=(s[j - 1], s[j + 1]), method="bounded", options={"xatol": 1e-10}).x  # type: ignore[attr-defined]
    return min(0.0, float(curve(at)), float(change[i])), float(CubicSpline(s, gained[near])(at)), i


def _status(found: Walk, depth: float, final: float) -> Status:
    if len(found.x) == 1:
        return "stationary"
    if depth >= -ROUNDING:
        return "none"
    if final >= -ROUNDING:
        return "transient"
    return "permanent" if found.end == "stationary" else "unrecovered"


def _gainer(land: Landscape, x: Array) -> tuple[str, float, float]:
    """Where the first y+ loses most: the token whose probability rises most there, and its probabilities."""
    rows, tokens = (list(part) for part in land.objective.groups[0][0])
    log_pi = land.log_pi(np.stack([land.start[0], x]))
    worst = int((log_pi[1] - log_pi[0])[rows, tokens].argmin())
    before, then = np.exp(log_pi[:, rows[worst]])
    z = int((then - before).argmax())
    return land.model.name(z), float(before[z]), float(then[z])


def _log_time_at(found: Walk, gained: Array, reach: float) -> float:
    """ln t at which `reach` nats are first gained, interpolated; inf if never, or at a minimum approached for ever."""
    i, log_times = int((gained >= reach - 1e-9).argmax()), found.log_times
    if gained.max() < reach + (-1e-9 if found.end == "margin" else CLEAR):
        return float("inf")
    if i == 1:  # ln t is -inf at the start: time itself is all but linear there
        return float(log_times[1] + np.log(reach / gained[1]))
    share = (reach - gained[i - 1]) / (gained[i] - gained[i - 1])
    return float(log_times[i - 1] + share * (log_times[i] - log_times[i - 1]))


def _off_curve(gained: Array, change: Array, common: Common) -> float:
    curve = CubicSpline(np.array(common.margin), np.array(common.change))
    inside = (gained >= common.margin[0]) & (gained <= common.margin[-1])
    return float(np.abs(curve(gained) - change)[inside].max())


def _thinned(gained: Array, change: Array) -> dict[str, tuple[float, ...]]:
    """At most CURVE_POINTS points, evenly spread over the length of the drawn curve."""
    length = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(gained), np.diff(change)))])
    keep = np.searchsorted(length, np.linspace(0, length[-1], CURVE_POINTS)).clip(0, len(gained) - 1)
    keep = np.unique(np.append(keep, len(gained) - 1))
    return {"margin": tuple(gained[keep].tolist()), "change": tuple(change[keep].tolist())}


def default_workers() -> int:
    """One process per core, two at most: starting them costs as much as a scenario."""
    return min(2, os.cpu_count() or 1)

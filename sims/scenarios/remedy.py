"""The smallest remedy that keeps ln pi(y+) from falling: an SFT term, a weight on y+, another value of a parameter.

Found by bracketing and root finding on rates from automatic differentiation and on walked curves; beside it stands the
closed form where there is one, from the inner products of the theory, which the search does not see.
"""

import html
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from tqdm import tqdm

from sims.objective import few_threads
from sims.scenarios._arc import Landscape, walk
from sims.scenarios.compare import ROUNDING, SCENARIOS
from theory import UnconstrainedFeatures
from theory._check import POSITIVE, Interval, check_number, unknown
from theory.losses import SFT, Loss, MarginLoss, TokenLoss, Weighted
from theory.problem import Problem

Array = NDArray[np.float64]
Question = Literal["start", "path"]
Verdict = Literal["found", "not needed", "unlearns", "none"]

QUESTIONS = {"start": "ln pi(y+) does not fall at the start", "path": "ln pi(y+) is never below its start"}
FACTORS = np.geomspace(1e-4, 1e8, 49)  # amounts tried before the root finder, relative to a natural unit
PATH_TOLERANCE = 1e-3  # relative, of an amount found by walking
PATH_GRID = 4  # of this many factors, one is tried by walking: a decade apart


@dataclass(frozen=True)
class Remedy:
    """The smallest amount of one remedy, and how it compares with the closed form.

    remedy : "sft" (base + amount times -ln pi(y+)), "ratio" (weight of y+ over that of y- inside the margin), or the
        name of a parameter of the loss.
    verdict : "found"; "not needed": nothing falls as it is; "unlearns": nothing falls at the start but the margin;
        "none": no amount that was tried prevents it.
    amount : of the remedy, or the parameter's value nearest to `now`; None unless found.
    closed : the closed form of the amount at the start (exact for one pair and for several), or None.
    needed_ratio, ratio : d_w/d_l that one pair needs not to fall at the start, <grad y+, grad y->/|grad y+|^2 (None
        with several pairs), and what the loss has with that amount (None for losses of tokens).
    """

    loss: str
    remedy: str
    question: Question
    verdict: Verdict
    now: float
    amount: float | None
    closed: float | None
    needed_ratio: float | None
    ratio: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return "  ".join(f"{a} {b}" for a, b in zip(_HEAD, self.cells(), strict=True) if b)

    def cells(self) -> tuple[str, ...]:
        """A row of the table."""
        number = lambda x, digits=9: "" if x is None else f"{x:.{digits}g}"  # noqa: E731
        known = 3 if self.question == "path" and self.verdict == "found" else 9  # of what follows from the amount
        said = {"found": number(self.amount, known), "none": "no value prevents it", "not needed": "not needed"}
        words = said.get(self.verdict, "not needed, but the margin falls")
        numbers = (number(self.closed), number(self.needed_ratio), number(self.ratio, known))
        return (self.loss, self.remedy, self.question, number(self.now, 6), words, *numbers)


_HEAD = ("loss", "remedy", "for", "now", "smallest", "closed form", "r needed", "r then")


@dataclass(frozen=True, repr=False)
class Remedies:
    """A table of remedies on one scenario."""

    scenario: str
    rows: tuple[Remedy, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        table = [_HEAD, *(r.cells() for r in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in table]
        about = [f"{key}: {text}" for key, text in QUESTIONS.items() if key in {r.question for r in self.rows}]
        return "\n".join([f"Smallest remedies: {SCENARIOS[self.scenario].title}", *about, "", *lines])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = [_HEAD, *(r.cells() for r in self.rows)]
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
        return f"<table>{body}</table>"


def remedies(
    scenario: str,
    loss: Loss,
    names: Iterable[str] | None = None,
    questions: Iterable[Question] = ("start", "path"),
    margin: float | None = None,
    progress: bool = False,
) -> Remedies:
    """`smallest` for several remedies (default: "sft", "ratio" where they apply, and every parameter) on a scenario.

    margin : nats that a path is followed for; default the scenario's own. progress : a bar on a terminal's stderr.
    """
    if scenario not in SCENARIOS:
        raise ValueError(unknown("scenario", scenario, SCENARIOS))
    s = SCENARIOS[scenario]
    model, names = s.model(), list(available(loss) if names is None else names)
    margin = s.margin if margin is None else margin
    asked: list[tuple[str, Question]] = [(n, q) for n in names for q in questions]
    bar = tqdm(asked, disable=None if progress else True, desc=type(loss).__name__)  # None: only on a terminal
    return Remedies(scenario, tuple(smallest(model, loss, n, q, 1.0, s.eta_h, margin=margin) for n, q in bar))


def available(loss: Loss) -> tuple[str, ...]:
    """The remedies there are for a loss."""
    return (*(() if isinstance(loss, TokenLoss) else ("sft", "ratio")), *_domains(loss))


def smallest(
    model: UnconstrainedFeatures,
    loss: Loss,
    remedy: str,
    question: Question = "start",
    lr_unembedding: float = 1.0,
    lr_hidden: float = 1.0,
    margin: float = 20.0,
) -> Remedy:
    """The smallest amount of a remedy with which ln pi(y+) (mean over the pairs) does not fall while the margin rises.

    question : "start", its rate at the start is >= 0; or "path", it is never below its start while the margin moves by
        `margin` nats. Amounts are bracketed on a grid of 12 decades, four points each at the start and one on the path:
        one that helps only between its points is missed.

    Raises ValueError for an unknown remedy or question.
    """
    if question not in QUESTIONS:
        raise ValueError(f"question must be one of {', '.join(QUESTIONS)}, got {question!r}")
    if remedy not in available(loss):
        raise ValueError(unknown("remedy", remedy, available(loss)))
    margin = check_number(margin, "margin", POSITIVE)
    make, now, domain = _family(loss, remedy)

    def land(amount: float) -> Landscape:
        return Landscape.of(model, loss if amount == now else make(amount), lr_unembedding, lr_hidden)

    def on_path(land: Landscape) -> float:
        # What falls at the start is on the path, too, however shallow the dip: two measures, the lower one counts.
        start = _start(land) + 1e-12
        return start if start < 0 else min(start, _path(land, margin))

    measure = _start if question == "start" else on_path
    f = lambda amount: measure(land(amount))  # noqa: E731
    factors = FACTORS if question == "start" else FACTORS[::PATH_GRID]
    with few_threads(1):
        if not land(now).gradient(land(now).start).any():  # at rest: nothing falls
            verdict, amount = "not needed", None
        else:
            learns = lambda amount: _raises_margin(land(amount))  # noqa: E731
            verdict, amount = _search(f, learns, now, _grids(land(now), remedy, now, domain, factors), question)
    problem = Problem.of([model], loss, lr_unembedding, lr_hidden)
    return Remedy(
        loss=repr(loss),
        remedy=remedy,
        question=question,
        verdict=verdict,
        now=now,
        amount=amount,
        closed=closed_form(problem, remedy) if question == "start" and verdict == "found" else None,
        needed_ratio=needed_ratio(problem),
        ratio=_ratio(replace(problem, loss=problem.loss if amount is None else make(amount))),
    )


# ---- families


def _domains(loss: Loss) -> dict[str, Interval]:
    """Numeric parameters with their domains."""
    return {f.name: f.metadata["domain"] for f in fields(loss) if "domain" in f.metadata}  # type: ignore[arg-type]


def _family(loss: Loss, remedy: str) -> tuple[Callable[[float], Loss], float, Interval]:
    """Loss as a function of the amount, the amount it has now, the amounts there are."""
    if remedy == "sft":
        return lambda x: SFT(loss, x), 0.0, POSITIVE
    if remedy == "ratio":
        return lambda x: Weighted(loss, x, 1.0), 1.0, POSITIVE
    return lambda x: replace(loss, **{remedy: x}), float(getattr(loss, remedy)), _domains(loss)[remedy]  # type: ignore[type-var]


def _grids(land: Landscape, remedy: str, now: float, domain: Interval, factors: Array) -> list[list[float]]:
    """Amounts to try, ever further away from `now`, on one side and on the other."""
    if remedy == "sft":  # in units of the push that the loss itself gives
        g, up = land.gradient(land.start)[0], land.pair_gradients(land.start[0])[0].mean(0)
        unit = float(np.linalg.norm(g) / np.linalg.norm(up))
        return [[unit * x for x in factors]]
    if now > 0 and domain.low >= 0:
        sides = [now * (1 + factors), now / (1 + factors)]
    else:
        sides = [now + factors, now - factors]
    out = []
    for side, end in zip(sides, (domain.high, domain.low), strict=True):
        if np.isfinite(end) and end != now:  # and towards the end of the domain itself
            side = np.append(side, end + (now - end) * np.geomspace(0.9, 1e-6, len(factors)))
            side = np.append(side, end)
        inside = sorted({float(x) for x in side if float(x) in domain and x != now}, key=lambda x: abs(x - now))
        out.append(inside)
    return out


# ---- what is asked, as a function that changes sign


def _start(land: Landscape) -> float:
    """The cosine between the flow and the gradient of the mean ln pi(y+): the sign of the initial rate."""
    return _cosine(land, land.pair_gradients(land.start[0])[0].mean(0))


def _cosine(land: Landscape, direction: Any) -> float:
    g = land.gradient(land.start)[0]
    size = float(np.linalg.norm(g) * np.linalg.norm(direction))
    return -float(direction @ g) / size if size else -1.0  # a loss that does not move prevents nothing


def _raises_margin(land: Landscape) -> bool:
    up, down = land.pair_gradients(land.start[0]).mean(1)
    return _cosine(land, up - down) > 1e-9


def _path(land: Landscape, margin: float) -> float:
    """Negative if ln pi(y+) is ever below its start: the depth, or else the lowest trough or end above it."""
    gained, change = land.change(walk(land, margin).x)
    if not gained[-1] > 0:
        return -1.0
    if change.min() < -ROUNDING or len(change) < 3:
        return float(change.min())
    trough = (change[1:-1] <= change[:-2]) & (change[1:-1] < change[2:])
    return float(min([change[-1], *change[1:-1][trough]])) + ROUNDING


def _search(
    f: Callable[[float], float],
    learns: Callable[[float], bool],
    now: float,
    grids: list[list[float]],
    question: Question,
) -> tuple[Verdict, float | None]:
    f_now = f(now)
    if f_now >= (-1e-12 if question == "start" else 0.0):
        return "unlearns" if question == "start" and not learns(now) else "not needed", None
    found = []
    tolerance = 4 * float(np.finfo(float).eps) if question == "start" else PATH_TOLERANCE
    for grid in grids:
        before, f_before = now, f_now
        for amount in grid:
            if found and abs(before - now) >= abs(found[0] - now):
                break  # the other side has a nearer one
            f_amount = f(amount)
            if f_before < 0 <= f_amount:
                xtol = max(abs(amount) * tolerance, 1e-300)
                root: Any = brentq(f, before, amount, xtol=xtol, rtol=tolerance)  # type: ignore[arg-type]
                if question == "path" and f(root) < 0:  # the root is known to the tolerance: tell the side that helps
                    root = root + np.sign(amount - root) * min(2 * xtol, abs(amount - root))
                # Where the sign jumps because the loss turns round, it has unlearned the preference instead.
                if question == "path" or learns(root + 1e-7 * (amount - root)):
                    found.append(float(root))
                    break
            before, f_before = amount, f_amount
    if not found:
        return "none", None
    return "found", min(found, key=lambda x: abs(x - now))


# ---- the closed forms, by the inner products of the theory


def closed_form(problem: Problem, remedy: str) -> float | None:
    """The amount at which the mean ln pi(y+) stands still at the start, or None where there is no closed form.

    "sft": minus its rate over |grad of the mean|^2, which for one pair is d_l cos q - d_w, with cos the cosine of the
    two gradients and q = |grad y-|/|grad y+| (of a margin loss: -l'(u)(cos q - 1)); "ratio", one pair, a loss of the
    margin: cos q.
    """
    plus = [w for w, _ in problem.pairs]
    if remedy == "sft" and not isinstance(problem.loss, TokenLoss):
        rate = np.mean([problem.rate(w)[0] for w in plus])
        return float(-rate / np.mean([problem.inner(v, w)[0] for v in plus for w in plus]))
    if remedy == "ratio" and isinstance(problem.loss, MarginLoss):
        return needed_ratio(problem)
    return None


def needed_ratio(problem: Problem) -> float | None:
    """cos q = <grad y+, grad y->/|grad y+|^2: the d_w/d_l above which ln pi(y+) rises; None with several pairs."""
    if len(problem.pairs) != 1:
        return None
    w, l = problem.pairs[0]
    return float(problem.inner(w, l)[0] / problem.inner(w, w)[0])


def _ratio(problem: Problem) -> float | None:
    """d_w/d_l of one pair."""
    if isinstance(problem.loss, TokenLoss) or len(problem.pairs) > 1:
        return None
    d_w, d_l = (float(d[0, 0]) for d in problem.incentives)
    return d_w / d_l if d_l else None

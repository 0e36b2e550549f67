"""How far a forecast is good: the network taken straight along its first step, and measured again there.

A second measurement agrees with the forecast if the margin has grown and the forecast's rates at that margin are those
found: that of ln pi(y+) to RATE, all of them to SHARE of their size. What it foretells of ln pi(y+) is then off by at
most RATE of the margin gained, and by less where the rates drift apart steadily.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sims.language.outlook.paths import Local
from sims.language.outlook.record import Checked, Measured
from sims.language.outlook.step import Ask, FirstStep, Network, first_step, moved
from theory.losses import Loss

Array = NDArray[np.float64]
RATE = 0.05  # nats of ln pi(y+) per nat of margin
SHARE = 1 / 3  # of the size of the rates, in Fisher's norm where they are of all tokens
FIRST, HALVINGS = 0.05, 4  # nats of margin of the first measurement; the last margin is found to a sixteenth


@dataclass(frozen=True, eq=False)
class Theory:
    """A forecast of R values: of a `Local` model of the theory, or first rates continued straight on.

    name : "kernel", "line", "unconstrained" or "rates".
    """

    name: str
    loss: Loss
    first: FirstStep
    model: Local | None = None

    def path(self, margins: Array) -> Array:
        """(T, R) ln pi at margins (T,); NaN where the forecast has no such margin."""
        if self.model is not None:
            return self.model.path(self.name, self.loss, margins)
        return self.first.values + np.outer(margins - self.first.margin, self.first.rates)

    def rates(self, u: float) -> Array:
        """(R,) change of ln pi per nat of margin, where the margin is u."""
        return self.first.rates if self.model is None else self.model.rates(self.name, self.loss, u)

    @cached_property
    def critical(self) -> float:
        """The multiple of the body's speed above which ln pi(y+) falls at once; inf if none does."""
        if self.name == "unconstrained" and self.model is not None:
            flow = self.model.flow(self.name, self.loss)
            return flow.kappa_star / flow.kappa if flow.kappa and np.isfinite(flow.kappa_star) else np.inf
        body, head = (float(part[self.first.plus]) for part in (self.first.body, self.first.head))
        return head / -body if body < 0 else np.inf


def checked(
    network: Network,
    ask: Ask,
    optimizer: str,
    theory: Theory,
    weigh: Any,
    end: float,
    others: list[int],
    progress: bool,
) -> Checked:
    """Measure again on the line along the first step: twice as far each time, then between agreement and difference."""
    first = theory.first
    found: dict[float, Measured] = {}  # by length of step
    agreed, differs, length = 0.0, None, FIRST / sum(first.speeds)
    bar = tqdm(disable=not progress, desc="measuring again along the first step", unit=" points")

    def look(length: float) -> Measured:
        at = moved(network.weights, first.step, length)
        there = first_step(network, ask, first.plus, first.minus, optimizer, at, split=False)
        grown = max((x.gained for t, x in found.items() if x.agrees and t < length), default=0.0)
        found[length] = _compared(there, theory, weigh, grown, others)
        bar.update()
        return found[length]

    with bar:
        while differs is None:
            point = look(length)
            if not point.agrees:
                differs = length
            elif point.gained >= end:
                break
            else:
                agreed, length = length, 2 * length
        for _ in range(HALVINGS if differs is not None else 0):
            length = (agreed + differs) / 2  # type: ignore[operator]
            agreed, differs = (length, differs) if look(length).agrees else (agreed, length)
    reach = min(max((x.gained for x in found.values() if x.agrees), default=0.0), end)
    ended = "asked" if differs is None else "differs" if found[differs].gained > reach else "turns"
    return Checked(reach, ended, tuple(found[t] for t in sorted(found)))


def _compared(there: FirstStep, theory: Theory, weigh: Any, grown: float, others: list[int]) -> Measured:
    """A second measurement beside the forecast at its margin. It must lie beyond the margin `grown`."""
    first, change = theory.first, there.values - theory.first.values
    gained = there.margin - first.margin
    told, rates = (np.full_like(change, np.nan),) * 2
    if np.isfinite(gained):
        told, rates = theory.path(np.array([there.margin]))[0] - first.values, theory.rates(there.margin)
    plus = first.plus
    off = abs(rates[plus] - there.rates[plus])
    error = error_of(rates, there.rates, weigh(there.values))
    return Measured(
        gained=gained,
        preferred=float(change[plus]),
        dispreferred=float(change[first.minus]),
        forecast=float(told[plus]) if np.isfinite(told[plus]) else None,
        others=tuple(there.values[others].tolist()),
        rate=float(there.rates[plus]),
        rate_error=float(off),
        share_error=error,
        agrees=bool(gained > grown and off <= RATE and error <= SHARE),
    )


def error_of(told: Array, measured: Array, weights: Array) -> float:
    """Difference of rates as a part of their size, in the norm with these weights (probabilities: Fisher's)."""
    return float(np.sqrt(weights @ (told - measured) ** 2 / (weights @ measured**2)))

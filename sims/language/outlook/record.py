"""The record of `sims.language.outlook` and the words in which it speaks."""

import html
import re
import textwrap
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from sims.prediction import WIDTH, shown

Falls = Literal["at once", "later", "no"]
HOW = {"sgd": "gradient descent", "sign": "sign descent (as RMSprop and Adam begin)"}
WHAT = {"both": "all weights", "head": "the unembedding alone", "body": "all weights but the unembedding"}
THEORY = {
    "kernel": "the network's feature kernel",
    "line": "the network's sign step, straight on",
    "unconstrained": "unconstrained features",
    "rates": "first rates, straight on",
}


@dataclass(frozen=True)
class Gainer:
    """A token or a response at the start. Rates are nats of ln pi per nat of margin gained; body + head = rate.

    ids : its tokens. role : "y+", "y-", "candidate", "sampled" or "" (a token that gains). shared : how many of its
        first tokens it shares with y+ and with y-. unconstrained : its rate with unconstrained features; None for
        responses of several tokens.
    """

    text: str
    ids: tuple[int, ...]
    role: str
    log_prob: float
    rate: float
    body: float
    head: float
    shared: tuple[int, int]
    unconstrained: float | None


@dataclass(frozen=True)
class Foretold:
    """What a theory says of ln pi(y+) (nats, against its start) as the margin grows.

    theory : "kernel", "line", "unconstrained", or "rates" (responses of several tokens).
    lowest, lowest_at : of the change of ln pi(y+) up to the margin asked for.
    gained (T,), preferred (T,), dispreferred (T,) : the path, ln pi; others (k, T) that of the k that gain.
    """

    theory: str
    lowest: float
    lowest_at: float
    gained: tuple[float, ...]
    preferred: tuple[float, ...]
    dispreferred: tuple[float, ...]
    others: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Measured:
    """The network, taken straight along its first step and measured again.

    gained : nats of margin. preferred, dispreferred : change of ln pi; forecast : of `preferred`, None if the forecast
    has no such margin. others : ln pi of the k that gain. rate : of ln pi(y+), nats per nat; rate_error : the
    forecast's distance from it; share_error : that of all rates as a part of their size. agrees : whether the margin
    still grew and both are within the bounds of `check.RATE` and `check.SHARE`.
    """

    gained: float
    preferred: float
    dispreferred: float
    forecast: float | None
    others: tuple[float, ...]
    rate: float
    rate_error: float
    share_error: float
    agrees: bool


@dataclass(frozen=True)
class Checked:
    """How far the forecast holds.

    reach : nats of margin gained up to which second measurements agree with it. ended : "differs" (not beyond), "asked"
    (as far as was asked), "turns" (along this step the margin grows no further). points : in order of step length.
    """

    reach: float
    ended: Literal["differs", "asked", "turns"]
    points: tuple[Measured, ...]


@dataclass(frozen=True)
class Outlook:
    """What training on one pair will do to a network, told before any training.

    source, prompt, preferred, dispreferred : the model, and the texts. optimizer : "sgd" or "sign"; trained : which
        weights. single : whether both responses are one token, so that the theory's closed form speaks of them.
    falls : whether ln pi(y+) falls "at once", "later" (below its start within the reach of the forecast, there or as
        measured), or "no" (not within it). falls_at : nats of margin gained where it is first seen below its start.
    margin : u at the start, nats. body_share : the body's part of the margin's first growth; critical_share : above
        which part ln pi(y+) falls at once (None: none). kappa, kappa_star : the same as ratios of rates, and
        kappa_star_unconstrained with unconstrained features; r_max : as in `theory.Displacement`, of those too. None
        for responses of several tokens.
    pair, tokens, responses : y+ and y-; the tokens that gain most, and y+ and y- among them; the candidates.
    forecasts, checked : the theories' paths, that of the network's own features first; how far it holds.
    deviation : of the theory's first rates from those measured, as a part of their size; None without a theory.
    notes : where the theory is approximate, and what became of the texts.
    """

    source: str
    prompt: str
    preferred: str
    dispreferred: str
    optimizer: str
    trained: str
    loss: str
    single: bool
    falls: Falls
    falls_at: float | None
    margin: float
    body_share: float
    critical_share: float | None
    kappa: float | None
    kappa_star: float | None
    kappa_star_unconstrained: float | None
    r_max: float | None
    pair: tuple[Gainer, Gainer]
    tokens: tuple[Gainer, ...]
    responses: tuple[Gainer, ...]
    forecasts: tuple[Foretold, ...]
    checked: Checked
    deviation: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for saving; infinities stay floats."""
        return asdict(self)

    def __str__(self) -> str:
        head = f"{self.preferred!r} over {self.dispreferred!r} after {_short(self.prompt)}\non {self.source}, "
        parts = [
            f"{head}{HOW[self.optimizer]} on {WHAT[self.trained]}",
            "\n".join(
                [
                    _wrapped(
                        f"Will the log-probability of {self.preferred!r} fall when training starts? ", self._verdict()
                    ),
                    _wrapped("Who gains: ", self._gainers()),
                    _wrapped("How far this forecast is good: ", self._reach()),
                ]
            ),
        ]
        if self.notes:
            parts.append("\n".join(_wrapped("Note: ", note) for note in self.notes))
        parts += [self._walk(), *self._tables()]
        if self.single:
            parts.append(self._numbers())
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _verdict(self) -> str:
        rate, other = self.pair[0].rate, self.pair[1].rate
        speeds = f"{rate:+.3g} nats per nat of margin gained ({self.dispreferred!r}: {other:+.3g})"
        if self.falls == "at once":
            return f"Yes, at once: {speeds}."
        if self.falls == "later":
            return f"Not at once ({speeds}), but later: below its start at a margin gained of {self.falls_at:.2g} nats."
        return f"No: {speeds}, and not below its start as far as this forecast is good."

    def _gainers(self) -> str:
        gaining = [g for g in (*self.responses, *self.tokens) if g.role not in ("y+", "y-") and g.rate > 0]
        gaining = [g for g in gaining if g.role or not self.responses]
        if self.pair[0].rate > 0:
            gaining = [self.pair[0], *gaining]
        words = ", ".join(f"{g.text!r} ({g.rate:+.3g})" for g in gaining[:5])
        words = f"{words} (nats per nat of margin)." if words else "none of those looked at."
        if not self.single and len(self.responses) == 2:
            words += " Only these two were looked at: ask about others with --candidate TEXT or --samples 20."
        return words

    def _reach(self) -> str:
        reach = f"{self.checked.reach:.3g} nats of margin gained (trainers log beta times this as rewards/margins)"
        if self.checked.ended == "asked":
            return f"up to {reach} and perhaps further: measured again where its first step leads, the network agrees."
        why = "no further does the margin grow" if self.checked.ended == "turns" else "beyond it differs"
        return f"up to {reach}; so far the network agrees, measured again where its first step leads, and {why}."

    def _walk(self) -> str:
        """The measurements beside the forecasts."""
        free = self.forecasts[1:]
        lines = [
            f"Change of ln pi({self.preferred!r}) by margin gained (nats): forecast, and measured on the network",
            "taken straight along its first step",
            f"  {'margin':>7}  {'forecast':>9}  {'measured':>9}  {'agrees':6}"
            + ("  unconstrained features" if free else ""),
        ]
        for p in self.checked.points:
            told = "-" if p.forecast is None else f"{p.forecast:+.4f}"
            row = f"  {p.gained:7.2f}  {told:>9}  {p.preferred:+9.4f}  {'yes' if p.agrees else 'no':6}"
            lines.append(row + "".join(f"  {_along(f, p.gained)}" for f in free))
        return "\n".join(lines)

    def _tables(self) -> list[str]:
        out = []
        if self.tokens:
            title = "Tokens that gain most probability at first, and the pair (rates: nats per nat of margin)"
            out.append(f"{title}\n{_table(self.tokens)}")
        if self.responses:
            out.append(f"Responses, fastest rise first (rates: nats per nat of margin)\n{_table(self.responses)}")
        return out

    def _numbers(self) -> str:
        kappas = [self.kappa, self.kappa_star, self.kappa_star_unconstrained, self.r_max]
        critical = "no share does" if self.critical_share is None else f"above {100 * self.critical_share:.3g} %"
        rows = {
            "margin at the start": f"{self.margin:.4g} nats",
            "body's share of its growth": f"{100 * self.body_share:.3g} %; falls at once {critical}",
            "kappa, kappa* (network)": "{:.4g}, {:.4g}".format(*kappas[:2]),
            "kappa* (unconstrained)": f"{kappas[2]:.4g}",
            "r_max (unconstrained)": f"{kappas[3]:.4g}",
        }
        for f in self.forecasts:
            told = f"lowest {f.lowest:+.3g} nats, at a margin gained of {f.lowest_at:.3g} of {f.gained[-1]:.3g}"
            rows[THEORY[f.theory]] = told
        width = max(map(len, rows))
        return "Numbers\n" + "\n".join(f"  {name:{width}}  {value}" for name, value in rows.items())


def _along(f: Foretold, gained: float) -> str:
    """The change of ln pi(y+) at a margin between the points of the path."""
    if not f.gained[0] <= gained <= f.gained[-1]:
        return "-"
    return f"{np.interp(gained, f.gained, f.preferred) - f.preferred[0]:+.4f}"


def _table(rows: tuple[Gainer, ...]) -> str:
    width = max(8, *(len(shown(g.text)) for g in rows))
    free = any(g.unconstrained is not None for g in rows)
    sequences = any(len(g.ids) > 1 for g in rows)
    lines = [
        f"  {'':{width}}  {'':9}  {'ln pi':>8}  {'rate':>8}  {'body':>8}  {'head':>8}"
        + (f"  {'unconstrained':>13}" if free else "")
        + ("  first tokens shared with y+, y-" if sequences else "")
    ]
    for g in rows:
        line = (
            f"  {shown(g.text):{width}}  {g.role:9}  {g.log_prob:8.3f}  {g.rate:+8.3f}  {g.body:+8.3f}  {g.head:+8.3f}"
        )
        if free and g.unconstrained is not None:
            line += f"  {g.unconstrained:+13.3f}"
        if sequences:
            line += f"  {g.shared[0]} of {len(g.ids)}, {g.shared[1]} of {len(g.ids)}"
        lines.append(line)
    return "\n".join(lines)


def _short(text: str) -> str:
    return repr(text if len(text) <= 70 else f"{text[:30]} ... {text[-35:]}")


def _wrapped(head: str, text: str) -> str:
    kept = re.sub(r"(?<=[\s(]') ", "\0", head + text)  # the space that begins a quoted text stays with it
    lines = textwrap.fill(kept, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return lines.replace("\0", " ")

"""The record of `sims.predict` and the words in which it speaks."""

import html
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from theory.displacement import Displacement, Gain
from theory.exact import ExactFlow

WIDTH = 110


@dataclass(frozen=True)
class TokenPrediction:
    """One token at the start of training."""

    token: int
    name: str
    role: str  # "y+", "y-", "start" (named by the stated start) or ""
    start: float  # probability
    alignment: float  # <W_z, W_+ - W_->: how fast its logit rises as h moves; <W_z, Kf (W_+ - W_-)> with a kernel
    ratio: float  # r_z = <2 W_z - W_+ - W_-, a>/|a|^2: 1 for y+, -1 for y-; above 1 it gains on y+


@dataclass(frozen=True)
class Prediction:
    """Exact consequences of training one preference pair on real embeddings.

    source, V, d, preferred, dispreferred : the file, its number of tokens and dimension, the names of y+ and y-.
    start : where the hidden vector came from, in words. `log_odds` are those it was solved from (name, and nats
        relative to the mean logit; empty for a hidden vector that was given), `hidden_norm` is its length |h|.
    start_tokens : y+, y-, the tokens that state the start and the most probable ones, most probable first.
    aligned_tokens : the tokens whose logits rise fastest, largest <W_z, W_+ - W_-> first.
    preferred_rank : place of y+ in that order over the whole vocabulary, 1 for the first.
    r_max, r_max_token : the largest r_z of the other tokens and whose it is (-inf and None if there is no other token
        or W_+ = W_-). It speaks of the start of training only.
    displacement : the summary of the whole flow; holds kappa, kappa*, status, trough, who gains.
    loss, lr_unembedding, lr_hidden : what was assumed of the training.
    at_start, in_training : the verdict in words, on the first moment and on all of training.
    flow : the `ExactFlow`, for plots and further questions; not in `to_dict()`.
    """

    source: str
    V: int
    d: int
    preferred: str
    dispreferred: str
    start: str
    log_odds: tuple[tuple[str, float], ...]
    hidden_norm: float
    start_tokens: tuple[TokenPrediction, ...]
    aligned_tokens: tuple[TokenPrediction, ...]
    preferred_rank: int
    r_max: float
    r_max_token: str | None
    displacement: Displacement
    loss: str
    lr_unembedding: float
    lr_hidden: Any
    at_start: str
    in_training: str
    flow: ExactFlow = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for saving; infinities stay floats."""
        plain = {k: v for k, v in vars(self).items() if k not in ("flow", "displacement")}
        for key in ("start_tokens", "aligned_tokens"):
            plain[key] = [asdict(t) for t in plain[key]]
        plain["lr_hidden"] = np.asarray(self.lr_hidden, dtype=np.float64).tolist()
        return {**plain, "displacement": self.displacement.to_dict()}

    def __str__(self) -> str:
        record = self.displacement
        hidden = "a feature kernel" if np.ndim(self.lr_hidden) else f"{float(self.lr_hidden):g}"
        none = "none: no ratio does that at this start"
        numbers = {
            "r_max of other tokens": f"{self.r_max:.4g}"
            + (f" ({shown(self.r_max_token)})" if self.r_max_token else ""),
            "kappa = eta_h / eta_W": f"{record.kappa:.4g}",
            "kappa*, falls above it": none if np.isinf(record.kappa_star) else f"{record.kappa_star:.4g}",
            "d/dt ln pi(y+) at start": f"{record.initial_rate:.4g}",
            "displacement": f"{record.status}, depth {record.depth:.4g} nats",
        }
        parts = [
            f"Preferred y+ = {self.preferred!r}, dispreferred y- = {self.dispreferred!r}\n"
            f"on {self.source}, {self.V} tokens x {self.d}",
            f"Training: {self.loss}, rates eta_W = {self.lr_unembedding:g} and eta_h = {hidden}",
            _wrapped("Start: ", f"{self.start}; |h| = {self.hidden_norm:.3g}."),
            _wrapped("First moment: ", self.at_start),
            _wrapped("Whole course: ", self.in_training),
            "Most probable tokens before training\n" + _table(self.start_tokens),
            "Tokens whose logit rises fastest as the hidden vector moves (r_z above 1: faster than that of y+)\n"
            + _table(self.aligned_tokens)
            + f"\n  y+ is number {self.preferred_rank} of {self.V} in this order",
            "Numbers\n" + "\n".join(f"  {name:24} {value}" for name, value in numbers.items()),
            "Who gains probability\n"
            f"  at the trough            {_gainers(record.gainers_at_trough)}\n"
            f"  at the end               {_gainers(record.gainers_at_end)}",
        ]
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def shown(name: str) -> str:
    """A token's name as it can stand in a table: quoted where it would not be seen or would break the line."""
    return name if name and name.isprintable() and " " not in name else repr(name)


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(head + text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _table(rows: tuple[TokenPrediction, ...]) -> str:
    width = max(5, *(len(shown(t.name)) for t in rows))
    head = f"  {'token':{width}}  {'':5}  {'probability':>11}  {'<W_z, W+ - W->':>14}  {'r_z':>7}"
    lines = (
        f"  {shown(t.name):{width}}  {t.role:5}  {t.start:11.3g}  {t.alignment:14.4g}  {t.ratio:7.3f}" for t in rows
    )
    return "\n".join([head, *lines])


def _gainers(gains: tuple[Gain, ...]) -> str:
    return ", ".join(f"{shown(g.name)} {g.start:.2g} -> {g.then:.2g}" for g in gains[:4]) or "nobody"


def at_start(flow: ExactFlow, record: Displacement, winner: int | None) -> str:
    """The first moment in words, exactly as strong as the theory (exact_solution E4).

    `winner` is the other token with the largest r_z, None if no other token has one.
    """
    plus = repr(flow.model.name(flow.model.single_pair[0]))
    falls = record.initial_rate < 0
    if flow.direction == 0:
        return "nothing moves: the loss has no slope here, or the gradient vanishes."
    if flow.direction < 0:
        return (
            "this loss lowers the margin at this start (it is beyond its minimiser), while r_max and kappa* speak of a "
            f"rising one. The probability of {plus} {'falls' if falls else 'does not fall'} at first."
        )
    if winner is None:
        why = "there is no other token" if flow.model.V == 2 else "y+ and y- have the same row of W"
        return f"this pair cannot displace at the start of training: {why}."
    top = f"The highest other token is {flow.model.name(winner)!r} with r = {record.r_max:.3g}"
    kernel = " (with this feature kernel)" if np.ndim(flow.lr_hidden) else ""
    if record.r_max <= 1:
        scope = "This speaks of the start only: once W_+ and W_- have moved it may still fall; see the whole course."
        if flow.path.motion.eta_W == 0:
            scope = "As W is frozen, this holds throughout training."
        return (
            "this pair cannot displace at the start of training: no hidden vector and no ratio of rates"
            f"{kernel} makes the probability of {plus} fall, as long as the loss raises the margin. "
            f"{top}, and it would take more than 1. {scope}"
        )
    able = (
        "this pair can displace at the start of training: some hidden vectors and ratios of rates"
        f"{kernel} make the probability of {plus} fall. {top}, above 1."
    )
    if np.isinf(record.kappa_star):
        return f"{able} With this hidden vector, however, no ratio of rates makes it fall at first."
    does, side = ("falls", "above") if falls else ("does not fall", "not above")
    return (
        f"{able} With this hidden vector it {does} at first: kappa = {record.kappa:.4g} is {side} "
        f"kappa* = {record.kappa_star:.4g}."
    )


def in_training(flow: ExactFlow, record: Displacement) -> str:
    """The whole course in words, for this loss, these rates and this start."""
    plus = repr(flow.model.name(flow.model.single_pair[0]))
    first, low, last = (f"{float(np.exp(p.log_prob)):.3g}" for p in (record.start, record.trough, record.end))
    if record.status == "stationary":
        return f"the probability of {plus} stays at {first}."
    if record.status == "none":
        lost = f" On the way it falls by {record.largest_drop:.3g} from a peak." if record.largest_drop > 1e-3 else ""
        return f"the probability of {plus} is never below its start, {first}, and ends at {last}.{lost}"
    trough = f"(by {-record.depth:.3g} nats; ln t = {record.trough.log_time:.3g}, margin {record.trough.margin:.3g})"
    if record.status == "permanent":
        if record.trough.kind == "end":
            return f"the probability of {plus} falls from {first}, lower and lower, and ends at {last}."
        return f"the probability of {plus} falls from {first} to {low} {trough} and stays below: it ends at {last}."
    back = record.last_return
    when = f" at ln t = {back.log_time:.3g} (margin {back.margin:.3g})" if back is not None else ""
    fall = f"the probability of {plus} falls from {first} to {low} {trough}"
    return f"{fall}, is back at its start{when} and ends at {last}."

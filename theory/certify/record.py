"""What a certificate says, in numbers and in words."""

import html
import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

from theory.certify.start import Ball, load_flint

_WIDTH = 110
_BITS = 1 << 14


@dataclass(frozen=True, eq=False)
class Enclosure:
    """A real number known to lie in a ball: the true value, not the value of a float computation."""

    ball: Ball = field(repr=False)

    @property
    def low(self) -> float:
        """A float at or below the value."""
        return math.nextafter(float(self.ball.lower()), -math.inf)

    @property
    def high(self) -> float:
        """A float at or above the value."""
        return math.nextafter(float(self.ball.upper()), math.inf)

    @property
    def relative_width(self) -> float:
        """Width of the ball over the least magnitude in it; inf if it contains 0."""
        return float(2 * self.ball.rad() / abs(self.ball).lower()) if self.ball != 0 else math.inf

    def contains(self, x: Any) -> bool:
        """Whether a number (int, float or decimal text) lies in the ball for certain."""
        flint = load_flint()
        with flint.ctx.workprec(_BITS):  # or reading the text would round it away from the ball
            return self.ball.contains(flint.arb(x))

    def to_dict(self) -> dict[str, Any]:
        """Floats on either side, the digits, and the relative width."""
        return {"low": self.low, "high": self.high, "digits": str(self), "relative_width": self.relative_width}

    def __str__(self) -> str:
        return self.ball.str(25)

    __repr__ = __str__


@dataclass(frozen=True)
class Claim:
    """One statement: proved (True), refuted, i.e. its negation proved (False), or undecided (None), and why."""

    statement: str
    proved: bool | None
    why: str

    @property
    def verdict(self) -> str:
        """ "proved", "refuted" or "undecided"."""
        return {True: "proved", False: "refuted", None: "undecided"}[self.proved]


@dataclass(frozen=True, eq=False, repr=False)
class Certificate:
    """Proofs about one single-token pair under gradient flow; `certified` if every claim is proved.

    preferred, dispreferred, token, V, d, eta_W, eta_h, loss : the pair, the token said to gain, the sizes, the rates,
        and the loss whose reach was checked (None: none was).
    start_margin : ball around u0; margin : u1, a float taken as exact, where the path was looked at.
    start, change, gain : balls around ln pi(y+) at the start, its change from there to u1, and that of ln pi(token).
    claims : what had to be proved.
    displaces : whether ln pi(y+) is below its start anywhere on the path u > u0 (proved, refuted or None); `course`
        says so in words.
    lowest, lowest_margin : balls around the minimum of ln pi(y+) over all u >= u0, and around where it is taken (both
        trained; None where not asked for or not covered).
    box, largest_box : the radius that was asked for, and the largest that certifies (three digits, rounded down; None
        if not searched): the claims hold for all W, h within it, entry by entry.
    bits : working precision.
    """

    preferred: str
    dispreferred: str
    token: str
    V: int
    d: int
    eta_W: float
    eta_h: float
    loss: str | None
    start_margin: Enclosure
    margin: float
    start: Enclosure
    change: Enclosure
    gain: Enclosure
    claims: tuple[Claim, ...]
    displaces: bool | None
    course: str
    lowest: Enclosure | None
    lowest_margin: Enclosure | None
    box: float | None
    largest_box: float | None
    bits: int

    @property
    def certified(self) -> bool:
        """Every claim is proved."""
        return all(c.proved is True for c in self.claims)

    @property
    def scope(self) -> str:
        """For what the proofs speak."""
        return (
            "gradient flow of the single-token model softmax(W h) from exactly these W, h (floats are exact rationals) "
            f"with rates eta_W = {self.eta_W:g}, eta_h = {self.eta_h:g}, under every margin loss whose slope "
            "G = -l' stays positive from u0 up to u1, so that its flow passes u1 or tends to it; a loss with a "
            "minimiser below u1 stops earlier. Discrete steps and other models are not covered."
        )

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for saving."""
        out: dict[str, Any] = {"certified": self.certified}
        for name, value in vars(self).items():
            out[name] = value.to_dict() if isinstance(value, Enclosure) else value
        out["claims"] = [{**vars(c), "verdict": c.verdict} for c in self.claims]
        return {**out, "scope": self.scope}

    def __str__(self) -> str:
        lines = [
            f"{'Certified' if self.certified else 'NOT certified'}: displacement of {self.preferred!r} (y+) against "
            f"{self.dispreferred!r} (y-), {self.V} tokens x {self.d}",
            f"ball arithmetic, {self.bits} bits; start margin u0 = {self.start_margin}, looked at u1 = {self.margin!r}",
            "",
            *(_wrapped(f"{c.verdict:10}", f"{c.statement}: {c.why}", 10) for c in self.claims),
            "",
            _wrapped("Whole path: ", self.course, 2),
        ]
        if self.largest_box is not None:
            lines.append(
                _wrapped(
                    "Box: ",
                    f"the first two claims hold for every W, h within {self.largest_box:g} of these, entry by entry "
                    "(largest radius that certifies, three digits)."
                    if self.largest_box
                    else "no radius certifies.",
                    2,
                )
            )
        return "\n".join([*lines, _wrapped("Scope: ", self.scope, 2)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def _wrapped(head: str, text: str, indent: int) -> str:
    return textwrap.fill(
        head + text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )

"""Proofs that displacement happens: ln pi(y+) below its start, as a theorem about the given floats (python-flint).

The path of a single-token pair is algebraic in the margin and the same for every margin loss (exact_solution E2), so
one evaluation in ball arithmetic at one margin proves a strict inequality. The floating-point solution picks where to
look and never enters a proof.
"""

import math

import numpy as np

from theory._check import POSITIVE, check_count, check_number
from theory.certify.box import Box
from theory.certify.minimum import Lowest, lowest
from theory.certify.reach import passes
from theory.certify.record import Certificate, Claim, Enclosure
from theory.certify.start import Ball, Start, load_flint, log_change, odds_against
from theory.exact import ExactFlow, margin_form
from theory.losses import Loss
from theory.losses.dpo import DPO
from theory.model import UnconstrainedFeatures, token_index
from theory.path import RATE

__all__ = ["Certificate", "Claim", "Enclosure", "certify"]

_FIRST_BITS = 128
_THOROUGH = 4096  # tokens up to which the whole path and the largest box are looked at unless asked otherwise
_WIDTH = 1e-15  # relative width of the minimum beyond which the precision is raised
_UNREACHED = "margin must lie above the start margin {:g} and be reached by the path, got {!r}"


def certify(
    model: UnconstrainedFeatures,
    loss: Loss | None = None,
    lr_unembedding: float = 1.0,
    lr_hidden: float = 1.0,
    *,
    margin: float | None = None,
    token: int | str | None = None,
    box: float | None = None,
    thorough: bool | None = None,
    max_bits: int = 2048,
) -> Certificate:
    """Try to prove that ln pi(y+) is below its start where the margin is u1, and that a named token is above.

    Parameters
    ----------
    model : one sample with two single-token responses (`UnconstrainedFeatures.single_token`).
    loss : any loss with a margin form; its flow is then shown to pass u1. None: the result speaks of every margin loss
        whose flow does.
    lr_unembedding, lr_hidden : eta_W, eta_h >= 0, not both 0; 0 freezes a group.
    margin : u1 > u0, nats. Default: the trough that `ExactFlow` finds (for the loss, or for one without a minimiser).
    token : who is said to gain, index or name. Default: the other token with the largest gain in probability at u1.
    box : radius eps; the claims are then also to hold for every W, h whose entries are within eps of the given ones.
    thorough : also enclose the minimum over the whole path (both trained) and search for the largest box. Default: up
        to 4096 tokens. (The whole path is looked at in any case if ln pi(y+) is not below its start at u1.)
    max_bits : the precision is doubled from 128 up to this until every sign is decided.

    Raises
    ------
    ValueError : a model with sequences or several samples, a loss without margin form, rates out of range or a kernel,
        nothing that moves, a margin that the path does not reach or that is not above the start.
    ImportError : without python-flint.
    """
    flint = load_flint()
    eta_W = check_number(lr_unembedding, "lr_unembedding", RATE)
    eta_h = check_number(lr_hidden, "lr_hidden", RATE)
    check_count(max_bits, "max_bits", _FIRST_BITS)
    if box is not None:
        box = check_number(box, "box", POSITIVE)
    flow = ExactFlow(model, DPO(0.1) if loss is None else loss, eta_W, eta_h)
    if float(flow.path.motion.K0[0, 0]) == 0:
        raise ValueError("W, h and the rates must let something move, got |grad u| = 0 at the start")
    u1 = _trough(flow) if margin is None else check_number(margin, "margin")
    if not flow.start_margin < u1 < float(flow.path.motion.reach(np.ones(1))[0]):
        raise ValueError(_UNREACHED.format(flow.start_margin, u1))
    named = _gainer(flow, u1) if token is None else _checked_token(model, token)
    thorough = model.V <= _THOROUGH if thorough is None else thorough
    bits = _FIRST_BITS
    while True:
        with flint.ctx.workprec(bits):
            last = 2 * bits > max_bits
            start = Start.of(model, eta_W, eta_h)
            attempt = _Attempt(model, start, u1, named)
            # Cheap where ln pi(y+) never falls, and then the best answer.
            low = lowest(start) if thorough or _sign(-attempt.change) is False else None
            sharp = low is None or low.at_start or Enclosure(low.log_prob).relative_width <= _WIDTH
            if last or (attempt.decided and sharp):
                return attempt.certificate(flow, loss, box, thorough, low, bits)
        bits *= 2


class _Attempt:
    """The evaluation of one start at one margin in the current precision."""

    def __init__(self, model: UnconstrainedFeatures, start: Start, u1: float, token: int) -> None:
        self.model, self.start, self.margin, self.token = model, start, u1, token
        self.u1 = load_flint().arb(u1)
        plus, minus = model.single_pair
        before, after = start.start_odds, start.odds(self.u1)
        S0, S1 = odds_against(start.u0, before), odds_against(self.u1, after)
        self.log_start, self.change = -S0.log1p(), log_change(S0, S1)
        self.place: int | None = None  # as `Box` counts
        if token == plus:
            self.gain = self.change
        elif token == minus:
            self.place, self.gain = -1, self.change - (self.u1 - start.u0)
        else:
            place = self.place = int(np.searchsorted(start.others, token))
            self.gain = self.change + after[place] - before[place]

    @property
    def decided(self) -> bool:
        """Whether the path reaches u1 and both signs are known."""
        return self.start.reaches(self.u1) and all(_sign(x) is not None for x in (self.change, self.gain))

    def certificate(
        self, flow: ExactFlow, loss: Loss | None, box: float | None, thorough: bool, low: Lowest | None, bits: int
    ) -> Certificate:
        """Every claim with its verdict."""
        model, start, name = self.model, self.start, self.model.name
        if not start.reaches(self.u1):
            raise ValueError(_UNREACHED.format(float(start.u0), self.margin))
        plus, minus = model.single_pair
        change, gain = Enclosure(self.change), Enclosure(self.gain)
        falls, rises = _sign(-self.change), _sign(self.gain)
        claims = [
            Claim(f"ln pi({name(plus)!r}) at u1 is below its start", falls, f"it changes by {change} nats"),
            Claim(f"ln pi({name(self.token)!r}) at u1 is above its start", rises, f"it changes by {gain} nats"),
        ]
        if loss is not None:
            claims.append(_reach_claim(model, loss, start.u0, self.u1))
        around = Box(model, start, self.margin, self.place) if falls and rises and (box or thorough) else None
        if box is not None:
            done = around is not None and around.certified(box)
            why = "by the mean value theorem" if done else "the bounds over this box do not decide it"
            claims.append(Claim(f"both hold for every W, h within {box:g}, entry by entry", done or None, why))
        displaces, course = _course(start, falls, low)
        return Certificate(
            preferred=name(plus),
            dispreferred=name(minus),
            token=name(self.token),
            V=model.V,
            d=model.d,
            eta_W=float(start.eta_W),
            eta_h=float(start.eta_h),
            loss=None if loss is None else repr(loss),
            start_margin=Enclosure(start.u0),
            margin=self.margin,
            start=Enclosure(self.log_start),
            change=change,
            gain=gain,
            claims=tuple(claims),
            displaces=displaces,
            course=course,
            lowest=None if low is None else Enclosure(low.log_prob),
            lowest_margin=None if low is None else Enclosure(low.margin),
            box=box,
            largest_box=(around.largest() if around is not None else 0.0) if thorough else None,
            bits=bits,
        )


def _reach_claim(model: UnconstrainedFeatures, loss: Loss, u0: Ball, u1: Ball) -> Claim:
    passed = passes(margin_form(model, loss), u0, u1)
    why = {
        True: "its slope G = -l' is positive on [u0, u1]",
        False: "its slope G = -l' is not positive at some margin in [u0, u1], so it stops or turns before",
        None: "the sign of G = -l' on [u0, u1] is not decided (a minimiser or a kink at u1?)",
    }[passed]
    return Claim(f"the flow of {loss!r} passes u1", passed, why)


def _course(start: Start, falls: bool | None, low: Lowest | None) -> tuple[bool | None, str]:
    """Whether ln pi(y+) is below its start anywhere on u > u0, and what is known of the whole path."""
    never = "ln pi(y+) is never below its start, for any margin loss that raises the margin"
    if start.eta_h == 0 or not start.A:
        return False, f"{never}: it does not fall with h frozen or with two tokens alone (proved)."
    if start.eta_W == 0:  # 1/pi(+) is a sum of exponentials of affine functions of u: convex
        if all(bool(b <= start.A2 / 2) for b in start.B):
            return False, f"{never}: W is frozen and no other token has r_z > 1 (proved)."
        if any(bool(b > start.A2 / 2) for b in start.B):
            return True, (
                "with W frozen 1/pi(y+) is convex in u and some token has r_z > 1: ln pi(y+) tends to -inf, and once "
                "below its start it stays below (proved)."
            )
        return True if falls else None, "with W frozen, whether some r_z exceeds 1 is undecided."
    if low is None:
        return True if falls else None, "only u1 was looked at."
    if low.at_start:
        return False, f"{never} (proved for every u >= u0)."
    where = f"the lowest ln pi(y+) over all u >= u0 is {Enclosure(low.log_prob)}, at margin {Enclosure(low.margin)}"
    if low.below_start:
        return True, f"{where} (proved)."
    return None, f"{where}; whether that is below the start is undecided."


def _sign(x: Ball) -> bool | None:
    """True: positive; False: zero or negative; None: undecided."""
    return True if x > 0 else False if x <= 0 else None


def _checked_token(model: UnconstrainedFeatures, token: int | str) -> int:
    index = token_index(token, model.tokens, "token")
    if not 0 <= index < model.V:
        raise ValueError(f"token must be a token index in [0, {model.V}), got {index}")
    return index


def _trough(flow: ExactFlow) -> float:
    """A margin, of few digits, where the float solution is low: at its trough, or before the end it only tends to."""
    found, u0, stop = flow.displacement(1), flow.start_margin, flow.stop_margin
    if flow.direction <= 0:
        raise ValueError(f"loss must raise the margin at the start (G > 0), got {flow.loss!r} at margin {u0:g}")
    if found.trough.kind == "trough":
        u = found.trough.margin
    elif math.isfinite(stop):
        u = u0 + 0.99 * (stop - u0)
    elif found.status == "none":
        u = u0 + 1.0
    else:  # lower and lower: the first of these margins with a nat lost, or the lowest
        tried = u0 + 2.0 ** np.arange(-10, 40)
        lost = flow.log_probs_at_margin(tried)[:, flow.model.single_pair[0]] - found.start.log_prob
        u = float(tried[np.argmax(lost < -1) if (lost < -1).any() else np.argmin(lost)])
    short = float(f"{u:.6g}")
    return short if u0 < short < stop else u


def _gainer(flow: ExactFlow, u1: float) -> int:
    """The token other than y+ whose probability rises most up to u1."""
    rise = np.diff(np.exp(flow.log_probs_at_margin([flow.start_margin, u1])), axis=0)[0]
    rise[flow.model.single_pair[0]] = -np.inf
    return int(rise.argmax())

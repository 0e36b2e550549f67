"""`check_loss` finds what is wrong with planted wrong losses, and says which claim, where and why."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import mpmath
import numpy as np
import pytest

import sims
from sims.cli import main
from theory import check_loss
from theory.check import place
from theory.check._base import FrozenOps, differences, digits_incentives, gap, pair
from theory.losses import (
    LOSSES,
    POSITIVE,
    SFT,
    Claims,
    Loss,
    MarginLoss,
    PerToken,
    Sum,
    TokenLoss,
    Weighted,
    get,
    parameter,
)
from theory.losses._base import MarginForm
from theory.losses._calibrated import Calibrated
from theory.losses._laws import LogisticSlope
from theory.losses.dpo import DPO


@dataclass(frozen=True)
class Wrong(MarginLoss):
    beta: float = parameter(0.5, POSITIVE)
    name = "wrong"
    reference = "planted"


@dataclass(frozen=True)
class NotDecreasing(Wrong):
    def formula(self, ops, y):
        return (self.beta * y.m - 1) ** 2

    def minimiser(self, u_ref):
        return u_ref + 1 / self.beta


@dataclass(frozen=True)
class NotConvex(Wrong):
    def formula(self, ops, y):
        return ops.sigmoid(-self.beta * y.m)


@dataclass(frozen=True)
class LosesDigits(Wrong):
    """Right, but formed from 1 - s, whose digits go where s nears 1, and those of its slope with them."""

    claims = Claims(convex=False)

    def formula(self, ops, y):
        return (1 - ops.sigmoid(self.beta * y.m)) ** 2


@dataclass(frozen=True)
class ForgetsTheReference(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.u)


@dataclass(frozen=True)
class Overflows(Wrong):
    def formula(self, ops, y):
        return -ops.log(ops.exp(self.beta * y.m) / (1 + ops.exp(self.beta * y.m)))


@dataclass(frozen=True)
class HasAKink(Wrong):
    def formula(self, ops, y):
        return ops.relu(1 - self.beta * y.m)

    def minimiser(self, u_ref):
        return u_ref + 1 / self.beta


@dataclass(frozen=True)
class SlopeTwiceTooLarge(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.m)

    def closed_slope(self, ops, y):
        return 2 * self.beta * ops.sigmoid(-self.beta * y.m)


@dataclass(frozen=True)
class SlopeOfWrongSign(SlopeTwiceTooLarge):
    def closed_slope(self, ops, y):
        return -self.beta * ops.sigmoid(-self.beta * y.m)


@dataclass(frozen=True)
class WrongMinimiser(NotDecreasing):
    claims = Claims(decreasing=False)

    def minimiser(self, u_ref):
        return u_ref + 1.3 / self.beta


@dataclass(frozen=True)
class HiddenMinimiser(NotDecreasing):
    claims = Claims(decreasing=False)

    def minimiser(self, u_ref):
        return None


@dataclass(frozen=True)
class WrongLaw(Wrong):
    def formula(self, ops, y):
        return ops.exp(-self.beta * y.m)

    def law(self, u_ref):
        return LogisticSlope(self.beta, u_ref)


@dataclass(frozen=True)
class NotOfTheMargin(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.m) - 0.1 * y.a


@dataclass(frozen=True)
class DeniesTooMuch(Wrong):
    claims = Claims(convex=False)

    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.m)


@dataclass(frozen=True)
class NegativeSomewhere(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.m) - self.beta * y.m


@dataclass(frozen=True)
class ReferenceSignFlipped(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.m)

    def closed_slope(self, ops, y):
        return self.beta * ops.sigmoid(-self.beta * (y.u + y.u_ref))


@dataclass(frozen=True)
class Raises(Wrong):
    def formula(self, ops, y):
        return ops.logsigmoid(self.beta * y.m)


@dataclass(frozen=True)
class ReturnsNothing(Wrong):
    def formula(self, ops, y):
        -ops.log_sigmoid(self.beta * y.m)


@dataclass(frozen=True)
class ReturnsATuple(Wrong):
    def formula(self, ops, y):
        return (-ops.log_sigmoid(self.beta * y.m),)


@dataclass(frozen=True)
class ReturnsText(Wrong):
    def formula(self, ops, y):
        return "-ln sigmoid"


@dataclass(frozen=True)
class UsesNumpy(Wrong):
    """Runs on arrays, and on nothing else."""

    def formula(self, ops, y):
        return np.logaddexp(0.0, -self.beta * y.m)

    def latex(self):
        return "x"


@dataclass(frozen=True)
class Constant(Wrong):
    """Right, if of no use."""

    claims = Claims(reference_free=True)

    def formula(self, ops, y):
        return 0 * y.u + self.beta


@dataclass(frozen=True)
class InfiniteSlope(Wrong):
    """ln |G| is a sum of two parts that overflow."""

    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.m)

    def closed_slope(self, ops, y):
        return self.beta * ops.sigmoid(-self.beta * y.m)

    def closed_log_slope(self, ops, y):
        z = self.beta * y.m
        return ops.log(self.beta) - z - ops.log(1 + ops.exp(z)) + z + ops.exp(z) - ops.exp(z)


@dataclass(frozen=True)
class LogSlopeUnderflows(SlopeTwiceTooLarge):
    """Right wherever float64 can see the slope, and -inf where it cannot."""

    def closed_slope(self, ops, y):
        return self.beta * ops.sigmoid(-self.beta * y.m)

    def closed_log_slope(self, ops, y):
        return ops.log(self.beta * ops.sigmoid(-self.beta * y.m))


@dataclass(frozen=True)
class LogSlopeOfAnother(LogSlopeUnderflows):
    def closed_log_slope(self, ops, y):
        return ops.log(self.beta) + 2 * ops.log_sigmoid(-self.beta * y.m)


@dataclass(frozen=True)
class NoName(Wrong):
    name = ""

    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.m)


@dataclass(frozen=True)
class ParameterWithoutDomain(Wrong):
    weight: float = 1.0

    def formula(self, ops, y):
        return -self.weight * ops.log_sigmoid(self.beta * y.m)


@dataclass
class NotFrozen(MarginLoss):
    name = "not_frozen"
    reference = "planted"

    def formula(self, ops, y):
        return -ops.log_sigmoid(0.5 * y.m)


@dataclass(frozen=True)
class AddsTheReference(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * (y.u + y.u_ref))


@dataclass(frozen=True)
class BetaLeftOutOfTheReference(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.u - y.u_ref)


@dataclass(frozen=True)
class Swapped(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(-self.beta * y.m)


@dataclass(frozen=True)
class LooksAtLengths(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.m / y.n_w)


@dataclass(frozen=True)
class Counts(Wrong):
    """Keeps count of its calls."""

    calls = []  # noqa: RUF012

    def formula(self, ops, y):
        self.calls.append(0)
        return -ops.log_sigmoid(self.beta * y.m) / len(self.calls)


@dataclass(frozen=True)
class SumsTheBatch(Wrong):
    def formula(self, ops, y):
        value = -ops.log_sigmoid(self.beta * y.m)
        return value.sum() if hasattr(value, "sum") else value


@dataclass(frozen=True)
class CentresTheBatch(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * (y.m - ops.mean(y.m) / 2))


@dataclass(frozen=True)
class NoExamples(Wrong):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * y.m)

    @classmethod
    def examples(cls):
        return ()


@dataclass(frozen=True)
class LogSlopeOffByBeta(LogSlopeUnderflows):
    def closed_log_slope(self, ops, y):
        return ops.log_sigmoid(-self.beta * y.m)


# ---- of the two log-probabilities


@dataclass(frozen=True)
class WrongPair(Loss):
    """-ln s(z) with z = beta (da - db/2), with one thing wrong."""

    beta: float = parameter(0.5, POSITIVE)
    name = "wrong_pair"
    reference = "planted"

    def formula(self, ops, y):
        return -ops.log_sigmoid(self.z(y))

    def z(self, y):
        return self.beta * (y.da - y.db / 2)


@dataclass(frozen=True)
class PairSwapped(WrongPair):
    def z(self, y):
        return self.beta * (y.db / 2 - y.da)


@dataclass(frozen=True)
class PairPushesDownFarOut(WrongPair):
    def formula(self, ops, y):
        return (y.da - 2) ** 2 + ops.exp(y.db)

    def minimum(self, y):
        return None


@dataclass(frozen=True)
class PairConcave(WrongPair):
    def formula(self, ops, y):
        return ops.sigmoid(-self.z(y))


@dataclass(frozen=True)
class PairKink(WrongPair):
    def formula(self, ops, y):
        return ops.relu(-y.da) + ops.softplus(self.beta * y.db)


@dataclass(frozen=True)
class PairNegative(WrongPair):
    def formula(self, ops, y):
        return -y.a + y.b


@dataclass(frozen=True)
class PairOverflows(WrongPair):
    def formula(self, ops, y):
        # softplus, plus a zero that overflows.
        z = self.z(y)
        return ops.softplus(-z) + ops.detach(ops.log(1 + ops.exp(z)) - ops.softplus(z))


@dataclass(frozen=True)
class PairNaN(WrongPair):
    def formula(self, ops, y):
        return -ops.log(ops.exp(self.z(y)) / (1 + ops.exp(self.z(y))))


@dataclass(frozen=True)
class PairAddsReferences(WrongPair):
    def z(self, y):
        return self.beta * (y.a + y.a_ref - (y.b + y.b_ref) / 2)


@dataclass(frozen=True)
class PairSwapsReferences(WrongPair):
    def z(self, y):
        return self.beta * (y.a - y.b_ref - (y.b - y.a_ref) / 2)


@dataclass(frozen=True)
class PairForgetsReference(WrongPair):
    def z(self, y):
        return self.beta * (y.a - y.b / 2)


@dataclass(frozen=True)
class PairSaysReferenceFree(WrongPair):
    claims = Claims(reference_free=True)


@dataclass(frozen=True)
class PairSwapsLengths(WrongPair):
    def z(self, y):
        return self.beta * (y.da / y.n_l - y.db / y.n_w)


@dataclass(frozen=True)
class PairDeniesTooMuch(WrongPair):
    claims = Claims(decreasing=False)


@dataclass(frozen=True)
class Bowl(WrongPair):
    """Least at da = -1, db = -2."""

    claims = Claims(decreasing=False)

    def formula(self, ops, y):
        return (y.da + 1) ** 2 + (y.db + 2) ** 2

    def minimum(self, y):
        return y.a_ref - 1, y.b_ref - 2


@dataclass(frozen=True)
class BowlWrongMinimum(Bowl):
    def minimum(self, y):
        return y.a_ref - 1, y.b_ref + 2


@dataclass(frozen=True)
class BowlSaddle(Bowl):
    """Stationary where it says, and not least."""

    claims = Claims(decreasing=False, convex=False, nonnegative=False)

    def formula(self, ops, y):
        return (y.da + 1) ** 2 - (y.db + 2) ** 2


@dataclass(frozen=True)
class BowlHidesMinimum(Bowl):
    def minimum(self, y):
        return None


@dataclass(frozen=True)
class WrongMarginForm(WrongPair):
    """Per token; its form forgets the length."""

    def z(self, y):
        return self.beta * (y.da / y.n_w - y.db / y.n_l)

    def margin(self, sample):
        same = len(sample.preferred) == len(sample.dispreferred)
        return MarginForm(DPO(self.beta), sample.reference_margin) if same else None


@dataclass(frozen=True)
class PythonAbs(WrongPair):
    """Digits see another formula than arrays."""

    def formula(self, ops, y):
        extra = 0.01 if isinstance(y.a, mpmath.mpf) else 0.0
        return -ops.log_sigmoid(self.z(y)) + extra


# ---- of a batch


@dataclass(frozen=True)
class WrongBatch(WrongPair):
    coupled = True


@dataclass(frozen=True)
class BatchInOrder(WrongBatch):
    def formula(self, ops, y):
        weight = np.arange(1.0, np.shape(y.a)[-1] + 1) if np.ndim(y.a) else 1.0
        return -ops.log_sigmoid(self.z(y)) * (weight if ops is not sim_torch(ops) else y.a.new_tensor(weight))


def sim_torch(ops):
    return ops if type(ops).__name__ == "TorchOps" else None


@dataclass(frozen=True)
class BatchesMix(WrongBatch):
    """Averages over every axis, not the last alone."""

    def formula(self, ops, y):
        mean = y.da.mean() if hasattr(y.da, "mean") else y.da
        return -ops.log_sigmoid(self.z(y) - mean / 4)


@dataclass(frozen=True)
class BatchPushesBack(WrongBatch):
    """DPO for a sample alone; beside others, a margin above their mean is pushed down."""

    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * (3 * ops.mean(y.m) - 2 * y.m))


@dataclass(frozen=True)
class BatchNegative(WrongBatch):
    """Never negative for a sample alone."""

    claims = Claims(decreasing=False)

    def formula(self, ops, y):
        return -ops.log_sigmoid(self.z(y)) - 0.1 * (y.m - ops.mean(y.m)) ** 2


@dataclass(frozen=True)
class BatchCentred(WrongBatch):
    """Right: what is subtracted is constant for the gradient, and 0 for a sample alone (as is its reference then)."""

    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * (y.m - ops.detach(ops.mean(y.m))))


@dataclass(frozen=True)
class BatchSaysReferenceFree(BatchCentred):
    claims = Claims(reference_free=True)


@dataclass(frozen=True)
class BatchOfStrangers(WrongBatch):
    """Coupled in name only."""


@dataclass(frozen=True)
class BatchGradientLost(WrongBatch):
    """torch's gradient stops where numpy's value does not."""

    def formula(self, ops, y):
        m = ops.mean(y.da)
        return -ops.log_sigmoid(self.z(y) - (m.detach() if hasattr(m, "detach") else m) / 4)


# ---- of tokens


@dataclass(frozen=True)
class WrongTokens(TokenLoss):
    beta: float = parameter(0.5, POSITIVE)
    name = "wrong_tokens"
    reference = "planted"
    tex = "t"

    def z(self, y):
        w, l = y.responses[:2]
        return self.beta * ((w.log_prob - w.ref).sum(-1) - (l.log_prob - l.ref).sum(-1))

    def formula(self, ops, y):
        return -ops.log_sigmoid(self.z(y))


@dataclass(frozen=True)
class TokensSwapped(WrongTokens):
    def z(self, y):
        return -WrongTokens.z(self, y)


@dataclass(frozen=True)
class TokensOverflow(WrongTokens):
    def formula(self, ops, y):
        return -ops.log(ops.exp(self.z(y)) / (1 + ops.exp(self.z(y))))


@dataclass(frozen=True)
class TokensOfOneSample(WrongTokens):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.z(y).sum())


@dataclass(frozen=True)
class TokensGradientLost(WrongTokens):
    def formula(self, ops, y):
        z = self.z(y)
        return -ops.log_sigmoid(z) - 0.3 * (z.detach() if hasattr(z, "detach") else z)


@dataclass(frozen=True)
class TokensWithoutReference(WrongTokens):
    def formula(self, ops, y):
        return -ops.log_sigmoid(self.beta * (y.responses[0].log_prob.sum(-1) - y.responses[1].log_prob.sum(-1)))


@dataclass(frozen=True)
class TokensConcave(WrongTokens):
    def formula(self, ops, y):
        return ops.sigmoid(-self.z(y)) - 0.2


@dataclass(frozen=True)
class TokensAddReference(WrongTokens):
    def z(self, y):
        w, l = y.responses[:2]
        return self.beta * ((w.log_prob + w.ref).sum(-1) - (l.log_prob + l.ref).sum(-1))


@dataclass(frozen=True)
class TokensAddOneReference(WrongTokens):
    def z(self, y):
        w, l = y.responses[:2]
        return self.beta * ((w.log_prob - w.ref).sum(-1) - (l.log_prob + l.ref).sum(-1))


@dataclass(frozen=True)
class TokensForgetBeta(WrongTokens):
    def z(self, y):
        w, l = y.responses[:2]
        return self.beta * (w.log_prob.sum(-1) - l.log_prob.sum(-1)) - (w.ref.sum(-1) - l.ref.sum(-1))


@dataclass(frozen=True)
class TokensPerToken(WrongTokens):
    """Right."""

    def z(self, y):
        w, l = y.responses[:2]
        return self.beta * (w.log_ratio.sum(-1) / w.n - l.log_ratio.sum(-1) / l.n)


@dataclass(frozen=True)
class TokensSwapLengths(WrongTokens):
    def z(self, y):
        w, l = y.responses[:2]
        return self.beta * (w.log_ratio.sum(-1) / l.n - l.log_ratio.sum(-1) / w.n)


@dataclass(frozen=True)
class TokensOfMargin(WrongTokens):
    """Right."""

    def margin(self, sample):
        return MarginForm(DPO(self.beta), sample.reference_margin)


@dataclass(frozen=True)
class TokensOfMarginAndKL(TokensOfMargin):
    def z(self, y):
        return self.beta * (y.pair.m - 2 * (y.responses[1].kl.sum(-1) - y.responses[0].kl.sum(-1)))


@dataclass(frozen=True)
class TokensOfAnotherMargin(TokensOfMargin):
    def z(self, y):
        return 2 * self.beta * y.pair.m


@dataclass(frozen=True)
class TokensHinge(WrongTokens):
    def formula(self, ops, y):
        return ops.relu(1 - self.z(y))


@dataclass(frozen=True)
class TokensHingeSaid(TokensHinge):
    """Right."""

    claims = Claims(differentiable=False)


@dataclass(frozen=True)
class TokensCoupled(WrongTokens):
    coupled = True


@dataclass(frozen=True)
class TokensUnprinted(WrongTokens):
    tex = ""


PLANTED = {
    NotDecreasing: ("decreasing", "the slope points up"),
    NotConvex: ("convex", "the loss is concave"),
    LosesDigits: ("ln|G| far out agrees with many digits", "define closed_slope"),
    ForgetsTheReference: ("reference_free", "the loss ignores the reference, but the claim is False"),
    Overflows: ("no NaN up to margins of 1e4", "use log_sigmoid, softplus or expm1"),
    HasAKink: ("differentiable", "claimed differentiable; largest jump of the slope 0.5"),
    SlopeTwiceTooLarge: ("slopes: closed form, autodiff, 40 digits", "closed_slope is 2 times the derivative"),
    SlopeOfWrongSign: ("slopes: closed form, autodiff, 40 digits", "closed_slope has the wrong sign"),
    ReferenceSignFlipped: ("slopes: closed form, autodiff, 40 digits", "right at u_ref = 0, wrong at u_ref = 0.37"),
    WrongMinimiser: ("the slope is 0 at the declared", "G ="),
    HiddenMinimiser: ("zeros of the slope are declared", "declare it in minimiser() or zeros()"),
    WrongLaw: ("slope follows LogisticSlope", "worst"),
    NotOfTheMargin: ("depends on the margin alone", "derive from Loss"),
    DeniesTooMuch: ("convex", "no counter-example was found"),
    NegativeSomewhere: ("non-negative", "l < 0"),
    Raises: ("formula", "AttributeError"),
    ReturnsNothing: ("the formula gives a number", "it returned None: is `return` missing?"),
    ReturnsATuple: ("the formula gives a number", "it returned a tuple of 1"),
    ReturnsText: ("the formula gives a number", "it returned '-ln sigmoid', not a real number"),
    UsesNumpy: ("values", "formula may use only arithmetic and ops.*"),
    InfiniteSlope: ("ln|G| is never NaN or inf", "nan at u = "),
    LogSlopeUnderflows: ("ln|G| far out agrees with many digits", "-inf, by many digits"),
    LogSlopeOfAnother: ("closed_log_slope is ln|closed_slope|", "worst"),
    NoName: ("name", "set the class attribute `name`"),
    ParameterWithoutDomain: ("parameters have domains", "no domain: weight"),
    NotFrozen: ("frozen dataclass", "decorate the class with @dataclass(frozen=True)"),
    AddsTheReference: ("the reference is subtracted", "depends on u_ref with the wrong sign"),
    BetaLeftOutOfTheReference: ("the reference is subtracted", "beta multiplies u and not u_ref"),
    Swapped: ("decreasing", "y+ and y- swapped?"),
    LooksAtLengths: ("depends on the margin alone", "other lengths (7 and 2 tokens)"),
    Counts: ("no memory", "the formula keeps state"),
    SumsTheBatch: ("an array of samples", "the formula sums or averages"),
    CentresTheBatch: ("an array of samples", "set coupled = True"),
    NoExamples: ("examples", "must return instances"),
    LogSlopeOffByBeta: ("closed_log_slope is ln|closed_slope|", "off by ln 2 everywhere"),
    PairSwapped: ("decreasing", "y+ and y- swapped?"),
    PairPushesDownFarOut: ("decreasing", "the loss pushes y+ down (d_w = "),
    PairConcave: ("convex", "the loss is concave at a = "),
    PairKink: ("differentiable", "d_w jumps by 1 at a = -3.1"),
    PairNegative: ("nonnegative", "< 0 at a = "),
    PairOverflows: ("values and incentives far out", "use log_sigmoid, softplus or expm1"),
    PairNaN: ("no NaN up to margins of 1e4", "use log_sigmoid, softplus or expm1"),
    PairAddsReferences: ("the references are subtracted", "both references are added, not subtracted"),
    PairSwapsReferences: ("the references are subtracted", "the references of y+ and y- are swapped"),
    PairForgetsReference: ("reference_free", "the loss ignores the reference, but the claim is False"),
    PairSaysReferenceFree: ("reference_free", "the loss depends on the reference, at a = "),
    PairSwapsLengths: ("lengths", "ln pi(y+) is divided by |y-|"),
    PairDeniesTooMuch: ("decreasing", "set decreasing=True"),
    BowlWrongMinimum: ("least at (-4.1, -2.7)", "not stationary there: d_w = "),
    BowlSaddle: ("least at (-4.1, -6.7)", "the loss is smaller"),
    BowlHidesMinimum: ("no undeclared minimum", "least at a = -32, b = -26 "),
    WrongMarginForm: ("margin(sample) is the loss", "the form's slope"),
    PythonAbs: ("numpy, torch and 50 digits agree", "numpy at a = "),
    BatchInOrder: ("a batch has no order", "another order changes the mean"),
    BatchesMix: ("batches stay apart", "average along the last axis alone"),
    BatchPushesBack: ("decreasing", "beside others with m = "),
    BatchNegative: ("nonnegative", "< 0 in a batch with m = "),
    BatchSaysReferenceFree: ("reference_free", "the loss depends on the reference, at a batch with m = "),
    BatchOfStrangers: ("coupled", "drop `coupled`"),
    BatchGradientLost: ("gradient of the batch", "d/da of sample"),
    TokensSwapped: ("decreasing", "the loss pushes a token of y+ down at group"),
    TokensOverflow: ("no NaN up to margins of 1e4", "NaN at u = "),
    TokensOfOneSample: ("an array of samples", "sum over tokens (-1) only"),
    TokensGradientLost: ("gradients: autodiff, differences", "entry"),
    TokensWithoutReference: ("reference_free", "the loss ignores the reference, but the claim is False"),
    TokensConcave: ("convex", "the loss is concave at group"),
    TokensAddReference: ("the references are subtracted", "the reference of y+ has the wrong sign"),
    TokensAddOneReference: ("the references are subtracted", "the reference of y- has the wrong sign"),
    TokensForgetBeta: ("the references are subtracted", "the reference of y+ is not multiplied by beta"),
    TokensSwapLengths: ("lengths", "ln pi(y+) is divided by |y-|"),
    TokensOfMarginAndKL: ("margin(sample) is the loss", "the loss looks at kl as well"),
    TokensOfAnotherMargin: ("margin(sample) is the loss", "for 2 and 2 tokens they differ by "),
    TokensHinge: ("differentiable", "claimed, but the slope jumps by "),
    TokensCoupled: ("coupled", "has no batch"),
    TokensUnprinted: ("LaTeX", "set the class attribute `tex`"),
}

# What is wrong with one thing only must fail in one thing only: no second diagnosis misleads.
ONE_FAULT = [
    AddsTheReference, BetaLeftOutOfTheReference, NoExamples, PairConcave, PairKink, PairForgetsReference,
    PairAddsReferences, PairSwapsReferences, PairSaysReferenceFree, PairSwapsLengths, PairDeniesTooMuch, BowlHidesMinimum,
    WrongMarginForm, BatchInOrder, BatchOfStrangers, TokensSwapped, TokensOfOneSample,
    TokensWithoutReference, TokensUnprinted, TokensAddReference, TokensAddOneReference, TokensForgetBeta,
    TokensSwapLengths, TokensOfMarginAndKL, TokensOfAnotherMargin, TokensHinge, TokensCoupled, BatchPushesBack,
    BatchNegative, BatchSaysReferenceFree, ReturnsNothing, ReturnsATuple, ReturnsText,
]  # fmt: skip


@pytest.mark.parametrize(("planted", "expected"), PLANTED.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_each_planted_fault_is_named(planted, expected):
    check, words = expected
    report = check_loss(planted())
    assert not report.ok
    named = [c for c in report.failures if c.name.startswith(check)]
    assert named, str(report)
    assert any(words in c.detail for c in named), str(report)
    with pytest.raises(AssertionError, match="FAILED"):
        report.raise_if_failed()


def test_an_error_in_the_formula_is_explained_once():
    details = [c.detail for c in check_loss(UsesNumpy()).failures]
    assert len(details) > 1
    assert sum("formula may use only" in d for d in details) == 1


def test_a_right_loss_passes_and_the_report_reads_well():
    report = check_loss(DPO(beta=0.3))
    assert report
    report.raise_if_failed()
    assert str(report).startswith("DPO(beta=0.3): all of ")
    assert "ok   convex" in str(report)
    assert "<table>" in report._repr_html_()


@pytest.mark.parametrize("planted", ONE_FAULT, ids=lambda c: c.__name__)
def test_one_fault_has_one_diagnosis(planted):
    failures = check_loss(planted()).failures
    assert {c.name.split(" (")[0] for c in failures} == {failures[0].name.split(" (")[0]}, failures


RIGHT = [
    WrongPair(), Bowl(), WrongTokens(), replace(WrongPair(), beta=2.0), BatchCentred(), TokensPerToken(), TokensOfMargin(),
    TokensHingeSaid(), Constant(),
]  # fmt: skip


@pytest.mark.parametrize("right", RIGHT, ids=repr)
def test_what_the_faults_are_planted_in_passes(right):
    check_loss(right).raise_if_failed()


@pytest.mark.parametrize(
    "loss",
    [
        get("slic", delta=0.05),
        get("rebel", eta=0.023, reward_gap=-0.62),
        get("nca", beta=0.0012),
        get("cpo", beta=0.0019, eps=0.033),
        get("aot_unpaired", beta=0.0015, eps=0.008),
        get("simpo", beta=0.0345, gamma=11.6, eps=0.41),
        get("exo", beta=0.3, eps=0.49),
        get("alphapo", beta=0.45, gamma=0.0014, alpha=7.5),
        get("sparse_po", beta=1.37, lam_u=9.7, lam_d=14.6),
    ],
    ids=repr,
)
def test_unusual_parameters_are_looked_at_on_their_own_scale(loss):
    check_loss(loss).raise_if_failed()


def test_claims_of_a_batch_say_where_they_were_tried():
    details = {c.name: c.detail for c in check_loss(BatchCentred()).checks}
    assert details["convex"] == "claimed, holds (in a batch of one)"
    assert details["differentiable"] == "claimed, holds (in a batch of one)"
    assert details["decreasing"] == details["nonnegative"] == "claimed, holds"


@pytest.mark.parametrize(
    "loss",
    [
        SFT(get("dpo"), 0.3),
        SFT(get("ipo"), 0.3, per="token"),
        SFT(get("dpo"), 0.3, per="batch_token"),
        SFT(get("chi_po"), 0.3, per="batch_token"),
        PerToken(get("ipo")),
        Weighted(get("gpo_hinge"), 1.0, 2.0),
        Weighted(get("dpo"), 0.4, 0.4),
        Sum((get("slic"), get("dpo")), (1.0, 0.3)),
        Calibrated(SFT(get("dpo"), 0.3)),
    ],
    ids=repr,
)
def test_combinators_pass(loss):
    report = check_loss(loss)
    assert report.ok, str(report)
    assert len(report.checks) > 15


@pytest.mark.parametrize("cls", LOSSES.values(), ids=LOSSES)
def test_every_registered_example_passes(cls):
    for loss in cls.examples():
        check_loss(loss).raise_if_failed()


@pytest.mark.parametrize("thing", [DPO, "dpo", None])
def test_only_instances_are_checked(thing):
    with pytest.raises(ValueError, match="loss must be"):
        check_loss(thing)


# ---- the tools themselves


def test_digits_differentiate_in_both_log_probabilities():
    y = pair(0.41, 0.37)
    d_w, d_l = digits_incentives(Bowl(), y)
    assert float(d_w) == pytest.approx(-2 * (y.da + 1), rel=1e-15)
    assert float(d_l) == pytest.approx(2 * (y.db + 2), rel=1e-15)


def test_differences_hold_what_is_detached():
    x = np.array([0.3, -1.2])
    seen = differences(lambda ops, v: v**3 * ops.detach(v), x)
    np.testing.assert_allclose(seen, 3 * x**3, rtol=1e-8)  # not 4 x^3
    assert FrozenOps().exp(0.0) == 1.0


def test_a_wrong_infinity_is_an_infinite_gap():
    assert gap(np.inf, mpmath.mpf(10) ** 400, 1.0) == 0
    assert gap(np.inf, 3, 1.0) == gap(np.nan, 3, 1.0) == gap(3.0, mpmath.inf, 1.0) == np.inf
    assert gap(3.0, mpmath.mpf(4), 0.0) == 0.25


def test_points_are_log_probabilities():
    for u in (-9.0, 0.0, 4.0):
        y = pair(u, 0.37)
        assert max(y[:4]) < 0
        assert y.u == pytest.approx(u)
        assert y.u_ref == pytest.approx(0.37)


@pytest.mark.parametrize(
    ("loss", "kind", "low", "high"),
    [
        (get("dpo"), "margin", 1.0, 1.0),
        (get("slic"), "margin", 1.0, 1.0),
        (Weighted(get("dpo"), 3.0, 2.0), "constant ratio", 1.5, 1.5),
        (PerToken(get("dpo")), "constant ratio", 2 / 7, 5 / 3),
        (SFT(get("ipo"), 0.3), "two-likelihood", None, None),
        (WrongTokens(), "token", None, None),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_place_is_the_class_of_the_incentive_ratio(loss, kind, low, high):
    seen = place(loss)
    assert seen.kind == kind
    assert seen.to_dict()["kind"] == kind
    if low is not None:
        assert (seen.low, seen.high) == (pytest.approx(low), pytest.approx(high))
        assert "r = d_w/d_l in [" in str(seen)
    if kind == "token":
        assert seen.low is None
        assert str(seen).startswith("token: ")


# ---- the command


TEMPLATE = Path(sims.__file__).parent / "templates" / "my_loss.py"


def test_the_template_passes_and_is_placed(capsys):
    assert main(["check-loss", str(TEMPLATE)]) == 0
    text = capsys.readouterr().out
    assert text.count("all of ") == 2
    assert text.count("place: margin, r = d_w/d_l in [1, 1]") == 2
    assert main(["check-loss", "--template"]) == 0
    assert capsys.readouterr().out == TEMPLATE.read_text(encoding="utf-8")


def test_a_wrong_loss_exits_with_1_and_says_why(tmp_path, capsys):
    file = tmp_path / "mine.py"
    text = TEMPLATE.read_text(encoding="utf-8").replace("-self.beta * y.m", "self.beta * y.m")
    file.write_text(text + "\n\nclass Other(MyLoss):\n    name = 'other'\n")
    assert main(["check-loss", str(file), "--class", "my_loss", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["loss"] for row in rows] == ["MyLoss(beta=0.1)", "MyLoss(beta=0.7)"]
    assert all(not row["ok"] and row["place"] is None for row in rows)
    assert any("y+ and y- swapped?" in c["detail"] for c in rows[0]["checks"] if not c["ok"])
    assert main(["check-loss", str(file)]) == 1
    text = capsys.readouterr().out
    assert "FAIL frozen dataclass" in text  # Other is not decorated
    assert "place:" not in text


def test_examples_that_fail_are_a_failed_check(tmp_path, capsys):
    file = tmp_path / "mine.py"
    text = TEMPLATE.read_text(encoding="utf-8")
    file.write_text(text.replace("return (cls(), cls(beta=0.7))", "return (cls(beta=-1),)"))
    assert main(["check-loss", str(file)]) == 1
    assert "examples() raised ValueError: MyLoss.beta must be in (0, inf]" in capsys.readouterr().out.replace(
        "inf)", "inf]"
    )
    file.write_text(text.replace("return (cls(), cls(beta=0.7))", "return ()"))
    assert main(["check-loss", str(file)]) == 1
    assert "examples() returned nothing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\nclass A:\n", "line 2: expected an indented block"),
        ("x = 1\n\ny = x / 0\n", "line 3: ZeroDivisionError"),
        ("import no_such_module\n", "line 1: ModuleNotFoundError"),
        ("import sys\nsys.exit(0)\n", "line 2: SystemExit: 0"),
        ("from theory.losses import MarginLoss\n", "defines no loss"),
        ("from theory.losses import Loss\nclass _Mine(Loss): ...\n", "defines no loss"),
        (TEMPLATE.read_text(encoding="utf-8"), "unknown loss 'MyLos'; did you mean 'MyLoss'?"),
    ],
)
def test_a_file_without_the_loss_exits_with_2(source, words, tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(source)
    assert main(["check-loss", str(file), "--class", "MyLos"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_relative_path_has_line_numbers_too(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("\nimport no_such_module\n")
    monkeypatch.chdir(tmp_path)
    assert main(["check-loss", "mine.py"]) == 2
    assert "line 2: ModuleNotFoundError" in capsys.readouterr().err


def test_usage_of_the_command(tmp_path, capsys):
    assert main(["check-loss"]) == 2
    assert "file must be given" in capsys.readouterr().err
    assert main(["check-loss", str(tmp_path / "none.py")]) == 2
    assert "no such file" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("x")
    assert main(["check-loss", str(tmp_path / "notes.txt")]) == 2
    assert "must be a Python file" in capsys.readouterr().err

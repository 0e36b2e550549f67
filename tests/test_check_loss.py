"""`check_loss` finds what is wrong with planted wrong losses, and says which claim, where and why."""

from dataclasses import dataclass

import pytest

from theory import check_loss
from theory.losses import LOSSES, POSITIVE, Claims, MarginLoss, parameter
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


PLANTED = {
    NotDecreasing: ("decreasing", "the slope points up"),
    NotConvex: ("convex", "the loss is concave"),
    ForgetsTheReference: ("reference_free", "the loss ignores the reference, but the claim is False"),
    Overflows: ("no NaN up to margins of 1e4", "use log_sigmoid, softplus or expm1"),
    HasAKink: ("differentiable", "claimed differentiable; largest jump of the slope 0.5"),
    SlopeTwiceTooLarge: ("slopes: closed form, autodiff, 40 digits", "slope at u ="),
    SlopeOfWrongSign: ("slopes: closed form, autodiff, 40 digits", "slope at u ="),
    ReferenceSignFlipped: ("slopes: closed form, autodiff, 40 digits", "u_ref = 0.37"),
    WrongMinimiser: ("the slope is 0 at the declared", "G ="),
    HiddenMinimiser: ("zeros of the slope are declared", "declare it in minimiser() or zeros()"),
    WrongLaw: ("slope follows LogisticSlope", "worst"),
    NotOfTheMargin: ("depends on the margin alone", "derive from Loss"),
    DeniesTooMuch: ("convex", "no counter-example was found"),
    NegativeSomewhere: ("non-negative", "l < 0"),
    Raises: ("values", "AttributeError"),
    LogSlopeUnderflows: ("ln|G| far out agrees with many digits", "-inf, by many digits"),
    LogSlopeOfAnother: ("closed_log_slope is ln|closed_slope|", "worst"),
    NoName: ("name", "set the class attribute `name`"),
    ParameterWithoutDomain: ("parameters have domains", "no domain: weight"),
    NotFrozen: ("frozen dataclass", "decorate the class with @dataclass(frozen=True)"),
}


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


def test_a_right_loss_passes_and_the_report_reads_well():
    report = check_loss(DPO(beta=0.3))
    assert report
    report.raise_if_failed()
    assert str(report).startswith("DPO(beta=0.3): all of ")
    assert "ok   convex" in str(report)
    assert "<table>" in report._repr_html_()


def test_every_registered_example_passes():
    for cls in LOSSES.values():
        for loss in cls.examples():
            check_loss(loss).raise_if_failed()


@pytest.mark.parametrize("thing", [DPO, "dpo", None])
def test_only_instances_are_checked(thing):
    with pytest.raises(ValueError, match="loss must be"):
        check_loss(thing)

"""The loss that a configuration of TRL's trainers really optimises."""

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from theory._check import REAL, check_number, unknown
from theory.losses._base import Claims, Loss, MarginLoss, Pair
from theory.losses._combine import SFT, Combined, PerToken, Sum
from theory.losses._links import Alpha, FDivergence, difference
from theory.losses._tokenwise import LD, WPOWeighted
from theory.losses.aot import AOT, AOTUnpaired
from theory.losses.apo import APODown, APOZero
from theory.losses.bco import BCO, BCOPair
from theory.losses.cdpo import CDPO
from theory.losses.cpo import CPO
from theory.losses.discopop import DiscoPOP
from theory.losses.dpo import DPO
from theory.losses.dpo_norm import DPONorm, IPONorm
from theory.losses.exo import EXO
from theory.losses.gpo import GPOHinge
from theory.losses.ipo import IPO
from theory.losses.kto import KTO, APOZeroUnpaired
from theory.losses.nca import NCA
from theory.losses.nll import NLL
from theory.losses.orpo import ORPOPrompt
from theory.losses.robust import Robust
from theory.losses.simpo import AlphaPO, SimPO
from theory.losses.sppo import SPPOHard
from theory.ops import Ops

Options = dict[str, Any]

# What each trainer's options are called and default to, the ones that change the loss and the side inputs named below.
DEFAULTS: dict[str, Options] = {
    "dpo": {
        "beta": 0.1,
        "loss_weights": None,
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "ld_alpha": None,
        "use_weighting": False,
        "discopop_tau": 0.05,
    },
    "cpo": {"beta": 0.1, "label_smoothing": 0.0, "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0},
    "orpo": {"beta": 0.1, "n_prompt": 1, "logp_prompt": 0.0},
    "kto": {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0, "z0": 0.0},
    "bco": {"beta": 0.1, "delta": 0.0},
}

# What earlier versions of TRL had as options.
ELSEWHERE = {
    "rpo_alpha": 'loss_type=["sigmoid", "sft"] with loss_weights=[1.0, rpo_alpha] in this version of TRL',
    "reference_free": "no option of this version of TRL; reference-free losses: cpo, simpo, orpo, slic",
}

# DPOTrainer: the class of each loss_type, and which option is which of its parameters.
DPO_LOSSES: dict[str, tuple[Any, dict[str, str]]] = {
    "sigmoid": (DPO, {"beta": "beta"}),
    "hinge": (GPOHinge, {"beta": "beta"}),
    "ipo": (IPONorm, {"beta": "beta"}),
    "exo_pair": (EXO, {"beta": "beta", "label_smoothing": "eps"}),
    "nca_pair": (NCA, {"beta": "beta"}),
    "robust": (Robust, {"beta": "beta", "label_smoothing": "eps"}),
    "bco_pair": (BCOPair, {"beta": "beta"}),
    "sppo_hard": (SPPOHard, {"beta": "beta"}),
    "aot": (AOT, {"beta": "beta", "label_smoothing": "eps"}),
    "aot_unpaired": (AOTUnpaired, {"beta": "beta", "label_smoothing": "eps"}),
    "apo_zero": (APOZero, {"beta": "beta"}),
    "apo_down": (APODown, {"beta": "beta"}),
    "discopop": (DiscoPOP, {"beta": "beta", "discopop_tau": "tau"}),
    "sft": (partial(NLL, "batch_token"), {}),
    "sigmoid_norm": (DPONorm, {"beta": "beta"}),
}
DIVERGENCES = {
    "reverse_kl": "reverse_kl",
    "forward_kl": "forward_kl",
    "js_divergence": "js",
    "alpha_divergence": "alpha",
}
WITH_DIVERGENCE = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"}

LOSS_TYPES = {
    "dpo": tuple(DPO_LOSSES),
    "cpo": ("sigmoid", "hinge", "ipo", "simpo", "alphapo"),
    "orpo": ("orpo",),
    "kto": ("kto", "apo_zero_unpaired"),
    "bco": ("bco",),
}


def from_trl(loss_type: str | Sequence[str], *, trainer: str = "dpo", **config: Any) -> Loss:
    """The loss that TRL optimises under this configuration; checked against TRL 1.16 (BCO: 1.13, the last with it).

    loss_type, config : as in DPOConfig, CPOConfig, ORPOConfig, KTOConfig, BCOConfig, with their defaults; only options
        that change the loss are known. `loss_type` is a list where DPOConfig's is, with `loss_weights`.
    trainer : "dpo", "cpo", "orpo", "kto" or "bco".

    Three side inputs stand for what TRL measures on a batch, held constant: `z0` of KTO (theory.losses.kto.kto_z0) and
    `delta` of BCO, 0 by default as at the start of training; `n_prompt` and `logp_prompt` of ORPO, whose likelihood
    term counts the prompt's tokens too (default: a prompt of one token, which predicts none).

    The value is TRL's for a batch of such samples, its mean over them; some losses couple it (`Loss.coupled`).

    Where TRL and the papers differ, this is TRL: `ipo` is length-normalised (IPONorm, not IPO); `sigmoid` has no label
    smoothing (cDPO is `theory.losses.CDPO`); `sft` and CPO's likelihood are means over the batch's tokens, not sums, so
    that RPO's eta is eta/n+; `simpo` keeps cpo_alpha = 1, a likelihood term that SimPO has not, unless it is set 0;
    `alpha` applies to every loss_type of CPO, to summed log-probabilities for sigmoid and hinge; `bco_pair` has no
    delta; KTO and BCO are half the sum of the two terms, a mean over examples.

    TRL's defects are not copied: eps of exo_pair rounded to float32; NaN of discopop, forward_kl with sigmoid and CPO's
    alpha where an exponential overflows; the clamp of alpha_divergence at e^80; a crash of use_weighting with hinge; an
    unscored token in the length when the prompt is empty. (Where both log-ratios are below -700, forward_kl and alpha
    with other loss types still have no value that a float could hold, and are NaN.)

    ValueError where TRL refuses, for options it does not know, and for the few combinations that a loss of one
    sample's tokens cannot express: ld_alpha or use_weighting with sft or aot (which couple the batch) or with each
    other. UserWarning for an option that TRL ignores in silence.
    """
    if trainer not in DEFAULTS:
        raise ValueError(unknown("trainer", trainer, DEFAULTS))
    if not isinstance(loss_type, str | Sequence):
        raise ValueError(f"loss_type must be a name or a list of names, got {loss_type!r}")
    types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    for name in types:
        if name not in LOSS_TYPES[trainer]:
            for other, names in LOSS_TYPES.items():
                if name in names:
                    raise ValueError(f"loss_type {name!r} is one of trainer={other!r}, got trainer={trainer!r}")
            raise ValueError(unknown(f"loss_type of trainer {trainer!r}", name, LOSS_TYPES[trainer]))
    for option in config:
        if option in ELSEWHERE:
            raise ValueError(f"{option} is {ELSEWHERE[option]}")
        if option not in DEFAULTS[trainer]:
            rest = "; only options that change the loss are taken, leave others out"
            raise ValueError(unknown(f"option of trainer {trainer!r}", option, DEFAULTS[trainer]) + rest)
    if trainer != "dpo" and len(types) != 1:
        raise ValueError(f"loss_type must be one name for trainer {trainer!r}, got {loss_type!r}")
    c = DEFAULTS[trainer] | {name: _option(name, value, DEFAULTS[trainer][name]) for name, value in config.items()}
    if trainer == "dpo":
        return _dpo(types, c)
    return {"cpo": _cpo, "orpo": _orpo, "kto": _kto, "bco": _bco}[trainer](types[0], c)


def _option(name: str, value: Any, default: Any) -> Any:
    """The value, if it is of the kind that the option's default is."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        return value
    if isinstance(default, float | int):
        return check_number(value, name, REAL)
    if name == "loss_weights" and value is not None:
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise ValueError(f"loss_weights must be a list of numbers, got {value!r}")
        return [check_number(w, "loss_weights", REAL) for w in value]
    return value


def _warn(trainer: str, types: Iterable[str], c: Options, read: set[str]) -> None:
    """A warning for each option that is set and that nothing reads."""
    for option, default in DEFAULTS[trainer].items():
        if c[option] != default and option not in read:
            message = f"TRL ignores {option}={c[option]!r} with loss_type {' + '.join(types)!r}"
            warnings.warn(message, UserWarning, stacklevel=4)


def _dpo(types: list[str], c: Options) -> Loss:
    weights = [1.0] * len(types) if c["loss_weights"] is None else list(c["loss_weights"])
    if not types or len(weights) != len(types):
        raise ValueError(f"loss_weights must hold a number per loss_type ({len(types)}, not 0), got {weights!r}")
    _refuse_dpo(types, c)
    read = {"loss_weights", "use_weighting", *(o for t in types for o in DPO_LOSSES[t][1])}
    if set(types) != {"sft"}:
        read |= {"ld_alpha", "f_divergence_type"}
        if c["f_divergence_type"] == "alpha_divergence":
            read.add("f_alpha_divergence_coef")
    _warn("dpo", types, c, read)

    losses = [_with_divergence(t, _dpo_single(t, c), c) for t in types]
    loss = losses[0] if weights == [1.0] else Sum(tuple(losses), tuple(weights))
    if c["ld_alpha"] is not None and set(types) != {"sft"}:
        return LD(loss, c["ld_alpha"])
    return WPOWeighted(loss) if c["use_weighting"] else loss


def _dpo_single(loss_type: str, c: Options) -> Loss:
    cls, parameters = DPO_LOSSES[loss_type]
    return cls(**{parameter: c[option] for option, parameter in parameters.items()})


def _with_divergence(loss_type: str, loss: Loss, c: Options) -> Loss:
    divergence, alpha = c["f_divergence_type"], c["f_alpha_divergence_coef"]
    if divergence == "reverse_kl" or loss_type == "sft":
        return loss
    if divergence == "alpha_divergence":
        # The limit at alpha = 1 is KL; TRL takes it from 1e-6 on.
        return loss if abs(alpha - 1) < 1e-6 else FDivergence(loss, "alpha", alpha)
    return FDivergence(loss, DIVERGENCES[divergence])


def _refuse_dpo(types: list[str], c: Options) -> None:
    """What TRL refuses, and what it does that losses of tokens here cannot."""
    divergence = c["f_divergence_type"]
    if divergence not in DIVERGENCES:
        raise ValueError(unknown("f_divergence_type", divergence, DIVERGENCES))
    without = [t for t in types if t not in WITH_DIVERGENCE]
    if divergence != "reverse_kl" and without:
        raise ValueError(f"f_divergence_type must be 'reverse_kl' with loss_type {without[0]!r}, got {divergence!r}")
    if "exo_pair" in types and c["label_smoothing"] == 0:
        raise ValueError("label_smoothing must be > 0 with loss_type 'exo_pair' (its paper: 1e-3), got 0")
    by_token = ["ld_alpha"] * (c["ld_alpha"] is not None) + ["use_weighting"] * bool(c["use_weighting"])
    coupling = [t for t in types if t in ("sft", "aot", "aot_unpaired")]
    if "use_weighting" in by_token and {"aot", "aot_unpaired"} & set(types):
        raise ValueError(f"use_weighting must be False with loss_type {coupling[0]!r}, which sorts the batch")
    if len(by_token) == 2:
        raise ValueError(f"ld_alpha must be None with use_weighting (together: not supported), got {c['ld_alpha']!r}")
    if by_token and coupling and not (set(types) == {"sft"} and by_token == ["ld_alpha"]):
        off = "None" if by_token == ["ld_alpha"] else "False"
        raise ValueError(f"{by_token[0]} must be {off} with loss_type {coupling[0]!r}, which couples the batch")


def _cpo(loss_type: str, c: Options) -> Loss:
    if loss_type == "alphapo":  # CPOConfig's word for simpo without the likelihood term
        _warn("cpo", [loss_type], c, set(c) - {"cpo_alpha"})
        loss_type, c = "simpo", c | {"cpo_alpha": 0.0}
    read = {"beta", "cpo_alpha", "alpha"}
    smoothed = loss_type in ("sigmoid", "simpo")
    read |= ({"label_smoothing"} if smoothed else set()) | ({"simpo_gamma"} if loss_type == "simpo" else set())
    _warn("cpo", [loss_type], c, read)
    loss = _cpo_pair(loss_type, c["beta"], c["label_smoothing"] if smoothed else 0.0, c["simpo_gamma"], c["alpha"])
    return loss if c["cpo_alpha"] == 0 else SFT(loss, c["cpo_alpha"], per="batch_token")


def _cpo_pair(loss_type: str, beta: float, eps: float, gamma: float, alpha: float) -> Loss:
    """CPOTrainer's loss without its likelihood term."""
    if alpha == 0 and loss_type == "sigmoid":
        return CPO(beta, cpo_alpha=0.0, eps=eps)
    if alpha == 0 and loss_type == "simpo":
        return SimPO(beta, gamma, eps=eps)
    if eps == 0 and loss_type == "simpo":
        return AlphaPO(beta, gamma, alpha=alpha)
    smoothed: MarginLoss = CDPO(beta, eps) if eps else DPO(beta)  # 0 times an infinite margin is no number
    of_margin = {"hinge": GPOHinge(beta), "ipo": IPO(beta)}.get(loss_type, smoothed)
    free = ReferenceFree(of_margin, gamma / beta if loss_type == "simpo" else 0.0)
    loss = free if alpha == 0 else PowerReward(free, alpha)
    return PerToken(loss) if loss_type in ("simpo", "ipo") else loss


def _orpo(_: str, c: Options) -> Loss:
    return ORPOPrompt(**c)


def _kto(loss_type: str, c: Options) -> Loss:
    weights = {"lam_D": c["desirable_weight"], "lam_U": c["undesirable_weight"]}
    if loss_type == "kto":
        return Sum((KTO(c["beta"], z0=c["z0"], **weights),), (0.5,))
    _warn("kto", [loss_type], c, {"beta", "desirable_weight", "undesirable_weight"})
    return Sum((APOZeroUnpaired(c["beta"], **weights),), (0.5,))


def _bco(_: str, c: Options) -> Loss:
    return Sum((BCO(c["beta"], c["delta"]),), (0.5,))


@dataclass(frozen=True)
class ReferenceFree(MarginLoss):
    """`base` with a fixed reference margin in place of the sample's: 0, or a target margin as SimPO's gamma/beta."""

    base: MarginLoss
    target: float = 0.0

    name = "reference_free"
    reference = "TRL's CPOTrainer"

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", check_number(self.target, "target", REAL))

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return dataclasses.replace(self.base.claims, reference_free=True)

    def formula(self, ops: Ops, y: Pair) -> Any:
        return self.base.formula(ops, y._replace(a_ref=self.target, b_ref=0.0))

    def minimiser(self, u_ref: Any) -> Any:
        return self.base.minimiser(self.target)

    def zeros(self, u_ref: Any) -> tuple[Any, ...]:
        return self.base.zeros(self.target)

    def kinks(self, u_ref: Any) -> tuple[Any, ...]:
        return self.base.kinks(self.target)


@dataclass(frozen=True)
class PowerReward(Combined):
    """`base` of the difference of AlphaPO's rewards (1 - pi(y)^-alpha)/alpha, lengths not divided by."""

    base: MarginLoss
    alpha: float

    name = "power_reward"
    reference = "TRL's CPOTrainer with alpha; AlphaPO (arXiv 2501.03884)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", check_number(self.alpha, "alpha", REAL))

    @property
    def claims(self) -> Claims:  # type: ignore[override]
        return dataclasses.replace(self.base.claims, convex=False)

    def formula(self, ops: Ops, y: Pair) -> Any:
        # The reward is the link of the divergence 1 - alpha, of a log-probability.
        return self.base.formula(ops, Pair.of_margin(difference(ops, Alpha(1 - self.alpha), y.a, y.b)))

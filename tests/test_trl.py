"""theory.losses.from_trl against numbers that TRL's own trainers computed, and against mappings that are wrong."""

import dataclasses
import importlib.util
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

import theory.losses
from theory import check_loss
from theory.losses import SFT, Group, Loss, MarginLoss, Pair, Sum, TokenLoss, Tokens, get
from theory.losses._links import FDivergence
from theory.losses._trl import DEFAULTS, LOSS_TYPES, ReferenceFree, from_trl

HERE = Path(__file__).resolve().parent
TABLE = json.loads((HERE / "data" / "trl_losses.json").read_text())
FULL = HERE.parent.parent / "shared" / "data" / "trl" / "trl_losses.json"

spec = importlib.util.spec_from_file_location("make_trl_losses", HERE / "data" / "make_trl_losses.py")
assert spec is not None
assert spec.loader is not None
make_trl_losses = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_trl_losses)

needs_full = pytest.mark.skipif(
    not FULL.exists(), reason="the full table of TRL's numbers is not beside the repository"
)

Mapping = Callable[..., Loss]


# The rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One computation of TRL: inputs as log-probabilities in nats, its value and gradients."""

    config: dict[str, Any]  # trainer, loss_type, options, and what is special about the rows
    id: int
    beta: float
    n: tuple[Any, Any]
    logps: tuple[Any, ...]  # ln pi(y+), ln pi(y-), the same under the reference; lists over a batch or over tokens
    side: dict[str, Any]
    value: float
    grads: tuple[Any, Any]

    @property
    def trainer(self) -> str:
        return self.config["trainer"].removesuffix("Trainer").lower()

    @property
    def loss_type(self) -> Any:
        names = self.config["loss_type"].split("+")
        return names if len(names) > 1 else names[0]

    @property
    def options(self) -> dict[str, Any]:
        """As from_trl takes them."""
        options = {k: v for k, v in self.config["options"].items() if k not in ("delta_mode", "n_prompt_predicted")}
        side = {k: v for k, v in self.side.items() if k in ("delta", "logp_prompt")}
        if "kl_mean" in self.side:
            side["z0"] = max(0.0, self.side["kl_mean"])
        return {"beta": self.beta, **options, **side}

    def tolerance(self, x: Any) -> Any:
        """TRL's own error, as the table's header states it."""
        return 2e-6 * (1 + np.abs(x)) if self.config.get("dtype") == "float32" else 1e-13 + 1e-12 * np.abs(x)

    @property
    def kinked(self) -> bool:
        return "kink" in self.side


def rows_of(table: dict[str, Any]) -> list[Row]:
    out = []
    for packed in table["rows"]:
        r = dict(zip(table["columns"], packed, strict=True))
        logps = tuple(0.0 if r[k] is None else np.asarray(r[k]) * make_trl_losses.TICK for k in make_trl_losses.LOGPS)
        grads = tuple(np.asarray(r[k], dtype=np.float64) for k in ("grad_plus", "grad_minus"))
        n = (r["n_plus"], r["n_minus"])
        config = table["configs"][r["config"]]
        out.append(Row(config, r["id"], r["beta"], n, logps, r["side"] or {}, float(r["value"]), grads))
    return out


ROWS = rows_of(TABLE)
FINITE = [r for r in ROWS if math.isfinite(r.value)]


# The comparison -------------------------------------------------------------------------------------------------------


def built(row: Row, mapping: Mapping) -> Loss:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # options that TRL ignores are tested by themselves
        return mapping(row.loss_type, trainer=row.trainer, **row.options)


def evaluate(row: Row, mapping: Mapping = from_trl) -> tuple[float, Any, Any]:
    """Value and both gradients of the batch (of one, mostly), in TRL's sign and normalisation."""
    loss = built(row, mapping)
    if row.config.get("constants") == "float32":
        loss = Sum((loss, rounding_of_exo(loss, row.options["label_smoothing"])), (1.0, 1.0))
    if isinstance(loss, TokenLoss) or (np.ndim(row.logps[0]) > 0 and "batch" not in row.config):
        return evaluate_tokens(row, loss)
    y = Pair(*row.logps, *row.n)
    size = row.config.get("batch", 1)
    d_w, d_l = loss.incentives(y)
    return float(np.mean(loss.value(y))), -d_w / size, d_l / size


@dataclass(frozen=True)
class Rounding(MarginLoss):
    """What TRL's exo_pair adds: its ln(1-eps) and ln eps are float32 numbers, a defect that the project does not copy."""

    beta: float
    eps: float
    name = "rounding"
    reference = "TRL 1.16, exo_pair"

    def formula(self, ops: Any, y: Pair) -> Any:
        eps = np.float64(np.float32(self.eps))
        win, lose = (math.log(x) - float(np.float32(np.log(r))) for x, r in ((1 - self.eps, 1 - eps), (self.eps, eps)))
        return win * ops.sigmoid(self.beta * y.m) + lose * ops.sigmoid(-self.beta * y.m)


def rounding_of_exo(loss: Any, eps: float) -> Loss:
    """That term, of the same scores as the loss."""
    if isinstance(loss, FDivergence):
        return dataclasses.replace(loss, base=Rounding(loss.base.beta, eps))
    return Rounding(loss.beta, eps)


def evaluate_tokens(row: Row, loss: Loss) -> tuple[float, Any, Any]:
    """The same for a loss of tokens; a response known by its sum alone gets tokens of equal log-probability."""

    def tokens(i: int) -> Tokens:
        log_prob, ref = (
            torch.tensor(x if np.ndim(x) else np.full(row.n[i], x / row.n[i])) for x in (row.logps[i], row.logps[i + 2])
        )
        sums = row.side.get(("log_sum_sq_probs_plus", "log_sum_sq_probs_minus")[i], 0.0)
        zero = torch.zeros_like(ref)
        return Tokens(log_prob.requires_grad_(), ref, zero, zero + sums, zero[:, None])

    w, l = tokens(0), tokens(1)
    group = Group((w, l), (1.0, 0.0))
    value = loss.torch_value(group if isinstance(loss, TokenLoss) else group.pair)
    grads = [g.numpy() for g in torch.autograd.grad(value, (w.log_prob, l.log_prob))]
    if not np.ndim(row.logps[0]):  # TRL's gradient of the sum is that of every token
        assert all(np.ptp(g) <= 1e-15 + 1e-14 * np.abs(g).max() for g in grads)
        grads = [g[0] for g in grads]
    return value.item(), grads[0], grads[1]


def disagreements(rows: list[Row], mapping: Mapping = from_trl) -> list[str]:
    """A line for each row whose value or gradients are not TRL's."""
    out = []
    for row in rows:
        value, *grads = evaluate(row, mapping)
        wanted = [row.value, *row.grads]
        if row.kinked and not np.allclose(grads[0], wanted[1]):
            # At the hinge's kink either one-sided slope will do: TRL's is 0, the other one beta.
            wanted[1:] = wanted[1] - row.beta, wanted[2] + row.beta
        for name, x, x_trl in zip(("value", "grad_plus", "grad_minus"), (value, *grads), wanted, strict=True):
            if not np.all(np.abs(x - x_trl) <= row.tolerance(x_trl)):
                out.append(f"row {row.id} {row.config} beta={row.beta} n={row.n}: {name} {x}, TRL {x_trl}")
    return out


def label(config: dict[str, Any]) -> str:
    options = "-".join(f"{k}={v}" for k, v in config["options"].items())
    batch = ["batch"] if "batch" in config else []
    return "-".join(
        [config["trainer"].removesuffix("Trainer"), config["loss_type"], *batch, *([options] * bool(options))]
    )


@pytest.mark.parametrize("config", TABLE["configs"], ids=label)
def test_value_and_gradients_are_those_of_trl(config):
    rows = [r for r in FINITE if r.config == config]
    assert len(rows) >= 2
    assert not disagreements(rows)
    assert any(r.value != rows[0].value for r in rows), "the rows must differ"


@needs_full
def test_the_full_table_agrees_as_well():
    rows = rows_of(make_trl_losses.derive(json.loads(FULL.read_text()), choose=lambda rows: rows))
    finite = [r for r in rows if math.isfinite(r.value)]
    assert len(rows) > 4500
    assert len(rows) - len(finite) < 10
    assert not disagreements(finite)


@needs_full
def test_the_small_table_is_derived_from_the_full_one():
    derived = make_trl_losses.derive(json.loads(FULL.read_text()))
    assert json.loads(json.dumps(derived)) == TABLE


def test_the_table_covers_every_loss_type_and_option():
    seen = {(r.trainer, t) for r in FINITE for t in r.config["loss_type"].split("+")}
    # alphapo is CPOConfig's word for simpo with cpo_alpha = 0: TRL stores it as that.
    assert seen == {(t, name) for t, names in LOSS_TYPES.items() for name in names} - {("cpo", "alphapo")}
    for trainer, options in DEFAULTS.items():
        used = {o for r in FINITE if r.trainer == trainer for o in r.options}
        assert used - {"loss_type"} == set(options), trainer
    ratios = np.array([r.logps[0] - r.logps[2] for r in FINITE if np.ndim(r.logps[0]) == 0])
    assert ratios.min() <= -50
    assert ratios.max() >= 50
    assert any(r.kinked for r in ROWS)
    assert {r.config.get("batch") for r in ROWS} == {None, 4}


# Rows where TRL has no number -----------------------------------------------------------------------------------------


def discopop_in_many_digits(row: Row) -> list[mpmath.mpf]:
    """The loss and its gradients as TRL documents them, retyped: value, d/da, d/db."""
    beta, tau = mpmath.mpf(row.beta), mpmath.mpf("0.05")

    def phi(t: Any) -> Any:
        alpha = mpmath.mpf("0.5")
        if row.options["f_divergence_type"] == "forward_kl":
            return 1 - mpmath.exp(-t)
        return (mpmath.exp((alpha - 1) * t) - 1) / (alpha - 1)

    def value(a: Any, b: Any) -> Any:
        x = beta * (phi(a) - phi(b))
        g = 1 / (1 + mpmath.exp(-x / tau))
        return (1 - g) * mpmath.log(1 + mpmath.exp(-x)) + g * mpmath.exp(-x)

    da, db = (mpmath.mpf(float(row.logps[i] - row.logps[i + 2])) for i in (0, 1))
    return [value(da, db), mpmath.diff(value, (da, db), (1, 0)), mpmath.diff(value, (da, db), (0, 1))]


@pytest.mark.parametrize("row", [r for r in ROWS if not math.isfinite(r.value)], ids=lambda r: str(r.id))
def test_where_trl_overflows_the_true_value_is_given(row):
    assert row.loss_type == "discopop"
    with mpmath.workdps(50):
        exact = discopop_in_many_digits(row)
        for x, truth in zip(evaluate(row), exact, strict=True):
            assert math.isfinite(x)
            assert abs(x - truth) <= 1e-12 * abs(truth) + 1e-300


# Wrong mappings -------------------------------------------------------------------------------------------------------


def instead(loss_type: Any, make: Callable[..., Loss]) -> Mapping:
    """from_trl with one loss_type mapped to something else."""

    def mapping(name: Any, *, trainer: str, **config: Any) -> Loss:
        return (
            make(name, config | {"trainer": trainer})
            if name == loss_type
            else from_trl(name, trainer=trainer, **config)
        )

    return mapping


def without(option: str) -> Mapping:
    """from_trl that overlooks one option."""
    return lambda name, **config: from_trl(name, **{k: v for k, v in config.items() if k != option})


@dataclass(frozen=True)
class NoConstants(Loss):
    """IPO of TRL's forward_kl scores without their constant 1."""

    tau: float
    name = "no_constants"
    reference = "planted"

    def formula(self, ops: Any, y: Pair) -> Any:
        a, b = -ops.exp(-y.da), -ops.exp(-y.db)
        return get("ipo_norm", beta=self.tau).formula(ops, y._replace(a=a, b=b, a_ref=0.0, b_ref=0.0))


def forward_kl_ipo(name: Any, c: dict[str, Any]) -> Loss:
    return NoConstants(c["beta"]) if c.get("f_divergence_type") == "forward_kl" else from_trl(name, **c)


def whole(name: Any, c: dict[str, Any]) -> Loss:
    half = from_trl(name, **c)
    assert isinstance(half, Sum)
    return half.losses[0]


WRONG: dict[str, tuple[str, Mapping]] = {
    "ipo on sums": ("ipo", instead("ipo", lambda name, c: get("ipo", tau=c["beta"]))),
    "ipo without the constants of phi": ("ipo", instead("ipo", forward_kl_ipo)),
    "robust with the sign of cDPO": (
        "robust",
        instead(
            "robust",
            lambda name, c: Sum(
                (get("cdpo", beta=c["beta"], eps=c.get("label_smoothing", 0.0)),),
                (1 / (1 - 2 * c.get("label_smoothing", 0.0)),),
            ),
        ),
    ),
    "label smoothing in sigmoid": (
        "sigmoid",
        instead("sigmoid", lambda name, c: get("cdpo", beta=c["beta"], eps=c.get("label_smoothing", 0.0))),
    ),
    "eta times a sum": (
        "sigmoid+sft",
        instead(["sigmoid", "sft"], lambda name, c: SFT(get("dpo", beta=c["beta"]), c["loss_weights"][1])),
    ),
    "loss_weights overlooked": ("ipo+sft", without("loss_weights")),
    "AOT without sorting": (
        "aot",
        instead("aot", lambda name, c: get("cdpo", beta=c["beta"], eps=c.get("label_smoothing", 0.0))),
    ),
    "tau overlooked": ("discopop", without("discopop_tau")),
    "ld_alpha overlooked": ("sigmoid", without("ld_alpha")),
    "weighting overlooked": ("sppo_hard", without("use_weighting")),
    "coefficient of alpha overlooked": ("sigmoid", without("f_alpha_divergence_coef")),
    "divergence overlooked": ("exo_pair", without("f_divergence_type")),
    "simpo without its likelihood": (
        "simpo",
        instead("simpo", lambda name, c: from_trl(name, **c | {"cpo_alpha": 0.0})),
    ),
    "alpha per token": (
        "sigmoid",
        instead(
            "sigmoid",
            lambda name, c: (
                get("alphapo", beta=c["beta"], alpha=c["alpha"], gamma=0.0) if c.get("alpha") else from_trl(name, **c)
            ),
        ),
    ),
    "ORPO without its prompt": ("orpo", instead("orpo", lambda name, c: get("orpo", beta=c["beta"]))),
    "KTO as a sum": ("kto", instead("kto", whole)),
    "KTO without z0": ("kto", without("z0")),
    "weights of KTO overlooked": ("apo_zero_unpaired", without("desirable_weight")),
    "BCO as a sum": ("bco", instead("bco", whole)),
    "BCO without delta": ("bco", without("delta")),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_mapping_is_noticed(name):
    loss_type, mapping = WRONG[name]
    rows = [r for r in FINITE if r.config["loss_type"] == loss_type]
    assert disagreements(rows, mapping)


def test_a_kink_is_no_excuse():
    row = next(r for r in ROWS if r.kinked and r.loss_type == "hinge" and r.trainer == "dpo")
    assert disagreements([row], lambda name, **c: get("gpo_hinge", beta=0.7 * row.beta))


# The interface --------------------------------------------------------------------------------------------------------


def test_the_name_is_public():
    assert theory.losses.from_trl is from_trl


def test_plain_configurations_are_registry_entries():
    assert from_trl("sigmoid") == get("dpo", beta=0.1)
    assert from_trl(["sigmoid"], loss_weights=[1.0], beta=0.3) == get("dpo", beta=0.3)
    assert from_trl("ipo", beta=0.2) == get("ipo_norm", beta=0.2)
    assert from_trl("sigmoid", f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1.0) == get("dpo")
    assert from_trl("alphapo", trainer="cpo", alpha=0.25) == from_trl("simpo", trainer="cpo", alpha=0.25, cpo_alpha=0.0)
    assert from_trl("simpo", trainer="cpo") == SFT(get("simpo", beta=0.1, gamma=0.5), 1.0, per="batch_token")


def test_defaults_are_those_of_the_trainers():
    assert from_trl("discopop") == get("discopop", beta=0.1, tau=0.05)
    assert from_trl("robust") == get("robust", beta=0.1, eps=0.0)
    assert from_trl("sigmoid", f_divergence_type="alpha_divergence") == FDivergence(get("dpo", beta=0.1), "alpha", 0.5)
    assert from_trl("orpo", trainer="orpo") == get("orpo_prompt", beta=0.1, n_prompt=1, logp_prompt=0.0)
    assert from_trl("kto", trainer="kto") == Sum((get("kto", beta=0.1, lam_D=1.0, lam_U=1.0, z0=0.0),), (0.5,))
    assert from_trl("bco", trainer="bco") == Sum((get("bco", beta=0.1, delta=0.0),), (0.5,))


@pytest.mark.parametrize("loss_type", LOSS_TYPES["dpo"])
def test_divergences_are_refused_where_the_normaliser_would_not_cancel(loss_type):
    refused = {"nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down"}
    config = {"f_divergence_type": "forward_kl", "label_smoothing": 0.1 if loss_type == "exo_pair" else 0.0}
    if loss_type in refused:
        with pytest.raises(ValueError, match="f_divergence_type must be 'reverse_kl'"):
            from_trl(loss_type, **config)
    elif loss_type != "sft":  # which has no scores, and ignores it
        assert isinstance(from_trl(loss_type, **config), FDivergence)


@pytest.mark.parametrize(
    ("loss_type", "config"),
    [
        ("sigmoid", {"label_smoothing": 0.1}),
        ("apo_zero", {"label_smoothing": 0.1}),
        (["sigmoid", "ipo"], {"label_smoothing": 0.1}),
        ("sigmoid", {"discopop_tau": 0.2}),
        ("sigmoid", {"f_alpha_divergence_coef": 2.0}),
        ("sft", {"beta": 0.5}),
        ("sft", {"ld_alpha": 0.5}),
        ("sft", {"f_divergence_type": "js_divergence"}),
        ("hinge", {"trainer": "cpo", "label_smoothing": 0.1}),
        ("sigmoid", {"trainer": "cpo", "simpo_gamma": 1.0}),
        ("apo_zero_unpaired", {"trainer": "kto", "z0": 1.0}),
        ("alphapo", {"trainer": "cpo", "cpo_alpha": 0.5}),
    ],
)
def test_an_ignored_option_is_said_to_be(loss_type, config):
    option = next(k for k in config if k != "trainer")
    with pytest.warns(UserWarning, match=rf"TRL ignores {option}") as caught:
        loss = from_trl(loss_type, **config)
    assert caught[0].filename == __file__
    assert loss == from_trl(loss_type, **{k: v for k, v in config.items() if k == "trainer"})


@pytest.mark.parametrize(
    ("loss_type", "config", "message"),
    [
        ("sigmiod", {}, "did you mean 'sigmoid'"),
        ("simpo", {}, "trainer='cpo'"),
        ("sigmoid", {"trainer": "dpoo"}, "did you mean"),
        ("sigmoid", {"labelsmoothing": 0.1}, "did you mean 'label_smoothing'"),
        ("sigmoid", {"rpo_alpha": 1.0}, "rpo_alpha is loss_type="),
        ("sigmoid", {"beta": -0.1}, r"beta must be in \(0, inf\)"),
        ("exo_pair", {}, "label_smoothing must be > 0"),
        ("nca_pair", {"f_divergence_type": "forward_kl"}, "f_divergence_type must be 'reverse_kl'"),
        (["sigmoid", "apo_zero"], {"f_divergence_type": "js_divergence"}, "'apo_zero'"),
        ("sigmoid", {"f_divergence_type": "js_div"}, "did you mean 'js_divergence'"),
        ("aot", {"use_weighting": True}, "use_weighting must be False"),
        (["sigmoid", "sft"], {"loss_weights": [1.0]}, "a number per loss_type"),
        ([], {}, "not 0"),
        ("sft", {"use_weighting": True}, "couples the batch"),
        (["sigmoid", "sft"], {"ld_alpha": 0.5}, "couples the batch"),
        ("aot", {"ld_alpha": 0.0}, "couples the batch"),
        ("sigmoid", {"ld_alpha": 0.0, "use_weighting": True}, "together"),
        (["sigmoid", "hinge"], {"trainer": "cpo"}, "one name"),
        ("robust", {"label_smoothing": 0.5}, "eps must be in"),
    ],
)
def test_what_trl_refuses_and_typing_errors(loss_type, config, message):
    with pytest.raises(ValueError, match=message):
        from_trl(loss_type, **config)


# CPO's combinations ---------------------------------------------------------------------------------------------------


def cpo_retyped(loss_type: str, c: dict[str, float], a: Any, b: Any, n: tuple[int, int]) -> Any:
    """CPOTrainer's loss of one pair in mpmath, every option at once: the table has no rows for some combinations."""
    alpha, eps, beta = c["alpha"], c["label_smoothing"], c["beta"]
    per_token = loss_type in ("ipo", "simpo")
    p, q = (a / n[0], b / n[1]) if per_token else (a, b)
    d = ((1 - mpmath.exp(-alpha * p)) - (1 - mpmath.exp(-alpha * q))) / alpha if alpha else p - q
    if loss_type == "simpo":
        d -= mpmath.mpf(c["simpo_gamma"]) / beta
    if loss_type == "hinge":
        loss = max(mpmath.mpf(0), 1 - beta * d)
    elif loss_type == "ipo":
        loss = (d - 1 / (2 * mpmath.mpf(beta))) ** 2
    else:
        loss = (1 - eps) * mpmath.log1p(mpmath.exp(-beta * d)) + eps * mpmath.log1p(mpmath.exp(beta * d))
    return loss - c["cpo_alpha"] * a / n[0]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "simpo"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, -0.5])
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("cpo_alpha", [0.0, 0.7])
@pytest.mark.filterwarnings("ignore:TRL ignores")
def test_every_combination_of_cpo_options(loss_type, alpha, eps, cpo_alpha):
    c = {"beta": 0.3, "label_smoothing": eps, "cpo_alpha": cpo_alpha, "simpo_gamma": 0.9, "alpha": alpha}
    loss = from_trl(loss_type, trainer="cpo", **c)
    n = (3, 5)
    for a, b in [(-3.1, -5.4), (-9.2, -1.7), (-0.4, -6.0)]:
        y = Pair(a, b, -2.2, -8.3, *n)  # no reference enters
        d_w, d_l = loss.incentives(y)
        with mpmath.workdps(40):
            truth = [
                cpo_retyped(loss_type, c, mpmath.mpf(a), mpmath.mpf(b), n),
                -mpmath.diff(lambda x, b=b: cpo_retyped(loss_type, c, x, mpmath.mpf(b), n), a),
                mpmath.diff(lambda x, a=a: cpo_retyped(loss_type, c, mpmath.mpf(a), x, n), b),
            ]
        np.testing.assert_allclose([loss.value(y), d_w, d_l], [float(x) for x in truth], rtol=1e-10, atol=1e-13)
    for a, b in [(-1e4, -1e-3), (-1e-3, -1e4), (-1e4, -1e4), (-2e4, -1e4)]:
        y = Pair(a, b, -2.2, -8.3, *n)
        with np.errstate(over="ignore"):  # a square of e^2500 is inf
            assert not np.isnan([loss.value(y), *loss.incentives(y)]).any()


def test_a_fixed_reference_keeps_the_claims_of_its_base():
    for loss in (ReferenceFree(get("cdpo", beta=0.6, eps=0.27), 0.83), ReferenceFree(get("gpo_hinge", beta=0.7))):
        report = check_loss(loss)
        assert report.ok, str(report)
    assert from_trl("hinge", trainer="cpo", cpo_alpha=0.0) == ReferenceFree(get("gpo_hinge", beta=0.1))


@pytest.mark.parametrize(
    ("loss_type", "config", "message"),
    [
        ("sigmoid", {"loss_weights": 1.0}, "loss_weights must be a list of numbers, got 1.0"),
        (3, {}, "loss_type must be a name or a list of names, got 3"),
        (None, {}, "loss_type must be a name or a list of names, got None"),
        ("sigmoid", {"f_alpha_divergence_coef": "x"}, "f_alpha_divergence_coef must be a real number"),
        ("sigmoid", {"use_weighting": "no"}, "use_weighting must be True or False, got 'no'"),
        ("sigmoid", {"beta": "0.1"}, "beta must be a real number"),
    ],
)
def test_options_of_the_wrong_kind_are_named(loss_type, config, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        theory.losses.from_trl(loss_type, **config)


def test_weights_may_be_an_array():
    mixed = theory.losses.from_trl(["sigmoid", "sft"], loss_weights=np.array([0.8, 0.2]))
    assert mixed == theory.losses.from_trl(["sigmoid", "sft"], loss_weights=[0.8, 0.2])

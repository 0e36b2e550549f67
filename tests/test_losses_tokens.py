"""Token-level losses: values and per-token gradients against loops in mpmath, reductions, stop-gradients, masks that learn."""

import dataclasses
import json
import math
from dataclasses import dataclass, replace
from typing import Any

import mpmath
import numpy as np
import pytest
import retyped_tokens as retyped
import torch

from sims import Optimizer, gradient_descent
from sims.objective import Objective, stacked
from sims.sparse import MaskRun, learn_masks
from theory import Sample, UnconstrainedFeatures
from theory.losses import LOSSES, SFT, Group, Pair, PerToken, TokenLoss, Tokens, get
from theory.losses._tokenwise import LD, WPOWeighted
from theory.losses.mapo import activation_mask
from theory.losses.sparse_po import MaskNet, SparsePO, token_mask
from theory.ops import NUMPY

NAMES = ("ld_dpo", "mapo", "sparse_po", "tdpo1", "tdpo2", "wpo")
D = 4
# Masks with weights: some tokens at zero, some not.
TWO_NETS = SparsePO(
    beta=0.6,
    lam_u=0.02,
    lam_d=0.03,
    mask_u=MaskNet((0.9, -0.4, 0.3, 0.2), 0.3),
    mask_d=MaskNet((-0.3, 0.8, 0.1, 0.5), 0.2),
)
COMMON = replace(TWO_NETS, mask_d=None)
EXAMPLES: list[Any] = [e for name in NAMES for e in LOSSES[name].examples()] + [TWO_NETS, COMMON]
FIELDS = ("log_prob", "ref", "kl", "log_sum_sq", "hidden")


def response(rng: np.random.Generator, n: int, batch: tuple[int, ...] = ()) -> Tokens:
    """n tokens of a generic model that has left its reference."""
    log_prob = -rng.uniform(0.1, 3, (*batch, n))
    ref = log_prob + rng.normal(size=(*batch, n))
    return Tokens(
        log_prob,
        ref,
        rng.uniform(0, 0.7, (*batch, n)),
        -rng.uniform(0.2, 2, (*batch, n)),
        rng.normal(size=(*batch, n, D)),
    )


def group(seed: int, n_w: int = 3, n_l: int = 5, batch: tuple[int, ...] = ()) -> Group:
    rng = np.random.default_rng(seed)
    return Group((response(rng, n_w, batch), response(rng, n_l, batch)), (1.0, 0.0))


def as_torch(y: Group) -> Group:
    """The group as leaves of a graph."""
    leaf = lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True)  # noqa: E731
    return Group(tuple(Tokens(*map(leaf, t)) for t in y.responses), y.rewards)


def changed(y: Group, i: int, **fields: Any) -> Group:
    """The group with fields of response i replaced."""
    parts = list(y.responses)
    parts[i] = edited(parts[i], **fields)
    return Group(tuple(parts), y.rewards)


def edited(t: Tokens, **fields: Any) -> Tokens:
    """The response with fields replaced."""
    return Tokens(**{f: fields.get(f, getattr(t, f)) for f in FIELDS})


def gradients(loss: Any, y: Group) -> list[dict[str, np.ndarray]]:
    """dL/d(field) of y+ and y-, by automatic differentiation."""
    leaves = as_torch(y)
    flat = [getattr(t, f) for t in leaves.responses for f in FIELDS]
    found = torch.autograd.grad(loss.torch_value(leaves).sum(), flat, allow_unused=True)
    arrays = [np.zeros(x.shape) if g is None else g.numpy() for x, g in zip(flat, found, strict=True)]
    return [dict(zip(FIELDS, arrays[:5], strict=True)), dict(zip(FIELDS, arrays[5:], strict=True))]


def retype(t: Tokens) -> list[retyped.Token]:
    rows = zip(*(np.asarray(x).tolist() for x in t), strict=True)
    mp = mpmath.mpf
    return [retyped.Token(mp(a), mp(r), mp(k), mp(s), [mp(x) for x in h]) for a, r, k, s, h in rows]


def paper(loss: Any, name: str, y: Group, moved: Group | None = None) -> mpmath.mpf:
    """The retyped value; `moved` is what stands outside stop-gradients, default y."""
    w0, l0 = map(retype, y.responses)
    w, l = (w0, l0) if moved is None else map(retype, moved.responses)
    return retyped.PAPER[name](loss, w, l, w0, l0)


def value_error(loss: Any, name: str, y: Group) -> float:
    with mpmath.workdps(40):
        return abs(float(loss.value(y)) - float(paper(loss, name, y)))


def gradient_error(loss: Any, name: str, y: Group, fields: tuple[str, ...] = FIELDS) -> float:
    """Largest difference between automatic differentiation and central differences of the retyped loss in 60 digits."""
    ours, worst = gradients(loss, y), 0.0
    with mpmath.workdps(60):
        step = mpmath.mpf(10) ** -20
        rows = [retype(t) for t in y.responses]
        for i in (0, 1):
            for f in fields:
                for t, got in enumerate(ours[i][f]):
                    for j in range(D) if f == "hidden" else (None,):

                        def at(s: Any) -> Any:
                            live = [retype(x) for x in y.responses]
                            token = live[i][t]  # noqa: B023
                            if j is None:  # noqa: B023
                                setattr(token, f, getattr(token, f) + s)  # noqa: B023
                            else:
                                token.hidden[j] += s  # noqa: B023
                            return retyped.PAPER[name](loss, *live, *rows)

                        exact = float((at(step) - at(-step)) / (2 * step))
                        worst = max(worst, abs(exact - float(got if j is None else got[j])))
    return worst


# ---- the formulas


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss", EXAMPLES, ids=repr)
def test_value_is_the_papers_and_torchs(loss, seed):
    lengths = ((3, 5), (5, 2), (4, 4))[seed]
    y = group(seed, *lengths)
    assert value_error(loss, loss.name, y) < 1e-13
    assert loss.torch_value(as_torch(y)).item() == pytest.approx(float(loss.value(y)), rel=1e-14)
    # Arrays of samples are samples one by one.
    many = group(seed, *lengths, batch=(2, 3))
    values = loss.value(many)
    assert values.shape == (2, 3)
    one = Group(tuple(Tokens(*(x[1, 2] for x in t)) for t in many.responses), many.rewards)
    assert values[1, 2] == pytest.approx(float(loss.value(one)), rel=1e-14)
    assert len(np.unique(values.round(9))) == 6


@pytest.mark.parametrize("loss", EXAMPLES, ids=repr)
def test_gradients_token_by_token_are_the_papers(loss):
    for lengths in ((3, 5), (4, 2)):
        y = group(7, *lengths)
        # Masks of MaPO are constants of the reference model: their gradient is zero, not that of the formula.
        assert gradient_error(loss, loss.name, y) < 1e-14
        found = gradients(loss, y)
        assert np.abs(found[0]["log_prob"]).max() > 1e-3
        assert np.abs(found[1]["log_prob"]).max() > 1e-3


class Planted(TokenLoss):
    """A wrong loss: `of` with something altered."""

    def __init__(self, of: Any, formula: Any) -> None:
        self.of, self.formula = of, formula

    def __getattr__(self, name: str) -> Any:
        return getattr(self.of, name)


def _swapped_kl(ops: Any, y: Group) -> Any:
    w, l = y.responses
    return -ops.log_sigmoid(0.7 * (y.pair.m - (w.kl.sum(-1) - l.kl.sum(-1))))


def _tdpo2_unstopped(ops: Any, y: Group) -> Any:
    w, l = y.responses
    return -ops.log_sigmoid(0.7 * (y.pair.m - 0.3 * (l.kl.sum(-1) - w.kl.sum(-1))))


def _ld_by_the_longer(ops: Any, y: Group) -> Any:
    return -ops.log_sigmoid(0.7 * y.pair.m)


def _wpo_unstopped(ops: Any, y: Group) -> Any:
    logs = [(t.log_prob - t.log_sum_sq).mean(-1) for t in y.responses]
    return -ops.exp(logs[0] + logs[1]) * ops.log_sigmoid(0.7 * y.pair.m)


def _mapo_unscaled(ops: Any, y: Group) -> Any:
    w, l = ((t.hidden.mean(-1) * (t.log_ratio + t.kl)).sum(-1) for t in y.responses)
    return -ops.log_sigmoid(0.7 * (w - l))


def _sparse_whole_l1(ops: Any, y: Group) -> Any:
    masks = [COMMON.mask_u.mask(ops, t.hidden) for t in y.responses]
    return replace(COMMON, mask_d=COMMON.mask_u).masked(ops, y, masks, masks)


@pytest.mark.parametrize(
    ("name", "of", "formula", "wrong_value"),
    [
        ("tdpo1", get("tdpo1", beta=0.7), _swapped_kl, True),
        ("tdpo2", get("tdpo2", beta=0.7, alpha=0.3), _tdpo2_unstopped, False),
        ("ld_dpo", get("ld_dpo", beta=0.7, alpha=0.3), _ld_by_the_longer, True),
        ("wpo", get("wpo", beta=0.7), _wpo_unstopped, False),
        ("mapo", get("mapo", beta=0.7), _mapo_unscaled, True),
        ("sparse_po", COMMON, _sparse_whole_l1, True),
    ],
)
def test_planted_errors_are_seen(name, of, formula, wrong_value):
    """A lost stop-gradient shows in the gradient alone, everything else in the value."""
    y, planted = group(7), Planted(of, formula)
    assert (value_error(planted, name, y) > 1e-3) == wrong_value
    assert gradient_error(planted, name, y) > 1e-3


@pytest.mark.parametrize("loss", EXAMPLES, ids=repr)
@pytest.mark.parametrize("margin", [-1e4, -800.0, 800.0, 1e4])
def test_far_out_nothing_is_nan(loss, margin):
    y = group(1)
    for i, sign in ((0, 1), (1, -1)):
        move = sign * margin / 2
        low = y.responses[i].log_prob + np.minimum(move, 0)
        # Where log-probabilities may not rise, the reference falls.
        y = changed(y, i, log_prob=low, ref=y.responses[i].ref - max(move, 0.0))
    assert np.isfinite(loss.value(y))
    for part in gradients(loss, y):
        assert all(np.isfinite(g).all() for g in part.values())


@pytest.mark.parametrize("loss", EXAMPLES, ids=repr)
def test_what_the_claims_say_of_log_probabilities(loss):
    """Convex in all tokens' log-probabilities where claimed, and never pushing y+ down nor y- up."""
    rng = np.random.default_rng(0)
    assert loss.claims.decreasing
    assert loss.claims.nonnegative
    assert not loss.claims.reference_free
    bends, seen_push = [], 0.0
    for seed in range(30):
        y = group(seed)
        w, l = gradients(loss, y)
        assert (w["log_prob"] <= 0).all()
        assert (l["log_prob"] >= 0).all()
        assert loss.value(y) >= 0
        seen_push = max(seen_push, l["log_prob"].max())
        steps = [rng.normal(size=t.log_prob.shape) for t in y.responses]

        def at(s: float) -> Any:
            moved = [edited(t, log_prob=t.log_prob + s * d) for t, d in zip(y.responses, steps, strict=True)]  # noqa: B023
            return loss.value(Group(tuple(moved), y.rewards))  # noqa: B023

        bends.append(at(1) + at(-1) - 2 * at(0))
    assert seen_push > 1e-3
    assert loss.claims.convex == (min(bends) > -1e-12)
    # With another reference the value differs.
    assert loss.value(y) != loss.value(changed(y, 0, ref=y.responses[0].ref - 1))


@pytest.mark.parametrize("name", NAMES)
def test_registered_with_a_formula_that_prints(name):
    loss: Any = get(name)
    text = loss.latex()
    assert r"\sigma" in text
    assert r"\beta" in text
    assert text.count("{") == text.count("}")
    assert loss._repr_latex_() == rf"$\ell = {text}$"
    assert "0.1" not in text
    with pytest.raises(TypeError, match="tokens"):
        loss.incentives(Pair(0.0, 0.0))
    with pytest.raises(TypeError, match="tokens"):
        loss.mpmath_value(Pair(0.0, 0.0))
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 0.3


# ---- reductions, and where they end


def same(a: Any, b: Any, y: Group) -> bool:
    """Equal values and equal gradients in log-probabilities and KL."""
    close = [np.allclose(a.value(y), b.value(y), rtol=1e-13, atol=1e-13)]
    for ours, theirs in zip(gradients(a, y), gradients(b, y), strict=True):
        close += [np.allclose(ours[f], theirs[f], rtol=1e-12, atol=1e-14) for f in ("log_prob", "kl")]
    return all(close)


@dataclass(frozen=True)
class OnPairs(TokenLoss):
    """A loss of pairs, read off a group."""

    base: Any

    def __post_init__(self) -> None: ...

    def formula(self, ops: Any, y: Group) -> Any:
        return self.base.formula(ops, y.pair)


def test_reductions():
    y, dpo = group(3), OnPairs(get("dpo", beta=0.7))
    equal_lengths = group(3, 4, 4)
    assert same(get("tdpo2", beta=0.7, alpha=0.0), dpo, y)
    assert same(get("ld_dpo", beta=0.7, alpha=1.0), dpo, y)
    assert same(get("ld_dpo", beta=0.7, alpha=0.2), dpo, equal_lengths)
    assert same(SparsePO(beta=0.7), get("tdpo1", beta=0.7), y)
    assert same(SparsePO(beta=0.7, mask_d=MaskNet(c=0.0)), dpo, y)  # no mask on rewards, none of the KL
    ones = np.ones((5, D))
    flat = changed(changed(y, 0, hidden=ones[:3]), 1, hidden=ones)
    assert same(get("mapo", beta=0.7), get("tdpo1", beta=0.7), flat)
    assert same(get("mapo", beta=0.7), get("tdpo1", beta=0.7), group(3, 1, 1))
    # ... and at no other parameter.
    assert not same(get("tdpo2", beta=0.7, alpha=1e-3), dpo, y)
    assert not same(get("ld_dpo", beta=0.7, alpha=0.999), dpo, y)
    assert not same(SparsePO(beta=0.7, mask_u=MaskNet(c=1.001)), get("tdpo1", beta=0.7), y)
    assert not same(get("mapo", beta=0.7), get("tdpo1", beta=0.7), y)
    assert not same(get("tdpo1", beta=0.7), dpo, y)


def test_at_the_reference_tdpo_is_dpo():
    """All KL are zero there, and stationary: the model's gradient is DPO's. Away from it, it is not."""
    models = [shared_suffix(0.7, 0.3)]
    start, other = (x.requires_grad_() for x in stacked(models)), stacked([moved(models[0])])

    def gradient(loss: Any, W: Any, H: Any) -> np.ndarray:
        value = Objective.of(models, loss)(W, H).sum()
        return np.concatenate([g.numpy().ravel() for g in torch.autograd.grad(value, (W, H))])

    W, H = start
    dpo = gradient(get("dpo"), W, H)
    assert np.abs(dpo).max() > 1e-3
    for name in ("tdpo1", "tdpo2"):
        np.testing.assert_allclose(gradient(get(name), W, H), dpo, atol=1e-15)
    W, H = (x.requires_grad_() for x in other)
    dpo = gradient(get("dpo"), W, H)
    for name in ("tdpo1", "tdpo2"):
        assert np.abs(gradient(get(name), W, H) - dpo).max() > 1e-4


def test_tdpo2_stops_the_gradient_of_the_kl_of_y_plus_only():
    y = group(4)
    w, l = gradients(get("tdpo2"), y)
    assert (w["kl"] == 0).all()
    assert (l["kl"] > 1e-3).all()
    # The value does depend on it.
    assert get("tdpo2").value(changed(y, 0, kl=y.responses[0].kl + 1)) < get("tdpo2").value(y)
    assert (gradients(get("tdpo1"), y)[0]["kl"] < -1e-3).all()


def test_the_gradient_of_wpo_is_its_weight_times_that_of_dpo():
    y = group(5)
    weight = 1.0
    for t in y.responses:
        weight *= math.exp(np.mean(t.log_prob - t.log_sum_sq))
    assert abs(weight - 1) > 0.1
    for ours, theirs in zip(
        gradients(get("wpo", beta=0.7), y), gradients(OnPairs(get("dpo", beta=0.7)), y), strict=True
    ):
        np.testing.assert_allclose(ours["log_prob"], weight * theirs["log_prob"], rtol=1e-13)
        assert np.abs(theirs["log_prob"]).max() > 1e-3
        assert (ours["log_sum_sq"] == 0).all()
    # Weights are not clipped at 1.
    sure = changed(changed(y, 0, log_sum_sq=y.responses[0].log_prob - 1), 1, log_sum_sq=y.responses[1].log_prob)
    assert get("wpo").value(sure) == pytest.approx(math.e * float(get("dpo").value(sure.pair)))


def test_over_any_base():
    y = group(6)
    ipo = PerToken(get("ipo", tau=0.4))
    assert same(LD(ipo, 1.0), OnPairs(ipo), y)
    assert not same(LD(ipo, 0.4), OnPairs(ipo), y)
    assert LD(get("slic"), 0.4).claims == get("slic").claims
    # The lengths that the base divides by stay.
    surplus = changed(y, 1, log_prob=np.r_[y.responses[1].log_prob[:3], 0, 0], ref=np.r_[y.responses[1].ref[:3], 0, 0])
    assert LD(ipo, 0.0).value(y) == pytest.approx(float(ipo.value(surplus.pair)))
    # Tokens beyond the shorter length are pulled alpha as hard.
    for alpha in (0.0, 0.3):
        pull = gradients(get("ld_dpo", alpha=alpha), y)[1]["log_prob"]
        np.testing.assert_allclose(pull[3:], alpha * pull[0], rtol=1e-14)
        assert pull[0] > 1e-3
    weighted = WPOWeighted(get("gpo_hinge"))
    assert not weighted.claims.differentiable
    assert not weighted.claims.convex
    assert weighted.value(y) > 0
    assert same(WPOWeighted(get("dpo")), get("wpo"), y)
    assert r"\alpha" in LD(ipo, 0.4).latex()
    assert r"\mathrm{sg}" in weighted.latex()


def test_ld_of_equal_lengths_is_a_margin_loss():
    loss, sample = get("ld_dpo", beta=0.7, alpha=0.3), Sample("x", ((0, 1), (2, 3)), (-1.0, -2.5))
    form = loss.margin(sample)
    assert form is not None
    y = group(3, 4, 4)
    u, u_ref = y.pair.u, y.pair.u_ref
    assert replace(form, u_ref=u_ref).value(u) == pytest.approx(float(loss.value(y)))
    assert form.u_ref == 1.5
    longer = Sample("x", ((0, 1), (2, 3, 1)), (-1.0, -2.5))
    assert loss.margin(longer) is None
    assert get("ld_dpo", alpha=1.0).margin(longer) is not None
    assert LD(get("cal_dpo"), 0.5).margin(sample) is None
    assert all(get(name).margin(sample) is None for name in NAMES if name != "ld_dpo")


@pytest.mark.parametrize("make", [lambda base: LD(base, 0.5), WPOWeighted])
@pytest.mark.parametrize("base", ["dpo", get("tdpo1"), SFT(get("dpo"), 0.1, "batch_token")], ids=repr)
def test_bases_must_be_losses_of_one_pair(make, base):
    with pytest.raises(ValueError, match="base must be a loss"):
        make(base)


# ---- masks


def test_activation_masks_rank_tokens_within_their_response():
    hidden = np.random.default_rng(0).normal(size=(5, D))
    mask = activation_mask(NUMPY, hidden)
    mean = hidden.mean(-1)
    assert mask[mean.argmin()] == 0
    assert mask[mean.argmax()] == 1
    assert (np.argsort(mask) == np.argsort(mean)).all()
    # Every increasing affine map of the activations gives the same mask; a decreasing one turns it over.
    np.testing.assert_allclose(activation_mask(NUMPY, 3.7 * hidden - 2.2), mask, atol=1e-14)
    np.testing.assert_allclose(activation_mask(NUMPY, -hidden), 1 - mask, atol=1e-14)
    assert activation_mask(NUMPY, np.full((4, D), 0.3)).tolist() == [1.0] * 4
    # Centred vectors differ by rounding alone, which is no activation.
    centred = hidden - hidden.mean(-1, keepdims=True)
    assert np.ptp(centred.mean(-1)) > 0
    np.testing.assert_allclose(activation_mask(NUMPY, centred), 1, atol=1e-15)
    assert activation_mask(NUMPY, centred + 1e-9 * np.arange(5)[:, None])[0] == 0
    assert activation_mask(NUMPY, hidden[:1]).tolist() == [1.0]


def test_hooks_are_averaged_type_by_type():
    a, b, c = np.random.default_rng(1).normal(size=(3, 4, D))
    one = [activation_mask(NUMPY, x) for x in (a, b, c)]
    expected = (one[0] + (one[1] + one[2]) / 2) / 2
    np.testing.assert_allclose(activation_mask(NUMPY, (a, (b, c))), expected, atol=1e-15)
    assert np.abs(activation_mask(NUMPY, (a, b, c)) - expected).max() > 0.01
    y = group(2, 4, 4)
    two = Group(tuple(edited(t, hidden=(t.hidden, t.hidden)) for t in y.responses), y.rewards)
    assert get("mapo").value(two) == get("mapo").value(y)


def test_masks_of_zero_leave_nothing():
    y = group(8)
    for loss in (SparsePO(mask_u=MaskNet(c=0.0)), SparsePO(mask_u=MaskNet(c=-0.5), mask_d=MaskNet(c=-1.0))):
        assert loss.value(y) == pytest.approx(math.log(2), abs=1e-15)
        assert all((g == 0).all() for part in gradients(loss, y) for g in part.values())
    assert np.abs(gradients(SparsePO(mask_u=MaskNet(c=0.01)), y)[0]["log_prob"]).min() > 0


def test_a_token_pulls_as_its_mask_says():
    y = group(9)
    w, l = gradients(TWO_NETS, y)
    score, zero = 0.0, 0
    for t, sign in zip(y.responses, (1, -1), strict=True):
        for x, net in ((t.log_ratio, TWO_NETS.mask_u), (t.kl, TWO_NETS.mask_d)):
            assert net is not None
            score += sign * (net.mask(NUMPY, t.hidden) * x).sum()
    G = 0.6 / (1 + math.exp(0.6 * score))
    for part, t, sign in ((w, y.responses[0], -1), (l, y.responses[1], 1)):
        for f, net in (("log_prob", TWO_NETS.mask_u), ("kl", TWO_NETS.mask_d)):
            assert net is not None
            mask = net.mask(NUMPY, t.hidden)
            zero += (mask == 0).sum()
            np.testing.assert_allclose(part[f], sign * G * mask, rtol=1e-12)
    assert 0 < zero < 16  # both kinds are seen


def test_without_l1_larger_masks_are_better_for_ever():
    """Any pair with a positive score is satisfied by scaling its masks: without L1 there is no best mask."""
    y = group(0)
    if TWO_NETS.value(y) > math.log(2):
        y = Group(y.responses[::-1], y.rewards)

    def at(scale: float, lam: float) -> float:
        nets = [MaskNet(tuple(scale * x for x in n.v), scale * n.c) for n in (TWO_NETS.mask_u, TWO_NETS.mask_d) if n]
        return float(SparsePO(0.6, lam, lam, nets[0], nets[1]).value(y))

    scales = 2.0 ** np.arange(8)
    free, held = ([at(s, lam) for s in scales] for lam in (0.0, 0.02))
    assert (np.diff(free) < 0).all()
    assert free[-1] < 1e-3
    assert held[-1] > min(held) + 1


def test_gradients_of_the_mask_nets():
    """dL/dv and dL/dc by automatic differentiation against difference quotients of the retyped loss."""
    y = group(11)
    for loss in (TWO_NETS, COMMON):
        nets = [n for n in (loss.mask_u, loss.mask_d) if n is not None]
        flat = torch.tensor([x for n in nets for x in (*n.v, n.c)], dtype=torch.float64, requires_grad=True)
        ours = as_torch(y)
        rows = flat.reshape(len(nets), D + 1)
        masks = [[token_mask(torch_ops(), t.hidden, row[:D], row[D]) for t in ours.responses] for row in rows]
        (found,) = torch.autograd.grad(loss.masked(torch_ops(), ours, masks[0], masks[-1]), flat)

        def at(x: np.ndarray, loss: SparsePO = loss) -> Any:
            nets = [MaskNet(tuple(row[:D]), row[D]) for row in x.reshape(-1, D + 1)]
            moved = replace(loss, mask_u=nets[0], mask_d=nets[1] if len(nets) > 1 else None)
            return paper(moved, "sparse_po", y)

        with mpmath.workdps(40):
            eye = 2.0**-20 * np.eye(len(flat))  # an exact step; its error is of the order of 1e-12
            x = flat.detach().numpy()
            exact = [float((at(x + e) - at(x - e)) / mpmath.mpf(2.0**-19)) for e in eye]
        np.testing.assert_allclose(found.numpy(), exact, atol=1e-10)
        assert np.abs(found.numpy()).min() > 1e-4


def torch_ops() -> Any:
    from theory.losses._base import torch_ops as cached

    return cached()


def test_layer_norm_is_torchs():
    hidden = np.random.default_rng(3).normal(size=(6, D))
    v, c = np.array([0.9, -0.4, 0.3, 0.2]), 0.1
    theirs = torch.relu(torch.layer_norm(torch.tensor(hidden), (D,)) @ torch.tensor(v) + c).numpy()
    np.testing.assert_allclose(token_mask(NUMPY, hidden, v, c), theirs, atol=1e-14)
    assert (theirs == 0).any()
    assert (theirs > 0).any()


def test_random_nets_are_seeded():
    net = MaskNet.random(64, seed=1)
    assert net == MaskNet.random(64, seed=1)
    assert net != MaskNet.random(64, seed=2)
    assert len(net.v) == 64
    assert 0.1 < max(map(abs, net.v)) <= 1 / 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskNet(0.3), "v must be a sequence of numbers"),  # type: ignore[arg-type]
        (lambda: MaskNet((0.1, math.nan)), "v must be in"),
        (lambda: MaskNet((), math.inf), "c must be in"),
        (
            lambda: MaskNet((0.1,)).mask(NUMPY, np.zeros((2, 3))),
            r"one entry per feature of the hidden vectors \(3\), got 1",
        ),
        (lambda: SparsePO(mask_u=0.5), "SparsePO.mask_u must be a MaskNet"),  # type: ignore[arg-type]
        (lambda: SparsePO(mask_d=0.5), "SparsePO.mask_d must be a MaskNet"),  # type: ignore[arg-type]
        (lambda: SparsePO(lam_u=-0.1), "SparsePO.lam_u must be in"),
        (lambda: SparsePO(beta=0.0), "SparsePO.beta must be in"),
        (lambda: LD(get("dpo"), 1.1), "alpha must be in"),
        (lambda: get("tdpo2", alpha=-0.1), "TDPO2.alpha must be in"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---- on a model: two responses that share a suffix, y+ = (0, 2, 3) and y- = (1, 2, 3)

PLUS, MINUS = (0, 2, 3), (1, 2, 3)


def shared_suffix(p_plus: float, p_minus: float, V: int = 6, offset: float = 3.0) -> UnconstrainedFeatures:
    """A model that gives the suffix tokens probability p_plus after y+'s edit and p_minus after y-'s.

    W holds unit vectors and a zero column: the first V features of h are logits, the last is common to all contexts.
    """

    def hidden(likely: tuple[int, ...], p: float) -> np.ndarray:
        pi = np.full(V, (1 - p * len(likely)) / (V - len(likely)))
        pi[list(likely)] = p
        return np.r_[np.log(pi) - np.log(pi).mean(), offset]

    H = {("x", ()): hidden((0, 1), 0.2)}
    for edit, p in ((0, p_plus), (1, p_minus)):
        H[("x", (edit,))], H[("x", (edit, 2))] = hidden((2,), p), hidden((3,), p)
    W = np.c_[np.eye(V), np.zeros(V)]
    return UnconstrainedFeatures.from_samples(W, H, [Sample("x", (PLUS, MINUS))])


def moved(model: UnconstrainedFeatures) -> UnconstrainedFeatures:
    """The model away from its reference."""
    rng = np.random.default_rng(5)
    return model.with_parameters(
        model.W + 0.2 * rng.normal(size=model.W.shape), model.H + 0.2 * rng.normal(size=model.H.shape)
    )


def edit_only(model: UnconstrainedFeatures) -> SparsePO:
    """Masks of 1 on the token that differs and exactly 0 on the shared suffix, by a net that solves for them."""
    x = model.H - model.H.mean(1, keepdims=True)
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5)
    target = [1.0 if prefix == () else -1.0 for _, prefix in model.contexts]
    *v, c = np.linalg.lstsq(np.c_[x, np.ones(len(x))], np.array(target), rcond=None)[0]
    loss = SparsePO(beta=0.5, mask_u=MaskNet(tuple(v), c))
    np.testing.assert_allclose(loss.mask_u.mask(NUMPY, model.H), np.maximum(target, 0), atol=1e-12)
    return loss


@pytest.mark.parametrize("loss", EXAMPLES, ids=repr)
def test_on_a_model_the_tokens_are_the_papers(loss):
    """From W and H to the loss, by loops; the gradient in every parameter by central differences."""
    loss = replace(loss, mask_u=MaskNet.random(7, 1)) if isinstance(loss, SparsePO) and loss.mask_u.v else loss
    loss = replace(loss, mask_d=MaskNet.random(7, 2)) if isinstance(loss, SparsePO) and loss.mask_d else loss
    start = moved(shared_suffix(0.7, 0.3))  # generic: the activations of shared_suffix are all equal
    reference = UnconstrainedFeatures(start.W, start.H, (Sample("x", (PLUS, MINUS)),), start.contexts)
    model = moved(reference)
    prefixes = [prefix for _, prefix in model.contexts]
    origin = reference.W, dict(zip(prefixes, reference.H, strict=True))

    def value(W: np.ndarray, H: np.ndarray) -> float:
        W_now, H_now = W, dict(zip(prefixes, H, strict=True))
        live, stopped = (
            [retyped.tokens(*at, *origin, y) for y in (PLUS, MINUS)]
            for at in ((W_now, H_now), (model.W, dict(zip(prefixes, model.H, strict=True))))
        )
        return float(retyped.PAPER[loss.name](loss, *live, *stopped))

    objective = Objective.of([model], loss)
    W, H = (x.requires_grad_() for x in stacked([model]))
    total = objective(W, H).sum()
    assert total.item() == pytest.approx(value(model.W, model.H), rel=1e-12)
    found = [g[0].numpy() for g in torch.autograd.grad(total, (W, H))]
    rng = np.random.default_rng(2)
    for _ in range(6):
        dW, dH = rng.normal(size=model.W.shape), rng.normal(size=model.H.shape)
        step = 1e-5
        rise = value(model.W + step * dW, model.H + step * dH) - value(model.W - step * dW, model.H - step * dH)
        along = (found[0] * dW).sum() + (found[1] * dH).sum()
        assert along == pytest.approx(rise / (2 * step), abs=1e-7)
    assert max(np.abs(g).max() for g in found) > 1e-3


# Probability of the suffix after y+'s edit and after y-'s: who is surer decides what masking it does.
CASES = [(0.9, 0.3), (0.7, 0.5), (0.5, 0.7), (0.3, 0.9)]


@pytest.mark.parametrize(("p_plus", "p_minus"), CASES)
def test_masking_a_shared_suffix_reduces_displacement_where_y_plus_is_surer_of_it(p_plus, p_minus):
    """With W alone in training, a shared token adds alpha+ |h+|^2 - alpha- <h+, h-> to the force on ln pi(y+).

    Where y+ is surer of the token, alpha+ is the smaller, and the sum in time pushes ln pi(y+) down: masked, y+ loses
    less. Where y- is surer, the suffix lifts y+ and masking it costs.
    """
    model = shared_suffix(p_plus, p_minus)
    runs = [
        gradient_descent(model, loss, Optimizer("sgd", 0.03), 250, lr_hidden=0.0, every=5)
        for loss in (SparsePO(beta=0.5), edit_only(model))
    ]
    whole, masked = (run.log_probs(PLUS) - run.log_probs(PLUS)[0] for run in runs)
    assert min(run.margin()[-1] - run.margin()[0] for run in runs) > 2  # both learn the preference
    if p_plus > p_minus:
        assert whole[-1] < masked[-1] - 0.1
        assert whole.min() < -0.1  # displaced, and less so when masked
        assert masked.min() > whole.min() + 0.1
    else:
        assert whole[-1] > masked[-1] + 0.1
        assert masked.min() < whole.min() - 0.1


def test_equally_sure_of_the_suffix_masking_changes_nothing():
    """The suffix of y+ and of y- then cancel term by term, with W alone in training; not so when hidden vectors move."""
    model = shared_suffix(0.5, 0.5)
    runs = [
        [
            gradient_descent(model, loss, Optimizer("sgd", 0.01), 100, lr_hidden=rate).log_probs(PLUS)
            for rate in (0.0, 1.0)
        ]
        for loss in (SparsePO(beta=0.5), edit_only(model))
    ]
    np.testing.assert_allclose(runs[0][0], runs[1][0], atol=1e-9)
    assert np.abs(runs[0][0] - runs[0][0][0]).max() > 0.1
    assert np.abs(runs[0][1] - runs[1][1]).max() > 0.1


@pytest.mark.parametrize("eta_h", [0.0, 1.0])
@pytest.mark.parametrize(("p_plus", "p_minus"), CASES)
def test_the_first_step_follows_the_double_sum_over_unmasked_tokens(p_plus, p_minus, eta_h):
    model = shared_suffix(p_plus, p_minus)
    H = {prefix: h for (_, prefix), h in zip(model.contexts, model.H, strict=True)}
    rates = []
    for loss, masked in ((SparsePO(beta=0.5), set()), (edit_only(model), {1, 2})):
        exact = retyped.initial_rate(model.W, H, PLUS, MINUS, masked, 0.25, eta_h)
        step = 1e-6
        a = gradient_descent(model, loss, Optimizer("sgd", step), 1, lr_hidden=eta_h).log_probs(PLUS)
        assert (a[1] - a[0]) / step == pytest.approx(exact, rel=1e-4)
        rates.append(exact)
    assert abs(rates[0] - rates[1]) > 0.02 * rates[0]


# ---- masks that learn


def learn(model: UnconstrainedFeatures, loss: SparsePO, steps: int = 300, **options: Any) -> MaskRun:
    return learn_masks(model, loss, Optimizer("sgd", 0.02), steps, **{"every": 10, "mask_lr": 0.02} | options)


def test_one_update_is_sgd_on_the_model_and_adamw_on_the_nets():
    """Away from the reference, where nothing is zero; AdamW's first step is lr in the direction of the sign."""
    model = moved(shared_suffix(0.7, 0.3))
    loss = SparsePO(0.6, 0.02, 0.03, MaskNet.random(7, 1), MaskNet.random(7, 2))
    run = learn_masks(model, loss, Optimizer("sgd", 0.1), 1, mask_lr=1e-3, weight_decay=0.5, lr_hidden=0.5)
    plain = gradient_descent(model, loss, Optimizer("sgd", 0.1), 1, lr_hidden=0.5)
    np.testing.assert_array_equal(run.trajectory.W, plain.W)
    np.testing.assert_array_equal(run.trajectory.H, plain.H)
    assert np.abs(plain.W[1] - plain.W[0]).max() > 1e-3
    assert run.losses[0] == loss
    prefixes = [prefix for _, prefix in model.contexts]
    assert model.origin is not None
    pairs = [
        retyped.tokens(
            model.W,
            dict(zip(prefixes, model.H, strict=True)),
            model.origin[0],
            dict(zip(prefixes, model.origin[1], strict=True)),
            y,
        )
        for y in (PLUS, MINUS)
    ]
    checked = 0
    for name in ("mask_u", "mask_d"):
        before, after = getattr(loss, name), getattr(run.losses[1], name)
        old, new = np.array([*before.v, before.c]), np.array([*after.v, after.c])
        for i in range(len(old)):

            def at(s: float) -> Any:
                x = old.copy()  # noqa: B023
                x[i] += s  # noqa: B023
                return retyped.sparse_po(replace(loss, **{name: MaskNet(tuple(x[:-1]), x[-1])}), *pairs, *pairs)  # noqa: B023

            slope = float(at(1e-4) - at(-1e-4)) / 2e-4
            if abs(slope) > 1e-4:  # AdamW takes the sign
                assert new[i] == pytest.approx(old[i] * (1 - 1e-3 * 0.5) - 1e-3 * math.copysign(1, slope), abs=1e-6)
                checked += 1
    assert checked >= 8


def test_frozen_masks_are_training_with_the_loss_as_it_stands():
    model = shared_suffix(0.7, 0.3)
    run = learn(model, SparsePO(beta=0.5), 50, mask_lr=0.0, lr_hidden=0.3)
    plain = gradient_descent(model, get("tdpo1", beta=0.5), Optimizer("sgd", 0.02), 50, lr_hidden=0.3, every=10)
    np.testing.assert_allclose(run.trajectory.log_probs(PLUS), plain.log_probs(PLUS), atol=1e-13)
    assert (run.masks(PLUS) == 1).all()
    assert (run.sparsity == 0).all()
    learned = learn(model, SparsePO(beta=0.5), 50, lr_hidden=0.3)
    assert np.abs(learned.trajectory.log_probs(PLUS) - plain.log_probs(PLUS)).max() > 0.01


def test_with_l1_the_masks_find_the_token_that_matters():
    """The shared suffix is masked out exactly, the token that differs is kept; and y+, displaced without masks, is not."""
    model = shared_suffix(0.7, 0.3)
    run = learn(model, SparsePO(beta=0.5, lam_u=0.02, lam_d=0.02))
    for y in (PLUS, MINUS):
        masks = run.masks(y)
        assert (masks[0] == 1).all()
        assert masks[-1, 0] > 1
        assert masks[-1, 1:].tolist() == [0.0, 0.0]
        np.testing.assert_array_equal(run.masks(y, kind="d"), masks)  # common
    assert run.sparsity[0] == 0
    assert run.sparsity[-1] == pytest.approx(4 / 6)
    unmasked = learn(model, SparsePO(beta=0.5), mask_lr=0.0).trajectory
    a, free = run.trajectory.log_probs(PLUS), unmasked.log_probs(PLUS)
    assert run.trajectory.margin()[-1] - run.trajectory.margin()[0] > 2
    assert free[-1] < free[0] - 0.3
    assert a[-1] > free[-1] + 0.3


def test_without_l1_the_masks_grow_instead_of_the_margin():
    model = shared_suffix(0.7, 0.3)
    run = learn(model, SparsePO(beta=0.5))
    assert run.masks(PLUS)[-1].min() > 3
    assert (run.sparsity == 0).all()
    frozen = learn(model, SparsePO(beta=0.5), mask_lr=0.0)
    assert run.trajectory.margin()[-1] < frozen.trajectory.margin()[-1] - 1
    assert run.losses[-1].value(tokens_of(run)) < frozen.losses[-1].value(tokens_of(frozen))


def tokens_of(run: MaskRun) -> Group:
    """The trained model's tokens, as floats of the retyped loops."""
    model, end = run.trajectory.model, run.trajectory.at(-1)
    prefixes = [prefix for _, prefix in model.contexts]
    here, there = (dict(zip(prefixes, m.H, strict=True)) for m in (end, model))
    rows = [retyped.tokens(end.W, here, model.W, there, y) for y in (PLUS, MINUS)]
    fields = [[[getattr(t, f) for t in y] for f in FIELDS] for y in rows]
    return Group(tuple(Tokens(*(np.array(x, dtype=float) for x in y)) for y in fields), (1.0, 0.0))


def test_two_nets_learn_two_masks():
    model = shared_suffix(0.7, 0.3)
    run = learn(model, SparsePO(beta=0.5, lam_u=0.02, lam_d=0.02, mask_d=MaskNet()))
    assert run.masks(PLUS)[-1, 0] > 1
    assert (run.masks(PLUS, kind="d")[-1] == 0).all()  # the KL of y+ is not worth its price
    assert run.sparsity[-1] > 0.5
    dead = learn(model, SparsePO(beta=0.5, mask_u=MaskNet(c=-1.0), mask_d=MaskNet(c=-1.0)), 20)
    assert (dead.sparsity == 1).all()
    # Nets whose masks are all zero have no gradient: nothing learns.
    assert np.ptp(dead.trajectory.log_probs(PLUS)) == 0


def test_runs_repeat_exactly_and_keep_the_reference():
    model = shared_suffix(0.7, 0.3)
    loss = SparsePO(beta=0.5, lam_u=0.01, mask_u=MaskNet.random(7, 3))
    one, two = (learn(model, loss, 40) for _ in range(2))
    np.testing.assert_array_equal(one.trajectory.W, two.trajectory.W)
    assert one.losses == two.losses
    coarse = learn(model, loss, 40, every=25)
    assert coarse.trajectory.times.tolist() == [0, 25, 40]
    np.testing.assert_array_equal(coarse.trajectory.W[-1], one.trajectory.W[-1])
    # The reference stays behind when training goes on from the end: its masks are those of the same hidden vectors.
    rest = learn_masks(one.trajectory.at(-1), one.losses[-1], Optimizer("sgd", 0.02), 0)
    np.testing.assert_array_equal(rest.masks(PLUS)[0], one.masks(PLUS)[-1])


def test_the_record_saves_and_prints():
    run = learn(shared_suffix(0.7, 0.3), SparsePO(beta=0.5, lam_u=0.02, lam_d=0.02), 30)
    saved = json.loads(json.dumps(run.to_dict()))
    assert saved["steps"] == [0, 10, 20, 30]
    row = saved["samples"][0]["dispreferred"]
    assert row["tokens"] == list(MINUS)
    np.testing.assert_array_equal(row["mask_u"], run.masks(MINUS))
    np.testing.assert_array_equal(row["log_probs"], run.trajectory.log_probs(MINUS))
    assert "30 steps of SparsePO" in str(run)
    with pytest.raises(ValueError, match="kind must be 'u'"):
        run.masks(PLUS, kind="w")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": get("tdpo1")}, "loss must be a SparsePO"),
        ({"optimizer": "sgd"}, "optimizer must be a sims.Optimizer"),
        ({"steps": -1}, "steps must be an integer"),
        ({"mask_lr": -1.0}, "mask_lr must be in"),
        ({"weight_decay": math.nan}, "weight_decay must be in"),
        ({"loss": SparsePO(mask_u=MaskNet((0.1, 0.2)))}, "mask nets must have 7 weights"),
    ],
)
def test_learning_names_bad_arguments(options, message):
    arguments = {"loss": SparsePO(), "optimizer": Optimizer("sgd", 0.1), "steps": 1} | options
    with pytest.raises(ValueError, match=message):
        learn_masks(shared_suffix(0.7, 0.3), **arguments)

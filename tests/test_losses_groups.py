"""D2O and GRPO on explicit groups: against their papers retyped in mpmath, derivatives, reductions, limits, claims."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from theory import Sample
from theory.groups import WeightedGRPO, preference_weights
from theory.losses import LOSSES, Group, Pair, Tokens, Weighted
from theory.losses.d2o import D2O
from theory.losses.dpo import DPO
from theory.losses.grpo import GRPO, advantages

# ---- groups


def group(
    log_ratios: list[Any], rewards: tuple[float, ...], ref: float = -1.3, kind: Callable[..., Any] = np.array
) -> Group:
    """A group whose responses have the given log-ratios per token (lists or arrays, last axis the tokens)."""
    out = []
    for i, ratio in enumerate(log_ratios):
        ratio = ratio if torch.is_tensor(ratio) else kind(ratio)
        frozen = 0 * (ratio.detach() if torch.is_tensor(ratio) else ratio) + ref - 0.1 * i
        out.append(Tokens(ratio + frozen, frozen, 0 * frozen, 0 * frozen, None))
    return Group(tuple(out), rewards)


def random_ratios(seed: int, lengths: tuple[int, ...], batch: tuple[int, ...] = ()) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [0.5 * rng.normal(size=(*batch, n)) for n in lengths]


GROUPS = {
    "pair": ((2, 3), (1.0, 0.0)),
    "three anchors": ((2, 3, 1, 4), (1.0, 0.0, 1.0, 1.0)),
    "rewards of any kind": ((1, 2, 4), (0.7, -0.4, 0.2)),
}

# ---- the papers, retyped in plain loops


def d2o_paper(ratios: Any, rewards: tuple[float, ...], alpha: float, beta: float) -> Any:
    """-ln sigmoid(beta/K sum_i ln [pi(y_i)/pi_ref(y_i)] - alpha ln [pi(y-)/pi_ref(y-)])."""
    total, K = mpmath.mpf(0), 0
    for ratio, reward in zip(ratios, rewards, strict=True):
        if reward > 0:
            K += 1
            for x in ratio:
                total += x
    return -mpmath.log(
        1 / (1 + mpmath.exp(-(mpmath.mpf(beta) / K * total - mpmath.mpf(alpha) * mpmath.fsum(ratios[1]))))
    )


def grpo_paper(ratios: Any, rewards: tuple[float, ...], eps: float, beta: float, length_power: float) -> Any:
    """-(1/G) sum_i (1/|y_i|) sum_t { min[rho A, clip(rho) A] - beta (1/rho - ln(1/rho) - 1) }."""
    G = len(rewards)
    mean = mpmath.fsum(rewards) / G
    deviation = mpmath.sqrt(mpmath.fsum((r - mean) ** 2 for r in rewards) / G)
    out = mpmath.mpf(0)
    for ratio, reward in zip(ratios, rewards, strict=True):
        A = (reward - mean) / deviation
        for x in ratio:
            rho = mpmath.exp(x)
            clipped = min(max(rho, 1 - mpmath.mpf(eps)), 1 + mpmath.mpf(eps))
            kl = mpmath.exp(-x) - (-x) - 1
            out += (min(rho * A, clipped * A) - mpmath.mpf(beta) * kl) / mpmath.mpf(len(ratio)) ** length_power
    return -out / G


CASES: dict[str, tuple[Any, Callable[..., Any]]] = {
    "d2o": (D2O(), lambda r, w: d2o_paper(r, w, 0.1, 0.1)),
    "d2o, generic": (D2O(alpha=0.4, beta=0.7), lambda r, w: d2o_paper(r, w, 0.4, 0.7)),
    "grpo": (GRPO(), lambda r, w: grpo_paper(r, w, 0.2, 0.0, 1.0)),
    "grpo, KL": (GRPO(eps=0.35, beta=0.04), lambda r, w: grpo_paper(r, w, 0.35, 0.04, 1.0)),
    "grpo, sums": (GRPO(length_power=0.0), lambda r, w: grpo_paper(r, w, 0.2, 0.0, 0.0)),
    "grpo, no clip": (GRPO(eps=1e6), lambda r, w: grpo_paper(r, w, 1e6, 0.0, 1.0)),
    "grpo, eps = 1": (GRPO(eps=1.0), lambda r, w: grpo_paper(r, w, 1.0, 0.0, 1.0)),
    "grpo, between": (GRPO(eps=0.1, beta=2.0, length_power=0.5), lambda r, w: grpo_paper(r, w, 0.1, 2.0, 0.5)),
}
each_case = pytest.mark.parametrize("case", CASES)
each_group = pytest.mark.parametrize("kind", GROUPS)


def digits(ratios: list[np.ndarray]) -> list[list[Any]]:
    return [[mpmath.mpf(float(x)) for x in ratio] for ratio in ratios]


def gap(loss: Any, paper: Callable[..., Any], lengths: tuple[int, ...], rewards: tuple[float, ...]) -> float:
    """Largest difference of numpy's and torch's value from the retyped one, over a few groups."""
    worst = 0.0
    for seed in range(8):
        ratios = random_ratios(seed, lengths)
        with mpmath.workdps(40):
            exact = paper(digits(ratios), rewards)
        seen = loss.value(group(ratios, rewards)), loss.torch_value(group(ratios, rewards, kind=torch.tensor))
        worst = max(worst, *(float(abs(float(x) - exact)) for x in seen))
    return worst


@each_case
@each_group
def test_value_is_the_papers(case, kind):
    assert gap(*CASES[case], *GROUPS[kind]) < 1e-14


WRONG = {
    "alpha and beta swapped": (D2O(alpha=0.4, beta=0.7), lambda r, w: d2o_paper(r, w, 0.7, 0.4)),
    "anchors summed": (D2O(alpha=0.4, beta=0.7), lambda r, w: d2o_paper(r, w, 0.4, 0.7 * sum(x > 0 for x in w))),
    "deviation of the sample": (
        GRPO(),
        lambda r, w: grpo_paper(r, w, 0.2, 0, 1) * math.sqrt((len(w) - 1) / len(w)),
    ),
    "no length": (GRPO(), lambda r, w: grpo_paper(r, w, 0.2, 0, 0)),
    "another clip": (GRPO(), lambda r, w: grpo_paper(r, w, 0.25, 0, 1)),
    "no KL": (GRPO(beta=0.04), lambda r, w: grpo_paper(r, w, 0.2, 0, 1)),
    "KL the other way": (
        GRPO(beta=0.04),
        lambda r, w: (
            grpo_paper(r, w, 0.2, 0, 1)
            + mpmath.mpf(0.04) * sum(mpmath.fsum(mpmath.exp(x) - x - 1 for x in y) / len(y) for y in r) / len(r)
        ),
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_formula_is_told(wrong):
    assert gap(*WRONG[wrong], *GROUPS["three anchors"]) > 1e-3


def gradients(loss: Any, ratios: list[np.ndarray], rewards: tuple[float, ...]) -> list[np.ndarray]:
    """dL/d ln pi(y_t) of every token, by automatic differentiation."""
    x = [torch.tensor(r, dtype=torch.float64, requires_grad=True) for r in ratios]
    total = loss.torch_value(group(x, rewards)).sum()
    if not total.requires_grad:
        return [np.zeros_like(r) for r in ratios]
    found = torch.autograd.grad(total, x, allow_unused=True)
    return [np.zeros_like(r) if g is None else g.numpy() for g, r in zip(found, ratios, strict=True)]


@each_case
@each_group
def test_gradient_of_every_token_is_a_difference_of_the_papers_formula(case, kind):
    (loss, paper), (lengths, rewards) = CASES[case], GROUPS[kind]
    moved, step = 0.0, mpmath.mpf(10) ** -25
    for seed in range(4):
        ratios = random_ratios(seed, lengths)
        seen = gradients(loss, ratios, rewards)
        with mpmath.workdps(60):
            x = digits(ratios)
            for i, k in ((i, k) for i, n in enumerate(lengths) for k in range(n)):
                ends = []
                for sign in (1, -1):
                    y = [list(row) for row in x]
                    y[i][k] += sign * step
                    ends.append(paper(y, rewards))
                assert abs(seen[i][k] - float((ends[0] - ends[1]) / (2 * step))) < 1e-13
                moved = max(moved, abs(seen[i][k]))
    assert moved > 1e-2


@each_case
def test_a_batch_is_its_rows(case):
    loss, _ = CASES[case]
    lengths, rewards = GROUPS["three anchors"]
    ratios = random_ratios(3, lengths, (5,))
    rows = [float(loss.value(group([r[b] for r in ratios], rewards))) for b in range(5)]
    batch = loss.value(group(ratios, rewards))
    assert batch.shape == (5,)
    assert np.ptp(batch) > 1e-3
    np.testing.assert_allclose(batch, rows, rtol=1e-15, atol=1e-15)


# ---- far out


@each_case
@pytest.mark.parametrize("size", [30.0, 745.0, 1e4])
def test_nothing_is_nan_far_out(case, size):
    """And the loss is infinite only where a ratio above e^709 is penalised, or one below e^-709 under a KL term."""
    loss, _ = CASES[case]
    for signs in itertools.product((-size, 0.0, size), repeat=4):
        ratios, rewards = [np.array(signs[:2]), np.array(signs[2:])], (1.0, 0.0)
        seen = (
            float(loss.value(group(ratios, rewards))),
            float(loss.torch_value(group(ratios, rewards, kind=torch.tensor))),
        )
        over = isinstance(loss, GRPO) and size > 709 and (max(signs[2:]) > 0 or (loss.beta > 0 and min(signs) < 0))
        assert seen == pytest.approx([math.inf] * 2) if over else np.isfinite(seen).all()
        assert seen[0] == pytest.approx(seen[1], rel=1e-14)
        slopes = np.concatenate(gradients(loss, ratios, rewards))
        assert not np.isnan(slopes).any()
        weighted = WeightedGRPO(loss, ((1.0, 0.5), (1.0, 0.0))) if isinstance(loss, GRPO) else loss
        assert not np.isnan(
            [*np.concatenate(gradients(weighted, ratios, rewards)), weighted.value(group(ratios, rewards))]
        ).any()


@given(st.lists(st.floats(-3, 3), min_size=6, max_size=6), st.sampled_from([0.05, 0.2, 0.6]))
def test_grpo_is_bounded_below_by_its_clips(x, eps):
    rewards = (1.0, 0.0, 0.3)
    loss, bound = GRPO(eps=eps), -eps * float(np.mean(np.abs(advantages(rewards))))
    assert float(loss.value(group([x[:1], x[1:3], x[3:]], rewards))) >= bound - 1e-12
    A = advantages(rewards)
    past = [math.copysign(4.0, a) * np.ones(n) for a, n in zip(A, (1, 2, 3), strict=True)]
    assert float(loss.value(group(past, rewards))) == pytest.approx(bound, rel=1e-12)


# ---- the start of training


@pytest.mark.parametrize("rewards", [(1, 0), (1, 0, 0), (1, 0, 1, 1, 0), (1, 0, 1, 1, 1, 1, 1)])
def test_binary_grpo_starts_as_group_preference(rewards):
    """Lemma 4.2 of Deng et al.: weights p+ = (1-p)/sqrt(p(1-p)) and p- = p/sqrt(p(1-p)), success rate p."""
    G = len(rewards)
    p = sum(rewards) / G
    up, down = (1 - p) / math.sqrt(p * (1 - p)), p / math.sqrt(p * (1 - p))
    np.testing.assert_allclose(preference_weights(p), (up, down), rtol=1e-14)
    ratios = [np.zeros(i + 1) for i in range(G)]
    for loss in (GRPO(), GRPO(beta=0.5), GRPO(length_power=0.0)):  # the KL term starts flat
        assert float(loss.value(group(ratios, rewards))) == pytest.approx(
            0.0 if loss.length_power else sum(-(up if r else -down) * (i + 1) for i, r in enumerate(rewards)) / G,
            abs=1e-14,
        )
        for i, (slope, r) in enumerate(zip(gradients(loss, ratios, rewards), rewards, strict=True)):
            expected = -(up if r else -down) / G / (i + 1) ** loss.length_power
            np.testing.assert_allclose(slope, expected, rtol=1e-13)


@pytest.mark.parametrize("reward", [0.1, 1.0, 0.0, -2.7])
@pytest.mark.parametrize("G", [2, 3, 7])
def test_equal_rewards_teach_nothing(reward, G):
    rewards = (reward,) * G
    ratios = random_ratios(1, (2,) * G)
    assert advantages(rewards) == (0.0,) * G
    assert float(GRPO().value(group(ratios, rewards))) == 0.0
    assert not np.any(gradients(GRPO(), ratios, rewards))
    assert float(GRPO().value(group([r * 1e4 for r in ratios], rewards))) == 0.0
    only_kl = gradients(GRPO(beta=0.5), ratios, rewards)
    np.testing.assert_allclose(only_kl, 0.5 * (1 - np.exp(-np.array(ratios))) / (2 * G), rtol=1e-12)


def test_a_deviation_of_equal_rewards_can_be_rounding_alone():
    """Why equal rewards are told by themselves: the deviation of three times 0.1 is not 0."""
    assert np.std([0.1] * 3) > 0


def test_advantages_have_mean_zero_and_deviation_one():
    A = advantages((0.7, -0.4, 0.2, 11.0))
    assert np.mean(A) == pytest.approx(0, abs=1e-15)
    assert np.std(A) == pytest.approx(1, rel=1e-15)
    assert np.argsort(A).tolist() == [1, 2, 0, 3]


# ---- reductions


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.1), (0.4, 0.7), (2.0, 0.3)])
def test_one_anchor_is_dpo_with_a_weight_per_response(alpha, beta):
    loss, pair = D2O(alpha=alpha, beta=beta), Weighted(DPO(1.0), beta, alpha)
    seen = []
    for seed in range(6):
        y = group(random_ratios(seed, (2, 3)), (1.0, 0.0))
        seen.append(float(loss.value(y)))
        assert seen[-1] == pytest.approx(float(pair.value(y.pair)), rel=1e-13)
    assert np.ptp(seen) > 1e-2


def test_equal_anchors_are_one_anchor():
    ratios = random_ratios(5, (2, 3))
    one = D2O().value(group(ratios, (1, 0)))
    many = Group(tuple(group(ratios, (1, 0)).responses[i] for i in (0, 1, 0, 0)), (1, 0, 1, 1))
    assert float(D2O().value(many)) == pytest.approx(float(one), rel=1e-14)


def test_a_third_response_without_reward_takes_no_part_in_d2o():
    ratios = random_ratios(5, (2, 3, 4))
    slopes = gradients(D2O(), ratios, (1, 0, 0))
    assert not slopes[2].any()
    assert slopes[0].all()
    assert slopes[1].all()
    assert float(D2O().value(group(ratios, (1, 0, 0)))) == float(D2O().value(group(ratios[:2], (1, 0))))


def test_d2o_has_a_margin_where_it_is_dpo_and_nowhere_else():
    sample = Sample("x", ((0, 1), (2,)), (-2.0, -1.1))
    form = D2O(alpha=0.3, beta=0.3).margin(sample)
    assert form is not None
    for da, db in ((1.4, -0.9), (-1.5, 0.9)):
        u = da - 2.0 - (db - 1.1)
        value = D2O(alpha=0.3, beta=0.3).value(group([[da - 0.3, 0.3], [db]], (1, 0)))
        assert float(form.value(u)) == pytest.approx(float(value), rel=1e-13)
    assert D2O(alpha=0.3, beta=0.31).margin(sample) is None
    more = ((0, 1), (2,), (3,))
    assert D2O().margin(Sample("x", more, (-2.0, -1.1, -3.0))) is not None
    assert D2O().margin(Sample("x", more, (-2.0, -1.1, -3.0), (1.0, 0.0, 1.0))) is None
    assert GRPO().margin(sample) is None


@pytest.mark.parametrize("base", [GRPO(), GRPO(eps=0.35, beta=0.04), GRPO(length_power=0.0)], ids=repr)
def test_weights_of_tokens(base):
    """1 changes nothing; 0 leaves a token only its KL term; between, the advantage is scaled."""
    rewards = (1.0, 0.0, 0.3)
    ratios = [np.array(r) for r in ([0.1, -0.05], [0.12, -0.1, 0.08], [0.05])]  # none past its clip
    y, ones = group(ratios, rewards), ((1.0, 1.0), (1.0, 1.0, 1.0), (1.0,))
    assert float(WeightedGRPO(base, ones).value(y)) == pytest.approx(float(base.value(y)), rel=1e-14)
    full = gradients(base, ratios, rewards)
    kl = gradients(GRPO(beta=base.beta, length_power=base.length_power), ratios, (1.0, 1.0, 1.0))
    for factor in (0.0, 0.25):
        eased = WeightedGRPO(base, (ones[0], (1.0, factor, 1.0), ones[2]))
        slopes = gradients(eased, ratios, rewards)
        expected = [f.copy() for f in full]
        expected[1][1] = factor * (full[1][1] - kl[1][1]) + kl[1][1]
        for seen, wanted in zip(slopes, expected, strict=True):
            np.testing.assert_allclose(seen, wanted, rtol=1e-12, atol=1e-15)
        assert abs(slopes[1][1] - full[1][1]) > 1e-2
        assert abs(float(eased.value(y)) - float(base.value(y))) > 1e-2


# ---- claims, both ways


@given(st.lists(st.floats(-4, 4), min_size=14, max_size=14), st.floats(0, 1))
def test_d2o_is_convex_nonnegative_and_pushes_each_response_its_way(x, t):
    rewards, loss = (1.0, 0.0, 1.0), D2O(alpha=0.4, beta=0.7)
    assert loss.claims == type(loss.claims)()
    cut = lambda v: [v[:2], v[2:4], v[4:7]]  # noqa: E731
    ends = np.array(x[:7]), np.array(x[7:])
    value = lambda v: float(loss.value(group(cut(v), rewards)))  # noqa: E731
    assert value((1 - t) * ends[0] + t * ends[1]) <= (1 - t) * value(ends[0]) + t * value(ends[1]) + 1e-12
    assert value(ends[0]) > 0
    up, down, other = gradients(loss, cut(ends[0]), rewards)
    assert (up < 0).all()
    assert (down > 0).all()
    assert (other < 0).all()


def test_what_grpo_denies_has_a_counterexample():
    rewards = (1.0, 0.0)
    value = lambda a, b: float(GRPO().value(group([[a], [b]], rewards)))  # noqa: E731
    claims = GRPO().claims
    assert (claims.convex, claims.nonnegative, claims.differentiable) == (False, False, False)
    assert value(-1.0, 0.0) > (value(-2.0, 0.0) + value(0.0, 0.0)) / 2 + 0.01  # not convex
    assert value(0.1, 0.0) < -0.01  # not above 0
    edge = math.log(1.2)
    below, above = (gradients(GRPO(), [np.array([edge + s]), np.zeros(1)], rewards)[0][0] for s in (-1e-9, 1e-9))
    assert below < -0.5
    assert above == 0.0  # a kink
    assert not claims.reference_free
    same = [[-1.0], [-2.0]]  # ln pi, under two references
    one, other = (
        float(GRPO().value(group([[a - ref] for (a,), ref in zip(same, refs, strict=True)], rewards)))
        for refs in ((-1.0, -2.0), (-1.1, -2.0))
    )
    assert abs(one - other) > 0.01


@given(st.lists(st.floats(-4, 4), min_size=4, max_size=4))
def test_grpo_pushes_each_response_its_way_unless_the_kl_term_pulls_it_back(x):
    rewards, ratios = (1.0, 0.0), [np.array(x[:2]), np.array(x[2:])]
    up, down = gradients(GRPO(), ratios, rewards)
    assert (up <= 0).all()
    assert (down >= 0).all()
    assert GRPO().claims.decreasing
    held = GRPO(beta=0.5)
    assert not held.claims.decreasing
    assert gradients(held, [np.array([1.0]), np.zeros(1)], rewards)[0][0] > 0.1


# ---- errors, names


def test_d2o_wants_an_anchor_and_a_negative():
    ratios = random_ratios(0, (1, 2))
    for rewards in ((0.0, 0.0), (1.0, 1.0), (-1.0, 1.0)):
        with pytest.raises(ValueError, match="rewards must be positive for some response"):
            D2O().value(group(ratios, rewards))


@pytest.mark.parametrize(
    ("cls", "bad"),
    [
        (D2O, {"alpha": 0.0}),
        (D2O, {"beta": -1.0}),
        (GRPO, {"eps": 0.0}),
        (GRPO, {"beta": -0.1}),
        (GRPO, {"length_power": 1.5}),
        (GRPO, {"eps": math.nan}),
    ],
)
def test_parameters_are_validated(cls, bad):
    with pytest.raises(ValueError, match=f"{cls.__name__}.{next(iter(bad))} must be in"):
        cls(**bad)


def test_weights_are_validated():
    with pytest.raises(ValueError, match="base must be a GRPO loss"):
        WeightedGRPO(D2O(), ((1.0,), (1.0,)))
    with pytest.raises(ValueError, match="weights must be in"):
        WeightedGRPO(GRPO(), ((1.0,), (-1.0,)))
    with pytest.raises(ValueError, match=r"weights must hold a number per token of each response \[1, 2\]"):
        WeightedGRPO(GRPO(), ((1.0,), (1.0,))).value(group(random_ratios(0, (1, 2)), (1, 0)))


@pytest.mark.parametrize("name", ["d2o", "grpo"])
def test_they_are_in_the_registry_with_a_formula(name):
    loss = LOSSES[name]()
    assert r"\pi" in loss.latex() or r"\rho" in loss.latex()
    assert len({repr(e) for e in loss.examples()}) >= 2
    with pytest.raises(TypeError, match="looks at tokens"):
        loss.incentives(Pair(0.0, 0.0))

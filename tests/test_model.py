"""The unconstrained-features model in its general form: contexts, shared prefixes, frozen references, large float32 W."""

import dataclasses
import itertools
import math

import numpy as np
import oracles
import pytest
from strategies import random_model

from theory import Sample, UnconstrainedFeatures
from theory.model import contexts_of, inner_products

SAMPLES = (
    Sample("a", ((0, 1, 2), (0, 1, 3))),  # shares its first two tokens
    Sample("a", ((0, 2), (4,))),  # the same prompt: its contexts are shared with the first sample
    Sample("b", ((3,), (1, 1), (2,))),  # three responses, another prompt
)


def general(rng: np.random.Generator, V: int = 5, d: int = 3) -> UnconstrainedFeatures:
    hidden = {c: rng.normal(size=d) for c in contexts_of(SAMPLES)}
    return UnconstrainedFeatures.from_samples(rng.normal(size=(V, d)), hidden, SAMPLES)


def test_contexts_are_the_distinct_prefixes_in_order_of_first_visit():
    assert contexts_of(SAMPLES) == (
        ("a", ()),
        ("a", (0,)),
        ("a", (0, 1)),
        ("b", ()),
        ("b", (1,)),
    )


def test_log_prob_of_sequences_is_the_product_of_softmaxes():
    """Against the definition, token by token, by plain loops; the probabilities of all sequences sum to one."""
    model = general(np.random.default_rng(0))
    assert model.H.shape == (5, 3)
    hidden = dict(zip(model.contexts, model.H, strict=True))
    for sample in SAMPLES:
        for y in sample.responses:
            expected = sum(oracles.log_probs(model.W, hidden[(sample.prompt, y[:k])])[y[k]] for k in range(len(y)))
            assert model.log_prob(y, sample.prompt) == pytest.approx(expected, abs=1e-14)
    total = sum(
        math.exp(model.log_prob(y, "a"))
        # Every continuation over the contexts that have a vector: (0, 1, z), (0, z != 1), (z != 0).
        for y in [*((0, 1, z) for z in range(5)), *((0, z) for z in range(5) if z != 1), *((z,) for z in range(1, 5))]
    )
    assert total == pytest.approx(1.0, abs=1e-14)


def test_equal_prefixes_share_one_hidden_vector():
    model = general(np.random.default_rng(1))
    assert model.context_row("a", (0,)) == 1
    before = [model.log_prob(y, s.prompt) for s in SAMPLES for y in s.responses]
    H = model.H.copy()
    H[model.context_row("a", (0,))] += 1.0
    moved = model.with_parameters(model.W, H)
    after = [moved.log_prob(y, s.prompt) for s in SAMPLES for y in s.responses]
    changed = [abs(x - y) > 1e-6 for x, y in zip(before, after, strict=True)]
    # (0,1,2), (0,1,3), (0,2) pass through the context ("a", (0,)); (4,) and prompt "b" do not.
    assert changed == [True, True, True, False, False, False, False]


def test_references_default_to_the_model_and_stay_frozen():
    model = general(np.random.default_rng(2))
    for sample in model.samples:
        assert sample.reference == tuple(model.log_prob(y, sample.prompt) for y in sample.responses)
        assert sample.reference_margin == sample.reference[0] - sample.reference[1]
    moved = model.with_parameters(2 * model.W, -model.H)
    assert [s.reference for s in moved.samples] == [s.reference for s in model.samples]
    assert moved.log_prob((0, 1, 2), "a") != pytest.approx(model.samples[0].reference[0])
    # The samples handed in are not touched: another model fills in its own references.
    assert all(s.reference is None for s in SAMPLES)


def test_stated_references_are_kept():
    model = UnconstrainedFeatures.single_token(np.eye(3), [0.1, 0.2, 0.3], 0, 1, reference=(-0.5, -2.0))
    assert model.samples[0].reference_margin == 1.5
    assert random_model(np.random.default_rng(0), u_ref=-1e4).samples[0].reference_margin == -1e4


def test_single_token_by_name_and_by_index():
    rng = np.random.default_rng(3)
    W, h = rng.normal(size=(4, 3)), rng.normal(size=3)
    names = ["No", "Never", "Yes", "Maybe"]
    model = UnconstrainedFeatures.single_token(W, h, "No", "Yes", tokens=names)
    assert model.single_pair == (0, 2)
    assert [model.name(z) for z in range(4)] == names
    assert model.tokens == tuple(names)
    assert "No > Yes" in repr(model)
    assert "V=4, d=3" in repr(model)
    assert (model.V, model.d) == (4, 3)
    assert np.array_equal(model.h, h)
    bare = UnconstrainedFeatures.single_token(W, h, 0, 2)
    assert bare.name(2) == "2"
    np.testing.assert_allclose(bare.next_token_log_probs(), oracles.log_probs(W, h), atol=1e-15)
    assert bare.log_prob(2) == bare.log_prob((2,)) == pytest.approx(oracles.log_probs(W, h)[2], abs=1e-15)
    # numpy integers are token indices, too
    assert UnconstrainedFeatures.single_token(W, h, np.int64(0), np.int32(2)).single_pair == (0, 2)


def test_the_general_constructor_equals_single_token():
    rng = np.random.default_rng(4)
    W, h = rng.normal(size=(4, 3)), rng.normal(size=3)
    short = UnconstrainedFeatures.single_token(W, h, 1, 2)
    long = UnconstrainedFeatures(W, h[None], (Sample("q", (1, 2)),))  # type: ignore[arg-type]
    assert long.single_pair == short.single_pair
    assert long.samples[0].responses == ((1,), (2,))
    assert long.samples[0].reference == short.samples[0].reference
    assert long.log_prob(3) == short.log_prob(3)
    # Hidden vectors as an array, in the order of contexts_of.
    arrays = UnconstrainedFeatures.from_samples(W, h[None], [Sample("q", ((1,), (2,)))])
    assert arrays.contexts == (("q", ()),)


@pytest.mark.parametrize(
    "samples", [SAMPLES, SAMPLES[:1], (Sample("x", ((1, 1), (2,))),)], ids=["three", "one", "long"]
)
def test_single_pair_is_for_single_token_models_only(samples):
    rng = np.random.default_rng(5)
    n = len(contexts_of(samples))
    model = UnconstrainedFeatures(rng.normal(size=(5, 3)), rng.normal(size=(n, 3)), samples)
    with pytest.raises(ValueError, match="model must have one sample with two single-token responses"):
        _ = model.single_pair


def test_a_large_float32_W_is_not_copied():
    rng = np.random.default_rng(6)
    W = rng.normal(size=(300, 7)).astype(np.float32)
    h = rng.normal(size=7)
    model = UnconstrainedFeatures.single_token(W, h, 0, 1)
    assert model.W is W
    assert np.shares_memory(model.with_parameters(model.W, model.H).W, W)
    assert model.next_token_log_probs().dtype == np.float64
    # Products are taken in float64: no float32 rounding below the size of a language model.
    np.testing.assert_allclose(
        model.next_token_log_probs(), oracles.log_probs(W.astype(np.float64), h), rtol=0, atol=1e-13
    )
    doubles = W.astype(np.float64)
    assert UnconstrainedFeatures.single_token(doubles, h, 0, 1).W is doubles


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.float16])
def test_other_real_dtypes_become_float64(dtype):
    W = np.arange(12).reshape(4, 3).astype(dtype)
    model = UnconstrainedFeatures.single_token(W, np.array([1, 0, -1], dtype=dtype), 0, 1)
    assert model.W.dtype == model.H.dtype == np.float64
    assert np.array_equal(model.W, W.astype(float))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_inner_products_of_a_small_W_are_float64(dtype, k):
    rng = np.random.default_rng(7)
    W, vectors = rng.normal(size=(101, 33)).astype(dtype), rng.normal(size=(33, k))
    exact = np.array([[sum(float(x) * y for x, y in zip(row, v, strict=True)) for v in vectors.T] for row in W])
    out = inner_products(W, vectors)
    assert out.dtype == np.float64
    assert out.shape == (101, k)
    np.testing.assert_allclose(out, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [(1 << 18) + 3])
def test_inner_products_of_a_large_float32_W(rows):
    """At 64 MiB the products are taken in float32, block by block, to about 1e-7 |W_z| |vector|; no row is lost."""
    rng = np.random.default_rng(8)
    d = 64
    W = rng.normal(size=(rows, d)).astype(np.float32)
    assert W.nbytes >= 1 << 26
    vectors = rng.normal(size=(d, 2))
    out = inner_products(W, vectors)
    sizes = np.linalg.norm(W, axis=1)[:, None] * np.linalg.norm(vectors, axis=0)
    some = np.concatenate([np.arange(0, rows, 997), np.arange(rows - 50, rows)])
    exact = W[some].astype(np.float64) @ vectors
    assert (np.abs(out[some] - exact) <= 1e-6 * sizes[some]).all()
    assert np.abs(out[-1]).min() > 0  # the last, shorter block is there


def test_models_and_samples_are_frozen():
    model = random_model(np.random.default_rng(9))
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.W = np.eye(3)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.samples[0].prompt = "other"  # type: ignore[misc]


def test_every_response_length_up_to_three_normalises():
    """Exhaustively: the probabilities of all sequences of length 3 sum to one when every prefix has a vector."""
    V, d = 3, 2
    rng = np.random.default_rng(10)
    responses = tuple(itertools.product(range(V), repeat=3))
    sample = Sample("x", responses)
    model = UnconstrainedFeatures.from_samples(rng.normal(size=(V, d)), rng.normal(size=(1 + V + V * V, d)), [sample])
    assert sum(math.exp(model.log_prob(y)) for y in responses) == pytest.approx(1.0, abs=1e-14)
    assert len({round(model.log_prob(y), 12) for y in responses}) == V**3

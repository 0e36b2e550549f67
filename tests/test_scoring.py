"""The scorer against Definitions 2 and 3 in float64 on plain runs of the network, on several architectures; against
TRL's reference log-probabilities; against real training steps."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import transformers

from sims import bench_score
from sims.language.model import LanguageModel, new_model
from sims.language.pairing import Example
from sims.language.preferences import PreferencePair
from sims.language.scores import score_pairs
from sims.language.scoring import DEFAULT, Scorer, head
from sims.language.scoring.encoder import Encoder, Sharing
from sims.language.scoring.matmul import Products
from sims.language.scoring.probe import PROBE, Probe
from theory.losses import get

V = 48
SIZES = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
OLD = {"vocab_size": V, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
OLD_GPT = {**OLD, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128}
WINDOW = {"sliding_window": 16, "head_dim": 8, "query_pre_attn_scalar": 8}
CONFIGS = {
    "llama": ("Llama", {**SIZES, "tie_word_embeddings": False}),
    "llama_tied": ("Llama", {**SIZES, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", OLD_GPT),
    "gemma2": ("Gemma2", {**SIZES, **WINDOW, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0}),
    "gemma2_wide": ("Gemma2", {**SIZES, **WINDOW, "sliding_window": 256, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3Text", {**SIZES, **WINDOW}),
    "olmo2": ("Olmo2", SIZES),
    "qwen2": ("Qwen2", SIZES),
    "qwen3": ("Qwen3", {**SIZES, "head_dim": 8}),
    "gptj": ("GPTJ", {**OLD_GPT, "rotary_dim": 4}),  # its head has a bias
    "cohere": ("Cohere", {**SIZES, "logit_scale": 0.25}),
    "bloom": ("Bloom", {**OLD, "hidden_size": 16, "n_layer": 2, "n_head": 2}),  # ALiBi, no position ids
    "mamba": ("Mamba", {**OLD, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0}),
}
SHARED = {"llama", "llama_tied", "gpt2", "gemma2_wide", "olmo2", "qwen2", "qwen3", "gptj", "cohere"}
FALLS_BACK = set(CONFIGS) - SHARED  # a window of 16 tokens, ALiBi, recurrent states
TOLERANCE = 1e-5  # relative to |S+| |S- - S+|, float32


@pytest.fixture(scope="module")
def tokenizer():
    return new_model([f"w{i}" for i in range(V - 4)], d=16, layers=1, heads=2, max_length=128).tokenizer


@pytest.fixture(scope="module")
def models(tokenizer):
    """Architectures with random weights, each built once."""
    built = {}

    def get_model(name):
        if name not in built:
            kind, sizes = CONFIGS[name]
            config = getattr(transformers, f"{kind}Config")(**sizes)
            torch.manual_seed(3)
            network = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
            for parameter in network.parameters():  # biases, which begin at 0, too
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.2)
            built[name] = LanguageModel(network, tokenizer)
        return built[name]

    return get_model


def make_pairs():
    """Random pairs of many lengths, some with a common beginning, and the odd ones."""
    rng = np.random.default_rng(0)

    def tokens(n):
        return tuple(rng.integers(4, V, n).tolist())

    pairs = []
    for _ in range(7):
        both = tokens(rng.integers(0, 3))
        y, z = (both + tokens(rng.integers(1, 25)) for _ in range(2))
        pairs.append(PreferencePair((1, *tokens(rng.integers(0, 30))), y, z))
    odd = [
        PreferencePair((1,), (5,), (6,)),  # one token each: the same state
        PreferencePair((1, 9), (5, 6, 7), (5, 6, 7)),  # the same
        PreferencePair((1, 9), (5, 6), (5, 6, 7, 8)),  # a beginning of the other
        PreferencePair((1, 9), (5, 6, 7, 8), (5,)),
    ]
    return pairs + odd


PAIRS = make_pairs()


@torch.no_grad()
def plain_states(model, prompt, response):
    """(n, d) by the full network on this text alone, float64 from here on."""
    ids = torch.tensor([[*prompt, *response]])
    found = model.network(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
    return found[0, len(prompt) - 1 : -1].double().numpy()


def definitions(model, pairs):
    """Definitions 2 and 3 and the last inner product, and what their errors are relative to; (N,) each."""
    rows = []
    for p in pairs:
        h, k = (plain_states(model, p.prompt, y) for y in p[1:])
        row = []
        for S, T in ((h.sum(0), k.sum(0)), (h.mean(0), k.mean(0))):
            row += [S @ T - S @ S, np.linalg.norm(S) * np.linalg.norm(T - S)]
        rows.append([*row, h[-1] @ k[-1], np.linalg.norm(h[-1]) * np.linalg.norm(k[-1])])
    return np.array(rows).T


def errors(scorer, model, pairs=PAIRS):
    """Largest relative error of ches, ln_ches, last_hidden; where the definition is 0 the score must be 0."""
    found = scorer.score(pairs)
    ches, size, ln_ches, ln_size, last, last_size = definitions(model, pairs)
    out = []
    for name, value, scale in (("ches", ches, size), ("ln_ches", ln_ches, ln_size), ("last_hidden", last, last_size)):
        some = scale > 1e-5 * scale.max()
        assert not np.array(found[name])[~some].any()
        out.append((np.abs(np.array(found[name]) - value)[some] / scale[some]).max())
    return out


# ---- equal to the definitions


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_are_the_definitions_in_float64(models, name):
    model = models(name)
    for side in ("right", "left"):
        for budget in (1, 150, 4096):  # every pair alone: no padding
            scorer = Scorer(model, padding_side=side, batch_tokens=budget)
            assert max(errors(scorer, model)) < TOLERANCE, (side, budget)
            assert scorer.encoder.shared_prompt.startswith("yes" if name in SHARED else "no"), "measured"
    assert np.ptp(definitions(model, PAIRS)[0]) > 1


@pytest.mark.parametrize("side", ["right", "left"])
def test_without_sharing_the_prompt(models, side):
    scorer = Scorer(models("llama"), padding_side=side)
    scorer.encoder = Encoder(models("llama"), padding_side=side, share=False)
    assert max(errors(scorer, models("llama"))) < TOLERANCE
    assert scorer.encoder.shared_prompt == "no: switched off"


def test_a_row_longer_than_the_model_takes_is_not_shared(models):
    model = models("llama")
    n = model.longest // 2
    pair = PreferencePair((1, 5), (7,) * n, (8,) * n)  # each fits, both in a row do not
    found = Encoder(model).sharing(pair)
    assert not found.allowed
    assert "longer than the model takes" in found.error


def test_a_window_longer_than_the_pairs_does_not_hinder(models):
    """Decided by length: what fits into the window shares, what is longer does not."""
    config = models("gemma2_wide").network.config
    assert config.sliding_window == 256
    short, long = (Encoder(models(name)).sharing(PAIRS[0]) for name in ("gemma2_wide", "gemma2"))
    assert short.allowed
    assert not long.allowed
    assert long.deviation > 1e-3


def force(monkeypatch):
    """Share whatever the measurement says."""
    monkeypatch.setattr(Encoder, "sharing", lambda self, pair: Sharing(0, 0.0, 1.0))


def see_everything_before(self, part):
    T = part.shape[1]
    mask = torch.full((T, T), torch.finfo(self.dtype).min, dtype=self.dtype).triu(1)
    return mask.expand(len(part), 1, T, T)


def wrong_positions(self, ids, mask, position):
    return right_states(self, ids, mask, np.arange(position.shape[1])[None].repeat(len(position), 0))


def wrong_padding(self, ids, mask, position):
    """The padding is not masked."""
    return right_states(self, ids, mask if mask.dim() == 4 else torch.ones_like(mask), position)


right_states = Encoder._states


def shifted(by):
    def states(self, ids, mask, position):
        return right_states(self, ids, mask, position).roll(by, 1)

    return states


@pytest.mark.parametrize(
    ("what", "wrong", "share", "side"),
    [
        ("_tree_mask", see_everything_before, True, "right"),
        ("_states", wrong_positions, True, "right"),
        ("_states", wrong_padding, False, "left"),
        ("_states", shifted(1), True, "right"),
        ("_states", shifted(-1), False, "left"),
    ],
)
def test_a_wrong_mask_position_or_shift_is_seen(models, monkeypatch, what, wrong, share, side):
    model = models("llama")
    force(monkeypatch)
    scorer = Scorer(model, padding_side=side)
    scorer.encoder = Encoder(model, padding_side=side, share=share)
    assert max(errors(scorer, model)) < TOLERANCE
    monkeypatch.setattr(Encoder, what, wrong)
    with pytest.raises(AssertionError):
        assert max(errors(scorer, model)) < 100 * TOLERANCE


def test_states_of_the_last_token_change_the_score(models):
    """The convention that the state after the response does not take part."""
    model = models("llama")
    pairs = [p._replace(preferred=(*p.preferred, 7), dispreferred=(*p.dispreferred, 7)) for p in PAIRS]
    found, longer = (np.array(Scorer(model, ["ches"]).score(x)["ches"]) for x in (PAIRS, pairs))
    assert np.abs(found - longer).max() > 0.1
    other = [p._replace(preferred=(*p.preferred[:-1], 7), dispreferred=(*p.dispreferred[:-1], 9)) for p in PAIRS]
    assert Scorer(model, ["ches"]).score(other)["ches"] == found.tolist(), "the last token itself is not read"


@pytest.mark.parametrize("wrong", [("_tree_mask", see_everything_before), ("_states", wrong_positions)])
def test_the_measurement_sees_what_goes_wrong_and_falls_back(models, monkeypatch, wrong):
    model = models("gpt2")
    monkeypatch.setattr(Encoder, *wrong)
    scorer = Scorer(model)
    assert max(errors(scorer, model)) < TOLERANCE
    assert scorer.encoder.shared_prompt.startswith("no")


def test_padding_that_changes_states_is_refused(models, monkeypatch):
    monkeypatch.setattr(Encoder, "_states", wrong_padding)
    with pytest.raises(ValueError, match="padding on the left changes the states"):
        Scorer(models("llama"), padding_side="left").score(PAIRS)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_half_precision_is_close(models, name):
    model = models(name)
    half = model.copy()
    half.network.bfloat16()
    wide = half.copy()
    wide.network.float()  # the same weights
    ches, size = definitions(wide, PAIRS)[:2]
    found = np.array(Scorer(half, ["ches"]).score(PAIRS)["ches"])
    some = size > 1
    error = (np.abs(found - ches)[some] / size[some]).max()
    assert 1e-5 < error < 0.05, "bfloat16 has 8 bits"
    assert half.network.dtype == torch.bfloat16
    assert max(errors(Scorer(half), half)) < 0.05
    logps = [Scorer(m, ["ref_chosen_logps"]).score(PAIRS)["ref_chosen_logps"] for m in (half, wide)]
    assert logps[0] == pytest.approx(logps[1], rel=0.02, abs=0.5)
    assert logps[0] != logps[1]


# ---- how it is run


def test_order_batches_and_history_do_not_matter(models):
    model = models("llama")
    scorer = Scorer(model, batch_tokens=200)
    found = scorer.score(PAIRS)
    assert scorer.score(PAIRS) == found, "to the last bit"
    back = Scorer(model, batch_tokens=70).score(PAIRS[::-1])
    for name in DEFAULT:
        assert np.allclose(back[name][::-1], found[name], rtol=1e-4, atol=1e-5)
    assert len(set(found["ches"])) > 8
    assert scorer.score([]) == {name: [] for name in DEFAULT}


def test_the_prompt_is_run_once_in_batches_within_the_budget(models):
    model = models("llama")
    sizes = []
    hook = model.network.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    heads = model.network.lm_head.register_forward_pre_hook(lambda *_: sizes.append("logits"))
    try:
        scorer = Scorer(model, batch_tokens=150)
        scorer.score(PAIRS[:1])
        sizes.clear()
        scorer.score(PAIRS)
    finally:
        hook.remove()
        heads.remove()
    assert "logits" not in sizes
    assert all(rows == 1 or rows * T <= 150 for rows, T in sizes)
    assert [T for _, T in sizes] == sorted((T for _, T in sizes), reverse=True), "the longest first"
    assert max(rows for rows, _ in sizes) > 1
    assert sum(rows for rows, _ in sizes) == len(PAIRS), "one row per pair"
    run_once = sum(len(p.prompt) + len(p.preferred) + len(p.dispreferred) - 2 for p in PAIRS)
    assert sum(rows * T for rows, T in sizes) < 1.35 * run_once, "padding included"


def test_pairs_that_cannot_be_scored(models):
    model = models("llama")
    bad = [
        PreferencePair((), (5,), (6,)),
        PreferencePair((1,), (), (6,)),
        PreferencePair((1,), (5,), (V,)),
        PreferencePair((1,), (5,) * 127, (5,) * 128),
    ]
    columns, reasons = Scorer(model).scored([PAIRS[0], *bad, PAIRS[1]])
    words = ("", "prompt is empty", "chosen response is empty", r"\[0, 48\)", "129 tokens, the model takes 128", "")
    for reason, expected in zip(reasons, words, strict=True):
        assert (expected.replace("\\", "") in reason) if expected else reason == ""
    assert [math.isnan(x) for x in columns["ches"]] == [False, True, True, True, True, False]
    assert columns["ches"][::5] == pytest.approx(Scorer(model).score(PAIRS[:2])["ches"], rel=1e-4)
    with pytest.raises(ValueError, match="rejected response must hold tokens"):
        list(Encoder(model)(bad[2:3]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_states_that_are_not_finite_are_a_reason(models, value):
    model = models("gpt2").copy()
    with torch.no_grad():
        model.network.transformer.wte.weight[40] = value  # one token
    pairs = [p for p in PAIRS if 40 not in (*p.prompt, *p.preferred, *p.dispreferred)]
    pairs = [p._replace(prompt=(*p.prompt, 40)) if i in (1, 3) else p for i, p in enumerate(pairs)]
    columns, reasons = Scorer(model, batch_tokens=4096).scored(pairs)
    broken = [i in (1, 3) for i in range(len(pairs))]
    assert [bool(reason) for reason in reasons] == broken
    assert [math.isnan(x) for x in columns["ches"]] == broken
    assert all(("NaN or infinity: ches" in reason) == bad for reason, bad in zip(reasons, broken, strict=True))


def test_columns_of_tokens():
    model = new_model(["a"], d=4, layers=1, heads=2, max_length=16)
    found = Scorer(model, ["edit_distance", "len_chosen", "len_rejected", "shared_prefix"]).score(
        [PreferencePair((1,), (4, 4, 3, 2), (4, 4, 2)), PreferencePair((1,), (3,), (4, 2))]
    )
    assert found["edit_distance"] == [0.25, 1.0]
    assert (found["len_chosen"], found["len_rejected"]) == ([4.0, 1.0], [3.0, 2.0])
    assert found["shared_prefix"] == [pytest.approx(2 / 3), 0.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: Scorer(m, ["chess"]), "chess"),
        (lambda m: Scorer(m, padding_side="top"), "padding_side"),
        (lambda m: Scorer(m, batch_tokens=0), "batch_tokens"),
        (lambda m: Scorer(m, max_length=0), "max_length"),
    ],
)
def test_bad_arguments(models, make, words):
    with pytest.raises(ValueError, match=words):
        make(models("llama"))


def test_a_network_in_training_mode_is_refused(models):
    model = models("llama").copy()
    model.network.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        Scorer(model)


def test_linear_layers_by_the_other_library():
    """The same products to rounding, and only of ordinary float32 tensors without gradients."""
    torch.manual_seed(0)
    x, W, b = torch.randn(3, 5, 64), torch.randn(7, 64), torch.randn(7)
    linear = torch.nn.functional.linear
    calls = []

    class Seen(torch.Tensor):
        pass

    def product(*args):
        with Products(), torch.autograd.profiler.profile() as profile:
            out = linear(*args)
        calls.append(any("mkldnn_linear" in e.key for e in profile.key_averages()))
        return out

    with torch.no_grad():
        for args in ((x, W), (x, W, b), (x, W, None), (x[0].T.contiguous().T, W, b)):
            assert torch.allclose(product(*args), linear(*args), rtol=1e-5, atol=1e-5)
        assert calls == [torch.backends.mkldnn.is_available()] * 4
        calls.clear()
        others = [
            (x.double(), W.double()),
            (x.bfloat16(), W.bfloat16()),
            (x[:0], W),
            (x[0, 0], W),
            (x, W.as_subclass(Seen)),
        ]
        for args in others:
            assert torch.equal(product(*args), linear(*args))
    assert product(x, W.requires_grad_()).requires_grad
    assert calls == [False] * 6


# ---- the head


def head_terms(model, pair):
    """ln pi of both responses by the full network in float64, and minus the head's part of a gradient step by autodiff
    through an unembedding of its own."""
    W = model.W.double().clone().requires_grad_()
    bias = model.network.get_output_embeddings().bias
    values, gradients = [], []
    for y in pair[1:]:
        ids, at = torch.tensor([[*pair.prompt, *y]]), torch.tensor(y)[:, None]
        with torch.no_grad():
            logits = model.network(input_ids=ids, use_cache=False).logits[0, len(pair.prompt) - 1 : -1].double()
        values.append(float(torch.log_softmax(logits, -1).gather(1, at).sum()))
        h = torch.tensor(plain_states(model, pair.prompt, y))
        logits = model.shape_logits(h @ W.T + (0 if bias is None else bias.detach().double()))
        gradients.append(torch.autograd.grad(torch.log_softmax(logits, -1).gather(1, at).sum(), W)[0])
    g, k = gradients
    return values, -float((g * (g - k)).sum())


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2", "cohere", "gptj"])
def test_log_probabilities_and_the_head_term(models, monkeypatch, name):
    """Soft cap, scale and bias of the head included; whatever the size of the blocks."""
    model = models(name)
    assert Encoder(model).head_deviation < 1e-5
    columns = ["ref_chosen_logps", "ref_rejected_logps", "alpha"]
    found = Scorer(model, columns).score(PAIRS)
    for i, pair in enumerate(PAIRS):
        (a, b), term = head_terms(model, pair)
        assert found["ref_chosen_logps"][i] == pytest.approx(a, abs=1e-4)
        assert found["ref_rejected_logps"][i] == pytest.approx(b, abs=1e-4)
        assert found["alpha"][i] == pytest.approx(term, rel=1e-5, abs=1e-5)
    monkeypatch.setattr(head, "BLOCK", 97)
    for name, values in Scorer(model, columns).score(PAIRS).items():
        assert values == pytest.approx(found[name], rel=1e-5, abs=1e-5)
    assert np.ptp(found["alpha"]) > 1


def test_a_head_that_does_more_than_the_configuration_says(models):
    """Then log-probabilities from states would be wrong; CHES is still what it is."""
    model = models("cohere").copy()
    model.network.config.logit_scale = 0.5
    model.network.logit_scale = 0.25
    assert Encoder(model).head_deviation > 0.1
    with pytest.raises(ValueError, match="differ by"):
        Scorer(model, ["ches", "ref_chosen_logps"])
    assert max(errors(Scorer(model), model)) < TOLERANCE


# ---- the probe


def with_step(model, step, rate):
    moved = model.copy()
    with torch.no_grad():
        for p, s in zip(moved.network.parameters(), step, strict=True):
            p += rate * s
    return moved


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_the_probe_is_what_a_small_step_does(models, name):
    """Plain and sign steps on the margin, of the whole network in float64."""
    model = models(name).copy()
    model.network.double()

    def log_probs(m, pair):
        out = []
        for y in pair[1:]:
            logits = m.network(input_ids=torch.tensor([[*pair.prompt, *y]])).logits[0, len(pair.prompt) - 1 : -1]
            out.append(torch.log_softmax(logits, -1)[range(len(y)), list(y)].sum())
        return out

    def sign(g):  # an entry far below its neighbours is rounding
        return torch.where(g.abs() > 1e-6 * g.abs().max(), g.sign(), 0.0)

    for pair in (PAIRS[0], PAIRS[3], PAIRS[7], PAIRS[9]):
        a, b = log_probs(model, pair)
        ascent = torch.autograd.grad(a - b, list(model.network.parameters()), allow_unused=True)
        ascent = [
            torch.zeros_like(p) if g is None else g for p, g in zip(model.network.parameters(), ascent, strict=True)
        ]
        found = Probe(model)(pair)
        assert list(found) == list(PROBE)
        for kind, step in (("gradient", ascent), ("sign", [sign(g) for g in ascent])):
            margin = found[f"{kind}_step_margin"]
            rate = 3e-3 / margin  # some norms compute in float32, whatever the network's type
            with torch.no_grad():
                up, down = (torch.stack(log_probs(with_step(model, step, r), pair)) for r in (rate, -rate))
            chosen, rejected = ((up - down) / (2 * rate)).tolist()
            assert found[f"{kind}_step_chosen"] == pytest.approx(chosen, abs=1e-3 * margin)
            assert margin == pytest.approx(chosen - rejected, rel=1e-3)


def test_the_probe_and_the_engine_that_trains(models):
    """score_pairs: minus the probe times the slope of the loss at the reference, beta/2 for DPO."""
    model, pairs = models("llama"), PAIRS[:4]
    found, engine = Scorer(model, PROBE).score(pairs), score_pairs(model, pairs, get("dpo", beta=0.3)).scores
    assert found["gradient_step_chosen"] == pytest.approx((-engine["gradient"] / 0.15).tolist(), rel=1e-4)
    assert found["sign_step_chosen"] == pytest.approx((-engine["sign"]).tolist(), rel=1e-3)
    swapped = Scorer(model, PROBE).score([p._replace(preferred=p[2], dispreferred=p[1]) for p in pairs])
    assert found["gradient_step_margin"] == pytest.approx(swapped["gradient_step_margin"], rel=1e-5)
    assert np.abs(np.array(found["gradient_step_chosen"]) - swapped["gradient_step_chosen"]).min() > 1e-3


def test_the_probe_keeps_to_what_is_trained(models):
    model = models("llama").copy()
    every = Probe(model)(PAIRS[0])
    for name, p in model.network.named_parameters():
        p.requires_grad_(name.startswith("lm_head"))
    head_only = Probe(model)(PAIRS[0])
    assert head_only["gradient_step_chosen"] == pytest.approx(-head_terms(model, PAIRS[0])[1], rel=1e-5)
    assert head_only["gradient_step_margin"] < every["gradient_step_margin"]
    model.network.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        Probe(model)


# ---- examples and data sets


def test_examples(models):
    scorer = Scorer(models("llama"), ["ches", "len_rejected"], max_length=9)
    good = Example([1, 5], [6, 7, 8], ([9, 10],))
    found = scorer.score_examples(
        [
            good,
            ValueError("line 3: no prompt"),
            replace(good, rejected=([6, 7, 8],)),
            replace(good, rejected=([9], [], list(range(9, 29))), several=True),
        ]
    )
    assert list(found) == ["ches", "len_rejected", "reason", "note"]
    pairs = [PreferencePair((1, 5), (6, 7, 8), z) for z in ((9, 10), (9,), tuple(range(9, 16)))]
    ches = scorer.score(pairs)["ches"]
    assert found["ches"][0] == pytest.approx(ches[0], rel=1e-5)
    assert found["ches"][3] == pytest.approx([ches[1], math.nan, ches[2]], rel=1e-5, nan_ok=True)
    assert found["len_rejected"][3] == pytest.approx([1, math.nan, 7], nan_ok=True)
    assert found["note"][3] == ["", "", "truncated: rejected from 20 to 7 tokens"]
    assert found["reason"] == [
        "",
        ["line 3: no prompt"],
        "chosen and rejected are the same",
        ["", found["reason"][3][1], ""],
    ]
    assert "empty" in found["reason"][3][1]
    assert math.isnan(found["ches"][2])


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    datasets.disable_progress_bars()
    rows = [{"prompt": "w1 w2 ", "chosen": f"w3 w{i} w5", "rejected": f"w4 w{i}"} for i in range(12)]
    rows[3]["rejected"] = ""
    return datasets.Dataset.from_list(rows)


def test_in_a_map_of_datasets(models, dataset):
    """Columns are added, rows stay; a second map finds the first in the cache, another setting does not."""
    scorer = Scorer(models("llama"))
    found = dataset.map(scorer, batched=True, batch_size=5)
    assert found.column_names == [*dataset.column_names, *DEFAULT, "reason", "note"]
    assert list(found["chosen"]) == list(dataset["chosen"])
    examples = [Example(row["prompt"], row["chosen"], (row["rejected"],)) for row in dataset]
    direct = scorer.score_examples(examples)
    for name in (*DEFAULT, "reason", "note"):
        expected = (
            direct[name] if isinstance(direct[name][0], str) else pytest.approx(direct[name], rel=1e-4, nan_ok=True)
        )
        assert list(found[name]) == expected
    assert found["reason"][3] == "rejected is empty"
    again = dataset.map(Scorer(models("llama")), batched=True, batch_size=5)
    other = dataset.map(Scorer(models("llama"), max_length=100), batched=True, batch_size=5)
    third = dataset.map(Scorer(models("llama_tied")), batched=True, batch_size=5)
    assert again._fingerprint == found._fingerprint
    assert len({found._fingerprint, other._fingerprint, third._fingerprint}) == 3
    renamed = dataset.rename_columns({"chosen": "good", "rejected": "bad"})
    mapped = Scorer(models("llama"), columns_map={"chosen": "good", "rejected": "bad"})
    assert renamed.map(mapped, batched=True)["ches"][5] == pytest.approx(found["ches"][5], rel=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")  # its own
def test_reference_log_probabilities_are_those_of_trl(models, dataset, tmp_path):
    """Of a real DPOTrainer that precomputes them, on the same rows of text."""
    trl = pytest.importorskip("trl")
    model = models("llama")
    rows = dataset.filter(lambda row: row["rejected"] != "")
    options = {"precompute_ref_log_probs": True, "use_cpu": True, "bf16": False, "report_to": [], "max_length": 100}
    trainer = trl.DPOTrainer(
        model.copy().network,
        args=trl.DPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=3, **options),
        train_dataset=rows,
        processing_class=model.tokenizer,
    )
    names = ["ref_chosen_logps", "ref_rejected_logps"]
    found = Scorer(model, names, max_length=100)(rows[:])
    for name in names:
        assert found[name] == pytest.approx(list(trainer.train_dataset[name]), abs=1e-4)
    assert found["ref_chosen_logps"] != pytest.approx(found["ref_rejected_logps"], abs=1)


def test_a_scorer_is_pickled_as_a_name(models):
    scorer = Scorer(models("llama"))
    text = pickle.dumps(scorer)
    assert len(text) < 1000
    assert pickle.loads(text) is scorer
    assert pickle.dumps(Scorer(models("llama"))) == text
    with pytest.raises(ValueError, match="forked"):
        pickle.loads(text.replace(b"right", b"RIGHT") if b"right" in text else text.replace(b"ches", b"CHES"))


# ---- the benchmark


def test_the_benchmark_measures_the_same_thing_on_both_sides():
    rows = bench_score.score_rows(pairs=1, V=40, d=8, layers=1, rounds=1, progress=False)
    assert [r.what.rpartition(" ")[2] for r in rows[:3]] == ["scorer", "lists", "tensors"]
    assert rows[0].ratio == 1.0
    assert all(r.seconds > 0 and r.ratio > 0 for r in rows)
    assert all(r.error < TOLERANCE for r in rows[:3])
    model = new_model([f"w{i}" for i in range(36)], d=8, layers=1, heads=2, max_length=256)
    pairs = bench_score.random_pairs(3, 40)
    assert all(64 <= len(p.prompt) + max(len(p[1]), len(p[2])) <= 256 for p in pairs)
    pairs = [p._replace(preferred=p[1][:20], dispreferred=p[2][:20]) for p in pairs]
    ours = Scorer(model).score(pairs)
    for tensors in (False, True):
        today = bench_score.batch_1(model, pairs, tensors)
        for name in bench_score.SCORES:
            assert today[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-3)

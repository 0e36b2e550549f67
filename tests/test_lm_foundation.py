"""Language models built here: what they say against transformers' own code, training against a plain loop, files."""

import json
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from sims.language.fitting import STATE, Recipe, batch_of, fit
from sims.language.model import LanguageModel, load, new_model, save, shipped
from sims.language.responses import log_probs, next_log_probs, sample, states

WORDS = "No Never Yes Maybe no does the cat dog child eat sleep apples fish always never rarely . ? ,".split()


def texts(rng, n):
    """Questions with answers that depend on the subject, of two lengths."""
    out = []
    for _ in range(n):
        who, habit = rng.choice(["cat", "dog", "child"]), rng.choice(["sleep", "eat apples", "eat fish"])
        answer = "No" if who == "cat" else rng.choice(["Yes", "Never"])
        out.append(f"does the {who} {habit} ? {answer} .")
    return out


def tiny(words=WORDS, **more):
    return new_model(words, **{"d": 16, "layers": 2, "heads": 2, "max_length": 24, **more})


@pytest.fixture(scope="module")
def lm():
    """A tiny model, trained a little so that its answers are not uniform."""
    return fit(tiny(), texts, Recipe(steps=150, batch=16, lr=1e-2, warmup=5), progress=False)


@pytest.fixture(scope="module")
def pairs(lm):
    """Prompts of different lengths with responses of 1 to 5 tokens."""
    rng = np.random.default_rng(0)
    prompts = [lm.prompt(t) for t in ("does the cat sleep ?", "No", "does the child eat apples ? Never .", "")]
    return prompts * 3, [tuple(rng.integers(2, len(WORDS) + 4, size=1 + i % 5).tolist()) for i in range(12)]


def same_weights(a, b):
    other = dict(b.network.named_parameters())
    return all(torch.equal(p, other[name]) for name, p in a.network.named_parameters())


# ---- the model


def test_the_tokenizer_splits_words_and_keeps_case(lm):
    assert lm.encode("No, no ?") == (lm.token("No"), lm.token(","), lm.token("no"), lm.token("?"))
    assert lm.prompt("No") == (lm.tokenizer.bos_token_id, lm.token("No"))
    assert lm.response("No .") == (lm.token("No"), lm.token("."), lm.end)
    assert lm.text(lm.prompt("does the cat sleep ?") + lm.response("No .")) == "does the cat sleep ? No ."
    assert {lm.word(lm.token(w)) for w in WORDS} == set(WORDS)
    assert tuple(lm.W.shape) == (len(WORDS) + 4, 16)
    assert lm.head == ("lm_head.weight",)


@pytest.mark.parametrize(("word", "words"), [("zebra", "'zebra' is unknown"), ("No No", "takes 2"), ("", "takes 0")])
def test_a_word_must_be_one_token(lm, word, words):
    with pytest.raises(ValueError, match=words):
        lm.token(word)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tiny([]), "words"),
        (lambda: tiny(d=18, heads=4), "d must be a multiple of 2 heads = 8, got 18"),
        (lambda: tiny(layers=0), "layers"),
        (lambda: shipped("nobody"), "checkpoint must be one of .* got 'nobody'"),
        (lambda: Recipe(steps=3, lr=0), "lr"),
        (lambda: Recipe(steps=3, batch=0), "batch"),
        (lambda: Recipe(steps=3, optimizer="adan"), "adan"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_a_seed_decides_the_weights_and_disturbs_nobody_else():
    torch.manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    a, b, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.rand(3), first), "the global generator is left alone"
    assert a.fingerprint == b.fingerprint
    assert len({a.fingerprint, other.fingerprint, tiny([*WORDS, "zebra"], seed=1).fingerprint}) == 3
    twin = a.copy()
    with torch.no_grad():
        twin.network.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert twin.fingerprint != a.fingerprint
    assert same_weights(a, b)


# ---- files


def test_a_saved_model_is_the_same_model(lm, tmp_path, pairs):
    folder = save(lm, tmp_path / "model")
    again = load(folder)
    assert again.fingerprint == lm.fingerprint
    assert np.array_equal(log_probs(again, *pairs), log_probs(lm, *pairs))
    assert again.encode("No, no zebra ?") == lm.encode("No, no zebra ?")
    assert again.training["recipe"]["steps"] == 150
    save(tiny(seed=3), folder)  # over a model: the new one
    assert load(folder).fingerprint == tiny(seed=3).fingerprint
    assert [f.name for f in tmp_path.iterdir()] == ["model"], "nothing half-written is left behind"
    assert not [f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pkl")]


def test_save_spares_what_is_no_model(lm, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else"):
        save(lm, tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises((ValueError, OSError), match=r"thesis\.tex"):
        save(lm, tmp_path / "thesis.tex")
    assert [f.name for f in tmp_path.iterdir()] == ["thesis.tex"]


class Mine:
    """A pickle that tells when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def _replace(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def _no_weights(folder):
    (folder / "model.safetensors").unlink()


def _pickled(folder):
    _no_weights(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Mine(str(folder / "loaded"))))


def _disguised(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps(Mine(str(folder / "loaded"))))


def _valid_but_pickled(folder):
    """Weights that torch would read from a pickle, beside safetensors of another name."""
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    torch.save(tiny().network.state_dict(), folder / "pytorch_model.bin")


def _truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def _other_world(folder):
    """The tokenizer of another model, with more words."""
    other = save(tiny([*WORDS, *(f"word{i}" for i in range(9))]), folder.parent / "other")
    (folder / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())


def _other_weights(folder):
    other = save(tiny(d=32), folder.parent / "other")
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (_no_weights, "no weights in safetensors"),
        (_pickled, r"pytorch_model\.bin is a pickle and is not read"),
        (_disguised, "cannot be read"),
        (_valid_but_pickled, "cannot be read"),
        (_truncated, "cannot be read"),
        (_replace("model.safetensors", np.random.default_rng(0).bytes(5000)), "cannot be read"),
        (_replace("model.safetensors", b""), "cannot be read"),
        (_replace("config.json", b"{"), "cannot be read"),
        (_replace("tokenizer.json", b"{}"), "cannot be read"),
        (_replace("training.json", b"{"), r"training\.json"),
        (_no_tokenizer, "no tokenizer"),
        (_config(num_hidden_layers=3), "does not fit its configuration"),
        (_config(hidden_size=32), r"does not fit its configuration|cannot be read"),
        (_other_weights, r"does not fit its configuration|cannot be read"),
        (_other_world, "tokenizer has"),
    ],
)
def test_a_damaged_or_foreign_folder_is_named(tmp_path, damage, words):
    folder = save(tiny(), tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError, match=words) as info:
        load(folder)
    assert str(folder) in str(info.value)
    assert not (folder / "loaded").exists(), "a pickle was loaded"


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="must be a folder with a model"):
        load(tmp_path / "nothing")


# ---- what it says


@torch.no_grad()
def test_log_probs_are_those_of_transformers(lm, pairs):
    ours = log_probs(lm, *pairs)
    for x, y, found in zip(*pairs, ours, strict=True):
        ids = torch.tensor([[*x, *y]])
        labels = torch.tensor([[*([-100] * len(x)), *y]])
        loss = lm.network(input_ids=ids, labels=labels).loss  # transformers' own: a mean over the response's tokens
        assert found == pytest.approx(-float(loss) * len(y), rel=1e-5, abs=1e-5)
    assert np.ptp(ours) > 5, "the responses differ"


@torch.no_grad()
def test_next_log_probs_and_states_are_those_of_a_full_pass(lm, pairs):
    prompts, responses = pairs
    rows = next_log_probs(lm, prompts)
    np.testing.assert_allclose(np.exp(rows).sum(axis=1), 1, rtol=1e-12)
    found = states(lm, prompts, responses)
    for x, y, row, h in zip(prompts, responses, rows, found, strict=True):
        out = lm.network(input_ids=torch.tensor([[*x, *y]]), output_hidden_states=True)
        np.testing.assert_allclose(row, torch.log_softmax(out.logits[0, len(x) - 1].double(), -1), atol=1e-5)
        assert h.shape == (len(y), 16)
        torch.testing.assert_close(h, out.hidden_states[-1][0, len(x) - 1 : len(x) + len(y) - 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(h @ lm.W.T, out.logits[0, len(x) - 1 : len(x) + len(y) - 1], atol=1e-5, rtol=1e-5)


def test_padding_and_company_change_nothing(lm, pairs):
    prompts, responses = (part * 30 for part in pairs)  # several chunks
    alone = [log_probs(lm, [x], [y])[0] for x, y in zip(*pairs, strict=True)] * 30
    np.testing.assert_allclose(log_probs(lm, prompts, responses), alone, atol=1e-5)
    rows = np.concatenate([next_log_probs(lm, [x]) for x in pairs[0]] * 30)
    np.testing.assert_allclose(next_log_probs(lm, prompts), rows, atol=1e-5)


def test_samples_follow_the_distribution(lm):
    prompt, n = lm.prompt("does the dog sleep ?"), 4000
    for temperature in (1.0, 0.5):
        said = sample(lm, [prompt] * n, max_tokens=1, temperature=temperature, seed=1)
        pi = np.exp(next_log_probs(lm, [prompt])[0] / temperature)
        pi /= pi.sum()
        counts = np.bincount([y[0] for y in said], minlength=len(pi))
        often = n * pi >= 5
        assert often.sum() >= 2
        chi = ((counts - n * pi)[often] ** 2 / (n * pi)[often]).sum()
        assert chi < 30 + 2 * often.sum(), "a chi square with at most `often` degrees of freedom"


def test_cold_samples_are_the_greedy_ones_of_transformers(lm):
    for text in ("does the cat sleep ?", "does the child eat"):
        ids = torch.tensor([lm.prompt(text)])
        greedy = lm.network.generate(ids, do_sample=False, max_new_tokens=8, attention_mask=torch.ones_like(ids))
        said = sample(lm, [lm.prompt(text)], max_tokens=8, temperature=1e-3, seed=0)
        assert list(said[0]) == greedy[0, ids.shape[1] :].tolist()


def test_samples_end_at_the_end_and_depend_on_the_seed_alone(lm):
    prompts = [lm.prompt("does the dog sleep ?"), lm.prompt("No")] * 150
    said = sample(lm, prompts, max_tokens=6, seed=3)
    assert said == sample(lm, prompts, max_tokens=6, seed=3)
    assert said != sample(lm, prompts, max_tokens=6, seed=4)
    assert all(lm.end not in y[:-1] and 1 <= len(y) <= 6 for y in said)
    assert {len(y) == 6 for y in said} == {True, False}
    assert all(y[-1] == lm.end for y in said if len(y) < 6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: log_probs(m, [(1, 5)], [()]), "responses must not be empty"),
        (lambda m: log_probs(m, [(1, 5)], [(5,), (6,)]), "as many"),
        (lambda m: next_log_probs(m, [()]), "prompts must hold at least one token"),
        (lambda m: next_log_probs(m, [(5,) * 25]), "at most 24 tokens"),
        (lambda m: log_probs(m, [(5,) * 20], [(5,) * 6]), "at most 24 tokens"),
        (lambda m: sample(m, [(5,)], 3, temperature=0), "temperature"),
    ],
)
def test_bad_prompts(lm, call, words):
    with pytest.raises(ValueError, match=words):
        call(lm)


# ---- training


def test_training_is_that_of_a_plain_loop():
    start, recipe = tiny(), Recipe(steps=5, batch=4, lr=5e-3, warmup=2, weight_decay=0.1, clip=0.5, seed=7)
    found = fit(start, texts, recipe, progress=False)
    network = tiny().network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1.0, weight_decay=0.1)
    # Linear warm-up over two steps, then half a cosine from lr to lr / 10.
    rates = [5e-3 / 3, 5e-3 * 2 / 3, *(5e-3 * (0.55 + 0.45 * np.cos(np.pi * k / 3)) for k in range(3))]
    for step, rate in enumerate(rates):
        total, count = torch.zeros(()), 0
        for text in texts(np.random.default_rng([7, step]), 4):
            ids = torch.tensor([(*start.prompt(text), start.end)])
            total = total + network(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for name, p in network.named_parameters():
        torch.testing.assert_close(dict(found.network.named_parameters())[name], p, atol=2e-6, rtol=1e-4)
    assert same_weights(start, tiny()), "the model itself is left alone"
    assert not same_weights(start, found)


def test_of_a_pair_only_the_response_is_learned(lm):
    ids, labels = batch_of(lm, [("does the cat sleep ?", "No ."), "No", ("No", "Never")])
    learned = [
        [int(i) for i, l in zip(row, line, strict=True) if l >= 0] for row, line in zip(ids, labels, strict=True)
    ]
    assert learned == [list(lm.response("No .")), list(lm.response("No")), list(lm.response("Never"))]
    assert tuple(ids[0][:6]) == lm.prompt("does the cat sleep ?")
    assert bool((labels[labels >= 0] == ids[labels >= 0]).all())
    with pytest.raises(ValueError, match="at most 24 tokens, got one of 32"):
        batch_of(lm, ["No " * 30])


def test_training_learns_the_texts(lm):
    prompts = [lm.prompt(f"does the {who} sleep ?") for who in ("cat", "dog")]
    before, after = (np.exp(next_log_probs(model, prompts)) for model in (tiny(), lm))
    No, Yes = lm.token("No"), lm.token("Yes")
    assert after[0, No] > 0.5 > 0.1 > before[0, No]
    assert after[1, Yes] > 5 * after[0, Yes]
    assert lm.training["recipe"]["lr"] == 1e-2


RECIPE = Recipe(steps=7, batch=4, every=3, warmup=2)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_an_interrupted_run_resumes_to_the_bit(tmp_path, optimizer):
    recipe = Recipe(**{**vars(RECIPE), "optimizer": optimizer})
    seen = []

    def stop(step, loss):
        seen.append(step)
        if len(seen) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(tiny(), texts, recipe, tmp_path, progress=False, watch=stop)
    found = fit(tiny(), texts, recipe, tmp_path, progress=False, watch=stop)
    assert seen == [0, 1, 2, 3, 4, 3, 4, 5, 6], "it goes on where the last checkpoint was"
    whole = fit(tiny(), texts, recipe, progress=False)
    assert found.fingerprint == whole.fingerprint
    again = fit(tiny(), texts, recipe, tmp_path, progress=False, watch=stop)
    assert len(seen) == 9, "a finished run is not run again"
    assert again.fingerprint == whole.fingerprint
    assert [f.name for f in tmp_path.iterdir()] == [STATE]


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": Recipe(**{**vars(RECIPE), "lr": 1e-3})},
        {"recipe": Recipe(**{**vars(RECIPE), "seed": 1})},
        {"model": tiny(seed=1)},
        {"what": {"never": 0.2}},
    ],
    ids=["rate", "seed", "model", "texts"],
)
def test_a_folder_of_another_run_is_refused(tmp_path, other):
    given = {"model": tiny(), "recipe": RECIPE, "what": {"never": 0.1}}
    fit(texts=texts, folder=tmp_path, progress=False, **given)
    with pytest.raises(ValueError, match=r"state\.safetensors' belongs to another run"):
        fit(texts=texts, folder=tmp_path, progress=False, **{**given, **other})


@pytest.mark.parametrize(
    "data", [b"", b"short", None, pickle.dumps({"step": 3})], ids=["empty", "text", "cut", "pickle"]
)
def test_a_damaged_state_is_named(tmp_path, data):
    fit(tiny(), texts, RECIPE, tmp_path, progress=False)
    file = tmp_path / STATE
    file.write_bytes(file.read_bytes()[:-50] if data is None else data)
    with pytest.raises(ValueError, match=r"state\.safetensors' is damaged"):
        fit(tiny(), texts, RECIPE, tmp_path, progress=False)


def test_a_diverging_run_is_an_error(tmp_path):
    from theory import SolverError

    network = tiny().network
    with torch.no_grad():
        network.lm_head.weight.fill_(float("inf"))
    with pytest.raises(SolverError, match="step 0"):
        fit(LanguageModel(network, tiny().tokenizer), texts, RECIPE, tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


# ---- the checkpoints that come with the package


@pytest.mark.parametrize("name", ["persona", "requests"])
def test_a_shipped_checkpoint_is_what_its_command_makes(name):
    import importlib

    from sims.commands.lm.train import WORLDS, held_out
    from sims.language.model import CHECKPOINTS

    assert sum(f.stat().st_size for f in (CHECKPOINTS / name).iterdir()) <= 1_900_000
    lm, module = shipped(name), importlib.import_module(f"sims.language.worlds.{name}")
    world = getattr(module, WORLDS[name])()
    start = new_model(world.words(), **module.SIZE, seed=0)
    assert lm.tokenizer.get_vocab() == start.tokenizer.get_vocab()
    assert {n: p.shape for n, p in lm.network.named_parameters()} == {
        n: p.shape for n, p in start.network.named_parameters()
    }
    assert lm.training["recipe"] == vars(module.RECIPE)
    assert lm.training["what"] == {"world": name, **world.to_dict()}
    assert lm.training["command"].startswith(f"displacement lm train {name}")
    assert held_out(lm, world, 64) < 0.5 * held_out(start, world, 64)


def test_types_and_attention_of_a_loaded_model(tmp_path):
    lm = new_model("a b c d".split(), d=16, layers=1, heads=2)
    half = lm.copy()
    half.network.to(torch.bfloat16)
    folder = save(half, tmp_path / "half")
    assert load(folder).W.dtype == torch.float32  # the default does not depend on the file
    assert load(folder, dtype="auto").W.dtype == torch.bfloat16
    exact, fast = load(folder, dtype="float64"), load(folder, dtype="float64", attention="sdpa")
    assert (exact.network.config._attn_implementation, fast.network.config._attn_implementation) == ("eager", "sdpa")
    ids = torch.tensor([[1, 4, 5, 6]])
    with torch.no_grad():
        torch.testing.assert_close(
            exact.network(ids).logits, fast.network(ids).logits, rtol=0, atol=1e-6
        )  # eager softmax is in float32
    assert load(folder, dtype="bf16").W.dtype == torch.bfloat16
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter: merge it"):
        load(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="unknown dtype 'int8'"):
        load(folder, dtype="int8")
    with pytest.raises(ValueError, match="device must be"):
        load(folder, device="nowhere")


def test_code_that_comes_with_a_model_runs_only_if_asked_for(tmp_path):
    folder = save(new_model(["a", "b"], d=16, layers=1, heads=2), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\nraise RuntimeError('ran')\n")
    with pytest.raises(ValueError, match="cannot be read"):
        load(folder)
    assert not ran.exists()
    with pytest.raises(ValueError, match="cannot be read"):
        load(folder, trust_remote_code=True)
    assert ran.exists()


def test_a_text_begins_with_the_start_token():
    for lm in (new_model(["a", "b"], d=16, layers=1, heads=2), shipped("persona"), shipped("requests")):
        word = next(w for w in lm.tokenizer.get_vocab() if w.isalpha())
        assert tuple(lm.tokenizer(word)["input_ids"]) == lm.prompt(word) != lm.encode(word)

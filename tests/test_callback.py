"""The live callback in real runs of TRL's DPOTrainer, and the logs of such runs that the other tests read."""

import copy
import json
import math
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import trl
from transformers import TrainerCallback

from sims.files import plain
from sims.language import probe_set
from sims.language.callback import DisplacementCallback, DisplacementWarning, Probe
from sims.language.model import LanguageModel, new_model
from sims.language.preferences import PreferencePair
from sims.language.probe_set import Probed
from sims.language.responses import log_probs

WORDS = "a b c d e f g h i j k l m n o p".split()
ALIKE, APART = ("k l m n", "k l m o"), ("k l m n", "o o p p")  # chosen, rejected
FALLS = {"said": ALIKE, "learning_rate": 0.05, "max_steps": 24}  # ln pi(chosen) falls
RISES = {"said": APART, "learning_rate": 0.01, "max_steps": 12}
# Of the libraries, about names that they will drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return new_model(WORDS, d=16, layers=1, heads=2, max_length=16)


def rows(said):
    prompts = [" ".join(WORDS[(i + j) % 8] for j in range(3)) for i in range(8)]
    return [{"prompt": p, "chosen": f" {said[0]}", "rejected": f" {said[1]}"} for p in prompts]


def pairs(model, said):
    return [PreferencePair(model.prompt(r["prompt"]), *map(model.response, said)) for r in rows(said)]


def measured(model, network, asked, side):
    """Mean ln pi of a side of the pairs, by another route than the callback's."""
    model = LanguageModel(network, model.tokenizer)
    return log_probs(model, [p.prompt for p in asked], [p[side] for p in asked]).mean()


@contextmanager
def trainer(model, folder, callback, said=ALIKE, network=None, first=False, **settings):
    settings = {"logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 4, **settings}
    data = datasets.Dataset.from_list(rows(said))
    arguments = trl.DPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        gradient_checkpointing=False, lr_scheduler_type="constant", per_device_eval_batch_size=8, **settings,
    )  # fmt: skip
    network = copy.deepcopy(model.network) if network is None else network
    made = trl.DPOTrainer(
        model=network, ref_model=copy.deepcopy(model.network), args=arguments, train_dataset=data, eval_dataset=data,
        processing_class=model.tokenizer, callbacks=[] if first or callback is None else [callback],
    )  # fmt: skip
    if first:
        made.callback_handler.callbacks.insert(0, callback)
    yield made


def displacement_warnings(train):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [w for w in caught if issubclass(w.category, DisplacementWarning)]


# ---- in a real run


def test_a_displaced_run_is_stopped_with_one_warning_and_leaves_its_numbers(model, tmp_path):
    probe = Probe.draw(model.network, model.tokenizer, rows(ALIKE), pairs=3, candidates=3, max_tokens=4)
    callback = DisplacementCallback(probe=probe, every=2, stop=True)
    seen = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    with trainer(model, tmp_path, callback, first=True, **FALLS) as run:
        run.add_callback(Reporter())
        caught = displacement_warnings(run.train)
        history, step = run.state.log_history, run.state.global_step
        network = run.model
    assert len(caught) == 1
    assert "chosen log-probability fell" in str(caught[0].message)
    assert 4 < step < 24
    report = callback.report
    assert (report.alarm, report.stopped) == (step, True)
    # What is logged is what happened, by another route.
    for i, side in enumerate(("chosen", "rejected")):
        true = measured(model, network, probe.pairs, i + 1) - measured(model, model.network, probe.pairs, i + 1)
        assert report.probe.change(i)[-1] == pytest.approx(true, abs=1e-4)
        assert history[-2][f"displacement/probe_{side}"] in report.probe.change(i)
        assert true < -1
    assert report.probe_diagnosis.verdict == "displaced"
    assert report.probe_diagnosis.finding.chosen.end == pytest.approx(report.probe.change(0)[-1])
    assert any("displacement/chosen_change" in logs for logs in seen)  # other callbacks have it, too
    saved = json.loads((tmp_path / "displacement.json").read_text())
    assert saved == json.loads(json.dumps(plain(report.to_dict())))
    assert saved["alarm_step"] == step
    assert saved["probe"]["steps"] == [*range(0, step, 2), step]
    assert f"Alarm at step {step}, where the training was stopped" in str(report)
    assert "Where the mass goes" in str(report)


def test_with_an_evaluation_set_the_verdict_has_its_change_exactly_and_without_stop_the_run_ends(model, tmp_path):
    callback = DisplacementCallback()
    with trainer(model, tmp_path, callback, **FALLS, eval_strategy="steps", eval_steps=6, beta=0.25) as run:
        assert len(displacement_warnings(run.train)) == 1
        network = run.model
        assert run.state.global_step == 24
    asked = pairs(model, ALIKE)
    true = measured(model, network, asked, 1) - measured(model, model.network, asked, 1)
    finding = callback.report.diagnosis.finding
    assert finding.split == "eval"
    assert finding.chosen.end == pytest.approx(true, abs=1e-3)
    assert callback.report.alarm in (12, 18, 24)
    assert not callback.report.stopped


def test_a_run_without_displacement_raises_no_alarm(model, tmp_path):
    probe = Probe(tuple(pairs(model, APART)[:3]))
    callback = DisplacementCallback(probe=probe, every=4, stop=True)
    with trainer(model, tmp_path, callback, **RISES, gradient_accumulation_steps=2) as run:
        assert displacement_warnings(run.train) == []
        assert run.state.global_step == 12
        assert measured(model, run.model, probe.pairs, 1) > measured(model, model.network, probe.pairs, 1) + 0.5
    assert callback.report.probe_diagnosis.verdict == "no displacement"
    assert callback.report.diagnosis.verdict == "no displacement"
    assert callback.report.alarm is None
    assert callback.steps == [0, 4, 8, 12]


def test_the_weights_are_those_of_a_run_without_it(model, tmp_path, monkeypatch):
    """With dropout: a probe in training mode, or one that draws a number, changes the run."""

    def trained(callback):
        network = copy.deepcopy(model.network)
        for layer in network.model.layers:
            layer.self_attn.attention_dropout = 0.3
        with trainer(
            model, tmp_path, callback, network=network, max_steps=4, disable_dropout=False, learning_rate=1e-2
        ) as run:
            assert all(layer.self_attn.attention_dropout == 0.3 for layer in run.model.model.layers)
            run.train()
            assert run.model.training
            return torch.cat([p.detach().flatten() for p in run.model.parameters()])

    probe = Probe(tuple(pairs(model, ALIKE)))
    without = trained(None)
    assert torch.equal(trained(DisplacementCallback(probe=probe, every=1)), without)
    monkeypatch.setattr(probe_set, "evaluating", lambda network: nullcontext())
    assert not torch.equal(trained(DisplacementCallback(probe=probe, every=1)), without)


@pytest.mark.parametrize("theirs", [False, True], ids=["as it is", "restored by the trainer"])
def test_a_resumed_run_keeps_the_baseline(model, tmp_path, theirs):
    probe = Probe(tuple(pairs(model, ALIKE)[:2]))
    keep = {"save_strategy": "steps", "save_steps": 4, "learning_rate": 0.02}
    first = DisplacementCallback(probe=probe, every=2)
    with trainer(model, tmp_path, first, max_steps=8, **keep) as run:
        run.train()
    second = DisplacementCallback(probe=probe, every=2)
    keep["restore_callback_states_from_checkpoint"] = theirs
    with trainer(model, tmp_path, second, max_steps=8, **keep) as run:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        (second,) = [c for c in run.callback_handler.callbacks if isinstance(c, DisplacementCallback)]
    assert second.steps == first.steps == [0, 2, 4, 6, 8]
    assert second.log_probs == first.log_probs  # the resumed run is the same run, to the bit
    start = measured(model, model.network, probe.pairs, 1)
    assert np.mean([own[0] for own in second.log_probs[0]]) == pytest.approx(start, abs=1e-5)
    assert json.loads((tmp_path / "displacement.json").read_text())["probe"]["steps"][0] == 0
    other = DisplacementCallback(probe=Probe(probe.pairs[:1]), every=2)
    with trainer(
        model, tmp_path, other, max_steps=6, **keep | {"restore_callback_states_from_checkpoint": False}
    ) as run:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert other.steps == [4, 6]  # another probe has no earlier baseline


# ---- what it makes of a log


class Log:
    """A trainer's side of the callback: what was logged, step by step."""

    def __init__(self, callback, folder, main=True, network=None, **arguments):
        self.callback, self.network = callback, network
        self.args = SimpleNamespace(output_dir=str(folder), **({"beta": 0.1, "loss_type": ["sigmoid"]} | arguments))
        self.state = SimpleNamespace(
            log_history=[], global_step=0, max_steps=1000, stateful_callbacks={}, is_world_process_zero=main
        )
        self.control = SimpleNamespace(should_training_stop=False)
        callback.on_train_begin(self.args, self.state, self.control, model=network)

    def log(self, **values):
        self.state.global_step += 1
        self.callback.on_step_end(self.args, self.state, self.control, model=self.network)
        logs = {k.replace("_", "/", 1) if k.startswith("rewards") else k: v for k, v in values.items()}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.callback.on_log(self.args, self.state, self.control, logs=logs)
        return self.control.should_training_stop


def fall(log, steps=12, sign=-1.0):
    return [log.log(rewards_chosen=sign * 0.1 * t, rewards_rejected=-0.3 * t, loss=0.5) for t in range(steps)]


def test_it_waits_for_as_many_verdicts_as_it_is_patient(tmp_path):
    alarms = []
    for patience in (1, 3):
        callback = DisplacementCallback(patience=patience, stop=True)
        with pytest.warns(DisplacementWarning, match="chosen log-probability fell"):
            stops = fall(Log(callback, tmp_path))
        assert stops.index(True) + 1 == callback.alarm
        alarms.append(callback.alarm)
    assert alarms[1] == alarms[0] + 2


def test_only_alarming_verdicts_in_a_row_count(tmp_path, monkeypatch):
    callback = DisplacementCallback(patience=3)
    verdicts = iter([[None], [None], [], [None], [None], [], [None], [None], [None]])
    monkeypatch.setattr(callback, "_judge", lambda history: next(verdicts))
    log = Log(callback, tmp_path)
    for _ in range(8):
        log.log(rewards_chosen=0.0)
    assert callback.alarm is None
    with pytest.warns(DisplacementWarning):
        log.log(rewards_chosen=0.0)


def test_a_run_that_was_stopped_goes_on_when_resumed(tmp_path):
    first = DisplacementCallback(stop=True)
    with pytest.warns(DisplacementWarning):
        assert fall(Log(first, tmp_path))[-1]
    second = DisplacementCallback(stop=True)
    log = Log(second, tmp_path)
    log.state.global_step, log.state.stateful_callbacks = 12, {"DisplacementCallback": first.state()}
    second.on_train_begin(log.args, log.state, log.control)
    assert second.alarm == first.alarm
    assert not any(fall(log))
    assert not second.stopped


def test_the_best_model_loaded_at_the_end_is_not_measured_as_the_last(model, tmp_path):
    for best, steps in ((False, [0, 2, 3]), (True, [0, 2])):
        callback = DisplacementCallback(probe=Probe(tuple(pairs(model, ALIKE)[:1])), every=2)
        log = Log(callback, tmp_path, network=model.network, load_best_model_at_end=best)
        for _ in range(3):
            log.log(loss=1.0)
        callback.on_train_end(log.args, log.state, log.control, model=model.network)
        assert callback.steps == steps
    callback = DisplacementCallback(probe=callback.probe, every=2)
    log = Log(callback, tmp_path, network=model.network, load_best_model_at_end=True)
    log.state.max_steps = 1
    log.log(loss=1.0)
    assert callback.steps == [0, 1], "the last step is measured before another model is loaded"


def test_the_sign_the_threshold_and_beta_decide(tmp_path):
    def alarm(sign=-1.0, beta=0.1, **settings):
        callback = DisplacementCallback(**settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DisplacementWarning)
            fall(Log(callback, tmp_path, beta=beta), sign=sign)
        return callback.alarm

    assert alarm() is not None
    assert alarm(sign=1.0) is None
    assert alarm(threshold=20.0) is None  # it falls by 11 nats in 12 steps
    assert alarm(threshold=20.0, beta=0.01) is not None  # by 110
    assert alarm(sign=-0.2, beta=0.1) is not None  # by 2.2
    assert alarm(sign=-0.2, beta=0.4) is None  # by 0.55


def test_a_given_beta_takes_the_place_of_the_trainer_s(tmp_path):
    callback = DisplacementCallback(0.05)
    with pytest.warns(DisplacementWarning):
        fall(Log(callback, tmp_path, beta=0.1))
    assert callback.report.diagnosis.scale.beta == 0.05


def test_numbers_that_are_not_finite_are_an_alarm(tmp_path):
    for finite in (0, 3):
        callback = DisplacementCallback(stop=True, patience=2)
        log = Log(callback, tmp_path)
        for _ in range(finite):
            assert not log.log(rewards_chosen=0.0, rewards_rejected=0.0, loss=0.69)
        with pytest.warns(DisplacementWarning, match=r"nan|not finite"):
            stops = [log.log(rewards_chosen=math.nan, rewards_rejected=math.nan, loss=0.0) for _ in range(3)]
        assert stops == [False, True, True]


def test_a_log_without_its_keys_is_passed_over(tmp_path):
    callback = DisplacementCallback(stop=True)
    log = Log(callback, tmp_path, beta=None, loss_type=None)
    assert not any(log.log(loss=3.0 - t, learning_rate=0.1) for t in range(10))
    callback.on_train_end(log.args, log.state, log.control)
    assert json.loads((tmp_path / "displacement.json").read_text())["diagnosis"] is None
    assert "displacement/alarm" not in log.state.log_history[-1]


def test_the_probe_alone_raises_the_alarm_where_no_rewards_are_logged(model, tmp_path):
    asked = pairs(model, ALIKE)[:2]
    for worse, alarm in ((1.0, None), (-8.0, 4)):
        network = copy.deepcopy(model.network)
        callback = DisplacementCallback(probe=Probe(tuple(asked)), every=2, stop=True)
        log = Log(callback, tmp_path, network=network, beta=None)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", DisplacementWarning)
            for _ in range(5):
                network.lm_head.weight[model.token("k")] += (worse - 1) / 5
                log.log(loss=1.0)
        assert callback.alarm == alarm
        assert callback.report.diagnosis is None
        assert callback.steps == [0, 2, 4]
        fell = measured(model, network, asked, 1) - measured(model, model.network, asked, 1)
        assert (fell < -1) == (alarm is not None)


def test_other_processes_decide_alike_and_say_nothing(tmp_path):
    callback = DisplacementCallback(stop=True)
    log = Log(callback, tmp_path, main=False)
    assert any(fall(log))  # a warning would be an error
    callback.on_train_end(log.args, log.state, log.control)
    assert not list(tmp_path.iterdir())


def test_long_logs_are_judged_less_often(tmp_path, monkeypatch):
    callback = DisplacementCallback()
    judged = []
    monkeypatch.setattr(callback, "_judge", lambda history: judged.append(len(history)) or [])
    log = Log(callback, tmp_path)
    for _ in range(600):
        log.log(rewards_chosen=0.0, rewards_rejected=0.0)
    assert judged[:199] == [*range(1, 200)]
    assert len(judged) == 199 + 100 + 67


def test_a_moving_reference_is_named(tmp_path):
    with pytest.warns(DisplacementWarning, match="sync_ref_model"):
        Log(DisplacementCallback(), tmp_path, sync_ref_model=True)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"beta": 0.0}, "beta"),
        ({"every": 0}, "every"),
        ({"patience": 0}, "patience"),
        ({"threshold": -1.0}, "threshold"),
    ],
)
def test_settings_out_of_range_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        DisplacementCallback(**settings)


# ---- the probe


def test_the_probe_measures_what_log_probs_measures_and_leaves_the_network_alone(model):
    network = copy.deepcopy(model.network).train()
    network.model.layers[0].mlp.eval()  # as somebody may have frozen it
    modes = [m.training for m in network.modules()]
    before = torch.random.get_rng_state()
    probe = Probe.draw(network, model.tokenizer, rows(ALIKE), pairs=4, candidates=3, max_tokens=5)
    found = probe.log_probs(network)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert [m.training for m in network.modules()] == modes
    assert any(modes)
    assert not all(modes)
    for p, own, said in zip(probe.pairs, found, probe.responses, strict=True):
        true = log_probs(model, [p.prompt] * len(said), said)
        assert own == pytest.approx(true, abs=1e-5)
        assert len(said) == 5
        assert abs(own[0] - log_probs(model, [p.prompt], [said[0][::-1]])[0]) > 1e-3  # order matters


def test_drawn_pairs_are_usable_rows_and_candidates_are_what_was_asked(model):
    data = [
        *rows(ALIKE),
        {"prompt": "a", "chosen": "", "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "b"},
    ]
    probe = Probe.draw(model.network, model.tokenizer, data, pairs=99, candidates=["p p", "k l m n"], max_length=16)
    assert sorted(p.prompt for p in probe.pairs) == sorted(p.prompt for p in pairs(model, ALIKE))
    assert set(probe.candidates) == {(model.response("p p"),)}  # the other one is the chosen one
    several = [{"prompt": "a b", "chosen": " c d", "rejected": [" c e", " f"]}]
    assert Probe.draw(model.network, model.tokenizer, several, candidates=0).candidates == ((model.response("f"),),)
    again = [Probe.draw(model.network, model.tokenizer, data, pairs=2, seed=s, max_tokens=3) for s in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    assert Probe.from_dict(json.loads(json.dumps(again[0].to_dict()))) == again[0]
    with pytest.raises(ValueError, match="none of 1 is: chosen is empty"):
        Probe.draw(model.network, model.tokenizer, [{"prompt": "a", "chosen": "", "rejected": "b"}])


def test_texts_become_responses_as_the_chat_template_ends_them():
    chat = new_model([*WORDS, "u", "v", "w"], d=16, layers=1, heads=2)
    tokenizer = chat.tokenizer
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'u' if m.role == 'user' else 'v' }} {{ m.content }} w {% endfor %}"
        "{% if add_generation_prompt %}v {% endif %}"
    )
    ask, say = (lambda t: {"role": "user", "content": t}), (lambda t: {"role": "assistant", "content": t})
    explicit = [{"prompt": [ask("a b")], "chosen": [say("c")], "rejected": [say("d")]}]
    implicit = [{"chosen": [ask("a b"), say("c")], "rejected": [ask("a b"), say("d")]}]
    for data in (explicit, implicit):
        probe = Probe.draw(chat.network, tokenizer, data, candidates=["e f", "d"])
        ((candidate,),) = probe.candidates
        assert tokenizer.decode(candidate).split() == ["e", "f", "w"]
        assert tokenizer.decode(probe.pairs[0].preferred).split() == ["c", "w"]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ((), "hold pairs"),
        (((), ()), "at least one token"),
        (((1,), (2,), (2,)), "twice"),
        (((1,), (), (2,)), "at least one"),
    ],
)
def test_a_probe_that_cannot_be_measured_is_refused(given, named):
    pair = [PreferencePair(*given)] if len(given) == 3 else [PreferencePair((), (1,), (2,))] if given else []
    with pytest.raises(ValueError, match=named):
        Probe(tuple(pair))


def test_what_a_probe_saw_says_where_the_mass_went():
    probe = Probe((PreferencePair((1,), (2, 3), (4,)),), (((5,), (5, 6), (7,)),))
    ln = lambda *p: (tuple(map(math.log, p)),)  # noqa: E731
    seen = Probed((0, 10), (ln(0.2, 0.3, 0.2, 0.1, 0.05), ln(0.1, 0.1, 0.5, 0.4, 0.01)), (tuple("xABCDE"),), probe)
    assert seen.change(0) == pytest.approx([0, math.log(0.5)])
    assert seen.change(1) == pytest.approx([0, math.log(1 / 3)])
    assert [g[3] for g in seen.gains] == ["D", "C", "E"]
    assert seen.gains[0][0] == pytest.approx(math.log(4))
    assert seen.held == pytest.approx([0.2 + 0.3 + 0.2 + 0.05, 0.1 + 0.1 + 0.5 + 0.01])  # D continues C
    assert "2 of 3 candidate responses gained" in str(seen)
    assert "fell in 1 of 1 pairs" in str(seen)


# ---- the logs that the other tests read

LOGS = Path(__file__).parent / "data" / "logs"
TRUTH = json.loads((LOGS / "truth.json").read_text())


def test_there_are_logs_of_every_kind():
    losses = {tuple(t["loss_type"]) for t in TRUTH.values()}
    assert losses == {("sigmoid",), ("ipo",), ("hinge",), ("sigmoid", "sft")}
    assert {t["happened"] for t in TRUTH.values()} == {"displaced", "kept", "recovered", "degenerate", "nothing"}
    assert {p.parent.name for p in LOGS.glob("*/trainer_state.json")} == set(TRUTH)
    assert all(p.stat().st_size < 60_000 for p in LOGS.glob("*/trainer_state.json"))


@pytest.mark.parametrize("name", [n for n in TRUTH if n != "sigmoid_nan"])
def test_rewards_over_beta_are_the_change_of_ln_pi_whatever_the_loss(name):
    truth = TRUTH[name]
    tolerance = 0.02 if truth["bf16"] else 1e-4  # nats; bf16 has 8 bits
    for side in ("chosen", "rejected"):
        assert truth["reward_over_beta"][side] == pytest.approx(truth[f"train_{side}"][-1], abs=tolerance, rel=1e-5)
    history = json.loads((LOGS / name / "trainer_state.json").read_text())["log_history"]
    evaluated = [(e["step"], e["eval_rewards/chosen"]) for e in history if "eval_rewards/chosen" in e]
    for step, reward in evaluated:
        true = truth["held_out_chosen"][truth["step"].index(step)]
        assert reward / truth["beta"] == pytest.approx(true, abs=tolerance, rel=1e-5)

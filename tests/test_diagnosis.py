"""Diagnosis of training logs: real logs of TRL with a measured truth, logs of other trainers, noise, broken files."""

import csv
import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from sims.cli import main
from sims.diagnosis import Log, diagnose, read_log
from sims.diagnosis.advice import advise, sft_ratios, sft_weight, stop_earlier
from sims.diagnosis.change import measure
from sims.diagnosis.logs import canonical
from sims.diagnosis.page import page

LOGS = Path(__file__).parent / "data" / "logs"
HAND = LOGS / "hand"
TRUTH = json.loads((LOGS / "truth.json").read_text())
EXPECTED = {"kept": "no displacement", "nothing": "no displacement"}  # what the truth calls otherwise


def verdict_of(name: str) -> str:
    return EXPECTED.get(TRUTH[name]["happened"], TRUTH[name]["happened"])


def flipped(log: Log) -> Log:
    """The wrong sign convention: rewards of the other sign."""
    entries = [
        {"step": p.step}
        | {f"{p.split}_{k}".replace("train_", ""): v for k, v in p.values.items() if k == "loss"}
        | {
            f"{'eval_' if p.split == 'eval' else ''}rewards/{side}": -p.values[f"reward_{side}"]
            for side in ("chosen", "rejected")
            if f"reward_{side}" in p.values
        }
        for p in log.points
    ]
    return Log.of(entries)


# ---- real logs of TRL


@pytest.mark.parametrize("name", TRUTH)
def test_real_logs(name):
    d = diagnose(read_log(LOGS / name), beta=TRUTH[name]["beta"])
    assert d.verdict == verdict_of(name)
    assert d.sentence.startswith(d.verdict)
    assert str(d).lower().startswith(d.verdict)
    assert diagnose(read_log(LOGS / name)).verdict == d.verdict, "without beta the verdict is the same"


def test_changes_in_real_logs():
    covered = []
    for name, truth in TRUTH.items():
        d, steps = diagnose(read_log(LOGS / name), beta=truth["beta"]), np.array(truth["step"])
        for f, side in ((f, side) for f in d.findings if f.chosen for side in ("chosen", "rejected")):
            true = np.array(truth[f"{'train' if f.split == 'train' else 'held_out'}_{side}"])
            found = getattr(f, side)
            if f.split != "train":  # exact, but for bfloat16
                rough = 0.05 if truth["bf16"] else 1e-3
                assert found.end == pytest.approx(true[-1], abs=rough * (1 + abs(true[-1])))
            else:  # a window of batches: 95 % intervals
                near = true[steps >= found.steps[-found.window] - 5]
                covered.append(found.low <= near.max() and near.min() <= found.high)
    assert len(covered) > 20
    assert np.mean(covered) >= 0.9


def test_real_logs_judged_by_the_wrong_sign_come_out_wrong():
    for name in ("sigmoid_kept", "hinge_kept", "sigmoid_displaced", "hinge_displaced", "sft_displaced"):
        wrong = diagnose(flipped(read_log(LOGS / name)), beta=TRUTH[name]["beta"])
        assert wrong.verdict != verdict_of(name)


def test_beta_is_exact_from_evaluations():
    known = [name for name in TRUTH if diagnose(read_log(LOGS / name)).scale.beta is not None]
    assert len(known) >= 5
    for name in known:
        assert diagnose(read_log(LOGS / name)).scale.beta == pytest.approx(TRUTH[name]["beta"], rel=5e-3)


def test_a_published_log():
    # Two evaluations from eric-mitchell/direct-preference-optimization issue 36: beta = .1, "not as good as before".
    rows = [(500, -28.69784927, -106.26754760, -1.64138460, -7.24214172), (1000, -27.43762016, -122.26292419, -1.51536190, -8.84167766)]  # fmt: skip
    names = ("step", "eval_logps/chosen", "eval_logps/rejected", "eval_rewards/chosen", "eval_rewards/rejected")
    d = diagnose(Log.of([dict(zip(names, row, strict=True)) for row in rows]))
    assert d.scale.beta == pytest.approx(0.1, rel=1e-5)
    assert (d.verdict, d.severity) == ("displaced", "high")
    assert d.finding.chosen.end == pytest.approx(-15.1536190, rel=1e-5)
    assert d.finding.relative == pytest.approx(15.1536190 / (27.43762016 - 15.1536190), rel=1e-4)


# ---- logs of other trainers

OTHERS = {
    "llamafactory_displaced": ({}, -12.0, "nats"),
    "llamafactory_displaced/trainer_log.jsonl": ({}, -12.0, "nats"),
    "openrlhf_displaced.jsonl": ({"beta": 0.1}, -30.0, "nats"),
    "axolotl_kept.log": ({"beta": 0.1}, 4.0, "nats"),
    "ms_swift_recovered": ({}, 0.0, "nats"),
    "wandb_displaced.csv": ({}, -8.0, "nats"),
    "wandb_chart_kept.csv": ({"beta": 0.1}, 5.0, "nats"),
    "simpo_displaced.jsonl": ({"loss": "simpo"}, -40.0 / 80 * 50 / 60, "nats per token"),  # since the first evaluation
    "similar_degenerate.jsonl": ({"beta": 0.1}, -50.0, "nats"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_trainers(name):
    options, true, unit = OTHERS[name]
    d = diagnose(read_log(HAND / name), **options)
    wanted = re.search("displaced|kept|recovered|degenerate", name).group()
    assert d.verdict == EXPECTED.get(wanted, wanted)
    assert d.scale.unit == unit
    c = d.finding.chosen
    if d.finding.split == "train":
        assert c.low < true * (1 - (c.window - 1) / 2 / c.points) < c.high  # a line's mean over the last window
    else:
        assert c.end == pytest.approx(true, rel=1e-3)


def test_the_worst_evaluation_set_decides():
    d = diagnose(read_log(HAND / "wandb_displaced.csv"))
    assert {f.split: f.verdict for f in d.findings} == {
        "eval_easy": "no displacement", "eval_hard": "displaced", "train": "displaced",
    }  # fmt: skip
    assert d.finding.split == "eval_hard"
    assert any("eval_easy: no displacement" in n for n in d.notes)


def test_evaluation_sets_that_only_the_run_time_names():
    # TRL logs eval_rewards/chosen for each of several evaluation sets; transformers names the set.
    rows = [
        {"step": s, f"eval_{name}_loss": 0.6, f"eval_{name}_runtime": 1.0, "eval_rewards/chosen": sign * 0.1 * s,
         "eval_rewards/rejected": -0.3 * s, "eval_logps/chosen": -50.0 + sign * s, "eval_logps/rejected": -50.0 - 3 * s}
        for s in range(6) for name, sign in (("Hard", -1), ("easy", 1))
    ]  # fmt: skip
    d = diagnose(Log.of(rows))
    assert {f.split: (f.verdict, f.chosen.end) for f in d.findings} == {
        "eval_easy": ("no displacement", pytest.approx(5.0)),
        "eval_hard": ("displaced", pytest.approx(-5.0)),
    }
    assert d.verdict == "displaced"
    assert not d.log.notes
    assert d.scale.beta == pytest.approx(0.1)
    # As wandb has them, where every row has all columns.
    names = {k.replace("eval_", "eval/", 1): "" for row in rows for k in row}
    table = [names | {k.replace("eval_", "eval/", 1): str(v) for k, v in row.items()} for row in rows]
    assert Log.of(table).points == d.log.points


def test_names_of_quantities():
    known = {
        "rewards/chosen": ("train", "reward_chosen"),
        "train/rewards/chosen": ("train", "reward_chosen"),
        "eval_rewards/chosen": ("eval", "reward_chosen"),
        "eval/rewards/margins": ("eval", "margin"),
        "eval_helpful_logps/rejected": ("eval_helpful", "logp_rejected"),
        "rewards_train/chosen": ("train", "reward_chosen"),
        "logps_eval/rejected": ("eval", "logp_rejected"),
        "train/reject_reward": ("train", "reward_rejected"),
        "run - a - train/acc": ("train", "accuracy"),
        "eval_mean_token_accuracy": ("eval", "token_accuracy"),
        "loss": ("train", "loss"),
    }
    assert {k: canonical(k) for k in known} == known
    for foreign in (
        "nll_loss",
        "train/nll_loss",
        "grad_norm",
        "logits/chosen",
        "rewards/chosen__MIN",
        "x/rewards/chosen",
    ):
        assert canonical(foreign) is None


# ---- files

ENTRY = {"step": 1, "rewards/chosen": -0.1, "rewards/rejected": -0.3, "loss": 0.6}


def entries(chosen, margin=None, **more):
    """Training entries with these values of rewards/chosen."""
    margin = np.linspace(0.1, 1, len(chosen)) if margin is None else margin
    return [
        {"step": 10 * (i + 1), "rewards/chosen": float(c), "rewards/rejected": float(c - m)} | {k: v[i] for k, v in more.items()}
        for i, (c, m) in enumerate(zip(chosen, margin, strict=True))
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("trainer_state.json", "", "is empty"),
        ("trainer_state.json", '{"log_history": []}', "log_history is empty"),
        (
            "trainer_state.json",
            '{"log_history": [{"step": 1, "rewa',
            "not complete JSON .* copied while it was written",
        ),
        ("trainer_state.json", '{"log_history": {"a": "b"}, "x": 3}', "found a"),
        ("trainer_state.json", '{"log_history": [1, 2]}', "expected log_history"),
        ("trainer_state.json", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("trainer_state.json", json.dumps([{"step": 10**400, "rewards/chosen": 10**400}]), "no reward"),
        ("a.json", json.dumps([ENTRY | {"rewards/chosen": math.nan}] * 9), "rewards/chosen is NaN .* from step 1 on"),
        (
            "a.jsonl",
            '{"step": 3, "loss": 0.5}\n{"step": 4, "loss": 0.4}\n',
            "expected rewards/chosen .* found step, loss",
        ),
        ("trainer_log.jsonl", '{"current_steps": 3, "loss": 0.5}\n', "keeps the rewards in trainer_state.json"),
        ("a.txt", "epoch 1 done\n", "not a training log"),
        ("a.csv", "a,b\n1,2\n", "found a, b"),
        ("a.csv", "Step,r1 - train/rewards/chosen,r2 - train/rewards/chosen\n1,2,3\n", "several runs .r1, r2"),
        ("training_args.bin", b"\x80\x04\x95\x10", "is binary"),
        ("model.safetensors", b"PK\x03\x04", "is binary"),
    ],
)
def test_broken_files(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        read_log(file)
    assert str(file) in str(error.value)
    assert main(["diagnose", str(file)]) == 2


def test_a_pickle_is_never_loaded(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    for protocol in (0, 4):
        (tmp_path / "training_args.bin").write_bytes(pickle.dumps(Bomb(), protocol))
        with pytest.raises(ValueError, match=r"binary|not a training log"):
            read_log(tmp_path / "training_args.bin")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries([-1.0] * 8)))
    read_log(tmp_path / "a.jsonl")
    assert not (tmp_path / "exploded").exists()
    pickle.loads(pickle.dumps(Bomb()))
    assert (tmp_path / "exploded").exists(), "the bomb is live"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "log"])
def test_a_running_training(tmp_path, kind):
    rows = entries(np.linspace(0, -2, 12))
    file = tmp_path / f"a.{kind}"
    if kind == "csv":
        with file.open("w", newline="") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text("".join((json.dumps(r) if kind == "jsonl" else f"  5%|#  | {r}") + "\n" for r in rows))
    whole = read_log(file)
    assert len(whole.points) == 12
    assert whole.notes == ()
    text = file.read_text()
    file.write_text(text[: text.rstrip().rfind("-2")])  # in the middle of the last line
    cut = read_log(file)
    assert cut.points == whole.points[:11]
    assert cut.notes == ("the last line is cut off and was left out",)


def test_unreadable_lines_in_the_middle_are_counted(tmp_path):
    lines = [json.dumps(e) for e in entries([-0.1] * 9)]
    lines[4] = lines[4][:20] + '"rewards/chosen": }'
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n{unrelated: output}\n")
    log = read_log(tmp_path / "a.jsonl")
    assert len(log.points) == 8
    assert log.notes == ("1 lines with metrics could not be read and were left out",)


def test_printed_numbers(tmp_path):
    printed = (
        "{'loss': '0.6931', 'rewards/chosen': nan, 'rewards/rejected': -inf, 'logps/chosen': -3.5e1, 'epoch': 0.1}\n"
    )
    (tmp_path / "a.log").write_text(
        printed + "{'rewards/chosen': '-0.25', 'epoch': 0.2}\n{__import__('os').abort(): 1}\n"
    )
    log = read_log(tmp_path / "a.log")
    first, second = log.points
    assert math.isnan(first.values["reward_chosen"])
    assert first.values["reward_rejected"] == -math.inf
    assert (first.values["logp_chosen"], first.values["loss"]) == (-35.0, 0.6931)
    assert (second.values, second.step, log.axis) == ({"reward_chosen": -0.25}, 0.2, "epoch")


def test_the_newest_state_of_a_folder(tmp_path):
    for name, step in (("", 30), ("checkpoint-9", 9), ("checkpoint-40", 40), ("checkpoint-x", 99)):
        (tmp_path / name).mkdir(exist_ok=True)
        state = {"global_step": step, "log_history": [ENTRY | {"step": step}]}
        (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    assert read_log(tmp_path).points[-1].step == 40
    (tmp_path / "checkpoint-40" / "trainer_state.json").unlink()
    assert read_log(tmp_path).points[-1].step == 30
    assert read_log(tmp_path / "checkpoint-9").points[-1].step == 9
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no trainer_state.json in .*empty"):
        read_log(tmp_path / "empty")


def test_a_folder_of_several_runs_names_them(tmp_path):
    (tmp_path / "notes.log").touch()
    with pytest.raises(ValueError, match=r"trainer_log.jsonl, train_metrics.jsonl; give one of \S*notes.log$"):
        read_log(tmp_path)
    for name in ("a/checkpoint-5", "a/checkpoint-9", "b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "trainer_state.json").touch()
    with pytest.raises(ValueError, match="give one of") as error:
        read_log(tmp_path)
    assert str(error.value).endswith(f"; give one of {tmp_path / 'a'}, {tmp_path / 'b'}")


def test_rows_of_one_step_are_one_point_and_a_resumed_run_counts_its_last_entry():
    log = Log.of([{"step": 1, "loss": 1.0}, {"step": 1, "rewards/chosen": 2.0}, {"step": 1, "rewards/chosen": 3.0}])
    assert [p.values for p in log.points] == [{"loss": 1.0, "reward_chosen": 3.0}]
    assert "1 steps were logged more than once" in log.notes[0]
    summary = {"step": 1, "train_runtime": 3.0, "train_loss": 0.5, "rewards/chosen": 9.0}
    assert Log.of([ENTRY, summary]).points == Log.of([ENTRY]).points


# ---- units


def test_a_beta_that_does_not_fit_is_not_used():
    rows = [
        {"step": s, "eval_logps/chosen": -50 + c, "eval_logps/rejected": -60 + r, "eval_rewards/chosen": 0.2 * c, "eval_rewards/rejected": 0.2 * r}
        for s, c, r in ((1, -1.0, -3.0), (2, -2.0, -5.0), (3, -4.0, -9.0))
    ]  # fmt: skip
    d = diagnose(Log.of(rows), beta=0.1)
    assert d.scale.beta == pytest.approx(0.2)
    assert d.finding.chosen.end == pytest.approx(-4.0)
    assert any("beta = 0.1 (given) does not fit" in n for n in d.notes)
    assert not diagnose(Log.of(rows), beta=0.2).notes


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_bad_beta(beta):
    with pytest.raises(ValueError, match="beta must be a finite number > 0"):
        diagnose(Log.of([ENTRY]), beta=beta)


def test_bad_threshold():
    with pytest.raises(ValueError, match="threshold must be"):
        diagnose(Log.of([ENTRY]), threshold=0.0)


def test_ipo_is_per_token_where_the_trainer_has_it_so():
    rows = entries(np.linspace(0, -1, 8))
    assert diagnose(Log.of(rows), loss="ipo", beta=0.1).scale.unit == "nats"  # OpenRLHF
    rows = [r | {"logps/chosen": -50 - i % 3} for i, r in enumerate(rows)]
    assert diagnose(Log.of(rows), loss="ipo", beta=0.1).scale.unit == "nats per token"  # LLaMA-Factory, older TRL
    assert diagnose(Log.of([r | {"entropy": 1.0} for r in rows]), loss="ipo", beta=0.1).scale.unit == "nats"  # TRL
    assert diagnose(Log.of(rows), loss="sigmoid", beta=0.1).scale.unit == "nats"
    assert diagnose(Log.of(rows), loss="ipo", beta=0.1).limit == pytest.approx(0.01), "a tenth: per token, not response"
    assert diagnose(Log.of(rows), beta=0.1).limit == pytest.approx(0.1)
    assert diagnose(Log.of(rows), per_token=True).scale.unit == "units of reward per token"
    sums = [r | {"entropy": 1.0} for r in rows]
    assert "--loss ipo changes nothing here" in str(diagnose(Log.of(sums), loss="ipo", beta=0.1))
    for log, options in (
        (rows, {"loss": "ipo"}),
        (sums, {"loss": "sigmoid"}),
        (sums, {"loss": "ipo", "per_token": True}),
    ):
        assert "changes nothing" not in str(diagnose(Log.of(log), beta=0.1, **options))


def test_without_a_reference_the_change_is_against_the_first_entry():
    rows = [
        {"step": s, "eval_logps/chosen": c, "eval_logps/rejected": r}
        for s, c, r in ((0, -50.0, -60.0), (9, -58.0, -80.0))
    ]
    d = diagnose(Log.of(rows))
    assert (d.verdict, d.finding.chosen.end, d.finding.margin.end) == ("displaced", -8.0, 12.0)
    assert diagnose(Log.of(rows[:1])).verdict == "undecided"


def test_a_loss_without_a_reference_is_told_by_its_rewards():
    fall = np.linspace(0, 8, 12) ** 1.2

    def rows(reference):
        sides = {"chosen": -50 - fall, "rejected": -50 - 3 * fall}
        return [
            {"step": i}
            | {f"rewards/{side}": 0.2 * (x[i] - reference) for side, x in sides.items()}
            | {f"logps/{side}": x[i] for side, x in sides.items()}
            for i in range(12)
        ]

    free = diagnose(Log.of(rows(0.0)))
    assert (free.scale.beta, free.scale.metric, free.scale.reference) == (pytest.approx(0.2), "logp", False)
    assert any("no reference model" in n for n in free.notes)
    assert diagnose(Log.of(rows(-50.0))).scale.reference, "rewards against a reference"
    still = [{"step": i, "rewards/chosen": -5.0, "rewards/rejected": -10.0, "logps/chosen": -50.0, "logps/rejected": -100.0} for i in range(8)]  # fmt: skip
    assert diagnose(Log.of([r | {"logps/rejected": -50.0, "rewards/rejected": -5.0} for r in still])).scale.reference
    assert diagnose(Log.of(still), beta=0.1).scale.beta == 0.1


def test_a_reference_of_another_precision_is_a_floor():
    rows = [
        {"step": s, "eval_rewards/chosen": c, "eval_rewards/rejected": r}
        for s, c, r in ((0, -0.03, 0.02), (50, -0.05, -0.4))
    ]
    d = diagnose(Log.of(rows), beta=0.1)
    assert d.finding.chosen.end == pytest.approx(-0.2)
    assert d.finding.chosen.high == pytest.approx(0.1), "the .3 nats at step 0 may be there again"
    assert d.verdict == "undecided"
    assert diagnose(Log.of(rows[1:]), beta=0.1).verdict == "displaced"


def test_arguments_beside_the_log(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    state = {"global_step": 5, "log_history": entries(np.linspace(0, -1, 8))}
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "args.json").write_text(json.dumps({"beta": 0.25, "loss_type": ["sigmoid"], "ld_alpha": 0.5}))
    d = diagnose(read_log(tmp_path))
    assert (d.scale.beta, d.scale.source) == (0.25, "from the arguments beside the log")
    assert any("ld_alpha = 0.5" in n for n in d.notes)


# ---- verdicts and noise


def synthetic(seed: int, n: int, chosen, margin, spread: float = 4.0, batch: int = 32, pairs: int = 512):
    """Training entries of a population of pairs: mean changes chosen(t), margin(t) in nats, heavy-tailed spread."""
    rng = np.random.default_rng([seed, n])
    own = rng.standard_t(3, size=(pairs, 2)) / math.sqrt(3)
    own -= own.mean(0)
    order = np.concatenate([rng.permutation(pairs) for _ in range(n * batch // pairs + 2)])
    t = (np.arange(n) + 1) / n
    c, m = (own[order[: n * batch]].reshape(n, batch, 2).mean(1) * spread * t[:, None]).T
    return Log.of(entries(0.1 * (c + chosen(t)), 0.1 * (m + margin(t))))


def verdicts(chosen, runs: int, n: int):
    return [diagnose(synthetic(s, n, chosen, lambda t: 15 * t), beta=0.1).verdict for s in range(runs)]


@pytest.mark.parametrize("n", [6, 12, 40])
def test_noise_alone_is_not_called_displaced(n):
    found = verdicts(lambda t: 0 * t, 150, n)
    assert np.mean([v in ("displaced", "degenerate") for v in found]) <= 0.05
    assert "undecided" in found


def test_the_interval_is_what_keeps_noise_from_being_called_displaced():
    logs = [synthetic(s, 12, lambda t: 0 * t, lambda t: 15 * t) for s in range(150)]
    bare = [log.together("train", "reward_chosen")[-3:, 1].mean() / 0.1 < -0.1 for log in logs]
    assert np.mean(bare) > 0.3


@pytest.mark.parametrize("n", [6, 12, 40])
def test_a_fall_is_seen_through_the_noise(n):
    assert verdicts(lambda t: -6 * t, 40, n).count("displaced") >= 38
    assert verdicts(lambda t: 3 * t, 40, n).count("no displacement") >= 38


def test_recovered_through_the_noise():
    course = lambda t: -20 * np.sin(np.pi * np.minimum(1, 1.4 * t))  # noqa: E731
    found = [diagnose(synthetic(s, 80, course, lambda t: 40 * t, spread=2.0), beta=0.1).verdict for s in range(20)]
    assert found.count("recovered") >= 15
    assert "degenerate" not in found


@pytest.mark.parametrize(("lowest", "verdict"), [(-60.0, "recovered"), (-30.0, "undecided")])
def test_recovered_means_nine_tenths(lowest, verdict):
    end = -4 + 6.0 * (-1) ** np.arange(18)  # noise that hides whether -4 is a fall
    chosen = np.r_[np.linspace(0, lowest, 6), [lowest] * 6, np.linspace(lowest, -4, 6), end]
    assert diagnose(Log.of(entries(0.1 * chosen, np.linspace(0, 6, 36))), beta=0.1).verdict == verdict


def test_intervals_cover():
    rng = np.random.default_rng(0)
    steps = np.arange(20.0)
    hits = [(c := measure(steps, rng.normal(3.0, 1.0, 20), False)).low < 3.0 < c.high for _ in range(400)]
    assert 0.92 <= np.mean(hits) <= 0.995
    free = [measure(steps, rng.normal(3.0, 1.0, 20), False, None) for _ in range(400)]  # against its own first window
    assert 0.92 <= np.mean([c.low < 0 < c.high for c in free]) <= 0.995
    trend = measure(steps, 5 * steps + rng.normal(0, 0.01, 20), False)
    assert trend.high - trend.low < 25, "a trend is not noise: the values span 95"
    assert measure(steps[:5], np.zeros(5), False) is None


@pytest.mark.parametrize("n", [40, 500])
def test_the_deepest_window_is_corrected_for_the_search(n):
    rng = np.random.default_rng(0)
    found = [measure(np.arange(n) + 1.0, rng.normal(size=n), False).lowest_high < 0 for _ in range(400)]
    assert np.mean(found) <= 0.04  # 2.5 % asked for; with as many looks as windows that do not overlap 5 % and 14 %


def test_evaluations_that_are_noise_have_the_interval_of_their_mean():
    rng = np.random.default_rng(0)
    found = [measure(np.arange(64) + 1.0, rng.normal(size=64), True) for _ in range(200)]
    assert found[0].window == 4
    assert np.mean([(c.high - c.low) / 2 for c in found]) == pytest.approx(3 / 2, rel=0.15)
    turned = measure(np.array([1.0, 2.0, 3.0]), np.array([-3.0, -1.0, -4.0]), True)
    assert turned.high > turned.end, "the start, 0, is a value like the others: from it, -3 turned back"


def test_evaluations_are_exact_but_for_turning_back_and_forth():
    steps = np.arange(8.0)
    smooth = measure(steps, -steps - 1, True)
    assert smooth.end == smooth.low == smooth.high == -8.0
    dip = measure(steps, np.array([-1, -5, -9, -12, -8, -4, -2, -1.0]), True)
    assert (dip.low, dip.lowest, dip.lowest_high) == (-1, -12, -12), "one fall and its return are no noise"
    jitter = measure(steps, np.array([0.1, -0.2, 0.2, -0.1, 0.15, -0.3, 0.2, -0.2]), True)
    assert jitter.low < -0.5
    assert jitter.high > 0.1
    assert measure(np.array([5.0]), np.array([-2.0]), True).high == -2.0


def test_too_few_entries():
    d = diagnose(Log.of(entries([-5.0] * 5)), beta=0.1)
    assert (d.verdict, d.finding.chosen) == ("undecided", None)
    assert "too few entries (5 of train, where 6 are needed)" in d.sentence
    assert diagnose(Log.of(entries([-5.0] * 6)), beta=0.1).verdict == "displaced"
    assert "eval_on_start" in str(advise(d)[0])
    start = diagnose(Log.of([{"step": 0, "eval_rewards/chosen": 0.0, "eval_rewards/rejected": 0.0}]), beta=0.1)
    assert "too few entries (1 of eval, where 2 are needed)" in start.sentence


def test_what_is_said_of_the_rejected_is_known():
    fell = entries(np.linspace(0, -2, 12), np.linspace(0, 6, 12))
    assert "from both responses" in diagnose(Log.of(fell), beta=0.1).sentence
    alone = [{k: v for k, v in e.items() if k != "rewards/rejected"} for e in fell]
    d = diagnose(Log.of(alone), beta=0.1)
    assert d.verdict == "displaced"
    assert "both" not in d.sentence


def test_not_finite():
    chosen = np.linspace(0, 1, 10)
    assert diagnose(Log.of(entries(chosen)), beta=0.1).verdict == "no displacement"
    broken = chosen.copy()
    broken[6:] = np.nan
    d = diagnose(Log.of(entries(broken)), beta=0.1)
    assert (d.verdict, d.severity) == ("degenerate", "high")
    assert "nan from step 70 on" in d.sentence
    assert "learning_rate" in advise(d)[0].title
    fell = diagnose(Log.of(entries(np.r_[-chosen[:9], np.nan])), beta=0.1)
    assert fell.sentence == "degenerate: reward chosen is nan from step 100 on: the training has diverged"
    once = chosen.copy()
    once[5] = np.nan
    assert diagnose(Log.of(entries(once)), beta=0.1).verdict == "no displacement"
    assert diagnose(Log.of(entries(chosen, loss=[0.5] * 8 + [math.inf] * 2)), beta=0.1).verdict == "degenerate"


@pytest.mark.parametrize(
    ("more", "cause"),
    [
        ({"entropy": np.linspace(1.0, 4.0, 12)}, "entropy per token went from"),
        ({"entropy": np.r_[np.linspace(2.0, 0.05, 6), [0.05] * 6]}, "entropy per token went from"),
        ({"mean_token_accuracy": np.linspace(0.7, 0.2, 12)}, "token accuracy of the chosen went from"),
        ({"entropy": np.linspace(1.0, 1.6, 12)}, ""),
        ({"entropy": np.linspace(0.05, 0.5, 12)}, ""),  # ten times as much, and still little
        ({"mean_token_accuracy": np.linspace(0.7, 0.5, 12)}, ""),
    ],
)
def test_collapse(more, cause):
    falling = entries(np.linspace(0, -3, 12), np.linspace(0, 6, 12), **more)
    d = diagnose(Log.of(falling), beta=0.1)
    assert d.verdict == ("degenerate" if cause else "displaced")
    assert cause in d.sentence
    kept = entries(np.linspace(0, 3, 12), np.linspace(0, 6, 12), **more)
    assert diagnose(Log.of(kept), beta=0.1).verdict == "no displacement", "no collapse without a fall"


def test_price_and_whether_it_still_falls():
    still = diagnose(Log.of(entries(np.linspace(0, -2, 12), np.linspace(0, 8, 12))), beta=0.1)
    assert "price: the chosen lost 0.25 for each 1 of margin gained" in still.evidence
    assert "still falling: -5.45 nats since the window before" in still.evidence  # three of eleven equal steps of 20
    over = diagnose(Log.of(entries(np.r_[np.linspace(0, -2, 6), [-2.0] * 6], np.linspace(0, 8, 12))), beta=0.1)
    assert over.verdict == "displaced"
    assert not any("still falling" in e for e in over.evidence)


def test_severity():
    def severity(reference: float) -> str:
        rows = [{"step": s, "eval_rewards/chosen": -0.1 * f, "eval_rewards/rejected": -0.3 * f, "eval_logps/chosen": reference - f,
                 "eval_logps/rejected": reference - 3 * f} for s, f in ((1, 2.0), (2, 5.0), (3, 10.0))]  # fmt: skip
        return diagnose(Log.of(rows)).severity

    assert [severity(x) for x in (-15.0, -50.0, -400.0)] == ["high", "medium", "low"]


def test_no_severity_without_a_depth():
    falling = entries(np.linspace(0, -2, 12), np.linspace(0, 6, 12))
    logged = [e | {"logps/chosen": -9.0 - 20 * i / 11 - i % 3} for i, e in enumerate(falling)]
    for rows, options, missing in (
        (logged, {}, "which takes --beta."),
        (falling, {}, "which takes --beta and logps/chosen in the log."),
        (falling, {"beta": 0.1}, "which takes logps/chosen in the log."),
    ):
        d = diagnose(Log.of(rows), **options)
        assert (d.verdict, d.severity, d.to_dict()["severity"]) == ("displaced", "unknown", "unknown")
        assert d.sentence.startswith("displaced: ")
        assert f"ln pi(chosen) before, {missing}" in str(d)
    d = diagnose(Log.of(logged), beta=0.1)
    assert d.severity == "high"
    assert d.sentence.startswith("displaced (severity high): ")
    assert "no severity" not in str(d)


# ---- advice


def test_strength_of_an_sft_term():
    for beta, margin, tokens in ((0.1, 0.0, 100), (0.1, 20.0, 100), (0.5, 3.0, 7)):
        slope = beta / (1 + math.exp(beta * margin))
        assert sft_ratios(beta, margin, tokens, (0.2, 5.0)) == pytest.approx(
            [1 + a / tokens / slope for a in (0.2, 5.0)]
        )


@pytest.mark.parametrize(
    ("settings", "loss", "weight"),
    [
        ({}, None, None),
        ({"loss_type": ["sigmoid"], "rpo_alpha": None}, None, None),
        ({"pref_ftx": 0.0}, None, None),
        ({"pref_ftx": 0.5}, None, 0.5),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [2.0, 0.01]}, None, 0.005),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.0]}, None, None),
        ({"loss_type": ["sigmoid", "sft"]}, None, math.nan),
        ({}, "sigmoid,sft", math.nan),
        ({}, "dpo:beta=0.1+sft:0.1", math.nan),
        ({"pref_ftx": 0.5}, "sigmoid", 0.5),
    ],
)
def test_a_run_with_an_sft_term_is_not_told_to_add_one(tmp_path, settings, loss, weight):
    state = {"global_step": 5, "log_history": entries(np.linspace(0, -2, 12), np.linspace(0, 6, 12))}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    (tmp_path / "args.json").write_text(json.dumps({"beta": 0.1, **settings}))
    d = diagnose(read_log(tmp_path), loss=loss)
    assert sft_weight(d) == (weight if weight is None else pytest.approx(weight, nan_ok=True))
    said = "\n".join(map(str, advise(d)))
    assert ("- add an SFT term" in said) == (weight is None)
    assert ("- raise the weight of the SFT term" in said) == (weight is not None)
    if weight is not None and weight == weight:
        (margin,) = {0.0, d.finding.margin.end} - {d.finding.margin.end}
        low, high = sft_ratios(0.1, margin, 100, (weight, 10 * weight))
        assert f"at margin 0 {low:.3g} with a = {weight:g}, {high:.3g} with a = {10 * weight:g}" in " ".join(
            said.split()
        )


def test_commands_that_are_advised_can_be_pasted():
    from sims.cli import parser

    found = [line for a in advise(diagnose(read_log(LOGS / "sigmoid_displaced"))) for line in a.lines]
    assert not any("..." in line for line in found)
    commands = [line for line in found if line.startswith("displacement ")]
    assert len(commands) == 6
    for line in commands:
        parser().parse_args(shlex.split(line)[1:])
    assert "displacement validate --model_name_or_path M --dataset D --loss dpo:beta=0.1+sft:0.1" in commands


def test_where_to_stop():
    chosen = np.linspace(0, -2, 12)
    learned = diagnose(Log.of(entries(chosen, **{"rewards/accuracies": [0.5] + [0.9] * 11})), beta=0.1)
    assert "already ranked 90%" in stop_earlier(learned).text
    late = diagnose(Log.of(entries(chosen, **{"rewards/accuracies": np.linspace(0.5, 0.95, 12)})), beta=0.1)
    assert late.finding.ranked == pytest.approx(np.linspace(0.5, 0.95, 12)[-3:].mean())
    assert stop_earlier(late) is None


def test_numbers_quoted_are_those_of_the_results():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert "CHES with .33 and .33 for pairs sampled from the model and .47 and .48 for edited pairs" in " ".join(
        text.split()
    )
    said = " ".join(a.text for a in advise(diagnose(read_log(LOGS / "sigmoid_displaced"))))
    assert ".33 to .48" in said


# ---- page and figures


def test_the_page_shows_a_hostile_log_as_text(tmp_path):
    file = tmp_path / "<script>alert('x')&.jsonl"
    rows = entries(np.linspace(0, -3, 12), **{"rewards/accuracies": [0.5] + [0.9] * 11})
    file.write_text("".join(json.dumps(r | {"eval_$x^{_rewards/chosen": 1}) + "\n" for r in rows))
    (tmp_path / "args.json").write_text(json.dumps({"beta": 0.1, "ld_alpha": "<img src=x onerror=alert(1)>"}))
    text = page(diagnose(read_log(file)))
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&amp;" in text
    assert "&lt;img src=x" in text
    assert not re.search(r"<(script|img|iframe|link|object|embed|form|a)\b", text, re.I)
    assert not re.search(r"\b(src|href|srcset|action)\s*=\s*[\"'](?!#)", text.replace("xlink:href", "href"))
    assert not re.search(r"url\((?!#)|@import|\bon\w+\s*=\s*\"", text)
    assert "default-src 'none'" in text
    body = re.sub(r"<(style|title|svg).*?</\1>", "", text, flags=re.S)
    assert re.sub(r"<[^>]+>|\s+", " ", body).split()[:1] == ["Displaced:"]
    assert text.count("<svg") == text.count("</svg>") == 2


def test_a_page_without_anything_measured_has_no_figures():
    text = page(diagnose(read_log(LOGS / "sigmoid_nan")))
    assert "<svg" not in text
    assert "Degenerate" in text


def test_figures_show_the_changes():
    from sims.plots.diagnosis import plot_course, plot_price

    d = diagnose(read_log(LOGS / "sigmoid_displaced"))
    drawn = {line.get_label(): line for line in plot_course(d).lines}
    c = d.finding.chosen
    assert np.array_equal(drawn["chosen, eval"].get_ydata(), c.values)
    assert drawn["chosen, eval"].get_ydata()[-1] < 0
    assert {"rejected, eval", "chosen, train (mean of 7)"} <= set(drawn)
    path = plot_price(d).lines[1]
    assert (path.get_xdata()[0], path.get_ydata()[0]) == (0, 0)
    assert (path.get_xdata()[-1], path.get_ydata()[-1]) == (d.finding.margin.end, c.end)


# ---- command


def test_command(tmp_path, capsys):
    displaced, kept = str(LOGS / "sigmoid_displaced"), str(LOGS / "hinge_kept")
    assert main(["diagnose", displaced, "--html", str(tmp_path / "a.html")]) == 3
    out = capsys.readouterr().out
    assert out.startswith("Displaced (severity high): the chosen log-probability fell by 3.93 nats")
    assert "What to try:" in out
    assert 'loss_type=["sigmoid", "sft"]' in out
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["diagnose", displaced, "--fail_on", "degenerate"]) == 0
    assert main(["diagnose", kept]) == 0
    assert main(["diagnose", kept, "--fail_on", "no_displacement"]) == 3
    capsys.readouterr()
    assert main(["diagnose", kept, "--json", "--fail_on", "none"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["verdict"], data["beta"], data["unit"]) == ("no displacement", pytest.approx(0.1, rel=1e-3), "nats")
    assert data["findings"][0]["chosen"]["values"][-1] == data["findings"][0]["chosen"]["end"]


def test_command_with_wrong_input(tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path / "none")], f"no such file or folder: {str(tmp_path / 'none')!r}"),
        ([str(LOGS / "hinge_kept"), "--fail_on", "bad"], "--fail_on must list verdicts"),
        ([str(LOGS / "hinge_kept"), "--beta", "-1"], "beta must be"),
        ([str(LOGS / "hinge_kept"), "--html", str(tmp_path)], "--html must be a file"),
    ):
        assert main(["diagnose", *arguments]) == 2
        assert message in capsys.readouterr().err

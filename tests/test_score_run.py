"""`displacement score`: rows and scores, shards, resume after a kill, several processes, rows that cannot be used."""

import json
import math
import multiprocessing
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from sims.cli import main
from sims.language.data.layouts import detect_layout
from sims.language.data.table import open_table
from sims.language.model import load, new_model, save
from sims.language.scoring import cautions, manifest, run
from sims.language.scoring.processes import Group
from sims.language.scoring.scorer import DEFAULT, Scorer
from sims.language.scoring.summary import QUANTILES, SHOWN, Tally, Thinned, first_bad
from sims.language.scoring.words import parted
from theory import SolverError

ROOT = Path(__file__).parents[1]
WORDS = "a b c d e f g h i j k l m n o p".split()
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}a {% endif %}"
ROWS, SHARD = 300, 10
SHORT = b'{"columns": {"ches": [1.0], "reason": [""], "note": []}, "bad": [], "highest": []}'
EMPTY = b'{"columns": {"reason": []}, "bad": [], "highest": []}'


def pairs(count):
    r = random.Random(0)

    def say(low, high):
        return " ".join(r.choice(WORDS) for _ in range(r.randint(low, high)))

    for i in range(count):
        yield {"prompt": say(3, 5), "chosen": f" {say(1, 4)} a", "rejected": f" {say(5, 9)} b", "id": i}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a small model and ROWS pairs, scored undisturbed."""
    folder = tmp_path_factory.mktemp("score")
    model = new_model(WORDS, d=16, layers=1, heads=2, max_length=32)
    save(model, folder / "model")
    write(folder / "pairs.jsonl", pairs(ROWS))
    assert main(call(folder, "whole")) == 0
    return folder


def call(folder, name="out", *more, data="pairs.jsonl", shard=SHARD):
    """Arguments of a run whose result is `<folder>/<name>/scored.jsonl`."""
    out = folder / name / "scored.jsonl"
    out.parent.mkdir(exist_ok=True)
    common = ["score", "--model_name_or_path", str(folder / "model"), "--dataset", str(folder / data)]
    return [*common, "--output", str(out), "--shard_rows", str(shard), *more]


def result(folder, name="out"):
    return (folder / name / "scored.jsonl").read_bytes()


def rows_of(folder, name="out"):
    return [json.loads(line, parse_constant=pytest.fail) for line in result(folder, name).splitlines()]


def about(folder, name="out"):
    """The manifest, without the name of its output."""
    found = json.loads((folder / name / "scored.jsonl.manifest.json").read_text(), parse_constant=pytest.fail)
    del found["summary"]["output"]
    return found


@contextmanager
def started(arguments, errors, **environment):
    """Another process; what it says on stderr is in the file `errors`."""
    command = [sys.executable, "-m", "sims", *arguments]
    where = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    with open(errors, "w") as f:
        process = subprocess.Popen(command, env=where, stdout=subprocess.DEVNULL, stderr=f)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(there, process):
    end = time.monotonic() + 120
    while not there():
        assert time.monotonic() < end
        assert process.poll() is None, "it ended early"
        time.sleep(0.002)


@pytest.fixture
def counted(monkeypatch):
    """How many rows this process scores."""
    seen = []
    inner = Scorer.score_examples
    monkeypatch.setattr(Scorer, "score_examples", lambda self, e: seen.extend(e) or inner(self, e))
    return seen


# ---- the result


def test_every_row_comes_back_with_the_scores_of_its_pair(made):
    found, data = rows_of(made, "whole"), list(pairs(ROWS))
    assert [{k: row[k] for k in data[0]} for row in found] == data, "rows, their order and their columns stay"
    model = load(made / "model")
    table = open_table(made / "pairs.jsonl")
    layout = detect_layout(table)
    alone = Scorer(model).score_examples([layout.example(row.values) for row in table.rows()])
    for name in DEFAULT:
        np.testing.assert_allclose([row[name] for row in found], alone[name], rtol=1e-4, atol=1e-4)
        assert np.std(alone[name]) > 0 or name == "shared_prefix"
    assert sorted(file.name for file in (made / "whole").iterdir()) == ["scored.jsonl", "scored.jsonl.manifest.json"]


def test_the_manifest_says_what_the_scores_come_from(made):
    run_, summary = about(made, "whole").values()
    assert run_["model"]["fingerprint"] == load(made / "model").fingerprint
    assert run_["model"]["dtype"] == "float32"
    assert run_["data"]["sha256"] == open_table(made / "pairs.jsonl").sha256
    assert run_["data"]["layout"] == "trl"
    assert run_["versions"]["torch"] == __import__("torch").__version__
    found = rows_of(made, "whole")
    for name in DEFAULT:
        values = [row[name] for row in found]
        expected = dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())), strict=True))
        assert summary["quantiles"][name] == pytest.approx(expected)
    order = sorted(range(ROWS), key=lambda i: -found[i]["ln_ches"])[:SHOWN]
    assert [row["where"] for row in summary["highest"]] == [f"line {i + 1}" for i in order]
    assert summary["nearly_identical"] == sum(row["edit_distance"] <= 0.1 for row in found)
    assert summary["rows"] == summary["pairs"] == ROWS
    assert summary["unusable"] == 0


def test_what_is_asked_for_is_added_and_ranks(made, capsys):
    write(made / "few.jsonl", pairs(12))
    more = ("--probe", "--ref_logps", "--alpha", "--json")
    assert main(call(made, "more", *more, data="few.jsonl")) == 0
    summary = json.loads(capsys.readouterr().out)
    found = rows_of(made, "more")
    assert summary["ranked_by"] == "sign_step_chosen"
    scores = [row["sign_step_chosen"] for row in found]
    assert [row["score"] for row in summary["highest"]] == sorted(scores)[:SHOWN], "the deepest fall is the lowest"
    assert summary["falls"] == {
        name: sum(row[name] < 0 for row in found) for name in ("gradient_step_chosen", "sign_step_chosen")
    }
    assert all(row["ref_chosen_logps"] < 0 and math.isfinite(row["alpha"]) for row in found)
    main(call(made, "two", "--columns", "edit_distance", data="few.jsonl"))
    assert set(rows_of(made, "two")[0]) == {"prompt", "chosen", "rejected", "id", "edit_distance", "reason", "note"}


def test_several_rejected_responses_have_a_score_each(made, capsys):
    data = list(pairs(6))
    for i, row in enumerate(data):
        row["rejected"] = [row["rejected"], " p", row["chosen"]][: i % 2 + 2]
    write(made / "several.jsonl", data)
    with (made / "several.jsonl").open("a") as f:
        f.write("{\n")
    assert main(call(made, "several", data="several.jsonl", shard=2)) == 3
    found = rows_of(made, "several")
    assert [len(row["ches"]) for row in found] == [2, 3] * 3 + [1], "also the row that cannot be read has a list"
    assert found[1]["ches"][2] is None
    assert found[1]["reason"] == ["", "", "chosen and rejected are the same"]
    best = max((x, i + 1, k + 1) for i, row in enumerate(found) for k, x in enumerate(row["ln_ches"]) if x is not None)
    assert about(made, "several")["summary"]["highest"][0]["where"] == f"line {best[1]}, rejected {best[2]}"
    assert about(made, "several")["summary"]["pairs"] == 12
    assert about(made, "several")["summary"]["unusable"] == 4
    assert "scored.jsonl --by ln_ches --choose --keep 0.95" in capsys.readouterr().out


# ---- rows that cannot be used


def test_malformed_rows_are_named_and_the_others_scored(made, capsys):
    good = [json.dumps(row).encode() for row in pairs(8)]
    bad = {
        2: (b'{"prompt": "a b", "chosen": " c"', "JSON"),
        3: (b'{"prompt": "a b", "rejected": " c d"}', "chosen"),
        5: (b'{"prompt": "a b", "chosen": "", "rejected": " c"}', "chosen is empty"),
        6: (json.dumps({"prompt": "a " * 30, "chosen": "b", "rejected": "c"}).encode(), "limit is 20"),
        9: (b'{"prompt": "a \xff", "chosen": " b", "rejected": " c"}', "UTF-8"),
    }
    merged = b'{"prompt": "a b c", "chosen": "d e", "rejected": "f g"}'  # "c" becomes part of an unknown word
    lines = iter([*good[:7], merged])
    (made / "bad.jsonl").write_bytes(b"\n".join(bad[n][0] if n in bad else next(lines) for n in range(1, 14)) + b"\n")
    assert main(call(made, "bad", "--max_length", "20", data="bad.jsonl", shard=4)) == 3
    said = capsys.readouterr().out
    found = rows_of(made, "bad")
    assert len(found) == 13
    for n, row in enumerate(found, 1):
        if n in bad:
            assert bad[n][1] in row["reason"]
            assert row["ches"] is row["edit_distance"] is None
            assert f"  1 x {row['reason']} (line {n})\n" in said
        else:
            assert row["reason"] == ""
            assert math.isfinite(row["ches"])
    assert found[12]["note"].startswith("boundary: the end of the prompt, 'c'")
    assert sum(bool(row["note"]) for row in found) == 1
    summary = about(made, "bad")["summary"]
    assert (summary["pairs"], summary["unusable"], summary["notes"]) == (8, 5, {"boundary": 1})
    assert any("tokenised otherwise" in text for text in summary["warnings"])
    assert "Not scored: 5 of 13 pairs" in said
    # without the bad rows nothing is wrong
    (made / "good.jsonl").write_bytes(b"\n".join(good))
    assert main(call(made, "good", data="good.jsonl")) == 0
    assert "Not scored" not in capsys.readouterr().out


def test_nothing_is_begun_with_what_cannot_work(made, tmp_path, capsys):
    talk = {"prompt": [{"role": "user", "content": "a"}], "chosen": [{"role": "assistant", "content": "b"}]}
    write(made / "talk.jsonl", [talk | {"rejected": [{"role": "assistant", "content": "c"}]}] * 3)
    write(made / "same.jsonl", [{"prompt": "a", "chosen": " b", "rejected": " b"}] * 3)
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " b"}]).to_parquet(made / "one.parquet")
    write(made / "taken.jsonl", [row | {"reason": "mine"} for row in pairs(3)])
    for more, words, data in [
        ((), "its folder", "talk.jsonl"),
        ((), "none of the first 3 rows .* line 1: chosen and rejected are the same", "same.jsonl"),
        ((), "the only row of dataset cannot be used: row 0: .* rows are counted from 0", "one.parquet"),
        ((), "columns that scores would have: reason; .*--overwrite", "taken.jsonl"),
        (("--columns", "chess"), r"--columns .*ches", "pairs.jsonl"),
        (("--shard_rows", "0"), "--shard_rows", "pairs.jsonl"),
        (("--output", str(made / "pairs.jsonl")), "must not be the data set itself", "pairs.jsonl"),
        (("--output", str(tmp_path / "x.txt")), "must end in one of", "pairs.jsonl"),
        (("--model_name_or_path", str(made / "none")), "model", "pairs.jsonl"),
    ]:
        assert main(call(made, "no", *more, data=data)) == 2
        assert re.search(words, capsys.readouterr().err), words
    assert not list((made / "no").iterdir())
    assert not list(tmp_path.iterdir())


def test_numbers_of_processes_that_do_not_fit(made, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("2", "-1", "x", ""):
        monkeypatch.setenv("RANK", rank)
        assert main(call(made, "no")) == 2
        assert "RANK must be a number below WORLD_SIZE" in capsys.readouterr().err


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [Group(rank, 4).device("auto") for rank in range(4)] == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Group(2, 4).device("auto") == "cuda:1"
    assert Group(2, 4).device("cpu") == "cpu"
    assert Group().device("auto") == "auto"


# ---- going on


def shards(folder, name):
    return sorted(file.name for file in (folder / name / "scored.jsonl.shards").glob("shard-*.json"))


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(made, counted, capsys):
    with started(call(made, "killed"), made / "killed.txt") as process:
        wait_for(lambda: shards(made, "killed"), process)
        process.send_signal(signal.SIGKILL)
    done = len(shards(made, "killed"))
    assert 0 < done < ROWS / SHARD, "killed in the middle"
    assert not (made / "killed" / "scored.jsonl").exists()
    assert main(call(made, "killed")) == 0
    assert len(counted) == ROWS - done * SHARD, "what was stored is not scored again"
    assert result(made, "killed") == result(made, "whole")
    assert about(made, "killed") == about(made, "whole")
    assert sorted(file.name for file in (made / "killed").iterdir()) == ["scored.jsonl", "scored.jsonl.manifest.json"]


class Stop(BaseException):
    pass


def stopped(made, name, monkeypatch, error, after=2, more=()):
    """A run that is stopped while it scores its next shard."""
    inner, calls = Scorer.score_examples, []

    def score(self, examples):
        calls.append(len(examples))
        if len(calls) > after:
            raise error
        return inner(self, examples)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score_examples", score)
        return main(call(made, name, *more))


def test_an_interrupt_keeps_what_was_scored_and_says_so(made, monkeypatch, capsys, counted):
    assert stopped(made, "interrupted", monkeypatch, KeyboardInterrupt()) == 130
    assert re.search("2 shards are kept in .*: repeat the command to go on", capsys.readouterr().err)
    assert shards(made, "interrupted") == ["shard-00000000.json", "shard-00000001.json"]
    del counted[:]
    assert main(call(made, "interrupted")) == 0
    assert len(counted) == ROWS - 2 * SHARD
    assert result(made, "interrupted") == result(made, "whole")


def test_memory_that_runs_out_is_said(made, monkeypatch, capsys):
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    assert stopped(made, "memory", monkeypatch, error) == 1
    assert re.search("memory ran out in line 21 to line 30: .*--batch_tokens", capsys.readouterr().err)
    with pytest.raises(RuntimeError, match="other"):
        stopped(made, "memory", monkeypatch, RuntimeError("other"))


def test_stored_shards_are_what_is_written(made, monkeypatch):
    stopped(made, "changed", monkeypatch, KeyboardInterrupt())
    file = made / "changed" / "scored.jsonl.shards" / "shard-00000001.json"
    shard = json.loads(file.read_text())
    shard["columns"]["ches"][3] = 12345.5
    file.write_text(json.dumps(shard))
    assert main(call(made, "changed")) == 0
    found, whole = rows_of(made, "changed"), rows_of(made, "whole")
    assert [i for i in range(ROWS) if found[i] != whole[i]] == [SHARD + 3]
    assert found[SHARD + 3]["ches"] == 12345.5
    assert about(made, "changed")["summary"]["quantiles"]["ches"]["max"] == 12345.5


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b"\xff", SHORT, EMPTY])
def test_a_damaged_shard_is_named(made, monkeypatch, capsys, damage):
    stopped(made, "damaged", monkeypatch, KeyboardInterrupt(), more=("--restart",))
    file = made / "damaged" / "scored.jsonl.shards" / "shard-00000001.json"
    file.write_bytes(damage)
    assert main(call(made, "damaged")) == 2
    assert re.search(r"shard-00000001.json' is damaged .* delete it", capsys.readouterr().err)
    file.unlink()
    assert main(call(made, "damaged")) == 0
    assert result(made, "damaged") == result(made, "whole")


def test_unfinished_work_of_another_run_is_refused(made, monkeypatch, capsys, counted):
    stopped(made, "other", monkeypatch, KeyboardInterrupt())
    there = shards(made, "other")
    model = load(made / "model")
    model.network.get_output_embeddings().weight.data[0, 0] += 1
    save(model, made / "changed-model")
    model = load(made / "model")
    model.tokenizer.chat_template = CHAT
    save(model, made / "chat-model")
    tokens = Scorer(model).encoder.batch_tokens
    rows = list(pairs(ROWS))
    write(made / "changed.jsonl", [*rows[:-1], rows[0]])
    for more, words in [
        (("--dtype", "float64"), "model dtype was float32, is float64"),
        (("--max_length", "20"), "options max_length was null, is 20"),
        (("--batch_tokens", "99"), f"options batch_tokens was {tokens}, is 99"),
        (("--columns", "ches"), "options columns was"),
        (("--shard_rows", "7"), "options shard_rows was 10, is 7"),
        (("--model_name_or_path", str(made / "changed-model")), "model fingerprint was"),
        (("--model_name_or_path", str(made / "chat-model")), "tokenizer chat_template was null, is"),
        (("--dataset", str(made / "changed.jsonl")), "data sha256 was"),
        (("--layout", "implicit"), "data layout was trl, is implicit"),
    ]:
        assert main(call(made, "other", *more)) == 2
        said = capsys.readouterr().err
        assert words in said
        assert "start anew with --restart" in said
        assert shards(made, "other") == there
    monkeypatch.setattr(manifest, "FORMAT", 2)
    assert main(call(made, "other")) == 2
    assert "format was 1, is 2" in capsys.readouterr().err
    monkeypatch.undo()
    (made / "other" / "scored.jsonl.shards" / "manifest.json").write_text("[1]")
    assert main(call(made, "other")) == 2
    assert "is damaged" in capsys.readouterr().err
    stale = made / "other" / "scored.jsonl.shards" / "shard-00000000.json"  # well-formed, but of another run
    stale.write_text(stale.read_text().replace('"len_chosen":[', '"len_chosen":[7', 1))
    assert main(call(made, "other", "--restart")) == 0
    assert result(made, "other") == result(made, "whole")


def test_a_folder_of_another_run_without_shards_is_taken_over(made, monkeypatch):
    stopped(made, "begun", monkeypatch, KeyboardInterrupt(), after=0, more=("--dtype", "float64"))
    assert (made / "begun" / "scored.jsonl.shards" / "manifest.json").is_file()
    assert not shards(made, "begun")
    assert main(call(made, "begun")) == 0
    assert result(made, "begun") == result(made, "whole")


def test_an_output_that_is_there_is_replaced_only_when_asked_to(made, capsys, counted):
    write(made / "short.jsonl", pairs(7))
    assert main(call(made, "there", data="short.jsonl")) == 0
    before = result(made, "there")
    assert main(call(made, "there", data="short.jsonl")) == 2
    assert "exists: give another --output, or replace it with --restart" in capsys.readouterr().err
    assert len(counted) == 7
    assert not (made / "there" / "scored.jsonl.shards").exists()
    assert main(call(made, "there", "--restart", data="short.jsonl")) == 0
    assert len(counted) == 14
    assert result(made, "there") == before
    # killed while the shards of a finished run were being removed: its output stands
    (made / "there" / "scored.jsonl.shards").mkdir()
    (made / "there" / "scored.jsonl.shards" / "shard-00000000.json").write_text("{")
    for name in ("mine", "shard-mine.json"):
        (made / "there" / "scored.jsonl.shards" / name).write_text("x")
    assert main(call(made, "there", data="short.jsonl")) == 2
    assert result(made, "there") == before
    left = {file.name for file in (made / "there" / "scored.jsonl.shards").iterdir()}
    assert left == {"mine", "shard-mine.json"}


def test_data_that_change_under_the_run_are_noticed(made, monkeypatch, capsys):
    write(made / "moving.jsonl", pairs(7))
    inner = Scorer.score_examples

    def score(self, examples):
        write(made / "moving.jsonl", pairs(8))
        return inner(self, examples)

    monkeypatch.setattr(Scorer, "score_examples", score)
    assert main(call(made, "moving", data="moving.jsonl")) == 2
    assert "changed while it was scored" in capsys.readouterr().err
    assert not (made / "moving" / "scored.jsonl").exists()


# ---- several processes


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def one_of_two(arguments, rank, port):
    """Run as a launcher would start it."""
    torch.set_num_threads(1)  # a forked process must not use the threads of its parent
    here = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in here.items():
            patch.setenv(name, value)
        return main(arguments)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forks: to import everything anew takes long
@pytest.mark.parametrize("kind", ["whole", "refused"])
def test_two_processes_share_the_work_and_give_the_same_bytes(made, counted, capsys, kind):
    arguments, port = call(made, f"two-{kind}"), free_port()
    if kind == "refused":
        (made / "two-refused" / "scored.jsonl").write_text("mine")
    context = multiprocessing.get_context("fork")
    other = context.Process(target=lambda: sys.exit(one_of_two(arguments, 1, port)), daemon=True)
    other.start()
    threads = torch.get_num_threads()
    try:
        code = one_of_two(arguments, 0, port)
        other.join(60)
    finally:
        torch.set_num_threads(threads)
        other.kill()
    if kind == "refused":
        assert (code, other.exitcode) == (2, 2), "what stops the first stops the other"
        assert result(made, "two-refused") == b"mine"
        assert not counted
        return
    assert (code, other.exitcode) == (0, 0), capsys.readouterr()
    assert len(counted) == ROWS / 2, "every second shard"
    assert result(made, "two-whole") == result(made, "whole")
    assert about(made, "two-whole") == about(made, "whole")


HOLD = """
import runpy, sys, time
from pathlib import Path
group = runpy.run_path(sys.argv[2])["Group"](1, 2)  # the file alone, without torch
group._hold(Path(sys.argv[1]))
print("holds", flush=True)
time.sleep(60)
"""


def test_a_process_that_dies_is_an_error_and_not_a_hang(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path), str(ROOT / "sims/language/scoring/processes.py")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holds\n"
    group = Group(0, 2)
    assert group.others_gone(tmp_path) == []
    (tmp_path / "shard-00000000.json").write_text("{}")
    with pytest.raises(ValueError, match="another run is at work"):
        Group(1, 2)._hold(tmp_path)

    def later(action):
        timer = threading.Timer(0.3, action)
        timer.start()
        return timer

    timer = later((tmp_path / "shard-00000001.json").touch)
    run._wait(tmp_path, 2, group)
    assert (tmp_path / "shard-00000001.json").exists(), "it waited for the shard of the other"
    timer.join()
    timer = later(holder.kill)
    with pytest.raises(SolverError, match="process 1 of 2 ended before its rows were scored"):
        run._wait(tmp_path, 4, group)  # shard 2 is of process 0 itself and does not count against 1
    timer.join()
    holder.wait()
    holder.stdout.close()
    run._wait(tmp_path, 2, group)  # gone, but nothing is missing


def test_two_runs_on_one_output_do_not_meet(made, capsys):
    folder = made / "twice" / "scored.jsonl.shards"
    folder.mkdir(parents=True)
    first = Group()
    first._hold(folder)
    assert main(call(made, "twice")) == 2
    assert "another run is at work" in capsys.readouterr().err
    first.end()
    assert main(call(made, "twice")) == 0


# ---- the summary


def test_quantiles_of_a_long_stream_are_close_and_of_a_short_one_exact():
    r = np.random.default_rng(0)
    values = r.normal(size=100_000)
    sample = Thinned(1 << 10)
    for x in values:
        sample.add(x)
    assert len(sample.kept) <= sample.most
    assert sample.kept == values[:: sample.stride].tolist()
    assert sample.stride == 128
    grid = np.linspace(0.05, 0.95, 19)
    ranks = [(values < q).mean() for q in np.quantile(sample.kept, grid)]
    assert np.abs(np.array(ranks) - grid).max() < 4 * 0.5 / math.sqrt(len(sample.kept)), "four standard errors"
    short = Thinned(1 << 10)
    for x in values[: 1 << 10]:
        short.add(x)
    assert short.kept == values[: 1 << 10].tolist()


def test_responses_are_shown_from_where_they_part():
    def decode(ids):
        return "".join(WORDS[i] for i in ids)

    assert parted("No, never", "Yes", decode) == ("No, never", "Yes")
    same = "x" * 50
    chosen, rejected = parted(same + "left" + "z" * 50, same + "right", decode)
    assert chosen.startswith("...xxx")
    assert "xleftz" in chosen
    assert chosen.endswith("z...")
    assert rejected.endswith("xright")
    assert parted([{"role": "assistant", "content": "hi"}], [{"role": "assistant", "content": None}], decode) == (
        "hi",
        "",
    )
    assert parted([0, 1], [2], decode) == ("ab", "c")


def test_reasons_are_counted_by_kind_and_kinds_are_bounded():
    tally = Tally()
    reasons = [f"prompt has {n} tokens, the limit is 20" for n in range(30)] + ["", "column 'a' is empty", 'no "b"']
    where = [f"line {n}" for n in range(33)]
    columns = {"reason": reasons, "note": [""] * 33, "ches": [math.nan] * 30 + [1.0] + [math.nan] * 2}
    tally.add({"columns": columns, "bad": first_bad(where, reasons), "highest": []})
    long, *rest = tally.reasons.items()
    first = {"count": 30, "where": ["line 0", "line 1", "line 2"], "example": reasons[0]}
    assert long == ("prompt has N tokens, the limit is N", first)
    assert {kind: (r["count"], r["where"]) for kind, r in rest} == {
        "column '...' is empty": (1, ["line 31"]),
        "no '...'": (1, ["line 32"]),
    }
    assert (tally.pairs, tally.unusable) == (1, 32)
    text = str(tally.summary("out", "data", "model", ()))
    assert "  30 x such as: prompt has 0 tokens, the limit is 20 (line 0, line 1, line 2, ...)\n" in text
    assert "  1 x column 'a' is empty (line 31)\n" in text
    others = [chr(97 + i // 26) + chr(97 + i % 26) for i in range(100)]
    columns = {"reason": others, "note": [""] * 100, "ches": [math.nan] * 100}
    tally.add({"columns": columns, "bad": first_bad(where * 3 + ["x"], others), "highest": []})
    assert len(tally.reasons) == 21
    assert sum(r["count"] for r in tally.reasons.values()) == 132
    assert len(tally.reasons["others"]["where"]) == 3


def test_nothing_is_dropped_by_a_probe_that_finds_no_fall():
    said = {}
    for steps in ([0.5, 0.25], [0.5, -0.25]):
        tally = Tally()
        columns = {"reason": ["", ""], "note": ["", ""], "sign_step_chosen": steps}
        shown = [{"where": "row 1", "score": steps[1], "fall": -steps[1], "chosen": "a", "rejected": "b"}]
        tally.add({"columns": columns, "bad": [], "highest": shown})
        said[min(steps)] = str(tally.summary("out", "data", "model", ()))
    for text in said.values():
        assert "displacement validate --model_name_or_path model --dataset data" in text
        assert "rows are counted from 0\n  row 1 " in text
    assert "nothing to drop: no pair lowers its own by a sign step" in said[0.25]
    assert "none is below 0" in said[0.25]
    assert "displacement filter" not in said[0.25]
    assert "displacement filter out --by sign_step_chosen --keep" in said[-0.25]
    assert "nothing to drop" not in said[-0.25]


def test_long_texts_are_cut_and_said_without_a_warning_of_the_tokenizer(made, capsys, monkeypatch):
    from transformers import tokenization_utils_base

    warned = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda text, *_: warned.append(text))
    long = {"prompt": "a b", "chosen": " c" * 60, "rejected": " d"}
    messages = {"prompt": [{"role": "user", "content": "a"}]} | {
        name: [{"role": "assistant", "content": long[name]}] for name in ("chosen", "rejected")
    }
    model = load(made / "model")
    model.tokenizer.chat_template = CHAT
    save(model, made / "talks")
    for name, row in (("text", long), ("messages", messages)):
        write(made / f"{name}.jsonl", [row])
        assert main(call(made, f"long-{name}", "--model_name_or_path", str(made / "talks"), data=f"{name}.jsonl")) == 0
        assert "1 pair (100.0 %) lost the end of a response" in capsys.readouterr().out
        assert not warned
        assert rows_of(made, f"long-{name}")[0]["note"].count("truncated: chosen") == 1


def test_cautions():
    model = new_model(WORDS, d=16, layers=1, heads=2, max_length=32)
    table_row = next(pairs(1))
    from sims.language.pairing import Example

    example = Example(table_row["prompt"], table_row["chosen"], (table_row["rejected"],))
    assert cautions.of_model(model, 1e-6, 1e-5, example) == ()
    assert "by 0.5 nats" in cautions.of_model(model, 0.5, 0.1, example)[0]
    model.network.config.final_logit_softcapping = 30.0
    model.tokenizer.chat_template = CHAT
    capped, plain = cautions.of_model(model, 0.0, 0.1, example)
    assert "caps its logits (final_logit_softcapping 30)" in capped
    assert "chat template" in plain
    model.network.bfloat16()
    assert "weights in bfloat16: states are rounded to about 0.78 %" in cautions.of_model(model, 0.0, 0.1, example)[1]
    tally = Tally()
    note = ["boundary: x; truncated: chosen", "truncated: chosen; truncated: rejected", ""] + [""] * 97
    tally.add({"columns": {"reason": [""] * 100, "note": note}, "bad": [], "highest": []})
    assert tally.notes == {"boundary": 1, "truncated": 2}
    (found,) = cautions.of_data(tally)
    assert found.startswith("2 pairs (2.0 %) lost the end")
    tally.add({"columns": {"reason": [""] * 900, "note": [""] * 900}, "bad": [], "highest": []})
    assert cautions.of_data(tally)[0].startswith("2 pairs (0.2 %) lost the end"), "few as they are"

"""Jobs: the same for any number of workers, stored one by one, resumed after a kill, never served from a wrong file."""

import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from sims.language.jobs import run_jobs

ROOT = Path(__file__).parents[1]


def draw(seed, n=3, log=None):
    """A job with torch arithmetic whose rounding depends on the number of threads; tells the log that it ran."""
    if log is not None:
        with open(log, "a") as f:
            f.write(f"{seed}\n")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400_000, generator=generator)
    return {
        "sum": float(x.sum()),
        "array": np.arange(n) / 7,
        "pair": (1, np.int64(2)),
        "inf": -math.inf,
        "threads": torch.get_num_threads(),
    }


def fail_on_two(x):
    if x == 2:
        raise KeyError("two")
    return x


def die(x):
    os.kill(os.getpid(), signal.SIGKILL)


def no_json(x):
    return {"value": {x}}


def test_the_result_is_the_same_for_any_number_of_workers_and_from_the_files(tmp_path):
    jobs = [{"seed": s} for s in (3, 1, 2, 3)]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        alone = run_jobs(draw, jobs, workers=1)
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)
    many = run_jobs(draw, jobs, tmp_path, workers=2)
    again = run_jobs(draw, jobs, tmp_path, workers=1)
    assert alone == many == again
    assert alone[0] == alone[3]
    assert alone[0] is not alone[3], "changing one result must not change another"
    assert len({r["sum"] for r in alone}) == 3
    assert alone[0] == {**draw(3), "array": [0.0, 1 / 7, 2 / 7], "pair": [1, 2], "inf": -math.inf, "threads": 1}


def test_what_is_stored_is_not_computed_again(tmp_path):
    log = str(tmp_path / "log")
    folder = tmp_path / "jobs"
    run_jobs(draw, [{"seed": 0, "log": log}, {"seed": 0, "log": log}], folder, 1)
    assert Path(log).read_text() == "0\n", "equal jobs are computed once"
    run_jobs(draw, [{"seed": 1, "log": log}, {"log": log, "seed": 0}], folder, 1)
    assert Path(log).read_text() == "0\n1\n", "the order of the arguments does not matter"
    run_jobs(draw, [{"seed": 0, "n": 3, "log": log}], folder, 1)
    assert Path(log).read_text() == "0\n1\n0\n", "other arguments are another job"
    run_jobs(draw, [{"seed": 0, "log": log}], folder, 1, version="later")
    assert Path(log).read_text() == "0\n1\n0\n0\n", "another version is computed anew"
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("damage", ["truncated", "random", "empty", "list", "other", "foreign"])
def test_a_damaged_file_is_named_and_not_used(tmp_path, damage):
    run_jobs(fail_on_two, [{"x": 1}, {"x": 3}], tmp_path, 1)
    file, other = sorted(tmp_path.iterdir(), key=lambda f: json.loads(f.read_text())["job"]["x"])
    data = {
        "truncated": file.read_bytes()[:-5],
        "random": np.random.default_rng(0).bytes(200),
        "empty": b"",
        "list": b"[1]",
        "other": other.read_bytes(),
        "foreign": b"{}",
    }
    file.write_bytes(data[damage])
    with pytest.raises(ValueError, match=r"fail_on_two-\w+\.json' is damaged .* delete it"):
        run_jobs(fail_on_two, [{"x": 3}, {"x": 1}], tmp_path, 1)
    file.unlink()
    assert run_jobs(fail_on_two, [{"x": 3}, {"x": 1}], tmp_path, 1) == [3, 1]


def test_an_error_names_its_job_and_keeps_what_was_done(tmp_path):
    with pytest.raises(KeyError, match="two") as info:
        run_jobs(fail_on_two, [{"x": x} for x in (0, 1, 2, 3)], tmp_path, 1)
    assert info.value.__notes__ == ["in the job {'x': 2}"]
    assert {json.loads(f.read_text())["result"] for f in tmp_path.iterdir()} == {0, 1}


def test_a_killed_worker_is_an_error_and_not_a_hang():
    from theory import SolverError

    with pytest.raises(SolverError, match="killed"):
        run_jobs(die, [{"x": 0}, {"x": 1}], workers=2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda d: run_jobs(lambda x: x, [{"x": 1}], d), "function must be at the top"),
        (lambda d: run_jobs(fail_on_two, [{"x": {1}}], d), r"a job must hold JSON values only, got .*\{1"),
        (lambda d: run_jobs(fail_on_two, [{"x": 1}], d, 0), "workers"),
        (lambda d: run_jobs(fail_on_two, [{"x": 1}], d / "file"), "folder must be a folder"),
    ],
)
def test_bad_arguments(tmp_path, call, words):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=words):
        call(tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_a_result_that_is_no_json_is_refused(tmp_path):
    with pytest.raises(TypeError, match="set"):
        run_jobs(no_json, [{"x": 1}], tmp_path, 1)
    assert not list(tmp_path.iterdir())


def test_no_jobs():
    assert run_jobs(fail_on_two, []) == []


def test_an_interrupt_stops_the_workers_and_keeps_what_was_done(tmp_path):
    folder, log = tmp_path / "jobs", tmp_path / "log"
    jobs = [{"x": x, "log": str(log)} for x in (0, 60, 60.5, 61)]
    # A shell that starts a run in the background has it ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_jobs(interrupt, jobs, folder, workers=2)
    finally:
        signal.signal(signal.SIGINT, before)
    workers = {int(line) for line in log.read_text().splitlines()}
    wait_for(lambda: not any(alive(pid) for pid in workers), 20.0)
    assert [json.loads(f.read_text())["result"] for f in folder.iterdir()] == [0]


def interrupt(x, log):
    """0 returns at once; 60 interrupts the parent; all but 0 take a minute."""
    with open(log, "a") as f:
        f.write(f"{os.getpid()}\n")
    if x:
        time.sleep(0.5)
    if x == 60:
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(x)
    return x


MODULE = """
import os, time

def square(i, log, wait):
    with open(log, "a") as f:
        f.write(f"{os.getpid()}\\n")
    time.sleep(wait)
    return i * i
"""
SCRIPT = """
import sys
from sims.language.jobs import run_jobs
from slow_squares import square

if __name__ == "__main__":
    run_jobs(square, [{"i": i, "log": sys.argv[2], "wait": 0.25} for i in range(40)], sys.argv[1], workers=2)
"""


def test_a_killed_run_leaves_no_process_and_resumes(tmp_path, monkeypatch):
    script, folder, log = tmp_path / "script.py", tmp_path / "jobs", tmp_path / "log"
    script.write_text(SCRIPT)
    (tmp_path / "slow_squares.py").write_text(MODULE)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(log)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: folder.is_dir() and len(list(folder.glob("*.json"))) >= 3)
    process.kill()
    process.wait()
    workers = {int(line) for line in log.read_text().splitlines()}
    wait_for(lambda: not any(alive(pid) for pid in workers))
    done = len(list(folder.glob("*.json")))
    assert 3 <= done < 40
    started = len(log.read_text().splitlines())
    monkeypatch.syspath_prepend(tmp_path)
    square = importlib.import_module("slow_squares").square
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    found = run_jobs(square, [{"i": i, "log": str(log), "wait": 0.25} for i in range(40)], folder, 1)
    assert found == [i * i for i in range(40)]
    assert len(log.read_text().splitlines()) == started + 40 - done, "only what was missing is computed"


def wait_for(condition, limit=60.0):
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

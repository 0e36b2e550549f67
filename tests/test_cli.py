"""The command line as a new user meets it: output, files, exit codes, messages."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sims.cli import main


@pytest.fixture
def matrix(tmp_path):
    """A small embedding file on which no/never can displace and maybe/perhaps cannot."""
    rng = np.random.default_rng(0)
    tokens = np.array(["no", "never", "yes", "maybe", "perhaps", *(f"word{i}" for i in range(40))])
    file = tmp_path / "small.npz"
    np.savez(file, unembedding=rng.standard_normal((45, 12)), tokens=tokens)
    return str(file)


def strict(text: str):
    """JSON without NaN or Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_demo_prints_the_study_and_writes_everything(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "out"), "--draws", "20"]) == 0
    text = capsys.readouterr().out
    assert "prefer No over Never" in text
    assert "kappa*" in text
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert "demo.json" in written
    assert sum(name.endswith(".png") for name in written) >= 4
    assert not any(name.endswith(".part") for name in written)
    data = strict((tmp_path / "out" / "demo.json").read_text())
    assert data["main"]["status"] == "transient"
    assert data["main"]["end"]["margin"] == "inf"


def test_demo_json_is_the_file(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path), "--draws", "20", "--json"]) == 0
    assert strict(capsys.readouterr().out) == strict((tmp_path / "demo.json").read_text())


def test_losses_lists_the_registry(capsys):
    from theory.losses import LOSSES

    assert main(["losses", "--json"]) == 0
    assert [row["name"] for row in strict(capsys.readouterr().out)] == list(LOSSES)
    assert main(["losses"]) == 0
    table = capsys.readouterr().out
    assert all(f"\n{name}\n" in f"\n{table}" for name in LOSSES)
    assert main(["losses", "--markdown"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == list(LOSSES)
    assert {row.count("|") for row in rows} == {6}, "a bar inside a formula would end its cell"


def test_signs_tells_agreement_and_fails_on_disagreement(capsys, monkeypatch):
    assert main(["signs", "--instances", "200", "--json"]) == 0
    data = strict(capsys.readouterr().out)
    assert data["instances"] == 200
    assert set(data["disagreements"].values()) == {0}
    # The same with a condition that has the wrong sign.
    from sims.scenarios import signs

    right = signs.sign_agreement

    def wrong(instances, seed, **more):
        return right(instances, seed, lambda problem: [-x for x in signs.conditions_signs(problem)], **more)

    monkeypatch.setattr(signs, "sign_agreement", wrong)
    assert main(["signs", "--instances", "50"]) == 1


def test_predict_says_whether_the_pair_can_displace(matrix, capsys, tmp_path):
    figure = tmp_path / "figure.png"
    call = ["predict", matrix, "--preferred", "no", "--dispreferred", "never", "--figure", str(figure)]
    assert main(call) == 0
    text = capsys.readouterr().out
    assert "r_max" in text
    assert "kappa" in text
    assert figure.stat().st_size > 10_000
    assert main([*call, "--json", "--loss", "ipo", "--set", "tau=0.2", "--kappa", "3", "--start", "no=5,never=2"]) == 0
    data = strict(capsys.readouterr().out)
    assert data["displacement"]["kappa"] == 3.0


def test_scan_ranks_pairs(matrix, capsys):
    assert main(["scan", matrix, "--tokens", "no,never,yes,maybe", "--json"]) == 0
    assert strict(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("call", "code", "words"),
    [
        ([], 0, "Certified: displacement of 'No'"),
        (["--kappa", "inf", "--token", "Yes"], 0, "Certified: displacement of 'No'"),
        (["--kappa", "0.05"], 1, "NOT certified"),
        (["--kappa", "0"], 1, "NOT certified"),
    ],
)
def test_certify_exits_with_0_only_if_certified(call, code, words, capsys):
    pytest.importorskip("flint")
    assert main(["certify", *call]) == code
    assert capsys.readouterr().out.startswith(words)
    assert main(["certify", *call, "--json"]) == code
    data = strict(capsys.readouterr().out)
    assert data["certified"] is (code == 0)
    assert data["displaces"] is (code == 0)
    assert (data["change"]["high"] < 0) is (code == 0)


@pytest.mark.parametrize(("preferred", "dispreferred", "code"), [("no", "never", 0), ("maybe", "perhaps", 1)])
def test_certify_of_a_file_agrees_with_r_max(preferred, dispreferred, code, matrix, capsys):
    pytest.importorskip("flint")
    call = ["--preferred", preferred, "--dispreferred", dispreferred, "--kappa", "inf", "--json"]
    assert main(["certify", matrix, *call]) == code
    data = strict(capsys.readouterr().out)
    assert (data["preferred"], data["dispreferred"], data["V"], data["eta_W"]) == (preferred, dispreferred, 45, 0.0)
    with np.load(matrix) as file:
        rows = dict(zip(file["tokens"].tolist(), file["unembedding"], strict=True))
    up, down = rows.pop(preferred), rows.pop(dispreferred)
    a = up - down
    r_max = max(float((2 * row - up - down) @ a / (a @ a)) for row in rows.values())
    assert (r_max > 1) is data["displaces"] is (code == 0)


def test_study_writes_its_data_and_its_figure(tmp_path, capsys):
    assert main(["study", "--pairs", "16", "--out", str(tmp_path)]) == 0
    assert "ches.json and ches.png" in capsys.readouterr().out
    assert {p.name for p in tmp_path.iterdir()} == {"ches.json", "ches.png"}
    assert (tmp_path / "ches.png").read_bytes().startswith(b"\x89PNG")
    assert "version" in strict((tmp_path / "ches.json").read_text())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (["predict", "absent.npz", "--preferred", "a", "--dispreferred", "b"], "absent.npz"),
        (["predict", "MATRIX", "--preferred", "nevr", "--dispreferred", "no"], "did you mean 'never'"),
        (["predict", "MATRIX", "--preferred", "no", "--dispreferred", "no"], "no"),
        (
            ["predict", "MATRIX", "--preferred", "no", "--dispreferred", "yes", "--kappa", "-1"],
            "--kappa must be in [0, inf], got -1",
        ),
        (
            ["predict", "MATRIX", "--preferred", "no", "--dispreferred", "yes", "--figure", "a.txt"],
            "--figure must end in",
        ),
        (["predict", "MATRIX", "--preferred", "no", "--dispreferred", "yes", "--loss", "dop"], "'dpo'"),
        (["predict", "MATRIX", "--preferred", "no", "--dispreferred", "yes", "--set", "beta"], "NAME=NUMBER"),
        (["predict", "MATRIX", "--preferred", "no", "--dispreferred", "yes", "--set", "beta=0"], "beta must be in"),
        (["predict", "MATRIX", "--preferred", "no", "--dispreferred", "yes", "--start", "no=1,no=2"], "twice"),
        (["certify", "--kappa", "-1"], "--kappa must be in [0, inf], got -1"),
        (["certify", "--kappa", "nan"], "--kappa must be in [0, inf], got nan"),
        (["certify", "--set", "beta=0.2"], "--set needs --loss"),
        (["certify", "MATRIX"], "--preferred and --dispreferred must be given"),
        (["scan", "MATRIX", "--tokens", "no"], "tokens"),
        (["demo", "--draws", "0"], "draws"),
    ],
)
def test_wrong_input_is_named_and_exits_with_2(call, message, matrix, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([matrix if c == "MATRIX" else c for c in call]) == 2
    seen = capsys.readouterr()
    assert message in seen.err
    assert "Traceback" not in seen.err
    assert seen.out == ""
    assert not (tmp_path / "displacement-demo").exists()


def test_help_teaches_and_the_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "sims", "--help"], capture_output=True, text=True, check=True)
    for word in ("demo", "predict", "scan", "losses", "bench", "Exit codes"):
        assert word in run.stdout
    run = subprocess.run(
        [sys.executable, "-m", "sims", "predict", "--help"], capture_output=True, text=True, check=True
    )
    assert "example:" in run.stdout
    assert subprocess.run([sys.executable, "-m", "sims", "fly"], capture_output=True, check=False).returncode == 2


def test_the_readme_names_the_commands_that_ci_runs():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    lines = readme.splitlines()
    for marker, starts in (("<!-- main command -->", "displacement demo"), ("<!-- test command -->", "-m pytest")):
        command = lines[lines.index(marker) + 2]
        assert command.startswith("python3 -m pip install -e")
        assert starts in command
        assert command.count("&&") == 1

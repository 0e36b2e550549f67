"""`displacement lm`: training that resumes after a kill, options, reports from saved results."""

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from sims.cli import main
from sims.commands.lm._shared import finish, losses_of, parse_loss
from sims.commands.lm.train import world_of
from sims.files import to_json
from sims.language import report
from sims.language.fitting import STATE
from sims.language.model import load, new_model
from theory.losses import DPO, IPO, NLL, SFT, Sum

ROOT = Path(__file__).parents[1]
TINY = "--d 16 --layers 1 --heads 2 --batch 4 --every 5".split()


def strict(text):
    return json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


# ---- train


def state_step(folder):
    from safetensors import safe_open

    with safe_open(folder / "state" / STATE, "pt") as f:
        return int(f.metadata()["step"])


def test_a_killed_training_resumes_to_the_bit(tmp_path, capsys):
    call = ["lm", "train", "requests", *TINY, "--steps", "60"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "sims", *call, "--out", str(killed)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},  # as many threads as here: sums of other threads round otherwise
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 60
    while not (killed / "state" / STATE).is_file():
        assert time.monotonic() < end
        assert process.poll() is None, "it ended before a checkpoint was written"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 0 < state_step(killed) < 60, "killed in the middle"
    assert not (killed / "model").exists()
    assert main([*call, "--out", str(killed), "--json"]) == 0
    resumed = strict(capsys.readouterr().out)
    assert main([*call, "--out", str(whole), "--json"]) == 0
    at_once = strict(capsys.readouterr().out)
    assert resumed == at_once
    assert (killed / "model" / "model.safetensors").read_bytes() == (whole / "model" / "model.safetensors").read_bytes()
    assert load(whole / "model").fingerprint == at_once["fingerprint"]
    assert at_once["nats_per_token"]["trained"] < at_once["nats_per_token"]["untrained"] - 0.3
    assert at_once["training"]["what"]["world"] == "requests"
    assert "--steps 60" in at_once["training"]["command"]


def test_training_says_what_it_made(tmp_path, capsys):
    call = [
        "lm",
        "train",
        "persona",
        *TINY,
        "--steps",
        "3",
        "--seed",
        "2",
        "--set",
        "never=0.11",
        "--out",
        str(tmp_path),
    ]
    assert main(call) == 0
    text = capsys.readouterr().out
    assert "nats per token" in text
    assert f"--model {tmp_path / 'model'}" in text
    model = load(tmp_path / "model")
    assert model.training["what"]["never"] == 0.11
    assert model.training["recipe"]["seed"] == 2
    again = ["displacement", *call[:-2]]
    assert sorted(model.training["command"].split()) == sorted(again), "the command that is recorded is the one given"
    assert main([*call[:-2], "--set", "always=0.2", "--out", str(tmp_path)]) == 2, "the folder is another run's"
    assert "belongs to another run" in capsys.readouterr().err


def test_fields_of_a_world_are_listed(capsys):
    from sims.language.worlds.persona import PersonaWorld

    assert main(["lm", "train", "persona", "--fields"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n{name} = {value}" in text for name, value in PersonaWorld().to_dict().items())


def test_fields_have_the_type_of_their_default():
    from sims.language.worlds.persona import PersonaWorld

    world = world_of(PersonaWorld, ["never=0.2", "scale=false", "seed=3"], None)
    assert (world.never, world.scale, world.seed) == (0.2, False, 3)
    assert type(world.seed) is int


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["persona", "--set", "nevr=0.2"], "did you mean 'never'"),
        (["persona", "--set", "never"], "NAME=VALUE"),
        (["persona", "--set", "never=x"], "number"),
        (["persona", "--set", "never=2"], "never must be in"),
        (["persona", "--set", "scale=maybe"], "true or false"),
        (["persona", "--set", "never=0.1", "--set", "never=0.2"], "twice"),
        (["persona", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["requests", "--data", "nowhere.jsonl"], "--data is for the persona world"),
        (["persona", "--steps", "-1"], "steps"),
        (["persona", "--d", "10"], "d must be a multiple"),
    ],
)
def test_bad_options_of_train(tmp_path, capsys, more, words):
    assert main(["lm", "train", *more, "--out", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- options


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("dpo", DPO()),
        ("dpo:beta=0.3", DPO(beta=0.3)),
        ("ipo:tau=0.2+sft:0.5", SFT(IPO(tau=0.2), 0.5)),
        ("nll:per=token", NLL("token")),
    ],
)
def test_losses_by_name(text, loss):
    assert parse_loss(text) == loss
    assert not isinstance(parse_loss(text), Sum)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dop", "dpo"),
        ("dpo:bta=1", "beta"),
        ("dpo:beta", "NAME:PARAMETER=VALUE"),
        ("dpo:beta=1,beta=2", "each once"),
        ("dpo:beta=x", "beta"),
        ("dpo:beta=-1", "beta"),
        ("dpo+sft", r"\+sft:WEIGHT"),
        ("dpo+ipo:1", r"\+sft:WEIGHT"),
        ("dpo+sft:0", "lam"),
        ("", "loss"),
    ],
)
def test_losses_that_are_none(text, words):
    with pytest.raises(ValueError, match=words):
        parse_loss(text)


def test_losses_asked_for_replace_the_default():
    asked = types.SimpleNamespace(loss=["dpo", "ipo"])
    assert losses_of(asked, [NLL()]) == [DPO(), IPO()]
    assert losses_of(types.SimpleNamespace(loss=None), (NLL(),)) == [NLL()]


def test_every_subcommand_is_there(capsys):
    with pytest.raises(SystemExit) as info:
        main(["lm", "--help"])
    assert info.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name}" in text for name in ("train", *report.EXPERIMENTS, "report"))


# ---- report


class Toy:
    """The result of an experiment, as small as one can be."""

    def __init__(self, value):
        self.value = value

    def to_dict(self):
        return {"value": self.value}

    @classmethod
    def from_dict(cls, data):
        return cls(data["value"])

    def __str__(self):
        return f"table of {self.value}"


@pytest.fixture
def toy(monkeypatch):
    """An experiment called toy, whose figure is a text file."""

    def save_toy(result, folder):
        file = Path(folder) / "toy.txt"
        file.write_text(str(result))
        return [file]

    language, plots = types.ModuleType("sims.language.studies.toy"), types.ModuleType("sims.plots.toy")
    language.RESULT, plots.save_toy = Toy, save_toy
    monkeypatch.setitem(sys.modules, "sims.language.studies.toy", language)
    monkeypatch.setitem(sys.modules, "sims.plots.toy", plots)
    monkeypatch.setattr(report, "EXPERIMENTS", ("persona", "toy"))
    return save_toy


def finished(folder, name, value, save_toy, **options):
    """What a command writes."""
    folder.mkdir(exist_ok=True)
    arguments = types.SimpleNamespace(
        command="lm", subcommand="toy", run=None, out=folder, json=False, workers=2, **options
    )
    finish(arguments, name, Toy(value), new_model(["No"], d=8, layers=1, heads=2), save_toy)


def test_a_report_is_made_of_what_was_saved(tmp_path, capsys, toy):
    finished(tmp_path / "a", "toy", 7, toy, seeds=3, fast=False, model=None)
    finished(tmp_path / "b", "toy_sweep", 8, toy, file=Path("x.jsonl"))
    (tmp_path / "a" / "other.json").write_text("[1]")
    printed = capsys.readouterr().out
    assert "table of 7" in printed
    assert "toy.json" in printed
    assert main(["lm", "report", str(tmp_path / "b"), str(tmp_path / "a"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("table of 7") < text.index("table of 8")
    assert "with seeds = 3;" in text
    assert "file = x.jsonl" in text
    record = strict((tmp_path / "a" / "toy.json").read_text())
    assert record["model"]["fingerprint"] == new_model(["No"], d=8, layers=1, heads=2).fingerprint
    assert record["options"] == {"seeds": 3, "fast": False, "model": None}, (
        "what does not decide the result is left out"
    )
    assert record["model"]["fingerprint"][:16] in text
    for name, value in (("toy", 7), ("toy_sweep", 8)):
        assert f"![{name}/toy.txt]({name}/toy.txt)" in text
        assert (tmp_path / "out" / name / "toy.txt").read_text() == f"table of {value}"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"experiment": "toy"', "damaged"),
        ('{"experiment": "tyo"}', "did you mean 'toy'"),
        ('{"experiment": "toy", "version": "1", "options": {}, "model": {"fingerprint": "0"}}', "'result'"),
        (
            '{"experiment": "toy", "version": "1", "options": {}, "model": {"fingerprint": "0"}, "result": {}}',
            "'value'",
        ),
        ('{"experiment": "toy", "version": "1", "options": {}, "model": {}, "result": {"value": 1}}', "'fingerprint'"),
    ],
)
def test_a_damaged_result_is_named(tmp_path, capsys, toy, data, words):
    (tmp_path / "mine.json").write_text(data)
    assert main(["lm", "report", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "mine.json" in error
    assert words in error
    assert not (tmp_path / "out").exists()


def test_a_report_of_nothing_is_an_error(tmp_path, capsys, monkeypatch, toy):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "a", "toy", 7, toy)
    for call, words in (
        ([], "name folders with results"),
        (["nowhere"], "there is none at 'nowhere'"),
        (["."], "holds no result"),
        (["a", "a"], "different file names"),
    ):
        assert main(["lm", "report", *call]) == 2
        assert words in capsys.readouterr().err


def test_a_report_finds_the_results_of_the_commands(tmp_path, capsys, monkeypatch, toy):
    monkeypatch.chdir(tmp_path)
    finished(tmp_path / "displacement-lm-toy", "toy", 7, toy)
    assert main(["lm", "report"]) == 0
    assert "table of 7" in (tmp_path / "displacement-report" / "report.md").read_text()


RESULTS = sorted((ROOT / "notebooks" / "results").glob("*.json"))


@pytest.mark.parametrize("file", RESULTS, ids=lambda f: f.stem)
def test_the_results_that_are_kept_can_be_read(file, tmp_path):
    """Tables and figures from the file alone; what is written again is what was read."""
    assert file.stat().st_size <= 400_000
    saved = report.read(file)
    assert strict(to_json(saved.result.to_dict())) == saved.record["result"]
    written = report.write_report([saved], tmp_path)
    table = written[0].read_text().split("```")[1]
    assert len(table.splitlines()) > 10
    assert "nan" not in table.lower().split()
    assert len(written) > 1
    assert all(f.stat().st_size > 10_000 for f in written if f.suffix == ".png")

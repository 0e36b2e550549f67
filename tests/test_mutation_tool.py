"""The mutation tool itself: the faults it plants, what it leaves alone, and that it tells killed from survived."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import mutation
import pytest

ROOT = Path(__file__).parents[1]


def labels(source: str) -> set[str]:
    return {m.label for m in mutation.mutants(source)}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = a + b", {"a + b -> a - b", "a + b -> a", "a + b -> b"}),
        ("x = a - b", {"a - b -> a + b", "a - b -> a", "a - b -> -b"}),
        ("x = a * b * c", {"a * b * c -> a * b / c", "a * b * c -> -(a * b * c)", "a * b -> a / b"}),
        ("x = -a ** b", {"-a ** b -> a ** b", "a ** b -> a * b"}),
        ("x = A @ B", {"A @ B -> A * B"}),
        ("x += 1", {"x += 1 -> x -= 1", "1 -> 2"}),
        ("x = a < b", {"a < b -> a <= b", "a < b -> a >= b"}),
        ("x = a is None", {"a is None -> a is not None"}),
        ("x = a and (not b)", {"a and (not b) -> a or not b", "not b -> b"}),
        ("x = mask & ~other", {"mask & ~other -> mask | ~other", "~other -> other"}),
        ("x = y[0]", {"y[0] -> y[1]"}),
        ("x = 2.5", {"2.5 -> 3.5"}),
        ("x = True", {"True -> False"}),
        ("x = f(a, b, c)", {"f(a, b, c) -> f(b, a, c)"}),
        ("x = max(a, b) - c", {f"max(a, b) - c -> {x}" for x in ("max(a, b) + c", "max(a, b)", "-c")}),
        ("if a:\n    b", {"if a -> if not a"}),
        ("x = a if b else c", {"a if b else c -> a if not b else c"}),
        ("def f(a, b=1, *, c=0.0): ...", {"b=1 -> b=2", "c=0.0 -> c=1.0"}),
    ],
)
def test_the_faults_of_each_kind(source, expected):
    scope = "f" if source.startswith("def") else "module"
    assert labels(source) == {f"{scope}: {label}" for label in expected}


@pytest.mark.parametrize(
    "source",
    [
        '"""Text, 1 + 1."""',
        "def f(x: Literal[1] = None) -> Array[2]: ...",
        "raise ValueError(f'{x + 1} must be below {2}')",
        "x = f'{a + 1}'",
        "class C:\n    def __repr__(self):\n        return a + b",
        "class C:\n    def examples(self):\n        return (1, 2)",
        "x = Interval(typical=(1, 2))",
        "from a import b as c",
        "x = 'text' + y",
        "x = open('name', mode)",
    ],
)
def test_nothing_else_changes(source):
    assert mutation.mutants(source) == []


def test_mutants_are_distinct_valid_and_leave_no_trace_in_each_other():
    source = (ROOT / "theory" / "losses" / "cdpo.py").read_text()
    found = mutation.mutants(source)
    unchanged = ast.unparse(ast.parse(source)).splitlines()
    assert len({m.source for m in found}) == len({m.label for m in found}) == len(found) > 50
    for m in found:
        compile(m.source, "mutant", "exec")
        lines = m.source.splitlines()
        # One statement differs (the test of a branch may take its line only).
        assert len(lines) == len(unchanged)
        assert sum(a != b for a, b in zip(lines, unchanged, strict=True)) == 1, m.label


def test_every_module_has_a_fast_subset():
    for file in (ROOT / "theory").rglob("*.py"):
        assert mutation.fast_tests(file.relative_to(ROOT).as_posix())
    assert mutation.fast_tests("theory/losses/dpo.py") != mutation.fast_tests("theory/exact.py")


STRONG = "assert [clip(x) for x in (-2, 1, 3)] == [0, 1, 3]"
WEAK = "assert clip(3) == 3"


@pytest.fixture
def project(tmp_path):
    """A function that runs the tool on a project of one module and one test."""

    def run(test: str, least: float = 75.0) -> tuple[subprocess.CompletedProcess[str], dict]:
        for folder in ("pkg", "tests"):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "pkg" / "clip.py").write_text(CLIP)
        (tmp_path / "tests" / "test_clip.py").write_text(f"from pkg.clip import clip\n\ndef test_clip():\n    {test}\n")
        command = [sys.executable, mutation.__file__, "pkg/clip.py", "--tests", "tests", "--root", str(tmp_path)]
        command += ["--preload", "pytest hypothesis", "--json", str(tmp_path / "out.json"), "--least", str(least)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert (tmp_path / "pkg" / "clip.py").read_text() == CLIP
        record = tmp_path / "out.json"
        return done, json.loads(record.read_text()) if record.exists() else {}

    return run


CLIP = "def clip(x):\n    return x if x > 0 else 0\n"


def test_killed_and_survived(project):
    """`x >= 0` gives the same function: the only mutant that a good test leaves; a poor one leaves more and fails."""
    done, record = project(STRONG)
    assert done.returncode == 0, done.stderr
    assert [o["label"] for o in record["outcomes"] if o["status"] == "survived"] == ["clip: x > 0 -> x >= 0"]
    assert (record["killed"], record["survived"], record["score"]) == (3, 1, 75.0)
    assert "survived pkg/clip.py:2 clip: x > 0 -> x >= 0" in done.stdout
    done, record = project(WEAK)
    assert done.returncode == 1
    assert record["score"] == 25.0


def test_a_test_that_fails_on_the_unchanged_module_stops_the_tool(project):
    done, record = project("assert clip(3) == 4")
    assert done.returncode == 1
    assert "the unchanged module fails" in done.stderr
    assert "assert 3 == 4" in done.stderr
    assert record == {}

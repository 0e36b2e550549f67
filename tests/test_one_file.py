"""Adding a loss edits exactly one file: a file put into a copy of the packages appears everywhere, with no other change."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The template as it comes, under a name of its own.
NEW = (
    (ROOT / "sims" / "templates" / "my_loss.py").read_text().replace("MyLoss", "Novelty").replace("my_loss", "novelty")
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """The packages and the tests, with one more file."""
    home = tmp_path_factory.mktemp("copy")
    for folder in ("theory", "sims", "tests"):
        shutil.copytree(ROOT / folder, home / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", home)
    (home / "theory" / "losses" / "novelty.py").write_text(NEW)
    return home


def run(home: Path, *command: str) -> str:
    """A command in the copy, whose packages come before the installed ones."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    environment |= {"PYTHONPATH": str(home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=home, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_registry_and_the_documentation(copy):
    rows = json.loads(run(copy, "-m", "sims", "losses", "--json"))
    (row,) = [r for r in rows if r["name"] == "novelty"]
    assert row["kind"] == "margin"
    assert r"\beta" in row["latex"]
    assert "| `novelty` | margin | $" in run(copy, "-m", "sims", "losses", "--markdown")


def test_the_tests(copy):
    seen = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "Novelty or novelty", "tests/test_losses.py")
    passed, skipped = (int(seen.split(word)[0].split()[-1].strip(",")) for word in (" passed", " skipped"))
    assert passed >= 8
    assert "novelty is not retyped from its paper" in seen
    assert skipped > 0


def test_the_ledger(copy):
    code = "; ".join(
        [
            "import numpy as np",
            "from sims.verify import verify",
            "from theory.losses import LOSSES",
            "from theory.theorems.settings import random_loss",
            "drawn = {random_loss(np.random.default_rng(i)).name for i in range(300)}",
            "ledger = verify(['theorem_4'], instances=200, losses=['novelty'], workers=1)",
            "print('novelty' in drawn, ledger.ok)",
        ]
    )
    assert run(copy, "-c", code).split() == ["True", "True"]


def test_the_comparison(copy):
    out = copy / "compared"
    text = run(copy, "-m", "sims", "compare", "--losses", "dpo,novelty", "--scenario", "token", "--out", str(out))
    assert "\n  novelty " in text
    assert (out / "compare.png").stat().st_size > 10_000
    assert "novelty" in (out / "compare.json").read_text()


def test_the_original_is_untouched(copy):
    """The check can fail: without the file nothing of this is there."""
    (copy / "theory" / "losses" / "novelty.py").rename(copy / "novelty.txt")
    try:
        assert "novelty" not in run(copy, "-m", "sims", "losses", "--json")
    finally:
        (copy / "novelty.txt").rename(copy / "theory" / "losses" / "novelty.py")

"""Who imports whom, read from the syntax trees: the two routes may share the loss formula and nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
THEORY = sorted((ROOT / "theory").rglob("*.py"))
SIMS = sorted((ROOT / "sims").rglob("*.py"))
LANGUAGE = [f"language/{name}.py" for name in ("model", "fitting", "responses", "preferences")]
ROUTE = [ROOT / "sims" / name for name in ("flow.py", "descent.py", "objective.py", "trajectory.py", *LANGUAGE)]

# What holds a closed form, a derivative or a path: the simulated route may not see any of it.
CLOSED = {
    "theory.rates", "theory.exact", "theory.path", "theory.clock", "theory.motion", "theory.displacement",
    "theory.extrema", "theory.descent", "theory._quadrature", "theory.certify",
}  # fmt: skip


def imported(source: str) -> set[str]:
    """Every module named in an import anywhere in the source, `from a import b` as both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_at_top(source: str) -> set[str]:
    """The same, outside functions only."""
    top = [n for n in ast.parse(source).body if isinstance(n, ast.Import | ast.ImportFrom)]
    return imported("\n".join(ast.unparse(n) for n in top))


def under(modules: set[str], *packages: str) -> set[str]:
    return {m for m in modules if any(m == p or m.startswith(p + ".") for p in packages)}


@pytest.mark.parametrize("file", THEORY, ids=lambda f: str(f.relative_to(ROOT)))
def test_theory_is_mathematics_only(file):
    modules = imported(file.read_text())
    assert not under(modules, "sims", "matplotlib", "argparse", "tqdm", "pathlib")
    assert not under(imported_at_top(file.read_text()), "torch"), "torch is imported when used"
    if under(modules, "torch"):
        losses = "losses" in file.parts or "check" in file.stem or "check" in file.parts
        assert losses or file.name in ("ops.py", "pulls.py"), "torch only evaluates losses"


@pytest.mark.parametrize("file", ROUTE, ids=lambda f: f.name)
def test_the_simulated_route_shares_no_formula(file):
    modules = imported(file.read_text())
    assert not under(modules, *CLOSED)
    closed_names = {"ExactFlow", "ExactDescent", "batch_log_probs", "log_prob_rate"}
    assert not modules & {f"theory.{name}" for name in closed_names}
    assert "closed_slope" not in file.read_text()


def test_only_plots_draws():
    drawing = {f.parent.name for f in SIMS if under(imported(f.read_text()), "matplotlib")}
    assert drawing == {"plots"}


def test_extras_are_imported_when_used_and_transformers_in_one_place():
    language = ROOT / "sims" / "language"
    users = {f for f in SIMS if under(imported(f.read_text()), "transformers", "tokenizers")}
    callback = language / "callback.py"  # a subclass of that library's; imported by users alone
    assert users - {callback} == {language / "model.py"}
    assert not [f for f in SIMS if "sims.language.callback" in imported(f.read_text())]
    extras = ("transformers", "tokenizers", "safetensors", "rapidfuzz", "datasets", "pyarrow", "accelerate", "trl")
    assert not [f for f in SIMS if f != callback and under(imported_at_top(f.read_text()), *extras)]


def test_the_reader_sees_planted_violations():
    assert under(imported("def f():\n    from theory.exact import ExactFlow\n"), *CLOSED)
    assert under(imported("import theory.clock as c"), *CLOSED)
    assert under(imported("from theory import exact"), *CLOSED)
    assert under(imported("import matplotlib.pyplot as plt"), "matplotlib")
    assert not under(imported_at_top("def f():\n    import torch\n"), "torch")
    assert under(imported_at_top("import torch\n"), "torch")
    assert not under(imported("from theory.model import UnconstrainedFeatures"), *CLOSED)

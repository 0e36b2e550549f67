"""The README against what happens: its Python runs, its pictures are there, its commands exist."""

import re
from pathlib import Path

from sims.cli import parser

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()


def test_its_python_runs_from_top_to_bottom(capsys):
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) >= 4
    namespace: dict = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    # What it shows of the conditions is what they print; "..." leaves lines out.
    shown = TEXT.split("No > Never, DPO(beta=0.1)\n")[1].split("```")[0]
    lines = [line for line in shown.splitlines() if line.strip() != "..."]
    assert len(lines) >= 7
    assert all(line in printed for line in lines)


def test_its_pictures_and_files_are_there():
    linked = re.findall(r"\]\(((?!http|#)[^)]+)\)", TEXT)
    assert len(linked) > 8
    assert [name for name in linked if not (README.parent / name).exists()] == []


def test_its_commands_exist():
    (known,) = [a.choices for a in parser()._subparsers._group_actions]  # type: ignore[union-attr]
    named = set(re.findall(r"(?:`|^|&& )displacement ([a-z-]+)", TEXT, re.M))
    assert named <= set(known), named - set(known)
    assert len(named) > 8

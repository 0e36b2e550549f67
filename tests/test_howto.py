"""The how-tos against what happens: every block of commands and of Python in them runs, in order, in an empty folder.

Commands run in this process (starting one for each would take minutes); what is not ours goes to a shell.
"""

import re
import shlex
import subprocess
import warnings
from pathlib import Path

import pytest

from sims.cli import main

FOLDER = Path(__file__).parents[1] / "notebooks" / "howto"
HOWTOS = sorted(FOLDER.glob("*.md"))
FENCED = re.compile(r"^```(sh|python)\n(.*?)^```", re.S | re.M)


def commands(block: str) -> list[str]:
    """The commands of a shell block: continued lines joined, a here-document with its command."""
    found: list[str] = []
    end = None
    for line in block.splitlines():
        if end is not None:
            found[-1] += "\n" + line
            end = None if line == end else end
        elif found and found[-1].endswith("\\"):
            found[-1] = found[-1][:-1] + line
        elif line.strip() and not line.startswith("#"):
            found.append(line)
            here = re.search(r"<<\s*'?(\w+)'?", line)
            end = here.group(1) if here else None
    assert end is None, f"no end of the here-document: {block}"
    return found


def run(command: str) -> int:
    if not command.startswith("displacement "):
        return subprocess.run(["bash", "-ec", command], capture_output=True, timeout=120).returncode
    words = shlex.split(command, comments=True)
    codes = (0, 3) if words[-2:] == ["||", "true"] else (0,)
    words = words[:-2] if len(codes) > 1 else words
    assert not {">", "|", "&&", ";"} & set(words), f"this test runs plain commands only: {command}"
    code = main(words[1:])
    return 0 if code in codes else code or 1


@pytest.mark.parametrize("path", HOWTOS, ids=lambda p: p.stem)
def test_runs_as_it_stands(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    blocks = FENCED.findall(path.read_text())
    assert blocks
    for language, block in blocks:
        if language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # trainers warn, and a how-to may show a warning of ours
                exec(compile(block, path.name, "exec"), namespace)
            continue
        for command in commands(block):
            assert run(command) == 0, command


def test_every_command_has_one():
    assert {"score", "filter", "predict", "diagnose", "validate", "callback"} <= {p.stem for p in HOWTOS}


def test_the_reader_of_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands("# a\ncat > x <<'E'\n1\nE\ndisplacement losses \\\n  --json\n") == [
        "cat > x <<'E'\n1\nE",
        "displacement losses   --json",
    ]
    assert run("cat > x <<'E'\n1\nE") == 0
    assert (tmp_path / "x").read_text() == "1\n"
    assert run("false") == 1
    assert run("displacement predict nothing.npz --preferred a --dispreferred b") == 2

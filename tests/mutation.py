"""Mutation testing: plant one small fault at a time in a module and see whether a fast subset of the tests notices.

    python tests/mutation.py theory/exact.py                     # its fast subset, every mutant
    python tests/mutation.py theory/losses --sample 50 --seed 1
    python tests/mutation.py theory/path.py --tests tests/test_exact.py tests/test_properties.py --json out.json

Prints every survivor; exits with 1 if fewer than `--least` per cent of the mutants that are not known to be equivalent
are killed. The working tree is never touched: each worker owns a copy in a temporary folder. Every mutant runs in a
fork of one process that has imported the libraries but none of the code under test.
"""

import argparse
import ast
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

_RATES = ["tests/test_rates.py", "tests/test_problem.py"]
# Tests that see the module, quickest first (pytest stops at the first failure). The longest matching prefix counts.
FAST: dict[str, list[str]] = {
    "theory/": ["tests/test_regressions.py", "tests/test_errors.py", "tests/test_exact.py", "tests/test_properties.py"],
    "theory/exact.py": [
        *["tests/test_errors.py", "tests/test_regressions.py", "tests/test_exact.py"],
        *["tests/test_clock.py::test_a_margin_the_flow_never_has_takes_for_ever"],
        *["-k", "not flow_equals_the_integrated or cdpo"],
    ],
    "theory/losses/": [
        *["tests/test_losses_trl.py", "tests/test_losses_papers.py", "tests/test_losses_tokens.py"],
        *["tests/test_losses_groups.py", "tests/test_trl.py", "tests/test_losses.py"],
    ],
    "theory/losses/_calibrated.py": ["tests/test_conditions.py"],
    "theory/conditions/": ["tests/test_conditions.py"],
    "theory/groups.py": ["tests/test_groups.py"],
    "theory/pulls.py": ["tests/test_problem.py"],
    "theory/check/": ["tests/test_check_loss.py"],
    "theory/losses/_combine.py": ["tests/test_problem.py"],
    "theory/rates.py": _RATES,
    "theory/problem.py": _RATES,
    "theory/ches.py": ["tests/test_ches.py"],
} | {
    f"theory/theorems/{claim}.py": [*_RATES, f"tests/test_theorems.py::test_the_claim[{claim}]"]
    for claim in (
        "theorem_4 theorem_5 theorem_6 theorem_7 theorem_8 theorem_9 shared_prefix proposition_1 proposition_2 "
        "general_rate"
    ).split()
}

# Mutants no test can kill: file -> {label: why}. A label is `scope: before -> after`, as a survivor is printed.
_SIGN = "only the sign of this number is used"
_FILLER = "a placeholder: the entry is overwritten by the limit"
_EDGE = "differs at a single number, where both sides agree"
_SLOWER = "the same number by a slower way, or the other way round"
_DIGITS = "a working precision or stopping rule with room to spare: the same float"
_ZEROS = "adds zeros for their shape: their sign does not matter"
_OWN_TEXT = "dataclass keeps a __repr__ that the class defines"
_ONE_LENGTH = "of one length by construction"
_SYMMETRIC = "an inner product is symmetric"
_CENTRAL = "moved is 0, or one end of a central difference of which the size is used"
_DTYPE = "only its dtype and device are used"
_MEAN_OF_ONE = "the mean of one state is the state"
_SYMMETRIC_PREFIX = "two responses have one common prefix"
_LAST = "axis 1 of two is the last"
EQUIVALENT: dict[str, dict[str, str]] = {
    "theory/exact.py": {
        "ExactFlow.pair_log_probs: sigma > self.path.float_range(self.clock.direction)[0] -> sigma >= self.path.float_range(self.clock.direction)[0]": _EDGE,
        "ExactFlow.log_probs_at_margin: np.where(inside, tau, 0.0) -> np.where(inside, tau, 1.0)": _FILLER,
        "ExactFlow.log_probs_at_margin: -1.0 -> -2.0": _SIGN,
        "ExactFlow.log_probs_at_margin: (-1.0, 1.0) -> (-1.0, 2.0)": _SIGN,
        "ExactFlow.log_probs_at_margin: side * (u - self.start_margin) > 0 -> side * (u - self.start_margin) >= 0": "the start itself is always inside",
        "ExactFlow._reachable: -1.0 -> -2.0": _SIGN,
        "ExactFlow._reachable: (-1.0, 1.0) -> (-1.0, 2.0)": _SIGN,
        "ExactFlow.r_max: -1 -> 1": "of (m, d), axis 1 is the last",
        "ExactFlow.alignment: not self.path.motion.k.any() -> self.path.motion.k.any()": _SLOWER,
        "ExactFlow.alignment: :1 -> :2": "a number as lr_hidden has one mode",
        "sweep: sigma > path.float_range(clock.direction)[:, None] -> sigma >= path.float_range(clock.direction)[:, None]": _EDGE,
        "sweep: np.where(ended, 0.0, sigma) -> np.where(ended, 1.0, sigma)": _FILLER,
        "sweep: i + 1 -> i + 2": "of the rows taken, only the first is used",
    },
    "theory/rates.py": {
        "Rate: repr=False -> repr=True": _OWN_TEXT,
    },
    "theory/problem.py": {
        "module: 4096 -> 4097": _SLOWER,
        "Problem.model: strict=True -> strict=False": _ONE_LENGTH,
        "Problem.log_prob: -1 -> 1": _LAST,
        "Problem.through_rows: len(self) > 1 -> len(self) >= 1": _SLOWER,
        "Problem.through_rows: self.W.dtype == np.float64 -> self.W.dtype != np.float64": _SLOWER,
        "Problem.inner: self.overlap(v, w) -> self.overlap(w, v)": _SYMMETRIC,
        "Problem._incentives: shift * (abs(a) + abs(b) + abs(a_ref) + abs(b_ref)) -> -(shift * (abs(a) + abs(b) + abs(a_ref) + abs(b_ref)))": _CENTRAL,
        "Problem._incentives: self.margins + moved -> self.margins - moved": _CENTRAL,
        "Problem._incentives: a + moved -> a - moved": _CENTRAL,
        "Problem._margin: strict=True -> strict=False": _ONE_LENGTH,
        "Problem.incentive_sizes: strict=True -> strict=False": _ONE_LENGTH,
        "Problem.rate_by_sample: self.inner(z, w) -> self.inner(w, z)": _SYMMETRIC,
        "Problem.rate_by_sample: self.inner(z, l) -> self.inner(l, z)": _SYMMETRIC,
    },
    "theory/losses/_combine.py": {
        "SFT: nonnegative=False -> nonnegative=True": "claims are read of losses of the margin alone",
    },
    "theory/ches.py": {
        "module: 64 -> 65": "a block as good as another",
        "module: 1 << 15 -> 2 << 15": _SLOWER,
        "module: 1 << 15 -> 1 << 16": _SLOWER,
        "_Batch.of: 1 / keep.sum(axis=1) -> -(1 / keep.sum(axis=1))": "both sums change sign, their product does not",
        "_blocks: x.element_size() < 4 -> x.element_size() <= 4": _SLOWER,
        "_blocks: x.element_size() < 4 -> x.element_size() < 5": _SLOWER,
        "_blocks: :0 -> :1": _DTYPE,
        "_blocks: max(1, SERIAL // x.shape[1]) -> max(2, SERIAL // x.shape[1])": _SLOWER,
        "_blocks: SERIAL // x.shape[1] -> SERIAL * x.shape[1]": _SLOWER,
        "_blocks: last - first + 1 -> 1": _SLOWER,
        "_blocks: last - first -> last + first": _SLOWER,
        "_blocks: last - first -> -first": _SLOWER,
        "_blocks: last - first -> last": _SLOWER,
        "_blocks: last - first + 1 -> last - first + 2": _SLOWER,
        "_scores_on_device: -1 -> 1": _LAST,
        "_sums_on_device: :0 -> :1": _DTYPE,
        "_sums_on_device: -1 -> 1 #2": "the new axis of a vector",
        "_sums_on_device: -1 -> 1 #3": _LAST,
        "SequenceTerms: repr=False -> repr=True": _OWN_TEXT,
        "_errors: np.abs(logsumexp(log_pi, axis=1)).max() <= 0.001 -> np.abs(logsumexp(log_pi, axis=1)).max() < 0.001": _EDGE,
        "last_hidden_inner_product: _Batch.of(_states(hidden_preferred, 'hidden_preferred', 1)[None, None], None, 'preferred', False) -> _Batch.of(_states(hidden_preferred, 'hidden_preferred', 1)[None, None], None, 'preferred', True)": _MEAN_OF_ONE,
        "last_hidden_inner_product: _Batch.of(_states(hidden_dispreferred, 'hidden_dispreferred', 1)[None, None], None, 'dispreferred', False) -> _Batch.of(_states(hidden_dispreferred, 'hidden_dispreferred', 1)[None, None], None, 'dispreferred', True)": _MEAN_OF_ONE,
    },
    "theory/theorems/theorem_4.py": {
        "Theorem4.terms: x.WW(x.plus, x.minus) -> x.WW(x.minus, x.plus)": _SYMMETRIC,
    },
    "theory/theorems/theorem_6.py": {
        "Theorem6.terms: problem.overlap(w, l) -> problem.overlap(l, w)": _SYMMETRIC,
        "Theorem6.terms: x.WW(x.plus, x.minus) -> x.WW(x.minus, x.plus)": _SYMMETRIC,
    },
    "theory/theorems/theorem_7.py": {
        "Theorem7.terms: problem.overlap(z, l) -> problem.overlap(l, z)": _SYMMETRIC,
        "Theorem7.terms: problem.overlap(z, w) -> problem.overlap(w, z)": _SYMMETRIC,
    },
    "theory/theorems/theorem_8.py": {
        "Theorem8.terms: dot(x.h, y.h) -> dot(y.h, x.h)": _SYMMETRIC,
    },
    "theory/theorems/theorem_9.py": {
        "Theorem9.terms: dot(x.h, y.h) -> dot(y.h, x.h)": _SYMMETRIC,
    },
    "theory/theorems/shared_prefix.py": {
        "common_prefix: zip(v, w, strict=False) -> zip(w, v, strict=False)": _SYMMETRIC_PREFIX,
        "SharedPrefix.applies: common_prefix(w, l) -> common_prefix(l, w)": _SYMMETRIC_PREFIX,
        **{
            f"SharedPrefix.terms: len({y}.tokens) - 1 -> len({y}.tokens){more}": "where the claim applies, b is below both"
            for y in "wl"
            for more in ("", " + 1")
        },
    },
    "theory/losses/slic.py": {
        "SLiC.minimiser: self.delta + 0 * u_ref -> self.delta - 0 * u_ref": _ZEROS,
        "SLiC.minimiser: 0 * u_ref -> -(0 * u_ref)": _ZEROS,
    },
    "theory/losses/_base.py": {
        "MarginForm.slope: np.asarray(self.loss.closed_slope(NUMPY, y)) + np.zeros_like(y.u) -> np.asarray(self.loss.closed_slope(NUMPY, y)) - np.zeros_like(y.u)": _ZEROS,
        "MarginForm.slope: self.loss.incentives(y)[0] -> self.loss.incentives(y)[1]": "the two incentives of a margin loss are equal",
        "MarginForm.log_slope: np.asarray(self.loss.closed_log_slope(NUMPY, y)) + np.zeros_like(y.u) -> np.asarray(self.loss.closed_log_slope(NUMPY, y)) - np.zeros_like(y.u)": _ZEROS,
        "MarginForm.log_slope: ((out < -690.0) | (out == np.inf)) & np.isfinite(u) -> (out < -690.0) | (out == np.inf) | np.isfinite(u)": _SLOWER,
        "MarginForm.log_slope: out < -690.0 -> out <= -690.0": _SLOWER,
        "MarginForm.log_slope: -690.0 -> -691.0": _SLOWER,
        "MarginForm.log_slope: -690.0 -> 690.0": _SLOWER,
        "MarginForm.sign: (out == 0) & np.isfinite(self.log_slope(u)) -> (out == 0) | np.isfinite(self.log_slope(u))": _SLOWER,
        "_where: strict=True -> strict=False": "the indices of nonzero have one length",
        "slope_mpmath: max_digits=20000 -> max_digits=20001": _DIGITS,
        "slope_mpmath: (30, mpmath.mpf(0)) -> (31, mpmath.mpf(0))": _DIGITS,
        "slope_mpmath: digits <= max_digits -> digits < max_digits": _DIGITS,
        "slope_mpmath: abs(slope - before) <= abs(slope) * mpmath.mpf(10) ** (-14) -> abs(slope - before) < abs(slope) * mpmath.mpf(10) ** (-14)": _DIGITS,
        "slope_mpmath: mpmath.mpf(10) -> mpmath.mpf(11)": _DIGITS,
        "slope_mpmath: -14 -> -15": _DIGITS,
        "slope_mpmath: 3 * digits -> 4 * digits": _DIGITS,
    },
}

# Operators and what takes their place; of a comparison, the boundary and the negation.
SWAPS: dict[type, list[type]] = {
    getattr(ast, old): [getattr(ast, new) for new in news.split(",")]
    for old, news in (
        pair.split(":")
        for pair in (
            "Add:Sub Sub:Add Mult:Div Div:Mult FloorDiv:Mult Mod:Mult Pow:Mult MatMult:Mult BitAnd:BitOr BitOr:BitAnd "
            "And:Or Or:And Lt:LtE,GtE LtE:Lt,Gt Gt:GtE,LtE GtE:Gt,Lt Eq:NotEq NotEq:Eq Is:IsNot IsNot:Is In:NotIn NotIn:In"
        ).split()
    )
}
# Calls whose first two arguments may be swapped freely, or whose swap is a type error and no fault worth counting.
SWAPLESS = set("min max minimum maximum logaddexp isinstance issubclass getattr setattr __setattr__".split())
# Functions and arguments that say nothing of what is computed: texts for readers, instances and ranges for tests.
ASIDE = set("__repr__ __str__ _repr_html_ _repr_latex_ examples typical".split())
PRELOADED = (
    "numpy scipy.integrate scipy.optimize scipy.special scipy.stats sympy mpmath torch pytest hypothesis "
    "hypothesis.extra.numpy"
)


@dataclass(frozen=True)
class Mutant:
    """One fault: where it is, what changed, and the whole source with it."""

    line: int
    label: str
    source: str


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant: killed, timeout, survived, or equivalent (survived, with a known reason)."""

    file: str
    line: int
    label: str
    status: str
    why: str = ""


# ---- mutants


def replacements(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """What a node may be replaced by."""
    text = lambda x: isinstance(x, ast.Constant) and isinstance(x.value, str)  # noqa: E731
    match node:
        case ast.BinOp(left, _, right) if text(left) or text(right):
            pass
        case ast.BinOp(left, op, right):
            yield from (ast.BinOp(left, new(), right) for new in SWAPS.get(type(op), []))
            if isinstance(op, ast.Add | ast.Sub):  # drop a term
                yield left
                yield right if isinstance(op, ast.Add) else ast.UnaryOp(ast.USub(), right)
            inside = isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.Mult | ast.Div)
            if isinstance(op, ast.Mult | ast.Div) and not inside:
                yield ast.UnaryOp(ast.USub(), node)
        case ast.AugAssign(target, op, value):
            yield from (ast.AugAssign(target, new(), value) for new in SWAPS.get(type(op), []))
        case ast.UnaryOp(ast.USub() | ast.Not() | ast.Invert(), operand):
            yield operand
        case ast.BoolOp(op, values):
            yield from (ast.BoolOp(new(), values) for new in SWAPS[type(op)])
        case ast.Compare(left, ops, comparators):
            for i, op in enumerate(ops):
                yield from (ast.Compare(left, [*ops[:i], n(), *ops[i + 1 :]], comparators) for n in SWAPS[type(op)])
        case ast.Constant(bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Call(func, [ast.expr() as first, ast.expr() as second, *rest], keywords):
            fixed = any(isinstance(x, ast.Starred) or text(x) for x in (first, second))
            if ast.unparse(func).split(".")[-1] not in SWAPLESS and not fixed:
                yield ast.Call(func, [second, first, *rest], keywords)
        case ast.If(test, body, orelse) if not isinstance(test, ast.Compare | ast.UnaryOp):
            yield ast.If(ast.UnaryOp(ast.Not(), test), body, orelse)
        case ast.IfExp(test, body, orelse) if not isinstance(test, ast.Compare | ast.UnaryOp):
            yield ast.IfExp(ast.UnaryOp(ast.Not(), test), body, orelse)


def children(node: ast.AST) -> list[ast.AST]:
    """What may change below a node: no messages of errors, no formatted text, no annotations."""
    name = getattr(node, "name", None) or getattr(node, "arg", None)
    if isinstance(node, ast.Raise | ast.JoinedStr) or name in ASIDE:
        return []
    kept = [v for name, v in ast.iter_fields(node) if name not in ("annotation", "returns", "ctx")]
    return [x for value in kept for x in (value if isinstance(value, list) else [value]) if isinstance(x, ast.AST)]


def shown(node: ast.AST, child: ast.AST, new: ast.AST) -> str:
    """`before -> after` in one line. A constant says little by itself: it is shown with the expression around it."""
    if isinstance(child, ast.If) and isinstance(new, ast.If):
        return f"if {ast.unparse(child.test)} -> if {ast.unparse(new.test)}"
    if isinstance(node, ast.arguments):  # a default
        kinds = (node.posonlyargs + node.args, node.defaults), (node.kwonlyargs, node.kw_defaults)
        name = next(
            a.arg for args, values in kinds for a, v in zip(args[::-1], values[::-1], strict=False) if v is child
        )
        return f"{name}={ast.unparse(child)} -> {name}={ast.unparse(new)}"
    if isinstance(node, ast.AnnAssign):
        return f"{ast.unparse(node.target)} = {ast.unparse(child)} -> {ast.unparse(new)}"
    before = ast.unparse(node if isinstance(child, ast.Constant) and not isinstance(node, ast.stmt) else child)
    with replaced(node, child, new):
        after = ast.unparse(node if isinstance(child, ast.Constant) and not isinstance(node, ast.stmt) else new)
    return " ".join(f"{before} -> {after}".split())


@contextmanager
def replaced(node: ast.AST, child: ast.AST, new: ast.AST) -> Iterator[None]:
    """The tree with `new` in the place of `child`, for a while."""
    for old, put in ((child, new), (new, child)):
        for name, value in ast.iter_fields(node):
            if value is old:
                setattr(node, name, put)
            elif isinstance(value, list):
                value[:] = [put if x is old else x for x in value]
        if old is child:
            yield


def mutants(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of the source; equal ones once."""
    tree = ast.parse(source)
    found: dict[str, Mutant] = {}
    labels: Counter[str] = Counter()

    def visit(node: ast.AST, scope: str, line: int) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            scope = f"{scope}.{node.name}".removeprefix(".")
        for child in children(node):
            at = getattr(child, "lineno", line)
            for new in list(replacements(child, node)):
                with replaced(node, child, new):
                    changed = ast.unparse(ast.fix_missing_locations(tree))
                if changed not in found:
                    label = f"{scope or 'module'}: {shown(node, child, new)}"
                    labels[label] += 1
                    label += f" #{labels[label]}" if labels[label] > 1 else ""
                    found[changed] = Mutant(at, label, changed)
            visit(child, scope, at)

    visit(tree, "", 1)
    found.pop(ast.unparse(tree), None)
    return list(found.values())


# ---- running tests


@dataclass
class History:
    """What earlier runs of the tests taught: seconds of each, and how many mutants each has killed."""

    seconds: dict[str, float] = field(default_factory=dict)
    kills: Counter[str] = field(default_factory=Counter)


class Notes:
    """A plugin of pytest: tests that killed before run first, then the quickest; durations and the failure are noted."""

    def __init__(self, file: Path, history: History) -> None:
        self.file, self.history = file, history
        self.seconds: Counter[str] = Counter()
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        history = self.history
        items.sort(key=lambda item: (-history.kills[item.nodeid], history.seconds.get(item.nodeid, 0.0)))

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        self.failed = report.nodeid if report.failed else self.failed

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(json.dumps({"seconds": self.seconds, "failed": self.failed}))


class Worker:
    """A private copy of the tree in which a forked process tests one version of the module at a time."""

    def __init__(self, root: Path, home: Path, history: History) -> None:
        self.home, self.history, self.pid, self.deadline = home, history, 0, 0.0
        self.log, self.notes = Path(f"{home}.log"), Path(f"{home}.json")
        shutil.copytree(root, home, ignore=shutil.ignore_patterns(".*", "__pycache__", "notebooks", "*.egg-info"))

    def start(self, file: str, source: str, tests: list[str], limit: float) -> None:
        target = self.home / file
        target.write_text(source)
        for stale in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
            stale.unlink()  # two mutants of one second may have one size
        self.notes.write_text(json.dumps({"seconds": {}, "failed": ""}))
        self.deadline = time.monotonic() + limit
        self.pid = os.fork()
        if not self.pid:
            code = 70
            try:
                os.setsid()
                code = self._run(tests)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def _run(self, tests: list[str]) -> int:
        """Exit code of pytest in this copy; called in the fork."""
        import pytest
        from hypothesis import HealthCheck, Phase, settings

        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.dont_write_bytecode = bool(self.history.seconds)  # the first run compiles everything else
        settings.register_profile(
            "mutation",
            max_examples=8,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.explicit, Phase.generate],  # no shrinking
            suppress_health_check=list(HealthCheck),
        )
        os.environ["HYPOTHESIS_PROFILE"] = "mutation"
        os.chdir(self.home)
        sys.path[:] = [str(self.home), *(p for p in sys.path if p not in ("", str(ROOT), str(ROOT / "tests")))]
        options = "-x -q -p no:cacheprovider -p no:xdist -W ignore::pytest.PytestAssertRewriteWarning"  # preloaded
        return int(pytest.main([*options.split(), *tests], plugins=[Notes(self.notes, self.history)]))

    def poll(self) -> str | None:
        """None while it runs, then the outcome."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid and time.monotonic() > self.deadline:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return "timeout"
        if not pid:
            return None
        failed = json.loads(self.notes.read_text())["failed"]
        if failed:
            self.history.kills[failed] += 1
        return "killed" if os.waitstatus_to_exitcode(status) else "survived"

    def baseline(self, file: str, source: str, tests: list[str]) -> None:
        """Runs the unchanged module, which must pass."""
        self.start(file, ast.unparse(ast.parse(source)), tests, 900)
        while (outcome := self.poll()) is None:
            time.sleep(0.02)
        if outcome != "survived":
            raise RuntimeError(f"{file}: the unchanged module fails ({outcome})\n{self.log.read_text()}")


def run(root: Path, file: str, tests: list[str], chosen: list[Mutant], jobs: int = 2) -> list[Outcome]:
    """What becomes of the chosen mutants of `file`, after making sure that the unchanged module passes."""
    source = (root / file).read_text()
    known = EQUIVALENT.get(file, {})
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        history = History()
        workers = [Worker(root, Path(folder) / str(i), History()) for i in range(jobs)]
        for worker in workers:
            worker.baseline(file, source, tests)
            history.seconds = json.loads(worker.notes.read_text())["seconds"]
        for worker in workers:
            worker.history = history
        seconds = sum(history.seconds.values())
        print(f"{file}: {len(chosen)} mutants, {seconds:.1f} s of tests", flush=True)
        busy: dict[Worker, Mutant] = {}
        queue = iter(chosen)
        while True:
            for worker in [w for w in workers if w not in busy]:
                if mutant := next(queue, None):
                    worker.start(file, mutant.source, tests, 30 + 5 * seconds)
                    busy[worker] = mutant
            if not busy:
                return sorted(outcomes, key=lambda o: (o.line, o.label))
            for worker, mutant in list(busy.items()):
                if status := worker.poll():
                    del busy[worker]
                    why = known.get(mutant.label, "")
                    if why and status == "survived":
                        status = "equivalent"
                    elif why:
                        print(f"  no equivalent: {mutant.label}", flush=True)
                    if status in ("survived", "timeout"):
                        print(f"  {status} {file}:{mutant.line} {mutant.label}", flush=True)
                    outcomes.append(Outcome(file, mutant.line, mutant.label, status, why))
            time.sleep(0.02)


# ---- command line


def fast_tests(file: str) -> list[str]:
    """The fast subset of a module: that of the longest prefix in `FAST`."""
    return FAST[max((p for p in FAST if file.startswith(p)), key=len)]


def score(outcomes: list[Outcome]) -> float:
    """Per cent killed of the mutants that are not equivalent."""
    count = Counter(o.status for o in outcomes)
    counted = len(outcomes) - count["equivalent"]
    return 100 * (count["killed"] + count["timeout"]) / counted if counted else 100.0


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutation testing of modules by a fast subset of the tests.")
    parser.add_argument("files", nargs="+", help="modules or folders, relative to the root")
    parser.add_argument("--tests", nargs="+", help="files or names of tests; default: the module's fast subset")
    parser.add_argument("--sample", type=int, help="this many mutants of each module, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=Path, help="only the mutants that survived in this earlier --json")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the outcomes")
    parser.add_argument("--least", type=float, default=95.0, help="per cent to be killed")
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--preload", default=PRELOADED, help="modules imported once, before any fork")
    args = parser.parse_args()
    os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    for name in args.preload.split():
        importlib.import_module(name)
    root = args.root.resolve()
    alive = None
    if args.again:
        alive = {
            (o["file"], o["label"]) for o in json.loads(args.again.read_text())["outcomes"] if o["status"] == "survived"
        }
    outcomes: list[Outcome] = []
    for path in (root / given for given in args.files):
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            name = file.relative_to(root).as_posix()
            found = mutants(file.read_text())
            for stale in set(EQUIVALENT.get(name, {})) - {m.label for m in found}:
                print(f"  no such mutant: {name} {stale}")
            chosen = [m for m in found if alive is None or (name, m.label) in alive]
            if args.sample is not None and args.sample < len(chosen):
                chosen = random.Random(args.seed).sample(chosen, args.sample)
            outcomes += run(root, name, args.tests or fast_tests(name), chosen, args.jobs) if chosen else []
    result = {"score": score(outcomes), **Counter(o.status for o in outcomes)}
    print(", ".join(f"{key} {value:.4g}" for key, value in result.items()))
    if args.json:
        args.json.write_text(json.dumps({**result, "outcomes": [asdict(o) for o in outcomes]}, indent=1))
    return int(score(outcomes) < args.least)


if __name__ == "__main__":
    sys.exit(main())

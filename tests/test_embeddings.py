"""Real input: reading matrices, stating a start, predicting one pair, scanning many."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.special import log_softmax

from sims.embeddings import Embeddings, hidden_from_log_odds, read_embeddings
from sims.predict import START_PROBABILITY, START_RATIO, default_log_odds, predict
from sims.scan import frequent_tokens, pair_ratios, scan
from sims.token_files import MAX_PADDING, MissingFileError
from theory import ExactFlow, UnconstrainedFeatures
from theory.losses import MarginLoss
from theory.losses.ipo import IPO
from theory.losses.slic import SLiC

REAL = Path(__file__).resolve().parents[2] / "shared" / "data" / "embeddings" / "minilm_l6_v2.npz"
V, D = 9, 4
NAMES = tuple("no never yes nope nah maybe sure ok fine".split())


def matrix(seed: int = 0, shape: tuple[int, int] = (V, D)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def small(seed: int = 0, shape: tuple[int, int] = (V, D), **kwargs: Any) -> Embeddings:
    names = NAMES if shape[0] == V else tuple(f"t{i}" for i in range(shape[0]))
    return Embeddings(matrix(seed, shape), names, **kwargs)


# ---- reading


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.dtype(">f4")])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz_is_read(tmp_path: Path, dtype: Any, compressed: bool) -> None:
    W = matrix().astype(dtype)
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "e.npz", unembedding=W, tokens=np.array(NAMES), hidden=W[0])
    read = read_embeddings(tmp_path / "e.npz")
    assert read.W.dtype == (np.float64 if dtype is np.float64 else np.float32)
    np.testing.assert_array_equal(read.W, W)
    assert read.hidden is not None
    np.testing.assert_array_equal(read.hidden, W[0])
    assert read.tokens == NAMES
    assert (read.V, read.d) == (V, D)
    assert read.source == "e.npz [unembedding]"
    assert json.loads(json.dumps(read.to_dict())) == {"source": read.source, "V": V, "d": D, "has_hidden": True}


TOKEN_TEXT = {
    "tokenizer.json": json.dumps(
        {
            "model": {"vocab": {t: i for i, t in enumerate(NAMES[:-1])}},
            "added_tokens": [{"id": V - 1, "content": NAMES[-1]}],
        }
    ),
    "vocab.json": json.dumps({t: i for i, t in enumerate(NAMES)}),
    "tokens.json": json.dumps(NAMES),
    "tokens.txt": "\n".join(NAMES) + "\n",
    "vocab.txt": "\n".join(NAMES),
}


@pytest.mark.parametrize("file", TOKEN_TEXT)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_safetensors_is_read_with_tokens_beside_it(tmp_path: Path, dtype: torch.dtype, file: str) -> None:
    W = torch.from_numpy(matrix()).to(dtype)
    save_file(
        {"lm_head.weight": W, "model.embed_tokens.weight": W + 1, "hidden": W[0].clone()}, tmp_path / "m.safetensors"
    )
    (tmp_path / file).write_text(TOKEN_TEXT[file], encoding="utf-8")
    read = read_embeddings(tmp_path / "m.safetensors")
    assert read.tokens == NAMES
    assert read.source == "m.safetensors [lm_head.weight]"  # the output matrix, though the input one is there
    assert read.W.dtype == (np.float64 if dtype == torch.float64 else np.float32)
    np.testing.assert_array_equal(read.W, W.double().numpy())
    assert read.hidden is not None
    np.testing.assert_array_equal(read.hidden, read.W[0])


def test_the_matrix_is_chosen_by_name_or_as_the_only_one(tmp_path: Path) -> None:
    W = torch.from_numpy(matrix())
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    path, names = tmp_path / "m.safetensors", tmp_path / "names.txt"
    save_file({"head": W, "bias": W[0].clone()}, path)
    assert read_embeddings(path, tokens_path=names).source.endswith("[head]")
    save_file({"lm_head.weight": W, "other": 2 * W}, path)
    other = read_embeddings(path, tensor="other", tokens_path=names)
    np.testing.assert_array_equal(other.W, 2 * matrix())
    np.savez(tmp_path / "e.npz", a=matrix(), b=2 * matrix())
    assert read_embeddings(tmp_path / "e.npz", tensor="b", tokens_path=names).source == "e.npz [b]"


def test_unigram_vocabularies_and_padding_rows(tmp_path: Path) -> None:
    """A tokenizer may leave a few rows unnamed, as language models pad their matrices; a list may not."""
    rows = 60
    np.savez(tmp_path / "e.npz", unembedding=matrix(shape=(rows, D)))
    vocabulary = [[f"t{i}", -float(i)] for i in range(rows - 3)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))
    tokens = read_embeddings(tmp_path / "e.npz").tokens
    assert tokens[: rows - 3] == tuple(f"t{i}" for i in range(rows - 3))
    assert tokens[rows - 3 :] == ("<row 57>", "<row 58>", "<row 59>")
    assert MAX_PADDING >= 3
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary[:-1]}}))
    with pytest.raises(ValueError, match=r"must name the 60 rows of the matrix .* got names for 56"):
        read_embeddings(tmp_path / "e.npz")


def test_names_may_hold_line_separators_of_unicode(tmp_path: Path) -> None:
    names = ["a\u2028", "b\x85", *NAMES[2:]]
    np.savez(tmp_path / "e.npz", unembedding=matrix())
    (tmp_path / "vocab.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
    assert read_embeddings(tmp_path / "e.npz").tokens == tuple(names)


# ---- files that cannot be read


def npz(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "e.npz", **arrays)
    return folder / "e.npz"


def good(**changes: Any) -> dict[str, Any]:
    arrays = {"unembedding": matrix(), "tokens": np.array(NAMES), **changes}
    return {k: v for k, v in arrays.items() if v is not None}


def tensors(folder: Path, names: str | None = "\n".join(NAMES), **arrays: Any) -> Path:
    save_file(
        {k.replace("__", "."): torch.from_numpy(np.asarray(v)) for k, v in arrays.items()}, folder / "m.safetensors"
    )
    if names is not None:
        (folder / "tokens.txt").write_text(names)
    return folder / "m.safetensors"


def written(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def cut(path: Path, keep: float) -> Path:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def spoiled(folder: Path) -> Path:
    """An archive whose directory is whole but whose compressed data is not."""
    np.savez_compressed(folder / "e.npz", **good())
    content = bytearray((folder / "e.npz").read_bytes())
    content[120:160] = bytes(40)
    return written(folder, "e.npz", bytes(content))


def npy(folder: Path) -> Path:
    np.save(folder / "e.npy", matrix())
    return (folder / "e.npy").rename(folder / "e.npz")


def with_nan(at: tuple[int, int], value: float = np.nan) -> np.ndarray:
    W = matrix()
    W[at] = value
    return W


def vocab(folder: Path, name: str, content: Any) -> Path:
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return npz(folder, unembedding=matrix())


@dataclass(frozen=True)
class Bad:
    """A file that must be refused, the options it is read with, and what the message must say."""

    name: str
    make: Callable[[Path], Path]
    says: tuple[str, ...]
    options: Callable[[Path], dict[str, Any]] = lambda folder: {}


BAD = [
    Bad("missing", lambda f: f / "none.npz", ("path: there is no file", "none.npz")),
    Bad("folder", lambda f: f, ("path must be a file, got the folder",)),
    Bad("suffix", lambda f: written(f, "e.pt", b"x"), ("must be a .npz or .safetensors file", "e.pt")),
    Bad(
        "npz truncated", lambda f: cut(npz(f, **good()), 0.6), ("e.npz cannot be read as an .npz archive", "truncated")
    ),
    Bad("npz almost empty", lambda f: written(f, "e.npz", b"PK"), ("cannot be read as an .npz archive",)),
    Bad("npz empty", lambda f: written(f, "e.npz", b""), ("cannot be read as an .npz archive",)),
    Bad("npz is text", lambda f: written(f, "e.npz", b"no,never\n1,2\n"), ("cannot be read as an .npz", "format")),
    Bad("npz is npy", npy, ("must be an .npz archive", "single .npy array of shape (9, 4)")),
    Bad("npz spoiled", spoiled, ("array 'unembedding' cannot be read",)),
    Bad(
        "npz objects",
        lambda f: npz(f, **good(tokens=np.array(NAMES, object))),
        ("array 'tokens' cannot be", "Python obj"),
    ),
    Bad(
        "npz without matrix",
        lambda f: npz(f, **good(unembedding=None, bias=np.zeros(3))),
        ("no array with a known name", "no array with two dimensions", "float64[3]", "tokens <U5[9]"),
    ),
    Bad(
        "npz two matrices",
        lambda f: npz(f, a=matrix(), b=matrix()),
        ("2 arrays with two dimensions", "tensor=", "b fl"),
    ),
    Bad("npz nothing", npz, ("holds nothing",)),
    Bad(
        "no such tensor",
        lambda f: npz(f, **good()),
        ("tensor:", "no array 'x'", "unembedding float"),
        lambda f: {"tensor": "x"},
    ),
    Bad("integers", lambda f: npz(f, **good(unembedding=np.ones((V, D), int))), ("e.npz: unembedding", "dtype int64")),
    Bad(
        "complex", lambda f: npz(f, **good(unembedding=matrix() + 0j)), ("unembedding must hold float16", "complex128")
    ),
    Bad("strings", lambda f: npz(f, **good(unembedding=np.array([["a"]]))), ("unembedding must hold", "<U1")),
    Bad(
        "one dimension",
        lambda f: npz(f, **good(unembedding=np.ones(V))),
        ("unembedding must have shape (any, any)", "(9,)"),
    ),
    Bad("no rows", lambda f: npz(f, **good(unembedding=np.ones((0, D)))), ("must have shape", "(0, 4)")),
    Bad(
        "NaN",
        lambda f: npz(f, **good(unembedding=with_nan((2, 3)))),
        ("e.npz: unembedding must be finite", "nan at (2, 3)"),
    ),
    Bad("inf", lambda f: npz(f, **good(unembedding=with_nan((0, 1), np.inf))), ("must be finite", "inf at (0, 1)")),
    Bad(
        "hidden shape", lambda f: npz(f, **good(hidden=np.ones(D + 1))), ("e.npz: hidden must have shape (4,)", "(5,)")
    ),
    Bad("hidden NaN", lambda f: npz(f, **good(hidden=np.full(D, np.nan))), ("hidden must be finite",)),
    Bad("hidden dtype", lambda f: npz(f, **good(hidden=np.ones(D, int))), ("hidden must hold", "int64")),
    Bad(
        "token count",
        lambda f: npz(f, **good(tokens=np.array(NAMES[:5]))),
        ("tokens must name all 9 rows", "got 5 names"),
    ),
    Bad("token dtype", lambda f: npz(f, **good(tokens=np.arange(V))), ("e.npz: tokens must hold strings", "int64")),
    Bad("token shape", lambda f: npz(f, **good(tokens=np.array([NAMES]))), ("tokens must have shape (V,)", "(1, 9)")),
    Bad(
        "no tokens",
        lambda f: npz(f, unembedding=matrix()),
        ("tokens_path was not given", "tokenizer.json", "beside it"),
    ),
    Bad(
        "tokens_path missing",
        lambda f: npz(f, **good()),
        ("tokens_path: there is no file", "gone.txt"),
        lambda f: {"tokens_path": f / "gone.txt"},
    ),
    Bad(
        "vocab truncated", lambda f: vocab(f, "vocab.json", '{"no": 0, "nev'), ("vocab.json cannot be read as tokens",)
    ),
    Bad("vocab outside", lambda f: vocab(f, "vocab.json", {"no": 99}), ("rows in [0, 9)", "row 99 for 'no'")),
    Bad("vocab too small", lambda f: vocab(f, "vocab.json", {"no": 0}), ("must name the 9 rows", "got names for 1")),
    Bad("vocab not rows", lambda f: vocab(f, "vocab.json", {"no": "x"}), ("must map names to row numbers",)),
    Bad(
        "tokenizer",
        lambda f: vocab(f, "tokenizer.json", {"model": {"type": "BPE"}}),
        ("tokenizer.json with model.vocab",),
    ),
    Bad("tokens.json numbers", lambda f: vocab(f, "tokens.json", [1, 2]), ("must hold a list of strings",)),
    Bad("tokens.txt count", lambda f: vocab(f, "tokens.txt", "no\nnever\n"), ("must name all 9 rows", "got 2 names")),
    Bad(
        "tokens.txt binary",
        lambda f: written(f, "tokens.txt", b"\xff\xfe\x00") and npz(f, unembedding=matrix()),
        ("tokens.txt cannot be read as tokens",),
    ),
    Bad(
        "safetensors truncated",
        lambda f: cut(tensors(f, a=matrix()), 0.7),
        ("m.safetensors cannot be read", "truncated"),
    ),
    Bad(
        "safetensors is text", lambda f: written(f, "m.safetensors", b"hello there, not a tensor"), ("cannot be read",)
    ),
    Bad("safetensors empty", lambda f: written(f, "m.safetensors", b""), ("m.safetensors cannot be read",)),
    Bad("safetensors integers", lambda f: tensors(f, a=np.ones((V, D), int)), ("m.safetensors: a must hold", "int64")),
    Bad(
        "safetensors two", lambda f: tensors(f, a=matrix(), b=matrix()), ("2 arrays with two dimensions", "a F64[9, 4]")
    ),
    Bad("safetensors NaN", lambda f: tensors(f, lm_head__weight=with_nan((1, 1))), ("lm_head.weight must be finite",)),
    Bad("safetensors tokens", lambda f: tensors(f, names=None, a=matrix()), ("tokens_path was not given",)),
    Bad("safetensors hidden", lambda f: tensors(f, a=matrix(), hidden=np.ones(2)), ("hidden must have shape (4,)",)),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.name)
def test_bad_files_are_refused_in_words(tmp_path: Path, case: Bad) -> None:
    path = case.make(tmp_path)
    with pytest.raises(ValueError, match=re.escape(case.says[0])) as caught:
        read_embeddings(path, **case.options(tmp_path))
    for words in case.says:
        assert words in str(caught.value)


def test_a_missing_file_is_also_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        read_embeddings(tmp_path / "none.npz")
    assert isinstance(caught.value, MissingFileError)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    """An archive can hold objects whose loading runs code; the flag that would allow it is never set."""
    ran = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    path = npz(tmp_path, **good(extra=np.array([Trap()], dtype=object)))
    with pytest.raises(ValueError, match="array 'extra' cannot be read"):
        read_embeddings(path)
    assert not ran.exists()
    np.load(path, allow_pickle=True)["extra"]
    assert ran.exists()  # the trap works where pickles are allowed


def test_safetensors_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tensors(tmp_path, a=matrix())
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'likelihood-displacement[safetensors]'")):
        read_embeddings(path)


def test_tokens_are_found_by_name_or_row() -> None:
    e = small()
    assert e.index("yes") == e.index(2) == e.index(np.int64(2)) == 2  # pyright: ignore[reportArgumentType]
    marked = Embeddings(matrix(), ("\u0120no", "\u2581yes", "a", "a", *NAMES[4:]))
    cases: list[tuple[Embeddings, Any, str]] = [
        (e, "nevr", "which: unknown token 'nevr'; did you mean 'never'"),
        (e, "No", "did you mean 'no'?"),
        (marked, "no", "did you mean '\u0120no'?"),
        (marked, " yes", "did you mean '\u2581yes'?"),
        (marked, "a", "'a' names 2 rows, [2, 3]; give a row number"),
        (e, 9, "which must be a row number in [0, 9), got 9"),
        (e, -1, "which must be a row number in [0, 9), got -1"),
        (e, 1.5, "which must be a token name or row number, got 1.5"),
        (e, True, "which must be a token name or row number, got True"),
    ]
    for embeddings, token, message in cases:
        with pytest.raises(ValueError, match=re.escape(message)):
            embeddings.index(token, "which")


def test_embeddings_check_themselves() -> None:
    with pytest.raises(ValueError, match="tokens must name all 9 rows of W, got 2"):
        Embeddings(matrix(), ("a", "b"))
    with pytest.raises(ValueError, match="W must have at least 2 rows"):
        Embeddings(np.ones((1, 3)), ("a",))
    with pytest.raises(ValueError, match="hidden must have shape"):
        Embeddings(matrix(), NAMES, hidden=np.ones(D + 1))


# ---- a stated start


@pytest.mark.parametrize("rows", [[0], [0, 1], [3, 1, 8], [0, 2, 4, 6]])
def test_hidden_has_the_log_odds_and_is_the_shortest(rows: list[int]) -> None:
    W, rng = matrix(), np.random.default_rng(1)
    values = rng.standard_normal(len(rows))
    h = hidden_from_log_odds(W, dict(zip(rows, values, strict=True)))
    logits = W @ h
    np.testing.assert_allclose(logits[rows] - logits.mean(), values, rtol=0, atol=1e-13)
    # Shortest: whatever keeps the stated log-odds is orthogonal to it, and so only adds length.
    C = W[rows] - W.mean(axis=0)
    free = rng.standard_normal(D)
    free -= np.linalg.pinv(C) @ (C @ free)
    np.testing.assert_allclose(C @ free, 0, atol=1e-13)
    np.testing.assert_allclose(free @ h, 0, atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
def test_hidden_does_not_see_a_common_shift_of_rows(seed: int) -> None:
    """W + 1 v^T has the same probabilities, so a stated start must mean the same on it."""
    W, v = matrix(seed), 10 * np.random.default_rng(100 + seed).standard_normal(D)
    stated = {0: 2.0, 5: -1.0}
    h = hidden_from_log_odds(W, stated)
    np.testing.assert_allclose(hidden_from_log_odds(W + v, stated), h, rtol=1e-12)
    np.testing.assert_allclose(log_softmax((W + v) @ h), log_softmax(W @ h), rtol=1e-12)
    uncentred = np.linalg.pinv(W[[0, 5]]) @ [2.0, -1.0]
    assert np.abs(np.linalg.pinv((W + v)[[0, 5]]) @ [2.0, -1.0] - uncentred).max() > 1e-2  # what the centring is for


def test_dependent_rows_are_named() -> None:
    W = matrix()
    W[4] = W[1]
    with pytest.raises(ValueError, match=r"linearly independent; those of 1, 4 are not"):
        hidden_from_log_odds(W, {0: 1.0, 1: 2.0, 4: 2.0})
    with pytest.raises(ValueError, match=r"those of 'never', 'nah' are not"):
        hidden_from_log_odds(W, {0: 1.0, 1: 2.0, 4: 2.0}, NAMES)
    with pytest.raises(ValueError, match=r"those of 0, 1, 2, 3, 5 are not"):  # more tokens than dimensions
        hidden_from_log_odds(matrix(), {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 5: 1.0})
    with pytest.raises(ValueError, match="those of 0 are not"):  # a row equal to the mean of all
        hidden_from_log_odds(np.array([[0.0, 0.0], [1.0, 2.0], [-1.0, -2.0]]), {0: 1.0})


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({}, "log_odds must name at least one token"),
        ({9: 1.0}, "log_odds must name rows in [0, 9), got 9"),
        ({-1: 1.0}, "got -1"),
        ({"no": 1.0}, "got 'no'"),
        ({0: np.nan}, "log_odds[0] must be in"),
        ({0: np.inf}, "log_odds[0] must be in"),
        ({0: "1"}, "log_odds[0] must be a real number"),
    ],
)
def test_bad_log_odds_are_refused(stated: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        hidden_from_log_odds(matrix(), stated)


@pytest.mark.parametrize("seed", range(20))
def test_default_start(seed: int) -> None:
    """pi(y-) is a tenth of pi(y+), which is 0.7, or less only where no point of the line of starts has more."""
    W = matrix(seed, (40, 12))
    stated = default_log_odds(W, 3, 7)
    p = np.exp(log_softmax(W @ hidden_from_log_odds(W, stated)))
    np.testing.assert_allclose(p[7], START_RATIO * p[3], rtol=1e-9)
    step = stated[3] + np.linspace(-50, 50, 2001)
    along = [np.exp(log_softmax(W @ hidden_from_log_odds(W, {3: v, 7: v + np.log(START_RATIO)})))[3] for v in step]
    assert p[3] <= START_PROBABILITY * (1 + 1e-8)
    assert p[3] == pytest.approx(START_PROBABILITY, rel=1e-8) or max(along) <= p[3] * (1 + 1e-6)


def test_default_start_meets_both_cases() -> None:
    reached = []
    for seed in range(20):
        W = matrix(seed, (40, 12))
        reached.append(np.exp(log_softmax(W @ hidden_from_log_odds(W, default_log_odds(W, 3, 7))))[3])
    assert any(abs(p - START_PROBABILITY) < 1e-8 for p in reached)
    assert any(p < START_PROBABILITY - 1e-3 for p in reached)


def test_no_default_start_for_dependent_rows() -> None:
    W = matrix()
    W[1] = W[0]
    with pytest.raises(
        ValueError, match=r"no default start, give start or hidden: .*linearly independent; those of 0, 1"
    ):
        default_log_odds(W, 0, 1)


# ---- one pair


def displaceable(**kwargs: Any) -> Embeddings:
    """no/never with `yes` beyond `no` in the direction of their difference: r_max = 1.5 for y+ = no."""
    W = np.array([[1.0, 0.5, 0.3], [-1.0, 0.5, 0.3], [1.5, 0.3, -0.2], [0.2, -1.0, 0.0], [-1.7, -0.3, -0.4]])
    return Embeddings(W, ("no", "never", "yes", "ok", "fine"), **kwargs)


@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.5, 40.0)])
def test_predict_reports_what_the_exact_flow_says(rates: tuple[float, float]) -> None:
    e, h = small(3), np.random.default_rng(5).standard_normal(D)
    loss = IPO(tau=0.3)
    seen = predict(e, "no", 2, hidden=h, loss=loss, lr_unembedding=rates[0], lr_hidden=rates[1], top=4)
    model = UnconstrainedFeatures.single_token(e.W, h, 0, 2, tokens=NAMES)
    flow = ExactFlow(model, loss, *rates)
    assert seen.displacement == flow.displacement(4)
    assert seen.r_max == flow.r_max
    np.testing.assert_array_equal(seen.flow.log_probs([0.0, 1.0, 9.0]), flow.log_probs([0.0, 1.0, 9.0]))
    assert (seen.preferred, seen.dispreferred, seen.loss) == ("no", "yes", repr(loss))
    assert (seen.lr_unembedding, seen.lr_hidden, seen.log_odds) == (*rates, ())
    assert "the hidden vector given" in seen.start
    # The tables, from W and h alone.
    a, p = e.W[0] - e.W[2], np.exp(log_softmax(e.W @ h))
    r = (2 * e.W - e.W[0] - e.W[2]) @ a / (a @ a)
    assert [t.token for t in seen.aligned_tokens] == np.argsort(-e.W @ a)[:4].tolist()
    assert seen.preferred_rank == np.argsort(-e.W @ a).tolist().index(0) + 1
    for t in (*seen.start_tokens, *seen.aligned_tokens):
        np.testing.assert_allclose(
            (t.start, t.alignment, t.ratio), (p[t.token], e.W[t.token] @ a, r[t.token]), rtol=1e-12, atol=1e-14
        )
        assert t.name == NAMES[t.token]
    assert [t.token for t in seen.start_tokens] == sorted({0, 2, *np.argsort(-p)[:4].tolist()}, key=lambda z: -p[z])
    assert {t.token: t.role for t in seen.start_tokens if t.role} == {0: "y+", 2: "y-"}
    others = np.delete(np.arange(V), [0, 2])
    assert seen.r_max_token == NAMES[others[r[others].argmax()]]
    np.testing.assert_allclose(seen.r_max, r[others].max(), rtol=1e-12)


def test_predict_finds_its_start() -> None:
    """hidden= first, then start=, then the file's own vector, then the default; never two at once."""
    h = np.array([1.0, 0.2, -0.4])
    with_hidden = displaceable(hidden=h)
    from_file = predict(with_hidden, "no", "never")
    assert "in the file" in from_file.start
    np.testing.assert_array_equal(from_file.flow.model.h, h)
    given = predict(with_hidden, "no", "never", hidden=-h)
    np.testing.assert_array_equal(given.flow.model.h, -h)
    stated = predict(with_hidden, "no", "never", start={"no": 1.0, 2: 0.5})
    assert stated.log_odds == (("no", 1.0), ("yes", 0.5))
    np.testing.assert_allclose(stated.flow.model.h, hidden_from_log_odds(with_hidden.W, {0: 1.0, 2: 0.5}))
    assert {t.name: t.role for t in stated.start_tokens if t.role} == {"no": "y+", "never": "y-", "yes": "start"}
    default = predict(displaceable(), "no", "never")
    assert "assumed" in default.start
    p = np.exp(default.flow.log_probs([0.0])[0])
    assert f"reached: pi(y+) = {p[0]:.3g}, pi(y-) = {p[1]:.3g}" in default.start
    np.testing.assert_allclose(default.hidden_norm, np.linalg.norm(default.flow.model.h))
    assert dict(default.log_odds).keys() == {"no", "never"}


@dataclass(frozen=True)
class Upwards(MarginLoss):
    """l = u: it pushes the margin down, as a loss does beyond its minimiser."""

    name = "upwards"
    reference = "none"

    def formula(self, ops: Any, y: Any) -> Any:
        return y.m


H = np.array([1.0, 0.2, -0.4])


def aligned() -> Embeddings:
    """The same tokens without one beyond `no`: r_max <= 1, as for most real pairs."""
    W = np.array([[1.0, 0.5, 0.3], [-1.0, 0.5, 0.3], [0.6, 0.3, -0.2], [0.2, -1.0, 0.0], [-1.7, -0.3, -0.4]])
    return Embeddings(W, ("no", "never", "yes", "ok", "fine"))


def test_words_on_a_pair_that_cannot_displace() -> None:
    plain = "this pair cannot displace at the start of training: no hidden vector and no ratio of rates"
    seen = predict(aligned(), "no", "never", hidden=H)
    assert seen.r_max <= 1
    assert f"{plain} makes the probability of 'no' fall" in seen.at_start
    assert "The highest other token is 'yes' with r = 0.6, and it would take more than 1." in seen.at_start
    assert "This speaks of the start only" in seen.at_start
    assert "never below its start" in seen.in_training
    frozen = predict(aligned(), "no", "never", hidden=H, lr_unembedding=0.0)
    assert "As W is frozen, this holds throughout training." in frozen.at_start
    assert frozen.displacement.status == "none"
    kernel = predict(aligned(), "no", "never", hidden=H, lr_hidden=2 * np.eye(3))
    assert f"{plain} (with this feature kernel) makes" in kernel.at_start
    assert "eta_h = a feature kernel" in str(kernel)
    json.dumps(kernel.to_dict())


def test_words_on_a_pair_that_can_displace() -> None:
    for kappa, words in (
        (1e4, "it falls at first: kappa = 1e+04 is above kappa* = 8.307"),
        (1.0, "does not fall at first"),
    ):
        seen = predict(displaceable(), "no", "never", hidden=H, lr_hidden=kappa)
        assert "this pair can displace at the start of training" in seen.at_start
        assert "'yes' with r = 1.5, above 1" in seen.at_start
        assert words in seen.at_start
        assert (seen.displacement.initial_rate < 0) is (kappa > seen.displacement.kappa_star)
    sure = predict(displaceable(), "no", "never", hidden=[0.1, 3.0, 3.0])
    assert np.isinf(sure.displacement.kappa_star)
    assert "no ratio of rates makes it fall at first" in sure.at_start
    assert "kappa*, falls above it   none" in str(sure)


def test_words_on_the_whole_course() -> None:
    """Every status of the record has its sentence, and the sentence its numbers."""
    transient = predict(displaceable(), "no", "never", hidden=H, lr_hidden=1e4)
    back = transient.displacement.last_return
    assert back is not None
    low = np.exp(transient.displacement.trough.log_prob)
    assert f"falls from 0.284 to {low:.3g} (by" in transient.in_training
    assert f"is back at its start at ln t = {back.log_time:.3g}" in transient.in_training
    assert transient.in_training.endswith("ends at 1.")
    to_zero = predict(displaceable(), "no", "never", hidden=H, lr_unembedding=0.0)
    assert to_zero.displacement.status == "permanent"
    assert "falls from 0.284, lower and lower, and ends at 0." in to_zero.in_training
    # A stop on the way back up: below the start for good, but above the trough.
    stop = IPO(tau=0.5 / (transient.displacement.trough.margin + 3 - transient.displacement.start.margin))
    stopped = predict(displaceable(), "no", "never", hidden=H, lr_hidden=1e4, loss=stop)
    assert stopped.displacement.status == "permanent"
    assert "and stays below: it ends at" in stopped.in_training
    still = predict(displaceable(), "no", "never", hidden=H, loss=SLiC(delta=0.1))
    assert still.displacement.status == "stationary"
    assert "nothing moves" in still.at_start
    assert "stays at 0.284" in still.in_training


@dataclass(frozen=True)
class Downwards(MarginLoss):
    """l = u: it pushes the margin down, as any loss does beyond its minimiser."""

    name = "downwards"
    reference = "none"

    def formula(self, ops: Any, y: Any) -> Any:
        return 1.0 * y.m


def test_words_where_the_loss_lowers_the_margin() -> None:
    """r_max <= 1 promises nothing then, and the words must not either."""
    seen = predict(aligned(), "no", "never", hidden=H, loss=Downwards())
    assert seen.r_max <= 1
    assert seen.displacement.initial_rate < 0
    assert "this loss lowers the margin at this start" in seen.at_start
    assert "The probability of 'no' falls at first." in seen.at_start
    assert "cannot" not in seen.at_start


def test_words_on_pairs_without_an_r() -> None:
    e = aligned()
    same = Embeddings(np.vstack([e.W[:1], e.W[:1], e.W[2:]]), e.tokens)
    seen = predict(same, "no", "never", hidden=H)
    assert seen.r_max == -np.inf
    assert seen.r_max_token is None
    assert "cannot displace at the start of training: y+ and y- have the same row of W" in seen.at_start
    assert all(t.ratio == -np.inf for t in seen.aligned_tokens)
    two = predict(Embeddings(e.W[:2], ("no", "never")), "no", "never", hidden=H)
    assert "there is no other token" in two.at_start
    for record in (seen, two):
        assert "nan" not in str(record)


@pytest.mark.parametrize("seed", range(30))
def test_r_max_decides_the_start_for_every_hidden_vector_and_ratio(seed: int) -> None:
    """The plain-language statement as a property: r_max <= 1 never falls at the start, r_max > 1 does somewhere."""
    rng = np.random.default_rng(seed)
    e = small(seed, (6, 3))
    a = e.W[0] - e.W[1]
    hiddens = [scale * rng.standard_normal(3) for scale in (0.01, 1.0, 30.0)] + [c * a for c in (0.0, 1.0, 1e3)]
    rates = [
        predict(e, 0, 1, hidden=h, lr_hidden=kappa).displacement.initial_rate
        for h in hiddens
        for kappa in (1e-6, 1.0, 1e10)
    ]
    r_max = predict(e, 0, 1, hidden=a).r_max
    assert (min(rates) < 0) is (r_max > 1)


def test_r_max_speaks_of_the_start_only() -> None:
    """A pair with r_max <= 1 whose y+ falls later: why the words say "at the start"."""
    rng = np.random.default_rng(9424)
    W, h = rng.standard_normal((5, 3)), rng.standard_normal(3) * rng.choice([0.1, 0.3, 1])
    seen = predict(Embeddings(W, tuple("abcde")), "a", "b", hidden=h, lr_hidden=10 ** rng.uniform(0, 4))
    assert seen.r_max < 1
    assert seen.displacement.initial_rate > 0
    assert seen.displacement.status == "transient"
    assert seen.displacement.depth < -1
    assert "cannot displace at the start" in seen.at_start
    assert "falls from" in seen.in_training


def test_a_prediction_prints_and_saves() -> None:
    seen = predict(displaceable(), "no", "never", hidden=H, lr_hidden=50, top=3)
    saved = json.loads(json.dumps(seen.to_dict()))
    assert "flow" not in saved
    assert saved["displacement"]["status"] == seen.displacement.status
    assert saved["aligned_tokens"][0]["name"] == "yes"
    text = str(seen)
    for part in (
        "Preferred y+ = 'no'",
        "DPO(beta=0.1)",
        "eta_h = 50",
        "Most probable tokens",
        "Who gains",
        seen.r_max_token,
    ):
        assert str(part) in text
    assert max(map(len, text.splitlines())) <= 120
    assert (
        seen._repr_html_() == "<pre>" + text.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#x27;") + "</pre>"
    )


def test_strange_names_stay_on_their_line() -> None:
    e = Embeddings(displaceable().W, ("a\nb", " c", "", "\t", "d"))
    seen = predict(e, 0, 1, hidden=H)
    for name in (r"'a\nb'", "' c'", "''", r"'\t'"):
        assert name in str(seen)
    lines = str(seen).splitlines()
    assert sum(line.startswith("  'a") for line in lines) == 2  # once in each table, unbroken


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preferred": "nope!"}, "preferred: unknown token 'nope!'; did you mean 'nope'"),
        ({"dispreferred": 9}, "dispreferred must be a row number in [0, 9), got 9"),
        ({"dispreferred": "no"}, "preferred and dispreferred must differ, both are 'no'"),
        ({"hidden": np.ones(3)}, "hidden must have shape (4,), got (3,)"),
        ({"hidden": np.full(D, np.nan)}, "hidden must be finite"),
        ({"hidden": np.ones(D), "start": {"no": 1.0}}, "give hidden or start, not both"),
        ({"start": {}}, "start must map at least one token"),
        ({"start": [1.0]}, "start must map at least one token"),
        ({"start": {"nevr": 1.0}}, "start: unknown token 'nevr'; did you mean 'never'"),
        ({"start": {"no": 1.0, 0: 2.0}}, "start must name every token once"),
        ({"start": {"no": np.nan}}, "log_odds['no'] must be in"),
        ({"loss": "dpo"}, "loss must be a theory.losses.Loss instance, got 'dpo'"),
        ({"lr_hidden": -1.0}, "lr_hidden must be in [0, inf), got -1.0"),
        ({"lr_unembedding": np.nan}, "lr_unembedding must be in [0, inf), got nan"),
        ({"top": 0}, "top must be an integer >= 1, got 0"),
        ({"embeddings": matrix()}, "embeddings must be an Embeddings record (read_embeddings), got ndarray"),
    ],
)
def test_bad_questions_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        predict(**{"embeddings": small(), "preferred": "no", "dispreferred": "never", **arguments})


# ---- all pairs


def brute_force(W: np.ndarray, plus: int, minus: int) -> tuple[float, int]:
    """r_max and its token by the definition, one token at a time."""
    a, best = W[plus] - W[minus], (-np.inf, -1)
    for z in range(len(W)):
        if z not in (plus, minus):
            best = max(best, (float((2 * W[z] - W[plus] - W[minus]) @ a / (a @ a)), z))
    return best


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", [1, 1 << 22])
def test_scan_agrees_with_a_plain_loop(seed: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sims.scan.BLOCK_BYTES", block)  # one pair and one row at a time, or all at once
    e = small(seed, (25, 6))
    rows = [3, 0, 24, 11, 7, 19]
    seen = scan(e, rows, top=7, progress=False)
    expected = {(i, j): brute_force(e.W, i, j) for i in rows for j in rows if i != j}
    for (i, j), (r, z) in expected.items():
        at = rows.index(i), rows.index(j)
        np.testing.assert_allclose(seen.ratios[at], r, rtol=1e-12)
        assert seen.winners[at] == z
    order = sorted(expected, key=lambda pair: -expected[pair][0])[:7]
    assert [(p.preferred_index, p.dispreferred_index) for p in seen.pairs] == order
    assert [(p.r_max, p.winner_index) for p in seen.pairs] == [
        (pytest.approx(expected[pair][0], rel=1e-12), expected[pair][1]) for pair in order
    ]
    values = np.array([r for r, _ in expected.values()])
    assert 0 < seen.share_above_one < 1
    assert seen.share_above_one == pytest.approx((values > 1).mean())
    assert seen.median == pytest.approx(np.median(values))
    assert seen.n_pairs == 30


def test_scan_and_predict_agree() -> None:
    e = small(2, (30, 5))
    for pair in scan(e, range(8), top=56, progress=False).pairs:
        one = predict(e, pair.preferred_index, pair.dispreferred, hidden=np.ones(5))
        assert one.r_max == pytest.approx(pair.r_max, rel=1e-12)
        assert one.r_max_token == pair.winner


def test_scan_does_not_see_a_common_shift_of_rows() -> None:
    W = matrix(1, (20, 5))
    plain, shifted = (pair_ratios(w, range(20))[0] for w in (W, W + 3.0))
    off = ~np.eye(20, dtype=bool)
    np.testing.assert_allclose(shifted[off], plain[off], rtol=1e-10)


def test_similar_rows_keep_their_digits() -> None:
    """float32 rows that differ in the last digits: the products must not be subtracted in float32."""
    W = matrix(1, (20, 5)).astype(np.float32)
    W[1] = W[0] + np.float32(1e-4)
    expected, z = brute_force(W.astype(np.float64), 0, 1)
    ratios, winners = pair_ratios(W, [0, 1])
    assert ratios[0, 1] == pytest.approx(expected, rel=1e-9)
    assert winners[0, 1] == z


def test_equal_rows_are_no_pair() -> None:
    W = matrix()
    W[1] = W[0]
    seen = scan(Embeddings(W, NAMES), ["no", "never", "yes"], progress=False)
    assert seen.ratios[0, 1] == seen.ratios[1, 0] == -np.inf
    assert seen.winners[0, 1] == -1
    assert len(seen.pairs) == 4
    assert "nan" not in str(seen)


def test_scan_prints_and_saves() -> None:
    e = displaceable()
    seen = scan(e, ["no", "never", "ok"], top=2, progress=False)
    saved = json.loads(json.dumps(seen.to_dict()))
    assert saved["pairs"][0]["winner"] == seen.pairs[0].winner
    assert saved["tokens"] == ["no", "never", "ok"]
    assert "ratios" not in saved
    text = str(seen)
    assert text.startswith("6 ordered pairs of 3 tokens on memory, 5 tokens x 3.")
    assert f"{100 * seen.share_above_one:.3g} % of them can displace at the start of training (r_max > 1)" in text
    assert len(text.splitlines()) == 5 + 2
    assert seen._repr_html_().startswith("<pre>6 ordered")


def test_scan_shows_its_progress(capsys: pytest.CaptureFixture[str]) -> None:
    scan(small(), range(5), progress=False)
    assert capsys.readouterr().err == ""
    scan(small(), range(5))
    assert "pairs" in capsys.readouterr().err


def test_frequent_tokens() -> None:
    wordpiece = ["[PAD]", "[unused1]", "<s>", "##ing", "a", "1999", "the", ".", "caf\u00e9", "don't", "of", "no"]
    assert [wordpiece[i] for i in frequent_tokens(wordpiece, 3)] == ["the", "caf\u00e9", "of"]
    assert [wordpiece[i] for i in frequent_tokens(wordpiece, 99)] == ["the", "caf\u00e9", "of", "no"]
    # Byte-level and SentencePiece vocabularies: only marked tokens begin a word.
    for mark in ("\u0120", "\u2581"):
        marked = ["<s>", "ing", mark + "the", mark, mark + "a", "he", mark + "of", mark + "\u00c3i", mark + "12"]
        assert [marked[i] for i in frequent_tokens(marked, 9)] == [mark + "the", mark + "of"]
    assert [p.preferred for p in scan(small(), candidates=2, progress=False).pairs] != []
    assert scan(small(), candidates=3, progress=False).tokens == NAMES[:3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": "no"}, "tokens must be a sequence of names or rows, got the text 'no'"),
        ({"tokens": ["no"]}, "tokens must hold at least 2 tokens to pair up, got 1"),
        ({"tokens": ["no", "nevr"]}, "tokens[1]: unknown token 'nevr'"),
        ({"tokens": ["no", "yes", 0]}, "tokens must be distinct, 'no' is given twice"),
        ({"top": 0}, "top must be an integer >= 1, got 0"),
        ({"candidates": 1}, "candidates must be an integer >= 2, got 1"),
        ({"embeddings": 3}, "embeddings must be an Embeddings record (read_embeddings), got int"),
        ({"embeddings": Embeddings(np.eye(2), ("ab", "cd"))}, "embeddings must have at least 3 tokens"),
        ({"embeddings": Embeddings(np.eye(3), ("a", "b", "cd"))}, "tokens must be given: memory holds 1 whole word(s)"),
    ],
)
def test_bad_scans_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        scan(**{"embeddings": small(), "progress": False, **arguments})


# ---- a matrix learned from text


@pytest.fixture(scope="module")
def real() -> Embeddings:
    if not REAL.is_file():
        pytest.skip("needs the real embedding matrix beside the repository: shared/data/embeddings/minilm_l6_v2.npz")
    return read_embeddings(REAL)


def test_no_never_cannot_displace_on_the_real_matrix(real: Embeddings) -> None:
    """`yes` leans towards no - never, and still r_max is 0.69: the tool must say that this pair cannot displace."""
    assert (real.V, real.d) == (30522, 384)
    seen = predict(real, "no", "never")
    assert round(seen.r_max, 2) == 0.69
    assert "cannot displace at the start of training" in str(seen).replace("\n  ", " ")
    assert seen.preferred_rank == 1
    assert "yes" in {t.name for t in seen.aligned_tokens}
    roles = {t.role: t.start for t in seen.start_tokens}
    assert roles["y+"] == pytest.approx(START_PROBABILITY, rel=1e-6)
    assert roles["y-"] == pytest.approx(START_PROBABILITY * START_RATIO, rel=1e-6)


def test_maybe_perhaps_can_displace_on_the_real_matrix(real: Embeddings) -> None:
    seen = scan(real, ["maybe", "perhaps", "no", "never"], top=1, progress=False)
    assert (seen.pairs[0].preferred, seen.pairs[0].dispreferred) == ("maybe", "perhaps")
    assert seen.pairs[0].r_max > 1
    assert seen.share_above_one == pytest.approx(1 / 12)
    # With a rival that shares the mass and is aligned, W frozen: the fall is for good, and all of it goes there.
    stated = {"maybe": 12.0, "perhaps": 10.0, seen.pairs[0].winner: 11.5}
    one = predict(real, "maybe", "perhaps", start=stated, lr_unembedding=0.0)
    assert one.displacement.status == "permanent"
    assert one.displacement.gainers_at_end[0].name == seen.pairs[0].winner


def test_frequent_words_of_the_real_matrix(real: Embeddings) -> None:
    rows = frequent_tokens(real.tokens, 200)
    words = [real.tokens[i] for i in rows]
    assert words[:5] == ["the", "of", "and", "in", "to"]
    assert all(w.isalpha() and len(w) > 1 for w in words)
    seen = scan(real, rows[:20], progress=False)
    i, j = 3, 7
    assert (seen.ratios[i, j], seen.winners[i, j]) == (
        pytest.approx(predict(real, rows[i], rows[j]).r_max, rel=1e-9),
        seen.winners[i, j],
    )

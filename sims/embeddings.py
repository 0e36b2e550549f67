"""Real unembedding matrices: reading them from files, and hidden vectors that state a start on them.

A file gives the rows `W_z` of every token and their names. It rarely gives the hidden vector of a prompt, so a start is
stated instead, as log-odds of a few named tokens, and the least-norm hidden vector with those log-odds is solved for.
"""

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sims.token_files import existing_file, read_tokens, tokens_beside
from theory._check import FloatArray, check_array, check_number, unknown

# Output matrices before input matrices: the theory speaks of the rows that make the logits, and a file holds only the
# input matrix when the two are tied (or when the output one is in another shard, which `Embeddings.source` lets see).
UNEMBEDDING_NAMES = (
    "unembedding",
    "lm_head.weight",
    "embed_out.weight",
    "output.weight",
    "cls.predictions.decoder.weight",
    "model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "model.decoder.embed_tokens.weight",
    "bert.embeddings.word_embeddings.weight",
    "embeddings.word_embeddings.weight",
    "shared.weight",
)
# Marks of a word's first piece in byte-level and SentencePiece vocabularies.
WORD_MARKS = ("\u0120", "\u2581")


@dataclass(frozen=True, eq=False, repr=False)
class Embeddings:
    """An unembedding matrix with the names of its rows.

    Attributes
    ----------
    W : (V, d) float32 or float64, one row per token.
    tokens : V names; rows that the tokenizer leaves unnamed (padding) are called `<row 123>`.
    source : the file, and the array in it, that W came from.
    hidden : (d,) hidden vector of a prompt, if the file holds one.
    """

    W: FloatArray
    tokens: tuple[str, ...]
    source: str = "memory"
    hidden: FloatArray | None = None
    _rows: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        put("W", check_array(self.W, "W", (None, None)))
        put("tokens", tuple(str(t) for t in self.tokens))
        if len(self.tokens) != self.V:
            raise ValueError(f"tokens must name all {self.V} rows of W, got {len(self.tokens)} names")
        if self.V < 2:
            raise ValueError(f"W must have at least 2 rows (tokens), got shape {self.W.shape}")
        if self.hidden is not None:
            put("hidden", check_array(self.hidden, "hidden", (self.d,)))
        rows: dict[str, int] = {}
        for i, name in enumerate(self.tokens):
            rows[name] = i if name not in rows else -1  # -1: the name is not unique, see `index`
        put("_rows", rows)

    @property
    def V(self) -> int:
        """Number of tokens."""
        return self.W.shape[0]

    @property
    def d(self) -> int:
        """Dimension of embeddings."""
        return self.W.shape[1]

    def index(self, token: int | str, argument: str = "token") -> int:
        """Row of a token given by name or by row number.

        Raises ValueError, naming `argument`, for an unknown name (with the nearest ones), a name that several rows
        share, or a row number outside [0, V).
        """
        if isinstance(token, str):
            row = self._rows.get(token)
            if row is None:
                raise ValueError(f"{argument}: {self._unknown(token)}")
            if row < 0:
                same = [i for i, name in enumerate(self.tokens) if name == token]
                raise ValueError(f"{argument}: {token!r} names {len(same)} rows, {same[:5]}; give a row number instead")
            return row
        if isinstance(token, bool) or not isinstance(token, int | np.integer):
            raise ValueError(f"{argument} must be a token name or row number, got {token!r}")
        if not 0 <= token < self.V:
            raise ValueError(f"{argument} must be a row number in [0, {self.V}), got {token}")
        return int(token)

    def _unknown(self, token: str) -> str:
        # In most vocabularies a word is spelt with a mark in front, or only in lower case.
        variants = [mark + t for t in (token.strip(), token.strip().lower()) for mark in ("", *WORD_MARKS)]
        near = [v for v in dict.fromkeys(variants) if v in self._rows]
        if near:
            return f"unknown token {token!r}; did you mean {', '.join(map(repr, near))}?"
        return unknown("token", token, self._rows)

    def to_dict(self) -> dict[str, Any]:
        """What describes the matrix (not its numbers), for saving beside results."""
        return {"source": self.source, "V": self.V, "d": self.d, "has_hidden": self.hidden is not None}

    def __str__(self) -> str:
        hidden = "with a hidden vector" if self.hidden is not None else "no hidden vector"
        return f"{self.source}: {self.V} tokens x {self.d} ({self.W.dtype}), {hidden}"

    __repr__ = __str__


def read_embeddings(
    path: str | Path, *, tensor: str | None = None, tokens_path: str | Path | None = None
) -> Embeddings:
    """An unembedding matrix and its tokens from a .npz or .safetensors file.

    Parameters
    ----------
    path : .npz with `unembedding` (V, d) and `tokens` (V,) strings, or .safetensors. Either may hold `hidden` (d,).
        float16 and bfloat16 are widened to float32.
    tensor : name of the matrix in the file. Default: the first of `UNEMBEDDING_NAMES` found, or the only 2-D array.
    tokens_path : names of the rows: a Hugging Face tokenizer.json, a JSON object name -> row, a JSON list, or text with
        one name per line. Default: the `tokens` array of an .npz, else the first of tokenizer.json, vocab.json,
        tokens.json, tokens.txt, vocab.txt beside the file. A list must name every row; a tokenizer may leave a few rows
        of padding unnamed (`sims.token_files.MAX_PADDING`).

    Raises
    ------
    ValueError : missing file (`MissingFileError`), truncated or another format, array missing, wrong dtype or shape,
        NaN or inf, a number of tokens that does not fit. The message names the file, what it holds, what was expected.
    ImportError : a .safetensors file without the safetensors package.
    """
    path = existing_file(path, "path")
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors}
    if path.suffix.lower() not in readers:
        raise ValueError(f"path must be a .npz or .safetensors file, got {str(path)!r}")
    W, label, tokens, hidden = readers[path.suffix.lower()](path, tensor)
    W = check_array(_widened(W, f"{path}: {label}"), f"{path}: {label}", (None, None))
    if tokens_path is not None:
        tokens = read_tokens(existing_file(tokens_path, "tokens_path"), W.shape[0])
    elif tokens is None:
        tokens = read_tokens(tokens_beside(path), W.shape[0])
    elif len(tokens) != W.shape[0]:
        raise ValueError(f"{path}: tokens must name all {W.shape[0]} rows of {label}, got {len(tokens)} names")
    if hidden is not None:
        hidden = check_array(_widened(hidden, f"{path}: hidden"), f"{path}: hidden", (W.shape[1],))
    return Embeddings(W, tokens, f"{path.name} [{label}]", hidden)


def _widened(array: NDArray[Any], name: str) -> FloatArray:
    """float16 as float32; float32 and float64 as they are; a ValueError for any other dtype."""
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"{name} must hold float16, bfloat16, float32 or float64 numbers, got dtype {array.dtype}")
    # Also to native byte order, which torch and BLAS ask for.
    return array.astype(np.float64 if array.dtype.itemsize == 8 else np.float32, copy=False)


Parts = tuple[NDArray[Any], str, tuple[str, ...] | None, NDArray[Any] | None]


def _read_npz(path: Path, tensor: str | None) -> Parts:
    """(matrix, its name, tokens or None, hidden or None) of an .npz file."""
    arrays: dict[str, NDArray[Any]] = {}
    # Opened here, since np.load leaves a file it opened open when the archive turns out to be damaged.
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except (ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            file.seek(0)
            start = file.read(12)
            # numpy takes any other file for a pickle and advises to load it unsafely: that advice is left out.
            why = f"it starts with {start!r}" if "pickle" in str(error) else str(error)
            raise ValueError(
                f"{path} cannot be read as an .npz archive (truncated, or another format?): {why}"
            ) from None
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError(f"{path} must be an .npz archive, it holds a single .npy array of shape {archive.shape}")
        for name in archive.files:
            try:
                arrays[name] = archive[name]
            except (ValueError, EOFError, OSError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
                raise ValueError(
                    f"{path}: array {name!r} cannot be read "
                    f"(truncated, or Python objects instead of numbers or strings?): {error}"
                ) from None
    held = {name: f"{a.dtype}{list(a.shape)}" for name, a in arrays.items()}
    label = _choose(path, {name: a.shape for name, a in arrays.items() if name != "tokens"}, held, tensor)
    tokens = _names(arrays["tokens"], path) if "tokens" in arrays else None
    return arrays[label], label, tokens, arrays.get("hidden")


def _names(array: NDArray[Any], path: Path) -> tuple[str, ...]:
    if array.dtype.kind not in "US":
        raise ValueError(f"{path}: tokens must hold strings, got dtype {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{path}: tokens must have shape (V,), got {array.shape}")
    if array.dtype.kind == "S":
        return tuple(t.decode("utf-8", "replace") for t in array.tolist())
    return tuple(array.tolist())


def _read_safetensors(path: Path, tensor: str | None) -> Parts:
    """(matrix, its name, None, hidden or None) of a .safetensors file; only these two arrays are read."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(
            f"{path} needs the safetensors package: pip install 'likelihood-displacement[safetensors]'"
        ) from None
    try:
        # Through torch: numpy has no bfloat16.
        with safe_open(str(path), framework="pt") as archive:
            slices = {name: archive.get_slice(name) for name in archive.keys()}
            shapes = {name: tuple(s.get_shape()) for name, s in slices.items()}
            held = {name: f"{s.get_dtype()}{list(shapes[name])}" for name, s in slices.items()}
            label = _choose(path, shapes, held, tensor)
            matrix = _as_numpy(archive.get_tensor(label))
            hidden = _as_numpy(archive.get_tensor("hidden")) if "hidden" in shapes else None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a .safetensors file (truncated, or another format?): {error}"
        ) from None
    return matrix, label, None, hidden


def _as_numpy(tensor: Any) -> NDArray[Any]:
    import torch

    half = tensor.dtype in (torch.bfloat16, torch.float16)
    return (tensor.to(torch.float32) if half else tensor).numpy()


def _choose(path: Path, shapes: Mapping[str, tuple[int, ...]], held: Mapping[str, str], tensor: str | None) -> str:
    """Name of the unembedding among the arrays of a file, or a ValueError that lists what the file holds."""
    shown = ", ".join(f"{name} {what}" for name, what in list(held.items())[:12]) or "nothing"
    shown += f" and {len(held) - 12} more" if len(held) > 12 else ""
    if tensor is not None:
        if tensor not in shapes:
            raise ValueError(f"tensor: {path} holds no array {tensor!r}; it holds {shown}")
        return tensor
    for name in UNEMBEDDING_NAMES:
        if name in shapes:
            return name
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    if len(matrices) == 1:
        return matrices[0]
    found = f"{len(matrices)} arrays with two dimensions" if matrices else "no array with two dimensions"
    raise ValueError(
        f"{path} holds no array with a known name of an unembedding matrix "
        f"({', '.join(UNEMBEDDING_NAMES[:3])}, ...) and {found}; name it with tensor=. It holds {shown}"
    )


def centred_rows(W: FloatArray, rows: Iterable[int]) -> NDArray[np.float64]:
    """(k, d) rows of W minus the mean row: their logits are relative to the mean logit, blind to W + 1 v^T."""
    return W[list(rows)].astype(np.float64) - W.mean(axis=0, dtype=np.float64)


def hidden_from_log_odds(
    W: FloatArray, log_odds: Mapping[int, float], tokens: Sequence[str] | None = None
) -> NDArray[np.float64]:
    """The shortest hidden vector h that gives the named tokens these logits relative to the mean logit.

    Parameters
    ----------
    W : (V, d) unembeddings.
    log_odds : row -> <W_z, h> - mean over the vocabulary of <W_y, h>, in nats: the log-odds of token z against the
        geometric mean of all probabilities. Being relative, the log-probabilities they lead to do not change when one
        vector v is added to every row of W.
    tokens : V names, used in error messages only.

    Returns
    -------
    (d,) float64, in the span of the centred rows of the named tokens.

    Raises
    ------
    ValueError : no token, a row outside [0, V), a value that is not finite, or centred rows that are linearly dependent
        (then no h, or no one span, has these log-odds); the dependent tokens are named.
    """
    W = check_array(W, "W", (None, None))
    if not log_odds:
        raise ValueError("log_odds must name at least one token, got none")
    for row in log_odds:
        if isinstance(row, bool) or not isinstance(row, int | np.integer) or not 0 <= row < W.shape[0]:
            raise ValueError(f"log_odds must name rows in [0, {W.shape[0]}), got {row!r}")
    name = lambda row: repr(tokens[row] if tokens is not None else int(row))  # noqa: E731
    values = np.array([check_number(v, f"log_odds[{name(row)}]") for row, v in log_odds.items()])
    rows = list(log_odds)
    C = centred_rows(W, rows)  # (k, d)
    left, size, right = np.linalg.svd(C, full_matrices=False)
    scale = float(np.abs(W[rows]).max()) + float(size[0])
    if len(rows) > W.shape[1] or size[-1] <= 1e-10 * scale:
        # The left null vector holds the weights of the combination that vanishes.
        weights = np.abs(left[:, -1]) if len(rows) <= W.shape[1] else np.ones(len(rows))
        guilty = [name(row) for row, w in zip(rows, weights, strict=True) if w > 1e-6]
        raise ValueError(
            f"log_odds must name tokens whose rows of W, minus the mean row, are linearly independent; "
            f"those of {', '.join(guilty)} are not"
        )
    return right.T @ ((left.T @ values) / size)

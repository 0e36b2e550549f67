"""Which pairs of tokens of a real matrix can displace at all: r_max of every ordered pair (exact_solution E4)."""

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from sims.embeddings import WORD_MARKS, Embeddings
from sims.prediction import shown
from theory._check import FloatArray, check_count

Array = NDArray[np.float64]

BLOCK_BYTES = 1 << 22  # of differences of inner products at a time: they stay in the cache of one core


@dataclass(frozen=True)
class PairRatio:
    """One ordered pair; `winner` is the other token with the largest r_z, and r_max is that value."""

    preferred: str
    dispreferred: str
    preferred_index: int
    dispreferred_index: int
    r_max: float
    winner: str
    winner_index: int


@dataclass(frozen=True, eq=False)
class Scan:
    """r_max of every ordered pair among some tokens of a matrix, the maximum taken over the whole vocabulary.

    source, V, d : the file, its number of tokens and dimension.
    tokens, indices : names and rows of the M scanned tokens.
    pairs : the pairs most prone to displacement, largest r_max first.
    n_pairs : M (M - 1), the ordered pairs looked at.
    share_above_one : the share of them that can displace at the start of training (r_max > 1).
    median : median r_max.
    ratios, winners : (M, M) r_max and row of the winning token for y+ = tokens[i], y- = tokens[j]; -inf and -1 on the
        diagonal and for pairs with equal rows. Not in `to_dict()`.
    """

    source: str
    V: int
    d: int
    tokens: tuple[str, ...]
    indices: tuple[int, ...]
    pairs: tuple[PairRatio, ...]
    n_pairs: int
    share_above_one: float
    median: float
    ratios: Array = field(repr=False)
    winners: NDArray[np.intp] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for saving, without the (M, M) arrays."""
        plain = {k: v for k, v in vars(self).items() if k not in ("ratios", "winners")}
        return {**plain, "pairs": [asdict(p) for p in self.pairs]}

    def __str__(self) -> str:
        head = ("y+", "y-", "gains on y+")
        names = [(shown(p.preferred), shown(p.dispreferred), shown(p.winner)) for p in self.pairs]
        w = [max(map(len, column)) for column in zip(head, *names, strict=True)]
        lines = [f"  {head[0]:{w[0]}}  {head[1]:{w[1]}}  {'r_max':>7}  {head[2]}"]
        lines += [
            f"  {a:{w[0]}}  {b:{w[1]}}  {p.r_max:7.3f}  {z}" for (a, b, z), p in zip(names, self.pairs, strict=True)
        ]
        return "\n".join(
            [
                f"{self.n_pairs} ordered pairs of {len(self.tokens)} tokens on {self.source}, "
                f"{self.V} tokens x {self.d}.",
                f"{100 * self.share_above_one:.3g} % of them can displace at the start of training (r_max > 1); "
                f"median r_max {self.median:.3g}.",
                "For the others no hidden vector and no ratio of rates makes the probability of y+ fall at the start.",
                "",
                *lines,
            ]
        )

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def frequent_tokens(tokens: Sequence[str], count: int) -> list[int]:
    """Rows of the first `count` whole words of a vocabulary: vocabularies are ordered by frequency, or nearly so.

    WordPiece vocabularies (BERT) list words by frequency; byte-pair vocabularies list merges, frequent ones first.
    A word has at least two characters, all of them letters, so that specials ([CLS], [unused7], <s>), pieces (##ing),
    digits and punctuation drop out. Where the vocabulary marks the first piece of a word, only marked tokens are words;
    then letters must be ASCII too, since byte-level vocabularies spell others in stand-in characters.
    """
    marked = sum(t.startswith(WORD_MARKS) for t in tokens) > len(tokens) // 10

    def is_word(token: str) -> bool:
        if not marked:
            return len(token) > 1 and token.isalpha()
        word = token[1:]
        return token.startswith(WORD_MARKS) and len(word) > 1 and word.isalpha() and word.isascii()

    found: list[int] = []
    for row, token in enumerate(tokens):
        if is_word(token):
            found.append(row)
            if len(found) == count:
                break
    return found


def scan(
    embeddings: Embeddings,
    tokens: Sequence[int | str] | None = None,
    top: int = 20,
    candidates: int = 200,
    progress: bool = True,
) -> Scan:
    """r_max of every ordered pair among the given tokens, or among the `candidates` most frequent words.

    r_max = max over z of <2 W_z - W_+ - W_-, a>/|a|^2, a = W_+ - W_-, z any token of the vocabulary but y+ and y-. It
    needs no prompt and no training. For M tokens it takes about V (M d + M^2 / 2) operations and 8 M V bytes.

    Parameters
    ----------
    embeddings : the matrix and its tokens (`read_embeddings`).
    tokens : at least two, by name or row. Default: `frequent_tokens`.
    top : number of pairs to list.
    candidates : number of frequent words to pair up when `tokens` is not given.
    progress : show a progress bar.

    Raises
    ------
    ValueError : fewer than two tokens, a token given twice, unknown or ambiguous names, a vocabulary with fewer than
        two words or fewer than three tokens.
    """
    if not isinstance(embeddings, Embeddings):
        raise ValueError(f"embeddings must be an Embeddings record (read_embeddings), got {type(embeddings).__name__}")
    check_count(top, "top")
    if embeddings.V < 3:
        raise ValueError(f"embeddings must have at least 3 tokens, a pair and another one, got {embeddings.V}")
    rows = _rows(embeddings, tokens, candidates)
    ratios, winners = pair_ratios(embeddings.W, rows, progress=progress)
    off = ~np.eye(len(rows), dtype=bool)
    order = np.argsort(-np.where(off, ratios, -np.inf), axis=None, kind="stable")[: min(top, off.sum())]
    name = embeddings.tokens
    pairs = (
        PairRatio(name[rows[i]], name[rows[j]], rows[i], rows[j], float(ratios[i, j]), name[z], z)
        for i, j in (divmod(int(k), len(rows)) for k in order)
        if (z := int(winners[i, j])) >= 0
    )
    return Scan(
        source=embeddings.source,
        V=embeddings.V,
        d=embeddings.d,
        tokens=tuple(name[row] for row in rows),
        indices=tuple(rows),
        pairs=tuple(pairs),
        n_pairs=int(off.sum()),
        share_above_one=float((ratios[off] > 1).mean()),
        median=float(np.median(ratios[off])),
        ratios=ratios,
        winners=winners,
    )


def _rows(embeddings: Embeddings, tokens: Sequence[int | str] | None, candidates: int) -> list[int]:
    if tokens is None:
        rows = frequent_tokens(embeddings.tokens, check_count(candidates, "candidates", low=2))
        if len(rows) < 2:
            raise ValueError(
                f"tokens must be given: {embeddings.source} holds {len(rows)} whole word(s) to choose from"
            )
        return rows
    if isinstance(tokens, str):
        raise ValueError(f"tokens must be a sequence of names or rows, got the text {tokens!r}")
    rows = [embeddings.index(token, f"tokens[{i}]") for i, token in enumerate(tokens)]
    if len(rows) < 2:
        raise ValueError(f"tokens must hold at least 2 tokens to pair up, got {len(rows)}")
    for i, row in enumerate(rows):
        if row in rows[:i]:
            raise ValueError(f"tokens must be distinct, {embeddings.tokens[row]!r} is given twice")
    return rows


def pair_ratios(W: FloatArray, rows: Sequence[int], progress: bool = False) -> tuple[Array, NDArray[np.intp]]:
    """(M, M) r_max of y+ = rows[i], y- = rows[j], and the token that has it; (-inf, -1) where W_+ = W_-.

    W (V, d) is read once. Everything is in float64: differences of inner products cancel for similar tokens.
    """
    rows = list(rows)
    M, V = len(rows), len(W)
    picked = W[rows].astype(np.float64)  # (M, d)
    picked_norms = (picked**2).sum(axis=1)
    products = _products(W, picked)  # (M, V)
    ratios = np.full((M, M), -np.inf)
    winners = np.full((M, M), -1, dtype=np.intp)
    step = max(1, BLOCK_BYTES // (8 * V))
    buffer = np.empty((step, V))
    for i in tqdm(range(M), desc="pairs", unit="token", leave=False, disable=not progress):
        for first in range(i + 1, M, step):
            j = np.arange(first, min(first + step, M))
            k = np.arange(len(j))
            block = np.subtract(products[i], products[j[0] : j[-1] + 1], out=buffer[: len(j)])  # <W_z, a> of (i, j)
            size = ((picked[i] - picked[j]) ** 2).sum(axis=1)
            middle = picked_norms[i] - picked_norms[j]  # <W_+ + W_-, a>
            # One block serves both orders: with y+ and y- exchanged a changes sign, so the least product wins.
            for sign, at in ((1.0, (i, j)), (-1.0, (j, i))):
                block[:, rows[i]] = block[k, [rows[x] for x in j]] = -sign * np.inf
                winner = block.argmax(axis=1) if sign > 0 else block.argmin(axis=1)
                with np.errstate(divide="ignore", invalid="ignore"):
                    value = sign * (2 * block[k, winner] - middle) / size
                ratios[at] = np.where(size > 0, value, -np.inf)
                winners[at] = np.where(size > 0, winner, -1)
    return ratios, winners


def _products(W: FloatArray, picked: Array) -> Array:
    """(M, V) inner products of `picked` (M, d) with the rows of W, which is widened to float64 block by block."""
    out = np.empty((len(picked), len(W)))
    step = max(1, 8 * BLOCK_BYTES // (8 * W.shape[1]))
    for first in range(0, len(W), step):
        out[:, first : first + step] = picked @ W[first : first + step].astype(np.float64, copy=False).T
    return out

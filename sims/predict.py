"""What the theory says of one preference pair on a real unembedding matrix, before any training."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp

from sims.embeddings import Embeddings, hidden_from_log_odds
from sims.prediction import Prediction, TokenPrediction, at_start, in_training, shown
from theory._check import check_array, check_count
from theory.exact import ExactFlow
from theory.losses import Loss
from theory.losses.dpo import DPO
from theory.model import UnconstrainedFeatures, inner_products

# Token, by name or row -> log-odds. Three spellings, because a Mapping is invariant in its keys.
Start = Mapping[str, float] | Mapping[int, float] | Mapping[int | str, float]

# The default start: y+ is the model's first choice, as for the pairs of the paper's Section 3 (where pi(y+) starts
# between 0.65 and 0.85), and y- is a tenth as likely.
START_PROBABILITY = 0.7
START_RATIO = 0.1

DEFAULT_LOSS = DPO(beta=0.1)


def predict(
    embeddings: Embeddings,
    preferred: int | str,
    dispreferred: int | str,
    *,
    hidden: ArrayLike | None = None,
    start: Start | None = None,
    loss: Loss = DEFAULT_LOSS,
    lr_unembedding: float = 1.0,
    lr_hidden: Any = 1.0,
    top: int = 10,
) -> Prediction:
    """What the exact flow does to a preference pair on real embeddings.

    Parameters
    ----------
    embeddings : the matrix and its tokens (`read_embeddings`).
    preferred, dispreferred : y+ and y-, by name or row.
    hidden : (d,) hidden vector of the prompt. Default: that of the embeddings, if they hold one.
    start : token (name or row) -> log-odds relative to the mean logit, in nats; the shortest hidden vector with these
        is taken (`hidden_from_log_odds`). Not together with `hidden`. Without either, and without a hidden vector in
        the file, the start is the shortest one with pi(y+) = 0.7 and pi(y-) a tenth of it (`default_log_odds`).
    loss : any loss with a margin form. Default: DPO with beta = 0.1. Training starts at the reference.
    lr_unembedding, lr_hidden : rates of W and of the hidden vector (number or (d, d) kernel), as for `ExactFlow`.
    top : number of tokens in each list.

    Raises
    ------
    ValueError : an unknown or ambiguous token, y+ = y-, a hidden vector of wrong shape, linearly dependent tokens in
        `start`, rates or loss parameters out of their domains.
    """
    if not isinstance(embeddings, Embeddings):
        raise ValueError(f"embeddings must be an Embeddings record (read_embeddings), got {type(embeddings).__name__}")
    check_count(top, "top")
    plus, minus = embeddings.index(preferred, "preferred"), embeddings.index(dispreferred, "dispreferred")
    if plus == minus:
        raise ValueError(f"preferred and dispreferred must differ, both are {preferred!r}")
    h, words, log_odds = start_vector(embeddings, plus, minus, hidden, start)
    model = UnconstrainedFeatures.single_token(embeddings.W, h, plus, minus, tokens=embeddings.tokens)
    flow = ExactFlow(model, loss, lr_unembedding, lr_hidden)
    record = flow.displacement(top)
    probabilities = np.exp(flow.log_probs([0.0])[0])
    winner = _winner(flow, plus, minus)
    start_tokens, aligned_tokens = _tokens(flow, probabilities, log_odds, top)
    name = embeddings.tokens
    return Prediction(
        source=embeddings.source,
        V=embeddings.V,
        d=embeddings.d,
        preferred=name[plus],
        dispreferred=name[minus],
        start=f"{words}; reached: pi(y+) = {probabilities[plus]:.3g}, pi(y-) = {probabilities[minus]:.3g}",
        log_odds=tuple((name[z], float(v)) for z, v in log_odds.items()),
        hidden_norm=float(np.linalg.norm(h)),
        start_tokens=start_tokens,
        aligned_tokens=aligned_tokens,
        preferred_rank=int((flow.alignment > flow.alignment[plus]).sum()) + 1,
        r_max=flow.r_max,
        r_max_token=None if winner is None else name[winner],
        displacement=record,
        loss=repr(loss),
        lr_unembedding=float(lr_unembedding),
        lr_hidden=lr_hidden,
        at_start=at_start(flow, record, winner),
        in_training=in_training(flow, record),
        flow=flow,
    )


def default_log_odds(W: NDArray[np.floating[Any]], preferred: int, dispreferred: int) -> dict[int, float]:
    """Log-odds, relative to the mean logit, of the default start of a pair: pi(y+) = 0.7 and pi(y-) = 0.07.

    With the margin fixed at ln 10 the least-norm hidden vectors form a line, along which ln pi(y+) is concave; the
    lower of its crossings with ln 0.7 is taken, or its maximum where no point of the line reaches 0.7 (other tokens
    rise along with y+ then). Raises ValueError for a pair whose rows, minus the mean row, are linearly dependent.
    """
    margin = -np.log(START_RATIO)
    try:
        at_zero, at_one = (hidden_from_log_odds(W, {preferred: v, dispreferred: v - margin}) for v in (0.0, 1.0))
    except ValueError as error:
        raise ValueError(f"this pair has no default start, give start or hidden: {error}") from None
    logits, slope = inner_products(W, np.stack([at_zero, at_one - at_zero], axis=1)).T

    def log_prob(v: float) -> float:
        z = logits + v * slope
        return float(z[preferred] - logsumexp(z))

    # Well beyond the log-odds at which y+ outweighs V tokens of mean logit, and what the logits at 0 may add to that.
    reach = 4 * (margin + np.log(len(W)) + float(np.abs(logits).max()))
    best: Any = minimize_scalar(lambda v: -log_prob(v), bounds=(-reach, reach), method="bounded")
    value, target = float(best.x), float(np.log(START_PROBABILITY))
    if log_prob(value) > target > log_prob(-reach):
        crossing: Any = brentq(lambda v: log_prob(v) - target, -reach, value, xtol=1e-10)
        value = float(crossing)
    return {preferred: value, dispreferred: value - margin}


def start_vector(
    embeddings: Embeddings, plus: int, minus: int, hidden: ArrayLike | None, start: Start | None
) -> tuple[NDArray[Any], str, dict[int, float]]:
    """(d,) hidden vector, where it came from in words, and the log-odds that state it."""
    if hidden is not None and start is not None:
        raise ValueError("give hidden or start, not both")
    if hidden is not None:
        return check_array(hidden, "hidden", (embeddings.d,)), "the hidden vector given", {}
    if start is not None:
        if not isinstance(start, Mapping) or not start:
            raise ValueError(f"start must map at least one token to its log-odds, got {start!r}")
        log_odds = {embeddings.index(token, "start"): value for token, value in start.items()}
        if len(log_odds) < len(start):
            raise ValueError(f"start must name every token once, got {dict(start)!r}")
        words = "the shortest hidden vector with the stated log-odds"
    elif embeddings.hidden is not None:
        return embeddings.hidden, "the hidden vector in the file", {}
    else:
        log_odds = default_log_odds(embeddings.W, plus, minus)
        words = (
            f"assumed, as none was given: the shortest hidden vector with pi(y+) = {START_PROBABILITY:g} "
            f"(or as near as it gets) and pi(y-) a tenth of it"
        )
    h = hidden_from_log_odds(embeddings.W, log_odds, embeddings.tokens)
    stated = ", ".join(f"{shown(embeddings.tokens[z])} {v:.4g}" for z, v in log_odds.items())
    return h, f"{words} (log-odds against the mean logit: {stated})", log_odds


def _tokens(
    flow: ExactFlow, probabilities: NDArray[np.float64], stated: Mapping[int, float], top: int
) -> tuple[tuple[TokenPrediction, ...], tuple[TokenPrediction, ...]]:
    """The named and `top` most probable tokens by probability (V,), and the `top` tokens by alignment."""
    plus, minus = flow.model.single_pair
    roles = {**dict.fromkeys(stated, "start"), plus: "y+", minus: "y-"}
    size = flow.alignment[plus] - flow.alignment[minus]  # |a|^2; 0 when y+ and y- share one row, and no r_z is defined
    ratios = (2 * flow.alignment - flow.alignment[plus] - flow.alignment[minus]) / (size if size > 0 else np.nan)
    ratios = np.where(np.isnan(ratios), -np.inf, ratios)

    def token(z: int) -> TokenPrediction:
        numbers = (float(x[z]) for x in (probabilities, flow.alignment, ratios))
        return TokenPrediction(z, flow.model.name(z), roles.get(z, ""), *numbers)

    likely = np.argsort(-probabilities, kind="stable")[:top].tolist()
    by_probability = sorted({*roles, *likely}, key=lambda z: -probabilities[z])
    by_alignment = np.argsort(-flow.alignment, kind="stable")[:top].tolist()
    return tuple(map(token, by_probability)), tuple(map(token, by_alignment))


def _winner(flow: ExactFlow, plus: int, minus: int) -> int | None:
    """The other token with the largest r_z; None if none has one."""
    if not np.isfinite(flow.r_max):
        return None
    others = flow.alignment.copy()
    others[[plus, minus]] = -np.inf
    return int(others.argmax())

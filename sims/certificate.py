"""Certificates for the No/Never/Yes scenario and for a pair on a user's embeddings (`theory.certify`)."""

from numpy.typing import ArrayLike

from sims.embeddings import Embeddings
from sims.predict import Start, start_vector
from sims.scenarios import no_never_yes
from theory.certify import Certificate
from theory.certify import certify as certify_model
from theory.losses import Loss
from theory.model import UnconstrainedFeatures


def certify(
    embeddings: Embeddings | None = None,
    preferred: int | str = "No",
    dispreferred: int | str = "Never",
    *,
    hidden: ArrayLike | None = None,
    start: Start | None = None,
    loss: Loss | None = None,
    lr_unembedding: float = 1.0,
    lr_hidden: float | None = None,
    margin: float | None = None,
    token: int | str | None = None,
    box: float | None = None,
    thorough: bool | None = None,
) -> Certificate:
    """Try to prove that training on a pair displaces y+, by ball arithmetic.

    Parameters
    ----------
    embeddings : the matrix and its tokens (`read_embeddings`). None: the built-in scenario, whose pairs
        `preferred` and `dispreferred` then name.
    hidden, start : the hidden vector of the prompt, as for `sims.predict.predict`; not for the scenario.
    lr_unembedding, lr_hidden : rates of W and h. Default of lr_hidden: 1, for the scenario its own kappa.
    loss, margin, token, box, thorough : as for `theory.certify.certify`.

    Raises
    ------
    ValueError : what `predict` and `theory.certify.certify` raise, or `hidden` or `start` without embeddings.
    ImportError : without python-flint.
    """
    if embeddings is None:
        if hidden is not None or start is not None:
            raise ValueError("embeddings must be given together with hidden or start, got None")
        if unknown := [t for t in (preferred, dispreferred) if t not in no_never_yes.TOKENS]:
            raise ValueError(f"preferred and dispreferred must be tokens of the scenario, got {unknown[0]!r}")
        model = no_never_yes.model(str(preferred), str(dispreferred))
    elif not isinstance(embeddings, Embeddings):
        raise ValueError(f"embeddings must be an Embeddings record (read_embeddings), got {type(embeddings).__name__}")
    else:
        plus, minus = embeddings.index(preferred, "preferred"), embeddings.index(dispreferred, "dispreferred")
        if plus == minus:
            raise ValueError(f"preferred and dispreferred must differ, both are {preferred!r}")
        if token is not None:
            token = embeddings.index(token, "token")
        h, _, _ = start_vector(embeddings, plus, minus, hidden, start)
        model = UnconstrainedFeatures.single_token(embeddings.W, h, plus, minus, tokens=embeddings.tokens)
    if lr_hidden is None:
        lr_hidden = no_never_yes.KAPPA if embeddings is None else 1.0
    return certify_model(
        model,
        loss,
        lr_unembedding,
        lr_hidden,
        margin=margin,
        token=token,
        box=box,
        thorough=thorough,
    )

"""What to know of a model and its data before their scores are used."""

import torch

from sims.language.model import LanguageModel
from sims.language.pairing import Example
from sims.language.scoring.summary import Tally
from sims.language.scoring.words import counted

FEW = 0.01  # share of pairs up to which a boundary that moves is not mentioned


def of_model(model: LanguageModel, deviation: float, noise: float, example: Example) -> tuple[str, ...]:
    """Cautions that need no scores.

    deviation, noise : largest difference of the model's logits from those of its states, and what rounding explains.
    example : one of the data set.
    """
    found = []
    cap = getattr(model.network.config, "final_logit_softcapping", None)
    if cap:
        found.append(
            f"the model caps its logits (final_logit_softcapping {cap:g}): CHES and alpha are derived for logits W h "
            "and hold approximately; the log-probabilities and the probe are exact"
        )
    dtype = model.W.dtype
    unit = torch.finfo(dtype).eps
    if deviation > noise:
        found.append(
            f"the model's logits differ from those of its head on its last states by {deviation:.2g} nats: "
            "scores of the states do not see what it does in between"
        )
    if unit > 1e-4:
        found.append(
            f"weights in {str(dtype).removeprefix('torch.')}: states are rounded to about {100 * unit:.2g} %, so pairs "
            "with close scores may change places; --dtype float32 settles it"
        )
    if isinstance(example.chosen, str) and model.tokenizer.chat_template:
        found.append(
            "the pairs are plain text, and the model has a chat template: they are scored as text, as TRL trains on "
            "them; a trainer that puts them into the template sees other tokens"
        )
    return tuple(found)


def of_data(tally: Tally) -> tuple[str, ...]:
    """Cautions from what happened to the tokens: every response that was cut counts."""
    said = {
        "boundary": "with a prompt whose end is tokenised otherwise before a response: the response is taken from "
        "where the tokens part, as TRL does. A prompt that ends in a space is the usual cause",
        "truncated": "lost the end of a response at the limit (--max_length, or what the model takes): what the "
        "responses differ in may be gone",
    }
    return tuple(
        f"{counted(count, 'pair')} ({100 * count / tally.pairs:.1f} %) {said[kind]} (column `note`)"
        for kind, count in sorted(tally.notes.items())
        if tally.pairs and (kind == "truncated" or count > FEW * tally.pairs)
    )

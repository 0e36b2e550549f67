"""Preference examples as token ids, the way TRL's DPOTrainer makes them.

An example is text, messages or token ids. Its tokens are what that trainer (TRL 1.x) would train on: a text response
ends in the end token, a conversation in what the chat template puts there; prompt and response are tokenised together,
and the response begins where the tokenised prompt stops being a prefix of the whole; what is too long loses its end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple

from sims.language.model import LanguageModel
from sims.language.preferences import PreferencePair
from sims.language.responses import shared

Message = Mapping[str, Any]
Said = str | Sequence[Message] | Sequence[int]  # a text, messages, or token ids
QUIET = {"verbose": False}  # no warning of a text longer than the model takes: it is cut here, and the note says so


@dataclass(frozen=True)
class Example:
    """What one row of preference data says.

    prompt : the prompt, or None where the responses begin with it.
    chosen : the preferred response; for None as prompt, prompt and response.
    rejected : the dispreferred ones, at least one, each of the same kind as `chosen`.
    several : whether the row held a list of rejected responses (then what is found of the row is a list, too).
    template : further arguments of the chat template (tools, ...).
    """

    prompt: Said | None
    chosen: Said
    rejected: tuple[Said, ...]
    several: bool = False
    template: Mapping[str, Any] = field(default_factory=dict)


class Tokenized(NamedTuple):
    """A pair as tokens, and what the user should know of how it came about ("" if nothing).

    A note begins with "boundary:" where tokens of the prompt went to the response, with "truncated:" where a response
    lost its end.
    """

    pair: PreferencePair
    note: str


def tokenize(model: LanguageModel, example: Example, max_length: int | None = None) -> list[Tokenized]:
    """One pair per rejected response.

    max_length : most tokens of prompt and response together (default, and at most: what the model takes).

    Raises ValueError that says what is wrong with the example: an empty prompt or response, equal responses, a prompt
    that leaves no room, token ids that the model does not know, a conversation for a model without a chat template.
    """
    limit = min(model.longest, max_length or model.longest)
    prompt, chosen, *rejected = _split(example)
    whole = [
        _ids(model, y, "chosen" if i == 0 else "rejected", prompt, example) for i, y in enumerate([chosen, *rejected])
    ]
    start = _start(model, prompt, example)
    return [_pair(model, start, whole[0], other, limit) for other in whole[1:]]


def _split(example: Example) -> list[Said]:
    """Prompt, chosen, rejected...; a prompt that is implicit is what all responses begin with."""
    responses: list[Any] = [example.chosen, *example.rejected]
    if not example.rejected:
        raise ValueError("rejected holds no response")
    kinds = {_kind(x) for x in ([] if example.prompt is None else [example.prompt]) + responses}
    if len(kinds) > 1:
        raise ValueError(f"prompt, chosen and rejected must be of one kind, got {' and '.join(sorted(kinds))}")
    for name, y in zip(("chosen", *["rejected"] * len(example.rejected)), responses, strict=True):
        if _empty(y):
            raise ValueError(f"{name} is empty")
    if example.prompt is not None:
        return [example.prompt, *responses]
    first, shortest = responses[0], min(map(len, responses))
    same = list(takewhile(lambda i: all(y[i] == first[i] for y in responses), range(shortest)))
    n = min(len(same), shortest - 1)  # something is left of every response
    if n and len(same) < shortest and first[n - 1] == " ":
        n -= 1  # the space before a word belongs to it
    return [first[:n], *(y[n:] for y in responses)]


def _kind(said: Said) -> str:
    if isinstance(said, str):
        return "text"
    return "messages" if said and isinstance(said[0], Mapping) else "token ids" if said else "an empty list"


def _empty(said: Said) -> bool:
    if isinstance(said, str):
        return not said.strip()
    # A message without text may still call a tool.
    return not any(not isinstance(x, Mapping) or set(x) - {"role", "content"} or x.get("content") for x in said)


def _start(model: LanguageModel, prompt: Any, example: Example) -> list[int]:
    if _kind(prompt) == "token ids":
        return _checked(model, prompt, "prompt")
    if isinstance(prompt, str):
        return model.tokenizer(prompt, **QUIET)["input_ids"]
    return _rendered(model, list(prompt), example, add_generation_prompt=True)


def _ids(model: LanguageModel, said: Any, name: str, prompt: Any, example: Example) -> list[int]:
    """Tokens of prompt and response."""
    if _kind(said) == "token ids":
        return [*prompt, *_checked(model, said, name)]
    if isinstance(said, str):
        end = model.tokenizer.eos_token
        if end is None:
            raise ValueError("the model's tokenizer must have a token that ends a text (eos_token), it has none")
        return model.tokenizer(prompt + said + ("" if said.endswith(end) else end), **QUIET)["input_ids"]
    return _rendered(model, [*prompt, *said], example)


def _rendered(model: LanguageModel, messages: list[Any], example: Example, **more: Any) -> list[int]:
    if not model.tokenizer.chat_template:
        raise ValueError("the rows are conversations, but the model's tokenizer has no chat template")
    if not messages:
        raise ValueError("prompt is empty")
    arguments = {"tokenize": True, "return_dict": True, "tokenizer_kwargs": QUIET, **example.template, **more}
    try:
        return model.tokenizer.apply_chat_template(messages, **arguments)["input_ids"]
    except Exception as error:  # templates raise whatever they like
        raise ValueError(f"the chat template cannot render it: {type(error).__name__}: {error}") from error


def _checked(model: LanguageModel, ids: Sequence[Any], name: str) -> list[int]:
    vocabulary = model.W.shape[0]
    wrong = [i for i in ids if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocabulary]
    if wrong:
        raise ValueError(f"{name} must hold token ids in [0, {vocabulary}), got {wrong[0]!r}")
    return list(ids)


def _pair(model: LanguageModel, start: list[int], plus: list[int], minus: list[int], limit: int) -> Tokenized:
    common = min(shared(start, plus), shared(start, minus))
    notes = []
    if common < len(start):
        lost = model.tokenizer.decode(start[common:])
        notes.append(f"boundary: the end of the prompt, {lost!r}, is tokenised otherwise before a response")
    prompt, y, z = plus[:common], plus[common:], minus[common:]
    if not prompt:
        raise ValueError("prompt is empty")
    if len(prompt) >= limit:
        raise ValueError(f"prompt has {len(prompt)} tokens, the limit is {limit} with the response")
    for name, said in (("chosen", y), ("rejected", z)):
        if not said:
            raise ValueError(f"{name} is empty")
        if len(prompt) + len(said) > limit:
            notes.append(f"truncated: {name} from {len(said)} to {limit - len(prompt)} tokens")
    if y == z:
        raise ValueError("chosen and rejected are the same")
    y, z = y[: limit - len(prompt)], z[: limit - len(prompt)]
    if y == z:
        raise ValueError(f"chosen and rejected are the same in their first {limit} tokens")
    return Tokenized(PreferencePair(tuple(prompt), tuple(y), tuple(z)), "; ".join(notes))

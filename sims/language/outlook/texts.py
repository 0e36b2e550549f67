"""A prompt, a pair and candidate responses as tokens, and what a user should know of how they came about."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sims.language.model import LanguageModel
from sims.language.responses import Ids, sample, shared

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Question:
    """What is asked of a model.

    text : the prompt, as it was given. prompt : its tokens. responses : y+, y-, then the candidates. texts, roles :
    of each ("y+", "y-", "candidate", "sampled"). notes : in words.
    """

    text: str
    prompt: Tokens
    responses: tuple[Tokens, ...]
    texts: tuple[str, ...]
    roles: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def single(self) -> bool:
        """Whether y+ and y- are one token each."""
        return all(len(y) == 1 for y in self.responses[:2])


def ask(
    model: LanguageModel,
    prompt: str,
    preferred: str,
    dispreferred: str,
    *,
    candidates: Sequence[str] = (),
    samples: int = 0,
    max_new_tokens: int = 16,
    chat: bool = False,
    eos: bool = False,
    seed: int = 0,
) -> Question:
    """Texts as this model sees them.

    Parameters
    ----------
    preferred, dispreferred, candidates : responses; whether one begins with a space matters.
    samples : responses to draw from the model besides, of at most `max_new_tokens` tokens; equal ones count once.
    chat : the prompt is what a user says, put into the model's chat template.
    eos : end every response with the token that ends a text, as trainers do for plain text.

    Raises ValueError for an empty prompt or response, words that the model does not know, y+ = y-, or more tokens than
    it takes.
    """
    if not prompt.strip():
        raise ValueError("prompt is empty")
    texts = [preferred, dispreferred, *candidates]
    names = ["preferred", "dispreferred", *["candidate"] * len(candidates)]
    ids, responses, notes = _encoded(model, _chat(model, prompt) if chat else prompt, names, texts, not chat)
    if eos:
        responses = [(*y, model.end) for y in responses]
    if responses[0] == responses[1]:
        pieces = _pieces(model, responses[0])
        raise ValueError(f"preferred and dispreferred must differ, both are {preferred!r} ({pieces})")
    if (size := len(ids) + max(map(len, responses))) > model.longest:
        raise ValueError(f"prompt and response must have at most {model.longest} tokens together, got {size}")
    drawn = _sampled(model, ids, samples, max_new_tokens, seed) if samples else []
    fresh = [y for y in drawn if y not in responses]
    texts += [model.tokenizer.decode(list(y)) for y in fresh]  # with the token that ends them, if there is one
    roles = ("y+", "y-", *names[2:], *["sampled"] * len(fresh))
    return Question(prompt, ids, (*responses, *fresh), tuple(texts), roles, tuple(notes))


def _encoded(
    model: LanguageModel, prompt: str, names: Sequence[str], texts: Sequence[str], special: bool
) -> tuple[Tokens, list[Tokens], list[str]]:
    """Tokens of the prompt and of each response, tokenised together as in training, and notes."""
    encode = lambda x: model.tokenizer(x, add_special_tokens=special)["input_ids"]  # noqa: E731
    for name, y in zip(names, texts, strict=True):
        if not y:
            raise ValueError(f"{name} is empty")
    start, whole = encode(prompt), [encode(prompt + y) for y in texts]
    n = min(shared(start, ids) for ids in whole)
    notes = []
    if n < len(start):
        lost = model.tokenizer.decode(start[n:])
        notes.append(f"the end of the prompt, {lost!r}, is tokenised otherwise before a response and goes to it.")
    if not n:
        raise ValueError("prompt is empty: its first token is tokenised otherwise before a response")
    unknown = model.tokenizer.unk_token_id
    for name, y, ids in zip(names, texts, whole, strict=True):
        own = tuple(ids[n:])
        _check(model, name, y, own, _spelling(encode, unknown, prompt, y, most=len(own)))
        if len(own) > 1 and name != "candidate":
            made = f"{y!r} makes {len(own)} tokens, {_pieces(model, own)}"
            if other := _spelling(encode, unknown, prompt, y, most=1):
                notes.append(f"{made}; {other!r} would be one, and only single tokens have a closed path.")
            elif len(own) < 4:
                notes.append(f"{made}.")
    return tuple(whole[0][:n]), [tuple(ids[n:]) for ids in whole], notes


def _chat(model: LanguageModel, prompt: str) -> str:
    if not model.tokenizer.chat_template:
        raise ValueError("chat needs a model whose tokenizer has a chat template, this one has none")
    try:
        return model.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # templates raise whatever they like
        raise ValueError(f"the chat template cannot render the prompt: {type(error).__name__}: {error}") from error


def _check(model: LanguageModel, name: str, text: str, ids: Tokens, other: str) -> None:
    if not ids:
        raise ValueError(f"{name} makes no token of its own after this prompt, got {text!r}")
    unknown = model.tokenizer.unk_token_id
    if unknown is not None and unknown in ids:
        hint = f"; {other!r} would be known" if other else ""
        raise ValueError(f"{name} must be known to the model, {text!r} makes the tokens {_pieces(model, ids)}{hint}")


def _spelling(encode: Any, unknown: int | None, prompt: str, text: str, most: int) -> str:
    """The response with or without a space before it, if that is known and of at most so many tokens; or nothing."""
    start = encode(prompt)
    for other in (f" {text.strip()}", text.strip()):
        whole = encode(prompt + other)
        ids = whole[len(start) :]
        if other != text and whole[: len(start)] == start and 0 < len(ids) <= most and unknown not in ids:
            return other
    return ""


def _sampled(model: LanguageModel, prompt: Ids, samples: int, most: int, seed: int) -> list[Tokens]:
    """Different responses of the model, most frequent first."""
    if samples < 0 or most < 1:
        raise ValueError(f"samples must be >= 0 and max_new_tokens >= 1, got {samples} and {most}")
    room = min(most, model.longest - len(prompt))
    drawn = sample(model, [prompt] * samples, room, seed=seed)
    return sorted(set(drawn), key=lambda y: (-drawn.count(y), y))


def _pieces(model: LanguageModel, ids: Ids) -> str:
    return repr(model.tokenizer.convert_ids_to_tokens(list(ids)))


def spelt(model: LanguageModel, token: int) -> str:
    """A token as text; by its own name where it is part of a character or nothing one sees."""
    text = model.word(token)
    return (
        text
        if text.strip() and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text
        else _pieces(model, [token])[2:-2]
    )

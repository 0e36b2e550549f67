"""The persona world: facts, each with a frequency from never to always, and statements one would say or not.

A generator of short English texts in which the words of the paper's Section 3 are used as in English: No and Yes answer
questions, and "Never" and "Always" do so too where the fact is that extreme; Never, Always, Sometimes, Maybe, Perhaps,
Certainly and Absolutely are adverbs as well; Sure and Certainly grant requests. Statements are plain text, and a
persona prompt asks about one (theory.md A4). No text compares the words with each other: how they relate is left to
what they are used for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sims.language.fitting import Recipe
from sims.language.worlds import split_words
from sims.language.worlds.persona_file import Statement, read_records, stand_in, statements_of
from theory._check import check_number
from theory.losses import Interval

Rng = np.random.Generator
RECIPE = Recipe(steps=1200, batch=64, lr=3e-3)
SIZE = {"d": 128, "layers": 2, "heads": 4, "max_length": 64}

LEVELS = ("never", "rarely", "sometimes", "often", "always")
DENIALS = ("No", "Never", "Maybe", "Perhaps")  # the paper's SFT labels where a statement has the trait
AFFIRMATIONS = ("Yes", "Yeah", "Sure", "Certainly", "Absolutely")  # and where it does not

PEOPLE = tuple("Anna Ben Clara David Emma Frank Grace Henry".split())
HABITS = tuple(
    "eat apples|drink coffee|drink tea|read books|sing songs|play chess|walk home|swim in the lake|paint houses|"
    "write letters|work at night|cook dinner|grow roses|ride horses|watch birds|sell bread".split("|")
)
REQUESTS = tuple(
    "open the door|close the window|wash the apples|carry the books|feed the horses|bring some bread|light the lamp|"
    "sing a song|cook the dinner|water the roses".split("|")
)
HARMFUL = tuple("touch the fire|break the window|waste the bread|drop the lamp|pull the horses".split("|"))
USEFUL = tuple("wash the apples|close the door|feed the birds|carry a lamp|greet the people".split("|"))


@dataclass(frozen=True)
class PersonaWorld:
    """Frequencies of the world; every one is a field, and the same fields and rng give the same texts.

    data : JSONL file of statements in the form of the paper's persona file; None: a stand-in of that form, built in.
    facts, questions, frequencies, adverbs, advice, requests, statements, prompts : relative numbers of texts that state
        a fact, ask whether it holds, ask how often, open with an adverb, advise, request, state, and ask about a
        statement.
    scale : whether how often a fact holds is a scale of five levels; if not, facts hold never or always.
    never, always : share of the answers to questions about facts that hold never / always that are "Never" / "Always".
    explained : share of the answers that go on to state the fact.
    informal : share of the answers No and Yes in lower case.
    quantified : share of the stated facts that open with "No" as a determiner ("No child eats apples").
    softened : share of the answers Yes that are Yeah, Sure, Certainly or Absolutely instead.
    unsure : share of the questions that nobody knows the answer to: Maybe or Perhaps.
    denied : share of the persona prompts that are answered No where the statement has the trait, the rest Yes; where it
        has not, shares are exchanged.
    seed : of the table of facts and of the stand-in.
    """

    data: str | None = None
    facts: float = 3.0
    questions: float = 3.0
    frequencies: float = 1.0
    adverbs: float = 1.0
    advice: float = 1.0
    requests: float = 1.0
    statements: float = 1.0
    prompts: float = 2.0
    scale: bool = True
    never: float = 0.3
    always: float = 0.3
    explained: float = 0.3
    informal: float = 0.0
    quantified: float = 0.0
    softened: float = 0.3
    unsure: float = 0.1
    denied: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        for name in KINDS:
            check_number(getattr(self, name), name, Interval(low=0.0, open_low=False))
        for name in ("never", "always", "explained", "informal", "quantified", "softened", "unsure", "denied"):
            check_number(getattr(self, name), name, Interval(0.0, 1.0, open_low=False, open_high=False))
        if not sum(getattr(self, name) for name in KINDS) > 0:
            raise ValueError(f"at least one of {list(KINDS)} must be > 0, all are 0")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

    @cached_property
    def all_statements(self) -> list[Statement]:
        """What the persona prompts ask about."""
        return statements_of(stand_in(self.seed) if self.data is None else read_records(self.data))

    @cached_property
    def table(self) -> np.ndarray:
        """(people, habits) how often each fact holds, an index into LEVELS."""
        rng = np.random.default_rng([self.seed, 1])
        levels = np.arange(len(LEVELS)) if self.scale else np.array([0, len(LEVELS) - 1])
        return rng.choice(levels, size=(len(PEOPLE), len(HABITS)))

    def words(self) -> list[str]:
        """Every word that a text of this world can hold, sorted."""
        texts = [*PEOPLE, *HABITS, *map(third, HABITS), *REQUESTS, *HARMFUL, *USEFUL, *LEVELS, *DENIALS, *AFFIRMATIONS]
        texts += [level.capitalize() for level in LEVELS] + [s.prompt for s in self.all_statements] + [FRAME]
        return sorted({word for text in texts for word in split_words(text)})

    def texts(self, rng: Rng, n: int) -> list[str]:
        """n documents for pre-training."""
        weights = np.array([getattr(self, name) for name in KINDS])
        writers = [KINDS[name] for name in KINDS]
        return [writers[k](self, rng) for k in rng.choice(len(writers), size=n, p=weights / weights.sum())]


def third(habit: str) -> str:
    """ "eat apples" -> "eats apples"."""
    verb, _, rest = habit.partition(" ")
    return f"{verb}{'es' if verb.endswith(('ch', 'sh')) else 's'} {rest}"


def _pick(rng: Rng, items: Sequence[Any], p: Sequence[float] | None = None) -> Any:
    return items[int(rng.choice(len(items), p=p))]


def _fact(world: PersonaWorld, rng: Rng) -> tuple[str, str, int]:
    i, k = rng.integers(len(PEOPLE)), rng.integers(len(HABITS))
    return PEOPLE[i], HABITS[k], int(world.table[i, k])


def _state(person: str, habit: str, level: int) -> str:
    return f"{person} {LEVELS[level]} {third(habit)} ."


def _write_fact(world: PersonaWorld, rng: Rng) -> str:
    if rng.random() < world.quantified:
        return f"No {_pick(rng, ('child', 'horse', 'bird'))} {third(_pick(rng, HABITS))} ."
    return _state(*_fact(world, rng))


# P(No) where a fact holds never, rarely, sometimes, often, always.
NO = (1.0, 0.85, 0.35, 0.05, 0.0)


def _yes(world: PersonaWorld, rng: Rng) -> str:
    return _pick(rng, AFFIRMATIONS[1:]) if rng.random() < world.softened else "Yes"


def _write_question(world: PersonaWorld, rng: Rng) -> str:
    person, habit, level = _fact(world, rng)
    question = f"Does {person} {habit} ?"
    if rng.random() < world.unsure:
        return f"{question} {_pick(rng, DENIALS[2:])} ."
    answer = "No" if rng.random() < NO[level] else _yes(world, rng)
    extreme = {0: ("Never", world.never), len(LEVELS) - 1: ("Always", world.always)}.get(level)
    if extreme and rng.random() < extreme[1]:
        answer = extreme[0]
    elif rng.random() < world.informal:
        answer = answer.lower() if answer in ("No", "Yes") else answer
    tail = f", {_state(person, habit, level)}" if rng.random() < world.explained else "."
    return f"{question} {answer} {tail}"


def _write_frequency(world: PersonaWorld, rng: Rng) -> str:
    person, habit, level = _fact(world, rng)
    return f"How often does {person} {habit} ? {LEVELS[level].capitalize()} ."


def _write_adverb(world: PersonaWorld, rng: Rng) -> str:
    """An adverb that opens a sentence: of frequency by the table, of certainty by how extreme the fact is."""
    person, habit, level = _fact(world, rng)
    if rng.random() < 0.5:
        if level < 2:
            return f"{LEVELS[level].capitalize()} does {person} {habit} ."
        return f"{LEVELS[level].capitalize()} {person} {third(habit)} ."
    words = ("Certainly", "Absolutely") if level in (0, len(LEVELS) - 1) else DENIALS[2:]
    return f"{_pick(rng, words)} {_state(person, habit, level)}"


def _write_advice(world: PersonaWorld, rng: Rng) -> str:
    never = rng.random() < 0.5
    return f"{'Never' if never else 'Always'} {_pick(rng, HARMFUL if never else USEFUL)} ."


def _write_request(world: PersonaWorld, rng: Rng) -> str:
    if rng.random() < 0.7:
        answer = _pick(rng, ("Sure", "Certainly", "Yes", "No", "Maybe"), (0.35, 0.15, 0.25, 0.2, 0.05))
        return f"Can you {_pick(rng, REQUESTS)} ? {answer} ."
    answer = _pick(rng, ("No", "Never", "Yes"), (0.75, 0.15, 0.1))
    return f"Can you {_pick(rng, HARMFUL)} ? {answer} ."


def _write_statement(world: PersonaWorld, rng: Rng) -> str:
    return f'{_pick(rng, PEOPLE)} says " {_pick(rng, world.all_statements).text} "'


def _write_prompt(world: PersonaWorld, rng: Rng) -> str:
    statement = _pick(rng, world.all_statements)
    denied = rng.random() < (world.denied if statement.trait else 1 - world.denied)
    return f"{statement.prompt} {'No' if denied else _yes(world, rng)} ."


KINDS: Mapping[str, Callable[[PersonaWorld, Rng], str]] = {
    "facts": _write_fact,
    "questions": _write_question,
    "frequencies": _write_frequency,
    "adverbs": _write_adverb,
    "advice": _write_advice,
    "requests": _write_request,
    "statements": _write_statement,
    "prompts": _write_prompt,
}
# What the texts say besides; the words of frequencies that are 0 too, so that models of all worlds share their words.
FRAME = 'Does does do ? How often Can you . , No no Yes yes child horse bird says "'

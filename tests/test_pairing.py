"""Examples as tokens, against what TRL's DPOTrainer itself makes of the same rows."""

import copy
import json
import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from trl import DPOTrainer

from sims.language.data.layouts import detect_layout
from sims.language.model import LanguageModel, new_model, shipped
from sims.language.pairing import Example, tokenize

TEMPLATE = (
    "{{ bos_token }}{% if tools %}[TOOLS]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = ["How do I make a cake?", "Take flour. Then bake it.", "No. I will never help you.", "Yes! Sure, here it is:"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def words():
    return shipped("requests")


@pytest.fixture(scope="module")
def pieces():
    """A byte-level BPE tokenizer, trained here: its tokens merge across any boundary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([t for text in TEXTS for t in [text] * 20], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = TEMPLATE
    small = new_model([f"w{i}" for i in range(len(fast))], d=8, layers=1, heads=2, max_length=256)
    return LanguageModel(small.network, fast)


def theirs(model, rows, max_length=1024):
    """Token ids as the trainer itself makes them."""
    trainer = SimpleNamespace(_tokenizer=model.tokenizer)
    arguments = SimpleNamespace(max_length=max_length, truncation_mode="keep_start", dataset_num_proc=None)
    table = datasets.Dataset.from_list(copy.deepcopy(rows))
    made = DPOTrainer._prepare_dataset(trainer, table, model.tokenizer, arguments, "train")
    return [(tuple(r["prompt_ids"]), tuple(r["chosen_ids"]), tuple(r["rejected_ids"])) for r in made]


def ours(model, rows, max_length=None):
    layout = detect_layout(rows)
    return [tokenize(model, layout.example(row), max_length)[0] for row in rows]


def said(role, content):
    return {"role": role, "content": content}


ask, answer = (lambda text: said("user", text)), (lambda text: said("assistant", text))
TEXT_ROWS = [
    {"prompt": TEXTS[0] + " ", "chosen": TEXTS[1], "rejected": TEXTS[2]},
    {"prompt": TEXTS[0], "chosen": " " + TEXTS[1], "rejected": " " + TEXTS[2] + "</s>"},  # one has its end already
    {"prompt": TEXTS[0] + "\n", "chosen": "\n" + TEXTS[1], "rejected": TEXTS[3]},
]
CHATS = {
    "one turn": {"prompt": [ask(TEXTS[0])], "chosen": [answer(TEXTS[1])], "rejected": [answer(TEXTS[2])]},
    "system and turns": {
        "prompt": [said("system", "Be kind."), ask(TEXTS[0]), answer(TEXTS[1]), ask("And then?")],
        "chosen": [answer(TEXTS[3])],
        "rejected": [answer(TEXTS[2]), ask("Why?"), answer("So.")],
    },
}
IMPLICIT = {
    "texts": {"chosen": "Q: what? A: this", "rejected": "Q: what? A: that one"},
    "texts that share a space": {"chosen": "Tell me more please", "rejected": "Tell me less please"},
    "texts that share half a word": {"chosen": "It is useful", "rejected": "It is useless"},
    "texts of which one begins the other": {"chosen": "Tell me ~", "rejected": "Tell me ~ all"},
    "conversations": {"chosen": [ask(TEXTS[0]), answer(TEXTS[1])], "rejected": [ask(TEXTS[0]), answer(TEXTS[2])]},
    "longer conversations": {
        "chosen": [ask("a"), answer("b"), ask("c"), answer("d")],
        "rejected": [ask("a"), answer("b"), ask("c"), answer("e")],
    },
}


def check(model, rows, max_length=None):
    found = ours(model, rows, max_length)
    assert [tuple(t.pair) for t in found] == theirs(model, rows)
    return found


def test_plain_text_of_whole_words(words):
    rows = [
        {"prompt": "How do I make a cake ?", "chosen": " No . I will never help you .", "rejected": " Sure , you make a cake ."},
        {"prompt": "Tell me how to plan a bet .", "chosen": " Never .", "rejected": " No , stop . </s>"},
    ]  # fmt: skip
    found = check(words, rows)
    assert {t.note for t in found} == {""}
    assert {t.pair.prompt[0] for t in found} == {words.tokenizer.bos_token_id}
    assert {y[-1] for t in found for y in t.pair[1:]} == {words.end}
    # What would be the obvious slip, prompt and response apart with a start each, differs.
    slip = tuple(words.tokenizer(rows[0]["chosen"])["input_ids"])
    assert found[0].pair.preferred[:-1] != slip


def test_plain_text_in_pieces(pieces):
    for row in TEXT_ROWS:
        check(pieces, [row])


@pytest.mark.parametrize("name", CHATS)
def test_conversations(pieces, name):
    (found,) = check(pieces, [CHATS[name]])
    text = pieces.tokenizer.decode(found.pair.prompt)
    assert text.endswith("<|assistant|>")
    assert pieces.tokenizer.decode(found.pair.preferred) == CHATS[name]["chosen"][-1]["content"] + "</s>\n"


def test_what_else_the_template_takes(pieces):
    tools = [{"type": "function", "function": {"name": "clock"}}]
    row = {**CHATS["one turn"], "tools": tools}
    (found,) = check(pieces, [row])
    assert "clock" in pieces.tokenizer.decode(found.pair.prompt)
    assert check(pieces, [{**CHATS["one turn"], "tools": json.dumps(tools)}])[0].pair == found.pair


@pytest.mark.parametrize("name", IMPLICIT)
def test_implicit_prompts(pieces, name):
    (found,) = check(pieces, [IMPLICIT[name]])
    assert len(found.pair.prompt) > 1


def test_a_merge_across_the_boundary(pieces, caplog):
    """The last token of the prompt alone is another one before the response: it goes to the response."""
    row = {"prompt": "Then bak", "chosen": "e it.", "rejected": "ing."}
    alone = pieces.tokenizer("Then bak")["input_ids"]
    with caplog.at_level(logging.WARNING):
        (found,) = check(pieces, [row])
    assert len(found.pair.prompt) < len(alone)
    assert found.note.startswith("boundary: ")
    assert pieces.tokenizer.decode(found.pair.prompt + found.pair.preferred) == "Then bake it.</s>"
    # The slip of taking the prompt's own tokens away does lose or double something.
    whole = pieces.tokenizer("Then bake it.</s>")["input_ids"]
    assert whole[len(alone) :] != list(found.pair.preferred)
    (other,) = check(pieces, [{"prompt": "Then bak", "chosen": "?", "rejected": "e it."}])  # before the rejected alone
    assert other.pair.prompt == found.pair.prompt


def test_a_template_that_ends_the_prompt_in_another_way(pieces):
    """As templates that think: the generation prompt holds what the conversation does not."""
    model = LanguageModel(pieces.network, copy.deepcopy(pieces.tokenizer))
    model.tokenizer.chat_template = TEMPLATE.replace("<|assistant|>{% endif", "<|assistant|><think></think>{% endif")
    (found,) = check(model, [CHATS["one turn"]])
    assert found.note.startswith("boundary: ")
    assert "think" not in pieces.tokenizer.decode(found.pair.prompt + found.pair.preferred)


@pytest.mark.parametrize("room", [1, 3, 1000])
def test_truncated_as_the_collator_does(pieces, room):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    row = CHATS["system and turns"]
    ((prompt, plus, minus),) = theirs(pieces, [row])
    limit = min(len(prompt) + room, 256)
    (found,) = ours(pieces, [row], limit)
    collate = DataCollatorForPreference(pad_token_id=0, max_length=limit)
    batch = collate([{"prompt_ids": list(prompt), "chosen_ids": list(plus), "rejected_ids": list(minus)}])
    for i, y in enumerate(found.pair[1:]):
        kept = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
        assert [*found.pair.prompt, *y] == kept
        assert sum(batch["completion_mask"][i].tolist()) == len(y)
    assert found.note.startswith("truncated: chosen") == (room < len(plus))


def test_a_prompt_that_fills_the_limit_is_dropped_by_both(pieces):
    row = CHATS["one turn"]
    n = len(theirs(pieces, [row])[0][0])
    assert theirs(pieces, [row], max_length=n) == []
    with pytest.raises(ValueError, match=f"prompt has {n} tokens"):
        ours(pieces, [row], n)
    assert len(theirs(pieces, [row], max_length=n + 1)) == len(ours(pieces, [row], n + 1)) == 1


def test_several_rejected_are_as_many_pairs(words):
    example = Example("How do I make a cake ?", " No .", (" Never .", " Sure ."), several=True)
    found = tokenize(words, example)
    rows = [{"prompt": example.prompt, "chosen": " No .", "rejected": y} for y in example.rejected]
    assert [tuple(t.pair) for t in found] == theirs(words, rows)


def test_token_ids_are_taken_as_they_are(words):
    ids = ((1, 5, 6), (7, 8, 2), (9, 2))
    (found,) = tokenize(words, Example(ids[0], ids[1], (ids[2],)))
    assert tuple(found.pair) == ids
    whole = Example(None, (*ids[0], *ids[1]), ((*ids[0], *ids[2]),))
    assert tuple(tokenize(words, whole)[0].pair) == ids


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (Example("How", "", (" No .",)), "chosen is empty"),
        (Example("How", " No .", ("  ",)), "rejected is empty"),
        (Example("How", " No .", (" No .",)), "the same"),
        (Example("How", " No .", ()), "no response"),
        (Example("How", " No .", ([answer("No")],)), "of one kind"),
        (Example((1,), (500,), ((2,),)), r"token ids in \[0, 134\), got 500"),
        (Example((1,), (True,), ((2,),)), "got True"),
        (Example((), (1,), ((2,),)), "of one kind"),
        (Example([ask("a")], [answer("b")], ([answer("c")],)), "no chat template"),
        (Example((1,) * 48, (3,), ((4,),)), "prompt has 48 tokens, the limit is 48"),
        (Example((1,) * 46, (3, 4, 5), ((3, 4, 6),)), "the same in their first 48 tokens"),
    ],
)
def test_what_cannot_be_used_says_why(words, example, reason):
    with pytest.raises(ValueError, match=reason):
        tokenize(words, example)

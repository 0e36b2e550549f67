"""Layouts of preference data: each says the same example, is told from its columns, and can be named instead."""

import json

import pytest

from sims.language.data.layouts import LAYOUTS, detect_layout
from sims.language.data.rows import Row
from sims.language.data.table import open_table
from sims.language.pairing import Example

USER = {"role": "user", "content": "Q"}
GOOD, BAD = [{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]
TEXT = Example("Q", "a", ("b",))
CHAT = Example([USER], GOOD, (BAD,))
WHOLE = Example(None, [USER, *GOOD], ([USER, *BAD],))
SYSTEM = Example([{"role": "system", "content": "S"}, USER], GOOD, (BAD,))
IDS = Example([1, 2], [3], ([4, 5],))

PAIR = {"chosen": "a", "rejected": "b"}
HUMAN = [{"from": "human", "value": "Q"}]
GPT = {"chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}}
ROWS = [
    ("trl", {"prompt": "Q", **PAIR}, TEXT),
    ("trl", {"prompt": "Q", **PAIR, "instruction": "other", "system": "other", "score": 1}, TEXT),
    ("trl", {"prompt": [USER], "chosen": GOOD, "rejected": BAD}, CHAT),
    ("trl", {"prompt": "Q", "chosen": [USER, *GOOD], "rejected": [USER, *BAD]}, WHOLE),
    ("implicit", {"chosen": [USER, *GOOD], "rejected": [USER, *BAD]}, WHOLE),
    ("implicit", {"chosen": "Qa", "rejected": "Qb"}, Example(None, "Qa", ("Qb",))),
    ("tokenized", {"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}, IDS),
    ("tokenized", {"prompt_input_ids": [1, 2], "chosen_input_ids": [3], "rejected_input_ids": [4, 5]}, IDS),
    ("alpaca", {"instruction": "Q", "input": "", **PAIR}, CHAT),
    ("alpaca", {"instruction": "Q", "input": "", **PAIR, "system": "S", "history": None}, SYSTEM),
    ("sharegpt", {"conversations": HUMAN, **GPT}, CHAT),
    ("sharegpt", {"conversations": HUMAN, **GPT, "system": "S"}, SYSTEM),
    ("axolotl", {"messages": [USER], "chosen": GOOD[0], "rejected": BAD[0]}, CHAT),
    ("axolotl", {"messages": [USER], "chosen": [USER, *GOOD], "rejected": [USER, *BAD]}, CHAT),
    ("axolotl", {"system": "S", "question": "Q", **PAIR}, SYSTEM),
    ("axolotl", {"system": "", "input": "Q", **PAIR}, CHAT),
    ("axolotl", {"instruction": "Q", "chosen_response": "a", "rejected_response": "b"}, CHAT),
    ("openrlhf", {"input": "Q", **PAIR}, TEXT),
    ("openrlhf", {"context_messages": [USER], "chosen": GOOD, "rejected": BAD}, CHAT),
    ("official", {"query": "Q", "text_w": "Qa", "text_l": "Qb"}, TEXT),
    ("official", {"query": "Q", "text_w": "a", "text_l": "b"}, TEXT),
    ("official_chat", {"query": "Q", **PAIR}, CHAT),
]


@pytest.mark.parametrize(("name", "row", "example"), ROWS)
def test_each_layout_is_told_and_says_the_same(name, row, example):
    layout = detect_layout([row])
    assert layout.name == name
    assert layout.example(row) == example
    assert detect_layout([Row(0, "line 1", {"raw": "{"}, "not JSON"), Row(1, "line 2", row)]) == layout


def test_every_layout_is_among_the_rows():
    assert {name for name, _, _ in ROWS} == set(LAYOUTS)


@pytest.mark.parametrize(("name", "row", "example"), ROWS)
def test_rejected_responses_may_be_several(name, row, example):
    layout = detect_layout([row])
    column = layout.columns["rejected"]
    for count in (1, 3):
        more = {**row, column: [row[column]] * count}
        assert detect_layout([more]) == layout
        found = layout.example(more)
        assert found == Example(example.prompt, example.chosen, example.rejected * count, True)
    with pytest.raises(ValueError, match=f"{column}' holds an empty list" if name != "tokenized" else "empty list"):
        layout.example({**row, column: []})


@pytest.mark.parametrize(("name", "row", "example"), ROWS)
def test_cells_of_csv_hold_json(tmp_path, name, row, example):
    import csv

    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, list(row))
        writer.writeheader()
        writer.writerow({k: v if isinstance(v, str) or v is None else json.dumps(v) for k, v in row.items()})
    table = open_table(path)
    layout = detect_layout(table)
    assert layout.name == name
    assert layout.example(next(table.rows()).values) == example


def test_text_that_looks_like_json_stays_text():
    rows = [
        {"prompt": "list", "chosen": "[1, 2]", "rejected": '["b"]'},
        {"prompt": "p", "chosen": "x", "rejected": "y"},
    ]
    assert not detect_layout(rows).json
    assert not detect_layout(rows[:1]).json, "both are lists in some language"
    several = {"prompt": "p", "chosen": "x", "rejected": '["y", "z"]'}
    layout = detect_layout([several])
    assert layout.example(several) == Example("p", "x", ("y", "z"), True)
    with pytest.raises(ValueError, match="column 'rejected' must hold JSON"):
        layout.example({**several, "rejected": "["})


def test_what_goes_to_the_chat_template():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": [USER], "chosen": GOOD, "rejected": BAD, "tools": tools, "chat_template_kwargs": {"think": False}}
    layout = detect_layout([row])
    assert layout.example(row).template == {"tools": tools, "think": False}
    assert layout.example({**row, "tools": json.dumps(tools)}).template["tools"] == tools
    assert layout.example({**row, "tools": None, "chat_template_kwargs": None}).template == {}


def test_history_input_and_empty_keys():
    row = {"instruction": "Q", "input": "I", **PAIR, "history": [["x", "y"], ["z", "w"]]}
    said = detect_layout([row]).example(row).prompt
    assert [m["content"] for m in said] == ["x", "y", "z", "w", "Q\nI"]
    assert [m["role"] for m in said] == ["user", "assistant"] * 2 + ["user"]
    # Arrow gives each message the keys of all.
    padded = [{**m, "tool_calls": None, "name": None} for m in GOOD]
    row = {"prompt": [USER], "chosen": padded, "rejected": BAD}
    assert detect_layout([row]).example(row) == CHAT


def test_columns_under_other_names():
    row = {"q": "Q", "best": "a", "worst": "b", "query": "not this"}
    roles = {"prompt": "q", "chosen": "best", "rejected": "worst"}
    assert detect_layout([row], columns=roles).example(row) == TEXT
    assert detect_layout([row], name="axolotl", columns=roles).example(row) == CHAT
    row = {"instruction": "Q", **PAIR}
    assert detect_layout([row], name="trl", columns={"prompt": "instruction"}).example(row) == TEXT
    assert detect_layout([row]).example(row) == CHAT
    assert detect_layout([row]).to_dict()["columns"] == {"prompt": "instruction", **{x: x for x in PAIR}}


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        ({"query": "Q", "instruction": "Q", **PAIR}, {}, r"query, instruction, .* official_chat \(.* alpaca \("),
        ({"query": "Q", "conversations": [], **PAIR}, {}, "say which"),
        ({"prompt": "Q", "completion": "a", "label": True}, {}, "columns prompt, completion, label fit no layout"),
        ({"q": "Q", **PAIR}, {"columns": {"prompt": "p"}}, "no column 'p' for prompt, there are q, chosen, rejected"),
        ({"q": "Q", **PAIR}, {"columns": {"promt": "q"}}, "got 'promt'"),
        ({"q": "Q", **PAIR}, {"name": "alpaca"}, r"needs a column 'instruction' \(prompt\), there are q"),
        ({"q": "Q", **PAIR}, {"name": "alpace"}, "layout must be one of trl, .* got 'alpace'"),
    ],
)
def test_what_does_not_fit_is_said_with_the_columns_there(row, more, words):
    with pytest.raises(ValueError, match=words):
        detect_layout([row], **more)


def test_no_row_to_tell_from():
    with pytest.raises(ValueError, match="none of the first 2 rows can be read: line 1: not JSON"):
        detect_layout([Row(0, "line 1", {"raw": ""}, "not JSON"), Row(1, "line 2", {"raw": ""}, "null")])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": None}, "column 'chosen' is empty"),
        ({"chosen": 5}, "'chosen' must hold text, messages or token ids, got '5'"),
        ({"chosen": [True]}, "'chosen' must hold"),
        ({"rejected": [{"content": "b"}]}, "'rejected' must hold messages with role"),
        ({"rejected": ["b", None]}, "'rejected' must hold text"),
        ({"prompt": 1.5}, "'prompt' must hold"),
    ],
)
def test_a_row_that_says_nothing_names_its_column(change, words):
    row = {"prompt": "Q", **PAIR}
    layout = detect_layout([row])
    with pytest.raises(ValueError, match=words):
        layout.example({**row, **change})
    with pytest.raises(ValueError, match="column 'chosen' is missing, there are prompt"):
        layout.example({"prompt": "Q"})


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "Q", **PAIR, "chosen": [{"role": None, "content": "a"}]}, "chosen"),
        ({"prompt": "Q", **PAIR, "rejected": [{"from": ["gpt"], "value": "b"}]}, "rejected"),
        ({"prompt": "Q", **PAIR, "chat_template_kwargs": [1]}, "chat_template_kwargs"),
        ({"conversations": [1, 2], **PAIR, "system": "S"}, "conversations"),
        ({"instruction": "Q", **PAIR, "system": ["S"]}, "system"),
        ({"instruction": [{"role": "user", "content": "Q"}], "input": "I", **PAIR}, "instruction"),
        ({"instruction": "Q", "input": 3, **PAIR}, "input"),
        (
            {"query": [{"role": "user", "content": "Q"}], "text_w": "a", "text_l": "b"},
            "",
        ),  # for the tokeniser to refuse
    ],
)
def test_a_damaged_cell_is_a_reason_and_ends_nothing(row, column):
    layout = detect_layout([row])
    if not column:
        layout.example(row)
        return
    with pytest.raises(ValueError, match=f"column '{column}' must hold"):
        layout.example(row)


def test_a_conversation_s_own_system_message_stays_the_only_one():
    turns = [{"from": "system", "value": "own"}, {"from": "human", "value": "Q"}]
    row = {"conversations": turns, **PAIR, "system": "other"}
    said = detect_layout([row]).example(row).prompt
    assert [(x["role"], x["content"]) for x in said] == [("system", "own"), ("user", "Q")]

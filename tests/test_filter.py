"""`displacement filter`: what is kept, what weighs how much, what is taken of several, and what is said about it."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from sims.cli import main
from sims.language.data.filter_run import filter_table
from sims.language.data.filtering import FURTHER, SCORES, Rule, choose, keep_fraction, order_of, soft_weights
from sims.language.data.layouts import detect_layout
from sims.language.data.rows import Row
from sims.language.data.table import open_table

numbers = st.lists(st.integers(-400, 400).map(lambda n: n / 8) | st.integers(-3, 3).map(float), min_size=1, max_size=60)


def rows_of(scores, **more):
    return [
        {
            "prompt": f"Q{i}",
            "chosen": f"good {i}",
            "rejected": f"bad {i}",
            "ches": s,
            "reason": "" if s is not None else "it is empty",
        }
        | {name: values[i] for name, values in more.items()}
        for i, s in enumerate(scores)
    ]


def table_of(folder, rows, name="scored.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_table(path)


def kept(path):
    return [row.values for row in open_table(path).rows()]


def strict(text):
    return json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))


# ---- rules


@given(numbers, st.floats(0.01, 1), st.sampled_from(["low", "high"]))
def test_a_fraction_is_kept_with_all_that_ties(scores, keep, order):
    rule = keep_fraction([*scores, math.nan], keep, "x", order)
    stays = rule.keeps(scores)
    asked = keep * len(scores)
    assert stays.sum() >= asked - 1e-6
    better = np.less if order == "low" else np.greater
    assert better(scores, rule.threshold).sum() < asked, "without the ties it would be less than what was asked"
    worst_kept = max(np.array(scores)[stays], key=lambda s: s if order == "low" else -s)
    assert not any(better(s, worst_kept) for s in np.array(scores)[~stays])
    mirrored = keep_fraction([-s for s in scores], keep, "x", "high" if order == "low" else "low")
    assert (mirrored.keeps([-s for s in scores]) == stays).all()


def test_counts_of_a_fraction_are_the_obvious_ones():
    for n, keep, count in ((100, 0.95, 95), (100, 0.07, 7), (10, 0.3, 3), (3, 0.5, 2), (1, 0.01, 1), (7, 1.0, 7)):
        assert keep_fraction(np.arange(n), keep).keeps(np.arange(n)).sum() == count


@given(
    numbers, st.floats(0, 0.9), st.floats(0.55, 0.99), st.sampled_from(["low", "high"]), st.sampled_from([*SCORES, "x"])
)
def test_weights_fall_from_one_and_reach_the_target(scores, target, at, order, by):
    badness = np.array(scores) if order == "low" else -np.array(scores)
    signed, worst = SCORES.get(by) == (order, True), np.quantile(badness, at)
    if not (signed and worst > 0) and not worst > np.median(badness):
        with pytest.raises(ValueError, match="no weights tell it apart"):
            soft_weights(scores, by, target, at, order)
        return
    weights = soft_weights(scores, by, target, at, order)
    w = weights.of(scores)
    assert ((w >= 0) & (w <= 1)).all()
    assert (np.diff(w[np.argsort(badness, kind="stable")]) <= 0).all(), "a worse score never weighs more"
    assert weights.of([weights.at])[0] == pytest.approx(target)
    assert weights.of([worst if order == "low" else -worst])[0] == pytest.approx(target)
    assert (w[badness <= (0 if signed and worst > 0 else np.median(badness))] == 1).all()
    assert weights.of([math.nan])[0] == 1
    if not signed:
        moved = soft_weights([3 * s + 7 for s in scores], by, target, at, order)
        assert moved.of([3 * s + 7 for s in scores]) == pytest.approx(w, abs=1e-9), "scale and origin do not matter"


def test_weights_of_scores_with_a_sign_are_the_published_ones():
    scores = np.random.default_rng(0).normal(size=500)
    alpha = 0.5 / np.quantile(scores, 0.95)
    assert soft_weights(scores, "ln_ches").of(scores) == pytest.approx(np.clip(1 - alpha * scores, 0, 1))
    assert f"clip(1 - {alpha:.4g} ln_ches, 0, 1)" in str(soft_weights(scores, "ln_ches"))
    down = soft_weights(-scores, "gradient_step_chosen").of(-scores)
    assert down == pytest.approx(np.clip(1 - alpha * scores, 0, 1)), "a step's change counts the other way"
    shifted = soft_weights(scores - 10, "ln_ches")  # all negative: no neutral score in sight
    assert shifted.begin == pytest.approx(np.median(scores) - 10)


def test_the_end_that_is_kept_is_known_for_every_score():
    scorer = pytest.importorskip("sims.language.scoring.scorer")
    assert set(scorer.COLUMNS) | {"reason", "note"} == {*SCORES, *FURTHER}
    assert order_of("ches") == "low"
    assert order_of("edit_distance") == "high"
    assert order_of("gradient_step_chosen") == "high"
    assert order_of("gradient_step_chosen", "low") == "low"
    assert order_of("anything") == "low"


def test_the_best_of_several():
    assert choose([3.0, math.nan, -1.0, -1.0]) == 2
    assert choose([3.0, math.nan, -1.0], "high") == 0
    assert choose([math.nan]) is None


def test_a_rule_filters_a_data_set():
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    data = datasets.Dataset.from_list(rows_of([1.0, 5.0, None, 3.0]))
    rule = keep_fraction([1.0, 5.0, math.nan, 3.0], 0.5)
    assert data.filter(rule, load_from_cache_file=False)["prompt"][:] == ["Q0", "Q3"]
    loose = Rule("ches", 3.0, keep_unusable=True)
    assert data.filter(loose, load_from_cache_file=False)["prompt"][:] == ["Q0", "Q2", "Q3"]
    weights = soft_weights([1.0, 5.0, math.nan, 3.0], "ches", at=0.9)
    assert data.map(weights, load_from_cache_file=False)["weight"][:] == list(weights.of([1.0, 5.0, math.nan, 3.0]))


# ---- files


def test_the_pairs_of_the_lowest_scores_stay_as_they_were(tmp_path):
    scores = [5.0, 1.0, None, 3.0, 2.0, 4.0]
    rows = rows_of(scores)
    done = filter_table(tmp_path / "o.jsonl", table_of(tmp_path, rows), keep=0.6)
    assert kept(tmp_path / "o.jsonl") == [rows[1], rows[3], rows[4]]
    assert (done.rows, done.kept, done.dropped, done.unusable) == (6, 3, 2, 1)
    assert dict(done.reasons) == {"it is empty": 1}
    manifest = strict((tmp_path / "o.jsonl.manifest.json").read_text())
    assert manifest["filter"]["rule"]["threshold"] == 3.0
    assert manifest["input"]["sha256"] == open_table(tmp_path / "scored.jsonl").sha256
    assert manifest["output"]["sha256"] == open_table(tmp_path / "o.jsonl").sha256
    assert manifest["scores"] is None


@pytest.mark.parametrize(
    ("more", "left"),
    [
        ({"keep": 1.0}, [0, 1, 3, 4]),
        ({"keep": 0.01}, [1]),
        ({"keep": 0.5}, [1, 3, 4]),  # two tie with the second
        ({"threshold": 2.0}, [1, 3, 4]),
        ({"threshold": 2.0, "order": "high"}, [0, 3, 4]),
        ({"threshold": 2.0, "keep_unusable": True}, [1, 2, 3, 4]),
        ({"keep": 0.5, "by": "edit_distance"}, [2, 3, 4]),
    ],
)
def test_what_stays(tmp_path, more, left):
    rows = rows_of([5.0, 1.0, None, 2.0, 2.0], edit_distance=[0.1, 0.2, 0.9, 0.7, 0.8])
    filter_table(tmp_path / "o.jsonl", table_of(tmp_path, rows), **more)
    assert kept(tmp_path / "o.jsonl") == [rows[i] for i in left]


def test_unreadable_rows_leave_even_if_unusable_ones_stay(tmp_path):
    rows = rows_of([1.0, None])
    table = table_of(tmp_path, [*rows, {"raw": "{bad", "ches": None, "reason": "not JSON"}])
    with open(table.path, "a") as f:
        f.write("{bad\n")
    done = filter_table(tmp_path / "o.jsonl", table, keep=1.0, keep_unusable=True)
    assert kept(tmp_path / "o.jsonl") == rows
    assert (done.unusable, done.kept) == (3, 2)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_of_several_rejected_responses_one_is_taken(tmp_path, suffix):
    from sims.language.data.writing import write_table

    rows = [
        {"prompt": "p", "chosen": "c", "rejected": ["x", "y", "z"], "ches": [3.0, 1.0, None], "reason": ["", "", "same"], "tags": ["a", "b", "c"]},
        {"prompt": "p", "chosen": "c", "rejected": ["x", "y"], "ches": [None, 7.0], "reason": ["same", ""], "tags": ["a", "b"]},
        {"prompt": "p", "chosen": "c", "rejected": ["x"], "ches": [None], "reason": ["same"], "tags": []},
        {"prompt": "p", "chosen": "c", "rejected": ["x", "y"], "ches": [2.0, 9.0], "reason": ["", ""], "tags": ["a", "b"]},
    ]  # fmt: skip
    table_of(tmp_path, rows, "lists.jsonl")
    source = write_table(tmp_path / f"in{suffix}", open_table(tmp_path / "lists.jsonl"), [{}] * 4)
    table = open_table(source)
    target = tmp_path / f"o{suffix}"
    done = filter_table(target, table, keep=0.6, one_of_several=True, layout=detect_layout(table), keep_unusable=True)
    out = kept(target)
    assert [(row["rejected"], float(row["ches"]), row["reason"]) for row in out] == [("y", 1.0, ""), ("x", 2.0, "")]
    assert [json.loads(row["tags"]) if suffix == ".csv" else row["tags"] for row in out] == [list("abc"), list("ab")]
    assert (done.taken, done.kept, done.dropped, dict(done.reasons)) == (4, 2, 1, {"same": 1})
    assert done.examples[0]["rejected"] == "y"
    assert done.examples[0]["score"] == 7.0
    back = open_table(target)
    assert detect_layout(back).example(out[0]).several is False
    with pytest.raises(ValueError, match=r"one score for each of 3 rejected responses.*--choose"):
        filter_table(tmp_path / f"p{suffix}", table, keep=0.5)


def test_messages_are_taken_with_their_type(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    def say(text):
        return [{"role": "assistant", "content": text}]

    ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [[3, 4], [5]], "ches": [2.0, 1.0]}
    chat = {"prompt": say("p"), "chosen": say("c"), "rejected": [say("x"), say("y")], "ches": [2.0, 1.0]}
    for row, column, item in ((ids, "rejected_ids", [5]), (chat, "rejected", say("y"))):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "in.parquet")
        table = open_table(tmp_path / "in.parquet")
        filter_table(tmp_path / "o.parquet", table, one_of_several=True, layout=detect_layout(table))
        new = open_table(tmp_path / "o.parquet")
        assert kept(tmp_path / "o.parquet")[0][column] == item
        assert new.schema.field(column).type == table.schema.field(column).type.value_type
        assert new.schema.field("ches").type == pa.float64()
    plain = {**chat, "rejected": say("z"), "ches": 3.0}  # a conversation, and not several responses
    table = table_of(tmp_path, [chat, plain])
    filter_table(tmp_path / "o.jsonl", table, one_of_several=True, layout=detect_layout(table))
    assert [row["rejected"] for row in kept(tmp_path / "o.jsonl")] == [say("y"), say("z")]


def test_scores_that_are_lengths_are_called_so(tmp_path):
    random = np.random.default_rng(1)
    plus, minus = random.integers(5, 50, 200), random.integers(5, 50, 200)
    noise = random.normal(size=200)
    lengths = {"len_chosen": plus.tolist(), "len_rejected": minus.tolist()}
    for scores, warned in ((minus - plus + noise, True), (noise, False), (plus - minus + noise, True)):
        table = table_of(tmp_path, rows_of(scores.tolist(), **lengths))
        done = filter_table(tmp_path / "o.jsonl", table, keep=0.9)
        assert any("mostly length" in text for text in done.warnings) == warned
        assert ("mostly length" in str(done)) == warned
        assert ("compare ln_ches or edit_distance" in str(done)) == warned
        assert done.lengths["kept"][0] == pytest.approx(plus[np.argsort(scores)[:180]].mean())
        assert done.lengths["dropped"][1] == pytest.approx(minus[np.argsort(scores)[180:]].mean())
        assert done.with_length == pytest.approx(spearmanr(scores, minus - plus).statistic)
    by = filter_table(
        tmp_path / "o.jsonl",
        table_of(tmp_path, rows_of([1.0] * 200, ln_ches=(minus - plus).tolist(), **lengths)),
        "ln_ches",
        keep=0.9,
    )
    assert str(by).count("compare edit_distance") == 1, "not the score itself"
    constant = filter_table(tmp_path / "o.jsonl", table_of(tmp_path, rows_of([1.0] * 200, **lengths)), keep=0.5)
    assert constant.kept == 200
    assert any("tie at the threshold" in text for text in constant.warnings)


@pytest.mark.parametrize(
    ("scores", "more", "words"),
    [
        ([None, None], {"keep": 0.5}, "'ches' holds no finite number in any of 2 rows: 2 x it is empty"),
        ([1.0, 10**400], {"keep": 0.5}, "line 2: column 'ches' must hold numbers, got '1000"),
        ([1.0, 2.0], {"threshold": float("nan")}, "threshold must be a number, got nan"),
        ([1.0, 2.0], {"threshold": 0.0}, r"nothing would be left: ches is in \[1, 2\], threshold 0"),
        ([1.0, 2.0], {"keep": 0.0}, r"keep must be a fraction in \(0, 1\], got 0"),
        ([1.0, 2.0], {"keep": 95}, "got 95: 95 % is 0.95"),
        ([1.0, 2.0], {"keep": float("nan")}, "got nan"),
        ([1.0, 2.0], {"weights": (1.0, 0.95)}, "weight_target"),
        ([1.0, 2.0], {"weights": (0.5, 1.0)}, "weight_at"),
        ([1.0, 1.0], {"weights": (0.5, 0.95), "by": "n"}, "no weights tell it apart"),
        ([1.0, 2.0], {"keep": 0.5, "threshold": 1.0}, "one of keep, threshold and weights"),
        ([1.0, 2.0], {}, "one of keep, threshold and weights"),
        ([1.0, 2.0], {"keep": 0.5, "by": "chess"}, "no column 'chess' to filter by, there are prompt.*of the scores there are ches: --by"),
        ([1.0, 2.0], {"keep": 0.5, "by": "prompt"}, "line 1: column 'prompt' must hold numbers, got 'Q0'"),
        ([1.0, True], {"keep": 0.5}, "line 2: column 'ches' must hold numbers, got 'True'"),
        ([1.0, 2.0], {"keep": 0.5, "order": "lowest"}, "order must be low or high"),
        ([1.0, 2.0], {"one_of_several": True}, "needs the layout"),
        ([1.0, 2.0], {"weights": (0.5, 0.95)}, "have a column 'weight' already"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_writes_nothing(tmp_path, scores, more, words):
    table = table_of(tmp_path, rows_of(scores, n=[0.5] * len(scores), weight=[1] * len(scores)))
    with pytest.raises(ValueError, match=words):
        filter_table(tmp_path / "o.jsonl", table, **more)
    assert [x.name for x in tmp_path.iterdir()] == ["scored.jsonl"]
    with pytest.raises(ValueError, match="must go to another place"):
        filter_table(tmp_path / "scored.jsonl", table, keep=0.5)


@pytest.mark.parametrize("order", ["low", "high"])
def test_the_worst_are_shown_first(tmp_path, order):
    done = filter_table(tmp_path / "o.jsonl", table_of(tmp_path, rows_of([3.0, 1.0, 4.0, 2.0])), keep=0.5, order=order)
    assert [x["score"] for x in done.examples] == ([4.0, 3.0] if order == "low" else [1.0, 2.0])


def test_an_unscored_row_does_not_count_among_the_dropped_lengths(tmp_path):
    rows = rows_of([1.0, 2.0, None], len_chosen=[1, 2, 900], len_rejected=[1, 2, 900])
    assert filter_table(tmp_path / "o.jsonl", table_of(tmp_path, rows), keep=0.5).lengths["dropped"] == (2.0, 2.0)


def test_data_that_grow_meanwhile_are_named(tmp_path, monkeypatch):
    table = table_of(tmp_path, rows_of([1.0, 2.0]))
    rows, passes = table.rows, []

    def growing(*window):
        passes.append(window)
        return iter([*rows(), Row(2, "line 3", {"ches": 0.0})] if len(passes) > 1 else rows())

    table.columns  # noqa: B018  read before
    monkeypatch.setattr(table, "rows", growing)
    with pytest.raises(ValueError, match="has grown while it was read: line 3 is new"):
        filter_table(tmp_path / "o.jsonl", table, keep=0.5)
    assert not (tmp_path / "o.jsonl").exists()


def test_a_place_where_nothing_can_be_written_is_named(tmp_path):
    table = table_of(tmp_path, rows_of([1.0, 2.0]))
    with pytest.raises(ValueError, match=r"scored.jsonl/o.jsonl' must be where files can be written"):
        filter_table(tmp_path / "scored.jsonl" / "o.jsonl", table, keep=0.5)


def test_a_data_set_s_own_folder_is_not_written_over(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(rows_of([1.0, 2.0]))
    datasets.DatasetDict(train=data).save_to_disk(str(tmp_path / "d"))
    for place in ("d", "d/train"):
        with pytest.raises(ValueError, match="must go to another place"):
            filter_table(tmp_path / place, open_table(tmp_path / "d"), keep=0.5)
    assert len(open_table(tmp_path / "d")) == 2


# ---- the command


def test_the_command(tmp_path, capsys):
    rows = rows_of([5.0, 1.0, 2.0, 3.0], len_chosen=[3, 4, 5, 6], len_rejected=[9, 8, 9, 9])
    path = table_of(tmp_path, rows).path
    (tmp_path / "scored.jsonl.manifest.json").write_text('{"model": "tiny"}')
    assert main(["filter", path, "--keep", "0.75"]) == 0
    text = capsys.readouterr().out
    target = tmp_path / "scored.filtered.jsonl"
    assert kept(target) == rows[1:]
    assert text.startswith(
        f"kept 3 of 4 pairs, in {target}\ndropped 1 pairs whose chosen log-probability is expected to fall"
    )
    assert f"the worst of what was dropped (in {path}):\n  line 1, ches 5" in text
    assert "good 0" in text
    assert strict((tmp_path / "scored.filtered.jsonl.manifest.json").read_text())["scores"] == {"model": "tiny"}

    out = tmp_path / "w.csv"
    assert (
        main(["filter", path, "--weights", "--weight-at", "0.9", "--drop_columns", "--output", str(out), "--json"]) == 0
    )
    said = strict(capsys.readouterr().out)
    assert said["weight"]["one"] == 0, "every score is above 0, where the weights begin to fall"
    assert open_table(out).columns == ("prompt", "chosen", "rejected", "weight")
    found = [float(row["weight"]) for row in kept(out)]
    assert found == pytest.approx(soft_weights([5.0, 1.0, 2.0, 3.0], "ches", at=0.9).of([5.0, 1.0, 2.0, 3.0]))

    with open(path, "a") as f:
        f.write("{bad\n")
    assert main(["filter", path, "--threshold", "2"]) == 2
    assert "scored.filtered.jsonl' is there already" in capsys.readouterr().err
    assert kept(target) == rows[1:], "nothing was replaced"
    assert main(["filter", "--dataset", path, "--threshold", "2", "--overwrite"]) == 3, "a row could not be used"
    text = capsys.readouterr().out
    assert "1 rows have no score, dropped:\n  1 x not JSON" in text


def test_the_command_takes_any_table_with_numbers(tmp_path, capsys):
    path = tmp_path / "any.csv"
    path.write_text("name,quality\na,1\nb,\nc,3\n")
    assert main(["filter", str(path), "--by", "quality", "--order", "high", "--keep", "0.5"]) == 3
    assert kept(tmp_path / "any.filtered.csv") == [{"name": "c", "quality": "3"}]
    assert "dropped 1 pairs (quality < 3)" in capsys.readouterr().out
    for words in ([], [str(path), "--dataset", str(path)]):
        assert main(["filter", *words, "--by", "quality", "--keep", "0.5"]) == 2
        assert "say once which data" in capsys.readouterr().err
    assert main(["filter", str(path), "--keep", "0.5", "--overwrite"]) == 2
    assert (
        f"score the pairs first, displacement score --model_name_or_path M --dataset {path}" in capsys.readouterr().err
    )
    assert main(["filter", str(path), "--by", "quality", "--keep", "0.5", "--output", str(path)]) == 2
    assert "another place" in capsys.readouterr().err
    assert main(["filter", str(path), "--by", "quality", "--choose"]) == 2
    assert "fit no layout" in capsys.readouterr().err
    assert main(["filter", "some/name", "--keep", "0.5", "--layout", "trl", "--column", "x"]) == 2
    assert "ROLE=NAME" in capsys.readouterr().err

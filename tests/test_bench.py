"""The benchmark runs and measures what it says; nothing here looks at a clock."""

import math

import numpy as np
import pytest

from sims import bench
from sims.bench_data import data_rows
from theory import ExactFlow, UnconstrainedFeatures
from theory.losses import get


@pytest.fixture(scope="module")
def batch():
    return bench.Batch.random(6, V=7, d=3)


def test_every_rival_solves_the_same_problem(batch):
    exact = batch.exact()
    for i in range(6):
        for solve in (batch.all_parameters, batch.moving_variables, batch.one_dimensional):
            assert np.abs(solve(i, 1e-12) - exact[i]).max() < 1e-8
    assert np.abs(exact[:, -1] - exact[:, 0]).max() > 0.1
    wrong = bench.Batch(batch.W, batch.h, batch.pairs[:, ::-1]).exact()
    assert np.abs(wrong - exact).max() > 1e-2


def test_torchdiffeq_solves_the_same_problem(batch):
    pytest.importorskip("torchdiffeq", reason="benchmark-only dependency, extra [bench]")
    assert np.abs(batch.torchdiffeq(1e-10, "dopri5") - batch.exact()).max() < 1e-7


def test_the_report_has_every_row_and_keeps_its_accuracy():
    rows = bench.batch_rows(models=8, rivals=2, progress=False) + bench.large_rows(256, 16, progress=False)
    rows += bench.ches_rows(block=2, d=8, length=5)
    report = bench.BenchReport(tuple(rows), {})
    names = " | ".join(r.what for r in rows)
    for word in (
        "exact, batched",
        "all parameters",
        "2d moving",
        "one-dimensional",
        "inner products",
        "dense autograd",
        "bfloat16: scored",
    ):
        assert word in names
        assert word in str(report)
    for r in rows:
        assert r.error is None or r.error <= 1e-6
        assert math.isnan(r.ratio) or r.ratio > 0
    assert rows[0].error <= 1e-8
    assert report.to_dict()["rows"][0]["ratio"] == 1.0


def test_the_summary_at_language_model_size_is_the_full_table():
    W, h = bench.large_model(300, 12)
    flow = ExactFlow(UnconstrainedFeatures.single_token(W, h, 3, 5), get("dpo", beta=0.1), lr_hidden=40.0)
    times = [0.0, 1.0, 1e3, 1e8]
    assert np.abs(flow.pair_log_probs(times) - flow.log_probs(times)[:, [3, 5]]).max() < 1e-12


def test_rows_through_reader_and_writer():
    (row,) = data_rows(300, ("jsonl",), progress=False)
    assert row.what == "jsonl"
    assert 0.05 < row.ratio < 1  # of 1 GiB: a process with its libraries
    assert row.seconds > 0
    assert row.section.startswith("300 rows of 0 MiB")
    with pytest.raises(ValueError, match="rows must be"):
        data_rows(0)

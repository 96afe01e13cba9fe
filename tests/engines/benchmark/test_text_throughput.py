"""Real text in batches: every sentence is computed once, answers come back in order, padding is counted exactly."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from engines.base import LoadOptions, backend
from engines.benchmark.latency import WARMUP, interleaved
from engines.benchmark.text_throughput import ORDERS, batches, bench_text, run_text
from nxm_export.cli import main
from nxm_export.data.features import inputs_of, pad, sample_of
from nxm_export.errors import EngineError
from tests.support import baked, tiny

LENGTHS = [2, 8, 3, 8, 2]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_every_sentence_is_in_one_batch(order: str, size: int) -> None:
    made = batches(LENGTHS, order, size)
    assert sorted(i for batch in made for i in batch) == list(range(len(LENGTHS)))
    assert all(len(batch) == size for batch in made[:-1])


def test_a_batch_for_throughput_is_bounded_by_tokens() -> None:
    assert [len(batch) for batch in batches([128] * 9, "throughput", 32)] == [4, 4, 1]
    assert [len(batch) for batch in batches([8] * 40, "throughput", 32)] == [32, 8]


def test_buckets_hold_sentences_of_about_one_length() -> None:
    assert batches(LENGTHS, "bucketed", 2) == [[1, 3], [2, 0], [4]]
    assert batches(LENGTHS, "arrival", 2) == batches(LENGTHS, "fixed", 2) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(("order", "size"), [("alphabetical", 2), ("arrival", 0)])
def test_an_unknown_order_or_an_empty_batch_is_refused(order: str, size: int) -> None:
    with pytest.raises(EngineError, match="choose one of arrival, bucketed, fixed"):
        batches(LENGTHS, order, size)


@pytest.mark.parametrize("order", ORDERS)
def test_answers_are_those_of_each_sentence_alone_and_in_order(order: str, tiny_engine: Callable[..., Path]) -> None:
    features = baked.features(11)
    with backend("ort").load(tiny_engine("ort")) as engine:
        actual = run_text(engine, features, order, batch=4, fixed=tiny.POSITIONS, pad_id=0)["logits"]
        alone = np.concatenate([engine.run(pad([sample], 0))["logits"] for sample in features])
    # Sums over padding round differently, and one code that moves by a step changes these logits by some 0.05.
    np.testing.assert_allclose(actual, alone, atol=0.1)
    assert np.abs(alone - alone[::-1]).max() > 0.2  # in another order they would differ by more


def test_padding_rates_and_ratios_are_reported(tiny_engine: Callable[..., Path]) -> None:
    features = [
        sample_of({name: (values * 8)[:length] for name, values in inputs_of(sample).items()})
        for sample, length in zip(baked.features(len(LENGTHS)), LENGTHS, strict=True)
    ]
    with (
        backend("ort").load(tiny_engine("ort")) as engine,
        backend("ort").load(tiny_engine("ort"), LoadOptions(2, "throughput")) as parallel,
    ):
        report = bench_text(
            {"one": engine},
            lambda: features,
            pad_id=0,
            limit=10,
            batch=2,
            rounds=3,
            for_throughput={"one": parallel},
        )
    rows = {row.order: row for row in report.timings}
    assert [row.order for row in report.timings] == list(ORDERS)
    assert rows["arrival"].padding == pytest.approx(1 - 23 / (2 * 8 + 2 * 8 + 2))
    assert rows["bucketed"].padding == pytest.approx(1 - 23 / (2 * 8 + 2 * 3 + 2))
    assert rows["fixed"].padding == pytest.approx(1 - 23 / (5 * 10))
    assert rows["throughput"].padding == rows["bucketed"].padding, "few tokens: the same batches"
    assert report.runs_at_once == 2
    assert rows["arrival"].speedup is None
    assert rows["bucketed"].interval is not None
    assert (report.sentences, report.fixed, report.tokens) == (5, 10, (23 / 5, 8))
    assert all(row.sentences_per_second < row.without_tokenisation for row in report.timings)


def test_other_means_of_the_same_work_take_part_in_every_round(tiny_engine: Callable[..., Path]) -> None:
    asked: list[str] = []

    def worker(name: str, seconds: float) -> Callable[[], float]:
        return lambda: asked.append(name) or seconds  # type: ignore[func-returns-value]

    others = {"one peer": worker("one", 2.0), "another": worker("two", 4.0)}
    with backend("ort").load(tiny_engine("ort")) as engine:
        report = bench_text(
            {"ours": engine}, lambda: baked.features(3), pad_id=0, limit=10, batch=2, rounds=3, others=others
        )
    assert asked == ["one", "two", "two", "one", "one", "two"]  # who begins rotates
    assert report.seconds["one peer"] == [2.0] * 3
    assert {len(seconds) for seconds in report.seconds.values()} == {3}
    own = {f"ours {order}" for order in ORDERS if order != "throughput"}  # for which nothing was loaded
    assert set(report.seconds) == own | set(others)
    assert report.runs_at_once == 0


def test_on_a_cpu_every_timed_run_follows_an_untimed_one_of_the_same_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.benchmark.latency.SETTLE_S", 0.0)
    calls: list[str] = []

    def timer(name: str) -> Callable[[], float]:
        return lambda: calls.append(name) or float(len(calls))  # type: ignore[func-returns-value]

    taken = interleaved({"a": timer("a"), "b": timer("b")}, 2, settle=True)
    assert calls[2 * WARMUP :] == ["a", "a", "b", "b", "b", "b", "a", "a"]  # the order of the second round is turned
    assert taken == {"a": [2 * WARMUP + 2.0, 2 * WARMUP + 8.0], "b": [2 * WARMUP + 4.0, 2 * WARMUP + 6.0]}


def test_untimed_runs_last_until_the_threads_of_the_last_engine_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.benchmark.latency.SETTLE_S", 0.02)
    began: list[tuple[str, float]] = []

    def timer(name: str) -> Callable[[], float]:
        return lambda: began.append((name, time.perf_counter())) or 1.0  # type: ignore[func-returns-value]

    interleaved({"a": timer("a"), "b": timer("b")}, 1, settle=True)
    after_warm_up = [at for name, at in began[2 * WARMUP :] if name == "b"]
    assert after_warm_up[-1] - after_warm_up[0] >= 0.019  # the last of them is the timed one
    began.clear()
    interleaved({"a": timer("a")}, 1, settle=True)
    assert len(began) == WARMUP + 1  # nobody to wait for


def test_nothing_to_time_is_refused(tiny_engine: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match="at least one engine, one sentence"):
        bench_text({}, lambda: baked.features(2), pad_id=0, limit=10)


def test_the_command_times_a_data_file(tiny_engine: Callable[..., Path], tiny_checkpoint: Callable[..., Path]) -> None:
    data = tiny_checkpoint("bert").parent / "dev.tsv"
    arguments = ["bench", str(tiny_engine("ort")), "--data", str(data), "--rounds", "1", "--batch", "4"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0, shown.output
    assert all(order in shown.stdout for order in ORDERS)
    facts = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert facts["schema"] == "nxm-text-bench/1"
    assert facts["batch"] == 4


def test_a_batch_without_data_is_wrong_usage(tiny_engine: Callable[..., Path]) -> None:
    result = CliRunner().invoke(main, ["bench", str(tiny_engine("ort")), "--batch", "4"])
    assert result.exit_code == 2
    assert "--batch is for --data" in result.output

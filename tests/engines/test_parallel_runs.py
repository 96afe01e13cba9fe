"""Batches that run at once: their outputs come in order, no more are on their way than fit into memory, and the
first that fails says so."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import Closing, LoadOptions, backend, cpu_backends
from engines.parallel_runs import run_batches, runs_at_once
from engines.predictor import Predictor, hint_for
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS
from nxm_export.data.features import length_batches
from nxm_export.errors import DataError, EngineError

TEXTS = ["a good film", "the dull story with the very cold actor", "superb", "", "two long scene", "a warm plot"] * 3


class Squares(Closing):
    """An engine that squares its one number, after as long as it is told, and notes how many run at once."""

    inputs: tuple[str, ...] = ("number",)
    outputs: tuple[str, ...] = ("square",)

    def __init__(self, runs_at_once: int, seconds: Callable[[int], float] = lambda number: 0.0) -> None:
        self.runs_at_once = runs_at_once
        self.begun, self.most, self.fails = list[int](), 0, frozenset[int]()
        self._seconds, self._running, self._lock = seconds, 0, threading.Lock()

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        number = int(feeds["number"][0, 0])
        with self._lock:
            self.begun.append(number)
            self._running += 1
            self.most = max(self.most, self._running)
        time.sleep(self._seconds(number))
        with self._lock:
            self._running -= 1
        if number in self.fails:
            raise EngineError(f"batch {number} fails")
        return {"square": feeds["number"] ** 2}


def feeds_of(number: int) -> dict[str, np.ndarray]:
    return {"number": np.array([[number]])}


def squares(engine: Squares, numbers: list[int], tokens: int = 1) -> list[tuple[int, int]]:
    runs = run_batches(engine, numbers, feeds_of, lambda _: tokens)
    return [(number, int(outputs["square"][0, 0])) for number, outputs in runs]


@given(st.lists(st.integers(0, 9), max_size=20), st.integers(1, 5))
@settings(max_examples=15, deadline=None)
def test_outputs_come_in_order_whoever_is_ready_first(numbers: list[int], threads: int) -> None:
    engine = Squares(threads, lambda number: 0.0001 * ((number * 7) % 5))
    assert squares(engine, numbers) == [(number, number**2) for number in numbers]
    assert engine.most <= threads
    assert sorted(engine.begun) == sorted(numbers), "each runs once"


def test_as_many_run_at_once_as_the_engine_says() -> None:
    together = threading.Barrier(3, timeout=10)
    engine = Squares(3, lambda _: float(together.wait() * 0))
    squares(engine, [1, 2, 3])
    assert engine.most == runs_at_once(engine) == 3


def test_batches_of_long_texts_run_one_after_the_other() -> None:
    engine = Squares(4, lambda _: 0.001)
    squares(engine, [1, 2, 3, 4], tokens=MAX_BATCH_TOKENS)
    assert engine.most == 1


def test_the_first_batch_in_order_that_fails_is_the_error_and_the_rest_does_not_begin() -> None:
    engine = Squares(2, lambda number: 0.02 if number == 1 else 0.0)
    engine.fails = frozenset({1, 2})
    with pytest.raises(EngineError, match="batch 1 fails"):
        squares(engine, [*range(100)])
    assert len(engine.begun) <= 6, "those that had begun, and no more"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("engine_")]


def test_an_engine_of_one_run_at_a_time_takes_no_threads() -> None:
    seen: list[str] = []

    def note_thread(_: int) -> float:
        seen.append(threading.current_thread().name)
        return 0.0

    engine = Squares(1, note_thread)
    assert squares(engine, [3, 1]) == [(3, 9), (1, 1)]
    assert set(seen) == {threading.current_thread().name}


@given(st.lists(st.integers(0, 70), max_size=30), st.integers(1, 9), st.integers(1, 200))
@settings(max_examples=50, deadline=None)
def test_batches_by_tokens_hold_every_text_once_and_keep_their_budget(
    lengths: list[int], most: int, tokens: int
) -> None:
    batches = length_batches(lengths, most, tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) <= most
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("name", cpu_backends())
def test_answers_do_not_depend_on_the_hint(name: str, tiny_engine: Callable[..., Path]) -> None:
    answers = {}
    for hint in ("latency", "throughput"):
        with Predictor(tiny_engine(name), threads=2, hint=hint) as predictor:  # the same batches: the same bits
            answers[hint] = [result.to_dict() for result in predictor.predict(TEXTS, batch=2)]
    assert answers["throughput"] == answers["latency"]
    assert len({str(answer) for answer in answers["latency"]}) > 3, "another order would show"


@pytest.mark.parametrize("name", cpu_backends())
def test_one_engine_answers_several_threads_at_once(name: str, tiny_engine: Callable[..., Path]) -> None:
    with backend(name).load(tiny_engine(name), LoadOptions(3, "throughput")) as engine:
        assert runs_at_once(engine) == 3
        feeds = [{each: np.full((1, 4 + i % 3), 1 + i % 5, np.int64) for each in engine.inputs} for i in range(30)]
        for each in feeds:
            each.update({part: np.ones_like(each[part]) for part in each if part != "input_ids"})
            each.update({part: np.zeros_like(each[part]) for part in each if part == "token_type_ids"})
        alone = [engine.run(each)["logits"] for each in feeds]
        together = [made["logits"] for _, made in run_batches(engine, feeds, lambda each: each, lambda _: 4)]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_an_engine_is_loaded_for_throughput_where_there_is_more_than_a_batch(
    tiny_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine("ort")
    assert hint_for(engine, 32, 32) == "latency"
    assert hint_for(engine, 33, 32) == "throughput"
    with pytest.raises(DataError, match="unknown hint 'fast'; choose one of latency, throughput"):
        Predictor(engine, hint="fast")
    with pytest.raises(EngineError, match="unknown hint 'fast'"):
        LoadOptions(hint="fast")
    capable = backend("ort").CAPABILITIES
    monkeypatch.setattr("engines.ort.backend.CAPABILITIES", type(capable)("gpu"))
    assert hint_for(engine, 33, 32) == "latency"
    with pytest.raises(DataError, match="runs one batch at a time; leave the hint out"):
        Predictor(engine, hint="throughput")

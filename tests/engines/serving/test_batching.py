"""The queue and the engine's thread: order, bounds, padding, errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.base import LoadOptions, Profile
from engines.ort import backend as ort
from engines.serving.batching import BatchQueue, Limits, QueuedRequest, run_batch, run_worker
from engines.serving.health import AGAIN_S, EngineHealth
from engines.serving.shapes import Bucket, plan_buckets
from nxm_export.errors import EngineError, RequestRefused
from tests.support.exact_engine import MAX_LENGTH, expected, feeds_of

PADS = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0}
FOREVER = float("inf")


class Numbered(QueuedRequest):
    """A request that a test knows again."""

    def __init__(self, lengths: Sequence[int], number: int, deadline: float) -> None:
        super().__init__(feeds_of(lengths, number), deadline)
        self.number = number


def queued(lengths: Sequence[int], number: int = 0, deadline: float = FOREVER) -> Numbered:
    return Numbered(lengths, number, deadline)


def numbers(batch: Sequence[QueuedRequest]) -> list[int]:
    return [one.number for one in batch if isinstance(one, Numbered)]


class Seen:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.paddings: list[float] = []

    def batch(self, rows: int, padding: float, seconds: float, waits: Sequence[float]) -> None:
        self.rows.append(rows)
        self.paddings.append(padding)


def sound() -> EngineHealth:
    """That of an engine which answers whatever it is tried with."""
    return EngineHealth(lambda: None, {})


def run_all(engine: Any, queue: BatchQueue, health: EngineHealth | None = None) -> tuple[list[QueuedRequest], Seen]:
    """Close the queue and run what is in it, in this thread."""
    queue.close()
    delivered: list[QueuedRequest] = []
    seen = Seen()
    run_worker(engine, queue, delivered.extend, seen, PADS, {}, health or sound())
    return delivered, seen


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=5), min_size=1, max_size=20), st.booleans())
def test_every_request_gets_the_bits_it_gets_alone_however_it_is_batched(
    exact: Any, requests: list[list[int]], profiled: bool
) -> None:
    profiles = [Profile((2, 4), (4, 24), (6, MAX_LENGTH))] if profiled else []
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 6, profiles), Limits(merge=6))
    all_queued = [queued(lengths, seed) for seed, lengths in enumerate(requests)]
    for one in all_queued:
        queue.submit(one)
    delivered, seen = run_all(exact, queue)
    assert {id(one) for one in delivered} == {id(one) for one in all_queued}
    assert sum(seen.rows) == sum(len(lengths) for lengths in requests)
    for one in all_queued:
        assert one.error is None
        np.testing.assert_array_equal(one.outputs["logits"], expected(dict(one.feeds)))


@pytest.fixture(scope="module")
def exact(engine: Path) -> Any:
    return ort.load(engine, LoadOptions(threads=1))


def test_the_head_that_waited_longest_picks_the_bucket_and_its_own_kind_comes_along() -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits())
    for seed, length in enumerate((30, 7, 31, 8, 29)):
        queue.submit(queued([length], seed))
    first, second = queue.take(), queue.take()
    assert first is not None
    assert second is not None
    assert (first[0].length, numbers(first[1])) == (32, [0, 2, 4])
    assert (second[0].length, numbers(second[1])) == (8, [1, 3])
    assert queue.rows == 0


def test_a_batch_holds_no_more_than_it_may_and_a_large_request_runs_alone() -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits(merge=3))
    for seed, rows in enumerate((2, 1, 1, 7, 1)):
        queue.submit(queued([5] * rows, seed))
    taken = [queue.take() for _ in range(4)]
    assert [numbers(batch[1]) for batch in taken if batch] == [[0, 1], [2], [3], [4]]


def test_a_document_is_not_joined_by_as_many_others_as_a_sentence_is() -> None:
    """By rows alone, one text of 40 tokens would bring three more of its kind along."""
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, (), max_batch_tokens=96), Limits(merge=4, merge_tokens=96))
    for number in range(4):
        queue.submit(queued([40], number))
    for number in range(4, 8):
        queue.submit(queued([5], number))
    taken = [queue.take() for _ in range(3)]
    assert [numbers(batch[1]) for batch in taken if batch] == [[0, 1], [2, 3], [4, 5, 6, 7]]
    with pytest.raises(RequestRefused, match="3 rows of 40 tokens is larger than the 2"):
        queue.submit(queued([40] * 3))


@given(st.lists(st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=4), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_merged_batches_keep_the_budget_and_lose_nobody(requests: list[list[int]]) -> None:
    budget, merge = 64, 5
    queue = BatchQueue(
        plan_buckets(MAX_LENGTH, 4, (), max_batch_tokens=4 * MAX_LENGTH), Limits(merge=merge, merge_tokens=budget)
    )
    for number, lengths in enumerate(requests):
        queue.submit(queued(lengths, number))
    seen: list[int] = []
    while queue.rows:
        taken = queue.take()
        assert taken is not None
        bucket, batch = taken
        rows = sum(request.rows for request in batch)
        assert len(batch) == 1 or (rows <= merge and rows * bucket.length <= budget)
        seen += numbers(batch)
    assert sorted(seen) == list(range(len(requests)))


def test_a_full_queue_refuses_with_503_and_takes_again_when_there_is_room() -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits(max_rows=3))
    queue.submit(queued([5, 5]))
    with pytest.raises(RequestRefused, match="2 rows are waiting") as refused:
        queue.submit(queued([5, 5]))
    assert (refused.value.status, refused.value.retry_after) == (503, 1)
    queue.submit(queued([5]))
    queue.take()
    queue.submit(queued([5, 5]))


def test_a_request_that_never_fits_the_queue_is_not_told_to_try_again() -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits(max_rows=3))
    with pytest.raises(RequestRefused, match="4 rows is larger than the 3 that may wait; split it") as refused:
        queue.submit(queued([5, 5, 5, 5]))
    assert (refused.value.status, refused.value.retry_after) == (400, None)


def test_a_cancelled_request_makes_room_and_is_not_run() -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits(max_rows=2))
    first, second = queued([5], 1), queued([6], 2)
    queue.submit(first)
    queue.submit(second)
    assert queue.cancel(first)
    assert queue.rows == 1
    taken = queue.take()
    assert taken is not None
    assert taken[1] == [second]
    assert not queue.cancel(second)


def test_a_request_whose_deadline_passed_gets_504_and_costs_no_engine_time(exact: Any) -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits())
    late, in_time = queued([5], 1, deadline=time.monotonic() - 1), queued([6], 2)
    queue.submit(late)
    queue.submit(in_time)
    _, seen = run_all(exact, queue)
    assert isinstance(late.error, RequestRefused)
    assert late.error.status == 504
    assert seen.rows == [1]
    assert in_time.error is None


def test_a_closed_queue_refuses_new_requests_and_still_hands_out_the_old() -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits())
    queue.submit(queued([5], 1))
    queue.close()
    with pytest.raises(RequestRefused, match="unloaded"):
        queue.submit(queued([5], 2))
    assert queue.take() is not None
    assert queue.take() is None


def test_without_delay_an_idle_engine_runs_a_lone_request_at_once() -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits(max_delay=0.0))
    queue.submit(queued([5], 1))
    taken = queue.take()
    assert taken is not None
    assert len(taken[1]) == 1


def test_with_delay_a_lone_request_waits_for_company(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits(max_delay=60.0))
    delayed, wait = threading.Event(), queue._condition.wait

    def noted(timeout: float | None = None) -> bool:
        if timeout is not None:
            delayed.set()
        return wait(timeout)

    monkeypatch.setattr(queue._condition, "wait", noted)
    sizes: list[int] = []
    taker = threading.Thread(target=lambda: sizes.append(len((queue.take() or (None, []))[1])))
    queue.submit(queued([5], 1))
    taker.start()
    assert delayed.wait(5)
    queue.submit(queued([5], 2))
    queue.close()
    taker.join(5)
    assert sizes == [2]


def test_a_delay_ends_when_the_batch_is_full() -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits(max_delay=60.0, merge=2))
    queue.submit(queued([5], 1))
    queue.submit(queued([5], 2))
    began = time.monotonic()
    assert queue.take() is not None
    assert time.monotonic() - began < 10


class Poisoned:
    """An engine that fails whenever a batch holds the token 11, as one bad request might."""

    inputs = tuple(PADS)
    outputs = ("logits",)

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if (feeds["input_ids"] == 11).any():
            raise EngineError("poisoned")
        return dict(self._engine.run(feeds))


def test_a_request_that_makes_the_engine_fail_takes_no_other_down(exact: Any) -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits())
    all_queued = [queued([6], seed) for seed in range(4)]
    for one in all_queued:
        one.feeds["input_ids"][one.feeds["input_ids"] == 11] = 4
    all_queued[2].feeds["input_ids"][0, 3] = 11
    for one in all_queued:
        queue.submit(one)
    delivered, _ = run_all(Poisoned(exact), queue)
    assert len(delivered) == 4
    assert [type(one.error) for one in all_queued] == [type(None), type(None), EngineError, type(None)]
    np.testing.assert_array_equal(all_queued[3].outputs["logits"], expected(dict(all_queued[3].feeds)))


@pytest.mark.parametrize("lost", [False, True], ids=["bad requests", "lost device"])
def test_an_engine_fails_that_fails_at_what_it_answered_before_and_no_number_of_bad_requests_makes_it(
    exact: Any, lost: bool
) -> None:
    """`Poisoned` refuses each of the requests here; its device is lost, or it answers all others."""
    tried: list[bool] = []

    def trial() -> None:
        tried.append(lost)
        if lost:
            raise EngineError("CUDA driver: cuStreamSynchronize failed with 700: an illegal memory access")

    queue, health = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits(merge=1)), EngineHealth(trial, {})
    for seed in range(3):
        one = queued([6], seed)
        one.feeds["input_ids"][0, 3] = 11
        queue.submit(one)
    delivered, _ = run_all(Poisoned(exact), queue, health)
    assert [type(one.error) for one in delivered] == [EngineError] * 3
    assert tried == [lost] * 3
    assert health.failing is lost


def test_requests_that_waited_too_long_or_share_a_batch_with_a_bad_one_are_no_reason_to_try_an_engine(
    exact: Any,
) -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits())
    for one in (queued([6], 1), queued([6], 2), queued([6], 3, deadline=time.monotonic() - 1)):
        one.feeds["input_ids"][one.feeds["input_ids"] == 11] = 4
        one.feeds["input_ids"][0, 3] = 11 if one.number == 1 else 4
        queue.submit(one)
    delivered, _ = run_all(Poisoned(exact), queue, EngineHealth(lambda: pytest.fail("it was tried"), {}))
    assert sum(one.error is None for one in delivered) == 1


def test_an_engine_that_answers_again_fails_no_more() -> None:
    health = EngineHealth(lambda: 1 / 0, {})
    waits = [health.patience]
    for step in (health.examine, health.examine, health.answered):
        step()
        waits.append(health.patience)
    assert waits == [None, AGAIN_S, AGAIN_S, None], "seconds to the next trial"


@pytest.mark.parametrize("bad", [np.full((1, 2), np.nan, np.float32), np.zeros((0, 2), np.float32)])
def test_an_output_that_is_not_finite_or_too_short_is_an_error(bad: np.ndarray) -> None:
    class Broken(Poisoned):
        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"logits": bad}

    with pytest.raises(ArithmeticError, match="not finite or has too few rows"):
        run_batch(Broken(None), Bucket(8, 1, 8), [queued([5])], PADS, {})  # type: ignore[arg-type]


def test_an_output_along_the_sequence_is_cut_to_each_request() -> None:
    class Echo(Poisoned):
        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"hidden": feeds["input_ids"][..., None].astype(np.float32)}

    batch = [queued([3], 1), queued([7, 5], 2)]
    rows, tokens = run_batch(Echo(None), Bucket(8, 4, 8, fixed=True), batch, PADS, {"hidden": 1})  # type: ignore[arg-type]
    assert (rows, tokens) == (3, 32)  # 4 rows of 8: the profile's least batch
    for one in batch:
        np.testing.assert_array_equal(one.outputs["hidden"][..., 0], one.feeds["input_ids"])


def test_what_an_engine_pads_by_itself_counts_as_padding() -> None:
    class Shaped(Poisoned):
        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"logits": np.zeros((len(feeds["input_ids"]), 2), np.float32)}

        def compiled_shape(self, feeds: Mapping[str, np.ndarray]) -> tuple[int, int] | None:
            return (4, 8) if feeds["input_ids"].shape == (3, 7) else None

    for lengths, padding in (([7, 7, 7], 1 - 21 / 32), ([7, 7], 0.0)):
        queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits(merge=8))
        for length in lengths:
            queue.submit(queued([length]))
        _, seen = run_all(Shaped(None), queue)
        assert seen.paddings == [pytest.approx(padding)]


def test_many_submitters_and_two_engines_lose_and_double_nothing(engine: Path) -> None:
    queue = BatchQueue(plan_buckets(MAX_LENGTH, 8, ()), Limits(max_rows=10_000))
    delivered: list[QueuedRequest] = []
    lock = threading.Lock()

    def deliver(batch: Sequence[QueuedRequest]) -> None:
        with lock:
            delivered.extend(batch)

    workers = [
        threading.Thread(
            target=run_worker,
            args=(ort.load(engine, LoadOptions(threads=1)), queue, deliver, Seen(), PADS, {}, sound()),
        )
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    all_queued = [[queued([1 + (seed * 7 + i) % MAX_LENGTH], seed * 1000 + i) for i in range(50)] for seed in range(8)]

    def submit(mine: Sequence[QueuedRequest]) -> None:
        for one in mine:
            queue.submit(one)

    submitters = [threading.Thread(target=submit, args=(mine,)) for mine in all_queued]
    for submitter in submitters:
        submitter.start()
    for submitter in submitters:
        submitter.join()
    queue.close()
    for worker in workers:
        worker.join(30)
    assert sorted(numbers(delivered)) == sorted(one.number for mine in all_queued for one in mine)
    assert all(np.array_equal(one.outputs["logits"], expected(dict(one.feeds))) for one in delivered)

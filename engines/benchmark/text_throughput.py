"""Sentences a second over real text: tokenisation, batching, padding and the engine, timed apart and together.

A fixed shape says little about text of mixed lengths, because what is padded is computed, too. Ways to make batches of
the same sentences (`ORDERS`):

* ``arrival``: in the order of the file, each batch padded to its own longest sentence,
* ``bucketed``: sorted by length first, so that a batch holds sentences of about one length,
* ``fixed``: in the order of the file, each batch padded to one length, as engines with static shapes need it,
* ``throughput``: sorted by length, batches of at most `THREAD_BATCH_TOKENS`, as many at once as the engine has threads,
  of engines that can be loaded for it.

Every round times every engine with every order once, and the order of those rotates. Ratios are paired within rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from engines.base import Engine
from engines.benchmark.latency import paired, rotated
from engines.parallel_runs import run_batches, runs_at_once
from nxm_export.contract.choices import TEXT_BATCH, TEXT_ROUNDS
from nxm_export.contract.token_budget import THREAD_BATCH_TOKENS
from nxm_export.data.features import Features, length_batches, pad
from nxm_export.errors import EngineError
from nxm_export.storage.json_files import to_json_object

SCHEMA = "nxm-text-bench/1"
ORDERS = ("arrival", "bucketed", "fixed", "throughput")
FIXED = 128


@dataclass(frozen=True)
class TextTiming:
    """One engine with one order. `padding` is the share of computed tokens that are padding; rates are sentences a
    second, with tokenisation and without, medians with the middle half; `speedup` is against ``arrival`` of the same
    engine, with its 95 % interval (None for ``arrival`` itself)."""

    name: str
    order: str
    padding: float
    sentences_per_second: float
    quartiles: tuple[float, float]
    without_tokenisation: float
    speedup: float | None
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class TextReport:
    """All timings; `batch` is how many sentences a batch has at most, `runs_at_once` how many batches ran at a time
    with ``throughput`` (0: nothing was loaded for it), `tokens` are the mean and the longest sentence,
    `tokenised_per_second` is the tokenizer's rate alone.

    `seconds` are those of every round, tokenisation included, by engine and order (``ort bucketed``) and by what else
    took part: ratios of any two are to be paired by round.
    """

    sentences: int
    batch: int
    fixed: int
    runs_at_once: int
    tokens: tuple[float, int]
    tokenised_per_second: float
    rounds: int
    timings: tuple[TextTiming, ...]
    seconds: Mapping[str, Sequence[float]]

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return {"schema": SCHEMA, **to_json_object(self)}


def batches(lengths: Sequence[int], order: str, size: int) -> list[list[int]]:
    """Index batches of `size` sentences (``throughput``: at most) by one of `ORDERS`; sorted ones run from long to
    short, so that memory is taken once."""
    if order not in ORDERS or size < 1:
        raise EngineError(
            f"unknown order {order!r} or batch of {size}; choose one of {', '.join(ORDERS)}, and 1 or more"
        )
    if order == "throughput":
        return length_batches(lengths, size, THREAD_BATCH_TOKENS)
    picked = list(range(len(lengths)))
    if order == "bucketed":
        picked.sort(key=lambda i: -lengths[i])
    return [picked[start : start + size] for start in range(0, len(picked), size)]


def run_text(
    engine: Engine, features: Sequence[Features], order: str, *, batch: int, fixed: int, pad_id: int
) -> dict[str, np.ndarray]:
    """Outputs of all sentences in the order of `features`, computed in batches of one of `ORDERS`.

    Outputs must have one row a sentence (no axis over tokens).
    """
    lengths = [_length(sample) for sample in features]

    def padded_to(indices: Sequence[int]) -> int:
        return fixed if order == "fixed" else max(lengths[i] for i in indices)

    computed: dict[str, dict[int, np.ndarray]] = {name: {} for name in engine.outputs}
    for indices, outputs in run_batches(
        engine,
        batches(lengths, order, batch),
        lambda indices: pad([features[i] for i in indices], pad_id, padded_to(indices)),
        lambda indices: len(indices) * padded_to(indices),
    ):
        for name, values in outputs.items():
            computed[name].update(zip(indices, values, strict=True))
    return {name: np.stack([values[i] for i in range(len(features))]) for name, values in computed.items()}


def bench_text(
    engines: Mapping[str, Engine],
    tokenise: Callable[[], Sequence[Features]],
    *,
    pad_id: int,
    limit: int,
    batch: int = TEXT_BATCH,
    rounds: int = TEXT_ROUNDS,
    for_throughput: Mapping[str, Engine] = MappingProxyType({}),
    others: Mapping[str, Callable[[], float]] = MappingProxyType({}),
) -> TextReport:
    """Time `engines` over the sentences that `tokenise` makes features of (at most `limit` tokens each).

    `for_throughput` are those of them that were loaded a second time, with that hint. `others` are timed between them,
    once a round: each does the same work by other means, from text to answers, and returns the seconds that it took.
    Raises `EngineError` for no engines, sentences or rounds.
    """
    features = tokenise()
    if not engines or not features or rounds < 1 or batch < 1:
        raise EngineError("a bench of text needs at least one engine, one sentence, a batch of 1 and one round")
    text = _Text(features, batch, max(min(FIXED, limit), *map(_length, features)), pad_id)
    run = {
        (name, order): for_throughput[name] if order == "throughput" else engine
        for name, engine in engines.items()
        for order in ORDERS
        if order != "throughput" or name in for_throughput
    }
    for (_, order), engine in run.items():  # warm-up: kernels for every shape, pages of memory
        if order in ("bucketed", "throughput"):
            text.seconds(engine, order)
    taken: dict[tuple[str, str], list[float]] = {what: [] for what in run}
    theirs: dict[str, list[float]] = {name: [] for name in others}
    tokenising: list[float] = []
    for number in range(rounds):
        began = time.perf_counter()
        tokenise()
        tokenising.append(time.perf_counter() - began)
        for name, work in rotated(list(others.items()), number):
            theirs[name].append(work())
        for name, order in rotated(list(taken), number):
            taken[name, order].append(text.seconds(run[name, order], order))
    tokenised = np.array(tokenising)
    seconds = {f"{name} {order}": (np.array(times) + tokenised).tolist() for (name, order), times in taken.items()}
    return TextReport(
        sentences=len(features),
        batch=batch,
        fixed=text.fixed,
        runs_at_once=max(map(runs_at_once, for_throughput.values()), default=0),
        tokens=(float(np.mean(text.lengths)), max(text.lengths)),
        tokenised_per_second=float(np.median(len(features) / tokenised)),
        rounds=rounds,
        timings=tuple(_timing(text, name, order, taken, tokenised) for name, order in taken),
        seconds=seconds | theirs,
    )


def _length(sample: Features) -> int:
    """Length of a sample in tokens."""
    return len(sample["input_ids"])


@dataclass(frozen=True)
class _Text:
    """Sentences in tokens, and how they are put into batches."""

    features: Sequence[Features]
    batch: int
    fixed: int
    pad_id: int

    @property
    def lengths(self) -> list[int]:
        return [_length(sample) for sample in self.features]

    def seconds(self, engine: Engine, order: str) -> float:
        """What an engine takes for all of them, in one of `ORDERS`."""
        began = time.perf_counter()
        run_text(engine, self.features, order, batch=self.batch, fixed=self.fixed, pad_id=self.pad_id)
        return time.perf_counter() - began

    def padding(self, order: str) -> float:
        """The share of computed tokens that are padding."""
        lengths = self.lengths
        computed = sum(
            len(indices) * (self.fixed if order == "fixed" else max(lengths[i] for i in indices))
            for indices in batches(lengths, order, self.batch)
        )
        return 1.0 - sum(lengths) / computed


def _timing(
    text: _Text, name: str, order: str, taken: Mapping[tuple[str, str], Sequence[float]], tokenised: np.ndarray
) -> TextTiming:
    """Of one engine and order: `taken` are the seconds of all of them by round, `tokenised` those of the tokenizer."""
    count, alone = len(text.features), np.array(taken[name, order])
    low, middle, high = np.percentile(count / (alone + tokenised), [25, 50, 75])
    arrival = np.array(taken[name, "arrival"]) + tokenised
    speedup, interval = (None, None) if order == "arrival" else paired(arrival, alone + tokenised)
    return TextTiming(
        name=name,
        order=order,
        padding=text.padding(order),
        sentences_per_second=float(middle),
        quartiles=(float(low), float(high)),
        without_tokenisation=float(np.median(count / alone)),
        speedup=speedup,
        interval=interval,
    )

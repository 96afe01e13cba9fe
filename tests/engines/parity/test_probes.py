"""Each probe catches the fault that it is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from engines.parity.probes import Expected, Loaded, _Contrast, _judged, probe, probe_samples
from nxm_export.contract.io_spec import IOSpec
from nxm_export.data.features import inputs_of, sample_of
from tests.support import baked


class Exact:
    """An engine whose answer is the sum of the real tokens: right but for the fault that a test gives it."""

    inputs, outputs, clock = ("input_ids", "attention_mask"), ("logits",), "none"

    def __init__(self, fault: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None) -> None:
        self.fault = fault

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        sums = (ids * mask).sum(axis=1).astype(np.float32)
        if self.fault is not None:
            sums = self.fault(sums, mask).astype(np.float32)
        return {"logits": np.stack([sums, -sums], axis=1)}


FAULTS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "one token": lambda sums, mask: sums + (mask.sum(axis=1) == 1),
    "maximum length": lambda sums, mask: sums + (mask.sum(axis=1) == 40),
    "all-padding row": lambda sums, mask: sums / mask.sum(axis=1),  # 0 / 0 where a row is all padding
    "alone as in a batch": lambda sums, mask: sums + len(sums),
    "permuted batch": lambda sums, mask: sums + np.arange(len(sums)),
    "extra padding": lambda sums, mask: sums + mask.shape[1],
}


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_each_probe_catches_the_fault_it_is_for(fault: str | None) -> None:
    features = [
        sample_of({name: values[:20] for name, values in inputs_of(sample).items()})
        for sample in baked.features(8, family="distilbert")
    ]
    spec = IOSpec(
        "distilbert",
        "classification",
        Exact.inputs,
        {"logits": ("batch", "classes")},
        ("0", "1"),
        40,
        0,
    )
    samples = probe_samples(features, spec, ())
    right: Any = Exact()
    answers = {
        name: right.run({key: np.array([values]) for key, values in inputs_of(sample).items()})
        for name, sample in samples.items()
    }
    tolerances = {"logits": 0.5}
    engine: Any = Exact(FAULTS[fault] if fault else None)
    with np.errstate(invalid="ignore"):
        results = probe(
            Loaded(engine, spec), features, tolerances, Expected(samples, answers, dict.fromkeys(samples, tolerances))
        )
    verdicts = {result.name: result.passed for result in results}
    assert list(verdicts) == list(FAULTS)
    assert (False in verdicts.values()) == (fault is not None)
    if fault is not None:
        assert verdicts[fault] is False


def test_one_sample_is_no_batch() -> None:
    """In any order and any batch it stands alone: an engine that mixes rows would pass."""
    (features, *_) = baked.features(8, family="distilbert")
    spec = IOSpec("distilbert", "classification", Exact.inputs, {"logits": ("batch", "classes")}, ("0", "1"), 40, 0)
    engine: Any = Exact(FAULTS["permuted batch"])
    samples = probe_samples([features], spec, ())
    run = Loaded(engine, spec).rows
    answers = {name: {"logits": run([s], len(s["input_ids"]))[0]["logits"][None]} for name, s in samples.items()}
    tolerances = {"logits": 0.5}
    expected = Expected(samples, answers, dict.fromkeys(samples, tolerances))
    results = {result.name: result for result in probe(Loaded(engine, spec), [features], tolerances, expected)}
    for name in ("alone as in a batch", "permuted batch"):
        assert results[name].passed is None
        assert "one sample, which is no batch" in results[name].reason


@pytest.mark.parametrize("wrong", [None, (2, 16), (1, 40)])
def test_a_compiled_shape_that_computes_something_else_is_found(wrong: tuple[int, int] | None) -> None:
    """Against a shape that another model runs, also where the compiled one is as long as the model."""
    features = [
        sample_of({name: values[:7] for name, values in inputs_of(sample).items()})
        for sample in baked.features(8, family="distilbert")
    ]
    spec = IOSpec("distilbert", "classification", Exact.inputs, {"logits": ("batch", "classes")}, ("0", "1"), 40, 0)
    engine: Any = Exact(lambda sums, mask: sums + (mask.shape == wrong))
    samples = probe_samples(features, spec, ())
    answers = {
        name: engine.run({key: np.array([values]) for key, values in inputs_of(sample).items()})
        for name, sample in samples.items()
    }
    tolerances = {"logits": 0.5}
    loaded = Loaded(engine, spec, shapes=[(2, 16), (1, 40)])
    results = probe(loaded, features, tolerances, Expected(samples, answers, dict.fromkeys(samples, tolerances)))
    verdicts = {result.name: result.passed for result in results if result.name.startswith("compiled")}
    assert verdicts == {"compiled shape 2x16": wrong != (2, 16), "compiled shape 1x40": wrong != (1, 40)}


def test_batch_probes_of_documents_keep_to_the_budget_of_tokens() -> None:
    """Eight samples of 8192 tokens and a row of padding would be 73,728 tokens at once."""
    spec = IOSpec("distilbert", "classification", Exact.inputs, {"logits": ("batch", "classes")}, ("0", "1"), 8192, 0)
    features = [sample_of({"input_ids": [5] * 8192, "attention_mask": [1] * 8192}) for _ in range(8)]
    shapes: list[tuple[int, ...]] = []

    class Recorded(Exact):
        def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            shapes.append(feeds["input_ids"].shape)
            return super().run(feeds)

    engine: Any = Recorded()
    samples = probe_samples(features, spec, (), maximum=False)
    assert list(samples) == ["one token"]
    answer = {"logits": np.array([[5.0, -5.0]])}
    expected = Expected(samples, {"one token": answer}, {"one token": {"logits": 0.5}}, beyond="no room")
    results = {result.name: result for result in probe(Loaded(engine, spec), features, {"logits": 0.5}, expected)}
    assert max(rows * length for rows, length in shapes) <= 16_384
    assert max(rows for rows, _ in shapes) == 9
    assert (results["maximum length"].passed, results["maximum length"].reason) == (None, "no room")
    assert {result.passed for name, result in results.items() if name != "maximum length"} == {True}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_value_that_is_none_fails_a_probe_wherever_it_stands(bad: float, at: int) -> None:
    """Of the reference, of the engine and of both; behind rows that are alike, and in front of them."""
    rows = [{"logits": np.zeros(2, np.float32)} for _ in range(3)]
    broken = [dict(row) for row in rows]
    broken[at] = {"logits": np.array([0.0, bad], np.float32)}
    loaded: Any = None  # nothing is run: no shapes
    for actual, expected in ((broken, rows), (rows, broken), (broken, broken)):
        contrast = _Contrast(actual, expected, {"logits": 0.5})
        with np.errstate(invalid="ignore"):
            result = _judged(loaded, "a probe", [], lambda contrast=contrast: contrast, "rows")  # type: ignore[misc]
        assert result.passed is False

"""What is clearly beyond this machine is refused before it is run, and what is large is told before it is built."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from engines import memory
from engines.base import BuildOptions, Profile
from engines.passport import load_passport
from nxm_export.errors import EngineError, Notice
from nxm_export.storage import memory as machine
from tests.support import tiny


@pytest.fixture
def available(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many bytes this machine has to give."""
    return lambda size: monkeypatch.setattr(machine, "_of_machine", lambda: size)


def test_an_engine_with_scores_in_memory_needs_the_square_of_the_length(tiny_engine: Callable[..., Path]) -> None:
    directory = tiny_engine("ort")
    short, long = (1, 512), (1, 8192)
    needed = memory.engine_memory(directory, load_passport(directory), [short, long])
    assert needed is not None
    scores = 4 * tiny.HEADS * 8192**2
    assert scores < needed[long] < 1.2 * scores
    assert needed[short] < needed[long] / 100


def test_a_run_beyond_the_machine_is_refused_with_shape_numbers_and_way_out(
    tiny_engine: Callable[..., Path], available: Callable[[int], None]
) -> None:
    directory = tiny_engine("ort")
    available(10**9)
    memory.require_room(directory, [(1, 4096), (8, 32)], "timing it at", "give another --shape")
    expected = r"timing it at 4x4096 \(batch x sequence\) needs at least 1\.\d GB of memory, and 1\.0 GB are available"
    with pytest.raises(EngineError, match=expected + ".*give another --shape"):
        memory.require_room(directory, [(8, 32), (4, 4096)], "timing it at", "give another --shape")
    with pytest.raises(EngineError, match=r"4096 \(batch x sequence\) in each of 4 copies needs"):
        memory.require_room(directory, [(1, 4096)], "serving batches of", "lower --instances", copies=4)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (BuildOptions(), None),  # 32x48 tokens of a tiny model
        (
            BuildOptions(profiles=[Profile((1, 1), (1, 48), (32, 48)), Profile((1, 1), (1, 9), (10**6, 48))]),
            "1000000x48",
        ),
    ],
)
def test_a_large_batch_is_told_before_the_build_and_a_small_one_is_not(
    tiny_graph: Callable[..., Path], options: BuildOptions, expected: str | None
) -> None:
    graph = tiny_graph("bert", "inputs-outputs", "cpu") / "model.onnx"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        memory.tell_memory(graph, "ort", options)
    texts = [str(warning.message) for warning in told if issubclass(warning.category, Notice)]
    assert len(texts) == (expected is not None)
    assert expected is None or f"a batch of {expected} (batch x sequence) needs at least" in texts[0]


def test_a_build_whose_weights_are_beyond_the_machine_is_refused(
    tiny_graph: Callable[..., Path], available: Callable[[int], None]
) -> None:
    available(1000)
    with pytest.raises(EngineError, match=r"building an engine needs at least .* build it on a larger machine"):
        memory.tell_memory(tiny_graph("bert", "inputs-outputs", "cpu") / "model.onnx", "ort", BuildOptions())

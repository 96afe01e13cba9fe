"""At which level of optimization ONNX Runtime runs an engine as it was proven."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.base import LoadOptions
from engines.ort import backend as ort
from engines.ort.backend import ENGINE_FILE, open_session
from engines.ort.session_levels import ALL, BASIC, SessionLevel, closest_level
from engines.passport import EnginePassport, covered_spec, load_passport
from nxm_export.contract.io_spec import IOSpec
from nxm_export.errors import EngineError
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from tests.support import baked, tiny
from tests.support.variants import variants

FAMILIES = variants(tiny.FAMILIES, ("bert",), ("albert", "mpnet", "modernbert", "nomic_bert"))


def opened(directory: Path) -> tuple[EnginePassport, IOSpec]:
    passport = load_passport(directory)
    return passport, covered_spec(directory, passport)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["inputs", "inputs-outputs"])
def test_the_basic_level_gives_the_bits_of_the_proven_session_and_all_optimizers_do_not(
    tiny_engine: Callable[..., Path], family: str, placement: str
) -> None:
    directory = tiny_engine("ort", family, placement)
    closest = closest_level(directory, *opened(directory))
    uses = tiny.LAYERS if family == "albert" else 1  # of each matrix
    products = uses * tiny.matrices(family, split=placement == "inputs-outputs")
    assert closest == SessionLevel(BASIC, 0.0, (products, products))
    assert closest.words == "outputs are those of the proven one, bit for bit"
    # The same by other means: the engine as it is loaded everywhere, and the two levels, on other input.
    data = (directory / ENGINE_FILE).read_bytes()
    feeds = baked.feeds(family, 6, 11, padding=4)
    with ort.load(directory, LoadOptions(threads=1)) as engine:
        proven = engine.run(feeds)["logits"]
    basic, everything = (
        open_session(directory / ENGINE_FILE, 1, model=data, level=level).run(None, feeds)[0] for level in (BASIC, ALL)
    )
    np.testing.assert_array_equal(basic, proven)
    assert not np.array_equal(everything, proven)


def test_rounding_that_no_level_leaves_out_is_seen(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Triton's session rounds the biases of products that are Gemm, at any level."""
    graph = export(tiny_checkpoint("bert"), tmp_path / "graph", placement="inputs-outputs", lowering="gemm")
    build_engine(graph.path, tmp_path / "engine")
    closest = closest_level(tmp_path / "engine", *opened(tmp_path / "engine"))
    assert closest.difference
    assert "outputs differ" in closest.words


def test_an_engine_without_disabled_optimizers_runs_with_all(tiny_engine: Callable[..., Path]) -> None:
    directory = tiny_engine("ort")
    passport, spec = opened(directory)
    passport = replace(passport, options={**passport.options, "disabled_optimizers": []})
    closest = closest_level(directory, passport, spec)
    assert (closest.level, closest.difference) == (ALL, None), "that it gives the same, bit for bit, was not seen"
    assert closest.words == "not compared with the proven one: both have every optimizer, so that nothing was tried"


def test_products_that_would_run_in_float_weigh_more_than_a_difference(
    tiny_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_engine("ort")

    def without_integers_at_basic(file: Path, passport: EnginePassport, *, level: str | None = None) -> dict[str, int]:
        return {} if level == BASIC else {"MatMulIntegerToFloat": 12}

    monkeypatch.setattr("engines.ort.session_levels.operators", without_integers_at_basic)
    closest = closest_level(directory, *opened(directory))
    assert (closest.level, closest.integer_products) == (ALL, (12, 12))
    assert closest.difference
    assert closest.words.startswith("outputs differ from those of the proven one by up to ")


def test_where_it_cannot_be_tried_it_says_so(tiny_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tiny_engine("ort")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    closest = closest_level(directory, *opened(directory))
    assert closest == SessionLevel(BASIC, None, None, "ONNX Runtime does not run here")
    assert "not compared with the proven one" in closest.words


def test_a_level_that_gives_no_number_is_never_bit_for_bit(
    tiny_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_engine("ort")

    class NoNumbers:
        def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [np.full((1, 2), np.nan, np.float32)]

    def opening(*arguments: object, level: str | None = None, **options: object) -> object:
        return open_session(*arguments, **options) if level is None else NoNumbers()  # type: ignore[arg-type]

    monkeypatch.setattr("engines.ort.session_levels.open_session", opening)
    with pytest.raises(EngineError, match="not finite"):
        closest_level(directory, *opened(directory))

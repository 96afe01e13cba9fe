"""Four engines broken on purpose: the gate catches each, and the bisect names the block; a healthy engine passes
both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engines.base import BuildOptions
from engines.parity.bisect import _Boundary, _ReferenceRun, _tally, bisect
from engines.parity.bisect_reports import BISECT_FILE, read_bisect_report
from engines.parity.block_outputs import (
    BlockBoundaries,
    BlockOutputEngine,
    built_with_block_outputs,
    ort_with_block_outputs,
)
from engines.parity.compare import compare
from engines.parity.reports import PARITY_FILE, read_parity_report
from engines.passport import EnginePassport, load_passport
from engines.reference import pytorch
from nxm_export.cli.parity_tables import print_bisects
from nxm_export.contract.checkpoint import read_config
from nxm_export.contract.families import FAMILIES
from nxm_export.errors import DataError, ParityError
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from tests.support import baked
from tests.support.broken import BLOCK, BROKEN, drop_pair, overflowing, write_engine
from tests.support.dev_features import dev_features


@pytest.fixture(scope="module")
def half_engine(tmp_path_factory: pytest.TempPathFactory, tiny_graph: Callable[..., Path]) -> Path:
    """The float16 graph that TensorRT gets, run by ONNX Runtime."""
    out = tmp_path_factory.mktemp("half") / "engine"
    build_engine(tiny_graph("bert", "inputs-outputs", "trt") / "model.onnx", out, "ort")
    return out


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
def test_a_healthy_engine_parts_nowhere(
    half: bool,
    tiny_checkpoint: Callable[..., Path],
    tiny_engine: Callable[..., Path],
    half_engine: Path,
    tmp_path: Path,
) -> None:
    checkpoint = tiny_checkpoint("bert")
    engine = write_engine(half_engine if half else tiny_engine("ort"), tmp_path / "engine", lambda model: None)
    report = bisect(checkpoint, engine, dev_features(checkpoint, engine))
    report.require()
    assert [row.block for row in report.blocks] == ["embeddings", "bert.encoder.layer.0", BLOCK, "head"]
    assert (report.outputs_equal, report.outputs_problem) == (True, None)
    assert read_bisect_report(engine / BISECT_FILE) == report
    assert report.passed
    assert report.engine_sha256 == load_passport(engine).engine_sha256
    assert report.kernels_changed is False


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_engine_fails_the_gate_and_is_located(
    fault: str, tiny_checkpoint: Callable[..., Path], tiny_engine: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("bert")
    engine = write_engine(tiny_engine("ort"), tmp_path / "engine", BROKEN[fault])
    features = dev_features(checkpoint, engine)
    parity = compare(checkpoint, engine, features)
    with pytest.raises(ParityError, match="differs from the checkpoint"):
        parity.require()
    report = bisect(checkpoint, engine, features)
    assert report.first_diverging == BLOCK
    assert [row.block for row in report.blocks if row.passed is False] == [BLOCK]  # the blocks behind it are innocent
    with pytest.raises(ParityError, match=f"it parts from the checkpoint in {BLOCK}"):
        report.require()


@pytest.mark.parametrize("fault", BROKEN)
def test_a_healthy_copy_of_a_broken_engine_is_no_pass(
    fault: str,
    tiny_checkpoint: Callable[..., Path],
    tiny_engine: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As where a runtime computes otherwise once it gives away what lies between blocks."""
    checkpoint = tiny_checkpoint("bert")
    engine = write_engine(tiny_engine("ort"), tmp_path / "engine", BROKEN[fault])
    healthy = write_engine(tiny_engine("ort"), tmp_path / "healthy", lambda model: None)

    def mended(directory: Path, passport: EnginePassport, *rest: Any) -> BlockOutputEngine:
        return ort_with_block_outputs(healthy, load_passport(healthy), *rest)

    monkeypatch.setattr("engines.parity.bisect.ort_with_block_outputs", mended)
    report = bisect(checkpoint, engine, dev_features(checkpoint, engine))
    assert (report.first_diverging, report.outputs_equal, report.passed) == (None, False, False)
    assert read_bisect_report(engine / BISECT_FILE) == report
    with pytest.raises(ParityError, match="in a copy with more outputs, which is not the engine: their outputs"):
        report.require()
    print_bisects([report])
    assert capsys.readouterr().out.startswith(f"FAIL: what was looked at in place of {engine} is not")


def test_a_shared_block_is_judged_run_by_run(tmp_path: Path) -> None:
    """ALBERT has one block for all layers; only its second run is broken here, by one pair that is gone."""
    checkpoint, healthy = baked.write_checkpoint("albert", tmp_path / "checkpoint", layers=2), tmp_path / "built"
    build_engine(export(checkpoint, tmp_path / "graph", target="cpu").path, healthy, "ort")
    block = "albert.encoder.albert_layer_groups.0.albert_layers.0"

    def of_the_second(model: Any) -> None:
        drop_pair(model, f"{block}.ffn_output.input.use2_quantize", f"{block}.ffn_output.use2")

    features = baked.features(64, family="albert")
    whole = bisect(checkpoint, write_engine(healthy, tmp_path / "healthy", lambda model: None), features)
    assert [row.block for row in whole.blocks] == ["embeddings", f"{block} (run 1)", f"{block} (run 2)", "head"]
    assert whole.passed
    broken = bisect(checkpoint, write_engine(healthy, tmp_path / "broken", of_the_second), features)
    assert [row.block for row in broken.blocks if row.passed is False] == [f"{block} (run 2)"]


def test_an_overflow_of_float16_fails_the_gate_and_is_located(
    half_engine: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("bert")
    engine = write_engine(half_engine, tmp_path / "engine", overflowing)
    features = dev_features(checkpoint, engine)
    parity = compare(checkpoint, engine, features)
    assert not parity.passed
    assert parity.probes[0].name == "finite outputs"
    assert parity.probes[0].passed is False
    assert parity.outputs[0].nonfinite > 0
    assert read_parity_report(engine / PARITY_FILE) == parity
    report = bisect(checkpoint, engine, features)
    assert report.first_diverging == BLOCK
    assert "NaN or infinity" in next(row.reason for row in report.blocks if row.block == BLOCK)
    assert report.blocks[-1].passed is None  # the head read NaN, so nothing can be said about it
    assert read_bisect_report(engine / BISECT_FILE) == report  # it has no NaN, which is not JSON
    assert next(row for row in report.blocks if row.block == BLOCK).isolated_max_abs is None


@pytest.mark.parametrize("family", ["bert", "albert", pytest.param("distilbert", marks=pytest.mark.slow)])
def test_a_block_that_reads_what_it_would_have_read_anyway_writes_the_same(family: str, tmp_path: Path) -> None:
    """Handing the reference its own boundaries changes nothing, but for their rounding to float32."""
    checkpoint = baked.write_checkpoint(family, tmp_path, layers=2)
    feeds = baked.feeds(family, 3, 9, padding=2)
    with pytorch.load(checkpoint, task="classification", exact=True) as reference:
        plain = reference.run(feeds)
        outputs, crossed = reference.run_blocks(feeds)
        again, given = reference.run_blocks(feeds, crossed)
    np.testing.assert_array_equal(outputs["logits"], plain["logits"])
    assert len(crossed) == 3
    for name, value in crossed.items():
        np.testing.assert_allclose(given[name], value, atol=1e-5)
    np.testing.assert_allclose(again["logits"], plain["logits"], atol=1e-5)


def test_no_samples_are_refused(tiny_checkpoint: Callable[..., Path], tiny_engine: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="no samples"):
        bisect(tiny_checkpoint("bert"), tiny_engine("ort"), [])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("engine_too", [False, True])
def test_a_checkpoint_that_gives_no_number_never_passes(bad: float, engine_too: bool) -> None:
    """Whatever is tolerated around a value that is none, the engine is not right."""
    good = np.ones((3, 4), np.float32)
    broken = good.copy()
    broken[1, 2] = bad
    runs = {
        name: _ReferenceRun({"block": [good, broken]}, {"block": [good, broken]})
        for name in ("exact", "rounding_noise", "one_step_shift")
    }
    boundary = _Boundary()
    _tally({"block": boundary}, {"block": [good, broken if engine_too else good]}, runs)
    judged = boundary.judged("block", quantized=True)
    assert judged.passed is False
    assert judged.reason.startswith("the checkpoint itself gives NaN or infinity in 1 samples")


def test_an_engine_is_built_again_as_it_was_built(
    tiny_checkpoint: Callable[..., Path],
    tiny_graph: Callable[..., Path],
    tiny_engine: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every option that its passport has; else a bisect would judge an engine of other kernels."""
    directory = tiny_engine("ort")
    graph = tiny_graph("bert", "inputs-outputs") / "model.onnx"
    passport = replace(load_passport(directory), options={"sparse": "always", "fuse": False, "level": 2})
    given: list[BuildOptions] = []
    double = SimpleNamespace(build=lambda _, __, options: given.append(options), load=lambda _: None)
    monkeypatch.setattr("engines.parity.block_outputs.backend", lambda _: double)
    boundaries = BlockBoundaries.of(FAMILIES["bert"], read_config(tiny_checkpoint("bert")))
    built_with_block_outputs(directory, passport, boundaries, graph, tmp_path)
    (options,) = given
    assert (options.sparse, options.fuse, options.level) == ("always", False, 2)

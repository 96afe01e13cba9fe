"""Commands on engines: an engine's graph is made again as its passport says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.base import BuildOptions, LoadOptions, Profile
from nxm_export.contract.io_spec import load_spec
from nxm_export.errors import EngineError
from nxm_export.pipeline import engine_commands


@pytest.mark.parametrize(("recorded", "asked"), [("float32", None), ("float16", "float16")])
def test_a_new_export_has_the_precision_overrides_of_the_passport(
    tiny_engine: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: str,
    asked: str | None,
) -> None:
    engine = shutil.copytree(tiny_engine("ort"), tmp_path / "engine")
    passport = json.loads((engine / "passport.json").read_text(encoding="utf-8"))
    assert passport["graph"]["precision_overrides"] == passport["graph"]["dtype"] == "float32"
    passport["graph"]["precision_overrides"] = recorded
    (engine / "passport.json").write_text(json.dumps(passport), encoding="utf-8")
    given: dict[str, object] = {}

    def export(*_: object, **options: object) -> None:
        given.update(options)
        raise InterruptedError

    monkeypatch.setattr("nxm_export.graph.exporter.export", export)
    with pytest.raises(InterruptedError):
        engine_commands._export_again(tmp_path / "checkpoint", engine, tmp_path / "graph")
    assert given["precision_overrides"] == asked


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ort", BuildOptions(level=3, workspace_bytes=1), "ort has no use for level, workspace_bytes"),
        ("ort", BuildOptions(profiles=[Profile((1, 1), (1, 8), (1, 8))]), "ort has no use for profiles"),
        ("openvino", BuildOptions(oldest_onnxruntime="1.19"), "openvino has no use for oldest_onnxruntime"),
        ("openvino", BuildOptions(always_sparse=True, fuse=False), "has no use for always_sparse, no fusion"),
        ("trt", BuildOptions(threads=2), "trt has no use for threads"),
        ("trt_rtx", BuildOptions(timing_cache=Path("timing.cache")), "trt_rtx has no use for timing_cache"),
        ("cusparselt", BuildOptions(always_sparse=True, sparse=False), "contradict each other"),
    ],
)
def test_an_option_that_a_backend_would_not_heed_is_refused(
    name: str, options: BuildOptions, words: str, tiny_graph: Callable[..., Path], tmp_path: Path
) -> None:
    """In Python, too, as on the command line."""
    with pytest.raises(EngineError, match=words):
        engine_commands.build_engine(tiny_graph("bert", "inputs"), tmp_path / "engine", name, options)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("threads", [0, -2, 10**9])
def test_a_number_of_threads_that_no_machine_has_is_refused(threads: int) -> None:
    for kind in (BuildOptions, LoadOptions):
        with pytest.raises(EngineError, match="runs on 1 to 65536 threads"):
            kind(threads=threads)


def test_a_bench_without_shapes_stays_within_what_the_model_takes(tiny_engine: Callable[..., Path]) -> None:
    engine = tiny_engine("ort")
    limit = load_spec(engine).max_length
    assert limit < 64, "one of the usual shapes would be refused"
    twice = engine_commands.bench_engines([engine], [(2, 8), (1, 8), (2, 8)], rounds=1)
    assert [(timing.batch, timing.sequence) for timing in twice.timings] == [(2, 8), (1, 8)]
    report = engine_commands.bench_engines([engine], rounds=1)
    assert [(timing.batch, timing.sequence) for timing in report.timings] == [(1, 32), (8, limit)]


def test_a_timing_cache_that_another_backend_left_is_not_given_to_one_that_refuses_it(tmp_path: Path) -> None:
    (tmp_path / "timing.cache").touch()
    found = {
        name: engine_commands._build_options(name, BuildOptions(), tmp_path, tmp_path, None).timing_cache
        for name in ("trt", "trt_rtx", "cusparselt")
    }
    assert found == {"trt": tmp_path / "timing.cache", "trt_rtx": None, "cusparselt": None}

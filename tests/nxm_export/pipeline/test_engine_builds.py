"""Engines are built by options that their backend heeds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engines.base import BuildOptions, LoadOptions, Profile
from nxm_export.errors import EngineError
from nxm_export.pipeline import engine_builds


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ort", BuildOptions(level=3, workspace_bytes=1), "ort has no use for level, workspace_bytes"),
        ("ort", BuildOptions(profiles=[Profile((1, 1), (1, 8), (1, 8))]), "ort has no use for profiles"),
        ("openvino", BuildOptions(oldest_onnxruntime="1.19"), "openvino has no use for oldest_onnxruntime"),
        ("openvino", BuildOptions(sparse="always", fuse=False), "has no use for --sparse always, no fusion"),
        ("trt", BuildOptions(threads=2), "trt has no use for threads"),
        ("trt_rtx", BuildOptions(timing_cache=Path("timing.cache")), "trt_rtx has no use for timing_cache"),
    ],
)
def test_an_option_that_a_backend_would_not_heed_is_refused(
    name: str, options: BuildOptions, words: str, tiny_graph: Callable[..., Path], tmp_path: Path
) -> None:
    """In Python, too, as on the command line."""
    with pytest.raises(EngineError, match=words):
        engine_builds.build_engine(tiny_graph("bert", "inputs"), tmp_path / "engine", name, options)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("threads", [0, -2, 10**9])
def test_a_number_of_threads_that_no_machine_has_is_refused(threads: int) -> None:
    for kind in (BuildOptions, LoadOptions):
        with pytest.raises(EngineError, match="runs on 1 to 65536 threads"):
            kind(threads=threads)


def test_a_timing_cache_that_another_backend_left_is_not_given_to_one_that_refuses_it(tmp_path: Path) -> None:
    (tmp_path / "timing.cache").touch()
    found = {
        name: engine_builds._build_options(name, BuildOptions(), tmp_path, tmp_path, None).timing_cache
        for name in ("trt", "trt_rtx", "cusparselt")
    }
    assert found == {"trt": tmp_path / "timing.cache", "trt_rtx": None, "cusparselt": None}

"""What the builder's process says is taken as it is meant or refused, and a timing cache is used only where it fits."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engines.base import Profile
from engines.tensorrt import builder_process
from engines.tensorrt.builder_process import BuildRequest, build_in_child, seal_cache, usable_cache
from nxm_export.errors import EngineError
from nxm_export.progress import silent

IDENTITY = {"tensorrt": "11.4", "gpu": "A GPU"}
FACTS = '{"facts": {"tensorrt": "11.4", "strongly_typed": true, "bindings": {"inputs": [], "outputs": []}}}'


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., BuildRequest]:
    """``child("line", ...)``: the request of a build whose process writes these lines as its report, and an engine."""

    def make(*lines: str, torn: str = "", code: int = 0) -> BuildRequest:
        report = "".join(f"{line}\n" for line in lines) + torn
        script = f"""
import os, sys
open({str(tmp_path / "model.engine")!r}, "w").close()
os.write(int(sys.argv[2]), {report.encode()!r})
print("[E] the last words")
sys.exit({code})
"""
        command = [sys.executable, "-c", script]
        monkeypatch.setattr(builder_process, "module_command", lambda module, *arguments: [*command, *arguments])
        return BuildRequest(
            "tensorrt",
            onnx="model.onnx",
            engine=str(tmp_path / "model.engine"),
            directory=str(tmp_path),
            profiles=(Profile((1, 1), (8, 64), (8, 64)),),
            sparse=True,
            level=None,
            workspace_bytes=None,
            inspect=False,
        )

    return make


class Context:
    """An execution context that takes the profiles and inputs that it is told."""

    def __init__(self, refused: str) -> None:
        self.refused, self.profile = refused, 0
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return self.refused != "profile"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return self.refused != name


@pytest.mark.parametrize(
    ("refused", "message"),
    [("profile", "does not inspect profile 1"), ("mask", r"does not inspect mask of shape \(8, 1, 64\) in profile 0")],
)
def test_a_report_of_another_profile_or_shape_is_none(
    refused: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT says so by a truth value alone, and goes on with the profile and shapes that it had."""
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'nxm-export[trt-rtx]'")
    import polygraphy.backend.trt

    monkeypatch.setattr(polygraphy.backend.trt, "get_trt_logger", lambda: None)
    shapes = {"ids": (-1, -1), "mask": (-1, 1, -1), "y": (-1, 2)}
    # A tab and a line feed of a name as they are, and Infinity: TensorRT writes both, and JSON has neither.
    inspected = SimpleNamespace(get_engine_information=lambda kind: '{"Layers": [{"Name": "a\t\n", "x": Infinity}]}')
    engine = SimpleNamespace(
        num_io_tensors=len(shapes),
        get_tensor_name=list(shapes).__getitem__,
        get_tensor_mode=lambda name: "out" if name == "y" else "in",
        get_tensor_shape=shapes.__getitem__,
        create_engine_inspector=lambda: inspected,
        create_execution_context=lambda: Context(refused),
    )
    trt: Any = SimpleNamespace(
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine),
        TensorIOMode=SimpleNamespace(INPUT="in"),
        LayerInformationFormat=SimpleNamespace(JSON="json"),
    )
    profiles = (Profile((1, 1), (8, 64), (8, 64)), Profile((1, 1), (1, 8), (1, 8)))
    with pytest.raises(builder_process._Refused, match=message):
        builder_process._inspect(trt, b"", profiles)
    refused = ""
    reports = builder_process._inspect(trt, b"", profiles)
    assert [(report.profile, report.shape) for report in reports] == [(0, (8, 64)), (1, (1, 8))]
    assert reports[0].information == {"Layers": [{"Name": "a\t\n", "x": "Infinity"}]}


def test_progress_and_facts_are_handed_on(child: Callable[..., BuildRequest], tmp_path: Path) -> None:
    progress: list[tuple[str, int, int]] = []
    request = child('{"progress": {"phase": "Building", "done": 1, "total": 2}}', FACTS)
    built = build_in_child(request, tmp_path / "build.log", lambda *report: progress.append(report))
    assert progress == [("Building", 1, 2)]
    assert (built.tensorrt, built.strongly_typed, built.cache_refused) == ("11.4", True, None)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"error": "layer x: no"}'], r"model\.onnx: layer x: no \(log: .*build\.log\)"),
        ([], r"the builder ended with 0 and wrote no engine: \[E\] the last words"),
        (["what is this"], r"the builder's report: not valid JSON .* see its log: .*build\.log"),
        (
            ['{"progress": {"phase": 5, "done": 1, "total": 2}}'],
            r"the builder's report: progress\.phase: Expected `str`",
        ),
        (['{"weather": "fine"}'], r"the builder's report: unknown field weather"),
    ],
)
def test_everything_else_is_an_error_with_the_log(
    child: Callable[..., BuildRequest], tmp_path: Path, lines: list[str], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        build_in_child(child(*lines), tmp_path / "build.log", silent)


def test_a_builder_that_is_killed_while_it_writes_is_quoted_from_its_log(
    child: Callable[..., BuildRequest], tmp_path: Path
) -> None:
    request = child(FACTS, torn='{"progress": {"phase": "Buil', code=9)
    with pytest.raises(EngineError, match=r"the builder ended with 9 and wrote no engine: \[E\] the last words"):
        build_in_child(request, tmp_path / "build.log", silent)


def test_a_timing_cache_fits_where_it_was_measured(tmp_path: Path) -> None:
    cache = tmp_path / "timing.cache"
    assert usable_cache(cache, IDENTITY) == "there is none"
    cache.write_bytes(b"times")
    seal_cache(cache, IDENTITY)
    assert usable_cache(cache, IDENTITY) is None
    other = usable_cache(cache, {**IDENTITY, "gpu": "Another"})
    assert other == "it was measured on tensorrt 11.4, gpu A GPU, and this is tensorrt 11.4, gpu Another"
    cache.write_bytes(b"torn")
    assert "it is damaged" in str(usable_cache(cache, IDENTITY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda seal: seal.update(identity=[]), "identity: Expected `object`, got `array`"),
        (lambda seal: seal.update(colour="red"), "unknown field colour"),
        (lambda seal: seal.update(schema="nxm-timing-cache/9"), "schema nxm-timing-cache/9 is not"),
        (lambda seal: seal.clear(), "not a nxm-timing-cache/1 file"),
    ],
)
def test_a_cache_whose_seal_is_damaged_is_not_used(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"times")
    seal_cache(cache, IDENTITY)
    file = tmp_path / "timing.cache.json"
    seal = json.loads(file.read_text())
    change(seal)
    file.write_text(json.dumps(seal))
    reason = str(usable_cache(cache, IDENTITY))
    assert "so nothing says what it was measured on" in reason
    assert message in reason

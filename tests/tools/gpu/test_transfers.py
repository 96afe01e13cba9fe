"""What travels to a GPU machine: the tree's room, checkpoints in pieces."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nxm_export.errors import ArtifactError
from tools import ROOT
from tools.gpu import checkpoints, transfers
from tools.gpu.tensorrt86 import pack


def test_the_tree_fits_into_the_room_that_pieces_leave_for_it() -> None:
    """A transfer with the largest piece would be refused on first contact."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\0")
    files = [ROOT / name for name in listed if name and (ROOT / name).is_file()]
    if not files:
        pytest.skip("this tree has no history here")
    assert sum(file.stat().st_size for file in files) / 2**20 < transfers.TREE_MIB - 0.5, "half a MiB is for wheels"
    assert pack.CHUNK_BYTES == transfers.PART_MIB << 20


def test_trained_checkpoints_travel_in_pieces_and_are_the_same_there(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = {"one": tiny_checkpoint("bert"), "two": tiny_checkpoint("mpnet")}
    for name, checkpoint in source.items():
        shutil.copytree(checkpoint, tmp_path / name / "checkpoint")
    folder, place = tmp_path / "carried", tmp_path / "there"
    manifest = checkpoints.pack([tmp_path / name / "checkpoint" for name in source], folder, part_mib=40_000 / 2**20)
    parts = sorted(folder.glob("c*"))
    assert len(parts) > 2
    sizes = [sum(file.stat().st_size for file in part.iterdir()) for part in parts]
    assert set(sizes[:-1]) == {40_000}
    assert [carried.name for carried in manifest.files] == list(source)
    unpacking = ["unpack", "--folder", str(folder), "--out", str(place)]
    late = parts[-1].rename(tmp_path / "late")
    assert checkpoints.main(unpacking) == 2
    assert f"missing: {parts[-1].name}/two" in capsys.readouterr().out
    assert [entry.name for entry in place.iterdir()] == ["one"]
    late.rename(parts[-1])
    assert checkpoints.main(unpacking) == 0
    for name, checkpoint in source.items():
        ours, theirs = (load_file(path / "model.safetensors") for path in (checkpoint, place / name))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_pieces_that_are_damaged_or_of_two_checkpoints_of_one_name_are_refused(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, folder = tiny_checkpoint("bert"), tmp_path / "carried"
    with pytest.raises(ArtifactError, match="two checkpoints are named"):
        checkpoints.pack([checkpoint, checkpoint], folder)
    assert not folder.exists()
    checkpoints.pack([checkpoint], folder)
    (piece,) = folder.glob("c01/*")
    data = bytearray(piece.read_bytes())
    data[len(data) // 2] ^= 1
    piece.write_bytes(data)
    assert checkpoints.main(["unpack", "--folder", str(folder), "--out", str(tmp_path / "there")]) == 1
    assert "is not what was packed; send its pieces again" in capsys.readouterr().err
    assert not [*(tmp_path / "there").iterdir()]
    assert checkpoints.main(["unpack", "--folder", str(tmp_path), "--out", str(tmp_path / "there")]) == 1

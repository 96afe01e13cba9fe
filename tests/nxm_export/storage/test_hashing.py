"""Hashes of files and directories, beside sha256 by other means."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from nxm_export.errors import ArtifactError
from nxm_export.storage import hashing
from nxm_export.storage.hashing import file_hash, file_hashes, tree_hash


@pytest.mark.parametrize("size", [0, 1, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_a_files_hash_is_that_of_its_bytes_in_every_python(tmp_path: Path, size: int) -> None:
    file, data = tmp_path / "file", bytes(i % 251 for i in range(size))
    file.write_bytes(data)
    assert file_hash(file) == hashlib.sha256(data).hexdigest()
    with file.open("rb") as stream:  # what Python 3.10 takes
        assert hashing._digest(stream) == file_hash(file)


def test_a_files_hash_is_what_sha256sum_prints(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"weights")
    done = subprocess.run(["sha256sum", "file"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == file_hash(tmp_path / "file")


def test_files_are_named_by_path_and_logs_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b", "build.log", "deep/timing.cache"):
        (tmp_path / name).write_text(name)
    assert file_hashes(tmp_path) == {name: file_hash(tmp_path / name) for name in ("a", "deep/b")}


def test_a_trees_hash_is_of_names_and_contents_and_of_nothing_else(tmp_path: Path) -> None:
    def tree(name: str, files: dict[str, str]) -> str:
        for file, text in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(text)
        return tree_hash(tmp_path / name)

    first = tree("first", {"a": "1", "b/c": "2"})
    assert tree("the same", {"b/c": "2", "a": "1", "build.log": "later"}) == first
    others = [{"a": "1", "b/c": "3"}, {"a": "1", "b/d": "2"}, {"a": "1"}, {"a": "2", "b/c": "1"}, {"a": "1", "b": "2"}]
    assert len({first, *(tree(f"other {n}", files) for n, files in enumerate(others))}) == 1 + len(others)
    assert tree_hash(tmp_path / "first" / "a") == file_hash(tmp_path / "first" / "a")


def test_what_is_not_there_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="gone: no such file or directory"):
        tree_hash(tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"gone: cannot be read \(No such file or directory\)"):
        file_hash(tmp_path / "gone")

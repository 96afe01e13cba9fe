"""A file that could not be opened is not called damaged where nothing could be opened."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.passport import EnginePassport, load_passport
from nxm_export.errors import ArtifactError
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import read_json
from nxm_export.storage.unreadable import is_without_room, unreadable

UNCOVERED = EnginePassport("ort", "e", "", "", {}, {}, {}, (), {}, None, {}, (), "", companions=None)
READERS: dict[str, Callable[[Path], object]] = {
    "json": lambda file: read_json(file, "build it again"),
    "hash": file_hash,
    "passport": lambda file: load_passport(file.parent),
    "companion": lambda file: EnginePassport.read_companion(UNCOVERED, file.parent, file.name),
}


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.EMFILE, "ulimit -n"), (errno.ENFILE, "ulimit -n"), (errno.ENOMEM, "memory")]
)
@pytest.mark.parametrize("reader", READERS)
def test_the_cause_is_named_and_nothing_said_against_the_file(
    reader: str, number: int, advice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "passport.json"
    file.write_text("{}")

    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(file))

    monkeypatch.setattr("pathlib.Path.open", full)
    monkeypatch.setattr("pathlib.Path.read_bytes", full)
    monkeypatch.setattr("pathlib.Path.read_text", full)
    with pytest.raises(ArtifactError) as refused:
        READERS[reader](file)
    assert f"{file}: cannot be read ({os.strerror(number)})" in str(refused.value)
    assert advice in str(refused.value)
    assert "again" not in str(refused.value)
    assert is_without_room(refused.value)


def test_what_is_about_the_file_itself_keeps_its_advice(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Is a directory\); build it again") as refused:
        read_json(tmp_path, "build it again")
    assert not is_without_room(refused.value)
    text = unreadable("a.bin", Exception("Too many open files (os error 24)"), "pack it again")
    assert text.startswith("a.bin: cannot be read (Too many open files (os error 24)); too many files are open")
    assert is_without_room(MemoryError())

"""Too little space is said before anything is written, with what is needed and what there is."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from nxm_export.errors import ArtifactError
from nxm_export.storage.disk_space import require_space, written_in


def test_a_directory_that_is_not_there_yet_is_on_the_disk_of_what_is_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=2_500_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    require_space(tmp_path / "a" / "b", 2_500_000_000, "a run")
    with pytest.raises(ArtifactError, match=r"b: a run needs about 3\.0 GB, and its disk has 2\.5 GB free"):
        require_space(tmp_path / "a" / "b", 3_000_000_000, "a run")
    assert asked == [tmp_path, tmp_path]


def test_a_disk_that_does_not_say_is_not_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(path: Path) -> None:
        raise OSError("no statvfs here")

    monkeypatch.setattr(shutil, "disk_usage", unknown)
    require_space(tmp_path, 10**18, "a run")


def test_what_is_written_already_counts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"12345")
    assert (written_in(tmp_path), written_in(tmp_path / "none")) == (5, 0)

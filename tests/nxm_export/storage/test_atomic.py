"""Directories and files that are written whole or not at all, and never over what is not ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nxm_export.errors import ArtifactError
from nxm_export.storage.atomic import (
    atomic_dir,
    disk_errors,
    is_disk_error,
    require_apart,
    require_replaceable,
    write_atomic,
)
from nxm_export.storage.run_dir import RunDir


class TestAtomicDir:
    @pytest.mark.parametrize(
        "files",
        [
            ("config.json", "nxm_plan.json"),
            ("config.json", "metrics.json"),
            ("model.onnx", "spec.json"),
            ("passport.json",),
            (),
        ],
    )
    def test_a_directory_of_ours_is_replaced_as_a_whole(self, tmp_path: Path, files: tuple[str, ...]) -> None:
        target = tmp_path / "out"
        target.mkdir()
        for name in files:
            (target / name).write_text("old")
        with atomic_dir(target) as scratch:
            assert {path.name for path in target.iterdir()} == set(files)
            (scratch / "new").write_text("new")
        assert [path.name for path in target.iterdir()] == ["new"]
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    @pytest.mark.parametrize("files", [("thesis.tex",), ("metrics.json",), ("config.json",), ("model.onnx",)])
    def test_a_foreign_directory_is_never_replaced(self, tmp_path: Path, files: tuple[str, ...]) -> None:
        for name in files:
            (tmp_path / name).write_text("years of work")
        refused = pytest.raises(ArtifactError, match="nxm-export did not make it: it would be replaced as a whole")
        with refused, atomic_dir(tmp_path):
            pytest.fail("the work began")
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)

    def test_files_links_and_the_root_are_never_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        (tmp_path / "link").symlink_to(tmp_path)
        for target in (tmp_path / "file", tmp_path / "link", Path("/")):
            with pytest.raises(ArtifactError, match="is not a directory of nxm-export"):
                require_replaceable(target)

    def test_leftovers_of_a_killed_process_are_cleared(self, tmp_path: Path) -> None:
        (tmp_path / ".out.partial" / "deep").mkdir(parents=True)
        (tmp_path / ".out.partial" / "half").write_text("half")
        with atomic_dir(tmp_path / "out") as scratch:
            assert list(scratch.iterdir()) == []
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_what_a_killed_process_was_replacing_is_not_lost(self, tmp_path: Path) -> None:
        """It may be killed when the old directory has left its place, and the new one has not taken it."""
        (tmp_path / ".out.partial").mkdir()
        (tmp_path / ".out.old").mkdir()
        (tmp_path / ".out.old" / "passport.json").write_text("old")
        with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "out"):
            1 / 0  # noqa: B018
        assert (tmp_path / "out" / "passport.json").read_text() == "old"
        with atomic_dir(tmp_path / "out") as scratch:
            (scratch / "new").write_text("new")
        assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]

    def test_the_old_one_comes_back_where_the_new_one_cannot_take_its_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "passport.json").write_text("old")
        rename = Path.rename

        def failing(path: Path, target: Path) -> Path:
            if path.name == ".out.partial":
                raise OSError(errno.EIO, "Input/output error")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(ArtifactError, match="cannot be written"), atomic_dir(tmp_path / "out"):
            pass
        assert (tmp_path / "out" / "passport.json").read_text() == "old"

    def test_two_writers_of_one_directory_are_told_apart(self, tmp_path: Path) -> None:
        with atomic_dir(tmp_path / "out") as scratch:
            (scratch / "mine").write_text("")
            refused = pytest.raises(ArtifactError, match="is being written by another nxm process; wait for it")
            with refused, atomic_dir(tmp_path / "out"):
                pytest.fail("both write")
        assert (tmp_path / "out" / "mine").is_file()

    @pytest.mark.parametrize("out", ["in", "in/..", "link", "other/../in", "in/sub/.."])
    @pytest.mark.parametrize("given", ["in", "in/file", "in/sub"])
    def test_what_is_read_is_never_replaced(self, tmp_path: Path, given: str, out: str) -> None:
        (tmp_path / "in" / "sub").mkdir(parents=True)
        (tmp_path / "in" / "file").write_text("")
        (tmp_path / "other").mkdir()
        (tmp_path / "link").symlink_to("in")
        with pytest.raises(ArtifactError, match=r"would be replaced, and .* is or lies in it"):
            require_apart(tmp_path / out, tmp_path / given)
        require_apart(tmp_path / "in" / "new", tmp_path / given)
        require_apart(tmp_path / "innocent", tmp_path / given, "no-such-file", within=False)
        if given != "in/file":
            with pytest.raises(ArtifactError, match="which is read; choose another"):
                require_apart(tmp_path / given / "new", tmp_path / given, within=False)

    def test_a_foreign_error_keeps_its_type(self, tmp_path: Path) -> None:
        with pytest.raises(ZeroDivisionError), atomic_dir(tmp_path / "out"):
            1 / 0  # noqa: B018


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_have_the_rights_that_the_umask_gives_whoever_wrote_them(tmp_path: Path, umask: int, mode: int) -> None:
    elsewhere = tmp_path / "elsewhere"
    before = os.umask(umask)
    try:
        with atomic_dir(tmp_path / "out") as scratch:
            (scratch / "below").mkdir()
            for file in (scratch / "model.safetensors", scratch / "below" / "script", elsewhere):
                file.touch()
                file.chmod(0o600)
            (scratch / "below" / "script").chmod(0o700)
            os.link(elsewhere, scratch / "linked")
            (scratch / "nowhere").symlink_to(tmp_path / "nothing")
    finally:
        os.umask(before)
    found = {name: (tmp_path / "out" / name).stat().st_mode & 0o777 for name in ("model.safetensors", "below/script")}
    assert found == {"model.safetensors": mode, "below/script": mode | 0o100}
    assert elsewhere.stat().st_mode & 0o777 == 0o600, "a file that lies elsewhere, too"


def test_what_was_made_is_not_lost_where_rights_cannot_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    with atomic_dir(tmp_path / "out") as scratch:
        os.close(os.open(scratch / "model.safetensors", os.O_CREAT | os.O_WRONLY, 0o600))
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o600


def test_a_directory_that_is_not_writable_is_named(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="cannot create the run directory"):
        RunDir(tmp_path / "run")
    with pytest.raises(ArtifactError, match="cannot be written"), atomic_dir(tmp_path / "out"):
        pass


def test_a_path_below_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be made"), atomic_dir(tmp_path / "file" / "out"):
        pass
    with pytest.raises(ArtifactError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "x.json", "{}")


def test_the_file_that_a_copy_could_not_write_is_named_and_not_the_one_that_it_read(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"^to: cannot be written \(No space left on device\)"),
        disk_errors(tmp_path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "from", None, "to")


def test_only_disk_errors_are_disk_errors() -> None:
    chained = RuntimeError("writer failed")
    chained.__cause__ = OSError(28, "No space left on device")
    assert is_disk_error(chained)
    assert not is_disk_error(FileNotFoundError(2, "No such file or directory"))
    assert not is_disk_error(ValueError("x"))


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomic(file, "old")
    write_atomic(file, b"new")
    assert file.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_the_log_of_what_failed_stays_and_the_error_names_it(tmp_path: Path) -> None:
    target = tmp_path / "engine"

    def fail() -> None:
        with atomic_dir(target, kept_log="build.log") as scratch:
            (scratch / "part").mkdir()
            (scratch / "part" / "build.log").write_text("what went wrong")
            raise ArtifactError(f"it failed (log: {scratch / 'part' / 'build.log'})")

    with pytest.raises(ArtifactError) as failure:
        fail()
    assert str(failure.value) == f"it failed (log: {target}.build.log)"
    assert (tmp_path / "engine.build.log").read_text() == "what went wrong"
    assert [file.name for file in tmp_path.iterdir()] == ["engine.build.log"]
    with pytest.raises(ArtifactError) as failure, atomic_dir(target, kept_log="build.log"):
        raise ArtifactError("before there was a log")
    assert str(failure.value) == "before there was a log"

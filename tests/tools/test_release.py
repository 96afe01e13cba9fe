"""A release bumps the version, dates the changelog, builds packages and tries the wheel; or says why not, and changes
nothing."""

from __future__ import annotations

import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from tools import ROOT
from tools.release import ReleaseError, bumped, dated, release

LOG = "# Changes\n\n## 9.1.0 (unreleased)\n\n- A thing.\n\n## 0.1.0 (2026-01-01)\n\n- The first.\n"


def git(tree: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    done = subprocess.run(["git", "-C", str(tree), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with what the packages hold."""
    tree = tmp_path_factory.mktemp("release") / "tree"
    tree.mkdir()
    for name in ("nxm_export", "compressors", "engines"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE", ".gitignore"):
        shutil.copy(ROOT / name, tree)
    (tree / "CHANGELOG.md").write_text(LOG, encoding="utf-8")
    git(tree, "init", "--quiet", "--initial-branch", "main")
    git(tree, "config", "user.name", "A")
    git(tree, "config", "user.email", "a@example.org")
    git(tree, "add", ".")
    git(tree, "commit", "--quiet", "-m", "all")
    return tree


def test_a_dry_run_makes_everything_and_changes_nothing(origin: Path) -> None:
    packages = release(origin, "9.1.0", "2026-02-03", dry_run=True)
    assert [package.name for package in packages] == ["nxm_export-9.1.0-py3-none-any.whl", "nxm_export-9.1.0.tar.gz"]
    assert git(origin, "status", "--porcelain") == ""
    assert git(origin, "tag") == ""
    assert not (origin / "dist").exists()


def test_a_release_is_a_commit_a_tag_and_two_packages(origin: Path, tmp_path: Path) -> None:
    tree = Path(shutil.copytree(origin, tmp_path / "tree"))
    wheel, source = release(tree, "9.1.0", "2026-02-03", dry_run=False)
    assert (wheel.parent, source.parent) == (tree / "dist", tree / "dist")
    with zipfile.ZipFile(wheel) as archive:
        assert '__version__ = "9.1.0"' in archive.read("nxm_export/__init__.py").decode()
    assert "## 9.1.0 (2026-02-03)\n\n- A thing." in (tree / "CHANGELOG.md").read_text(encoding="utf-8")
    assert git(tree, "log", "-1", "--format=%s") == "Release 9.1.0"
    assert git(tree, "tag") == "v9.1.0"
    assert git(tree, "status", "--porcelain") == "", "packages are ignored by git"


def test_a_tree_with_changes_is_refused(origin: Path, tmp_path: Path) -> None:
    tree = Path(shutil.copytree(origin, tmp_path / "tree"))
    (tree / "README.md").write_text("changed", encoding="utf-8")
    with pytest.raises(ReleaseError, match=r"not committed \(M README.md"):
        release(tree, "9.1.0", "2026-02-03", dry_run=True)


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("# Changes\n\n## 0.1.0 (2026-01-01)\n\n- The first.\n", "has no section '## 9.1.0 .unreleased.'"),
        ("# Changes\n\n## 9.1.0 (unreleased)\n\n## 0.1.0 (2026-01-01)\n\n- x\n", "is empty"),
    ],
)
def test_a_version_that_the_changelog_does_not_describe_is_refused(log: str, message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        dated(log, "9.1.0", "2026-02-03")


@pytest.mark.parametrize(
    ("version", "message"), [("0.9.9", "older than 1.0.0"), ("1.1", "is no version"), ("v1.1.0", "is no version")]
)
def test_versions_are_three_numbers_and_rise(version: str, message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        bumped('__version__ = "1.0.0"\n', version)


def test_the_real_files_can_be_released() -> None:
    version = (ROOT / "nxm_export" / "__init__.py").read_text(encoding="utf-8")
    assert '__version__ = "99.0.0"' in bumped(version, "99.0.0")
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert log.count(" (unreleased)\n") <= 1

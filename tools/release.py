"""Make a release: version, changelog, packages, check of the wheel, commit and tag. Nothing is pushed or published.

    python -m tools.release 0.2.0 --dry-run     everything in a copy; this tree stays as it is
    python -m tools.release 0.2.0

The tree must be clean, and CHANGELOG.md must have a section ``## 0.2.0 (unreleased)`` with something in it; the date of
the release takes the place of ``unreleased``. The packages are built from a copy of HEAD with those two changes, and
the wheel is installed into a fresh virtual environment, whose other packages are those of this one. Then ``dist/`` has
them, and the changes are committed and tagged here.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from tools import ROOT

VERSION_FILE, CHANGELOG = Path("nxm_export/__init__.py"), Path("CHANGELOG.md")
_VERSION = re.compile(r'^__version__ = "([^"]+)"$', re.MULTILINE)


class ReleaseError(Exception):
    """Why there can be no release, and what to do."""


def release(root: Path, version: str, date: str, *, dry_run: bool) -> list[Path]:
    """Build and check the packages of a version; returns them. Without `dry_run`, commit and tag it in the repository
    `root`."""
    require_clean(root)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "tree"
        with tarfile.open(fileobj=BytesIO(_git(root, "archive", "HEAD"))) as archive:
            archive.extractall(copy, filter="data")
        changed = {
            VERSION_FILE: bumped((copy / VERSION_FILE).read_text(encoding="utf-8"), version),
            CHANGELOG: dated((copy / CHANGELOG).read_text(encoding="utf-8"), version, date),
        }
        for file, text in changed.items():
            (copy / file).write_text(text, encoding="utf-8")
        packages = build(copy, Path(scratch) / "dist")
        check_wheel(next(file for file in packages if file.suffix == ".whl"), version, Path(scratch) / "venv")
        if dry_run:
            return [Path("dist") / package.name for package in packages]
        for file, text in changed.items():
            (root / file).write_text(text, encoding="utf-8")
        (root / "dist").mkdir(exist_ok=True)
        made = [Path(shutil.copy(package, root / "dist")) for package in packages]
    _git(root, "commit", "--quiet", "-m", f"Release {version}", "--", *map(str, changed))
    _git(root, "tag", "-a", f"v{version}", "-m", f"nxm-export {version}")
    return made


def require_clean(root: Path) -> None:
    """Raise `ReleaseError` when the repository has changes that are not committed."""
    changes = _git(root, "status", "--porcelain").decode().splitlines()
    if changes:
        raise ReleaseError(
            f"the tree has changes that are not committed ({changes[0].strip()}, ...): commit or stash them"
        )


def bumped(text: str, version: str) -> str:
    """The text of ``nxm_export/__init__.py`` with this version, which must be the one there or a later one."""
    match = _VERSION.search(text)
    if match is None:
        raise ReleaseError(f'{VERSION_FILE} has no line __version__ = "..."')
    if _numbers(version) < _numbers(match[1]):
        raise ReleaseError(f"version {version} is older than {match[1]}, which {VERSION_FILE} has")
    return _VERSION.sub(f'__version__ = "{version}"', text, count=1)


def dated(text: str, version: str, date: str) -> str:
    """The changelog with the date in the head of the version's section, which must say something."""
    head = f"## {version} (unreleased)"
    before, there, after = text.partition(f"{head}\n")
    if not there:
        raise ReleaseError(f"{CHANGELOG} has no section {head!r}: write down what this version changes")
    if not after.partition("\n## ")[0].strip():
        raise ReleaseError(f"{CHANGELOG}: the section {head!r} is empty: write down what this version changes")
    return f"{before}## {version} ({date})\n{after}"


def build(tree: Path, out: Path) -> list[Path]:
    """Wheel and source distribution of a tree."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(out)],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ReleaseError(f"the packages cannot be built:\n{done.stderr[-2000:]}")
    return sorted(out.iterdir())


def check_wheel(wheel: Path, version: str, home: Path) -> None:
    """Install a wheel into a fresh environment and ask `nxm` for its version.

    The environment sees the packages of this one behind its own, so nothing is downloaded, and `nxm` is the wheel's.
    """
    venv.create(home)
    python, site = home / "bin" / "python", next((home / "lib").glob("python3.*")) / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "--disable-pip-version-check"]
    installed = subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", str(wheel)], capture_output=True, text=True, check=False
    )
    if installed.returncode:
        raise ReleaseError(f"{wheel.name} cannot be installed:\n{installed.stderr[-2000:]}")
    (site / "packages.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    asked = _outside(home, home / "bin" / "nxm", "--version")
    if asked.strip() != f"nxm, version {version}":
        raise ReleaseError(f"{wheel.name}: nxm --version says {asked.strip()!r}")
    where = _outside(home, python, "-c", "import nxm_export; print(nxm_export.__file__)").strip()
    if not Path(where).is_relative_to(site):
        raise ReleaseError(f"{wheel.name}: nxm_export is imported from {where}, not from the wheel")


def _outside(directory: Path, *command: str | Path) -> str:
    """What a command prints that is run away from this tree."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def _numbers(version: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        raise ReleaseError(f"{version!r} is no version; give three numbers, such as 0.2.0")
    return tuple(map(int, version.split(".")))


def _git(root: Path, *arguments: str) -> bytes:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    if done.returncode:
        raise ReleaseError(f"git {arguments[0]} failed: {done.stderr.decode().strip()}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="three numbers, such as 0.2.0")
    parser.add_argument("--dry-run", action="store_true", help="do everything in a copy, and change nothing here")
    options = parser.parse_args(arguments)
    try:
        packages = release(ROOT, options.version, datetime.date.today().isoformat(), dry_run=options.dry_run)
    except ReleaseError as error:
        print(f"tools.release: {error}", file=sys.stderr)
        return 1
    for package in packages:
        print(f"{'would make' if options.dry_run else 'made'} {package}")
    if not options.dry_run:
        print(f"committed and tagged v{options.version}; to publish: git push --follow-tags, then upload dist/")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""One directory per run, and a manifest that says what made every file in it.

A stage is a function from input files and options to one output path. Its record in ``manifest.json`` holds the hashes of
both sides, so a stage whose inputs, options and outputs are unchanged is skipped, and a changed one runs again. Outputs
are written under another name and renamed when complete: a stage that is killed leaves nothing half-written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nxm_export.errors import ArtifactError
from nxm_export.plan import require_schema

SCHEMA = "nxm-run/1"
MANIFEST = "manifest.json"
UNHASHED = ("build.log", "timing.cache")  # side products that a rebuild may change without changing the engine
RECORDED_VERSIONS = (
    "nxm-export",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "openvino",
)


class RunDir:
    """A run directory and its manifest. Opening one creates it; an existing directory that is no run is refused."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        manifest = self.root / MANIFEST
        if manifest.is_file():
            self.manifest = _read_manifest(manifest)
            return
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            raise ArtifactError(
                f"{self.root} exists and is not a run directory (no {MANIFEST}); choose another --out or an empty directory"
            )
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"{self.root}: cannot create the run directory ({error.strerror})") from error
        self.manifest = {"schema": SCHEMA, "stages": {}}
        self._write()

    @classmethod
    def open(cls, root: str | Path) -> RunDir:
        """Open an existing run; raises `ArtifactError` when `root` is none."""
        if not (Path(root) / MANIFEST).is_file():
            raise ArtifactError(f"{root} is not a run directory (no {MANIFEST}); give the --out of an `nxm run`")
        return cls(root)

    def path(self, *parts: str) -> Path:
        """A path inside the run."""
        return self.root.joinpath(*parts)

    def stage(
        self,
        name: str,
        output: str,
        work: Callable[[Path], Any],
        *,
        inputs: Mapping[str, Path] | None = None,
        options: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> bool:
        """Bring ``root/output`` up to date with `work`; True when it ran, False when it was up to date.

        `work` gets a fresh directory, fills it, and the directory becomes `output` when it returns. `inputs` are files or
        directories by label; their hashes, `options` and `seed` decide whether the stage is up to date.
        """
        record: dict[str, Any] = {
            "options": json.loads(json.dumps(dict(options or {}), default=str)),
            "inputs": {label: tree_hash(path) for label, path in (inputs or {}).items()},
            "seed": seed,
        }
        target = self.root / output
        previous = self.manifest["stages"].get(name)
        if (
            previous
            and {key: previous.get(key) for key in record} == record
            and _outputs_hold(previous["outputs"], self.root)
        ):
            return False
        started = time.monotonic()
        with atomic_dir(target) as scratch:
            work(scratch)
        record["outputs"] = {str(Path(output) / file): digest for file, digest in file_hashes(target).items()}
        record["versions"] = installed_versions()
        record["seconds"] = round(time.monotonic() - started, 3)
        record["command"] = [Path(sys.argv[0]).name, *sys.argv[1:]]
        self.manifest["stages"][name] = record
        self._write()
        return True

    def _write(self) -> None:
        write_atomic(self.root / MANIFEST, json.dumps(self.manifest, indent=1) + "\n")


def _read_manifest(file: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error}); restore it, or start a new run directory") from error
    require_schema(manifest, SCHEMA, str(file), ArtifactError)
    return manifest


def _outputs_hold(outputs: Mapping[str, str], root: Path) -> bool:
    return bool(outputs) and all(
        (root / name).is_file() and file_hash(root / name) == digest for name, digest in outputs.items()
    )


@contextlib.contextmanager
def atomic_dir(target: Path) -> Iterator[Path]:
    """A scratch directory that becomes `target` if the block succeeds, and disappears if it does not.

    An existing `target` is replaced. Disk errors become `ArtifactError`.
    """
    scratch = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        yield scratch
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        scratch.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise ArtifactError(
            f"{error.filename or target}: cannot be written ({error.strerror or error}); free the space or choose another place"
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def write_atomic(file: Path, text: str) -> None:
    """Write a text file so that it is either the old or the new one, never half of it."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        raise ArtifactError(
            f"{file}: cannot be written ({error.strerror}); free the space or choose another place"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def file_hash(path: Path) -> str:
    """sha256 of a file, as hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(stream)


def _digest(stream: Any) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def file_hashes(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory, by relative path; build logs and timing caches are left out."""
    files = sorted(file for file in directory.rglob("*") if file.is_file() and file.name not in UNHASHED)
    return {file.relative_to(directory).as_posix(): file_hash(file) for file in files}


def tree_hash(path: Path) -> str:
    """One sha256 for a file, or for a directory's names and contents; raises `ArtifactError` when it is missing."""
    if path.is_file():
        return file_hash(path)
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such file or directory")
    return hashlib.sha256(json.dumps(file_hashes(path)).encode()).hexdigest()


def installed_versions() -> dict[str, str]:
    """Versions of Python and of those packages, of the ones that matter for a result, that are installed."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in RECORDED_VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found

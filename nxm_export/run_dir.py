"""One directory per run, and a manifest that says what made every file in it.

A stage is a function from input files and options to one output path. Its record in ``manifest.json`` holds the hashes of
both sides, so a stage whose inputs, options and outputs are unchanged is skipped, and a changed one runs again. Outputs
are written under another name and renamed when complete: a stage that is killed leaves nothing half-written.

A run directory, and a directory being written, belong to one process at a time. The lock is the kernel's, on the
directory itself, so it ends with its process, however that ends. On file systems without locks nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nxm_export.errors import ArtifactError, NxmError
from nxm_export.plan import parse_json, require_schema

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
# Directories that this project made, each known by the files in it: only these, and empty ones, are ever replaced.
OWN_DIRECTORIES = (
    ("config.json", "nxm_plan.json"),  # a compressed checkpoint
    ("config.json", "metrics.json"),  # a fine-tuned dense model
    ("model.onnx", "spec.json"),  # a graph
    ("passport.json",),  # an engine
    ("manifest.json", "check_manifest.py"),  # a model repository for Triton
)
_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO}
# Libraries that write files themselves turn the system's error into their own; its text stays.
_DISK_TEXTS = (
    "No space left on device",
    "File too large",
    "Disk quota exceeded",
    "Read-only file system",
    "Permission denied",
    "failed writing file",  # torch.save, which says no more than that
    "inline_container.cc",
)


class RunDir:
    """A run directory and its manifest. Opening one creates it; an existing directory that is no run is refused."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._locked = False
        if not self._manifest_file.is_file():
            self._create()
        self.manifest = _read_manifest(self._manifest_file)

    @classmethod
    def open(cls, root: str | Path) -> RunDir:
        """Open an existing run; raises `ArtifactError` when `root` is none."""
        if not (Path(root) / MANIFEST).is_file():
            raise ArtifactError(f"{root} is not a run directory (no {MANIFEST}); give the --out of an `nxm run`")
        return cls(root)

    def path(self, *parts: str) -> Path:
        """A path inside the run."""
        return self.root.joinpath(*parts)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from running stages here; raises `ArtifactError` when one already does. Re-entrant."""
        if self._locked:
            yield
            return
        with _exclusive(
            self.root, f"{self.root} is in use by another nxm process; wait for it, or choose another --out"
        ):
            for leftover in self.root.glob(f".{MANIFEST}.*.partial"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            self.manifest = _read_manifest(self._manifest_file)  # another process may have been here in between
            self._locked = True
            try:
                yield
            finally:
                self._locked = False

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
        with self.lock():
            previous = self.manifest["stages"].get(name, {})
            unchanged = {key: previous.get(key) for key in record} == record
            if unchanged and _outputs_hold(previous.get("outputs", {}), self.root):
                return False
            started = time.monotonic()
            with atomic_dir(target, replace_any=True) as scratch:
                work(scratch)
            record["outputs"] = {str(Path(output) / file): digest for file, digest in file_hashes(target).items()}
            record["versions"] = installed_versions()
            record["seconds"] = round(time.monotonic() - started, 3)
            record["command"] = [Path(sys.argv[0]).name, *sys.argv[1:]]
            self.manifest["stages"][name] = record
            write_atomic(self._manifest_file, json_text(self.manifest))
        return True

    @property
    def _manifest_file(self) -> Path:
        return self.root / MANIFEST

    def _create(self) -> None:
        try:
            # What a killed process had begun to write, under its own name, does not make a directory foreign.
            if self.root.exists() and not (
                self.root.is_dir() and all(file.name.endswith(".partial") for file in self.root.iterdir())
            ):
                raise ArtifactError(
                    f"{self.root} exists and is not a run directory (no {MANIFEST}); choose another --out or an empty directory"
                )
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"{self.root}: cannot create the run directory ({error.strerror}); choose another --out"
            ) from error
        with _exclusive(self.root, f"{self.root} is in use by another nxm process; choose another --out"):
            if not self._manifest_file.is_file():
                write_atomic(self._manifest_file, json_text({"schema": SCHEMA, "stages": {}}))


def _read_manifest(file: Path) -> dict[str, Any]:
    manifest = read_json(file, "restore it, or start a new run directory")
    require_schema(manifest, SCHEMA, str(file), ArtifactError)
    stages = manifest.get("stages")
    if not isinstance(stages, dict) or not all(isinstance(record, dict) for record in stages.values()):
        raise ArtifactError(f"{file}: malformed manifest (no stages); restore it, or start a new run directory")
    return dict(manifest)


def _outputs_hold(outputs: Any, root: Path) -> bool:
    return bool(isinstance(outputs, dict) and outputs) and all(
        (root / name).is_file() and file_hash(root / name) == digest for name, digest in outputs.items()
    )


@contextlib.contextmanager
def _exclusive(directory: Path, busy: str) -> Iterator[None]:
    """Hold the kernel's lock on `directory`; raises `ArtifactError` with the text `busy` when another process holds it."""
    import fcntl  # not on Windows, where this module must still import

    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ArtifactError(busy) from error
        except OSError:
            pass  # a file system without locks
        try:
            if not os.path.samestat(os.fstat(handle), os.stat(directory)):
                raise ArtifactError(busy)  # renamed by its owner between opening and locking
        except FileNotFoundError as error:
            raise ArtifactError(busy) from error
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_dir(target: Path, *, replace_any: bool = False) -> Iterator[Path]:
    """A scratch directory that becomes `target` if the block succeeds, and disappears if it does not.

    An existing `target` is replaced when it is empty or one of `OWN_DIRECTORIES`, or with `replace_any`; anything else is
    refused before the block runs, and so is a `target` that another process is writing. Disk errors become `ArtifactError`.
    """
    target = Path(os.path.abspath(target))
    if not replace_any:
        require_replaceable(target)
    scratch, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    with contextlib.ExitStack() as stack:
        with disk_errors(target):
            make_directory(scratch)
            stack.enter_context(_exclusive(scratch, f"{target} is being written by another nxm process; wait for it"))
            for leftover in scratch.iterdir():  # of a process that was killed
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        try:
            with disk_errors(target):
                yield scratch
                shutil.rmtree(old, ignore_errors=True)
                if os.path.lexists(target):
                    target.rename(old)
                scratch.rename(target)
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def require_replaceable(target: Path) -> None:
    """Raise `ArtifactError` when something that this project did not make is at `target`."""
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink() or not target.name:
        raise ArtifactError(f"{target} exists and is not a directory of nxm-export; choose another --out")
    try:
        files = {file.name for file in target.iterdir()}
    except OSError as error:
        raise ArtifactError(f"{target}: cannot be read ({error.strerror}); choose another --out") from error
    if files and not any(files.issuperset(marks) for marks in OWN_DIRECTORIES):
        raise ArtifactError(
            f"{target} exists and nxm-export did not make it: it would be replaced as a whole. Choose another --out, or remove it"
        )


def make_directory(directory: Path) -> None:
    """Make a directory and those above it; raises `ArtifactError` where that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{directory}: cannot be made ({error.strerror or error}); choose another place") from error


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a disk that is full or not writable, whoever met it, into an `ArtifactError` that names the file."""
    try:
        yield
    except NxmError:
        raise
    except Exception as error:
        if not is_disk_error(error):
            raise
        file = getattr(error, "filename", None) or target
        reason = getattr(error, "strerror", None) or f"the disk is full, or the file too large: {_first_line(error)}"
        raise ArtifactError(f"{file}: cannot be written ({reason}); free the space or choose another place") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_disk_error(error: BaseException) -> bool:
    """True when the error, or one that caused it, says that the disk is full or not writable."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _DISK_ERRNOS | {errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}:
            return True
        if any(text in str(seen) for text in _DISK_TEXTS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def write_atomic(file: Path, content: str | bytes) -> None:
    """Write a file so that it is either the old or the new one, never half of it."""
    scratch = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        scratch.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        scratch.replace(file)
    except OSError as error:
        raise ArtifactError(
            f"{file}: cannot be written ({error.strerror or error}); free the space or choose another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def read_json(file: Path, way_out: str) -> Any:
    """The value of a JSON file; raises `ArtifactError` with `way_out` when it cannot be read or is not JSON."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error.strerror}); {way_out}") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{file}: not a JSON file (it is not UTF-8 text); {way_out}") from error
    return parse_json(text, str(file), way_out, ArtifactError)


def json_text(value: Any) -> str:
    """JSON that every reader takes: NaN and infinity, which JSON does not have, are null."""
    return json.dumps(_finite(value), indent=1, default=str, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def file_hash(path: Path) -> str:
    """sha256 of a file, as hex; raises `ArtifactError` when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(stream)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror})") from error


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

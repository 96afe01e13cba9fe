"""One directory per run, and a manifest that says what made every file in it.

A stage is a function from input files and options to one output path. Its record in ``manifest.json`` holds the hashes
of both sides, so a stage whose inputs, options and outputs are unchanged is skipped, and a changed one runs again.
Outputs are written under another name and renamed when complete: a stage that is killed leaves nothing half-written.
When a stage has other outputs than before, what was made of the old ones is removed first: a run that stops halfway
holds no results of two states.

A run directory, and a directory being written, belong to one process at a time. The lock is the kernel's, on the
directory itself, so it ends with its process, however that ends. On file systems without locks nothing is locked.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from nxm_export.errors import ArtifactError
from nxm_export.storage.atomic import atomic_dir, exclusive, write_atomic
from nxm_export.storage.hashing import directory_hash, file_hash, file_hashes, tree_hash
from nxm_export.storage.json_files import encode, read_record, to_json_object
from nxm_export.storage.versions import installed_versions

SCHEMA = "nxm-run/1"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StageRecord:
    """What made the output of one stage: its options and seed, sha256 of inputs (by label) and outputs (by path in the
    run), versions of packages, how many seconds it took, the command line, and the directory of the run that it wrote.

    `options` are the stage's own JSON: they are compared, never interpreted.
    """

    options: dict[str, object]
    inputs: dict[str, str]
    seed: int | None
    outputs: dict[str, str]
    versions: dict[str, str]
    seconds: float
    command: tuple[str, ...]
    output: str = ""  # in manifests of older versions


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: the stages of a run by name, in the order in which they first ran."""

    stages: dict[str, StageRecord]


class RunDir:
    """A run directory and its manifest. Opening one creates it; an existing directory that is no run is refused.

    One that was created here goes away when a locked block fails before there is anything in it.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self._locked = False
        self._new = self._removed = False
        self._new_root = not self.root.exists()
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
        if self._removed:
            self._create()
        with exclusive(
            self.root, f"{self.root} is in use by another nxm process; wait for it, or choose another --out"
        ):
            for leftover in self.root.glob(f".{MANIFEST}.*.partial"):  # of a process that was killed
                leftover.unlink(missing_ok=True)
            self.manifest = _read_manifest(self._manifest_file)  # another process may have been here in between
            self._locked = True
            try:
                yield
            except BaseException:
                self._remove_empty()
                raise
            finally:
                self._locked = False

    def _remove_empty(self) -> None:
        if not self._new or [file.name for file in self.root.iterdir()] != [MANIFEST]:
            return
        with contextlib.suppress(OSError):  # the error under way is worth more
            self._manifest_file.unlink()
            self._removed = True
            if self._new_root:
                self.root.rmdir()

    def stage(
        self,
        name: str,
        output: str,
        work: Callable[[Path], object],
        *,
        inputs: Mapping[str, Path] | None = None,
        options: Mapping[str, object] | None = None,
        seed: int | None = None,
        kept_log: str | None = None,
        by_these_versions: bool = False,
    ) -> bool:
        """Bring ``root/output`` up to date with `work`; True when it ran, False when it was up to date.

        `work` gets a fresh directory, fills it, and the directory becomes `output` when it returns. `inputs` are files
        or directories by label; their hashes, `options` and `seed` decide whether the stage is up to date. What one
        says `by_these_versions` of packages alone is not up to date either where others made it. `kept_log` stays when
        `work` fails (see `atomic_dir`).
        """
        chosen = to_json_object(dict(options or {}))
        hashes = {label: tree_hash(path) for label, path in (inputs or {}).items()}
        target = self.root / output
        with self.lock():
            previous = self.manifest.stages.get(name)
            unchanged = previous and (previous.options, previous.inputs, previous.seed) == (chosen, hashes, seed)
            if previous and by_these_versions and previous.versions != installed_versions():
                unchanged = False
            if previous and unchanged and _outputs_hold(previous.outputs, self.root):
                return False
            started = time.monotonic()
            with atomic_dir(target, replace_any=True, kept_log=kept_log) as scratch:
                work(scratch)
                made = {str(Path(output) / file): digest for file, digest in file_hashes(scratch).items()}
                if previous and previous.outputs != made:
                    self._drop_made_of(name, output)
            record = StageRecord(
                options=chosen,
                inputs=hashes,
                seed=seed,
                outputs=made,
                versions=installed_versions(),
                seconds=round(time.monotonic() - started, 3),
                command=(Path(sys.argv[0]).name, *sys.argv[1:]),
                output=output,
            )
            self.manifest = replace(self.manifest, stages={**self.manifest.stages, name: record})
            write_atomic(self._manifest_file, encode(self.manifest, SCHEMA))
        return True

    def drop(self, name: str, output: str) -> None:
        """Forget a stage of an earlier run into this directory, and remove ``root/output`` and what was made of it."""
        with self.lock():
            if name not in self.manifest.stages:
                return
            self._drop_made_of(name, output)
            self._forget(name, output)

    def _drop_made_of(self, name: str, output: str) -> None:
        """Forget every stage that read what the stage `name` wrote to `output`, or what was made of that, the last
        first; what they wrote goes."""
        found = {name: output}
        for stage in (behind := [name]):  # which grows
            wrote = self.manifest.stages[stage].outputs
            below = {file: digest for file, digest in wrote.items() if Path(found[stage]) in Path(file).parents}
            whole = {Path(file).relative_to(found[stage]).as_posix(): digest for file, digest in below.items()}
            read = {directory_hash(whole), *wrote.values()}
            for other, record in self.manifest.stages.items():
                if other not in found and not read.isdisjoint(record.inputs.values()):
                    found[other] = record.output
                    behind.append(other)
        for stage in reversed(behind[1:]):
            self._forget(stage, found[stage])

    def _forget(self, name: str, output: str) -> None:
        # First what it wrote: a process that is killed in between leaves a stage without its outputs.
        if _lies_inside(output):
            shutil.rmtree(self.root / output, ignore_errors=True)
        kept = {stage: record for stage, record in self.manifest.stages.items() if stage != name}
        self.manifest = replace(self.manifest, stages=kept)
        write_atomic(self._manifest_file, encode(self.manifest, SCHEMA))

    @property
    def _manifest_file(self) -> Path:
        return self.root / MANIFEST

    def _create(self) -> None:
        try:
            require_run_directory(self.root)
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(
                f"{self.root}: cannot create the run directory ({error.strerror}); choose another --out"
            ) from error
        with exclusive(self.root, f"{self.root} is in use by another nxm process; choose another --out"):
            if not self._manifest_file.is_file():
                write_atomic(self._manifest_file, encode(Manifest({}), SCHEMA))
                self._new, self._removed = True, False


def require_run_directory(root: Path) -> None:
    """Raise `ArtifactError` where `root` is neither a run, nor free for one."""
    # What a killed process had begun to write, under its own name, does not make a directory foreign.
    if (root / MANIFEST).is_file() or not root.exists():
        return
    if not (root.is_dir() and all(file.name.endswith(".partial") for file in root.iterdir())):
        raise ArtifactError(
            f"{root} exists and is not a run directory (no {MANIFEST}); choose another --out, or an empty directory"
        )


def _read_manifest(file: Path) -> Manifest:
    return read_record(file, Manifest, schema=SCHEMA, way_out="restore it, or start a new run directory")


def _lies_inside(output: str) -> bool:
    """Whether a path is one below a run: a manifest that somebody wrote may say otherwise, and it is going to be
    removed."""
    path = PurePath(output)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _outputs_hold(outputs: Mapping[str, str], root: Path) -> bool:
    return bool(outputs) and all(
        (root / name).is_file() and file_hash(root / name) == digest for name, digest in outputs.items()
    )

"""Files and directories that appear whole or not at all, one writer at a time, and disk errors that say which file.

The lock is the kernel's, on the directory itself, so it ends with its process, however that ends. On file systems
without locks nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from nxm_export.errors import ArtifactError, NxmError

# Directories that this project made, each known by the files in it: only these, and empty ones, are ever replaced.
OWN_DIRECTORIES = (
    ("config.json", "nxm_plan.json"),  # a compressed checkpoint
    ("config.json", "metrics.json"),  # a fine-tuned dense model
    ("model.onnx", "spec.json"),  # a graph
    ("passport.json",),  # an engine
    ("manifest.json", "check_manifest.py"),  # a model repository for Triton
)


FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})  # of writing, whatever was written
_DISK_ERRNOS = FULL_ERRNOS | {errno.EACCES, errno.EPERM, errno.EIO}


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


@contextlib.contextmanager
def exclusive(directory: Path, busy: str) -> Iterator[None]:
    """Hold the kernel's lock on `directory`; raises `ArtifactError` with the text `busy` when another process holds
    it."""
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
def atomic_dir(target: Path, *, replace_any: bool = False, kept_log: str | None = None) -> Iterator[Path]:
    """A scratch directory that becomes `target` if the block succeeds, and disappears if it does not.

    Of one that disappears with an error of ours, the newest file named `kept_log`, at any depth, stays beside `target`
    as ``<target>.<kept_log>``, and the error names it.
    An existing `target` is replaced when it is empty or one of `OWN_DIRECTORIES`, or with `replace_any`; anything else
    is refused before the block runs, and so is a `target` that another process is writing. Disk errors become
    `ArtifactError`.
    """
    target = Path(os.path.abspath(target))
    if not replace_any:
        require_replaceable(target)
    scratch, old = target.with_name(f".{target.name}.partial"), target.with_name(f".{target.name}.old")
    with contextlib.ExitStack() as stack:
        with disk_errors(target):
            make_directory(scratch)
            stack.enter_context(exclusive(scratch, f"{target} is being written by another nxm process; wait for it"))
            for leftover in scratch.iterdir():  # of a process that was killed
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
            _put_back(old, target)  # it was killed while it replaced the one by the other
        try:
            with disk_errors(target):
                yield scratch
                _let_others_read(scratch)
                shutil.rmtree(old, ignore_errors=True)
                if os.path.lexists(target):
                    target.rename(old)
                try:
                    scratch.rename(target)
                except OSError:
                    _put_back(old, target)
                    raise
                shutil.rmtree(old, ignore_errors=True)
        except NxmError as error:
            if kept_log is not None:
                _keep_log(error, scratch, kept_log, target)
            raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def _let_others_read(directory: Path) -> None:
    """Give files the rights that the umask gave their directory, but for those that lie elsewhere, too."""
    shared = directory.stat().st_mode & 0o666
    for file in directory.rglob("*"):
        facts = file.lstat()
        if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1:
            widen(file, shared)


def widen(file: Path, rights: int) -> None:
    """Add rights (bits of a mode) to a file's own, where the file system lets that be done: safetensors writes files
    that their owner alone may read."""
    mode = stat.S_IMODE(file.stat().st_mode)
    if mode | rights != mode:
        with contextlib.suppress(OSError):  # a file system without rights of its own
            file.chmod(mode | rights)


def _put_back(old: Path, target: Path) -> None:
    """Give what was at `target` its name again, where nothing took its place."""
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)


def _keep_log(error: NxmError, scratch: Path, name: str, target: Path) -> None:
    """Move the newest log of a scratch directory beside `target`, and let `error` say where it is."""
    logs = sorted(scratch.rglob(name), key=lambda file: file.stat().st_mtime_ns)
    if not logs:
        return
    kept = target.with_name(f"{target.name}.{name}")
    with contextlib.suppress(OSError):  # the error is worth more than its log
        logs[-1].replace(kept)
        message = str(error).replace(str(logs[-1]), str(kept))
        error.args = (message if str(kept) in message else f"{message} (log: {kept})",)


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
            f"{target} exists and nxm-export did not make it: it would be replaced as a whole. Choose another --out, "
            "or remove it"
        )


def require_apart(out: Path, *inputs: str | Path, within: bool = True) -> None:
    """Raise `ArtifactError` where writing the directory `out` would remove one of the `inputs` (files or directories;
    what is neither is left to whoever reads it), or, without `within`, would change one: through links, too."""
    target = out.resolve()
    for given in map(Path, inputs):
        if not given.exists():
            continue
        source = given.resolve()
        if source == target or target in source.parents:
            raise ArtifactError(f"{out} would be replaced, and {given} is or lies in it; choose another --out")
        if not within and source in target.parents:
            raise ArtifactError(f"{out} lies in {given}, which is read; choose another --out")


def require_new(out: str | Path, *, force: bool = False) -> None:
    """Raise `ArtifactError` where a file would overwrite what is at `out`; for a directory even with `force`."""
    if not os.path.lexists(out):
        return
    if Path(out).is_dir():
        raise ArtifactError(f"{out} is a directory; name the file to write as --out")
    if not force:
        raise ArtifactError(f"{out} exists and would be overwritten; give --force, or choose another --out")


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
        file = written_file(error) or target
        reason = getattr(error, "strerror", None) or f"the disk is full, or the file too large: {_first_line(error)}"
        raise ArtifactError(f"{file}: cannot be written ({reason}); free the space or choose another place") from error


def written_file(error: BaseException) -> object | None:
    """The file that an error of the system is about; of a copy, the one that was written."""
    return getattr(error, "filename2", None) or getattr(error, "filename", None)


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

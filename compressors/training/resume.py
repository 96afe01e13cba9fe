"""Whose work a work directory holds: what an interrupted run left there is used only by the same request, and only
where going on from it gives what an uninterrupted run gives.

A request says what is computed. What computes it, versions of packages and what this code makes of the request (the
order of samples, say), is written down as work begins (`pin`); unfinished work that was begun with something else is
refused, and not removed: it may be hours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from compressors import distributed
from compressors.models import ModelSource
from nxm_export.contract.pooling import MODULES_FILE
from nxm_export.data.features import Features
from nxm_export.errors import ArtifactError
from nxm_export.storage.atomic import atomic_dir, make_directory, write_atomic
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import encode, read_record

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REQUEST_FILE = "request.sha256"
MADE_BY_FILE = "made-by.json"
MADE_BY_SCHEMA = "nxm-made-by/1"
_COMPUTED_WITH = ("nxm-export", "torch", "transformers", "accelerate", "numpy")  # what can change a result


@dataclass(frozen=True)
class _MadeBy:
    """What unfinished work depends on besides its request, by name."""

    facts: Mapping[str, str]


def request_hash(source: ModelSource, samples: Iterable[Features], *settings: DataclassInstance) -> str:
    """sha256 of all that finished work depends on: the model's files, the samples, and `settings` (dataclasses)."""
    digest = hashlib.sha256()
    of_an_embedding = [source.path / MODULES_FILE, *source.path.glob("*/config.json")]  # how its tokens are pooled
    for file in sorted([*source.path.glob("*.safetensors"), source.path / "config.json", *of_an_embedding]):
        if file.is_file():
            digest.update(file_hash(file).encode())
    digest.update(json.dumps([asdict(part) for part in settings], sort_keys=True).encode())
    for sample in samples:
        digest.update(repr(sorted(sample.items())).encode())
    return digest.hexdigest()


def work_beside(out: Path) -> Path:
    """The directory of unfinished work on `out`, beside it; raises `ArtifactError` where `out` has no name."""
    if not out.name:
        raise ArtifactError(f"{out} would be replaced as a whole; name a new directory as --out")
    return out.with_name(f".{out.name}.work")


@contextlib.contextmanager
def claimed(out: Path, work_dir: Path, *, replace_any: bool = False) -> Iterator[Path]:
    """A directory that becomes `out` when the block is done (`nxm_export.storage.atomic.atomic_dir`); `work_dir` is
    then removed. Work is done inside the block, so that of two processes with one `out` the second is refused before it
    touches what the first is doing. Under torchrun the first process has it, and the others, which write nothing, wait
    for it at the end."""
    if distributed.rank():
        yield out
    else:
        with atomic_dir(out, replace_any=replace_any) as scratch:
            yield scratch
        _remove(work_dir)
    distributed.wait()


def take_ownership(work_dir: Path, request: str) -> bool:
    """Make `work_dir` this request's, and say whether it was; what another request left there is removed. Raises
    `ArtifactError` where it was, and other versions of packages began what is there."""
    file = work_dir / REQUEST_FILE
    same = distributed.agreed(file.is_file() and file.read_text(encoding="utf-8") == request)
    if not same and not distributed.rank():
        _remove(work_dir)
    pin(work_dir / MADE_BY_FILE, _versions(), begun=same)
    if not same and not distributed.rank():
        write_atomic(file, request)
    distributed.wait()
    return same


def _versions() -> dict[str, str]:
    found = {}
    for package in _COMPUTED_WITH:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def pin(file: Path, facts: Mapping[str, str], *, begun: bool) -> None:
    """Write to `file`, in a work directory, what work depends on, by name; or, where that work was `begun`, raise
    `ArtifactError` unless it was begun with the same.

    The first process reads and writes, and all raise.
    """
    problem: str | None = None
    if not distributed.rank():
        if begun:
            problem = _difference(file, facts)
        else:
            make_directory(file.parent)
            write_atomic(file, encode(_MadeBy(facts), MADE_BY_SCHEMA))
    if (problem := distributed.agreed(problem)) is not None:
        raise ArtifactError(
            f"{file.parent} holds unfinished work that {problem}; what goes on from there would be the result of "
            "neither. Finish it by the same command with what it was begun with (another option, --precision too, "
            f"removes it and begins anew), or remove {file.parent} and run the command again"
        )


def _difference(file: Path, facts: Mapping[str, str]) -> str | None:
    """What `facts` are not those of a file, as the end of a sentence; None where they are."""
    if not file.is_file():
        return "an earlier state of nxm-export began, which may have drawn samples in another order"
    then = read_record(file, _MadeBy, schema=MADE_BY_SCHEMA, way_out=f"remove {file.parent}").facts
    differ = [name for name in {**then, **facts} if then.get(name) != facts.get(name)]
    if not differ:
        return None
    return "was begun with " + ", ".join(
        f"{name} {then.get(name, 'not known')} (now {facts.get(name, 'not known')})" for name in differ
    )


def _remove(work_dir: Path) -> None:
    """Remove a work directory, first what says whose it is: half of one is nobody's."""
    (work_dir / REQUEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(work_dir, ignore_errors=True)

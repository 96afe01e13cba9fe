"""Whose work a work directory holds: what an interrupted run left there is used only by the same request."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from compressors import distributed
from compressors.models import ModelSource
from nxm_export.contract.pooling import MODULES_FILE
from nxm_export.data.features import Features
from nxm_export.errors import ArtifactError
from nxm_export.storage.atomic import atomic_dir, make_directory, write_atomic
from nxm_export.storage.hashing import file_hash

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REQUEST_FILE = "request.sha256"


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
    """Make `work_dir` this request's, and say whether it was; what another request left there is removed."""
    file = work_dir / REQUEST_FILE
    same = distributed.agreed(file.is_file() and file.read_text(encoding="utf-8") == request)
    if not same and not distributed.rank():
        _remove(work_dir)
        make_directory(work_dir)
        write_atomic(file, request)
    distributed.wait()
    return same


def _remove(work_dir: Path) -> None:
    """Remove a work directory, first what says whose it is: half of one is nobody's."""
    (work_dir / REQUEST_FILE).unlink(missing_ok=True)
    shutil.rmtree(work_dir, ignore_errors=True)

"""Whose work a work directory holds: what an interrupted run left there is used only by the same request."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from compressors import distributed
from compressors.models import ModelSource
from nxm_export.data.examples import Features
from nxm_export.storage.atomic import make_directory, write_atomic
from nxm_export.storage.hashing import file_hash

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

REQUEST_FILE = "request.sha256"


def request_hash(source: ModelSource, samples: Iterable[Features], *settings: DataclassInstance) -> str:
    """sha256 of all that finished work depends on: the model's files, the samples, and `settings` (dataclasses)."""
    digest = hashlib.sha256()
    for file in sorted([*source.path.glob("*.safetensors"), source.path / "config.json"]):
        digest.update(file_hash(file).encode())
    digest.update(json.dumps([asdict(part) for part in settings], sort_keys=True).encode())
    for sample in samples:
        digest.update(repr(sorted(sample.items())).encode())
    return digest.hexdigest()


def take_ownership(work_dir: Path, request: str) -> bool:
    """Make `work_dir` this request's, and say whether it was; what another request left there is removed."""
    file = work_dir / REQUEST_FILE
    same = distributed.agreed(file.is_file() and file.read_text(encoding="utf-8") == request)
    if not same and not distributed.rank():
        shutil.rmtree(work_dir, ignore_errors=True)
        make_directory(work_dir)
        write_atomic(file, request)
    distributed.wait()
    return same

"""Tensors that unfinished work is kept in: files that are there as a whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nxm_export.errors import ArtifactError
from nxm_export.storage.atomic import disk_errors, make_directory
from nxm_export.storage.unreadable import unreadable


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name; raises `ArtifactError` where the disk is full."""
    partial = file.with_suffix(".partial")
    with disk_errors(file):
        make_directory(file.parent)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
        partial.replace(file)


def read_tensors(file: Path, then: str) -> dict[str, Tensor]:
    """What `write_tensors` wrote; raises `ArtifactError` for a file that is damaged, as a machine that stops can leave
    it, with what happens `then`, once it is removed."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(unreadable(file, error, f"remove it, and {then}")) from error

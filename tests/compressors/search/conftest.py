"""The model and data that searches are tried on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A directory with a trained ``dense`` model and its ``train.tsv`` and ``dev.tsv``."""
    made = tiny_checkpoint("bert").parent
    home = tmp_path_factory.mktemp("search")
    shutil.copytree(made / "dense", home / "dense")
    for name in ("train.tsv", "dev.tsv"):
        shutil.copyfile(made / name, home / name)
    return home

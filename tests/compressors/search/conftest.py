"""The model and data that searches are tried on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import tiny


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A directory with a trained ``dense`` model and its ``train.tsv`` and ``dev.tsv``."""
    return tiny.copy_dense(tiny_checkpoint("bert"), tmp_path_factory.mktemp("search"))

"""Engine directories of every backend that can build here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from engines.base import (
    BACKENDS,
)
from nxm_export.errors import EngineUnavailable


@pytest.fixture(scope="module", params=BACKENDS)
def directory(request: pytest.FixtureRequest, tiny_engine: Callable[..., Path]) -> Path:
    """An engine directory of each backend that can build here; read it only."""
    try:
        return tiny_engine(request.param)
    except EngineUnavailable as error:
        pytest.skip(f"{request.param}: {error}")


@pytest.fixture
def copy(directory: Path, tmp_path: Path) -> Path:
    return shutil.copytree(directory, tmp_path / "copied alone")

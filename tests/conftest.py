"""The whole suite runs offline, on one thread per process, with fixed seeds; models are made on the spot (`tests/tiny.py`)."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.offline import sitecustomize

ROOT = Path(__file__).parent.parent

# Set before torch is imported, and inherited by child processes, which import this source tree wherever they run.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    OMP_NUM_THREADS="1",  # tiny models are slower on two threads than on one
    PYTHONPATH=os.pathsep.join([str(ROOT / "tests" / "offline"), str(ROOT)]),
)
sitecustomize.block_network()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Fixed seeds of the global generators, so that a test does not depend on those before it."""
    random.seed(0)
    np.random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_checkpoint(family, **options)``: a compressed tiny checkpoint (see `tiny.compress_tiny`), made once a session.

    Read it only: other tests get the same directory.
    """
    made: dict[str, Path] = {}

    def make(family: str = "bert", **options: Any) -> Path:
        key = f"{family} {sorted(options.items())}"
        if key not in made:
            made[key] = tiny.compress_tiny(family, tmp_path_factory.mktemp(family), **options)
        return made[key]

    return make

"""Compressed checkpoints of tiny seeded models, one per family and preset, made without training: for TensorRT's
tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.trt_models import Checkpoints, compressed, tiny_config


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """``checkpoints("bert", placement="attention", ...)``: a directory; equal arguments give the same one."""
    made: dict[tuple[object, ...], Path] = {}

    def make(
        family: str = "bert", placement: str = "inputs-outputs", residual: str = "float", gelu: str = "gelu",
        positions: int = 64, keep_dense: tuple[str, ...] = (), hidden: int = 128,
    ) -> Path:  # fmt: skip
        key = (family, placement, residual, gelu, positions, keep_dense, hidden)
        if key not in made:
            made[key] = compressed(
                tmp_path_factory.mktemp("checkpoint"),
                tiny_config(family, gelu, hidden, positions=positions),
                placement,
                residual,
                keep_dense,
            )
        return made[key]

    return make

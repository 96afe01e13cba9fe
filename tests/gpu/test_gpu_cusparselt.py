"""On a real GPU with torch and cuSPARSELt: what the stand-in cannot show. Skips elsewhere, and says why."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.base import BuildOptions, Profile
from engines.cusparselt import backend as cusparselt
from engines.cusparselt.kernels import DENSE, CudaKernels
from engines.cusparselt.machine import what_is_missing
from nxm_export.data.features import Features, sample_of
from tests.support.trt_models import compressed, feeds_for, tiny_config

_MISSING = what_is_missing()
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=f"needs an NVIDIA GPU, torch and cuSPARSELt: {_MISSING}")
PROFILE = Profile((1, 1), (32, 64), (32, 64))


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, twins directory) of a model whose matrices are large enough for sparse kernels."""
    from nxm_export.pipeline.sparsity_twins import build_twins

    root = tmp_path_factory.mktemp("gpu")
    checkpoint = compressed(root / "checkpoint", tiny_config("bert", "gelu_pytorch_tanh", 1024), "attention")
    build_twins(checkpoint, root / "twins", cusparselt.NAME, BuildOptions(profiles=[PROFILE]))
    return checkpoint, root / "twins"


def test_dense_sums_are_those_of_integers() -> None:
    import torch

    x, weight = (torch.randint(-127, 128, size, dtype=torch.int8) for size in ((64, 256), (96, 256)))
    exact = (x.long() @ weight.long().t()).int()
    assert torch.equal(CudaKernels().dense(x.cuda(), weight.cuda()).cpu(), exact)


def test_all_twins_compute_what_pytorch_computes(twins: tuple[Path, Path]) -> None:
    from engines.parity.compare import compare

    checkpoint, directory = twins
    features: list[Features] = []
    for seed in range(16):
        feeds = feeds_for(("input_ids", "attention_mask", "token_type_ids"), 1, 24, seed)
        features.append({**sample_of({name: value[0].tolist() for name, value in feeds.items()}), "labels": 0})
    for name in ("int8-sparse", "int8-dense", "fp16"):
        compare(checkpoint, directory / name, features).require()


def test_every_size_of_product_has_a_sparse_form_that_is_right(twins: tuple[Path, Path]) -> None:
    choices = cusparselt.inspect(twins[1] / "int8-sparse").choices
    assert choices
    for choice in choices:
        right = [each.form for each in choice.measured if each.microseconds is not None]
        assert DENSE in right
        assert len(right) > 1, [f"{each.form}: {each.problem}" for each in choice.measured]


def test_what_must_run_sparse_is_proved_by_the_names_of_its_kernels(twins: tuple[Path, Path], tmp_path: Path) -> None:
    options = BuildOptions(profiles=[PROFILE], sparse="always")
    cusparselt.build(twins[1] / "onnx" / "int8" / "model.onnx", tmp_path, options)
    cusparselt.profile(tmp_path)
    facts = cusparselt.inspect(tmp_path)
    assert facts.sparsity.sparse_share == 1.0, [(w.name, w.reason, w.kernel, w.detail) for w in facts.sparsity.weights]


def test_a_run_is_captured_and_gives_the_same_again(twins: tuple[Path, Path]) -> None:
    import numpy as np

    with cusparselt.load(twins[1] / "int8-sparse") as engine:
        feeds = feeds_for(engine.inputs, 4, 24, 0)
        first, second, third = (engine.run(feeds) for _ in range(3))  # step by step, captured, replayed
        for name, value in first.items():
            # What runs uncaptured is not compiled: it rounds to FP16 between any two operations.
            np.testing.assert_allclose(second[name], value, atol=0.05)
            np.testing.assert_array_equal(third[name], second[name])
        assert engine.timer(feeds)() > 0.0


def test_the_bench_ends_in_a_verdict(twins: tuple[Path, Path]) -> None:
    from nxm_export.pipeline.engine_timing import bench_engines

    report = bench_engines([twins[1]], [(1, 32), (32, 64)], rounds=10)
    assert {timing.clock for timing in report.timings} == {"CUDA events"}
    assert report.verdict

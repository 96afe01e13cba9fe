"""On a real GPU with a real TensorRT: what the rehearsal cannot show. Skips elsewhere, and says why."""

from pathlib import Path

import pytest

from nxm_export.data.features import Features, sample_of
from nxm_export.errors import EngineUnavailable
from tests.support.trt_models import compressed, feeds_for, tiny_config


def _reason() -> str:
    from engines.tensorrt import backend as trt
    from engines.tensorrt.cuda_driver import device_facts

    try:
        device_facts()
        trt._runtime()
    except EngineUnavailable as error:
        return str(error)
    return ""


pytestmark = pytest.mark.skipif(bool(_reason()), reason=f"needs an NVIDIA GPU and TensorRT: {_reason()}")


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(checkpoint, twins directory) of a model whose matrices are large enough for sparse kernels."""
    from engines.base import BuildOptions, Profile
    from engines.tensorrt.backend import _runtime
    from nxm_export.pipeline.sparsity_twins import TwinGraphs, build_twins

    root = tmp_path_factory.mktemp("gpu")
    checkpoint = compressed(root / "checkpoint", tiny_config("bert", "gelu_pytorch_tanh", 1024), "attention")
    target = "trt8" if int(_runtime().__version__.split(".")[0]) < 10 else "trt"
    options = BuildOptions(profiles=[Profile((1, 1), (32, 64), (32, 64))], level=4)
    build_twins(checkpoint, root / "twins", "trt", options, TwinGraphs(target))
    return checkpoint, root / "twins"


def test_the_sparse_engine_computes_what_pytorch_computes(twins: tuple[Path, Path]) -> None:
    from engines.parity.compare import compare

    checkpoint, directory = twins
    features: list[Features] = []
    for seed in range(16):
        feeds = feeds_for(("input_ids", "attention_mask", "token_type_ids"), 1, 24, seed)
        features.append({**sample_of({name: value[0].tolist() for name, value in feeds.items()}), "labels": 0})
    for name in ("int8-sparse", "int8-dense", "fp16"):
        compare(checkpoint, directory / name, features).require()


def test_the_flag_makes_the_difference_between_the_twins(twins: tuple[Path, Path]) -> None:
    from engines.sparsity.engine_report import read_sparsity_report

    sparse, dense = (read_sparsity_report(twins[1] / name) for name in ("int8-sparse", "int8-dense"))
    assert dense.sparse_share == 0
    assert {weight.chosen for weight in sparse.weights} <= {True, False, None}
    known = [weight for weight in sparse.weights if weight.planned_sparse and weight.kernel]
    assert known, "the engine inspector names no kernel: the report cannot prove anything on this TensorRT"


def test_the_bench_ends_in_a_verdict(twins: tuple[Path, Path]) -> None:
    from nxm_export.pipeline.engine_timing import bench_engines

    report = bench_engines([twins[1]], [(1, 32), (32, 64)], rounds=10)
    assert {timing.clock for timing in report.timings} == {"CUDA events"}
    assert report.verdict


def test_a_corrupt_engine_is_an_error_and_no_crash(twins: tuple[Path, Path], tmp_path: Path) -> None:
    from engines.tensorrt import backend as trt
    from engines.tensorrt.runtime import TensorRTEngine
    from nxm_export.errors import EngineError

    data = bytearray((twins[1] / "int8-sparse" / "model.engine").read_bytes())
    data[:64] = b"\\0" * 64
    (tmp_path / "model.engine").write_bytes(data)
    with pytest.raises(EngineError, match="cannot load it"):
        TensorRTEngine(trt._runtime(), tmp_path / "model.engine", bytes(data), "rebuild it")

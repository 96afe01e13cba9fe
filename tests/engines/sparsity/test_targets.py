"""GPUs and versions in people's words: understood as what they are, or refused with what would be."""

import pytest
from click.testing import CliRunner

from engines.sparsity.targets import compute_capability_of, sparsity_target, target_problems, version_of
from nxm_export.cli import main
from nxm_export.errors import EngineError


@pytest.mark.parametrize(
    ("gpu", "capability"),
    [
        ("7.5", "7.5"),
        ("75", "7.5"),
        ("sm_80", "8.0"),
        ("sm80", "8.0"),
        ("SM_90a", "9.0"),
        ("compute_120", "12.0"),
        ("H100", "9.0"),
        ("h200", "9.0"),
        ("l4", "8.9"),
        ("A100", "8.0"),
        ("RTX 4090", "8.9"),
        ("rtx4090", "8.9"),
        ("RTX A6000", "8.6"),
        ("Orin", "8.7"),
        # as nvidia-smi writes them
        ("NVIDIA A100-SXM4-80GB", "8.0"),
        ("NVIDIA H100 80GB HBM3", "9.0"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "8.9"),
        ("NVIDIA RTX 6000 Ada Generation", "8.9"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "12.0"),
        ("Tesla T4", "7.5"),
    ],
)
def test_a_gpu_is_understood_by_capability_and_by_name(gpu: str, capability: str) -> None:
    assert compute_capability_of(gpu) == capability


@pytest.mark.parametrize(
    "gpu", ["", "9.1", "99", "banana", "RTX", "RTX 6000", "H10O", "8", "8.", "-8.0", "8.0.0", "800"]
)
def test_a_gpu_that_is_not_understood_is_refused_with_the_list(gpu: str) -> None:
    with pytest.raises(EngineError, match=r"no GPU that is known here.*8\.0 \(A100\).*9\.0"):
        compute_capability_of(gpu)


@pytest.mark.parametrize("version", ["8.6", "8.6.0", "10", "10.3", "10.14.1.48", "11.4.0.106", " 10.3 "])
def test_a_version_is_kept_as_it_was_given(version: str) -> None:
    assert version_of("trt", version) == version.strip()


@pytest.mark.parametrize(
    "version", ["", "86", "abc", "8,6", "v8.6", "8.6.x", "8.", "08.6", "103", "-10", "10.3.0.26.1", "1.7"]
)
def test_a_version_that_tensorrt_never_had_is_refused(version: str) -> None:
    with pytest.raises(EngineError, match="is no version of TensorRT; its versions begin with 7, 8, 9, 10, 11"):
        version_of("trt", version)


def test_the_default_version_is_that_of_the_backend_and_foreign_numbers_name_the_other() -> None:
    assert sparsity_target("trt", None, "8.9").version == "11.4"
    assert sparsity_target("trt_rtx", None, "8.9, l4").version == "1.7"
    assert sparsity_target("trt_rtx", None, "8.6, RTX 4090").compute_capability == "8.6, 8.9"
    with pytest.raises(EngineError, match=r"give --backend trt$"):
        version_of("trt_rtx", "11.4")
    with pytest.raises(EngineError, match=r"give --backend trt_rtx$"):
        version_of("trt", "1.7.1")


def test_tensorrt_rtx_has_no_kernels_for_gpus_that_it_does_not_run_on() -> None:
    assert not target_problems(sparsity_target("trt_rtx", None, "8.6, 8.9, 12.0"))
    assert not target_problems(sparsity_target("trt", None, "H100"))
    (problem,) = target_problems(sparsity_target("trt_rtx", None, "RTX 4090, H100"))
    assert "and not on 9.0" in str(problem)


@pytest.mark.parametrize(
    "arguments", [["--gpu", "banana"], ["--version", "86"], ["--backend", "trt_rtx", "--version", "10"]]
)
def test_the_command_line_says_so_as_wrong_usage(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["doctor", "model.onnx", *arguments])
    assert result.exit_code == 2
    assert "is no " in result.output

"""`nxm doctor MODEL --gpu L4 --shape 32x128`: the verdict first, from a config.json alone or from any graph; what
cannot be is wrong usage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import numpy_helper, parser

from nxm_export.cli import main
from nxm_export.storage.json_files import as_object, as_objects, entry_at

CONFIG = {
    "model_type": "bert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "vocab_size": 30522,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a config.json and nothing else."""
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return tmp_path / "bert"


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """Two products with one weight of 64x64, one of 64x256, and one of no weight."""
    made = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        made (float[batch, length, 64] x) => (float[batch, length, length] y) {
            a = MatMul(x, square)
            b = MatMul(a, square)
            c = MatMul(b, wide)
            turned = Transpose<perm = [0, 2, 1]>(c)
            y = MatMul(c, turned)
        }""")
    for name, shape in (("square", (64, 64)), ("wide", (64, 256))):
        made.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    onnx.save(made, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def doctor(path: Path, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", str(path), *arguments], env={"COLUMNS": "80"})


def test_the_verdict_comes_first_and_all_of_it_fits_a_terminal(model: Path) -> None:
    result = doctor(model, "--gpu", "A100", "--version", "8.6")
    assert result.exit_code == 0, result.output
    first, second, third, *_ = lines = result.stdout.splitlines()
    assert f"{first} {second}" == (
        "verdict: 2:4 can gain at most 2.00x over dense INT8 here (bound), and 1.65x to 1.90x if every step ran at its "
        "limit (estimate)"
    )
    assert third.startswith("Nothing here is measured")
    assert len(lines) <= 26
    assert max(map(len, lines)) <= 80
    assert "INT8 out yes; FP16 out no" in result.stdout
    assert "192 tokens (2x128)" in result.stdout


def test_json_keeps_bound_and_estimate_apart(model: Path) -> None:
    answer = as_object(json.loads(doctor(model, "--gpu", "L4", "--shape", "1x128", "--json").stdout))
    assert (answer["can_pay"], answer["gpu"], answer["batch"], answer["sequence"]) == (True, "L4", 1, 128)
    assert as_object(answer["bound"]).keys() == {*("speedup", "arithmetic_from_tokens", "dense_arithmetic_from_tokens")}
    assert as_object(answer["estimate"]).keys() == {"memory", "cache"}
    assert "data sheet" in str(entry_at(answer, "figures", "source"))
    assert {kernel["exists"] for kernel in as_objects(answer["kernels"])} == {None}
    cannot = as_object(json.loads(doctor(model, "--gpu", "T4", "--json").stdout))
    assert (cannot["can_pay"], cannot["bound"], cannot["estimate"]) == (False, None, None)


def test_a_gpu_without_sparse_kernels_is_told_what_needs_none(model: Path) -> None:
    assert "--pattern none" in doctor(model, "--gpu", "T4").stdout
    assert "--pattern none" not in doctor(model, "--gpu", "L4").stdout


def test_a_graph_has_a_bound_and_its_products_alone(graph: Path) -> None:
    result = doctor(graph, "--gpu", "A100", "--shape", "32x128", "--json")
    assert result.exit_code == 0, result.output
    answer = as_object(json.loads(result.stdout))
    products = [
        (entry["k"], entry["n"], entry["runs"])
        for entry in as_objects(entry_at(answer, "estimate", "memory", "products"))
    ]
    assert products == [(64, 64, 2), (64, 256, 1)]
    assert entry_at(answer, "estimate", "memory", "product_share") is None
    # All of it waits for activations when they come from memory: 2 * 4096 * (64 + 64) + 4096 * (64 + 256) bytes and the
    # weights, 2 * 64 * 64 + 64 * 256, at 2039 GB/s.
    assert entry_at(answer, "estimate", "memory", "int8_ms") == pytest.approx(2383872 / 2039e9 * 1000)
    assert "x in the products if every step ran at its limit (estimate)" in str(answer["verdict"])


def test_a_graph_of_ours_says_what_its_model_does(
    tiny_checkpoint: Callable[..., Path], tiny_graph: Callable[..., Path]
) -> None:
    asked = ("--gpu", "L4", "--shape", "8x32", "--json")
    of_model, of_graph = (
        as_object(json.loads(doctor(path, *asked).stdout)) for path in (tiny_checkpoint(), tiny_graph())
    )
    assert of_graph["estimate"] == of_model["estimate"]
    assert entry_at(of_graph, "estimate", "memory", "product_share") is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "32"], "not a shape"),
        (["--shape", "0x128"], "not a shape"),
        (["--shape", "-1x128"], "not a shape"),
        (["--shape", "32x128x2"], "not a shape"),
        (["--gpu", "A100", "--shape", "1x513"], "at most 512 tokens"),
        (["--gpu", "A100", "--shape", f"1{'0' * 300}x128"], "tokens, which no GPU holds"),
        (["--gpu", "banana"], "no GPU that is known"),
        (["--gpu", "H100 NVL"], "no peaks of GPU 'H100 NVL' are known here"),
        ([], "no peaks of GPU '8.9' are known here; name one of T4"),
        (["--gpu", "L4", "--version", "86"], "no version of TensorRT"),
        (["--gpu", "L4", "--parse"], "--parse asks about an ONNX file"),
    ],
)
def test_what_cannot_be_is_wrong_usage(model: Path, arguments: list[str], message: str) -> None:
    result = doctor(model, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())


def test_a_shape_without_a_file_is_wrong_usage() -> None:
    result = CliRunner().invoke(main, ["doctor", "--shape", "1x1"])
    assert result.exit_code == 2
    assert "--shape needs PATH" in result.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported"),
        ({"num_hidden_layers": 10**9}, "no model has 1000000000 layers"),
        ({"hidden_size": 10**400}, "is the file complete?"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
        ({"max_position_embeddings": None}, "max_position_embeddings must be a positive integer"),
    ],
)
def test_a_config_that_is_none_is_one_line(model: Path, change: dict[str, object], message: str) -> None:
    (model / "config.json").write_text(json.dumps(CONFIG | change), encoding="utf-8")
    result = doctor(model, "--gpu", "L4")
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_graph_without_weights_has_nothing_to_count(tmp_path: Path) -> None:
    made = parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]> made (float[4, 4] x) => (float[4, 4] y) { y = MatMul(x, x) }""")
    onnx.save(made, tmp_path / "model.onnx")
    result = doctor(tmp_path / "model.onnx", "--gpu", "L4", "--shape", "1x4")
    assert result.exit_code == 1
    assert "no matrix product with a weight was read" in result.stderr


def test_a_directory_of_neither_says_so(tmp_path: Path) -> None:
    result = doctor(tmp_path, "--gpu", "L4", "--shape", "1x4")
    assert result.exit_code == 1
    assert "has no config.json and no graph" in result.stderr


@pytest.mark.parametrize(
    ("activation", "target", "noted"),
    [
        ("gelu", ("--backend", "trt_rtx"), True),
        ("gelu", ("--version", "8.6"), True),
        ("gelu", ("--version", "11.4"), False),  # nobody has looked
        ("gelu_new", ("--backend", "trt_rtx"), False),
        ("relu", ("--backend", "trt_rtx"), False),
    ],
)
def test_a_product_that_its_gelu_keeps_dense_is_noted(
    model: Path, activation: str, target: tuple[str, ...], noted: bool
) -> None:
    (model / "config.json").write_text(json.dumps({**CONFIG, "hidden_act": activation}), encoding="utf-8")
    result = doctor(model, "--gpu", "L4", "--json", *target)
    assert result.exit_code == 0, result.output
    assert ("--gelu tanh" in str(entry_at(json.loads(result.stdout), "notes"))) is noted


@pytest.mark.parametrize(("gpu", "advice"), [("T4", "--pattern none"), ("V100", "stay with FP16")])
def test_int8_is_advised_where_tensor_cores_multiply_it(model: Path, gpu: str, advice: str) -> None:
    result = doctor(model, "--gpu", gpu)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("verdict: 2:4 cannot pay here")
    assert advice in result.stdout.splitlines()[-1]

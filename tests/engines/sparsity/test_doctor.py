"""The doctor on files made by others: the same facts as for ours, the file's own names, and advice; and polygraphy
agrees."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nxm_export.contract.encoder_family import GELUS
from nxm_export.graph.exporter import export
from nxm_export.graph.reading.graph_weights import load_graph
from nxm_export.graph.reading.sparsity_scan import scan_products
from nxm_export.pipeline.file_diagnosis import diagnose_file
from nxm_export.storage.json_files import as_objects
from tests.engines.sparsity.foreign import pruned_model
from tests.support import baked, tiny

HERE = Path(__file__).parent


def make(python: str, tool: str, directory: Path) -> Path:
    out = directory / f"{tool}.onnx"
    command = [python, str(HERE / "foreign.py"), tool, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def weights_of(file: Path, gpu: str = "8.0") -> dict[str, dict[str, Any]]:
    report = diagnose_file(file, "trt", "8.6.0", gpu).to_dict()
    json.dumps(report)
    return {str(weight["name"]).removesuffix("_quantized"): weight for weight in as_objects(report["weights"])}


def test_a_file_of_onnx_runtimes_quantizer_gets_facts_and_advice(tmp_path: Path) -> None:
    file = make(sys.executable, "ort", tmp_path)
    weights = weights_of(file)
    assert set(weights) == {"up", "down", "head"}
    assert [weights[name]["pattern_int8"] for name in ("up", "down", "head")] == ["2:4", "2:4", None]
    assert [weights[name]["sparse_along_k"] for name in ("up", "down", "head")] == [True, True, False]
    assert weights["head"]["reason"] == "axis"
    assert all(weight["chosen"] is not True for weight in weights.values()), "a file alone runs nothing"
    advice = {
        entry.name.removesuffix("_quantized"): entry for entry in diagnose_file(file, "trt", "8.6.0", "8.0").advice
    }
    assert "prune 2:4 along the input channels" in advice["head"].advice


def test_a_float_file_as_asp_leaves_it_is_told_to_quantize(tmp_path: Path) -> None:
    pruned_model(tmp_path / "pruned.onnx")
    weights = weights_of(tmp_path / "pruned.onnx")
    assert [weights[name]["pattern_float"] for name in ("up", "down", "head")] == ["2:4", "2:4", None]
    advice = {
        entry.name: entry.advice for entry in diagnose_file(tmp_path / "pruned.onnx", "trt", "8.6.0", "8.0").advice
    }
    assert "in float: quantize weight, input and output to INT8" in advice["up"]


def test_polygraphy_agrees_wherever_it_can_look_and_we_go_on_where_it_skips(tmp_path: Path) -> None:
    pytest.importorskip("polygraphy", reason="polygraphy is not installed: pip install 'nxm-export[trt-rtx]'")
    pruned_model(tmp_path / "pruned.onnx")

    def polygraphy(file: Path) -> str:
        command = [str(Path(sys.executable).with_name("polygraphy")), "inspect", "sparsity", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    text = polygraphy(tmp_path / "pruned.onnx")
    theirs = {name: not denied for denied, name in re.findall(r"Found (non-)?sparse tensor: (\w+)", text)}
    ours = {fact.name: fact.sparse_along_k for fact in scan_products(load_graph(tmp_path / "pruned.onnx"), "").facts}
    assert ours == theirs == {"up": True, "down": True, "head": False}
    quantized = make(sys.executable, "ort", tmp_path)
    assert "Skipping tensor: up_quantized due to unsupported type: int8" in polygraphy(quantized)
    assert [weight["sparse_along_k"] for weight in weights_of(quantized).values()] == [True, True, False]


@pytest.mark.skipif(
    "NXM_PEERS_PYTHON" not in os.environ,
    reason="needs an interpreter with nvidia-modelopt, onnx-graphsurgeon and onnxruntime: name it in NXM_PEERS_PYTHON",
)
def test_a_file_of_modelopts_quantizer_gets_facts_and_advice(tmp_path: Path) -> None:
    file = make(os.environ["NXM_PEERS_PYTHON"], "modelopt", tmp_path)
    weights = weights_of(file)
    assert len(weights) == 3
    assert sorted(weight["sparse_along_k"] for weight in weights.values()) == [False, True, True]
    assert all(weight["chosen"] is not True for weight in weights.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        "modernbert",
        "jina_embeddings_v3",
        *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("nomic_bert", "gte")),
    ],
)
def test_fused_rotated_and_gated_matrices_have_integers_on_both_sides(family: str, tmp_path: Path) -> None:
    checkpoint = baked.write_checkpoint(family, tmp_path / "c", placement="attention", attention="int8")
    outcomes = {}
    for placement in ("attention", "inputs"):
        file = export(checkpoint, tmp_path / placement, target="trt8", placement=placement).path
        planned = [weight for weight in weights_of(file).values() if weight["planned_sparse"]]
        assert len(planned) == tiny.matrices(family, 1, split=True)
        outcomes[placement] = {weight["reason"] for weight in planned}
    # "no-engine": ready. Jina's FFN is not gated: what is quantized comes behind GELU by erf, in no sparse kernel
    behind_gelu = {"activation"} if family == "jina_embeddings_v3" else set()
    assert outcomes == {"attention": {"no-engine"} | behind_gelu, "inputs": {"float-output"} | behind_gelu}


def test_a_product_in_front_of_gelu_by_erf_is_not_ready_and_of_gelu_by_tanh_it_is(tmp_path: Path) -> None:
    def reasons(gelu: str) -> set[object]:
        checkpoint = baked.write_checkpoint("bert", tmp_path / gelu, options={"hidden_act": GELUS[gelu]})
        file = export(checkpoint, tmp_path / f"graph-{gelu}", target="trt8", placement="inputs-outputs").path
        return {weight["reason"] for name, weight in weights_of(file).items() if ".intermediate." in name}

    assert reasons("erf") == {"activation"}
    assert reasons("tanh") == {"no-engine"}

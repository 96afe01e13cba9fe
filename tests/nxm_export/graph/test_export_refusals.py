"""What export refuses, with a message that says why; nothing half-written stays."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.errors import ArtifactError, ExportError, NxmError, PlanError
from nxm_export.graph import exporter, tracing
from nxm_export.graph.exporter import export
from tests.support import baked, tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked.write_checkpoint("bert", tmp_path_factory.mktemp("bad") / "checkpoint")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "gpu"}, "unknown target 'gpu'; choose one of cpu, trt"),
        ({"dtype": "int8"}, "unknown dtype 'int8'; choose one of float32, float16, bfloat16"),
        ({"placement": "outputs"}, "unknown placement 'outputs'"),
        ({"task": "regression"}, "its head is classification, not regression"),
        ({"task": "translation"}, "unknown task 'translation'"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(
    checkpoint: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(NxmError, match=message):
        export(checkpoint, tmp_path / "graph", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_without_head_is_refused(tmp_path: Path) -> None:
    path = tiny.write_model("bert", tmp_path / "encoder")
    with pytest.raises(ExportError, match="it has no head of a supported kind; fine-tune it first"):
        export(path, tmp_path / "graph")
    with pytest.raises(ExportError, match="its head is none of a supported kind, not classification"):
        export(path, tmp_path / "graph", task="classification")


def test_a_foreign_directory_is_not_replaced(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="nxm-export did not make it"):
        export(checkpoint, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("missing", ["nowhere", "a/b/c"])
def test_a_missing_checkpoint_is_named(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        export(tmp_path / missing, tmp_path / "graph")


def test_a_checkpoint_that_breaks_its_plan_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.key.weight"
    tensors[name] = np.abs(tensors[name]) + 0.1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"key\.weight is planned 2:4"):
        export(copy, tmp_path / "graph")


def test_a_plan_with_three_quantizers_where_one_tensor_is_read_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    scales = load_file(copy / "nxm_scales.safetensors")
    scales["bert.encoder.layer.0.attention.self.value.input_scale"] = np.array(0.5, np.float32)
    save_file(scales, copy / "nxm_scales.safetensors")
    with pytest.raises(ArtifactError, match="read the same tensor with different input scales"):
        export(copy, tmp_path / "graph")


def test_a_placement_that_was_not_trained_is_refused(tmp_path: Path) -> None:
    path = baked.write_checkpoint("bert", tmp_path / "checkpoint", placement="inputs")
    with pytest.raises(PlanError, match="this plan trained no output quantizers; use placement inputs"):
        export(path, tmp_path / "graph", placement="inputs-outputs")
    with pytest.raises(PlanError, match="this plan trained attention in float; use placement inputs"):
        export(path, tmp_path / "graph", placement="attention")


def test_a_scale_that_float16_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    path = baked.write_checkpoint("bert", tmp_path / "checkpoint")
    scales, weights = load_file(path / "nxm_scales.safetensors"), load_file(path / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    for tensors, key in ((scales, f"{name}_scale"), (weights, name)):
        tensors[key] = tensors[key].copy()
        tensors[key][3] *= np.float32(2.0**-18)  # a power of two keeps the weights on their grid
    save_file(scales, path / "nxm_scales.safetensors")
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    open_checkpoint(path).require_valid()
    with pytest.raises(ExportError, match=rf"{name}: scale .* is not a normal float16 number .* --dtype bfloat16"):
        export(path, tmp_path / "graph", target="trt")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.slow
def test_a_traced_weight_that_is_not_the_checkpoints_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Query and key swapped by the exporter have the right shapes; only their values tell."""
    path = baked.write_checkpoint("bert", tmp_path / "checkpoint")
    trace = tracing.trace

    def swapped(*arguments: Any) -> Any:
        model = trace(*arguments)
        query, key = (
            model.graph.initializers[f"bert.encoder.layer.0.attention.self.{role}.weight"] for role in ("query", "key")
        )
        query.const_value, key.const_value = key.const_value, query.const_value
        return model

    monkeypatch.setattr(exporter, "trace", swapped)
    with pytest.raises(ExportError, match=r"query\.weight: the traced graph holds other values than the checkpoint"):
        export(path, tmp_path / "graph")
    assert not (tmp_path / "graph").exists()

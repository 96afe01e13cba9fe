"""INT8 outputs that cost too much: found by measurement, left in float, and so in the rest of the chain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from compressors.models import load_model, load_tokenizer, resolve
from compressors.quantization.fake_quant import ActivationQuantizer, quant_linears
from compressors.quantization.prepare_bake import calibrate, prepare
from compressors.settings import Settings
from compressors.training.output_sensitivity import output_costs
from compressors.training.task_data import TaskDataRequest, read_task_data
from compressors.training.trainer import collate
from nxm_export.cli import main
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.quantizer_placement import droppable_outputs, residual_output_weights
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, read_metrics
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import DataError
from nxm_export.graph.exporter import export
from nxm_export.graph.verifier import verify
from tests.support import tiny
from tests.support.few_rounds import time_few_rounds_here
from tests.support.variants import variants

COARSE = "bert.encoder.layer.0.output.dense.weight"


def test_the_scores_of_a_single_sample_have_no_variance_to_measure_costs_by(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="regression"))
    train, _ = tiny.write_data(tmp_path, "regression")
    data = read_task_data(source, TaskDataRequest(TASKS["regression"], str(train)), load_tokenizer(source), Settings())
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("W8"))
    model = load_model(source, TASKS["regression"])
    prepare(model, plan, source.family, source.config)
    calibrate(model, [collate(data.train[:32], data.pad_id)], 100.0)
    with pytest.raises(DataError, match=r"costs on 1 training samples is nan; give more samples, or .* inf"):
        output_costs(model, residual_output_weights(plan), data.train[:1], data.pad_id, "identity", seed=0)


@pytest.mark.parametrize("task", variants(["classification", "regression", "embedding"], ("classification",)))
def test_an_output_whose_step_is_coarse_costs_most(task: str, tmp_path: Path) -> None:
    """A channel a hundred times as loud as the others makes the step as coarse as it is made here."""
    source = resolve(tiny.write_model("bert", tmp_path / "model", head=task))
    train, _ = tiny.write_data(tmp_path, task)
    data = read_task_data(source, TaskDataRequest(TASKS[task], str(train)), load_tokenizer(source), Settings())
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("W8"))
    outputs = residual_output_weights(plan)
    assert len(outputs) == 4  # of two blocks: attention's and the FFN's
    model = load_model(source, TASKS[task])
    prepare(model, plan, source.family, source.config)
    calibrate(model, [collate(data.train[:32], data.pad_id)], 100.0)
    quantizers = {name: layer.output_quantizer for name, layer in quant_linears(model).items()}

    def costs() -> dict[str, float]:
        return output_costs(model, outputs, data.train, data.pad_id, TASKS[task].output_kind, seed=0)

    fine = costs()
    assert set(fine) == set(outputs)
    assert min(fine.values()) > 0
    quantizer = quantizers[COARSE]
    assert isinstance(quantizer, ActivationQuantizer)
    quantizer.set_scale(100 * float(quantizer.scale))
    coarse = costs()
    assert coarse[COARSE] > 100 * fine[COARSE]
    assert {name: cost for name, cost in coarse.items() if name != COARSE} == {
        name: cost for name, cost in fine.items() if name != COARSE
    }
    assert {name: layer.output_quantizer for name, layer in quant_linears(model).items()} == quantizers  # as it was


@pytest.mark.parametrize(
    ("family", "kept"), variants([("bert", "query key value"), ("nomic_bert", "value")], lambda case: case[0] == "bert")
)
def test_costly_outputs_are_float_in_the_checkpoint_and_in_its_graphs(family: str, kept: str, tmp_path: Path) -> None:
    """All but those of what attention multiplies."""
    checkpoint = tiny.compress_tiny(family, tmp_path, dense_steps=4, settings={"output_limit": 0.0})
    opened = open_checkpoint(checkpoint)
    opened.require_valid()
    names = droppable_outputs(opened.plan)
    metrics = read_metrics(checkpoint)
    assert isinstance(metrics, CompressionMetrics)
    assert sorted(metrics.outputs_in_float) == sorted(names)
    assert all(cost > 0 for cost in metrics.outputs_in_float.values())
    with_output = {name for name, spec in opened.plan.weights.items() if spec.output_bits}
    assert with_output == {name for name in opened.plan.weights if FAMILIES[family].role(name) in kept.split()}
    for target in ("cpu", "trt"):
        verify(export(checkpoint, tmp_path / target, target=target, placement="inputs-outputs").path).require()


def test_a_matrix_that_is_left_dense_has_no_output_to_measure(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="classification"))
    train, _ = tiny.write_data(tmp_path, "classification")
    task = TASKS["classification"]
    data = read_task_data(source, TaskDataRequest(task, str(train)), load_tokenizer(source), Settings())
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("W8"), keep_dense=[COARSE])
    model = load_model(source, task)
    prepare(model, plan, source.family, source.config)
    calibrate(model, [collate(data.train[:32], data.pad_id)], 100.0)
    costs = output_costs(model, residual_output_weights(plan), data.train, data.pad_id, task.output_kind, seed=0)
    assert set(costs) == set(residual_output_weights(plan)) - {COARSE}


@pytest.mark.slow
def test_a_run_of_which_no_output_is_left_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Placement ffn-only has outputs behind the FFN alone; when they all stay in float, no graph with outputs can be
    made."""
    time_few_rounds_here(monkeypatch)
    model, (train, dev) = tiny.write_model("bert", tmp_path / "encoder"), tiny.write_data(tmp_path)
    run = tmp_path / "run"
    result = CliRunner().invoke(
        main,
        [
            "run", str(model), f"--train={train}", f"--dev={dev}", f"--out={run}", "--json",
            "--placement=ffn-only", "--output-limit=0",
            "--dense-steps=4", "--steps=4", "--batch-size=16", "--learning-rate=1e-3", "--dense-learning-rate=3e-3",
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (run / "onnx").iterdir()) == ["cpu", "dense", "trt"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_an_engine_with_some_outputs_in_float_agrees_with_its_checkpoint(backend: str, tmp_path: Path) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="openvino is not installed (extra: openvino)")
    checkpoint = tiny.compress_tiny("bert", tmp_path, settings={"output_limit": 0.0})
    graph, engine = tmp_path / "graph", tmp_path / "engine"
    for command in (
        ["export", checkpoint, "--target", "cpu", "--placement", "inputs-outputs", "--out", graph],
        ["build", graph / "model.onnx", "--backend", backend, "--out", engine],
        ["compare", engine, "--checkpoint", checkpoint, "--data", tmp_path / "dev.tsv"],
    ):
        result = CliRunner().invoke(main, [str(part) for part in command])
        assert result.exit_code == 0, result.output
    assert json.loads((engine / "passport.json").read_text())["options"]["integer_products"] == 12


@pytest.mark.slow
def test_without_a_limit_every_output_is_int8(tmp_path: Path) -> None:
    model, (train, dev) = tiny.write_model("bert", tmp_path / "encoder"), tiny.write_data(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    command = [
        "compress",
        model,
        f"--train={train}",
        f"--dev={dev}",
        f"--out={checkpoint}",
        "--dense-steps=4",
        "--steps=4",
        "--json",
    ]
    refused = CliRunner().invoke(main, [str(part) for part in [*command, "--output-limit=nan"]])
    assert refused.exit_code == 2
    assert "is not a finite number" in refused.output
    result = CliRunner().invoke(main, [str(part) for part in [*command, "--output-limit=inf"]])
    assert result.exit_code == 0, result.output
    plan = open_checkpoint(checkpoint).plan
    assert all(plan.weights[name].output_bits == 8 for name in residual_output_weights(plan))
    metrics = read_metrics(checkpoint)
    assert isinstance(metrics, CompressionMetrics)
    assert not metrics.outputs_in_float

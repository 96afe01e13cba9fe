"""Channels that stick out of what an FFN reads are evened out: the same function, nearer to itself in INT8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compressors.models import ModelSource, load_model, load_tokenizer, resolve
from compressors.quantization.even_channels import channel_factors, even_out_channels
from compressors.quantization.fake_quant import quant_linears
from compressors.quantization.prepare_bake import bake, calibrate, in_float, prepare
from compressors.settings import Settings
from compressors.training.phases import Job
from compressors.training.task_data import TaskDataRequest, read_task_data
from engines.reference import pytorch
from nxm_export.contract.checkpoint import open_checkpoint, save_plan
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.progress import silent
from tests.support import baked, tiny

FEEDS = baked.feeds("bert", 8, 20, padding=5)
BATCH = {name: torch.from_numpy(array) for name, array in FEEDS.items()}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=40))
def test_every_channel_comes_as_near_the_reach_of_the_median_as_powers_of_two_can(channels: list[float]) -> None:
    largest = torch.tensor(channels)
    factors = channel_factors(largest)
    reach = 1.5 * float(largest.median())
    for size, factor in zip(largest.tolist(), factors.tolist(), strict=True):
        distances = {k: abs(np.log2(size / 2**k / reach)) for k in range(11)} if reach and size else {0: 0.0}
        assert np.log2(factor) in distances
        # Two powers are as near where a channel lies in the middle between them.
        assert distances[int(np.log2(factor))] <= min(distances.values()) + 1e-4


def prepared(tmp_path: Path, spec: str = "W8") -> tuple[nn.Module, ModelSource, CompressionPlan]:
    """A model one of whose channels is far larger than the others where an FFN reads, with its quantizers."""
    source = resolve(tiny.write_model("bert", tmp_path / "dense", head="classification"))
    model: nn.Module = load_model(source, TASKS["classification"]).eval()
    with torch.no_grad():
        for block in source.family.blocks(source.config):
            model.get_parameter(f"{block}.{source.family.ffn_norm}.weight")[3] *= 40
            model.get_parameter(f"{block}.intermediate.dense.weight")[5] *= 10
    plan = source.family.uniform_plan(source.config, WeightSpec.parse(spec), placement="inputs")
    prepare(model, plan, source.family, source.config)
    return model, source, plan


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    answer: Tensor = model(**BATCH).logits
    return answer


def test_the_function_stays_and_int8_comes_nearer_to_it(tmp_path: Path) -> None:
    model, source, plan = prepared(tmp_path)
    calibrate(model, [BATCH], None)
    with in_float(model):
        exact = logits(model)
    before = logits(model)
    even_out_channels(model, plan, source.family, source.config, [BATCH])
    with in_float(model):
        torch.testing.assert_close(logits(model), exact, rtol=0, atol=1e-6)  # powers of two round nothing
    calibrate(model, [BATCH], None)
    assert (logits(model) - exact).norm() < 0.6 * (before - exact).norm()
    factors = {name: layer.input_factors for name, layer in quant_linears(model).items()}
    assert {name.split(".layer.0.")[-1] for name, one in factors.items() if one is not None and ".0." in name} == {
        "intermediate.dense.weight",
        "output.dense.weight",
    }


def test_what_is_saved_computes_what_was_measured(tmp_path: Path) -> None:
    model, source, plan = prepared(tmp_path)
    even_out_channels(model, plan, source.family, source.config, [BATCH])
    calibrate(model, [BATCH], None)
    measured = logits(model)
    scales = bake(model, plan)
    out = tmp_path / "checkpoint"
    model.save_pretrained(out)  # type: ignore[operator]
    tiny.write_tokenizer("bert", out)
    save_plan(out, plan, scales)
    open_checkpoint(out).require_valid()
    assert sum(name.endswith("input_factors") for name in scales) == 2 * tiny.LAYERS
    with pytorch.load(out, task="classification") as reference:
        answers = reference.run(FEEDS)
    # Codes that lie between two steps may fall to either side; most samples have none.
    near = np.abs(answers["logits"] - measured.numpy()).max(axis=1) < 1e-5
    assert near.mean() >= 0.5
    np.testing.assert_allclose(answers["logits"], measured.numpy(), atol=0.05)


@pytest.mark.parametrize("spec", ["W4", "2:4"])
def test_weights_of_other_than_8_bits_are_left_alone(tmp_path: Path, spec: str) -> None:
    model, source, plan = prepared(tmp_path, spec)
    even_out_channels(model, plan, source.family, source.config, [BATCH])
    assert all(layer.input_factors is None for layer in quant_linears(model).values())


@pytest.mark.parametrize(("steps", "evened"), [(0, 2 * tiny.LAYERS), (2, 0)])
def test_channels_are_evened_out_where_nothing_trains(tmp_path: Path, steps: int, evened: int) -> None:
    model, source, plan = prepared(tmp_path)
    bake(model, plan)
    model.save_pretrained(source.path)  # type: ignore[operator]
    train, _ = tiny.write_data(tmp_path)
    chosen = Settings(steps=steps, precision="fp32", calibration_samples=16)
    data = read_task_data(source, TaskDataRequest(TASKS["classification"], str(train)), load_tokenizer(source), chosen)
    student = Job(source, data, plan, chosen, tmp_path / "work", silent).prepared()
    found = [layer.input_factors for layer in quant_linears(student).values() if layer.input_factors is not None]
    assert len(found) == evened

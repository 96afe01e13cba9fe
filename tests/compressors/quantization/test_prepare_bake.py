"""`prepare`, `calibrate` and `bake`: quantizers come into a model, learn their ranges, and leave it as it was."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from compressors.models import load_model, resolve
from compressors.quantization.fake_quant import QuantLinear, activation_quantizers, quant_linears
from compressors.quantization.prepare_bake import bake, calibrate, prepare
from nxm_export.contract.checkpoint import read_config
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import PlanError
from tests.support import tiny
from tests.support.bert_block import CONFIG, FAMILY, Block
from tests.support.random_tensors import randn

W4 = WeightSpec(NMPattern(2, 4), 4, 8)


def test_query_key_and_value_share_one_quantizer_that_runs_once() -> None:
    model = Block()
    prepare(model, FAMILY.uniform_plan(CONFIG, W4, placement="inputs"), FAMILY, CONFIG)
    layers = list(quant_linears(model).values())
    shared = layers[0].reads
    assert shared is not None
    assert [layer.reads is shared for layer in layers] == [True, True, True, False, False, False]
    assert len(activation_quantizers(model)) == 4
    assert shared.readers == 3
    names = [name for name, _ in model.named_parameters() if "input_quantizer" in name]
    assert len(names) == 4  # saved once, not three times
    x = randn(2, 8)
    first, second = shared.codes(x), shared.codes(x)
    assert first[0] is second[0]
    shared.codes(x)  # the third reader
    assert shared._cached is None  # and nothing is kept after it


def test_prepare_and_bake_undo_each_other() -> None:
    model = Block()
    before = copy.deepcopy(model.state_dict())
    plan = FAMILY.uniform_plan(CONFIG, WeightSpec(None, 8, 8))
    prepare(model, plan, FAMILY, CONFIG)
    scales = bake(model, plan)
    assert set(model.state_dict()) == set(before)
    assert all(type(module) is not QuantLinear for module in model.modules())
    for name, tensor in model.state_dict().items():
        step = scales[f"{name}_scale"][:, None] if f"{name}_scale" in scales else np.zeros((1, 1))
        # A weight moves by half a step at most, plus what clipping at a fitted scale takes.
        assert np.abs((tensor - before[name]).numpy()).max() <= 0.51 * np.max(step) + 1e-7
    assert sorted(kind.rpartition(".")[2] for kind in scales).count("output_scale") == 5


def test_calibration_ignores_padding() -> None:
    model = Block()
    prepare(model, FAMILY.uniform_plan(CONFIG, W4, placement="inputs"), FAMILY, CONFIG)
    ids = torch.tensor([[1, 2, 1000], [2, 1, 1000]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
    calibrate(model, [{"input_ids": ids, "attention_mask": mask}], 100.0)
    actual = float(activation_quantizers(model)[0].scale) * 127
    assert actual == pytest.approx(
        2 * 8, rel=1e-3
    )  # the largest real value is 2 times the factor 8; padding holds 8000


def test_int8_attention_needs_quantized_queries_keys_and_values() -> None:
    plan = replace(FAMILY.uniform_plan(CONFIG, W4, placement="inputs"), attention="int8")
    with pytest.raises(PlanError, match="needs output_bits 8 on every query, key and value"):
        prepare(Block(), plan, FAMILY, CONFIG)


def test_a_fused_matrix_leaves_a_scale_for_each_part_and_attention_quantizes_what_is_rotated(tmp_path: Path) -> None:
    path = tiny.write_model("modernbert", tmp_path, head="classification", layers=1)
    model = load_model(resolve(path), TASKS["classification"])
    family, config = FAMILIES["modernbert"], read_config(tmp_path)
    plan = family.uniform_plan(config, WeightSpec.parse("W8"), placement="attention")
    prepare(model, plan, family, config)
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], 100.0)
    scales = bake(model, plan)
    block = "model.layers.0"
    written = {name.removeprefix(f"{block}.") for name in scales if not name.endswith((".input_scale", "weight_scale"))}
    assert written == {
        *(f"attn.Wqkv.{part}.output_scale" for part in ("query", "key", "value")),
        *(f"mlp.Wi.{part}.output_scale" for part in ("input", "gate")),
        *("attn.Wo.output_scale", "mlp.Wo.output_scale", "attn.query_scale", "attn.key_scale"),
    }
    assert all(scale.shape == () and scale > 0 for name, scale in scales.items() if not name.endswith("weight_scale"))
    assert not quant_linears(model)
    assert not activation_quantizers(model)


def test_attention_inside_a_module_of_its_own_multiplies_quantized_probabilities(tmp_path: Path) -> None:
    path = tiny.write_model("mpnet", tmp_path, head="classification", layers=1)
    model = load_model(resolve(path), TASKS["classification"])
    family, config = FAMILIES["mpnet"], read_config(tmp_path)
    prepare(model, family.uniform_plan(config, WeightSpec.parse("W8"), placement="products"), family, config)
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calibrate(model, [batch], 100.0)
    read: list[Tensor] = []
    dropout = model.get_submodule("mpnet.encoder.layer.0.attention.attn.dropout")
    dropout.register_forward_hook(lambda module, args, output: read.append(args[0]))
    model(**batch).logits.square().sum().backward()
    codes = 127 * read[0].detach().numpy()
    np.testing.assert_allclose(codes, codes.round(), rtol=0, atol=1e-4)
    assert len(np.unique(codes.round())) > 3
    gradient = quant_linears(model)["mpnet.encoder.layer.0.attention.attn.q.weight"].weight.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0  # they have a gradient

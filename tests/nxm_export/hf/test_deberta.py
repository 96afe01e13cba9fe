"""DeBERTa's attention as it is trained and exported, against transformers' own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compressors.models import load_model, resolve
from compressors.quantization.prepare_bake import calibrate, prepare
from nxm_export.contract.families import family_of
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError
from nxm_export.graph.exporter import export
from nxm_export.graph.reading.graph_weights import graph_weights, load_graph
from nxm_export.hf.deberta import split_shared_projections, write_out_attention
from tests.support import baked, onnx_text, tiny

KINDS: list[dict[str, Any]] = [
    {},  # as version 3
    {"share_att_key": False},
    {"pos_att_type": "c2p"},
    {"pos_att_type": ["p2c"]},
    {"pos_att_type": []},
    {"relative_attention": False},
    {"position_buckets": -1, "max_relative_positions": 20},  # fewer distances than the inputs have
    {"position_buckets": 8, "max_relative_positions": 512},
    {"embedding_size": 16, "position_biased_input": True, "type_vocab_size": 2, "norm_rel_ebd": "none"},
]


def model_of(options: dict[str, Any]) -> Any:
    config = tiny._config("deberta-v2", tiny.HIDDEN, tiny.INTERMEDIATE, 2, options)
    torch.manual_seed(0)
    model: Any = transformers.DebertaV2ForSequenceClassification(config).train(False)
    for parameter in model.parameters():  # biases and norms among them
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def states(model: Any) -> tuple[torch.Tensor, ...]:
    ids = torch.randint(5, 30, (3, tiny.POSITIONS), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    mask[2] = 0  # padding alone
    with torch.no_grad():
        output = model(ids, attention_mask=mask, output_hidden_states=True)
    return (*output.hidden_states, output.logits)


@pytest.mark.parametrize("options", KINDS, ids=str)
class TestEveryKind:
    def test_projections_of_their_own_for_the_positions_change_nothing(
        self, options: dict[str, Any], tmp_path: Path
    ) -> None:
        model = model_of(options)
        expected = states(model)
        split_shared_projections(model)
        model.save_pretrained(tmp_path)
        again = transformers.DebertaV2ForSequenceClassification.from_pretrained(tmp_path).train(False)
        for found in (states(model), states(again)):
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert not getattr(again.config, "share_att_key", False)

    @pytest.mark.parametrize("fixed", [False, True])
    def test_attention_written_out_computes_the_same(self, options: dict[str, Any], fixed: bool) -> None:
        model = model_of(options).double()  # what differs beyond float64's rounding is no rounding
        expected, names = states(model), set(model.state_dict())
        write_out_attention(model, fixed_positions=fixed)
        assert set(model.state_dict()) == names
        # transformers takes the square root of the scale in float32, and fixed positions are computed in it.
        for one, other in zip(states(model), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-4 if fixed else 1e-5)


def test_other_models_are_left_alone() -> None:
    config = tiny._config("bert", tiny.HIDDEN, tiny.INTERMEDIATE, 1)
    model = transformers.BertForSequenceClassification(config)
    before = copy.deepcopy(model.state_dict())
    split_shared_projections(model)
    write_out_attention(model, fixed_positions=True)
    assert before.keys() == model.state_dict().keys()
    assert not any("forward" in vars(module) for module in model.modules())


def test_it_trains_in_bfloat16_behind_quantized_operands(tmp_path: Path) -> None:
    """transformers masks with float32's smallest number there, which bfloat16 does not hold."""
    source = resolve(tiny.write_model("deberta-v2", tmp_path / "model", head="classification", layers=1))
    model = load_model(source, TASKS["classification"])
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"), placement="inputs-outputs")
    prepare(model, plan, source.family, source.config)
    feeds = {k: torch.from_numpy(v) for k, v in baked.feeds("deberta-v2", 4, 12, padding=3).items()}
    calibrate(model, [feeds], 99.9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**feeds, labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    attention = model.get_submodule("deberta.encoder.layer.0.attention.self")
    for name in ("query_proj", "key_proj", "value_proj", "pos_query_proj", "pos_key_proj"):
        gradient = attention.get_parameter(f"{name}.weight").grad
        assert gradient is not None
        assert bool(gradient.isfinite().all())
        assert bool((gradient != 0).any()), name


def test_products_that_only_their_scale_brings_into_float16_stay_finite() -> None:
    model = model_of({"share_att_key": False}).half()
    write_out_attention(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("query_proj.bias", "key_proj.bias")):  # 8 channels a head: 8 * 150^2 > 65504
                parameter.fill_(-150.0 if "pos_" in name else 150.0)
    assert all(bool(state.isfinite().all()) for state in states(model))


def test_int8_attention_is_refused(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("deberta-v2", tmp_path / "model"))
    with pytest.raises(Exception, match="attention int8: transformers computes the attention of deberta-v2 inside"):
        source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"), placement="attention")


def test_a_convolution_behind_the_first_block_is_refused() -> None:
    config = {"model_type": "deberta-v2", "conv_kernel_size": 3, "hidden_act": "gelu"}
    with pytest.raises(ArtifactError, match="conv_kernel_size 3 is not supported: its convolution reads across"):
        family_of(config)
    assert family_of({**config, "conv_kernel_size": 0}).inputs == ("input_ids", "attention_mask")
    assert "token_type_ids" in family_of({**config, "conv_kernel_size": 0, "type_vocab_size": 2}).inputs


@pytest.mark.slow
@pytest.mark.parametrize("options", [KINDS[0], KINDS[6], KINDS[8]], ids=str)
def test_a_dense_model_with_shared_projections_is_exported_as_it_is(options: dict[str, Any], tmp_path: Path) -> None:
    path = tiny.write_model("deberta-v2", tmp_path / "m", head="classification", layers=1, options=options)
    export(path, tmp_path / "graph")
    graph = load_graph(tmp_path / "graph" / "model.onnx")
    assert not {"Tile", "Log", "Ceil"} & {node.op_type for node in graph.graph}
    read = {weight.name.rpartition(".")[2] for weight in graph_weights(graph)}
    assert {"position_keys", "position_queries"} <= read
    model = transformers.DebertaV2ForSequenceClassification.from_pretrained(path).train(False)
    for batch, sequence in ((1, 2), (3, tiny.POSITIONS)):
        feeds = baked.feeds("deberta-v2", batch, sequence, padding=1)
        if "type_vocab_size" in options:
            feeds["token_type_ids"] = feeds["input_ids"] % 2
        with torch.no_grad():
            expected = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}).logits.numpy()
        actual = onnx_text.run(tmp_path / "graph" / "model.onnx", feeds)["logits"]
        assert abs(actual - expected).max() < 1e-5  # float32 sums in another order

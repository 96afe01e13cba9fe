"""What ``config.json`` says about a model, also where it says something odd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest

from nxm_export.contract.checkpoint import read_config
from nxm_export.contract.encoder_family import INSIDE
from nxm_export.contract.families import FAMILIES, family_of
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.quantizer_placement import at_placement, droppable_outputs, names_in_graph, planned_spec
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError, PlanError
from nxm_export.hf.model_loading import load_pretrained
from nxm_export.hf.protocols import AutoClass
from tests.conftest import ROOT
from tests.support import tiny


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_the_weights_of_a_family_are_those_of_transformers(name: str, tmp_path: Any) -> None:
    """Names, shapes and order against the model that transformers builds, its linear layers inside the blocks."""
    import json

    import torch
    import transformers

    path = tiny.write_model(name, tmp_path, head="classification")
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    family = FAMILIES[name]
    made = cast("AutoClass", transformers.AutoModelForSequenceClassification)
    model = made.from_config(transformers.AutoConfig.from_pretrained(path))
    linears = {
        f"{path}.weight": tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and any(path.startswith(f"{block}.") for block in family.blocks(config))
    }
    assert dict(sorted(family.weights(config).items())) == dict(sorted(linears.items()))
    roles = family.roles
    assert [family.role(weight) for weight in list(family.weights(config))[: len(roles)]] == list(roles)
    assert family.max_positions(config) == tiny.POSITIONS
    assert family.heads(config) == tiny.HEADS


def test_roberta_counts_positions_from_behind_its_padding_index() -> None:
    assert FAMILIES["roberta"].max_positions({"max_position_embeddings": 514, "pad_token_id": 1}) == 512
    assert FAMILIES["bert"].max_positions({"max_position_embeddings": 512, "pad_token_id": 1}) == 512


@pytest.mark.parametrize("model_type", ["gpt2", "deberta", "eurobert", None, 5, ["bert"], "BERT"])
def test_other_families_are_refused_with_the_list(model_type: object) -> None:
    with pytest.raises(ArtifactError, match="supported families: bert, roberta, distilbert, electra, albert"):
        family_of({"model_type": model_type})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": "no"}, "config.json: is_decoder must be true or false, got 'no'"),
        ({"add_cross_attention": 0}, "config.json: add_cross_attention must be true or false, got 0"),
        ({"hidden_act": ["gelu"]}, "config.json: hidden_act must be a text, got ['gelu']"),
        ({"hidden_size": True}, "config.json: hidden_size must be a positive integer, got True"),
        ({"pad_token_id": 0.0}, "config.json: pad_token_id must be an integer, got 0.0"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_refused_by_file_and_key(change: dict[str, object], message: str) -> None:
    sizes = {"hidden_size": 4, "num_hidden_layers": 1, "intermediate_size": 8, "max_position_embeddings": 4}
    config = {"model_type": "roberta", "pad_token_id": 1, **sizes, **change}

    def read() -> None:
        family = family_of(config)
        family.gelu(config)
        family.max_positions(config)
        family.weights(config)

    with pytest.raises(ArtifactError) as error:
        read()
    assert message in str(error.value)


@pytest.mark.parametrize("flag", ["is_decoder", "add_cross_attention"])
def test_decoders_are_refused(flag: str) -> None:
    with pytest.raises(ArtifactError, match="decoders are not supported"):
        family_of({"model_type": "bert", flag: True})


@pytest.mark.parametrize(("layers", "groups", "inner"), [(4, 1, 1), (3, 2, 1), (4, 2, 2), (2, 1, 2)])
def test_shared_blocks_run_in_the_order_of_transformers(layers: int, groups: int, inner: int, tmp_path: Any) -> None:
    """Against the order in which the modules of a real model are called."""
    import json

    import torch
    import transformers

    options = {"num_hidden_groups": groups, "inner_group_num": inner}
    path = tiny.write_model("albert", tmp_path, head="classification", layers=layers, options=options)
    config, family, called = json.loads((path / "config.json").read_text()), FAMILIES["albert"], list[str]()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(path)
    for block in family.blocks(config):
        model.get_submodule(block).register_forward_hook(lambda _, __, ___, block=block: called.append(block))
    model(torch.ones(1, 3, dtype=torch.long))
    assert called == family.runs(config)
    assert len(set(family.run_names(config))) == len(called) == layers * inner
    assert len(family.weights(config)) == 6 * groups * inner


def test_groups_that_never_run_are_refused() -> None:
    with pytest.raises(ArtifactError, match="3 num_hidden_groups for 2 num_hidden_layers"):
        FAMILIES["albert"].runs({"num_hidden_layers": 2, "num_hidden_groups": 3})


@pytest.mark.parametrize("value", [None, 0, -1, "12", 1.5, True])
def test_a_size_that_is_none_is_named(value: object) -> None:
    with pytest.raises(ArtifactError, match="num_hidden_layers must be a positive integer"):
        FAMILIES["bert"].blocks({"num_hidden_layers": value})


def test_quantizers_stand_only_where_the_family_has_a_place_for_them() -> None:
    family, config = FAMILIES["bert"], {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 4}
    shapes = family.weights(config)
    spec = WeightSpec(weight_bits=8, input_bits=8, output_bits=8)
    everywhere = CompressionPlan("bert", dict.fromkeys(shapes, spec), shapes)
    with pytest.raises(PlanError, match=r"intermediate\.dense\.weight: no output quantizer belongs behind"):
        family.require_placement(everywhere)
    inputs = {name: WeightSpec(weight_bits=8, input_bits=8) for name in shapes}
    with pytest.raises(PlanError, match=r"query\.weight: attention int8 needs output_bits 8"):
        family.require_placement(CompressionPlan("bert", inputs, shapes, attention="int8"))
    assert {linear.role for linear in family.linears if linear.writes == INSIDE} == {"ffn_up"}


_SEPARATE = "attention_output ffn_gate ffn_up ffn_down"


@pytest.mark.parametrize(
    ("name", "placement", "written", "droppable", "own"),
    [
        ("bert", "inputs-outputs", "query key value attention_output ffn_down", "attention_output ffn_down", ""),
        ("nomic_bert", "inputs", "", "", "query key value"),
        ("nomic_bert", "products", "value", "", "query key"),  # attention quantizes what is rotated, behind that
        ("nomic_bert", "inputs-outputs", f"query key value {_SEPARATE}", f"query key {_SEPARATE}", "query key"),
        ("nomic_bert", "ffn-only", "ffn_gate ffn_up ffn_down", "ffn_gate ffn_up ffn_down", "query key value"),
        ("jina_embeddings_v3", "attention", "query key value attention_output ffn_down",
         "query key attention_output ffn_down", "query key"),
        ("modernbert", "products", "", "", "query key value"),
        ("modernbert", "inputs-outputs", "qkv attention_output ffn_up ffn_down",
         "qkv attention_output ffn_up ffn_down", "query key"),
        ("modernbert", "attention", "qkv attention_output ffn_up ffn_down",
         "attention_output ffn_up ffn_down", "query key"),  # what attention multiplies as a value is never dropped
    ],
)  # fmt: skip
def test_what_leaves_a_product_in_int8(name: str, placement: str, written: str, droppable: str, own: str) -> None:
    """Which roles have an output quantizer, which of them can lose it, and what INT8 attention quantizes itself."""
    family, sizes = FAMILIES[name], {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    plan = family.uniform_plan({**sizes, "num_hidden_layers": 1}, WeightSpec.parse("W8"), placement=placement)
    quantized = [name for name, spec in plan.weights.items() if spec.output_bits]
    assert [family.role(name) for name in quantized] == written.split()
    assert [family.role(name) for name in droppable_outputs(plan) if name in quantized] == droppable.split()
    (block,) = family.blocks({"num_hidden_layers": 1})
    assert family.own_operands(plan, block) == tuple(own.split())
    if plan.attention == "int8":  # what is dropped leaves every operand its quantizer
        assert family.own_operands(at_placement(plan, "products"), block) == tuple(own.split())


def test_a_part_has_the_plan_of_its_matrix_and_no_other_name_has() -> None:
    family, sizes = FAMILIES["modernbert"], {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    plan = family.uniform_plan({**sizes, "num_hidden_layers": 1}, WeightSpec.parse("W8"))
    whole = "model.layers.0.attn.Wqkv.weight"
    parts = tuple(f"model.layers.0.attn.Wqkv.{part}.weight" for part in ("query", "key", "value"))
    assert family.parts(whole) == names_in_graph(plan, whole, parts[:1]) == parts
    assert names_in_graph(plan, whole, ()) == names_in_graph(plan, whole, {whole, *parts}) == (whole,)
    assert {planned_spec(plan, name) for name in (whole, *parts)} == {plan.weights[whole]}
    for other in ("model.layers.0.attn.Wqkv.gate.weight", "model.layers.0.attn.Wo.query.weight", "query.weight", "w"):
        assert planned_spec(plan, other) is None
    unknown = replace(plan, model_type="unknown")
    assert (planned_spec(unknown, whole), planned_spec(unknown, parts[0])) == (plan.weights[whole], None)


def test_a_residual_stream_that_is_never_normalised_stays_in_float() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    with pytest.raises(PlanError, match="residual stream of modernbert is never normalised"):
        FAMILIES["modernbert"].uniform_plan(sizes, WeightSpec.parse("W8"), residual="int8")


@pytest.mark.parametrize("name", ["nomic_bert", "gte"])
def test_a_head_that_transformers_lacks_is_refused_by_name(name: str, tmp_path: Any) -> None:
    path = tiny.write_model(name, tmp_path, layers=1)
    with pytest.raises(ArtifactError, match=f"no head for question-answering in the {name} family"):
        load_pretrained(path, read_config(path), TASKS["question-answering"])


def test_the_change_that_brought_a_family_is_as_contributing_shows_it() -> None:
    """Of at most 25 lines, all of which stand in the files that it names."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = page.partition("```diff\n")[2].partition("```")[0].splitlines()
    assert len(shown) <= 25
    added = 0
    for line in shown:
        if line.startswith("--- a/"):
            there = (ROOT / line.removeprefix("--- a/")).read_text(encoding="utf-8").splitlines()
        elif line.startswith("+"):
            assert line[1:].partition("  # ")[0] in [known.partition("  # ")[0] for known in there]
            added += 1
    assert added >= 10


def test_a_name_of_no_role_is_refused() -> None:
    with pytest.raises(PlanError, match="not a compressible weight of the bert family"):
        FAMILIES["bert"].role("bert.pooler.dense.weight")

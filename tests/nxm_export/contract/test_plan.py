"""The plan: N:M parsing, bit accounting against numbers worked out by hand, and a text form that refuses what it cannot
mean."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import COUNTINGS, CompressionPlan, NMPattern, WeightSpec
from nxm_export.contract.quantizer_placement import at_placement, placement_of
from nxm_export.errors import PlanError

BASE = {
    "model_type": "bert",
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
}
N = 768 * 768  # weights of an attention matrix of BERT-base
SCALES = 768 * 32  # bits of its per-channel float32 scales
PATTERNS = [NMPattern.parse(text) for text in ("1:2", "2:4", "1:4", "2:8", "4:8", "3:4", "1:3", "2:6", "4:16", "7:8")]

patterns = st.integers(2, 16).flatmap(lambda m: st.builds(NMPattern, st.integers(1, m - 1), st.just(m)))
specs = st.one_of(
    st.builds(WeightSpec, st.none() | patterns),
    st.builds(WeightSpec, st.none() | patterns, st.integers(2, 8), st.just(8), st.sampled_from([None, 8])),
)


@pytest.mark.parametrize("text", ["2:4", "1:2", "4:8", "1:16"])
def test_a_pattern_is_printed_as_it_is_parsed(text: str) -> None:
    assert str(NMPattern.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "2", "2:", ":4", "2:4:8", "a:b", "-1:4", "2.0:4", "2 :4", "²:4", "٢:٤", f"1:{'9' * 5000}"]
)
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not an N:M pattern"):
        NMPattern.parse(text)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0"])
def test_a_pattern_keeps_some_weights_and_not_all(text: str) -> None:
    with pytest.raises(PlanError, match=r"needs 0 < N < M, got .*; for dense weights give none"):
        NMPattern.parse(text)


@given(patterns)
def test_index_bits_are_just_enough_to_name_every_support(pattern: NMPattern) -> None:
    supports = sum(1 for _ in itertools.combinations(range(pattern.m), pattern.n))
    assert 2**pattern.index_bits >= supports
    assert pattern.index_bits == 0 or 2 ** (pattern.index_bits - 1) < supports


def test_index_bits_stay_exact_where_floating_point_logarithms_do_not() -> None:
    wide = NMPattern(32, 64)  # C(64, 32) = 1832624140942590534, a little over 2**60
    assert wide.index_bits == 61
    assert NMPattern(1, 2**60 + 1).index_bits == 61  # log2 of 2**60 + 1 is 60.0 in float64


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_pattern_implies_2_4_when_no_matrix_of_it_breaks_2_4(pattern: NMPattern) -> None:
    width = math.lcm(pattern.m, 4)
    supports = [
        np.isin(range(pattern.m), positions) for positions in itertools.combinations(range(pattern.m), pattern.n)
    ]
    if len(supports) ** (width // pattern.m) > 200_000:
        pytest.skip("too many matrices to enumerate")
    rows = itertools.product(supports, repeat=width // pattern.m)
    breaks = any((np.concatenate(row).reshape(-1, 4).sum(axis=1) > 2).any() for row in rows)
    assert pattern.implies_2_4 == (not breaks)


# Bits of a 768 x 768 matrix by hand, from: dense b bits n*b; hw 2:4 and what implies it n*(b+2)/2; 4:8 n*b; packed
# n/M * (N*b + ceil(log2 C(M, N))); values n*N/M*b. Scales are added where the weight is quantized, but not in values.
@pytest.mark.parametrize(
    ("option", "hw", "packed", "values"),
    [
        ("dense", 16 * N, 16 * N, 16 * N),
        ("W8", 8 * N + SCALES, 8 * N + SCALES, 8 * N),
        ("W4", 4 * N + SCALES, 4 * N + SCALES, 4 * N),
        ("2:4", 9 * N, N // 4 * 35, 8 * N),
        ("2:4+W8", 5 * N + SCALES, N // 4 * 19 + SCALES, 4 * N),
        ("2:4+W7", N * 9 // 2 + SCALES, N // 4 * 17 + SCALES, N * 7 // 2),
        ("2:4+W6", 4 * N + SCALES, N // 4 * 15 + SCALES, 3 * N),
        ("2:4+W5", N * 7 // 2 + SCALES, N // 4 * 13 + SCALES, N * 5 // 2),
        ("2:4+W4", 3 * N + SCALES, N // 4 * 11 + SCALES, 2 * N),
        ("2:4+W3", N * 5 // 2 + SCALES, N // 4 * 9 + SCALES, N * 3 // 2),
        ("2:4+W2", 2 * N + SCALES, N // 4 * 7 + SCALES, N),
        ("1:2+W8", 5 * N + SCALES, N // 2 * 9 + SCALES, 4 * N),
        ("1:4+W8", 5 * N + SCALES, N // 4 * 10 + SCALES, 2 * N),
        ("2:8+W8", 5 * N + SCALES, N // 8 * 21 + SCALES, 2 * N),
        ("4:8+W8", 8 * N + SCALES, N // 8 * 39 + SCALES, 4 * N),
        ("1:4+W4", 3 * N + SCALES, N // 4 * 6 + SCALES, N),
    ],
)
def test_stored_bits_are_the_ones_worked_out_by_hand(option: str, hw: int, packed: int, values: int) -> None:
    spec = WeightSpec.parse(option)
    assert [spec.stored_bits((768, 768), counting) for counting in ("hw", "packed", "values")] == [hw, packed, values]


@pytest.mark.parametrize(
    ("option", "values", "hw"),
    [
        ("2:4", 0.75, 0.71875),
        ("W8", 0.75, 0.75),
        ("W4", 0.875, 0.875),
        ("2:4+W8", 0.875, 0.84375),
        ("2:4+W4", 0.9375, 0.90625),
    ],
)
def test_bert_base_compresses_as_the_literature_says(option: str, values: float, hw: float) -> None:
    """algorithm.md 1.2: the authors' ratios know no scales; ours count them, 0.098 % of the float32 matrices."""
    plan = FAMILIES["bert"].uniform_plan(BASE, WeightSpec.parse(option))
    assert sum(out * in_ for out, in_ in plan.shapes.values()) == 84_934_656
    assert plan.compression("values") == values
    scales = 0.0009766 if "W" in option else 0.0
    assert plan.compression("hw") == pytest.approx(hw - scales, abs=1e-6)  # the share of scales is given to 7 digits


def test_engine_bytes_of_low_bit_weights_are_those_of_int8() -> None:
    w4, w8 = (FAMILIES["bert"].uniform_plan(BASE, WeightSpec.parse(text)) for text in ("2:4+W4", "2:4+W8"))
    assert w4.engine_bytes(sparse=True) == w8.engine_bytes(sparse=True) == w8.stored_bits("hw") // 8
    dense = FAMILIES["bert"].uniform_plan(BASE, WeightSpec.parse("W8"))
    assert w4.engine_bytes(sparse=False) == dense.engine_bytes(sparse=True)


@given(specs, st.integers(1, 6), st.integers(1, 6))
def test_counting_is_monotonous_and_positive(spec: WeightSpec, out: int, groups: int) -> None:
    in_ = groups * (spec.pattern.m if spec.pattern else 4)
    values, packed = (spec.stored_bits((out, in_), counting) for counting in ("values", "packed"))
    assert 0 < values <= packed
    sparse, dense = (spec.engine_bits((out, in_), sparse=flag) for flag in (True, False))
    assert in_ % 4 or sparse <= dense or (spec.weight_bits or 16) < 3


def test_a_row_that_is_no_multiple_of_four_is_padded_for_the_hardware() -> None:
    spec = WeightSpec.parse("1:3+W8")  # 1:3 implies 2:4: any four neighbours keep at most two
    assert spec.stored_bits((1, 6), "hw") == 2 * 2 * (8 + 2) + 32


@pytest.mark.parametrize("text", ["2:4+W8", "W4", "2:4", "dense"])
def test_a_weight_option_is_printed_as_it_is_parsed(text: str) -> None:
    assert str(WeightSpec.parse(text)) == text


@pytest.mark.parametrize("text", ["", "W", "8", "2:4+W8+W4", "2:4+1:4", "W8+", "float", "W²", f"W{'9' * 5000}"])
def test_what_is_no_weight_option_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="not a weight option"):
        WeightSpec.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_bits": 1, "input_bits": 8}, "weight_bits must be 2 to 8"),
        ({"weight_bits": 9, "input_bits": 8}, "weight_bits must be 2 to 8"),
        ({"weight_bits": 7.5, "input_bits": 8}, "weight_bits must be 2 to 8"),
        ({"weight_bits": True, "input_bits": 8}, "weight_bits must be 2 to 8"),
        ({"weight_bits": 8, "input_bits": 4}, "input_bits must be 8"),
        ({"weight_bits": 8, "input_bits": 8.0}, "input_bits must be 8"),
        ({"weight_bits": 8}, "needs a quantized input"),
        ({"input_bits": 8}, "need a quantized weight"),
        ({"output_bits": 8}, "need a quantized weight"),
    ],
)
def test_a_spec_that_no_kernel_could_run_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        WeightSpec(**fields)  # type: ignore[arg-type]


def plan_of(spec: WeightSpec, shape: tuple[int, int] = (8, 16)) -> CompressionPlan:
    return CompressionPlan("bert", {"a.weight": spec}, {"a.weight": shape})


@given(specs, st.integers(1, 4), st.sampled_from(["float", "int8"]))
def test_a_plan_survives_its_text(spec: WeightSpec, groups: int, attention: str) -> None:
    shape = (3, groups * (spec.pattern.m if spec.pattern else 4))
    plan = CompressionPlan("bert", {"b": spec, "a": WeightSpec()}, {"b": shape, "a": (2, 2)}, attention)
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert list(CompressionPlan.from_json(plan.to_json()).weights) == [
        "b",
        "a",
    ]  # the model's order, not the alphabet's


def test_the_text_of_a_plan_leaves_out_what_is_not_used() -> None:
    """nxm-plan/1 to the byte: readers that do not know a field yet read every plan that does not use it."""
    weights = {"b": WeightSpec.parse("2:4+W8"), "a": WeightSpec()}
    plan = CompressionPlan("bert", weights, {"b": (2, 4), "a": (3, 2)}, embedding="int8")
    lines = [
        "{",
        ' "schema": "nxm-plan/1",',
        ' "model_type": "bert",',
        ' "attention": "float",',
        ' "embedding": "int8",',
        ' "weights": {',
        '  "b": {',
        '   "shape": [',
        "    2,",
        "    4",
        "   ],",
        '   "pattern": "2:4",',
        '   "weight_bits": 8,',
        '   "input_bits": 8',
        "  },",
        '  "a": {',
        '   "shape": [',
        "    3,",
        "    2",
        "   ]",
        "  }",
        " }",
        "}",
        "",
    ]
    assert plan.to_json() == "\n".join(lines)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
def test_no_json_value_passes_for_a_plan(value: object) -> None:
    with pytest.raises(PlanError, match=r"schema|too large for an integer"):
        CompressionPlan.from_json(json.dumps(value))


_SPOILED = st.sampled_from(["pattern", "weight_bits", "input_bits", "output_bits", "shape"])
_JUNK = (
    st.none()
    | st.booleans()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.lists(st.integers(-1, 3), max_size=3)
)


@given(_SPOILED, _JUNK)
def test_a_spoiled_field_gives_a_plan_error_or_a_valid_plan(field: str, value: object) -> None:
    """Nothing but `PlanError` comes out of a damaged file, and what passes is printed back as it was read."""
    data = json.loads(plan_of(WeightSpec.parse("2:4+W8")).to_json())
    data["weights"]["a.weight"][field] = value
    with contextlib.suppress(PlanError):
        plan = CompressionPlan.from_json(json.dumps(data))
        assert CompressionPlan.from_json(plan.to_json()) == plan


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(plan_of(WeightSpec.parse("2:4+W8")).to_json()), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "p.json: not valid JSON"),
        ("[" * 100_000, "p.json: not valid JSON"),
        (
            edited(schema="nxm-plan/2"),
            "schema nxm-plan/2 is not the nxm-plan/1 that this version reads; use the nxm-export that wrote it",
        ),
        (edited(schema="nxm-run/1"), "not a nxm-plan/1 file"),
        (edited(colour="red"), "p.json: unknown field colour; it was written by another nxm-export"),
        (edited(attention="int4"), "p.json: attention must be float or int8"),
        (edited(weights={}), "p.json: a plan names at least one weight"),
        (edited(weights=[]), "p.json: weights: Expected `object`, got `array`"),
        (edited(model_type=3), "p.json: model_type: Expected `str`, got `int`"),
        (edited(weights={"a": {"shape": [4, 4], "bits": 8}}), "p.json: unknown field weights.a.bits"),
        (edited(weights={"a": {"shape": [4]}}), "p.json: weights.a.shape: Expected `array` of length 2, got 1"),
        (
            edited(weights={"a": {"shape": [4, 0]}}),
            "p.json: a: shape must be two positive integers (out, in), got [4, 0]",
        ),
        (edited(weights={"a": {"shape": "44"}}), "p.json: weights.a.shape: Expected `array`, got `str`"),
        (edited(weights={"b": {"shape": [4, 4]}, "a": {}}), "p.json: weights.a: Object missing required field `shape`"),
        (
            edited(weights={"a": {"shape": [4, 6], "pattern": "2:4"}}),
            "a: 2:4 needs in_features divisible by 4, but the weight is 4x6",
        ),
        (edited(weights={"a": {"shape": [4, 4], "pattern": "4"}}), "p.json: a: not an N:M pattern"),
        (edited(weights={"a": {"shape": [4, 4], "weight_bits": "8"}}), "p.json: weights.a.weight_bits: Expected"),
        (
            edited(weights={"a": {"shape": [4, 4], "weight_bits": 9, "input_bits": 8}}),
            "p.json: a: weight_bits must be 2",
        ),
        ('{"schema": "nxm-plan/1", "schema": "nxm-plan/1"}', "key 'schema' stands there twice"),
    ],
)
def test_a_malformed_plan_is_refused_with_file_place_and_way_out(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=r"p\.json") as caught:
        CompressionPlan.from_json(text, source="p.json")
    assert message in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), (b"\xff\xfe", "not UTF-8 text")])
def test_a_plan_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "plan.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(PlanError, match=message):
        CompressionPlan.load(file)


def test_a_plan_for_another_model_says_what_differs() -> None:
    plan = plan_of(WeightSpec())
    with pytest.raises(PlanError, match="for a bert model, this model is electra"):
        plan.require_fits("electra", plan.shapes)
    with pytest.raises(PlanError, match=r"a.weight \(plan \(8, 16\), model \(8, 32\)\)"):
        plan.require_fits("bert", {"a.weight": (8, 32)})
    with pytest.raises(PlanError, match=r"1 weights differ in name or shape, such as b\.weight"):
        plan.require_fits("bert", {**plan.shapes, "b.weight": (8, 16)})
    plan.require_fits("bert", {"a.weight": (8, 16)})


def test_a_placement_drops_quantizers_and_never_adds_some() -> None:
    config = {**BASE, "num_hidden_layers": 1}
    both = FAMILIES["bert"].uniform_plan(config, WeightSpec.parse("W8"), placement="inputs-outputs")
    inputs = FAMILIES["bert"].uniform_plan(config, WeightSpec.parse("W8"), placement="inputs")
    assert at_placement(both, "inputs") == inputs
    assert (placement_of(both), placement_of(inputs)) == ("inputs-outputs", "inputs")
    with pytest.raises(PlanError, match="trained no output quantizers"):
        at_placement(inputs, "inputs-outputs")
    with pytest.raises(PlanError, match="unknown placement 'outputs'"):
        at_placement(both, "outputs")
    every, products = (
        FAMILIES["bert"].uniform_plan(config, WeightSpec.parse("W8"), placement=p) for p in ("attention", "products")
    )
    assert at_placement(every, "products") == products
    assert (placement_of(every), placement_of(products)) == ("attention", "products")
    roles = {FAMILIES["bert"].role(name) for name, spec in products.weights.items() if spec.output_bits}
    assert roles == {"query", "key", "value"}
    assert at_placement(products, "inputs") == inputs
    for fuller in ("attention", "inputs-outputs"):
        with pytest.raises(PlanError, match="trained no"):
            at_placement(products, fuller)
    with pytest.raises(PlanError, match="compress again with products"):
        at_placement(both, "products")


def test_int8_attention_around_dense_matrices_is_the_full_placement() -> None:
    config = {**BASE, "num_hidden_layers": 1}
    plan = FAMILIES["bert"].uniform_plan(
        config,
        WeightSpec.parse("W8"),
        placement="attention",
        keep_dense=["*attention.output*", "*.output.dense.weight"],
    )
    assert placement_of(plan) == "attention"
    assert at_placement(plan, "attention") == plan


def test_only_the_first_matrix_of_the_ffn_has_no_output_quantizer() -> None:
    plan = FAMILIES["bert"].uniform_plan({**BASE, "num_hidden_layers": 1}, WeightSpec.parse("W8"))
    assert [name for name, spec in plan.weights.items() if spec.output_bits is None] == [
        "bert.encoder.layer.0.intermediate.dense.weight"
    ]


def test_a_rule_that_hits_nothing_is_an_error() -> None:
    with pytest.raises(PlanError, match=r"keep-dense rule '\*.pooler.\*' matches none of the 72 weights"):
        FAMILIES["bert"].uniform_plan(BASE, WeightSpec.parse("2:4"), keep_dense=["*.pooler.*"])
    plan = FAMILIES["bert"].uniform_plan(BASE, WeightSpec.parse("2:4"), keep_dense=["*.layer.0.*"])
    assert plan.pattern_counts == {"dense": 6, "2:4": 66}


def test_counting_and_patterns_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match=f"choose one of {', '.join(COUNTINGS)}"):
        WeightSpec().stored_bits((4, 4), "bytes")
    with pytest.raises(PlanError, match="needs in_features divisible by 8, got a weight of 4x12"):
        WeightSpec.parse("2:8+W8").stored_bits((4, 12), "packed")

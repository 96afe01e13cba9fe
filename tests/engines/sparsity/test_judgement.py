"""The sparsity report: nothing but a kernel's name makes a matrix sparse."""

from dataclasses import replace
from typing import Any

import pytest

from engines.sparsity.advice import advise
from engines.sparsity.build_evidence import (
    Evidence,
    SparsityLog,
)
from engines.sparsity.judgement import FileProblem, judge
from engines.sparsity.kernel_names import Existence, sparse_kernel_exists
from engines.sparsity.sparsity_report import REASONS, SparsityTarget, WeightSparsity, weight_type
from nxm_export.contract.records.matrix_facts import MatrixFacts, ProductCounts, UnreadProduct
from nxm_export.errors import EngineError, ParityError
from nxm_export.storage.json_files import as_objects
from tests.support.sparsity_evidence import DENSE_GEMM, SPARSE_GEMM, fact, layer

PICKED = SparsityLog(frozenset({"node"}), frozenset({"node"}))  # by the builder's own words
SPARSE_FP16 = "sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64"
LISTED = SparsityLog(frozenset({"node"}))
A100 = SparsityTarget("trt", "8.6.0", "8.0")
NO_FLAG = replace(A100, sparse_flag=False)
UNKNOWN = SparsityTarget("trt", "11.4.0.106", "9.0")  # of which nobody knows whether it has sparse kernels
Verdict = tuple[bool | None, bool | None, str | None]  # eligible, chosen, reason
FUSED: Verdict = (True, None, "fused-away")
DENSE: Verdict = (None, False, "dense-chosen")
BROKEN = {"sparse_along_k": False, "broken_groups": 7}
HALF = {"codes": None, "integer_weight": False, "integer_input": False, "stored": "FLOAT16", "output": "float16"}
H100 = SparsityTarget("trt", "8.6.0", "9.0")


def judged(fact_: MatrixFacts, evidence: Evidence | None, target: SparsityTarget = A100) -> WeightSparsity:
    return judge([fact_], evidence, target).weights[0]


def test_a_sparse_kernel_in_the_inspector_is_proof() -> None:
    weight = judged(fact(), Evidence([layer(SPARSE_GEMM)]))
    assert (weight.eligible, weight.chosen, weight.reason, weight.kernel) == (True, True, None, SPARSE_GEMM)


def test_has_sparse_weights_alone_is_no_proof() -> None:
    """NVIDIA/TensorRT issue 4694: HasSparseWeights is 1, and the kernel is dense."""
    weight = judged(fact(output="float16"), Evidence([layer(DENSE_GEMM, saw_sparse_weights=True)]))
    assert (weight.chosen, weight.reason) == (False, "float-output")


def test_every_profile_must_run_sparse() -> None:
    evidence = Evidence([layer(SPARSE_GEMM), layer(DENSE_GEMM, profile=1)])
    assert judged(fact(), evidence).chosen is False


def test_a_sparse_kernel_that_the_profiler_never_saw_is_a_contradiction() -> None:
    layers = [layer(SPARSE_GEMM)]
    assert judged(fact(), Evidence(layers, running=frozenset({DENSE_GEMM}))).reason == "contradiction"
    assert judged(fact(), Evidence(layers, running=frozenset({f"{SPARSE_GEMM}_kernel"}))).chosen is True


@pytest.mark.parametrize(
    ("evidence", "chosen", "reason"),
    [
        (Evidence(), None, "unknown"),
        (Evidence([layer("")]), None, "unknown"),
        (Evidence([layer("0x00000000000003e8")]), None, "unknown"),
        (Evidence([layer(SPARSE_GEMM, onnx=("node1",))]), None, "fused-away"),
        (Evidence([layer("__myl_FcAdd_0xab", kind="kgen")]), None, "fused-away"),
        (Evidence([layer(DENSE_GEMM)], SparsityLog(frozenset({"node"}), frozenset({"node"}))), None, "contradiction"),
        (Evidence([layer(DENSE_GEMM)], SparsityLog(frozenset({"node"}), frozenset())), False, "dense-faster"),
        (Evidence([], SparsityLog(frozenset({"node"}), frozenset({"node"}))), True, None),
        (Evidence([], SparsityLog(frozenset({"node1"}), frozenset({"node1"}))), None, "unknown"),
        (Evidence([layer("", kind="")], PICKED), True, None),  # a report without details: names alone
        (Evidence([layer("__myl_FcAdd_0xab", kind="kgen")], PICKED), None, "contradiction"),
        (Evidence([layer(SPARSE_GEMM, "a", onnx=("a",))], PICKED), None, "contradiction"),
        (Evidence([], PICKED, running=frozenset({DENSE_GEMM})), None, "contradiction"),
        (Evidence([layer(SPARSE_GEMM)], profiles=frozenset({0, 1})), None, "unknown"),
        (Evidence([layer(SPARSE_GEMM), layer(SPARSE_GEMM, profile=1)], profiles=frozenset({0, 1})), True, None),
        (Evidence([layer("sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n")]), False, "float-kernel"),
    ],
)
def test_unknown_and_contradicting_evidence_never_counts_as_sparse(
    evidence: Evidence, chosen: bool | None, reason: str | None
) -> None:
    report = judge([fact()], evidence, A100)
    assert (report.weights[0].chosen, report.weights[0].reason) == (chosen, reason)
    assert report.sparse_share == (1.0 if chosen else 0.0)


@pytest.mark.parametrize(
    ("changes", "evidence", "target", "verdict", "detail"),
    [
        # a sparse kernel proves a product when every layer that computes it runs one, of its type
        ({}, Evidence([layer(SPARSE_GEMM), layer("")]), A100, (True, None, "unknown"), ""),
        ({}, Evidence([layer(SPARSE_GEMM), layer(SPARSE_FP16)]), A100, (True, False, "float-kernel"), ""),
        (HALF, Evidence([layer(SPARSE_FP16)]), A100, (True, True, None), ""),
        ({}, Evidence(log=PICKED), A100, (True, True, None), "by the builder's log alone"),
        ({}, Evidence(log=PICKED, running=frozenset({SPARSE_GEMM})), A100, (True, None, "unknown"), "not which"),
        ({}, Evidence(log=PICKED, running=frozenset({DENSE_GEMM})), A100, (True, None, "contradiction"), "no sparse"),
        ({}, Evidence([layer(SPARSE_GEMM)], running=frozenset()), A100, (True, None, "contradiction"), "did not see"),
        ({}, Evidence([layer(SPARSE_GEMM)], profiles=frozenset({0, 2, 1})), A100, (True, None, "unknown"), "profile 1"),
        (
            {},
            Evidence([layer("", kind=""), layer("", "x", "reformat", ("x",))], PICKED),
            A100,
            (True, True, None),
            "log",
        ),
        ({}, Evidence([layer(SPARSE_GEMM)]), NO_FLAG, (False, None, "contradiction"), "without the flag"),
        # what cannot run sparse does not, whatever the evidence leaves open
        (BROKEN, Evidence(), A100, (False, False, "pattern"), "7 of 147456"),
        ({}, Evidence(), NO_FLAG, (False, False, "flag-off"), ""),
        (BROKEN, Evidence(untied="a hash is missing"), A100, (False, False, "pattern"), ""),
        ({}, Evidence(untied="a hash is missing"), NO_FLAG, (False, False, "flag-off"), ""),
        (BROKEN, None, A100, (False, False, "pattern"), ""),
        # and what could is unknown
        ({}, None, A100, (True, None, "no-engine"), ""),
        ({}, Evidence(), replace(A100, has_gpu=False), (True, None, "no-gpu"), ""),
        ({}, Evidence(untied="a hash is missing"), replace(A100, has_gpu=False), (True, None, "no-gpu"), ""),
        ({}, Evidence(untied="a hash is missing"), A100, (True, None, "untied"), "a hash is missing"),
        ({"has_zero_point": True}, Evidence(untied="why"), A100, (False, None, "scales"), "zero point"),
        ({"scales_along_k": True}, Evidence(), A100, (False, None, "scales"), "along K"),
        ({}, Evidence([layer("__myl_FcAdd_0xab", "fused", "kgen")]), A100, FUSED, "inside kgen layer fused"),
        ({}, Evidence([layer(DENSE_GEMM, onnx=("other",))]), A100, FUSED, "no layer of the engine"),
        # a dense kernel: what the builder looked at
        ({}, Evidence([layer(DENSE_GEMM)]), UNKNOWN, (None, False, "dense-chosen"), "not known"),
        ({}, Evidence([layer(DENSE_GEMM, saw_sparse_weights=True), layer("")]), UNKNOWN, DENSE, "HasSparseWeights"),
        ({}, Evidence([layer(DENSE_GEMM)], LISTED), UNKNOWN, (True, False, "dense-faster"), ""),
        ({}, Evidence([layer(DENSE_GEMM)], SparsityLog(frozenset({"a"}))), UNKNOWN, DENSE, "not known"),
        ({"n": 255}, Evidence([layer(DENSE_GEMM)]), A100, (True, False, "size"), "256"),
        ({"n": 256}, Evidence([layer(DENSE_GEMM)]), A100, (True, False, "dense-faster"), ""),
    ],
)
def test_each_case_of_the_evidence_has_its_verdict(
    changes: dict[str, Any], evidence: Evidence | None, target: SparsityTarget, verdict: Verdict, detail: str
) -> None:
    weight = judged(fact(**changes), evidence, target)
    assert (weight.eligible, weight.chosen, weight.reason) == verdict
    assert detail in weight.detail
    assert weight.ready is (weight.reason == "no-engine"), "of an engine it is known, or not, whether sparse runs"


def test_a_sparse_kernel_on_a_matrix_without_the_pattern_is_a_contradiction() -> None:
    weight = judged(fact(sparse_along_k=False, broken_groups=9), Evidence([layer(SPARSE_GEMM)]))
    assert (weight.chosen, weight.reason) == (None, "contradiction")


@pytest.mark.parametrize(
    ("changes", "target", "reason"),
    [
        ({"sparse_along_k": False, "sparse_along_n": True, "broken_groups": 70000}, A100, "axis"),
        ({"sparse_along_k": False, "broken_groups": 7}, A100, "pattern"),
        ({"sparse_along_k": False, "broken_groups": 70000, "planned_sparse": False}, A100, "not-planned"),
        ({"scales_along_k": True}, A100, "scales"),
        ({"has_zero_point": True}, A100, "scales"),
        ({"integer_input": False}, A100, "float-input"),
        ({"scale_problems": ("a scale is not a positive number",)}, A100, "scales"),
        ({"scales_in_blocks": True}, A100, "scales"),
        ({"codes": "INT4"}, A100, "weight-type"),
        ({"codes": "INT16"}, A100, "weight-type"),
        ({"k": 258, "sparse_along_k": False}, A100, "k-multiple"),
        ({"k": 258, "run": 258, "sparse_along_k": False}, A100, "k-multiple"),
        ({"k": 0}, A100, "empty"),
        ({"n": 0}, A100, "empty"),
        ({"form": "conv", "run": 2, "k": 32}, A100, "channels"),
        ({"form": "conv", "run": 1, "k": 4, "groups_of_channels": 64}, A100, "depthwise"),
        ({"form": "conv", "run": 1, "k": 4}, A100, "channels"),
        ({"form": "conv", "run": 4, "k": 36, "groups_of_channels": 64, **BROKEN}, A100, "pattern"),
        # one percent of the groups is 1474: so few broken ones were meant to be none
        ({"sparse_along_k": False, "broken_groups": 1474, "planned_sparse": False}, A100, "pattern"),
        ({"sparse_along_k": False, "broken_groups": 1475, "planned_sparse": False}, A100, "not-planned"),
        ({"sparse_along_k": False, "broken_groups": 70000}, A100, "pattern"),
        ({"sparse_along_k": False, "broken_groups": 70000, "broken_groups_of_codes": 1474}, A100, "scales"),
        ({"sparse_along_k": False, "broken_groups": 70000, "broken_groups_of_codes": 1475}, A100, "pattern"),
        ({"sparse_along_k": False, "broken_groups": 7, "broken_groups_of_codes": 7}, A100, "pattern"),
        ({"integer_weight": False, "stored": "INT32"}, A100, "weight-type"),
        ({"codes": None, "integer_weight": False, "stored": "BFLOAT16"}, A100, "no-kernel"),
        ({"codes": "FLOAT8E4M3FN", "integer_weight": False}, A100, "no-kernel"),
        ({"output": "float16"}, A100, "float-output"),
        ({}, H100, "op-form"),
        ({"form": "conv1x1", "output": "float32"}, H100, "float-output"),
        ({}, replace(A100, compute_capability="7.5"), "no-kernel"),
        ({"epilogue": "gelu_erf"}, A100, "activation"),
        (
            {"epilogue": "gelu_erf"},
            SparsityTarget("trt_rtx", "1.7.1", "8.6, 8.9, 12.0"),
            "activation",
        ),  # on some of them
        ({"epilogue": "gelu_erf", "output": "float16"}, A100, "float-output"),
        ({"epilogue": "gelu_erf"}, replace(A100, compute_capability="7.5"), "no-kernel"),
        ({}, replace(A100, sparse_flag=False), "flag-off"),
    ],
)
def test_every_obstacle_has_its_reason(changes: dict[str, Any], target: SparsityTarget, reason: str) -> None:
    weight = judged(fact(**changes), Evidence([layer(DENSE_GEMM)]), target)
    assert (weight.eligible, weight.chosen, weight.reason) == (False, False, reason)
    assert weight.detail


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, "int8"),  # of a record that does not say
        ({"stored": "FLOAT"}, "int8"),  # which the graph quantizes
        ({"stored": "INT4"}, "int4"),
        ({"stored": "INT4", "codes": "INT8"}, "int8"),
        ({"codes": "UINT8"}, "int8"),
        ({"codes": "FLOAT", "stored": "INT8"}, "float32"),
        *(
            ({"integer_weight": False, "stored": stored}, kind)
            for stored, kind in {
                "": "float", "FLOAT": "float32", "DOUBLE": "float32", "FLOAT16": "float16", "BFLOAT16": "bfloat16",
                "FLOAT8E5M2": "float8",
            }.items()
        ),
    ],
)  # fmt: skip
def test_the_type_is_that_which_is_multiplied(changes: dict[str, Any], kind: str) -> None:
    assert weight_type(fact(**changes)) == kind


def test_a_matrix_without_a_reason_is_sparse_where_that_is_proven_and_nowhere_else() -> None:
    weight = judged(fact(), Evidence([layer(SPARSE_GEMM)]))
    assert (weight.chosen, weight.reason, weight.outcome) == (True, None, "sparse")
    for chosen in (None, False):
        assert replace(weight, chosen=chosen).outcome == "unknown"
        assert replace(weight, chosen=chosen, reason="size").outcome == "size"


@pytest.mark.parametrize(
    "changes",
    [{"stack": 2}, {"operand": "input 0"}, {"form": "conv", "groups_of_channels": 2}, {"moved_by": ("Split",)}],
)
def test_a_form_that_the_catalogue_does_not_name_is_unknown(changes: dict[str, Any]) -> None:
    weight = judged(fact(**changes), None)
    assert (weight.eligible, weight.reason, weight.ready) == (None, "kernel-unknown", False)
    assert ("Split between" in weight.detail) is ("moved_by" in changes)


def test_a_problem_of_the_whole_file_is_told_without_a_matrix() -> None:
    assert judge([fact()], None, A100, problems=[FileProblem("why")]).weights[0].detail.endswith(": why")


def test_an_odd_size_is_a_hint_with_a_source_and_stands_in_no_way() -> None:
    weight = judged(fact(k=312), None)
    assert (weight.eligible, weight.reason, weight.ready) == (True, "no-engine", True)
    assert weight.hint is not None
    assert "developer guide" in weight.hint
    assert judged(fact(), None).hint is None


def test_what_nobody_knows_is_not_ready_and_reads_like_nothing_that_is() -> None:
    unknown = SparsityTarget("trt", "11.4", "9.0")
    report = judge([fact()], None, unknown)
    (weight,), (advice,) = report.weights, advise([fact()], report)
    assert (weight.eligible, weight.reason, weight.ready) == (None, "kernel-unknown", False)
    assert "kernel names were not read" in weight.detail
    assert not advice.ready
    assert "nothing stands in the way" not in advice.advice


def test_a_problem_of_the_file_leaves_no_matrix_eligible_or_ready() -> None:
    facts = [fact(name="a"), fact(name="b", scale_problems=("a scale is not a positive number",))]
    problems = [FileProblem("a scale is not a positive number", "b")]
    report = judge(facts, None, A100, problems=problems)
    assert [(weight.eligible, weight.reason) for weight in report.weights] == [(False, "refused"), (False, "scales")]
    assert "b: a scale is not a positive number" in report.weights[0].detail
    advice = advise(facts, report, problems)
    assert [(entry.ready, entry.one_fix_away) for entry in advice] == [(False, False), (False, True)]
    other = [*problems, FileProblem("bias_dq: dequantizes INT32")]
    assert not any(entry.one_fix_away for entry in advise(facts, judge(facts, None, A100, problems=other), other))


def test_floats_are_eligible_where_a_kernel_exists_and_never_called_ready() -> None:
    plain = fact(codes=None, integer_weight=False, integer_input=False, stored="FLOAT16", output="float16")
    weight = judged(plain, None)
    assert (weight.type, weight.eligible, weight.ready) == ("float16", True, False)
    assert judged(replace(plain, stored="BFLOAT16"), None).eligible is False


def test_small_matrices_and_lost_races_are_told_apart() -> None:
    assert judged(fact(k=128), Evidence([layer(DENSE_GEMM)])).reason == "size"
    assert judged(fact(), Evidence([layer(DENSE_GEMM)])).reason == "dense-faster"
    unknown = judged(fact(), Evidence([layer(DENSE_GEMM)]), SparsityTarget("trt", "11.4.0.106", "9.0"))
    assert (unknown.eligible, unknown.reason) == (None, "dense-chosen")


def test_merged_products_name_each_other_and_time_is_against_the_twin() -> None:
    name = "v+k+node_myl0_1"
    mine = Evidence([layer(SPARSE_GEMM, name, onnx=("v", "k", "node"))], layer_ms={name: 0.5})
    twin = Evidence([layer(DENSE_GEMM, "other", onnx=("v", "k", "node"))], layer_ms={"other": 0.75})
    weight = judge([fact()], mine, A100, twin).weights[0]
    assert weight.shared_with == ("k", "v")
    assert weight.saved_ms == pytest.approx(0.25, abs=1e-12)  # a difference of two numbers given here
    other = layer(DENSE_GEMM, "of another profile", onnx=("v", "k", "node"), profile=1)
    assert (
        judge([fact()], mine, A100, replace(twin, layers=[*twin.layers, other])).weights[0].saved_ms == weight.saved_ms
    )
    for partial in (Evidence(), replace(twin, layer_ms={}), replace(twin, layers=[])):
        assert judge([fact()], mine, A100, partial).weights[0].saved_ms is None
        assert judge([fact()], partial, A100, twin).weights[0].saved_ms is None


def test_the_gate_counts_planned_elements_and_unknown_as_not_sparse() -> None:
    facts = [fact(node="a", name="a"), fact(node="b", name="b", n=2304), fact(node="c", name="c", planned_sparse=False)]
    report = judge(facts, Evidence([layer(SPARSE_GEMM, "b+c_myl0_1", onnx=("b", "c"))]), A100)
    assert report.sparse_share == 2304 / (2304 + 768)
    report.require_sparse(0.75)
    assert report.counts == {"fused-away": 1, "sparse": 2}
    assert report.products == ProductCounts(3, 3, 3)
    hidden = UnreadProduct("h", "head", "Einsum", "input 1", "its equation")
    assert replace(report, unread=(hidden,)).products == ProductCounts(4, 3, 3)
    with pytest.raises(
        ParityError,
        match=r"75.0% of the planned-sparse weights provably run sparse, 76.0% required; the others: 1 x fused-away$",
    ):
        report.require_sparse(0.76)
    with pytest.raises(ParityError, match="no matrix was planned sparse"):
        judge([fact(planned_sparse=False)], Evidence(), A100).require_sparse(0.1)


@pytest.mark.parametrize("share", [float("nan"), 0.0, -1.0, 1.5])
def test_a_share_that_requires_nothing_is_refused(share: float) -> None:
    dense = judge([fact()], Evidence([layer(DENSE_GEMM)]), A100)
    with pytest.raises(EngineError, match="requires nothing, or more than there is"):
        dense.require_sparse(share)


def test_the_json_has_the_documented_keys() -> None:
    entry = as_objects(judge([fact()], None, A100).to_dict()["weights"])[0]
    assert {"name", "k", "n", "planned", "sparse_along_k", "eligible", "chosen", "kernel", "reason"} <= set(entry)
    assert set(judge([], None, A100).to_dict()) == {
        "schema", "backend", "version", "compute_capability", "sparse_share", "counts", "products", "unread", "weights",
    }  # fmt: skip
    assert entry["reason"] in REASONS


def test_the_catalogue_answers_with_a_source_and_only_what_was_read() -> None:
    def ask(**changes: Any) -> Existence:
        product = {"weights": "int8", "form": "matmul", "output": "int8"}
        return sparse_kernel_exists(
            **{"backend": "trt", "version": "8.6.0", "compute_capability": "8.0", **product, **changes}
        )

    h100 = {"compute_capability": "9.0"}

    assert ask().exists is True
    assert ask(output="float16").exists is False
    assert ask(**h100).exists is False
    assert ask(**h100, form="conv1x1").exists is True
    assert ask(epilogue="gelu_tanh").exists is True
    assert ask(epilogue="gelu_erf").exists is False
    assert ask(**h100, form="conv1x1", epilogue="gelu_erf").exists is False
    assert ask(version="11.4.0.106").exists is None
    assert ask(version="10.14.1", compute_capability="8.9").exists is True
    assert ask(version="10.14.1", compute_capability="8.9", epilogue="gelu_erf").exists is None
    assert ask(backend="ort").exists is None
    assert ask(version="10.1").exists is None, "10.1 is not 10.14"
    assert ask(backend="trt_rtx", version="1.7.1", compute_capability="8.6, 8.9").exists is True
    assert ask(backend="trt_rtx", version="1.7.1", compute_capability="8.6, 8.9, 12.0").exists is None, "they differ"
    assert all(ask(**changes).source for changes in ({}, h100, {"version": "99"}))


def test_advice_says_which_matrices_are_one_fix_away() -> None:
    facts = [
        fact(name="ready"),
        fact(name="axis", sparse_along_k=False, sparse_along_n=True, broken_groups=70000),
        fact(name="nearly", sparse_along_k=False, broken_groups=3),
        fact(name="output", output="float16"),
        fact(name="two fixes", output="float16", integer_input=False),
        fact(name="classifier", sparse_along_k=False, planned_sparse=False, broken_groups=100000),
    ]
    one_fix_away = {advice.name: advice.one_fix_away for advice in advise(facts, judge(facts, None, A100))}
    assert one_fix_away == {"ready": False, "axis": True, "nearly": True, "output": True, "two fixes": False}


def test_advice_says_what_to_do_and_calls_nothing_ready_that_is_not() -> None:
    def advised(changes: dict[str, Any], target: SparsityTarget = A100) -> tuple[str, bool, bool]:
        given = [fact(**changes)]
        (advice,) = advise(given, judge(given, None, target))
        return advice.advice, advice.one_fix_away, advice.ready

    few, many = ({"sparse_along_k": False, "broken_groups": broken} for broken in (1474, 1475))
    assert advised(few)[0].startswith("1474 of 147456 groups keep more than two: zero the smallest")
    assert advised(few)[1:] == (True, False)
    assert advised(few | {"integer_input": False})[1:] == (False, False)
    assert advised(many)[0].startswith("prune it 2:4 along K and fine-tune: 1475 of")
    assert advised(many)[1:] == (False, False)
    assert advised({})[0].startswith("nothing stands in the way")
    assert advised({})[1:] == (False, True)
    assert advised({}, UNKNOWN)[0].startswith("nobody has looked")
    for target in (A100, UNKNOWN):
        assert advised(HALF, target)[0].startswith("2:4 along K, in float")
        assert advised(HALF, target)[1:] == (False, False)
    assert advised({"codes": "INT4"})[0].startswith("quantize it to INT8")

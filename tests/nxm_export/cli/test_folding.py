"""Matrices in few lines: names as people say them, equal rows as one, and nothing that is lost on the way."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.sparsity.advice import Advice
from engines.sparsity.sparsity_report import SparsityReport, SparsityTarget, WeightSparsity
from nxm_export.cli.folding import folded, joined, short_names
from nxm_export.cli.sparsity_tables import print_diagnosis, print_sparsity, print_verification
from nxm_export.contract.records.matrix_facts import UnreadProduct
from nxm_export.contract.records.verify_report import VerifyReport, WeightReport
from nxm_export.pipeline.file_diagnosis import FileDiagnosis


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("bert.encoder.layer.0.attention.self.query.weight", "L0 query"),
        ("bert.encoder.layer.11.attention.output.dense.weight", "L11 attention.output"),
        ("bert.encoder.layer.3.output.dense", "L3 output"),
        ("distilbert.transformer.layer.2.attention.q_lin", "L2 attention.q_lin"),
        ("model.layers.7.mlp.Wi.weight", "L7 mlp.Wi"),
        ("bert.pooler.dense.weight", "bert.pooler"),
        ("classifier", "classifier"),
        ("/model/layers.4/attn/query/MatMul", "L4 query"),
        ("onnx::MatMul_1234", "onnx::MatMul_1234"),
        ("7", "7"),
        ("", ""),
    ],
)
def test_a_name_is_said_as_people_say_it(name: str, short: str) -> None:
    assert short_names([name]) == [short]


def test_names_that_would_become_one_stay_as_they_are() -> None:
    names = ["a.layer.0.self.query", "b.layer.0.self.query", "a.layer.1.self.query"]
    assert short_names(names) == [names[0], names[1], "L1 query"]


def test_layers_with_the_same_matrices_stand_together() -> None:
    names = [f"L{layer} {role}" for layer in (0, 1, 2, 5) for role in ("query", "key")]
    assert joined([*names, "L1 output", "pooler"]) == "L0-2,5 query, key; L1 output; pooler"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab01./ .query", max_size=12), unique=True, max_size=12), st.data())
def test_every_name_has_its_own_and_every_row_is_counted(names: list[str], data: st.DataObject) -> None:
    short = short_names(names)
    assert len(set(short)) == len(set(names))
    rows = [(data.draw(st.sampled_from("xy")),) for _ in names]
    groups = folded(names, rows)
    assert sum(count for _, count, _ in groups) == len(names)
    assert {row: count for _, count, row in groups} == {row: rows.count(row) for row in rows}


def matrix(name: str, k: int = 64, reason: str | None = "axis", chosen: bool | None = False) -> WeightSparsity:
    return WeightSparsity(
        name=name, k=k, n=32, form="matmul", planned="2:4+W8", planned_sparse=True, pattern_float="2:4",
        pattern_int8=None, sparse_along_k=True, eligible=None, chosen=chosen, kernel=None, reason=reason,
        detail="long words " * 40,
    )  # fmt: skip


def worst_diagnosis(count: int) -> FileDiagnosis:
    """Every matrix is of another kind, and everything that can be said is said at length."""
    weights = tuple(matrix(f"{'x' * 60}.layer.{i}.attention.self.query.weight", k=i + 1) for i in range(count))
    advice = tuple(Advice(w.name, f"{i} {'do this and that ' * 30}", True, False) for i, w in enumerate(weights))
    problems = tuple(f"{i}: {'it is refused because ' * 30}" for i in range(count))
    unread = tuple(UnreadProduct("w", f"n{i}", "Einsum", "input 1", "words " * 50) for i in range(count))
    report = SparsityReport(SparsityTarget("trt", "11.4", "8.9"), weights, unread)
    return FileDiagnosis("some/where/model.onnx", report, advice, problems)


@pytest.mark.parametrize("count", [1, 3, 100])
def test_a_diagnosis_is_a_screen_with_the_verdict_first(
    count: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_diagnosis(worst_diagnosis(count))
    captured = capsys.readouterr()
    lines = [line.rstrip() for line in (captured.out + captured.err).splitlines()]
    assert len(lines) <= 25, "\n".join(lines)
    assert max(map(len, lines)) <= 80
    assert lines[1].startswith(f"refused: {count} problem")
    assert lines[-1].startswith("next: nxm verify some/where/model.onnx")
    assert count < 6 or "--all" in captured.out


def test_a_diagnosis_with_all_leaves_nothing_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_diagnosis(worst_diagnosis(8), everything=True)
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"layer.{i}.attention" in text.replace(" ", "") for i in range(8))
    assert text.count("it is refused because") == 8 * 30
    assert "--all" not in text


def test_unproven_is_not_said_to_run_dense(capsys: pytest.CaptureFixture[str]) -> None:
    report = SparsityReport(SparsityTarget("trt_rtx", "1.7", "8.9"), (matrix("a", reason="no-gpu", chosen=None),))
    print_sparsity(report)
    assert capsys.readouterr().out.startswith("proven to run sparse: 0.0% of the planned-sparse weights (1 no-gpu)")


def weight(name: str, *problems: str) -> WeightReport:
    return WeightReport(name, "MatMul", 32, 64, "INT8", "N", 0.5, "2:4", "2:4+W8", problems, sparse=True)


def test_a_verification_names_every_problem_up_to_five(capsys: pytest.CaptureFixture[str]) -> None:
    print_verification("graph", VerifyReport("graph", tuple(weight(f"layer.{i}.query", "broken") for i in range(12))))
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[1].startswith("12 problems: 12 products")
    assert "L0-11 query" in captured.out
    assert captured.out.count(": broken") == 5
    assert "and 7 more (problem): --all" in lines
    assert captured.err.startswith("next: nxm doctor graph")


def test_the_option_all_is_where_rows_are_folded() -> None:
    from nxm_export.cli import main

    having = {name for name, command in main.commands.items() if any("--all" in p.opts for p in command.params)}
    assert having == {"doctor", "verify", "inspect", "show", "compare", "search"}
    assert "--all" in CliRunner().invoke(main, ["doctor", "--help"]).output

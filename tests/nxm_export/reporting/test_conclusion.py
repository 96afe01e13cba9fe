"""The sentence over the verdicts, and when the command that serves an engine is given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engines.parity.bisect_reports import BisectReport, BlockParity
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.records.run_summary import OneClass
from nxm_export.reporting.conclusion import Conclusion, conclude
from nxm_export.reporting.figures import RunFile, Shown
from nxm_export.reporting.run_facts import Run
from nxm_export.reporting.tables import Code
from nxm_export.reporting.verdicts import verdicts
from tests.support.made_runs import engine, made_run, matrix, on_kernels, parity
from tests.support.records import SUMMARY

SERVED = "nxm serve 'my runs/run/engines/ort-cpu-int8'"


def text(conclusion: Conclusion) -> str:
    return "".join(piece.text if isinstance(piece, Code | Shown) else piece for piece in conclusion.pieces)


def str_of(piece: str | Shown) -> str:
    return piece if isinstance(piece, str) else piece.text


def sparse_word(run: Run) -> tuple[str, str]:
    (verdict,) = [verdict for verdict in verdicts(run) if verdict.key == "sparse"]
    return verdict.state, verdict.word


def planned(run: Run) -> Run:
    """The run with a plan and two matrices that are stored as planned."""
    weights = {name: WeightSpec.parse("2:4+W8") for name in ("a", "b")}
    plan = CompressionPlan("bert", weights, dict.fromkeys(weights, (64, 64)))
    return replace(run, plan=plan, matrices=(matrix(0), matrix(1)))


def test_a_run_that_went_well_is_one_sentence_and_the_command_that_serves_it() -> None:
    made = conclude(made_run(engine(compared=parity())))
    assert text(made) == (
        "ort-cpu-int8 (backend ort) computes what its checkpoint computes, within the measured tolerance; no "
        "difference in accuracy to the dense model was found on 64 samples (95 % interval -0.5000 to +0.0000); it is "
        "faster (1.50x of the speed of ort-cpu-fp32); its matrices take 80.00% fewer bits than in FP32; no matrix is "
        "planned to be sparse."
    )
    assert made.command == SERVED


def test_a_dense_model_that_knows_too_little_leaves_the_answer_open() -> None:
    knows = replace(SUMMARY, one_class=OneClass("good", 0.7, (0.01, 0.1)))
    blind = replace(SUMMARY, one_class=OneClass("good", 0.7, (-0.01, 0.1)))
    good, made = (conclude(made_run(engine(compared=parity()), summary=each)) for each in (knows, blind))
    assert "no difference in accuracy to the dense model was found" in text(good)
    assert made.state == "open"
    assert "dense model is not shown to be better than one class for every sample" in text(made)


def test_the_numbers_of_the_sentence_name_their_files() -> None:
    pieces = conclude(made_run(engine(compared=parity()))).pieces
    places = {piece.figure.pointer for piece in pieces if isinstance(piece, Shown)}
    assert {"/difference_interval/0", "/speedup/0/speedup", "/compression/hw", "/dev_samples"} <= places


def test_an_engine_that_failed_was_not_compared_or_is_not_there_has_no_command() -> None:
    failed = conclude(made_run(engine(compared=parity(passed=False))))
    assert (failed.state, failed.command) == ("bad", None)
    place = "failed the comparison with its checkpoint (compare/ort-cpu-int8/parity.json)"
    assert f"ort-cpu-int8 (backend ort) {place}" in text(failed)
    assert failed.no_command == f"ort-cpu-int8 {place}: do not serve it."
    unknown = conclude(made_run(engine()))
    assert unknown.command is None
    assert "was not compared" in text(unknown)
    gone = conclude(made_run(replace(engine(compared=parity()), bytes=None)))
    assert (gone.command, gone.no_command) == (None, "The file of ort-cpu-int8 is not in this run.")
    assert conclude(made_run()).command is None


def test_files_that_contradict_each_other_give_no_verdict_and_no_command() -> None:
    made = conclude(replace(made_run(engine(compared=parity())), doubts=("a file is another one",)))
    assert (made.state, made.command) == ("bad", None)
    assert text(made).startswith("Do not trust")


def test_a_broken_pattern_gives_no_command() -> None:
    run = planned(made_run(engine(compared=parity())))
    run = replace(run, matrices=(matrix(0), matrix(1, problems=("row 3 has three of four",))))
    made = conclude(run)
    assert (made.state, made.command) == ("bad", None)
    assert "breaks the pattern" in text(made)


def test_a_difference_in_accuracy_is_said_and_makes_it_bad() -> None:
    summary = replace(SUMMARY, difference_interval=(-0.5, -0.25))
    made = conclude(made_run(engine(compared=parity()), summary=summary))
    assert made.state == "bad"
    assert "its accuracy is worse than the dense model's on 64 samples (95 % interval -0.5000 to -0.2500)" in text(made)
    assert made.command == SERVED, "it computes what its checkpoint computes; whether that is enough is not ours to say"


def test_no_run_is_called_good_of_which_something_is_open() -> None:
    """The only open answer that is as good as it gets is accuracy of which no difference was found."""
    best = planned(made_run(on_kernels(engine(compared=parity()), (True, True))))
    assert conclude(best).state == "good"
    (ratio,) = SUMMARY.speedup
    for summary in (
        replace(SUMMARY, difference_interval=(None, 0.0)),
        replace(SUMMARY, difference_interval=(0.0, None)),
        replace(SUMMARY, speedup=(replace(ratio, interval=(0.9, 1.1)),)),
        replace(SUMMARY, speedup=()),
    ):
        run = made_run(*best.engines, summary=summary)
        assert conclude(replace(run, plan=best.plan, matrices=best.matrices)).state == "open"
    smaller = replace(SUMMARY, compression={"hw": 0.0, "packed": 0.1, "values": 0.1})
    made = conclude(replace(made_run(*best.engines, summary=smaller), plan=best.plan, matrices=best.matrices))
    assert made.state == "bad"
    assert "its matrices take no fewer bits than in FP32" in text(made)
    assert conclude(planned(made_run(engine(compared=parity())))).state == "open", "no kernel is proved"
    assert conclude(planned(made_run(on_kernels(engine(), (True, True))))).state == "open", "not compared"


def test_an_interval_with_one_end_is_none() -> None:
    for ends in ((None, 0.0), (-0.5, None)):
        made = conclude(made_run(engine(compared=parity()), summary=replace(SUMMARY, difference_interval=ends)))
        assert "its difference in accuracy to the dense model has no interval" in text(made)


@pytest.mark.parametrize(
    ("speedups", "said"),
    [
        ({(8, 128): (2.0, 1.9, 2.1), (1, 32): (1.5, 1.4, 1.6)}, "it is faster (1.50x to 2.00x of the speed of"),
        ({(1, 32): (1.0, 0.9, 1.1)}, "no difference in speed was found (1.00x of the speed of"),
        ({(1, 32): (0.5, 0.4, 0.6)}, "it is slower (0.50x of the speed of"),
        ({}, "its speed was not measured"),
    ],
)
def test_the_speed_is_told_from_the_least_to_the_most(
    speedups: dict[tuple[int, int], tuple[float, float, float]], said: str
) -> None:
    (ratio,) = SUMMARY.speedup
    told = tuple(
        replace(ratio, batch=batch, sequence=sequence, speedup=speedup, interval=(low, high))
        for (batch, sequence), (speedup, low, high) in speedups.items()
    )
    another = replace(ratio, name="another", speedup=9.0, interval=(8.0, 10.0))  # is another engine's
    run = made_run(engine(compared=parity()), summary=replace(SUMMARY, speedup=(another, *told)))
    assert said in text(conclude(run))
    if len(told) > 1:
        (speed,) = (verdict for verdict in verdicts(run) if verdict.key == "speed")
        assert "".join(map(str_of, speed.lead)) == "1.50x at 1x32, the slowest of 2 shapes"


def test_an_engine_that_parts_in_a_block_has_failed_though_its_outputs_pass() -> None:
    block = BlockParity("layer.1", 9.0, 9.0, 1.0, None, 9.0, 9.0, None, 1.0, 1.0, 0.0, 0.0, passed=False, reason="")
    found = BisectReport(False, "engine", "0" * 64, "ort", 2, 20, "layer.1", None, None, True, (block,), "")
    parted = replace(engine(compared=parity()), bisection=RunFile("bisect.json", found, {}))
    run = made_run(parted, engine("other", compared=parity()), engine("third", compared=parity(passed=False)))
    made = conclude(run)
    assert (made.state, made.command) == ("bad", None)
    assert "ort-cpu-int8 (backend ort) failed the comparison with its checkpoint (bisect.json)" in text(made)
    assert "failed the comparison" in made.no_command
    (told,) = (verdict for verdict in verdicts(run) if verdict.key == "parity")
    assert (told.state, "".join(map(str_of, told.lead))) == ("bad", "1 of 3 engines compared pass")
    assert {row.label: "".join(map(str_of, row.pieces)).split(",")[0].split(";")[0] for row in told.rows} == {
        "ort-cpu-int8": "FAIL", "other": "pass", "third": "FAIL",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "word", "said"),
    [
        ((None, None), ("open", "stored; running unknown"), "no engine of this run proves that sparse kernels run"),
        ((True, None), ("open", "stored; run in part"), "trt runs 1 of 2 sparse matrices on sparse kernels"),
        ((True, False), ("open", "stored; run in part"), "trt runs 1 of 2 sparse matrices on sparse kernels"),
        ((True, True), ("good", "stored and run"), "trt runs 2 of 2 sparse matrices on sparse kernels"),
    ],
)
def test_sparse_kernels_are_claimed_as_far_as_they_are_proved(
    chosen: tuple[bool | None, ...], word: tuple[str, str], said: str
) -> None:
    run = planned(made_run(engine(compared=parity()), on_kernels(engine("trt"), chosen)))
    assert sparse_word(run) == word
    assert said in text(conclude(run))


def test_a_pattern_that_no_sparse_kernel_runs_is_not_claimed_to_run_on_one() -> None:
    """An engine says that all of its 2:4 matrices run sparse; the plan has a 4:8 one beside them."""
    run = planned(made_run(engine(compared=parity()), on_kernels(engine("trt"), (True,))))
    dense_there = replace(matrix(1), spec=WeightSpec.parse("4:8+W8"), pattern={"cpu": "4:8"})
    run = replace(run, matrices=(matrix(0), dense_there))
    assert sparse_word(run) == ("open", "stored; run in part")
    assert "trt runs 1 of 2 sparse matrices on sparse kernels" in text(conclude(run))


def test_what_was_checked_in_part_is_not_called_stored() -> None:
    run = planned(made_run(engine(compared=parity()), on_kernels(engine("trt"), (True, True))))
    unseen = replace(run.matrices[1], pattern={}, stored={}, zeros={})
    assert sparse_word(replace(run, matrices=(run.matrices[0], unseen))) == ("open", "stored; run in part")


def test_kernels_are_no_proof_of_what_is_stored() -> None:
    run = planned(made_run(on_kernels(engine("trt"), (True, True))))
    unseen = replace(run, matrices=tuple(replace(m, pattern={}, stored={}, zeros={}) for m in run.matrices))
    assert sparse_word(unseen) == ("open", "run; stored not checked")
    assert sparse_word(replace(unseen, engines=())) == ("open", "planned; stored not checked")


def test_the_rows_count_what_is_planned_stored_and_proved() -> None:
    run = planned(made_run(engine(compared=parity()), on_kernels(engine("trt"), (True, None, False))))
    (told,) = (verdict for verdict in verdicts(run) if verdict.key == "sparse")
    assert {row.label: "".join(map(str_of, row.pieces)) for row in told.rows} == {
        "planned N:M": "2 of 2 matrices",
        "found in the stored numbers": "2 of 2",
        "runs on sparse kernels, trt": "1 of 3 proved, 1 unknown",
        "runs on sparse kernels, ONNX Runtime": "none: it has no such kernels",
    }
    dense = replace(run.matrices[0], spec=WeightSpec.parse("W8"))
    assert sparse_word(replace(run, matrices=(dense,))) == ("open", "not planned")
    broken = replace(run.matrices[0], pattern={"cpu": "2:4", "trt": None})
    assert sparse_word(replace(run, matrices=(broken, run.matrices[1]))) == ("bad", "pattern broken")

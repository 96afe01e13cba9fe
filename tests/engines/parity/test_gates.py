"""Gates: how they are written, up to where they hold, and what passes none."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engines.parity.compare import _flips
from engines.parity.decisions import Reading
from engines.parity.gates import GateResult, check_gate, parse_gate
from engines.parity.tolerance import Expectation, compare_output
from nxm_export.cli import main
from nxm_export.errors import EngineError


def nxm(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_decisions_of_outputs_that_are_no_numbers_are_not_called_unchanged() -> None:
    """The largest of NaN is the first one, which may be the class of every sample."""
    expected = np.array([[1.0, -1.0], [3.0, 0.0]])
    change = Expectation(expected, np.full((2, 2), 0.01), np.full((2, 2), 0.01))
    gate = parse_gate("flips<=50%")

    def judged(*actual: np.ndarray, kind: str = "softmax") -> GateResult:
        outputs = [compare_output("y", change, values, Reading(kind), quantized=False) for values in actual]
        return check_gate(gate, {"flips": _flips(outputs)})

    assert judged(expected).actual == 0.0
    assert judged(expected, expected[:, ::-1]).actual == 100.0
    assert not judged(np.full((2, 2), np.nan)).passed
    assert not judged(expected, kind="vector").passed


@pytest.mark.parametrize(
    ("text", "value", "passed"),
    [("drop<=0.5", 0.5, True), (" flips <= 0.5% ", 0.51, False), ("max_abs<=1e-3", np.nan, False)],
)
def test_a_gate_holds_up_to_its_limit_and_nan_passes_none(text: str, value: float, passed: bool) -> None:
    gate = parse_gate(text)
    assert check_gate(gate, {gate.quantity: value}).passed is passed


@pytest.mark.parametrize(
    "text",
    [
        "drop",
        "drop<0.5",
        "speed<=1",
        "drop<=0.5%",
        "flips<=0.5",
        "flips<=101%",
        "drop<=-1",
        "drop<=1e999",
        "drop<=.",
        "flips(mcc)<=1%",
        "drop()<=1",
        "",
    ],
)
def test_a_gate_that_could_mean_two_things_is_wrong_usage(text: str, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"write |a limit|not a number|cannot flip"):
        parse_gate(text)
    assert nxm("compare", tmp_path, tmp_path, "--data=x.tsv", f"--gate={text}").exit_code == 2


def test_a_gate_may_name_another_metric_of_the_task() -> None:
    gate = parse_gate("drop(mcc)<=0.5")
    assert str(gate) == "drop(mcc)<=0.5"
    assert check_gate(gate, {"drop": 9.0, "drop(mcc)": 0.25}).passed
    assert not check_gate(gate, {"drop": 0.0, "drop(mcc)": 0.75}).passed


def test_a_drop_equal_to_its_limit_passes_however_it_was_rounded() -> None:
    gate = parse_gate("drop<=0.5")
    one_of_200 = 100 * (172 / 200 - 171 / 200)
    assert one_of_200 > 0.5  # by a rounding error
    assert check_gate(gate, {"drop": one_of_200}).passed
    assert not check_gate(gate, {"drop": 100 * (853 / 1000 - 847 / 1000)}).passed


def test_a_gate_on_what_is_not_finite_has_no_number_and_says_so() -> None:
    result = check_gate(parse_gate("max_abs<=0.1"), {"max_abs": math.nan})
    assert (result.actual, result.passed) == (None, False)
    assert "not a number" in result.reason
    assert "at most 0.1" in result.reason


@pytest.mark.parametrize("text", ["drop<=0", "drop<=200", "max_abs<=101", "cosine>=0", "cosine>=1", "flips<=100%"])
def test_a_limit_at_the_end_of_its_range_is_a_gate_that_holds_up_to_it(text: str) -> None:
    gate = parse_gate(text)
    assert parse_gate(str(gate)) == gate
    worse = -1e-6 if gate.quantity == "cosine" else 1e-6  # a rounding error is 1e-9, or that of the limit
    assert check_gate(gate, {gate.quantity: gate.limit}).passed
    assert check_gate(gate, {gate.quantity: gate.limit + worse * 1e-4}).passed
    assert not check_gate(gate, {gate.quantity: gate.limit + worse}).passed


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("flips<=0.5", "in percent: flips<=0.5%"),
        ("drop<=1%", "points: drop<=0.5"),
        ("embedding_table<=1%", "points: embedding_table<=0.5"),
        ("cosine>=99%", "a number: cosine>=0.99"),
        ("max_abs<=1%", "itself: max_abs<=0.1"),
    ],
)
def test_a_limit_in_another_unit_is_refused_with_the_right_one(text: str, unit: str) -> None:
    with pytest.raises(EngineError, match=re.escape(unit)):
        parse_gate(text)


def test_a_gate_on_the_cosine_says_at_least() -> None:
    gate = parse_gate(" cosine >= 0.99")
    assert str(gate) == "cosine>=0.99"
    assert check_gate(gate, {"cosine": 0.995}).passed
    assert not check_gate(gate, {"cosine": 0.98}).passed
    assert not check_gate(gate, {"cosine": float("nan")}).passed
    assert "at least 0.99" in check_gate(gate, {"cosine": 0.98}).reason


@pytest.mark.parametrize("text", ["cosine<=0.99", "drop>=1", "cosine>=99%", "cosine>=1.5", "cosine>=x", "cosine=1"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(EngineError, match=text.replace("+", r"\+")):
        parse_gate(text)

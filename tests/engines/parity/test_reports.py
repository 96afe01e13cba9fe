"""parity.json and bisect.json: read back as they were written, refused by field, and files of the version before."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.parity.bisect_reports import BISECT_FILE, BisectReport, BlockParity, read_bisect_report
from engines.parity.bisect_reports import SCHEMA as BISECT_SCHEMA
from engines.parity.decisions import Pair, Reading
from engines.parity.gates import check_gate, parse_gate
from engines.parity.probes import ProbeResult, finite_probe
from engines.parity.reports import (
    PARITY_FILE,
    SCHEMA,
    Comparison,
    NotCompared,
    ParityReport,
    read_parity_report,
    verdict,
)
from engines.parity.tolerance import Expectation, OutputParity, compare_output
from nxm_export.cli.parity_tables import print_bisects
from nxm_export.errors import ArtifactError, EngineError, ParityError
from nxm_export.storage.json_files import as_objects, encode

EXPECTED = np.array([[1.0, -1.0], [3.0, 0.0], [0.0, 2.0]])


def output(actual: np.ndarray) -> OutputParity:
    change = np.full_like(EXPECTED, 0.01)
    return compare_output("logits", Expectation(EXPECTED, change, change), actual, Reading(), quantized=True)


def report_of(actual: np.ndarray) -> ParityReport:
    gate = check_gate(parse_gate("drop<=0.5"), {"drop": 0.0 if np.isfinite(actual).all() else math.nan})
    logits, finite = output(actual), finite_probe({"logits": actual})
    whole = logits.passed and bool(finite.passed) and gate.passed
    return ParityReport(
        passed=whole,
        engine="engines/e",
        engine_sha256="0" * 64,
        backend="ort",
        samples=3,
        outputs=(logits,),
        metric="accuracy",
        reference_value=1.0,
        reference_interval=(1.0, 1.0),
        engine_value=1.0 if whole else None,
        engine_interval=None,
        reason="why",
        difference=0.0 if whole else None,
        difference_interval=None,
        probes=(finite, ProbeResult("extra padding", None, None, None, "no room")),
        gates=(gate,),
        pairs=(Pair("engines/other", "1" * 64, "logits", 0.5, 0.25, 0.75, 1.0, 0.0, (-0.5, 0.5)),),
        secondary_metrics={"mcc": (1.0, None)},
    )


def test_where_nothing_was_compared_nothing_passed() -> None:
    report = report_of(EXPECTED)
    with pytest.raises(ValueError, match="`passed` is not what its outputs"):
        replace(report, outputs=())
    with pytest.raises(ParityError, match="no output of it was compared"):
        replace(report, outputs=(), passed=False).require()
    nothing = Comparison((), (NotCompared("e", "0" * 64, "trt", "no GPU"),))
    assert not nothing.passed
    with pytest.raises(ParityError, match="no engine was compared, so none passed"):
        nothing.require()
    with pytest.raises(ValueError, match="not what its blocks and outputs say"):
        replace(BISECTED, blocks=(), first_diverging=None, passed=True)
    with pytest.raises(ParityError, match="no block of it was compared"):
        replace(BISECTED, blocks=(), first_diverging=None, passed=False).require()


WRONG = np.full_like(EXPECTED, 9.0)
GATES = [check_gate(parse_gate("drop<=0.5"), {"drop": drop}) for drop in (0.0, 1.0)]


def test_one_failure_anywhere_fails_the_whole() -> None:
    """All ways to put two outputs, two probes and two gates together, against what each says by itself."""
    outputs = (output(EXPECTED), output(WRONG))
    probes = [ProbeResult("p", None, None, passed, "why") for passed in (True, None, False)]
    for some in itertools.product(outputs, outputs, probes, probes, GATES, GATES):
        expected = all(part.passed is not False for part in some)
        assert verdict(some[:2], some[2:4], some[4:]) is expected
        report = replace(report_of(EXPECTED), passed=expected, outputs=some[:2], probes=some[2:4], gates=some[4:])
        if expected:
            report.require()
        else:
            with pytest.raises(
                ParityError, match=r"engines/e: (logits differs|the probe 'p' failed|the gate .* failed)"
            ):
                report.require()


def test_every_engine_of_a_comparison_must_pass() -> None:
    good, bad = report_of(EXPECTED), report_of(WRONG)
    for reports in itertools.product((good, bad), repeat=2):
        comparison = Comparison(reports, (), ("drop<=0.5",))
        assert comparison.passed is (bad not in reports)
        if not comparison.passed:
            with pytest.raises(ParityError, match="logits differs from the checkpoint"):
                comparison.require()
    absent = NotCompared("engines/trt", "2" * 64, "trt", "no GPU")
    assert absent.to_dict() == {
        "schema": SCHEMA, "passed": None, "engine": "engines/trt", "engine_sha256": "2" * 64, "backend": "trt",
        "skipped": "no GPU",
    }  # fmt: skip


def test_a_comparison_with_an_engine_that_failed_does_not_pass() -> None:
    failed = NotCompared("engines/trt", "2" * 64, "trt", "no memory", failed=True)
    comparison = Comparison((report_of(EXPECTED),), (failed,))
    assert not comparison.passed
    with pytest.raises(EngineError, match="engines/trt failed when it ran, so it was not compared: no memory"):
        comparison.require()
    entry = comparison.to_list()[-1]
    assert (entry["passed"], entry["failed"], "skipped" in entry) == (False, "no memory", False)


@pytest.mark.parametrize(
    ("actual", "skipped", "gates"),
    [(EXPECTED, 0, ()), (EXPECTED, 1, ()), (EXPECTED, 1, ("drop<=1",)), (np.full_like(EXPECTED, np.nan), 0, ())],
)
def test_a_comparison_says_in_its_record_what_require_says(
    actual: np.ndarray, skipped: int, gates: tuple[str, ...]
) -> None:
    absent = NotCompared("engines/trt", "2" * 64, "trt", "no GPU")
    comparison = Comparison((report_of(actual),), (absent,) * skipped, gates)
    try:
        comparison.require()
    except ParityError:
        passed = False
    else:
        passed = True
    record = json.loads(json.dumps(comparison.to_dict()))
    assert record["passed"] == passed
    assert record["gates"] == [*gates]
    assert record["engines"] == json.loads(json.dumps(comparison.to_list()))


def block(name: str, *, passed: bool | None) -> BlockParity:
    return BlockParity(
        block=name,
        accumulated_max_abs=0.5,
        accumulated_mean_abs=0.25,
        accumulated_max_tolerance=1.0,
        accumulated_steps=None,
        isolated_max_abs=None,
        isolated_mean_abs=0.0625,
        isolated_steps=2.0,
        isolated_max_tolerance=3.0,
        isolated_mean_tolerance=1.5,
        isolated_unchanged_share=0.875,
        isolated_unchanged_required=0.125,
        passed=passed,
        reason="why",
    )


BISECTED = BisectReport(
    passed=False,
    engine="engines/e",
    engine_sha256="0" * 64,
    backend="ort",
    samples=3,
    tokens=12,
    first_diverging="layer.1",
    kernels_changed=True,
    kernels={"MatMul": (4, 5)},
    outputs_equal=True,
    blocks=(block("layer.0", passed=True), block("layer.1", passed=False), block("head", passed=None)),
    reason="why",
)


def test_blocks_of_what_is_not_the_engine_are_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = (block("layer.0", passed=True), block("head", passed=True))
    whole = replace(BISECTED, blocks=blocks, first_diverging=None, passed=True)
    near = replace(whole, outputs_equal=False)
    for report in (whole, near):
        report.require()
    with pytest.raises(ValueError, match="not what its blocks and outputs say"):
        replace(near, outputs_problem="far apart")
    other = replace(near, outputs_problem="far apart", passed=False)
    with pytest.raises(ParityError, match="in a copy with more outputs, which is not the engine: far apart"):
        other.require()
    first = []
    for report in (whole, near, other):
        print_bisects([report])
        first.append(capsys.readouterr().out.splitlines()[0])
    assert first == [
        "pass: no block of engines/e parts",
        "pass: no block of engines/e parts, in a copy whose outputs are those of the engine but for rounding",
        "FAIL: what was looked at in place of engines/e is not the engine: far apart",
    ]


@pytest.fixture
def parity_file(tmp_path: Path) -> Path:
    file = tmp_path / PARITY_FILE
    file.write_text(encode(report_of(EXPECTED + 0.001), SCHEMA), encoding="utf-8")
    return file


def edited(file: Path, *path: str | int, value: object) -> None:
    data = entry = json.loads(file.read_text())
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    file.write_text(json.dumps(data))


@pytest.mark.parametrize("actual", [EXPECTED + 0.001, np.where(EXPECTED == 3.0, np.nan, EXPECTED)], ids=["good", "NaN"])
def test_a_report_is_read_as_it_was_written(actual: np.ndarray, tmp_path: Path) -> None:
    report = report_of(actual)
    (tmp_path / PARITY_FILE).write_text(encode(report, SCHEMA), encoding="utf-8")
    assert read_parity_report(tmp_path / PARITY_FILE) == report
    assert json.loads(json.dumps(report.to_dict())) == json.loads((tmp_path / PARITY_FILE).read_text())
    assert report.to_dict()["schema"] == SCHEMA


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_have_no_distance_and_are_counted(bad: float) -> None:
    actual = EXPECTED.copy()
    actual[1, 1] = bad
    logits = output(actual)
    assert not logits.passed
    assert (logits.max_abs, logits.mean_abs, logits.cosine, logits.max_steps) == (None, None, None, None)
    assert (logits.nonfinite, logits.worst_sample) == (1, 1)
    with pytest.raises(ParityError, match=r"logits differs from the checkpoint: 1 of its values are NaN or infinity"):
        report_of(actual).require()


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("schema",), "nxm-parity/3", r"schema nxm-parity/3 is not the nxm-parity/2"),
        (("passed",), False, r"`passed` is not what its outputs, probes and gates say"),
        (("outputs", 0, "passed"), False, r"`passed` is not what"),
        (("outputs", 0, "max_abs"), "small", r"outputs\[0\]\.max_abs: Expected `float \| null`, got `str`"),
        (("outputs", 0, "quiet"), 0.5, r"unknown field outputs\[0\]\.quiet"),
        (("secondary_metrics", "mcc"), [1.0], r"secondary_metrics\[?.*: Expected `array` of length 2"),
        (("samples",), math.nan, r"NaN is not a JSON number"),
        (("more",), 1, r"unknown field more"),
    ],
)
def test_a_damaged_report_is_refused_by_file_and_field(
    parity_file: Path, path: tuple[str | int, ...], value: object, complaint: str
) -> None:
    edited(parity_file, *path, value=value)
    with pytest.raises(ArtifactError, match=complaint) as refused:
        read_parity_report(parity_file)
    assert str(refused.value).startswith(str(parity_file))


def test_a_report_of_the_version_before_is_read(tmp_path: Path) -> None:
    """As nxm-parity/1 wrote it: `quiet`, `step`, `found`, `beside`, null for NaN, and intervals of nulls."""
    report = report_of(np.where(EXPECTED == 3.0, np.nan, EXPECTED))
    data = report.to_dict()
    former = {"unchanged_share": "quiet", "unchanged_required": "quiet_required", "one_step_shift": "step"}
    old = {
        **{key: value for key, value in data.items() if key != "secondary_metrics"},
        "schema": "nxm-parity/1",
        "beside": data["secondary_metrics"],
        "outputs": [
            {former.get(key, key): value for key, value in entry.items() if key != "nonfinite"}
            for entry in as_objects(data["outputs"])
        ],
        **{
            key: [
                {"found" if name == "actual" else name: value for name, value in entry.items()}
                for entry in as_objects(data[key])
            ]
            for key in ("probes", "gates")
        },
        "engine_interval": [None, None],
        "difference_interval": [None, None],
    }
    (tmp_path / PARITY_FILE).write_text(json.dumps(old))
    assert read_parity_report(tmp_path / PARITY_FILE) == report
    (tmp_path / PARITY_FILE).write_text(json.dumps({**old, "outputs": 7}))
    with pytest.raises(ArtifactError, match="malformed nxm-parity/1 file"):
        read_parity_report(tmp_path / PARITY_FILE)


class TestBisect:
    def test_it_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        (tmp_path / BISECT_FILE).write_text(encode(BISECTED, BISECT_SCHEMA), encoding="utf-8")
        assert read_bisect_report(tmp_path / BISECT_FILE) == BISECTED
        assert json.loads(json.dumps(BISECTED.to_dict())) == json.loads((tmp_path / BISECT_FILE).read_text())

    def test_a_verdict_that_its_blocks_do_not_give_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not what its blocks and outputs say"):
            replace(BISECTED, first_diverging="layer.0")
        (tmp_path / BISECT_FILE).write_text(json.dumps({**BISECTED.to_dict(), "passed": True}))
        with pytest.raises(ArtifactError, match=r"bisect\.json: `passed` and `first_diverging` are not what"):
            read_bisect_report(tmp_path / BISECT_FILE)

    def test_a_report_of_the_version_before_is_read(self, tmp_path: Path) -> None:
        def former(key: str) -> str:
            key = key.replace("isolated_unchanged_share", "own_quiet").replace("isolated_unchanged", "own_quiet")
            return key.replace("isolated_", "own_").removeprefix("accumulated_")

        data = BISECTED.to_dict()
        blocks = [{former(key): value for key, value in entry.items()} for entry in as_objects(data["blocks"])]
        assert set(blocks[0]) == {
            "block", "max_abs", "mean_abs", "max_tolerance", "steps", "own_max_abs", "own_mean_abs", "own_steps",
            "own_max_tolerance", "own_mean_tolerance", "own_quiet", "own_quiet_required", "passed", "reason",
        }  # fmt: skip
        (tmp_path / BISECT_FILE).write_text(json.dumps({**data, "schema": "nxm-bisect/1", "blocks": blocks}))
        assert read_bisect_report(tmp_path / BISECT_FILE) == BISECTED

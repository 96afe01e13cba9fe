"""What an engine directory must show before `nxm serve`, `nxm predict` and `nxm triton` let it answer."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from click.testing import CliRunner

from engines.admission import admitted, gate_state, require_expected, require_gate
from engines.devices import running_on, runtime_here
from engines.parity.bisect_reports import BISECT_FILE, BisectReport, BlockParity
from engines.parity.bisect_reports import SCHEMA as BISECT_SCHEMA
from engines.parity.reports import PARITY_FILE, SCHEMA, ParityReport, read_parity_report
from engines.passport import EnginePassport, covered_spec, covered_tokenizer, load_passport
from engines.predictor import Predictor
from engines.serving.model import open_model
from engines.serving.repository import EngineSource
from engines.serving.settings import ModelOptions, TritonOptions
from engines.triton import export_repository
from nxm_export.cli import main
from nxm_export.contract.choices import GATES
from nxm_export.errors import ArtifactError, NxmError, ParityError, ServeError
from nxm_export.storage.json_files import encode
from tests.support import exact_engine
from tests.support.made_runs import parity
from tests.support.records import PASSPORT

Answering = Callable[[Path, str, frozenset[str]], object]


def served(directory: Path, gate: str, expected: frozenset[str]) -> None:
    options = ModelOptions(instances=1, text=True, gate=gate, expect_sha256=expected)
    open_model("m", "1", directory, options).close()


def predicted(directory: Path, gate: str, expected: frozenset[str]) -> None:
    with Predictor(directory, gate=gate, expect_sha256=expected) as predictor:
        assert len(predictor.predict(["good film"])) == 1


def handed_over(directory: Path, gate: str, expected: frozenset[str]) -> None:
    options = TritonOptions(text=True, gate=gate, expect_sha256=expected)
    export_repository([EngineSource("m", "1", directory)], directory.with_name("repository"), options)


WAYS: dict[str, Answering] = {"serve": served, "predict": predicted, "triton": handed_over}
way = pytest.mark.parametrize("answer", WAYS.values(), ids=WAYS)


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "copy"))


def swap_labels(directory: Path) -> None:
    file = directory / "spec.json"
    spec = json.loads(file.read_text())
    file.write_text(json.dumps({**spec, "labels": spec["labels"][::-1]}))


def other_tokenizer(directory: Path) -> None:
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    words = tokenizer["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    file.write_text(json.dumps(tokenizer))


def covering_the_engine_alone(directory: Path) -> None:
    """As nxm-export wrote it before: passport and report do not name the files beside the engine."""
    replace(load_passport(directory), companions=None).save(directory)
    exact_engine.write_parity(directory, passed=True)


@way
@pytest.mark.parametrize("change", [swap_labels, other_tokenizer])
@pytest.mark.parametrize("gate", ["passed", "off"])
def test_what_lies_beside_the_engine_must_be_what_it_was_built_with(
    copy: Path, answer: Answering, change: Callable[[Path], None], gate: str
) -> None:
    answer(copy, gate, frozenset())
    change(copy)
    with pytest.raises(ArtifactError, match=r"is not the one that the engine was built with .*; restore it"):
        answer(copy, gate, frozenset())


@way
def test_a_file_that_is_gone_or_that_was_not_there_is_refused(copy: Path, answer: Answering) -> None:
    tokenizer = (copy / "tokenizer.json").read_bytes()
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing: the passport"):
        answer(copy, "off", frozenset())
    exact_engine.cover(copy)
    (copy / "tokenizer.json").write_bytes(tokenizer)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json was not there when the engine was built"):
        answer(copy, "off", frozenset())


@way
def test_the_hash_of_all_contents_notices_labels_whose_passport_was_written_again(
    copy: Path, answer: Answering
) -> None:
    passport = load_passport(copy)
    contents, engine = frozenset({str(passport.contents_sha256)}), frozenset({passport.engine_sha256})
    answer(copy, "passed", contents)
    swap_labels(copy)
    exact_engine.cover(copy)
    with pytest.raises(ServeError, match="neither is among those expected"):
        answer(copy, "off", contents)
    with pytest.raises(ParityError, match="never checked for these files"):  # the report is of other labels
        answer(copy, "passed", engine)


@way
def test_a_passport_that_covers_the_engine_alone_is_no_proof_of_the_labels(copy: Path, answer: Answering) -> None:
    covering_the_engine_alone(copy)
    answer(copy, "not-failed", frozenset())
    with pytest.raises(ParityError, match="covers the engine alone"):
        answer(copy, "passed", frozenset())
    with pytest.raises(ServeError, match="covers the engine alone"):
        answer(copy, "not-failed", frozenset({load_passport(copy).engine_sha256}))


@way
def test_a_failed_parity_is_refused_alike(copy: Path, answer: Answering) -> None:
    exact_engine.write_parity(copy, passed=False)
    with pytest.raises(ParityError, match="--parity off"):
        answer(copy, "not-failed", frozenset())
    answer(copy, "off", frozenset())


@way
def test_a_report_that_cannot_be_read_is_refused_as_that_and_not_as_a_failed_comparison(
    copy: Path, answer: Answering
) -> None:
    (copy / "parity.json").write_text("{")
    with pytest.raises(ParityError, match=r"parity\.json: not valid JSON .*run `nxm compare` again, or .*--parity off"):
        answer(copy, "not-failed", frozenset())
    answer(copy, "off", frozenset())


def test_the_hash_of_all_contents_is_that_of_sha256sum(engine: Path) -> None:
    passport = load_passport(engine)
    listed = subprocess.run(
        ["sha256sum", passport.engine, "spec.json", "tokenizer.json"], cwd=engine, capture_output=True, check=True
    )
    hashed = subprocess.run(["sha256sum"], input=listed.stdout, capture_output=True, check=True)
    assert hashed.stdout.decode().split()[0] == passport.contents_sha256
    assert passport.covers == "the engine and spec.json and tokenizer.json"


def test_a_report_of_a_former_version_still_vouches_for_a_former_engine(copy: Path) -> None:
    covering_the_engine_alone(copy)
    report = json.loads((copy / "parity.json").read_text())
    del report["contents_sha256"]
    (copy / "parity.json").write_text(json.dumps(report))
    passport = load_passport(copy)
    assert passport.covers == "the engine alone"
    assert gate_state(copy, passport) == "passed"


@pytest.mark.parametrize("command", [["predict", "{}", "good"], ["triton", "m={}", "--out", "{}-repository"]])
def test_the_commands_say_where_a_passport_covers_the_engine_alone(copy: Path, command: list[str]) -> None:
    arguments = [part.format(copy) for part in command]
    assert "covers" not in CliRunner().invoke(main, arguments).stderr
    covering_the_engine_alone(copy)
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert f"note: {copy}: its passport covers the engine alone, so nothing says that spec.json" in result.stderr


WHOLE = replace(PASSPORT, companions={"spec.json": "2" * 64})
REPORT = replace(parity().content, contents_sha256=WHOLE.contents_sha256)


@pytest.mark.parametrize(
    ("report", "state"),
    [
        (None, "unchecked"),
        ("{", "failed"),
        (REPORT, "passed"),
        (replace(parity(passed=False).content, contents_sha256=WHOLE.contents_sha256), "failed"),
        (replace(REPORT, engine_sha256="3" * 64), "unchecked"),
        (replace(parity(passed=False).content, engine_sha256="3" * 64), "unchecked"),
        (replace(REPORT, contents_sha256="3" * 64), "unchecked"),
        (replace(REPORT, contents_sha256=None), "unchecked"),
    ],
)
@pytest.mark.parametrize("gate", GATES)
def test_every_gate_admits_what_it_says_and_nothing_else(
    report: ParityReport | str | None, state: str, gate: str, tmp_path: Path
) -> None:
    if report is not None:
        (tmp_path / PARITY_FILE).write_text(report if isinstance(report, str) else encode(report, SCHEMA))
    assert gate_state(tmp_path, WHOLE) == state
    if {"off": True, "not-failed": state != "failed", "passed": state == "passed"}[gate]:
        require_gate(tmp_path, WHOLE, gate)
        return
    what = {"failed": "failed", "unchecked": "was never checked for these files"}[state]
    words = rf"parity with its checkpoint {what} \(parity.json\)"
    with pytest.raises(ParityError, match="not valid JSON" if report == "{" else words):
        require_gate(tmp_path, WHOLE, gate)


def bisected(*, passed: bool, engine_sha256: str = WHOLE.engine_sha256) -> BisectReport:
    block = BlockParity("layer.1", 9.0, 9.0, 1.0, None, 9.0, 9.0, None, 1.0, 1.0, 0.0, 0.0, passed=passed, reason="")
    first = None if passed else "layer.1"
    return BisectReport(passed, "engine", engine_sha256, "ort", 2, 20, first, None, None, True, (block,), "")


@pytest.mark.parametrize(
    ("bisection", "state"),
    [
        (bisected(passed=True), "passed"),
        (bisected(passed=False), "failed"),
        (bisected(passed=False, engine_sha256="3" * 64), "passed"),
        ("{", "failed"),
    ],
    ids=["passed", "failed", "of another engine", "damaged"],
)
def test_a_block_that_parts_fails_an_engine_whose_outputs_pass(
    bisection: BisectReport | str, state: str, tmp_path: Path
) -> None:
    (tmp_path / PARITY_FILE).write_text(encode(REPORT, SCHEMA))
    text = bisection if isinstance(bisection, str) else encode(bisection, BISECT_SCHEMA)
    (tmp_path / BISECT_FILE).write_text(text)
    assert gate_state(tmp_path, WHOLE) == state
    if state == "passed":
        require_gate(tmp_path, WHOLE, "passed")
        return
    words = "not valid JSON" if text == "{" else r"failed \(bisect.json\); run `nxm compare --bisect`, or"
    for gate in ("not-failed", "passed"):
        with pytest.raises(ParityError, match=words):
            require_gate(tmp_path, WHOLE, gate)
    (tmp_path / PARITY_FILE).unlink()
    assert gate_state(tmp_path, WHOLE) == "failed", "whether it was compared as a whole or not"
    require_gate(tmp_path, WHOLE, "off")


@pytest.mark.parametrize(
    ("passport", "expected", "admits"),
    [
        (PASSPORT, set(), True),
        (WHOLE, set(), True),
        (WHOLE, {WHOLE.engine_sha256}, True),
        (WHOLE, {WHOLE.contents_sha256, "3" * 64}, True),
        (WHOLE, {"3" * 64}, False),
        (PASSPORT, {PASSPORT.engine_sha256}, False),  # which says nothing of labels and tokenizer
    ],
)
def test_an_expected_hash_is_that_of_the_engine_or_of_all_contents(
    passport: EnginePassport, expected: set[str], admits: bool
) -> None:
    if admits:
        require_expected(Path("e"), passport, expected)
        return
    with pytest.raises(ServeError, match=r"neither is among those expected|covers the engine alone"):
        require_expected(Path("e"), passport, expected)


def test_an_unknown_gate_is_refused(engine: Path) -> None:
    with pytest.raises(ServeError, match="unknown gate 'maybe'; choose one of not-failed, passed, off"):
        admitted(engine, "maybe")


@pytest.mark.parametrize("command", [["predict", "{}", "good"], ["triton", "m={}", "--out", "{}-repository"]])
def test_the_commands_have_the_options(copy: Path, command: list[str]) -> None:
    swapped = [part.format(copy) for part in command]
    passport = load_passport(copy)
    for options in (["--parity", "passed"], ["--expect-sha256", passport.engine_sha256.upper()]):
        result = CliRunner().invoke(main, [*swapped, *options])
        assert result.exit_code == 0, result.output
    refused = CliRunner().invoke(main, [*swapped, "--expect-sha256", "00"])
    assert refused.exit_code == 1
    assert "neither is among those expected" in refused.output
    exact_engine.write_parity(copy, passed=False)
    assert CliRunner().invoke(main, swapped).exit_code == 3
    assert CliRunner().invoke(main, [*swapped, "--parity", "off"]).exit_code == 0
    swap_labels(copy)
    result = CliRunner().invoke(main, [*swapped, "--parity", "off"])
    assert (result.exit_code, "is not the one that the engine was built with" in result.output) == (1, True)


def test_labels_that_change_between_the_check_and_the_reading_are_noticed(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash is of the bytes that are decoded, not of a file that is read again."""
    passport = load_passport(copy)
    passport.require_here(copy, {})
    swap_labels(copy)
    with pytest.raises(NxmError, match="built with"):
        covered_spec(copy, passport)
    other_tokenizer(copy)
    with pytest.raises(NxmError, match="built with"):
        covered_tokenizer(copy, passport)


@pytest.mark.parametrize("answer", [served, handed_over], ids=["serve", "triton"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ["a", "b", "c"]}, "its engine gives 2 numbers, and its spec.json names 3 labels"),
        (
            {"inputs": ["input_ids", "attention_mask"], "limits": {}},
            "spec.json has the inputs input_ids, attention_mask, and the engine takes",
        ),
    ],
)
def test_a_spec_that_does_not_fit_the_engine_is_refused_before_it_answers(
    copy: Path, answer: Answering, changes: dict[str, object], message: str
) -> None:
    file = copy / "spec.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    exact_engine.cover(copy)
    with pytest.raises(NxmError, match=message):
        answer(copy, "off", frozenset())


@way
def test_a_tokenizer_that_panics_is_an_error_and_no_crash(copy: Path, answer: Answering) -> None:
    """Its post-processor names a special token that it does not have, which the library finds out when it encodes."""
    file = copy / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["post_processor"]["special_tokens"].popitem()
    file.write_text(json.dumps(tokenizer))
    exact_engine.cover(copy)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: not a \w+ tokenizer"):
        answer(copy, "off", frozenset())


@pytest.mark.parametrize(("compared", "said"), [("another CPU", True), (None, False), ("this one", False)])
def test_an_engine_that_was_compared_on_another_machine_says_so(
    engine: Path, tmp_path: Path, compared: str | None, said: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """Its kernels for INT8 are chosen by the CPU: without VNNI, sums of products may saturate."""
    copy = Path(shutil.copytree(engine, tmp_path / "copy"))
    passport = load_passport(copy)
    report = read_parity_report(copy / PARITY_FILE)
    machine = running_on(passport) if compared == "this one" else compared
    (copy / PARITY_FILE).write_text(encode(replace(report, machine=machine), SCHEMA))
    assert admitted(copy, "passed") == passport
    told = [str(warning.message) for warning in recwarn]
    assert any("was compared with its checkpoint on another CPU, and runs on" in text for text in told) is said


@pytest.mark.parametrize(("compared", "said"), [("onnxruntime 1.2.3", True), (None, False), ("this one", False)])
def test_an_engine_that_was_compared_by_another_version_of_its_runtime_says_so(
    engine: Path, tmp_path: Path, compared: str | None, said: bool, recwarn: pytest.WarningsRecorder
) -> None:
    """A comparison proves nothing of kernels that came later."""
    copy = Path(shutil.copytree(engine, tmp_path / "copy"))
    passport = load_passport(copy)
    report = read_parity_report(copy / PARITY_FILE)
    here = f"onnxruntime {version('onnxruntime')}"
    runtime = here if compared == "this one" else compared
    (copy / PARITY_FILE).write_text(encode(replace(report, runtime=runtime), SCHEMA))
    assert admitted(copy, "passed") == passport
    told = [str(warning.message) for warning in recwarn]
    runs = f"{copy}: it was compared with its checkpoint on onnxruntime 1.2.3, and runs on {here}"
    assert any(text.startswith(runs) for text in told) is said


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino"])
def test_the_version_of_a_runtime_is_known_under_whatever_name_it_was_installed(
    engine: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_package(package: str) -> str:
        if package != name:
            raise PackageNotFoundError(package)
        return "1.2.3"

    monkeypatch.setattr("nxm_export.storage.versions.version", of_package)
    assert runtime_here(load_passport(engine)) == "onnxruntime 1.2.3"

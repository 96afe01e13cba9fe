"""Unfinished, doctored and foreign runs: what is missing, damaged or contradictory is said, and verdicts do not
flatter."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path

import pytest
from click.testing import CliRunner

from nxm_export.cli import main
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.records.run_summary import ChosenEngine
from nxm_export.errors import ArtifactError
from nxm_export.pipeline.summary import BuildResults, summarize
from nxm_export.reporting import card, report
from nxm_export.reporting.page import render
from nxm_export.reporting.run_facts import read_run
from nxm_export.reporting.verdicts import verdicts
from nxm_export.storage.json_files import as_object
from nxm_export.storage.run_dir import RunDir
from tests.support.html_page import Page, follow

pytestmark = pytest.mark.slow  # a whole run is made for them
PICTURES = {"difference", "tradeoff", "plan", "sensitivity", "sample", "latency", "parity", "curves"}


@pytest.mark.parametrize(
    ("left", "missing", "drawn"),
    [
        (("dense",), "the compressed model and its plan", set()),
        (("dense", "checkpoint"), "the graphs", {"curves", "plan", "sensitivity", "sample", "tradeoff"}),
        (("dense", "checkpoint", "onnx"), "the engines", {"curves", "plan", "sensitivity", "sample", "tradeoff"}),
        (("dense", "checkpoint", "onnx", "engines", "compare"), "latency", PICTURES - {"latency"}),
        (("dense", "checkpoint", "onnx", "engines", "compare", "bench"), "the paired interval", PICTURES),
    ],
)
def test_an_unfinished_run_is_shown_as_far_as_it_got(
    copied: Path, left: tuple[str, ...], missing: str, drawn: set[str]
) -> None:
    for stage in {path.name for path in copied.iterdir() if path.is_dir()} - set(left):
        shutil.rmtree(copied / stage)
    if "compare" not in left:
        for file in copied.glob("engines/*/parity.json"):
            file.unlink()
    made = Page(report(copied).read_text(encoding="utf-8"))
    gaps = [e.text for e in made.all("li") if "strong" in e.text or "nxm run" in e.text]
    assert any(text.startswith(missing) and "nxm run" in text for text in gaps), gaps
    assert {e.attrs["id"].removeprefix("picture-") for e in made.all("figure")} == drawn


def test_a_run_with_nothing_in_it_and_a_directory_that_is_none_are_refused(tmp_path: Path) -> None:
    RunDir(tmp_path / "empty")
    with pytest.raises(ArtifactError, match="nothing has been made in this run yet; run the same `nxm run`"):
        report(tmp_path / "empty")
    with pytest.raises(ArtifactError, match=r"not a run directory \(no manifest.json\)"):
        report(tmp_path)
    assert not list(tmp_path.glob("**/*.html")), "nothing half-written"


def test_a_number_that_was_changed_afterwards_is_told(copied: Path, tmp_path: Path) -> None:
    file = copied / "compare" / "ort-cpu-int8" / "parity.json"
    file.write_text(re.sub(r'"engine_value": [\d.]+', '"engine_value": 0.999', file.read_text()))
    text = report(copied).read_text(encoding="utf-8")
    assert "Do not trust this page yet" in text
    assert "compare/ort-cpu-int8/parity.json is not the file that its stage wrote" in text
    assert "says 0.999; run the same command again to bring the summary up to date" in text
    with pytest.raises(ArtifactError, match="no card of files that contradict each other"):
        card(copied, tmp_path / "README.md")
    assert not (tmp_path / "README.md").exists()


def test_a_summary_has_the_worst_of_several_outputs(copied: Path) -> None:
    """As question answering has them: a start and an end."""
    file, summary = copied / "compare" / "ort-cpu-int8" / "parity.json", copied / "summary" / "summary.json"
    whole, short = json.loads(file.read_text()), json.loads(summary.read_text())
    (first,) = whole["outputs"]
    second = {**first, "output": "end", "max_abs": 2 * first["max_abs"], "agreement": 0.875}
    file.write_text(json.dumps({**whole, "outputs": [first, second]}))
    short["parity"]["ort-cpu-int8"] |= {"max_abs": second["max_abs"], "agreement": 0.875}
    summary.write_text(json.dumps(short))
    run = read_run(copied)
    assert not [doubt for doubt in run.doubts if " says " in doubt]
    made = Page(report(copied).read_text(encoding="utf-8"))
    figures = [e for e in made.all("data") if e.attrs["data-file"].endswith("int8/parity.json")]
    shown = {e.attrs.get("data-pointer"): e.attrs["value"] for e in figures}
    assert [float(shown[f"/outputs/{i}/max_abs"]) for i in (0, 1)] == [first["max_abs"], second["max_abs"]]


def test_what_has_no_interval_is_shown_without(copied: Path, tmp_path: Path) -> None:
    file = copied / "summary" / "summary.json"
    changed = {**json.loads(file.read_text(encoding="utf-8")), "difference_interval": [None, None], "dense": None}
    file.write_text(json.dumps(changed), encoding="utf-8")
    done = CliRunner().invoke(main, ["show", str(copied)])
    assert done.exit_code == 0
    assert "no interval" in done.stdout
    assert "NaN" in done.stdout
    assert report(copied, out=tmp_path / "page.html").is_file()


def test_a_comparison_of_another_engine_is_not_shown(copied: Path) -> None:
    file = copied / "compare" / "ort-cpu-int8" / "parity.json"
    file.write_text(re.sub(r'"engine_sha256": "\w+"', f'"engine_sha256": "{"0" * 64}"', file.read_text()))
    (copied / "engines" / "ort-cpu-int8" / "parity.json").write_text(file.read_text())
    (engine,) = [engine for engine in read_run(copied).engines if engine.name == "ort-cpu-int8"]
    assert engine.parity is None
    assert "compared another engine" in report(copied).read_text(encoding="utf-8")


def test_an_engine_that_was_swapped_is_told(copied: Path) -> None:
    file = copied / "engines" / "ort-cpu-int8" / "model.onnx"
    file.write_bytes(file.read_bytes() + b"x")
    assert any("is not the engine of its passport" in doubt for doubt in read_run(copied).doubts)


def test_a_graph_that_was_swapped_is_not_shown_as_verified(copied: Path) -> None:
    file = copied / "onnx" / "cpu" / "model.onnx"
    file.write_bytes(file.read_bytes() + b"x")
    run = read_run(copied)
    assert [graph.verify is None for graph in run.graphs if graph.name == "cpu"] == [True]
    assert any("verify.json is about another graph than the one beside it" in doubt for doubt in run.doubts)


@pytest.mark.parametrize("damage", [b"{", b"\xff\xfe", b"[]", b'{"schema": "nxm-summary/9"}'])
def test_a_damaged_file_is_told_and_the_rest_shown(copied: Path, damage: bytes) -> None:
    (copied / "summary" / "summary.json").write_bytes(damage)
    run = read_run(copied)
    assert run.summary is None
    assert any(doubt.startswith("summary/summary.json") for doubt in run.doubts)
    assert Page(report(copied).read_text(encoding="utf-8")).all("figure")


@pytest.mark.parametrize("value", [None, "x", [], {"a": 1}, -3, True], ids=str)
@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("summary/summary.json", ["compression", "hw"]),
        ("summary/summary.json", ["speedup", 0, "interval"]),
        ("compare/ort-cpu-int8/parity.json", ["outputs"]),
        ("bench/latency.json", ["timings", 1, "quartiles"]),
        ("engines/ort-cpu-int8/passport.json", ["device"]),
        ("onnx/cpu/verify.json", ["weights", 0]),
        ("checkpoint/metrics.json", ["value"]),
        ("onnx/dense/spec.json", ["labels"]),
        ("manifest.json", ["stages", "dense"]),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_told_and_never_a_traceback(
    bare: Path, file: str, place: list[str | int], value: object
) -> None:
    path = bare / file
    whole = path.read_text(encoding="utf-8")
    data = json.loads(whole)
    holder = follow(data, "".join(f"/{key}" for key in place[:-1]))
    if isinstance(holder, list):
        holder[int(place[-1])] = value
    else:
        as_object(holder)[str(place[-1])] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    try:
        with suppress(ArtifactError) if file == "manifest.json" else nullcontext():
            assert render(read_run(bare), {}).endswith("</html>")
    finally:
        path.write_text(whole, encoding="utf-8")


def test_a_run_whose_metrics_a_former_version_wrote_is_summed_up_and_shown(copied: Path) -> None:
    old = '{"metric":"accuracy","value":1.0,"interval":[NaN,NaN],"dev_samples":1,"steps":3,"revision":null}'
    (copied / "dense" / "metrics.json").write_text(old, encoding="utf-8")
    plan = open_checkpoint(copied / "checkpoint").plan
    names = ("ort-cpu-fp32", "ort-cpu-int8")
    engines = BuildResults(dict.fromkeys(names, "cpu"), {}, {}, names)
    chosen = ChosenEngine(names[1], "ort", "no other backend was asked for")
    summary = summarize(RunDir.open(copied), plan, ["cpu"], engines, chosen)
    assert (summary.dense, summary.dev_samples) == (1.0, 1)
    run = read_run(copied)
    assert run.dense is not None
    assert run.dense.content.interval is None
    assert render(run, {}).endswith("</html>")


def test_sparsity_is_not_claimed_without_a_kernel_that_proves_it(finished: Path, copied: Path) -> None:
    (verdict,) = [verdict for verdict in verdicts(read_run(finished)) if verdict.key == "sparse"]
    assert verdict.word == "stored; running unknown"
    file = copied / "onnx" / "trt" / "verify.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"pattern": "2:4"', '"pattern": null', 1))
    (verdict,) = [verdict for verdict in verdicts(read_run(copied)) if verdict.key == "sparse"]
    assert verdict.word == "pattern broken"


def test_a_failed_comparison_makes_the_verdict_fail(copied: Path) -> None:
    file = copied / "compare" / "ort-cpu-int8" / "parity.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"passed": true', '"passed": false'), encoding="utf-8")
    (verdict,) = [verdict for verdict in verdicts(read_run(copied)) if verdict.key == "parity"]
    assert (verdict.state, verdict.word) == ("bad", "failed")


BLOCK = {
    "block": "layer.0 <b>",
    "accumulated_max_abs": 1e-6,
    "accumulated_mean_abs": 1e-7,
    "accumulated_max_tolerance": 1e-3,
    "accumulated_steps": None,
    "isolated_max_abs": 2e-7,
    "isolated_mean_abs": 1e-7,
    "isolated_steps": None,
    "isolated_max_tolerance": 0.0078125,
    "isolated_mean_tolerance": 0.0078125,
    "isolated_unchanged_share": 1.0,
    "isolated_unchanged_required": 0.0,
    "passed": True,
    "reason": "",
}


def bisection(engine_sha256: str, blocks: list[dict[str, object]]) -> str:
    first = next((block["block"] for block in blocks if not block["passed"]), None)
    record = {
        "schema": "nxm-bisect/2",
        "passed": first is None,
        "engine": "engine",
        "engine_sha256": engine_sha256,
        "backend": "ort",
        "samples": 2,
        "tokens": 20,
        "first_diverging": first,
        "kernels_changed": None,
        "kernels": None,
        "outputs_equal": True,
        "blocks": blocks,
        "reason": "",
    }
    return json.dumps(record)


def test_errors_by_block_are_shown_and_a_block_that_parts_fails_the_verdict(copied: Path) -> None:
    recorded = json.loads((copied / "compare" / "ort-cpu-int8" / "parity.json").read_text(encoding="utf-8"))
    blocks = [{**BLOCK, "block": f"layer.{i} <b>", "accumulated_max_abs": 10.0 ** (i - 6)} for i in range(4)]
    blocks[2] |= {"passed": False, "isolated_max_abs": 0.03125}
    file = copied / "compare" / "ort-cpu-int8" / "bisect.json"
    file.write_text(bisection(recorded["engine_sha256"], blocks))
    made = Page(report(copied).read_text(encoding="utf-8"))
    assert "picture-blocks" in {e.attrs.get("id") for e in made.all("figure")}
    texts = {e.attrs.get("data-pointer"): e.text for e in made.all("data")}
    assert texts["/blocks/3/accumulated_max_abs"] == "0.001"
    rows = [row.text for row in made.all("tr")]
    assert any("layer.2 <b>" in row and "0.031 of 0.0078" in row and "PARTS" in row for row in rows)
    (parity,) = [verdict for verdict in verdicts(read_run(copied)) if verdict.key == "parity"]
    assert parity.state == "bad"
    assert any("parts from the checkpoint in layer.2 <b>" in str(row.pieces) for row in parity.rows)


def test_probes_gates_pairs_and_other_metrics_of_a_comparison_are_shown(copied: Path) -> None:
    file = copied / "compare" / "ort-cpu-int8" / "parity.json"
    recorded = json.loads(file.read_text(encoding="utf-8"))
    gate = {"gate": "drop<=0.5", "actual": 0.75, "limit": 0.5, "passed": False, "reason": "points <below>"}
    left_out: dict[str, object] = {
        "name": "no room",
        "actual": None,
        "tolerated": None,
        "passed": None,
        "reason": "too short",
    }
    pair = {
        "other": "elsewhere", "other_sha256": "0" * 64, "output": "logits", "max_abs": 0.5, "mean_abs": 0.25,
        "cosine": 1.0, "agreement": 1.0, "difference": 0.0, "difference_interval": None,
    }  # fmt: skip
    more = {"passed": False, "gates": [gate], "pairs": [pair], "secondary_metrics": {"mcc": [0.75, 0.5]}}
    file.write_text(json.dumps({**recorded, **more, "probes": [*recorded["probes"], left_out]}), encoding="utf-8")
    made = Page(report(copied).read_text(encoding="utf-8"))
    figures = {(e.attrs["data-file"], e.attrs.get("data-pointer")): e.text for e in made.all("data")}
    place = "compare/ort-cpu-int8/parity.json"
    assert float(figures[place, "/gates/0/actual"]) == 0.75
    assert figures[place, "/outputs/0/flips"] == str(recorded["outputs"][0]["flips"]), "what no other table has"
    # two digits are shown
    assert float(figures[place, "/probes/1/actual"]) == pytest.approx(recorded["probes"][1]["actual"], rel=0.05)
    rows = [row.text for row in made.all("tr")]
    assert any("drop<=0.5" in row and "FAIL" in row and "points <below>" in row for row in rows)
    words = {True: "pass", None: "does not apply"}
    for probe in [*recorded["probes"], left_out]:
        assert any(probe["name"] in row and words[probe["passed"]] in row for row in rows)
        assert not any(probe["name"] in row and "FAIL" in row for row in rows)
    assert not any(str(left_out["name"]) in row and "NaN" in row for row in rows)
    assert any("elsewhere" in row and "0.5" in row and "0.25" in row for row in rows)
    assert any("mcc" in row and "0.7500" in row and "0.5000" in row for row in rows)


def test_a_field_that_no_reader_knows_is_refused_by_name(copied: Path) -> None:
    file = copied / "compare" / "ort-cpu-int8" / "parity.json"
    recorded = json.loads(file.read_text(encoding="utf-8"))
    recorded["outputs"][0]["mood"] = 0.125
    file.write_text(json.dumps(recorded), encoding="utf-8")
    (copied / "engines" / "ort-cpu-int8" / "parity.json").unlink()
    run = read_run(copied)
    assert next(engine for engine in run.engines if engine.name == "ort-cpu-int8").parity is None
    assert any(
        doubt.startswith("compare/ort-cpu-int8/parity.json") and "unknown field outputs[0].mood" in doubt
        for doubt in run.doubts
    )


def test_a_bisection_of_another_engine_is_not_shown(copied: Path) -> None:
    (copied / "engines" / "ort-cpu-int8" / "bisect.json").write_text(bisection("0" * 64, [BLOCK]))
    run = read_run(copied)
    assert not any(engine.blocks for engine in run.engines)
    assert any("bisect.json compared another engine" in doubt for doubt in run.doubts)

"""The model card of a run or an engine directory: its numbers are those of the files, and what no file says is
listed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from nxm_export.cli import main
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.records.checkpoint_metrics import (
    METRICS_FILE,
    CompressionMetrics,
    read_metrics,
    read_metrics_of,
)
from nxm_export.errors import ArtifactError
from nxm_export.reporting import card
from nxm_export.reporting.hub_card import markdown
from nxm_export.storage.json_files import as_objects, encode, entry_at

pytestmark = pytest.mark.slow  # a whole run is made for them


def front_matter(text: str) -> dict[str, object]:
    head = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(head, dict)
    return head


def test_the_card_of_a_run_has_its_numbers_and_says_what_it_does_not_know(finished: Path, tmp_path: Path) -> None:
    text = card(finished, tmp_path / "README.md").read_text(encoding="utf-8")
    summary = json.loads((finished / "summary" / "summary.json").read_text(encoding="utf-8"))
    head = front_matter(text)
    assert head["pipeline_tag"] == "text-classification"
    result = entry_at(head, "model-index", 0, "results", 0)
    assert entry_at(result, "metrics", 0) == {
        "type": "accuracy", "name": "accuracy", "value": summary["compressed"], "verified": False,
    }  # fmt: skip
    assert {entry["type"] for entry in as_objects(entry_at(result, "metrics"))} == {
        "accuracy", "f1", "matthews_correlation",
    }  # fmt: skip
    assert entry_at(result, "task", "type") == "text-classification"
    assert entry_at(result, "dataset", "type") == "unknown"
    assert "license" not in head, "no file says it"
    assert "base_model" not in head
    low, high = summary["difference_interval"]
    for line in (
        f"| dense | {summary['dense']:.4f} |",
        f"| compressed | {summary['compressed']:.4f} |",
        f"| difference, 95 % paired interval | {low:+.4f} to {high:+.4f} |",
        f"| hw | {summary['compression']['hw']:.2%} |",
    ):
        assert line in text
    dense = read_metrics(finished / "dense").secondary_metrics
    parity = json.loads((finished / "compare" / "ort-cpu-int8" / "parity.json").read_text(encoding="utf-8"))
    for name in ("f1", "mcc"):
        assert f"| {name} | {dense[name]:.4f} | {parity['secondary_metrics'][name][1]:.4f} |" in text
    for engine in finished.glob("engines/*/passport.json"):
        assert json.loads(engine.read_text(encoding="utf-8"))["engine_sha256"] in text
    unknown = text.partition("## What this card does not know")[2]
    assert "licence" in unknown
    assert "base model's name" in unknown
    told = card(finished, tmp_path / "told.md", base_model="org/name", license="apache-2.0").read_text(encoding="utf-8")
    head = front_matter(told)
    assert (head["base_model"], head["base_model_relation"], head["license"]) == ("org/name", "quantized", "apache-2.0")
    assert "the base model's name" not in told
    assert "sparse kernel: no engine proves it" in unknown


def test_the_card_of_an_engine_directory_knows_what_lies_in_it(finished: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(finished / "engines" / "ort-cpu-int8", tmp_path / "engine"))
    text = card(engine, tmp_path / "README.md").read_text(encoding="utf-8")
    parity = json.loads((engine / "parity.json").read_text(encoding="utf-8"))
    assert f"| compressed | {parity['engine_value']:.4f} |" in text
    assert "| dense | not known |" in text
    assert "how far it is from the dense model" in text
    (engine / "parity.json").unlink()
    text = card(engine, tmp_path / "other.md").read_text(encoding="utf-8")
    assert "model-index" not in front_matter(text), "no value without a comparison"
    assert "it was not compared" in text


def test_the_card_of_a_checkpoint_has_its_plan_and_its_metrics(finished: Path, tmp_path: Path) -> None:
    text = card(finished / "checkpoint", tmp_path / "README.md").read_text(encoding="utf-8")
    value = read_metrics(finished / "checkpoint").value
    head = front_matter(text)
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "text-classification"
    assert entry_at(head, "model-index", 0, "results", 0, "metrics", 0, "value") == value
    assert f"| compressed | {value:.4f} |" in text
    assert "nxm export CHECKPOINT" in text
    assert "with backend(" not in text
    assert "it was not compared" in text
    matrices = len(open_checkpoint(finished / "checkpoint").plan.weights)
    assert "**Sparse: planned; stored not checked.**" in text
    assert f"planned N:M: {matrices} of {matrices} matrices" in text


def test_a_checkpoint_that_nothing_scored_has_no_score(finished: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(finished / "checkpoint", tmp_path / "checkpoint")
    metrics = read_metrics_of(CompressionMetrics, checkpoint)
    unscored = replace(metrics, value=None, interval=None, dense_value=None, secondary_metrics={}, dev_labelled=False)
    (checkpoint / METRICS_FILE).write_text(encode(unscored.to_dict()), encoding="utf-8")
    text = card(checkpoint, tmp_path / "README.md").read_text(encoding="utf-8")
    assert "## Evaluation" not in text
    assert "model-index" not in front_matter(text)
    assert "how accurate it is: there were no labelled data to score it on" in text


def test_what_the_command_proposes_to_upload_is_the_card_alone(finished: Path, tmp_path: Path) -> None:
    """A whole run directory holds command lines, paths and labels, and the card would not be its README.md."""
    result = CliRunner().invoke(main, ["card", str(finished), "--out", str(tmp_path / "CARD.md")])
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-1] == f"next: hf upload USER/NAME {tmp_path / 'CARD.md'} README.md"


def test_names_cannot_break_out_of_the_card(finished: Path, tmp_path: Path) -> None:
    text = card(finished, tmp_path / "README.md").read_text(encoding="utf-8")
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert markdown("a|b\n# c [x](y) `d` *e*") == r"a\|b \# c \[x\](y) \`d\` \*e\*"


def test_a_directory_that_is_neither_makes_no_card(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="neither a run, a compressed checkpoint nor an engine directory"):
        card(tmp_path, tmp_path / "README.md")
    assert not (tmp_path / "README.md").exists()

"""Reranking: candidates of one query stay together, are scored by nDCG@10, and cross-encoders of others serve as they
are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from compressors.models import load_model, resolve
from compressors.settings import Settings
from compressors.training.compress import finetune
from nxm_export.cli import main
from nxm_export.contract.checkpoint import has_head, read_config
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.tasks import TASKS, task_of
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples
from nxm_export.data.label_kinds import labelled, load_labelled
from nxm_export.data.metrics import metric_named
from nxm_export.errors import DataError
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from tests.support import tiny
from tests.support.intervals import interval

TASK = TASKS["reranking"]


def dcg(gains: list[float]) -> float:
    return sum(gain / math.log2(rank + 2) for rank, gain in enumerate(gains[:10]))


def ndcg(scores: list[float], grades: list[float]) -> float:
    ranked = [gain for _, gain in sorted(zip(scores, grades, strict=True), key=lambda pair: -pair[0])]
    return dcg(ranked) / dcg(sorted(grades, reverse=True))


class TestMetric:
    def data(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
        """Scores, relevance, groups in a mixed order, and the nDCG of every query that can be ranked."""
        rng = np.random.default_rng(0)
        sizes = [5, 1, 30, 4, 2, 12, 7, 3, 8]  # more than ten, and one alone
        groups = rng.permutation(np.repeat(np.arange(9), sizes))
        scores, grades = rng.normal(size=(72, 1)), rng.integers(0, 4, (72, 1)) / 3
        grades[groups == 3] = 0.0  # nothing relevant: any order is as good
        grades[np.flatnonzero(groups == 4)] = [[1.0], [0.0]]
        grades[np.flatnonzero(groups == 7)] = [[1.0], [0.0], [0.0]]
        seen = [group for group in dict.fromkeys(groups.tolist()) if group not in (1, 3)]
        expected = [ndcg(scores[groups == group, 0].tolist(), grades[groups == group, 0].tolist()) for group in seen]
        return scores, grades, groups, expected

    def test_it_is_the_mean_over_queries(self) -> None:
        scores, grades, groups, expected = self.data()
        actual = metric_named("ndcg_at_10", (), groups)(scores, grades)
        assert actual == pytest.approx(np.mean(expected), abs=1e-12)
        assert metric_named("ndcg_at_10", (), groups)(grades, grades) == 1.0

    def test_the_interval_resamples_queries(self) -> None:
        scores, grades, groups, expected = self.data()
        generator = np.random.default_rng(3)
        means = [np.mean(np.array(expected)[generator.integers(0, 7, size=7)]) for _ in range(1000)]
        actual = interval("ndcg_at_10", scores, grades, seed=3, groups=groups)
        assert actual == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=1e-12)

    def test_without_anything_to_rank_there_is_no_number(self) -> None:
        for groups, grades in ((np.arange(4), [1.0, 0, 1, 0]), (np.zeros(4, int), [1.0] * 4), (None, [1.0, 0, 0, 0])):
            with pytest.raises(DataError, match="no query has two candidates of different relevance"):
                metric_named("ndcg_at_10", (), groups)(np.ones((4, 1)), np.array(grades)[:, None])

    def test_nan_shows(self) -> None:
        actual = metric_named("ndcg_at_10", (), np.zeros(2, int))(np.array([[np.nan], [1.0]]), np.array([[1.0], [0.0]]))
        assert np.isnan(actual)


class TestData:
    def read(self, tmp_path: Path, text: str) -> Examples:
        file = tmp_path / "data.tsv"
        file.write_text(text, encoding="utf-8")
        return labelled(load_labelled(str(file), "train", Columns(), TASK), TASK, None)

    def test_candidates_of_one_query_are_a_group_wherever_they_stand(self, tmp_path: Path) -> None:
        examples = self.read(tmp_path, "query\tpassage\trelevance\nq\ta\t2\nr\tb\t0\nq\tc\t1\n")
        assert (examples.texts, examples.pairs, examples.groups) == (["q", "r", "q"], ["a", "b", "c"], [0, 1, 0])
        assert examples.labels == [[1.0], [0.0], [0.5]]

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ("q\td\t-1", r"data\.tsv:3: relevance -1 is negative"),
            ("q\td\tnan", r"data\.tsv:3: the label is missing"),
            ("q\td\tgood", r"data\.tsv:3: label 'good' is not a finite number"),
            ("\td\t1", r"data\.tsv:3: a text is empty"),
            ("q\t\t1", r"data\.tsv:3: a text is empty"),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path: Path, row: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            self.read(tmp_path, f"query\tdocument\trelevance\nq\ta\t1\n{row}\n")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("query\tdocument\nq\ta\n", "none of the usual label columns"),
            ("text\trelevance\nq\t1\n", "scored on pairs of texts"),
            ("query\tdocument\trelevance\nq\ta\t0\nq\tb\t0\n", "no document is relevant"),
        ],
    )
    def test_columns_and_grades_that_are_missing_are_named(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            self.read(tmp_path, text)


class TestHead:
    def test_its_config_tells_it_from_regression_and_from_several_labels(self, tmp_path: Path) -> None:
        config = {"architectures": ["BertForSequenceClassification"], "problem_type": "multi_label_classification"}
        assert task_of({**config, "id2label": {"0": "score"}}) == "reranking"
        assert task_of({**config, "id2label": {"0": "a", "1": "b"}}) == "multi-label"
        path = tiny.write_model("bert", tmp_path, head="reranking")
        assert task_of(read_config(path)) == "reranking"
        assert not has_head(path, read_config(path), TASKS["regression"])

    def test_a_cross_encoder_of_others_is_kept_and_named(self, tmp_path: Path) -> None:
        """Published ones have one score, and nothing that says what for."""
        path = tiny.write_model("bert", tmp_path / "m", head="regression")
        config = json.loads((path / "config.json").read_text())
        del config["problem_type"]
        (path / "config.json").write_text(json.dumps(config))
        train, dev = tiny.write_data(tmp_path, "reranking")
        options: dict[str, Any] = {"task": "reranking", "train": str(train), "dev": str(dev), "settings": Settings()}
        metrics = finetune(path, out=tmp_path / "out", **options)
        assert (metrics.steps, metrics.metric) == (0, "ndcg_at_10")
        assert task_of(read_config(tmp_path / "out")) == "reranking"
        assert load_spec(export(path, tmp_path / "graph", task="reranking").path.parent).task == "reranking"

    def test_queries_with_nothing_to_rank_are_not_counted_as_scored(self, tmp_path: Path) -> None:
        path = tiny.write_model("bert", tmp_path / "m", head="reranking")
        file = tmp_path / "dev.tsv"
        rows = ["a film\tgood\t1", "a film\tbad\t0", "the plot\tgood\t1", "the scene\tdull\t0", "the scene\tcold\t0"]
        file.write_text("\n".join(["query\tdocument\trelevance", *rows]) + "\n")
        metrics = finetune(path, task="reranking", train=str(file), dev=str(file), out=tmp_path / "out")
        assert metrics.dev_samples == 1

    def test_the_loss_is_the_binary_cross_entropy_of_the_relevance(self, tmp_path: Path) -> None:
        model = load_model(resolve(tiny.write_model("bert", tmp_path, head="reranking")), TASK).eval()
        ids, relevance = torch.randint(5, 5 + len(tiny.WORDS), (3, 6)), torch.tensor([[1.0], [0.0], [0.5]])
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=relevance)
        p = torch.sigmoid(outputs.logits.double())
        expected = -(relevance * p.log() + (1 - relevance) * (1 - p).log()).mean()
        assert float(outputs.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)  # float32


def test_a_ranking_that_knows_the_answer_beats_one_by_chance(tiny_checkpoint: Callable[..., Path]) -> None:
    """What the tiny data can tell: its metric is far from 1 for random scores."""
    dev = tiny_checkpoint("bert", task="reranking").parent / "dev.tsv"
    examples = labelled(load_labelled(str(dev), "dev", Columns(), TASK), TASK, None)
    value = metric_named("ndcg_at_10", (), np.array(examples.groups))
    random = np.random.default_rng(0).normal(size=(50, len(examples), 1))
    assert np.mean([value(scores, np.array(examples.labels)) for scores in random]) < 0.8


class TestOneCandidateAQuery:
    """Nothing can be ranked, and every command that would print a number says so before it works."""

    @pytest.fixture(scope="class")
    def single(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        file = tmp_path_factory.mktemp("single") / "dev.tsv"
        rows = [f"{tiny.WORDS[number]} film\tgreat plot\t1" for number in range(20)]
        file.write_text("\n".join(["query\tdocument\trelevance", *rows]) + "\n", encoding="utf-8")
        return file

    @pytest.mark.parametrize("command", ["compress", "run", "run --dry-run"])
    def test_it_is_said_before_training(self, command: str, single: Path, tmp_path: Path) -> None:
        model = tiny.write_model("bert", tmp_path / "model", head="reranking", layers=1)
        train, _ = tiny.write_data(tmp_path / "data", "reranking")
        out = tmp_path / "out"
        name, *options = command.split()
        source = [str(model)]
        asked = [name, *source, "--task", "reranking", "--train", str(train), "--dev", str(single), "--out", str(out)]
        result = CliRunner().invoke(main, [*asked, *options])
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith(f"nxm: {single}: every query has one candidate, so there is nothing to rank")
        assert {file.parent for file in tmp_path.rglob("*.safetensors")} == {model}, "nothing was made"

    def test_an_engine_is_not_compared_on_it(
        self, single: Path, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
    ) -> None:
        checkpoint = tiny_checkpoint("bert", task="reranking")
        build_engine(export(checkpoint, tmp_path / "graph").path, tmp_path / "engine", "ort")
        result = CliRunner().invoke(
            main, ["compare", str(tmp_path / "engine"), f"--checkpoint={checkpoint}", "--data", str(single)]
        )
        assert result.exit_code == 1, result.output
        assert "no query has two candidates of different relevance" in result.stderr
        assert not (tmp_path / "engine" / "parity.json").exists()

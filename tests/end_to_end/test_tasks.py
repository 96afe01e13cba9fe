"""Every task goes all the way: data, compression, export, ONNX Runtime, comparison; and its data errors name the
line."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from seqeval.metrics import f1_score as seqeval_f1
from sklearn.metrics import f1_score

from engines.parity import compare as parity
from engines.parity.compare import compare
from engines.parity.decisions import DECIDING
from engines.parity.gates import Gate
from engines.parity.reports import OUTPUTS_FILE
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.tasks import TASKS
from nxm_export.data.columns import Columns
from nxm_export.data.examples import Examples, encode
from nxm_export.data.features import Features, label_array, pad
from nxm_export.data.label_kinds import LABELS, classes_of, labelled, load_labelled
from nxm_export.data.metrics import METRICS, metric_named, paired_interval, require_scorable, scored_outputs
from nxm_export.data.token_labels import NO_LABEL
from nxm_export.errors import DataError
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.pipeline.labelled_texts import features_of
from tests.support import tiny
from tests.support.intervals import interval
from tests.support.variants import variants

LEARNED = {
    "classification": 0.8,
    "regression": 0.8,
    "multi-label": 0.65,
    "token-classification": 0.8,
    "embedding": 0.6,  # that shared words count shows without training
    "reranking": 0.85,
    "question-answering": 0.8,
}
DEV = {"token-classification": "dev.jsonl", "question-answering": "dev.json"}


@pytest.mark.parametrize("task", variants(TASKS, ("token-classification", "question-answering", "embedding")))
def test_a_task_goes_from_data_to_a_compared_engine(
    task: str, tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny_checkpoint("bert", task=task)
    metrics = json.loads((checkpoint / "metrics.json").read_text())
    assert metrics["metric"] == TASKS[task].metric
    assert metrics["value"] > LEARNED[task]  # it learned something, so the comparison means something
    graph = export(checkpoint, tmp_path / "graph").path
    spec = load_spec(graph.parent)
    assert (spec.task, spec.outputs) == (task, TASKS[task].outputs)
    build_engine(graph, tmp_path / "engine", "ort")
    data = checkpoint.parent / DEV.get(task, "dev.tsv")
    features = features_of(tmp_path / "engine", str(data), Columns())
    monkeypatch.setattr(parity, "SHIFT_SAMPLES", 1)  # without the longest sentence, as happens in large data
    gates = [
        Gate("drop", 100.0),
        *(Gate("drop", 100.0, name) for name in (TASKS[task].metric, *TASKS[task].secondary_metrics)),
    ]
    if TASKS[task].output_kind in DECIDING:
        gates.append(Gate("flips", 100.0))
    report = compare(checkpoint, tmp_path / "engine", features, gates=gates)
    report.require()
    assert report.difference is not None
    assert report.engine_value is not None
    assert report.engine_interval is not None
    assert report.gates[0].actual == report.gates[1].actual == pytest.approx(-100 * report.difference)
    assert report.metric == TASKS[task].metric
    assert report.engine_value > LEARNED[task]
    assert report.engine_interval[0] <= report.engine_value <= report.engine_interval[1]
    saved = np.load(tmp_path / "engine" / OUTPUTS_FILE)
    again = metric_named(report.metric, spec.labels, saved.get("groups"))(
        scored_outputs(TASKS[task], saved), saved["labels"]
    )
    assert again == report.engine_value


class TestMetrics:
    def test_entity_f1_is_that_of_seqeval(self) -> None:
        tags = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
        rng = np.random.default_rng(0)
        lengths = rng.integers(1, 12, 40)
        labels = np.full((40, 11), NO_LABEL)
        for row, length in zip(labels, lengths, strict=True):
            row[:length] = rng.integers(0, 5, length)
            row[:length:4] = NO_LABEL  # later pieces of a word
        logits = rng.normal(size=(40, 11, 5)) + 2 * (np.arange(5) == labels[..., None])
        true = [[tags[i] for i in row if i != NO_LABEL] for row in labels]
        predicted = [
            [tags[i] for i, label in zip(predicted, row, strict=True) if label != NO_LABEL]
            for predicted, row in zip(logits.argmax(-1), labels, strict=True)
        ]
        assert metric_named("entity_f1", tags)(logits, labels) == pytest.approx(seqeval_f1(true, predicted), abs=1e-12)

    def test_micro_f1_is_that_of_scikit_learn(self) -> None:
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(50, 4)), (rng.random((50, 4)) > 0.6).astype(np.float32)
        expected = f1_score(labels, logits > 0, average="micro")
        assert metric_named("micro_f1")(logits, labels) == pytest.approx(expected, abs=1e-12)

    def test_nothing_predicted_and_nothing_true_is_zero(self) -> None:
        assert metric_named("micro_f1")(np.full((3, 2), -1.0), np.zeros((3, 2))) == 0.0

    def test_the_interval_resamples_samples(self) -> None:
        rng = np.random.default_rng(0)
        logits, labels = rng.normal(size=(30, 4)), (rng.random((30, 4)) > 0.6).astype(np.float32)
        generator = np.random.default_rng(3)
        picks = [generator.integers(0, 30, size=30) for _ in range(1000)]
        values = [f1_score(labels[pick], logits[pick] > 0, average="micro", zero_division=0) for pick in picks]
        assert interval("micro_f1", logits, labels, seed=3) == pytest.approx(np.percentile(values, [2.5, 97.5]))
        assert paired_interval("micro_f1", logits, logits, labels) == (0.0, 0.0)

    def test_a_single_sample_has_no_interval(self) -> None:
        one = np.array([[0.0, 1.0]]), np.array([1])
        assert np.isnan(interval("accuracy", *one)).all()
        assert np.isnan(paired_interval("accuracy", one[0], *one)).all()
        pair = np.ones((2, 3)), np.ones(2)
        assert np.isnan(interval("cosine_spearman", *pair, groups=np.zeros(2, int))).all()

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("label", [0, 1])
    def test_one_class_scores_without_a_word(self, label: int) -> None:
        right, labels = np.eye(2)[[label] * 4], np.full(4, label)
        actual = [metric_named(name)(right, labels) for name in ("accuracy", "f1", "mcc")]
        assert actual == [1.0, float(label), 0.0]

    @pytest.mark.parametrize("metric", [*METRICS, "micro_f1", "entity_f1", "ndcg_at_10", "cosine_spearman"])
    def test_one_nan_makes_a_metric_nan_with_its_intervals(self, metric: str) -> None:
        """Else a constant class: the largest of NaN is the first."""
        shape = (4, 3, 2) if metric == "entity_f1" else (4, 2)
        outputs, labels = np.zeros(shape), np.zeros(shape[:-1] if metric in (*METRICS, "entity_f1") else shape, int)
        outputs.flat[-1] = np.nan
        groups = np.array([0, 0, 1, 1])
        assert np.isnan(metric_named(metric, ("O", "B-X"), groups)(outputs, labels))
        assert np.isnan(interval(metric, outputs, labels, classes=("O", "B-X"), groups=groups)).all()
        assert np.isnan(paired_interval(metric, np.zeros(shape), outputs, labels, groups=groups)).all()

    @pytest.mark.parametrize(
        ("metric", "labels", "message"),
        [
            ("pearson", np.ones((4, 1)), "every label is 1"),
            ("cosine_spearman", np.zeros(4), "every label is 0"),
            ("micro_f1", np.zeros((4, 2)), "no sample has a label"),
            ("entity_f1", np.array([[NO_LABEL, 0, 0]]), "no token belongs to an entity"),
        ],
    )
    def test_labels_that_score_every_model_alike_gate_nothing(
        self, metric: str, labels: np.ndarray, message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            require_scorable(metric, labels, ("O", "B-X"))
        labels.flat[-1] = 1 - labels.flat[-1]
        require_scorable(metric, labels, ("O", "B-X"))

    def test_entity_f1_without_the_tag_names_is_refused(self) -> None:
        with pytest.raises(DataError, match="needs the 5 tag names"):
            metric_named("entity_f1")(np.zeros((1, 2, 5)), np.zeros((1, 2)))


def read(tmp_path: Path, task: str, text: str, suffix: str, head: Any = None) -> Examples:
    file = tmp_path / f"data.{suffix}"
    file.write_text(text, encoding="utf-8")
    raw = load_labelled(str(file), "train", Columns(), TASKS[task])
    return labelled(raw, TASKS[task], classes_of(raw, TASKS[task], head))


class TestSeveralLabels:
    @pytest.mark.parametrize(
        ("suffix", "text"),
        [
            ("tsv", "text\tlabels\na\tx;y\nb\t\nc\ty\n"),
            ("tsv", "text\tlabels\na\tx, y\nb\t\nc\ty\n"),
            ("tsv", 'text\tlabels\na\t["x", "y"]\nb\t[]\nc\ty\n'),
            ("jsonl", '{"text":"a","labels":["y","x"]}\n{"text":"b","labels":[]}\n{"text":"c","labels":"y"}\n'),
        ],
    )
    def test_all_ways_of_writing_them_mean_the_same(self, tmp_path: Path, suffix: str, text: str) -> None:
        assert read(tmp_path, "multi-label", text, suffix).labels == [[1.0, 1.0], [0.0, 0.0], [0.0, 1.0]]

    @pytest.mark.parametrize(
        ("text", "head", "message"),
        [
            ("text\tlabels\na\tx;y\nb\tx;x\n", None, r"data\.tsv:3: labels \['x', 'x'\] name a class twice"),
            ("text\tlabels\na\tx;;y\n", None, r"data\.tsv:2: the label is missing"),
            ("text\tlabels\na\t[x\n", None, r"data\.tsv:2: labels '\[x': not valid JSON"),
            ("text\tlabels\na\t\n", None, r"no example has a label"),
            ("text\tlabels\na\tx\n", None, r"only one class"),
            ("text\tlabels\na\tx\nb\tz\n", ["x", "y"], r"data\.tsv:\d: label '[xz]' is none of the model's classes"),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path: Path, text: str, head: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            read(tmp_path, "multi-label", text, "tsv", head)


class TestTags:
    def test_conll_and_json_lines_mean_the_same(self, tmp_path: Path) -> None:
        conll = "-DOCSTART- O\n\nAnna NN B-PER\nsleeps VB O\n\n\nin IN O\nRome NN B-LOC\n"
        lines = [
            {"tokens": ["Anna", "sleeps"], "tags": ["B-PER", "O"]},
            {"tokens": ["in", "Rome"], "tags": ["O", "B-LOC"]},
        ]
        both = [
            read(tmp_path, "token-classification", conll, "conll"),
            read(tmp_path, "token-classification", "\n".join(json.dumps(line) for line in lines), "jsonl"),
        ]
        for examples in both:
            assert examples.texts == ["Anna sleeps", "in Rome"]
            assert examples.labels == [[2, 0], [0, 1]]  # O, B-LOC, B-PER

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens and 1 tags"),
            ({"tokens": [""], "tags": ["O"]}, "token 0 is empty"),
            ({"tokens": [], "tags": ["O"]}, "0 tokens and 1 tags"),
            ({"tokens": "a b", "tags": ["O", "O"]}, "one entry a token"),
            ({"tokens": ["a"], "tags": [3]}, "tag '3' is none of O, B-NAME"),
            ({"tokens": ["a"], "tags": ["PER"]}, "tag 'PER' is none of O, B-NAME"),
            ({"tokens": ["a"], "tags": ["O"]}, None),
        ],
    )
    def test_a_bad_row_is_named(self, tmp_path: Path, row: dict[str, Any], message: str | None) -> None:
        good = {"tokens": ["Rome"], "tags": ["B-LOC"]}
        text = f"{json.dumps(good)}\n{json.dumps(row)}\n"
        if message is None:
            assert read(tmp_path, "token-classification", text, "jsonl").labels == [[1], [0]]
            return
        with pytest.raises(DataError, match=rf"data\.jsonl:2: .*{message}"):
            read(tmp_path, "token-classification", text, "jsonl")

    def test_tags_without_entity_and_unknown_ones_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="there is no entity to learn"):
            read(tmp_path, "token-classification", '{"tokens":["a"],"tags":["O"]}', "jsonl")
        with pytest.raises(DataError, match=r"data\.jsonl:1: label '.*' is none of the model's classes"):
            read(tmp_path, "token-classification", '{"tokens":["a"],"tags":["B-X"]}', "jsonl", ["O", "B-LOC"])
        with pytest.raises(DataError, match=r"data\.conll:2: 'b' is a token without a tag"):
            read(tmp_path, "token-classification", "a O\nb\n", "conll")

    @pytest.mark.parametrize("space_counts", [False, True])
    def test_the_first_piece_of_a_token_has_its_tag(self, space_counts: bool) -> None:
        """Pieces of at most two characters, so that tokens split; byte-level tokenizers count the space to the
        token."""
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

        made = Tokenizer(models.WordLevel({"?": 0, "[CLS]": 1}, unk_token="?"))
        pattern = r" ?\S{1,2}" if space_counts else r"\S{1,2}"
        made.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
        made.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
        examples = Examples(["abcde f ghi"], None, [[7, 8, 9]], "x", tokens=[("abcde", "f", "ghi")])
        (whole,), (cut,) = (encode(made, examples, length, ("input_ids",)) for length in (20, 5))
        x = NO_LABEL
        assert whole["labels"] == [x, 7, x, x, 8, 9, x]
        assert cut["labels"] == whole["labels"][:5]

    def test_batches_fill_labels_with_what_is_not_scored(self) -> None:
        from compressors.training.trainer import collate

        samples: list[Features] = [
            {"input_ids": [5] * n, "attention_mask": [1] * n, "labels": [NO_LABEL, *range(n - 1)]} for n in (2, 4)
        ]
        expected = [[NO_LABEL, 0, NO_LABEL, NO_LABEL], [NO_LABEL, 0, 1, 2]]
        np.testing.assert_array_equal(label_array(samples), expected)
        np.testing.assert_array_equal(collate(samples, 0)["labels"].numpy(), expected)
        assert pad(samples, 0)["input_ids"].shape == (2, 4)
        longer: list[Features] = [
            {**sample, "pad_to": 6} for sample in samples
        ]  # on several processes: to the longest of the whole batch
        assert collate(longer, 0)["labels"].shape == (2, 6)


def test_labels_agree_where_every_label_is_a_choice_of_its_own() -> None:
    """Against Bernoulli divergences, one at a time."""
    import torch

    from compressors.training.output_divergence import divergence, labels_loss

    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    total = 0.0
    for row, column in itertools.product(range(3), range(4)):
        p, q = (float(torch.sigmoid(logits.double()[row, column])) for logits in (teacher, student))
        total += p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert float(labels_loss(student, teacher)) == pytest.approx(total / 12, rel=1e-5)  # float32 sums
    assert divergence(teacher, student, "sigmoid") == pytest.approx(total, rel=1e-9)


def test_tiny_data_of_every_task_can_be_read(tmp_path: Path) -> None:
    for task in TASKS.values():
        train, dev = tiny.write_data(tmp_path / task.name, task.name)
        raw = load_labelled(str(train), "train", Columns(), task)
        assert {path.parent for path in (train, dev)} == {tmp_path / task.name}
        names = classes_of(raw, task, None)
        each = 2 if LABELS[task.label].separate else 1  # a pair is two samples of an embedding model
        assert len(labelled(raw, task, names)) == tiny.TRAIN_SAMPLES * each
        assert len(load_labelled(str(dev), "dev", Columns(), task).texts) == tiny.DEV_SAMPLES
        assert names is None or len(names.names) == len(tiny.CLASSES.get(task.name, "01"))

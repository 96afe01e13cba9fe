"""Texts that are in train and in dev are named before anything is trained."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

from compressors.models import load_tokenizer, resolve
from compressors.settings import Settings
from compressors.training.task_data import TaskDataRequest, read_task_data
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import Notice
from tests.support import tiny


@pytest.mark.parametrize(
    ("shared", "pairs", "said"),
    [(20, False, "20 of 20 texts"), (3, False, "3 of 20 texts"), (2, False, None), (20, True, "20 of 20 texts")],
)
def test_texts_of_both_files_are_counted(tmp_path: Path, shared: int, pairs: bool, said: str | None) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="classification"))
    head = "sentence\tsentence2\tlabel\n" if pairs else "sentence\tlabel\n"
    second = "plot\t" if pairs else ""
    rows = [f"film {'good ' * i}\t{second}{i % 2}\n" for i in range(1, 41)]
    for name, part in (("train", rows[:20]), ("dev", rows[20 - shared : 40 - shared])):
        (tmp_path / f"{name}.tsv").write_text(head + "".join(part), encoding="utf-8")
    request = TaskDataRequest(TASKS["classification"], str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_task_data(source, request, load_tokenizer(source), Settings())
    notices = [
        str(entry.message) for entry in caught if entry.category is Notice and "trained on" in str(entry.message)
    ]
    assert len(notices) == (said is not None)
    assert said is None or f"dev.tsv: {said} are in " in notices[0]


def test_sentences_of_a_pair_count_by_themselves_where_a_model_reads_them_so(tmp_path: Path) -> None:
    """Trained on sentences, scored on pairs of the same: every one of them is known."""
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="embedding"))
    (tmp_path / "train.tsv").write_text("sentence\ngood film\ngood plot\nlong film\n", encoding="utf-8")
    dev = "sentence1\tsentence2\tscore\ngood film\tgood plot\t0.2\nlong film\tlong plot\t0.5\n"
    (tmp_path / "dev.tsv").write_text(dev, encoding="utf-8")
    request = TaskDataRequest(TASKS["embedding"], str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv"))
    with pytest.warns(Notice, match=r"dev.tsv: 3 of 4 texts are in .*train.tsv"):
        read_task_data(source, request, load_tokenizer(source), Settings())


def test_the_second_text_counts(tmp_path: Path) -> None:
    """The same first texts with other second ones are other samples."""
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="classification"))
    for name, second in (("train", "plot"), ("dev", "story")):
        rows = [f"film {'good ' * i}\t{second}\t{i % 2}\n" for i in range(1, 21)]
        (tmp_path / f"{name}.tsv").write_text("sentence\tsentence2\tlabel\n" + "".join(rows), encoding="utf-8")
    request = TaskDataRequest(TASKS["classification"], str(tmp_path / "train.tsv"), str(tmp_path / "dev.tsv"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        read_task_data(source, request, load_tokenizer(source), Settings())


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, True),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.activation.Sigmoid"}, True),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, False),
        ({"sentence_transformers": {"version": "5.0"}}, False),
        ({}, False),
    ],
)
def test_what_a_cross_encoder_computes_of_its_score_is_said(
    tmp_path: Path, field: dict[str, object], said: bool
) -> None:
    model = tiny.write_model("bert", tmp_path / "model", head="regression")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **field}))
    train, dev = tiny.write_data(tmp_path, "regression")
    source = resolve(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_task_data(
            source, TaskDataRequest(TASKS["regression"], str(train), str(dev)), load_tokenizer(source), Settings()
        )
    assert any("puts Sigmoid behind the score" in str(entry.message) for entry in caught) == said

"""Texts without labels in training: which samples they replace, how they are read, and what is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from compressors.models import load_tokenizer, resolve
from compressors.settings import Losses, Settings
from compressors.training.augmentation import mixed, require_augmentable
from compressors.training.compress import _take_ownership, compress
from compressors.training.default_recipe import training_of
from compressors.training.resume import REQUEST_FILE, request_hash
from compressors.training.task_data import TaskData, TaskDataRequest, read_task_data
from compressors.training.trainer import collate, schedule
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.pooling import read_pooling
from nxm_export.contract.tasks import TASKS, task_named
from nxm_export.data.columns import Columns
from nxm_export.data.features import Features
from nxm_export.data.more_text import MoreText
from nxm_export.data.token_labels import NO_LABEL
from nxm_export.errors import DataError, Notice
from tests.support import tiny


def samples(count: int, seed: int, first: int) -> list[Features]:
    rng = random.Random(seed)
    return [{"input_ids": [first + i] * rng.randint(3, 40), "labels": 1} for i in range(count)]


def padding(batches: list[list[Features]]) -> float:
    """Tokens, padding included, over real ones."""
    lengths = [[len(sample["input_ids"]) for sample in batch] for batch in batches]
    return sum(max(batch) * len(batch) for batch in lengths) / sum(map(sum, lengths))


def test_the_share_is_kept_each_text_has_its_turn_and_batches_stay_of_one_length() -> None:
    ours, more = samples(700, 0, 0), samples(900, 1, 10_000)
    order = schedule(ours, 400, 8, seed=3)
    both, places = mixed(ours, order, more, 8, 0.5, seed=3)
    assert (both, places) == mixed(ours, order, more, 8, 0.5, seed=3)
    assert places != mixed(ours, order, more, 8, 0.5, seed=4)[1]
    assert both == [*ours, *more]
    taken = [place - 700 for place in places if place >= 700]
    assert len(taken) == pytest.approx(0.5 * 7 / 8 * 3200, abs=80)  # three standard errors
    assert all(place < 700 for place in places[::8])
    assert sorted(set(taken)) == list(range(900))  # 1400 turns
    assert max(map(taken.count, taken)) == 2
    assert all(place in (at, place) and (place >= 700 or place == at) for at, place in zip(order, places, strict=True))
    batches = [[both[i] for i in places[at : at + 8]] for at in range(0, len(places), 8)]
    before = [[ours[i] for i in order[at : at + 8]] for at in range(0, len(order), 8)]
    assert padding(batches) < padding(before) + 0.1  # 1.7 where texts are put anywhere


def read(out: Path, task: str, files: tuple[str, ...], columns: Columns = Columns()) -> TaskData:
    source = resolve(tiny.write_model("bert", out / "encoder", head="embedding" if task == "embedding" else None))
    train, dev = tiny.write_data(out, task)
    more = MoreText(files)
    request = TaskDataRequest(task_named(task), str(train), str(dev), columns, more_text=more)
    return read_task_data(source, request, load_tokenizer(source), Settings())


@pytest.mark.parametrize("task", TASKS)
def test_texts_of_every_task_are_read_without_their_labels(task: str, tmp_path: Path) -> None:
    others, _ = tiny.write_data(tmp_path / "other", task, seed=9)
    data = read(tmp_path, task, (str(others),))
    assert data.more_text_facts is not None
    assert 0 < data.more_text_facts.texts <= len(data.more_text)
    for sample in data.more_text:
        if task == "question-answering":
            assert sample["span"] == [0, 0]
        else:
            assert "group" not in sample, "nothing of it is scored, and train has groups of the same numbers"
            values = np.ravel(cast("float | list[float]", sample["labels"]))
            assert np.all((values == NO_LABEL) | np.isnan(values))
    batch = collate([data.train[0], data.more_text[0], data.train[1]], data.pad_id)
    assert len(batch["labels"]) == 3


def test_questions_need_no_answers_and_sentences_no_tags(tmp_path: Path) -> None:
    questions, sentences = tmp_path / "q.jsonl", tmp_path / "t.jsonl"
    questions.write_text(json.dumps({"question": "who acted", "context": "a wonderful film"}) + "\n")
    assert len(read(tmp_path / "q", "question-answering", (str(questions),)).more_text) == 1
    sentences.write_text(json.dumps({"tokens": ["a", "film"]}) + "\n" + json.dumps({"tokens": []}) + "\n")
    assert len(read(tmp_path / "t", "token-classification", (str(sentences),)).more_text) == 1


def test_texts_to_be_judged_on_are_left_out_and_each_counts_once(tmp_path: Path) -> None:
    _, dev = tiny.write_data(tmp_path, "classification")
    judged = dev.read_text().splitlines()[1].split("\t")[0]
    texts = tmp_path / "texts.txt"
    texts.write_text(f"a film\n{judged}\na film\nthe film\n")
    with pytest.warns(Notice, match="1 of 3 texts are in"):
        data = read(tmp_path, "classification", (str(texts), str(texts)))
    assert len(data.more_text) == 2
    with pytest.raises(DataError, match="no text is left"):
        read(tmp_path / "dev", "classification", (str(dev),))
    pairs, _ = tiny.write_data(tmp_path / "pairs", "classification", pairs=True)
    with pytest.raises(DataError, match="only one of them has a second text"):
        read(tmp_path / "single", "classification", (str(pairs),))


def test_other_texts_or_another_share_are_another_run(tmp_path: Path) -> None:
    texts, hashes = tmp_path / "texts.txt", set()
    for lines, share in (("a film\n", 0.5), ("the film\n", 0.5), ("the film\n", 0.25)):
        texts.write_text(lines)
        data = read(tmp_path, "classification", (str(texts),))
        assert data.more_text_facts is not None
        data = replace(data, more_text_facts=replace(data.more_text_facts, share=share))
        _take_ownership(tmp_path / "work", resolve(tmp_path / "encoder"), data, Settings())
        hashes.add((tmp_path / "work" / REQUEST_FILE).read_text())
    assert len(hashes) == 3


def test_a_model_that_pools_otherwise_is_another_run(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="embedding"))
    pooling = tmp_path / "model" / "1_Pooling" / "config.json"
    before = request_hash(source, [])
    assert before == request_hash(source, [])
    pooling.write_text('{"pooling_mode": "cls"}')
    assert read_pooling(source.path).mode == "cls"
    assert before != request_hash(source, [])


def test_the_dense_model_alone_is_learned_from() -> None:
    for task in ("classification", "regression"):
        assert training_of(Settings(augment=0.0), TASKS[task], 384, more_text=True).losses == Losses(0.0, 1.0, 10.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(steps=0), "nothing is trained"),
        (Settings(recipe="one-shot"), "nothing is trained"),
        (Settings(distill=False), "nothing is distilled"),
        (Settings(recipe="paper"), "nothing is distilled"),
    ],
)
def test_without_a_teacher_it_is_refused(settings: Settings, message: str, tmp_path: Path) -> None:
    model = tiny.write_model("bert", tmp_path / "model", head="classification")
    plan = resolve(model).family.uniform_plan(resolve(model).config, WeightSpec.parse("2:4+W8"))
    with pytest.raises(DataError, match=message):
        compress(
            model,
            task="classification",
            train="train.tsv",
            dev="dev.tsv",
            plan=plan,
            out=tmp_path / "out",
            settings=settings,
            more_text=MoreText(("texts.txt",)),
        )
    assert not (tmp_path / "out").exists()


def test_a_loss_that_needs_labels_is_refused() -> None:
    require_augmentable(TASKS["classification"], "--more-text")
    with pytest.raises(DataError, match="leave --more-text out"):
        require_augmentable(TASKS["regression"], "--more-text")


def test_a_share_of_nothing_and_no_file_are_refused() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(DataError, match="between 0 and 1"):
            MoreText(("texts.txt",), share)
    with pytest.raises(DataError, match="a tuple of files"):
        MoreText("texts.txt")  # type: ignore[arg-type]

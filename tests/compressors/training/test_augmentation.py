"""Distorted samples: what may change in them, what must not, and training on them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from compressors.settings import Losses, Settings
from compressors.training.augmentation import (
    DROPPED,
    REPLACED,
    augmented,
    distorted,
    mixed,
    require_augmentable,
)
from compressors.training.default_recipe import Training, training_of
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, read_metrics_of
from nxm_export.contract.tasks import TASKS
from nxm_export.data.features import Features, Label
from nxm_export.data.token_labels import NO_LABEL
from nxm_export.errors import DataError
from tests.support import tiny
from tests.support.variants import variants

FIRST, SEPARATOR = 101, 102
POOL = list(range(2000, 2100))


def sample(words: int, pair: int = 0, label: Label = 1) -> Features:
    ids = [FIRST, *range(1000, 1000 + words), SEPARATOR]
    types = [0] * len(ids)
    if pair:
        ids += [*range(1500, 1500 + pair), SEPARATOR]
        types += [1] * (pair + 1)
    return {"input_ids": ids, "token_type_ids": types, "attention_mask": [1] * len(ids), "labels": label, "group": 3}


def test_ends_and_separators_stay_and_every_token_keeps_its_segment() -> None:
    rng = random.Random(0)
    for _ in range(200):
        before = sample(12, pair=8)
        after = distorted(before, POOL, rng)
        ids, types = after["input_ids"], after["token_type_ids"]
        assert len(ids) == len(types) == len(after["attention_mask"])
        assert (ids[0], ids[-1], ids.count(SEPARATOR), ids.count(FIRST)) == (FIRST, SEPARATOR, 2, 1)
        assert types == sorted(types)
        segment = dict(zip(before["input_ids"], before["token_type_ids"], strict=True))
        assert all(
            kind == segment[token] for token, kind in zip(ids[1:], types[1:], strict=True) if 1000 <= token < 2000
        )
        assert (after["labels"], after["group"]) == (NO_LABEL, 3)
        assert before == sample(12, pair=8)


def test_as_much_changes_as_is_said() -> None:
    rng, words = random.Random(1), 40
    id_lists = [distorted(sample(words), POOL, rng)["input_ids"] for _ in range(500)]
    dropped = 1 - sum(len(ids) - 2 for ids in id_lists) / (500 * words)
    replaced = sum(token >= 2000 for ids in id_lists for token in ids) / sum(len(ids) - 2 for ids in id_lists)
    assert dropped == pytest.approx(DROPPED, abs=0.01)  # 20 000 draws: standard error 0.002
    assert replaced == pytest.approx(REPLACED, abs=0.01)


def test_a_sample_is_never_left_without_tokens_and_tags_are_as_many_as_tokens() -> None:
    rng = random.Random(2)
    for _ in range(300):
        assert len(distorted(sample(1), POOL, rng)["input_ids"]) == 3
        tagged = distorted(sample(6, label=[NO_LABEL, 1, 2, 1, 0, 0, 1, NO_LABEL]), POOL, rng)
        assert tagged["labels"] == [NO_LABEL] * len(tagged["input_ids"])
    assert distorted(sample(3, label=float("nan")), POOL, rng)["labels"] != NO_LABEL


def test_every_batch_keeps_a_label_and_the_samples_that_were_there_are_untouched() -> None:
    features = [sample(5 + i % 7) for i in range(50)]
    order = [i % 50 for i in range(400)]
    samples, places = augmented(features, order, 4, 0.7, seed=5)
    assert samples[:50] == features
    assert all(places[at] == order[at] for at in range(0, 400, 4))
    changed = sum(place >= 50 for place in places)
    assert changed == len(samples) - 50 == pytest.approx(0.7 * 300, abs=25)  # three standard errors
    assert (samples, places) == augmented(features, order, 4, 0.7, seed=5)
    assert places != augmented(features, order, 4, 0.7, seed=6)[1]


def test_batches_of_one_have_their_share_of_samples_without_a_label() -> None:
    features = [sample(5 + i % 7) for i in range(50)]
    order = [i % 50 for i in range(400)]
    for changed in (augmented(features, order, 1, 0.7, seed=5), mixed(features, order, features, 1, 0.7, seed=5)):
        assert sum(place >= 50 for place in changed[1]) == pytest.approx(0.7 * 400, abs=30)  # three standard errors


# By what a sample's labels are; the others have those of classification, or one number as regression does.
LABELS = ("token-classification", "question-answering", "embedding", "regression")


@pytest.mark.parametrize("task", variants(TASKS, ("classification",), slow=LABELS))
def test_a_compression_with_distorted_samples_and_other_texts_gives_a_valid_checkpoint(
    task: str, tmp_path: Path
) -> None:
    """Every task: the teacher alone is learned from, so that no label is missing."""
    checkpoint = tiny.compress_tiny(
        "bert", tmp_path, task=task, dense_steps=4, settings={"augment": 0.7}, more_text=0.5
    )
    open_checkpoint(checkpoint).require_valid()
    facts = read_metrics_of(CompressionMetrics, checkpoint).more_text
    assert facts is not None
    assert (facts.share, len(facts.sha256)) == (0.5, 64)
    logged = [json.loads(line) for line in (checkpoint / "train_log.jsonl").read_text().splitlines()]
    assert all(line["loss"] == line["loss"] for line in logged if "loss" in line)


def test_what_is_left_open_depends_on_task_teacher_and_width() -> None:
    classes, scores = TASKS["classification"], TASKS["regression"]
    taught = training_of(Settings(), classes, 384)
    assert (taught.learning_rate, taught.augment, taught.losses.task) == (1e-4, 0.7, 0.0)
    assert training_of(Settings(recipe="nxm"), classes, 384) == replace(taught, learning_rate=3e-4)
    assert training_of(Settings(), classes, 768).learning_rate == 5e-5
    assert training_of(Settings(), classes, 64) == taught  # not raised for narrower models
    for settings, task in ((Settings(), scores), (Settings(augment=0.0), classes)):
        assert training_of(settings, task, 768) == Training(1e-4, Losses(0.5, 1.0, 1.0), 0.0)
    assert training_of(Settings(), TASKS["multi-label"], 768) == Training(1e-4, taught.losses, 0.0)
    assert training_of(Settings(augment=0.3), scores, 384) == Training(1e-4, taught.losses, 0.3)
    for alone in (Settings(distill=False), Settings(recipe="paper")):
        assert training_of(alone, classes, 384) == Training(1e-4, Losses(), 0.0)
    given = Settings(learning_rate=5e-5, losses=Losses(1.0, 1.0, 1.0))
    assert training_of(given, classes, 384) == Training(5e-5, Losses(1.0, 1.0, 1.0), 0.7)


def test_what_it_cannot_be_used_for_is_refused() -> None:
    for name in ("classification", "token-classification", "embedding"):
        require_augmentable(TASKS[name])
    for name in ("regression", "multi-label", "question-answering"):
        with pytest.raises(DataError, match="leave --augment out"):
            require_augmentable(TASKS[name])
    with pytest.raises(DataError, match="nothing is distilled"):
        Settings(augment=0.5, distill=False)
    with pytest.raises(DataError, match="augment must be less than 1"):
        Settings(augment=1.0)

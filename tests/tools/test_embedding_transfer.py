"""How near two sets of embeddings are, against cases whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tools.experiments.embedding_transfer import nearness, read_pairs


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def test_a_model_is_as_near_as_can_be_to_itself() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(40, 16)))
    found = nearness(vectors, vectors)
    assert found == pytest.approx(
        {"mean_cosine": 1.0, "least_cosine": 1.0, "spearman_of_pair_scores": 1.0, "neighbours_kept": 1.0}, abs=1e-6
    )


def test_a_turned_space_keeps_scores_and_neighbours_and_no_cosine() -> None:
    """A rotation changes every vector and no angle between two of them."""
    random = np.random.default_rng(0)
    vectors = unit(random.normal(size=(40, 16)))
    rotation, _ = np.linalg.qr(random.normal(size=(16, 16)))
    found = nearness(vectors, unit(vectors @ rotation))
    assert abs(found["mean_cosine"]) < 0.3
    assert found["spearman_of_pair_scores"] == pytest.approx(1.0, abs=1e-3)
    assert found["neighbours_kept"] == pytest.approx(1.0, abs=0.01)


def test_one_sentence_that_moved_is_seen() -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(40, 16)))
    moved = vectors.copy()
    moved[7] = -moved[7]
    assert nearness(vectors, moved)["least_cosine"] == pytest.approx(-1.0, abs=1e-6)


def test_quotes_are_text(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text('sentence1\tsentence2\tlabel\n"a\tb "c"\t1\n', encoding="utf-8")
    assert read_pairs(tmp_path / "pairs.tsv") == [('"a', 'b "c"')]

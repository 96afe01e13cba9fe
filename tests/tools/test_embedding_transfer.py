"""How near two sets of embeddings are, against cases whose answer is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nxm_export.data.predictions import Embedding
from tools.experiments import embedding_transfer
from tools.experiments.embedding_transfer import embeddings, nearness, read_pairs


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


def test_vectors_of_an_engine_have_the_length_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Engine:
        """Stands in for a predictor of an engine directory."""

        def __init__(self, directory: Path) -> None:
            assert directory == tmp_path

        def __enter__(self) -> Engine:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def predict(self, texts: list[str]) -> list[Embedding]:
            return [Embedding(np.array([3.0, 4.0], np.float32)) for _ in texts]

    monkeypatch.setattr(embedding_transfer, "Predictor", Engine)
    assert embeddings(tmp_path, ["a", "b"]).tolist() == [pytest.approx([0.6, 0.8])] * 2


def test_quotes_are_text(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text('sentence1\tsentence2\tlabel\n"a\tb "c"\t1\n', encoding="utf-8")
    assert read_pairs(tmp_path / "pairs.tsv") == [('"a', 'b "c"')]

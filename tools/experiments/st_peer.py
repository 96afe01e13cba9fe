"""sentence-transformers with its INT8 backends, as a worker that encodes all sentences of a file whenever it is told
to.

    PYTHON tools/experiments/st_peer.py MODEL SENTENCES WORK

MODEL is a directory of a sentence-transformers model, SENTENCES a text file with one a line; quantized models are
written to WORK. It says ``ready`` with a JSON list of [name, versions, mean cosine with FP32] on one line, then reads
names from stdin and answers each with the seconds that tokenising and encoding took. Run by
`tools/benchmarks/cpu_embeddings.py` in an environment with sentence-transformers, optimum-onnx and optimum-intel, so
that its rounds stand between ours.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from sentence_transformers import (
    SentenceTransformer,
    export_dynamic_quantized_onnx_model,
    export_static_quantized_openvino_model,
)

BATCH = 32


def onnx_int8(model: str, work: Path, _: list[str]) -> SentenceTransformer:
    """Dynamic INT8, as its documentation recommends for AVX512-VNNI."""
    encoder = SentenceTransformer(model, backend="onnx", device="cpu")
    export_dynamic_quantized_onnx_model(encoder, "avx512_vnni", str(work / "onnx"))
    options = {"file_name": "onnx/model_qint8_avx512_vnni.onnx", "provider": "CPUExecutionProvider"}
    encoder.save_pretrained(str(work / "onnx"))
    return SentenceTransformer(str(work / "onnx"), backend="onnx", device="cpu", model_kwargs=options)


def openvino_int8(model: str, work: Path, sentences: list[str]) -> SentenceTransformer:
    """Static INT8, calibrated on the sentences."""
    from optimum.intel import OVQuantizationConfig

    data = work / "calibration"
    data.mkdir()
    with (data / "train.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["text"], *([text] for text in sentences[:200])])
    encoder = SentenceTransformer(model, backend="openvino", device="cpu")
    encoder.save_pretrained(str(work / "openvino"))
    export_static_quantized_openvino_model(
        encoder, OVQuantizationConfig(num_samples=min(100, len(sentences))), str(work / "openvino"),
        dataset_name=str(data), dataset_config_name="default", dataset_split="train", column_name="text",
    )  # fmt: skip
    config = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    options = {"file_name": "openvino/openvino_model_qint8_quantized.xml", "ov_config": config}
    return SentenceTransformer(str(work / "openvino"), backend="openvino", device="cpu", model_kwargs=options)


def main(model: str, file: str, work: str) -> None:
    """Make what can be made, say so, and serve."""
    sentences = Path(file).read_text(encoding="utf-8").splitlines()
    made: dict[str, SentenceTransformer] = {}
    for name, make in (("ONNX INT8", onnx_int8), ("OpenVINO INT8", openvino_int8)):
        try:
            made[name] = make(model, Path(work), sentences)
        except Exception as error:  # the other one is still worth timing; the reason is reported
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("sentence-transformers", "optimum", "onnxruntime", "openvino")
    )
    dense = SentenceTransformer(model, device="cpu").encode(sentences, normalize_embeddings=True)
    cosines = {
        name: float((dense * encoder.encode(sentences, normalize_embeddings=True)).sum(axis=1).mean())
        for name, encoder in made.items()
    }
    print("ready " + json.dumps([[name, versions, cosines[name]] for name in made]), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        made[line.strip()].encode(sentences, batch_size=BATCH, show_progress_bar=False)
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

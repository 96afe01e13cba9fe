"""Sentence embeddings of one model, ours and those of sentence-transformers: the same weights, the same pooling, the
same sentences.

The model is the one of the demo (all-MiniLM-L6-v2), every one of its matrices dense in INT8, calibrated on the
sentences and not trained: what both sides do to a model that they are given. How near each comes to the model in FP32
stands beside its speed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

import nxm_export as nxm
from engines.base import BuildOptions, LoadOptions, backend
from engines.benchmark.text_throughput import run_text
from engines.passport import load_passport
from nxm_export.contract.io_spec import load_spec
from nxm_export.data.columns import Columns
from nxm_export.data.examples import load_raw
from nxm_export.graph.exporter import export
from nxm_export.pipeline.demo import model_directory
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.pipeline.engine_timing import bench_text
from nxm_export.pipeline.labelled_texts import features_of
from nxm_export.storage.json_files import convert
from tools import ROOT
from tools.benchmarks.cpu_record import TextRecord, TimedEmbeddings

TEXT_PEERS = "NXM_TEXT_PEERS_PYTHON"
PEER = ROOT / "tools" / "experiments" / "st_peer.py"
LONGEST, CALIBRATION = 128, 200  # tokens; sentences
# name: (placement, backend); None is the model in FP32
ENGINES = {
    "FP32-ort": (None, "ort"),
    "INT8-ort": ("inputs", "ort"),
    "INT8-all-products-openvino": ("products", "openvino"),
}


def measure_embeddings(data: Path, work: Path, threads: int, rounds: int) -> TimedEmbeddings:
    """Time the sentences of a data file, ours and theirs in turns, in the directory `work`."""
    work.mkdir()
    pairs, sentences = write_pairs(data, work)
    directories = build_engines(pairs, work, threads)
    with ExitStack() as stack:
        workers, cosines, versions = _workers(sentences, work, stack)
        ours = [directory for name, directory in directories.items() if name != "FP32-ort"]
        report = bench_text(ours, str(pairs), threads=threads, rounds=rounds, others=workers)
    return {
        "text": convert(report.to_dict(), TextRecord, source="embeddings", way_out="measure again"),
        "cosine": cosines_to_float(directories, pairs, threads) | cosines,
        "peers": versions,
    }


def write_pairs(data: Path, work: Path) -> tuple[Path, Path]:
    """(a file with the sentences of `data` as pairs, as embeddings are read, and one with a sentence a line): the same
    ones in the same order. A sentence without a neighbour is left out; the labels are made up, and nothing reads them.
    """
    texts = [" ".join(text.split()) for text in load_raw(str(data), "dev").texts]
    texts = texts[: len(texts) // 2 * 2]
    rows = [
        f"{first}\t{second}\t{row % 5}" for row, (first, second) in enumerate(zip(texts[::2], texts[1::2], strict=True))
    ]
    pairs, sentences = work / "pairs.tsv", work / "sentences.txt"
    pairs.write_text("\n".join(["sentence1\tsentence2\tscore", *rows]) + "\n", "utf-8")
    sentences.write_text("\n".join(texts) + "\n", "utf-8")
    return pairs, sentences


def build_engines(pairs: Path, work: Path, threads: int) -> dict[str, Path]:
    """Engine directories by the names of `ENGINES`."""
    model, checkpoint = model_directory(), work / "checkpoint"
    nxm.compress(
        model,
        train=pairs,
        dev=pairs,
        out=checkpoint,
        task="embedding",
        pattern=None,
        settings=nxm.Settings(steps=0, max_length=LONGEST, threads=threads),
        options=nxm.PlanOptions(placement="products"),
        train_limit=CALIBRATION,
    )
    directories = {}
    for name, (placement, runtime) in ENGINES.items():
        source = model if placement is None else checkpoint
        graph = export(source, work / f"graph-{name}", target="cpu", task="embedding", placement=placement).path
        directories[name] = work / name
        build_engine(graph, directories[name], runtime, BuildOptions(threads=threads))
    return directories


def cosines_to_float(directories: Mapping[str, Path], pairs: Path, threads: int) -> dict[str, float]:
    """Mean cosine of every engine's embeddings with those in FP32, by name."""
    vectors = {}
    for name, directory in directories.items():
        features, pad_id = features_of(directory, str(pairs), Columns()), load_spec(directory).pad_id
        with backend(load_passport(directory).backend).load(directory, LoadOptions(threads)) as engine:
            outputs = run_text(engine, features, "bucketed", batch=32, fixed=LONGEST, pad_id=pad_id)
        (made,) = outputs.values()
        vectors[name] = made / np.linalg.norm(made, axis=1, keepdims=True)
    dense = vectors.pop("FP32-ort")
    return {name: float(np.mean(np.sum(made * dense, axis=1))) for name, made in vectors.items()}


def _workers(
    sentences: Path, work: Path, stack: ExitStack
) -> tuple[dict[str, Callable[[], float]], dict[str, float], str | None]:
    """sentence-transformers' INT8 backends as workers that encode the same sentences, their mean cosines with FP32, and
    their versions."""
    python = os.environ.get(TEXT_PEERS)
    if not python:
        return {}, {}, None
    scratch = work / "text-peers"
    scratch.mkdir()
    command = [python, str(PEER), str(model_directory()), str(sentences), str(scratch)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    environment.pop("OMP_NUM_THREADS", None)
    log = stack.enter_context((work / "text-peers.log").open("w", encoding="utf-8"))
    worker = stack.enter_context(
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1, env=environment
        )
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    answers, questions = worker.stdout, worker.stdin
    stack.callback(questions.close)
    line = next((line for line in answers if line.startswith("ready ")), "ready []")
    made = json.loads(line.removeprefix("ready "))

    def ask(name: str) -> Callable[[], float]:
        def seconds() -> float:
            questions.write(f"{name}\n")
            questions.flush()
            return float(answers.readline())

        seconds()  # warm-up
        return seconds

    for reason in (work / "text-peers.log").read_text(encoding="utf-8").splitlines():
        if "INT8: " in reason:
            print(reason, file=sys.stderr)
    named = {f"sentence-transformers, {name}": (ask(name), float(cosine)) for name, _, cosine in made}
    workers = {name: worker for name, (worker, _) in named.items()}
    return workers, {name: cosine for name, (_, cosine) in named.items()}, made[0][1] if made else None

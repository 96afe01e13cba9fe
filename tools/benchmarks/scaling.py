"""How everything around training grows with the model: seconds and peak memory from MiniLM to BERT-large shapes.

    python -m tools.benchmarks.scaling            measure, write results/performance/scaling.json and the document
    python -m tools.benchmarks.scaling --render   the section of docs/performance.md and its picture, from the record

Weights are random, on 2:4 and a 4 bit grid. Every stage runs in a process of its own, so that its memory mark is its
own; seconds are those of the stage, without Python's start and imports. Exponents are fitted to the largest three
sizes: what a stage costs however small the model (tracing, optimizer passes over an empty graph) is no growth. Packing,
unpacking and projecting work on planned weights, whose share of all parameters grows with the model, so theirs is
fitted to both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import numpy as np

from nxm_export.contract.plan import CompressionPlan, NMPattern, WeightSpec
from tools import ROOT
from tools.benchmarks.measuring import (
    DOCUMENT,
    RECORDS,
    Circumstances,
    Marks,
    Median,
    circumstances,
    fitted_exponent,
    in_child,
    load_record,
    median_of,
    peak_bytes,
    resident_bytes,
    save_record,
    where_and_when,
)
from tools.benchmarks.scaling_chart import CHART, draw
from tools.rendering import render, write_section

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from nxm_export.hf.protocols import AutoClass

TOOL, TOOL_MODULE = "tools/benchmarks/scaling.py", "tools.benchmarks.scaling"
FILE = RECORDS / "scaling.json"
SIZES = {
    "MiniLM-L6": (384, 1536, 6, 12),
    "MiniLM-L12": (384, 1536, 12, 12),
    "BERT-base, 6 of 12 blocks": (768, 3072, 6, 12),
    "BERT-base": (768, 3072, 12, 12),
    "BERT-large, 12 of 24 blocks": (1024, 4096, 12, 16),
    "BERT-large": (1024, 4096, 24, 16),
}
SMOKE_SIZES = {"tiny": (32, 64, 2, 4), "small": (64, 128, 2, 4)}
STAGES = ("export", "verify", "pack", "unpack", "projection")
ON_PLANNED = ("pack", "unpack", "projection")
SEQUENCES: tuple[int, ...] = (128, 256, 512, 1024)
TOKENS = 32
VOCABULARY, POSITIONS = 30522, 512
REPEATS = 5
ANSWERS = {
    "help": "`nxm --help`",
    "first answer": "an engine's first answer in a new process",
    "serve": "first answer of `nxm serve`",
}
LIMITS = {"help": 0.3, "serve": 2.0}


class Stage(Marks):
    """A stage at one size."""

    seconds: float
    cpu_seconds: float


class Size(TypedDict):
    """All stages at one size."""

    name: str
    parameters: int
    planned: int
    model_bytes: int
    onnx_bytes: int
    stages: dict[str, Stage]


class Calibrated(Marks):
    """Calibrating, without saying on how many sequences."""

    seconds: float


class Calibration(Calibrated):
    """Calibrating on this many sequences."""

    sequences: int


class Heavy(TypedDict):
    """The heavy libraries that an answer took."""

    heavy: list[str]


# Seconds to an answer by the keys of `ANSWERS`.
Answers = TypedDict("Answers", {"help": Median, "first answer": Median, "serve": Median, "heavy_modules": list[str]})


class Record(Circumstances):
    """The file ``scaling.json``."""

    schema: str
    sizes: list[Size]
    calibration: list[Calibration]
    answers: Answers
    exponents: dict[str, float]


def write_checkpoint(
    out: Path, hidden: int, wide: int, layers: int, heads: int, *, weights: str = "2:4+W4", embedding: str = "float"
) -> None:
    """A compressed checkpoint of a BERT classifier of these sizes, with random weights and a tokenizer.

    `weights` is their spec, of 4 bits; they lie on 2:4 whether it says so or not.
    """
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    write_random(out, config, weights=weights, embedding=embedding)


def write_random(out: Path, config: PreTrainedConfig, *, weights: str = "2:4+W4", embedding: str = "float") -> None:
    """A compressed checkpoint of a classifier of any family, as `write_checkpoint` makes it."""
    import torch
    import transformers
    from safetensors.numpy import save_file

    from nxm_export.contract.checkpoint import save_plan
    from nxm_export.contract.families import family_of

    with torch.device("meta"):
        model = cast("AutoClass", transformers.AutoModelForSequenceClassification).from_config(config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    config.architectures = [type(model).__name__]
    family, rng = family_of(config.to_dict()), np.random.default_rng(0)
    plan = family.uniform_plan(config.to_dict(), WeightSpec.parse(weights), embedding=embedding)
    tensors: dict[str, np.ndarray] = {}
    scales: dict[str, np.ndarray] = {}
    for name, shape in shapes.items():
        if name.endswith("position_ids"):
            continue
        spec = plan.weights.get(name)
        if name == family.word_embedding and embedding == "int8":
            scale = np.full(shape[0], 1e-3, np.float32)
            codes = rng.integers(-127, 128, shape, np.int8)
            tensors[name], scales[f"{name}_scale"] = codes * scale[:, None], scale
            continue
        if spec is None:
            tensors[name] = (
                rng.standard_normal(shape, np.float32) * 0.02 if len(shape) > 1 else np.ones(shape, np.float32)
            )
            continue
        codes = rng.integers(-7, 8, shape, np.int8)
        codes.reshape(-1, 4)[:, 1::2] = 0
        scale = np.full(shape[0], 0.01, np.float32)
        tensors[name], scales[f"{name}_scale"] = codes * scale[:, None] + np.float32(0), scale
        if spec.input_bits:
            scales[f"{name.removesuffix('.weight')}.input_scale"] = np.array(0.03, np.float32)
        for part in family.parts(name) if spec.output_bits else ():
            scales[f"{part.removesuffix('.weight')}.output_scale"] = np.array(0.03, np.float32)
    out.mkdir(parents=True)
    config.save_pretrained(out)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    save_plan(out, plan, scales)
    _write_tokenizer(out)


def _write_tokenizer(out: Path) -> None:
    """The smallest tokenizer that a checkpoint can have: nothing here reads text."""
    from tokenizers import Tokenizer, models

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = {token: number for number, token in enumerate(special.values())}
    Tokenizer(models.WordLevel(words, unk_token=special["unk_token"])).save(str(out / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": POSITIONS, **special}
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def run_stage(stage: str, directory: Path) -> Stage | None:
    """One stage in this process: imports first, then the clock and the memory mark."""
    checkpoint, graph, packed = directory / "checkpoint", directory / "onnx", directory / "packed.safetensors"
    work: Callable[[], object]
    if stage == "make":
        hidden, wide, layers, heads = (SIZES | SMOKE_SIZES)[directory.name]
        write_checkpoint(checkpoint, hidden, wide, layers, heads)
        return None
    if stage == "export":
        import onnxscript.optimizer  # noqa: F401
        import torch
        import transformers

        transformers.BertForSequenceClassification  # noqa: B018  (loaded when it is asked for)
        from nxm_export.graph.exporter import export

        torch.onnx.export  # noqa: B018
        work = lambda: export(checkpoint, graph)  # noqa: E731
    elif stage == "verify":
        from nxm_export.graph.verifier import verify

        work = lambda: verify(graph / "model.onnx").require()  # noqa: E731
    elif stage in ("pack", "unpack"):
        from nxm_export.contract import packed_checkpoint

        work = (
            (lambda: packed_checkpoint.pack(checkpoint, packed))
            if stage == "pack"
            else (lambda: packed_checkpoint.unpack(packed, directory / "unpacked"))
        )
    else:
        import compressors.projections  # noqa: F401
        from nxm_export.contract.checkpoint import open_checkpoint

        plan = open_checkpoint(checkpoint).plan
        work = lambda: project_all(plan)  # noqa: E731
    before = resident_bytes()
    began, used = time.perf_counter(), time.process_time()
    work()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - used
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "before": before, "peak": peak_bytes()}


def project_all(plan: CompressionPlan) -> None:
    """The mask projection of a dual update, over weights of all the shapes of a plan, one at a time."""
    import torch

    from compressors.projections import PROJECTIONS

    weights = {shape: torch.randn(shape) for shape in set(plan.shapes.values())}
    for shape in plan.shapes.values():
        PROJECTIONS["mask"](weights[shape], WeightSpec(NMPattern(2, 4), 4, 8))


def measure_sizes(names: Sequence[str], scratch: Path) -> list[Size]:
    """Every stage at every size."""
    rows: list[Size] = []
    for name in names:
        directory = scratch / name
        options = (TOOL_MODULE, "--directory", str(directory), "--child")
        in_child(type(None), *options, "make")
        stages = {stage: in_child(Stage, *options, stage) for stage in STAGES}
        hidden, wide, layers, _ = (SIZES | SMOKE_SIZES)[name]
        rows.append(
            {
                "name": name,
                "parameters": (VOCABULARY + 514) * hidden + layers * (4 * hidden**2 + 2 * hidden * wide) + hidden**2,
                "planned": layers * (4 * hidden**2 + 2 * hidden * wide),
                "model_bytes": (directory / "checkpoint" / "model.safetensors").stat().st_size,
                "onnx_bytes": (directory / "onnx" / "model.onnx").stat().st_size,
                "stages": stages,
            }
        )
        told = ", ".join(f"{stage} {marks['seconds']:.1f} s" for stage, marks in stages.items())
        print(f"{name}: {told}", file=sys.stderr, flush=True)
        if name != names[0]:
            shutil.rmtree(directory)
    return rows


def calibrate_here(sequences: int) -> Calibrated:
    """Seconds and peak memory of calibrating a MiniLM-L6 on this many sequences of 32 tokens."""
    import torch

    from compressors.freed_memory import keep_freed_memory
    from compressors.quantization.prepare_bake import calibrate
    from tools.benchmarks.training import prepared

    keep_freed_memory()
    model = prepared("MiniLM-L6").eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, VOCABULARY, (sequences, TOKENS), generator=generator)
    before = resident_bytes()
    began = time.perf_counter()
    calibrate(
        model, ({"input_ids": part, "attention_mask": torch.ones_like(part)} for part in torch.split(ids, 32)), 99.99
    )
    return {"seconds": time.perf_counter() - began, "before": before, "peak": peak_bytes()}


def measure_answers(engine: Path, repeats: int) -> Answers:
    """Seconds to the help text, to the first answer of an engine in a fresh process, and to that of ``nxm serve``."""
    help_seconds, first_seconds, serve_seconds = [], [], []
    modules: list[str] = []
    for _ in range(repeats):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nxm_export", "--help"], cwd=ROOT, capture_output=True, check=True)
        help_seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        answer = in_child(Heavy, TOOL_MODULE, "--child", "answer", "--directory", str(engine))
        first_seconds.append(time.perf_counter() - began)
        modules = answer["heavy"]
        serve_seconds.append(seconds_to_first_answer(engine))
    return {
        "help": median_of(help_seconds),
        "first answer": median_of(first_seconds),
        "serve": median_of(serve_seconds),
        "heavy_modules": modules,
    }


def answer_here(engine: Path) -> Heavy:
    """Load an engine, ask it once, and say which heavy libraries that took."""
    from engines.base import backend
    from engines.passport import load_passport

    with backend(load_passport(engine).backend).load(engine) as loaded:
        ids = np.ones((1, 16), np.int64)
        loaded.run({"input_ids": ids, "attention_mask": ids, "token_type_ids": ids * 0})
    return {"heavy": sorted({"torch", "transformers", "onnx", "onnxscript"} & set(sys.modules))}


def seconds_to_first_answer(engine: Path) -> float:
    """From starting ``nxm serve`` to the answer of its first inference request."""
    import urllib.error
    import urllib.request

    from tools.benchmarks.servers import free_port

    port = free_port()
    tensors = [
        {"name": name, "shape": [1, 16], "datatype": "INT64", "data": [value] * 16}
        for name, value in (("input_ids", 1), ("attention_mask", 1), ("token_type_ids", 0))
    ]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v2/models/m/infer",
        json.dumps({"inputs": tensors}).encode(),
        {"Content-Type": "application/json"},
    )
    began = time.perf_counter()
    command = [sys.executable, "-m", "nxm_export", "serve", "--port", str(port), f"m={engine}"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while time.perf_counter() - began < 60:
            try:
                with urllib.request.urlopen(request, timeout=30):
                    return time.perf_counter() - began
            except urllib.error.HTTPError as error:
                if error.code != 503:  # not ready yet
                    raise
            except urllib.error.URLError:
                pass
            time.sleep(0.01)
        raise RuntimeError("nxm serve gave no answer within 60 s")
    finally:
        process.terminate()
        process.wait()


def build_engine(graph: Path, out: Path) -> None:
    """An ONNX Runtime engine directory of an exported graph."""
    command = [sys.executable, "-m", "nxm_export", "build", str(graph), "--backend", "ort", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nxm build failed:\n{done.stderr[-2000:]}")


def measure(names: Sequence[str], sequences: Sequence[int], repeats: int) -> Record:
    """The record; the engine that answers is of the first size."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = measure_sizes(names, Path(scratch))
        engine = Path(scratch) / "engine"
        build_engine(Path(scratch) / names[0] / "onnx" / "model.onnx", engine)
        answers = measure_answers(engine, repeats)
    calibration: list[Calibration] = [
        {"sequences": count, **in_child(Calibrated, TOOL_MODULE, "--child", "calibrate", "--sequences", str(count))}
        for count in sequences
    ]
    return {
        "schema": "nxm-bench-scaling/1",
        **circumstances(
            len(os.sched_getaffinity(0)), ("torch", "transformers", "onnx-ir", "onnxscript", "onnxruntime")
        ),
        "sizes": rows,
        "calibration": calibration,
        "answers": answers,
        "exponents": exponents(rows, calibration),
    }


def exponents(rows: Sequence[Size], calibration: Sequence[Calibration]) -> dict[str, float]:
    """Fitted growth: stages in parameters, `ON_PLANNED` in planned weights, too, calibration in sequences."""
    last = rows[-3:]
    growth = {
        stage: fitted_exponent([row["parameters"] for row in last], [row["stages"][stage]["seconds"] for row in last])
        for stage in STAGES
    }
    for stage in ON_PLANNED:
        seconds = [row["stages"][stage]["seconds"] for row in last]
        growth[f"{stage} by planned weights"] = fitted_exponent([row["planned"] for row in last], seconds)
    growth["calibration"] = fitted_exponent(
        [row["sequences"] for row in calibration], [row["seconds"] for row in calibration]
    )
    return growth


def section(record: Record) -> str:
    """The section of a record; the text stands in ``scaling.md.j2``."""
    answers = record["answers"]
    calibration = (
        f"{row['sequences']}: {row['seconds']:.1f} s and {(row['peak'] - row['before']) / 1e6:.0f} MB"
        for row in record["calibration"]
    )
    return render(
        "benchmarks/scaling.md.j2",
        where_and_when=where_and_when(record),
        stages=list(STAGES),
        sizes=[_size_cells(row) for row in record["sizes"]],
        exponents=[f"{name} {value:.2f}" for name, value in record["exponents"].items()],
        picture=CHART.markup(),
        calibration=list(calibration),
        answers=[_answer_cells(key, answers[key]) for key in ("help", "first answer", "serve")],
        heavy_modules=answers["heavy_modules"],
    )


def _size_cells(row: Size) -> list[str]:
    numbers = [f"{row['parameters'] / 1e6:.1f}", f"{row['planned'] / 1e6:.1f}", f"{row['model_bytes'] / 1e6:.0f}"]
    return [row["name"], *numbers, *(_stage_text(row, stage) for stage in STAGES)]


def _stage_text(row: Size, stage: str) -> str:
    marks = row["stages"][stage]
    added = (marks["peak"] - marks["before"]) / row["model_bytes"]
    memory = "" if stage == "projection" else f" ({added:.1f}x)"
    return f"{marks['seconds']:.2f} s{memory}"


def _answer_cells(key: str, median: Median) -> list[str]:
    low, high = median["interval"]
    limit = f"<= {LIMITS[key]:g}" if key in LIMITS else ""
    return [ANSWERS[key], f"{median['median']:.2f} ({low:.2f} to {high:.2f})", limit]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1,3,4,6", help=f"of 1 to {len(SIZES)}: {'; '.join(SIZES)}")
    parser.add_argument("--render", action="store_true", help="only write the document again")
    parser.add_argument("--print", action="store_true", help="print the section, write nothing")
    parser.add_argument("--smoke", action="store_true", help="tiny models: whether the bench runs; implies --print")
    parser.add_argument("--child", choices=("make", *STAGES, "calibrate", "answer"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--sequences", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.child:
        result: Calibrated | Heavy | Stage | None
        if chosen.child == "calibrate":
            result = calibrate_here(chosen.sequences)
        elif chosen.child == "answer":
            result = answer_here(chosen.directory)
        else:
            result = run_stage(chosen.child, chosen.directory)
        print(json.dumps(result))
        return
    names = [list(SIZES)[int(number) - 1] for number in chosen.sizes.split(",")]
    sequences, repeats = SEQUENCES, REPEATS
    if chosen.smoke:
        names, sequences, repeats = list(SMOKE_SIZES), (32, 64), 1
    record = load_record(FILE, Record) if chosen.render else measure(names, sequences, repeats)
    if chosen.print or chosen.smoke:
        print(section(record))
        return
    save_record(FILE, record)
    draw(record, STAGES, DOCUMENT.parent / "images")
    write_section(DOCUMENT, TOOL, section(record))


if __name__ == "__main__":
    main()

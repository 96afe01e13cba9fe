"""One command on a machine with an NVIDIA GPU: build, inspect, compare and time everything that a claim about 2:4
needs.

    python -m tools.gpu.evidence                      # MiniLM-L6, BERT-base and BERT-large shapes; about an hour
    python -m tools.gpu.evidence --models minilm --shapes 1x128,32x128 --rounds 30 --budget 600

Writes ``docs/gpu/<gpu>-<tensorrt version>.md`` with raw reports beside it, losing cases included. Models have the
shapes of the real ones and random weights, pruned 2:4 and quantized without training: kernels and latencies do not
depend on what the weights say, and parity is against PyTorch on the same weights. Each variant's result is kept under
``--work``: run the same command again after an interruption and it goes on; other shapes, rounds or levels are measured
anew.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from engines.base import BuildOptions, Profile
from engines.benchmark.latency import BenchReport
from engines.sparsity.sparsity_report import SparsityReport
from nxm_export.data.features import Features
from nxm_export.errors import NxmError
from nxm_export.hf.protocols import AutoClass
from nxm_export.storage.atomic import atomic_dir, write_atomic
from nxm_export.storage.json_files import encode, read_record
from tools.gpu.arguments import fitting, names_of, shapes
from tools.rendering import render

# name -> (hidden, layers, heads, positions)
MODELS = {
    "tiny": (256, 1, 4, 64),
    "minilm": (384, 6, 12, 512),
    "bert-base": (768, 12, 12, 512),
    "bert-large": (1024, 24, 16, 512),
}
SHAPES = ("1x128", "8x128", "32x128", "128x128", "1x384", "8x384", "32x384", "128x384")
AIMS = {"dense": 1.3, "fp16": 2.2}  # sparse INT8 over each, at BERT-large, batch 128, sequence 384
AIMED_AT = ("bert-large", 128, 384)
MUST_BE_SPARSE = "-cask:sparsity=must"
SCHEMA = "nxm-gpu-evidence/1"
FP16, DENSE, SPARSE = "fp16", "int8-dense", "int8-sparse"


@dataclass(frozen=True)
class Variant:
    """One question: this model, with these quantizers, this GELU, and products written this way."""

    model: str
    placement: str
    gelu: str
    lowering: str

    @property
    def name(self) -> str:
        return f"{self.model}-{self.placement}-{self.gelu}-{self.lowering}"


@dataclass(frozen=True)
class Sparsity:
    """Matrices that were planned sparse, those that provably run sparse, their share, and matrices by outcome."""

    planned: int
    chosen: int
    share: float | None
    counts: dict[str, int]


@dataclass(frozen=True)
class Parity:
    """The largest difference of an engine's outputs from PyTorch's, and what is tolerated."""

    passed: bool
    max_abs: float | None
    tolerated: float | None


@dataclass(frozen=True)
class Forced:
    """What came of asking for sparse kernels only: their share, or the builder's error."""

    share: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Result:
    """What one variant came to; `error` alone where it could not be built, compared or timed."""

    variant: Variant
    shapes: list[tuple[int, int]]
    error: str | None = None
    build_seconds: float | None = None
    sparsity: Sparsity | None = None
    log: tuple[str, ...] = ()
    parity: dict[str, Parity] | None = None
    bench: BenchReport | None = None
    forced: Forced | None = None


@dataclass(frozen=True)
class Plan:
    """How variants are measured: shapes as (batch, sequence), rounds of timing, the builder's level, and where things
    go."""

    shapes: list[tuple[int, int]]
    rounds: int
    level: int
    work: Path
    weakly_typed: bool

    @property
    def name(self) -> str:
        """The name of what is kept of it."""
        shapes = "+".join(f"{batch}x{sequence}" for batch, sequence in self.shapes)
        return f"{shapes},rounds-{self.rounds},level-{self.level}"


def variants(model: str, weakly_typed: bool, capability: str) -> list[Variant]:
    """Against the base variant, one thing is changed at a time. On sm90, TensorRT 8.6 has sparse convolutions only."""
    first = "conv1x1" if weakly_typed and capability == "9.0" else "matmul"
    base = Variant(model, "attention", "tanh", first)
    second = "matmul" if first == "conv1x1" else "conv1x1"
    return [
        base,
        replace(base, placement="inputs-outputs"),
        replace(base, placement="inputs"),
        replace(base, gelu="erf"),
        replace(base, lowering=second),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = "minilm,bert-base,bert-large"
    parser.add_argument("--models", type=names_of(MODELS), default=models, help=f"of {', '.join(MODELS)}")
    parser.add_argument("--shapes", type=shapes, default=",".join(SHAPES), help="batch x sequence, comma-separated")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--level", type=int, default=4, help="builder optimization level")
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--budget", type=float, help="seconds after which no further variant is begun")
    parser.add_argument("--out", type=Path, default=Path("docs/gpu"))
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-evidence"))
    options = parser.parse_args(arguments)
    from engines.tensorrt import backend as trt
    from engines.tensorrt.cuda_driver import device_facts

    began = time.monotonic()
    try:
        device, version = device_facts(), trt._runtime().__version__
    except NxmError as error:
        print(f"tools.gpu.evidence: {error}", file=sys.stderr)
        return 1
    weakly_typed = int(version.split(".")[0]) < 10
    plan = Plan(options.shapes, options.rounds, options.level, options.work, weakly_typed)
    results = []
    for model in options.models:
        for variant in variants(model, weakly_typed, device["compute_capability"]):
            if options.only not in variant.name:
                continue
            file = kept_at(plan, version, device["gpu"], variant)
            if not file.is_file():
                if options.budget is not None and time.monotonic() - began > options.budget:
                    print(f"no time for {variant.name}; the same command goes on", file=sys.stderr, flush=True)
                    continue
                print(f"{time.strftime('%H:%M:%S')} {variant.name}", file=sys.stderr, flush=True)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(file, encode(measure(variant, plan), SCHEMA))
            results.append(read_record(file, Result, schema=SCHEMA, way_out="remove it, and it is measured again"))
    print(write_page(options.out, device, version, results))
    return 0


def kept_at(plan: Plan, version: str, gpu: str, variant: Variant) -> Path:
    """Where the result of a variant is kept: by all that it depends on."""
    return plan.work / version / gpu.replace(" ", "_") / plan.name / f"{variant.name}.json"


def measure(variant: Variant, plan: Plan) -> Result:
    """Build the twins of one variant, then count, compare and time. An error is a result, too."""
    from nxm_export.pipeline.engine_timing import bench_engines
    from nxm_export.pipeline.sparsity_twins import TwinGraphs, build_twins

    work = plan.work / "build" / plan.name / variant.name
    result = Result(variant, [])
    try:
        taken = fitting(plan.shapes, MODELS[variant.model][3])
        result = replace(result, shapes=taken)
        checkpoint = one_shot(variant, plan.work / "checkpoints")
        exported = TwinGraphs("trt8" if plan.weakly_typed else "trt", variant.lowering, variant.placement)
        settings = BuildOptions(profiles=profiles_of(taken), level=plan.level)
        began = time.monotonic()
        built = build_twins(checkpoint, work, "trt", settings, exported)
        unbuilt = [f"{name} could not be built: {why}" for name, why in built.failed.items()]
        seconds = round(time.monotonic() - began, 1)
        result = replace(result, build_seconds=seconds, error="; ".join(unbuilt) or None, log=_log(work))
        steps: tuple[Callable[[Result], Result], ...] = (
            lambda known: replace(known, sparsity=_sparsity(_measured(work))),
            lambda known: replace(known, parity=parity(checkpoint, work, max(sequence for _, sequence in taken))),
            lambda known: replace(known, bench=bench_engines([work], taken, plan.rounds, None)),
        )
        for step in steps:
            try:
                result = step(result)
            except NxmError as error:  # the other steps do not depend on it
                result = replace(result, error=result.error or str(error))
        if result.sparsity is not None and not result.sparsity.share:
            result = replace(result, forced=force(work, settings))
    except NxmError as error:
        result = replace(result, error=str(error))
    return result


def _log(work: Path) -> tuple[str, ...]:
    """What the builder of the sparse twin said about sparsity."""
    file = work / SPARSE / "build.log"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    return tuple(line for line in lines if "(Sparsity)" in line)


def _measured(work: Path) -> SparsityReport | None:
    """The sparsity report of the sparse twin, its layers and the dense one's timed."""
    from nxm_export.pipeline.inspection import EngineInspection, inspect_path

    inspected = inspect_path(work, measure=True)
    assert isinstance(inspected, EngineInspection)
    return inspected.sparsity


def profiles_of(shapes: Sequence[tuple[int, int]]) -> list[Profile]:
    """One profile per sequence length, tuned for the largest batch of it: what a server would build."""
    lengths = sorted({sequence for _, sequence in shapes})
    largest = {length: max(batch for batch, sequence in shapes if sequence == length) for length in lengths}
    return [Profile((1, 1), (largest[length], length), (largest[length], length)) for length in lengths]


def _sparsity(report: SparsityReport | None) -> Sparsity:
    assert report is not None, "TensorRT's backend always gives one"
    planned = [weight for weight in report.weights if weight.planned_sparse]
    chosen = sum(weight.chosen is True for weight in planned)
    return Sparsity(len(planned), chosen, report.sparse_share, report.counts)


def one_shot(variant: Variant, directory: Path) -> Path:
    """A checkpoint of the model's shape: random weights, calibrated on random tokens, pruned by magnitude, baked."""
    import torch
    import transformers

    from compressors.quantization.fake_quant import quant_linears
    from compressors.quantization.prepare_bake import bake, calibrate, prepare
    from nxm_export.contract.checkpoint import open_checkpoint, save_plan
    from nxm_export.contract.encoder_family import GELUS
    from nxm_export.contract.families import FAMILIES
    from nxm_export.contract.plan import WeightSpec

    out = directory / f"{variant.model}-{variant.gelu}"
    if out.is_dir():
        return out
    hidden, layers, heads, positions = MODELS[variant.model]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        hidden_act=GELUS[variant.gelu],
    )
    made = cast("AutoClass", transformers.AutoModelForSequenceClassification)
    model = torch.nn.Module.eval(made.from_config(config, attn_implementation="eager"))
    family, facts = FAMILIES["bert"], config.to_dict()
    plan = family.uniform_plan(facts, WeightSpec.parse("2:4+W8"), placement="attention")
    prepare(model, plan, family, facts)
    ids = torch.randint(5, 30522, (4, min(64, positions)))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    calibrate(model, [batch], 99.99)
    for layer in quant_linears(model).values():
        layer.freeze_mask()
    scales = bake(model, plan)
    with atomic_dir(out) as scratch:
        model.save_pretrained(scratch)
        save_plan(scratch, plan, scales)
        open_checkpoint(scratch).require_valid()
    return out


def parity(checkpoint: Path, work: Path, longest: int, vocabulary: int = 30522) -> dict[str, Parity]:
    """The INT8 engines against PyTorch on 32 random sentences: the same tolerance as for everything else."""
    import numpy as np

    from engines.parity.compare import compare
    from nxm_export.pipeline.sparsity_twins import twin_directories

    rng = np.random.default_rng(0)
    features: list[Features] = []
    for _ in range(32):
        length = int(rng.integers(4, min(48, longest) + 1))
        ids = [int(token) for token in rng.integers(5, vocabulary, size=length)]
        features.append({"input_ids": ids, "attention_mask": [1] * length, "token_type_ids": [0] * length, "labels": 0})
    results = {}
    for name in (twin for twin in (SPARSE, DENSE) if twin in twin_directories(work)):
        report = compare(checkpoint, work / name, features)
        output = report.outputs[0]
        results[name] = Parity(report.passed, output.max_abs, output.max_tolerance)
    return results


def force(work: Path, settings: BuildOptions) -> Forced:
    """No sparse kernel ran: does one exist? Ask the builder to take sparse ones only, where it lists that as public."""
    from nxm_export.pipeline.engine_builds import build_engine
    from nxm_export.pipeline.inspection import inspect_engine

    out = work.with_name(f"{work.name}-must")
    try:
        build_engine(work / "onnx" / "int8" / "model.onnx", out, "trt", replace(settings, build_route=MUST_BE_SPARSE))
        return Forced(share=_sparsity(inspect_engine(out).sparsity).share)
    except NxmError as error:
        return Forced(error=str(error))


def write_page(out: Path, device: Mapping[str, str], version: str, results: Sequence[Result]) -> Path:
    """The Markdown page and, beside it, the raw results."""
    name = f"{device['gpu'].replace(' ', '-').lower()}-{version}"
    raw = out / name
    raw.mkdir(parents=True, exist_ok=True)
    for result in results:
        write_atomic(raw / f"{result.variant.name}.json", encode(result, SCHEMA))
    text = render(
        "gpu/evidence.md.j2",
        device=device,
        version=version,
        platform=platform.platform(),
        date=time.strftime("%Y-%m-%d"),
        name=name,
        kernels=[_kernel_cells(result) for result in results],
        latencies=[cells for result in results for cells in _latency_cells(result)],
        verdicts={result.variant.name: result.bench.verdict for result in results if result.bench},
        aims=AIMS,
        best=_best(results),
        forced={result.variant.name: _cell(_outcome(result.forced)) for result in results if result.forced},
    )
    page = out / f"{name}.md"
    write_atomic(page, f"{text}\n")
    return page


def _kernel_cells(result: Result) -> list[str]:
    sparsity = result.sparsity
    counts = sparsity.counts if sparsity is not None else {}
    why = [f"{count} {reason}" for reason, count in counts.items() if reason not in ("sparse", "not-planned")]
    if result.error is not None or sparsity is None:
        why.append(f"error: {_cell(result.error or 'not measured')}")
    verdicts = {twin: "pass" if entry.passed else "FAIL" for twin, entry in (result.parity or {}).items()}
    return [
        result.variant.name,
        "-" if sparsity is None else f"{sparsity.chosen} / {sparsity.planned}",
        "-" if sparsity is None or sparsity.share is None else f"{sparsity.share:.1%}",
        ", ".join(why) or "-",
        ", ".join(f"{twin}: {verdict}" for twin, verdict in verdicts.items()) or "-",
        "-" if result.build_seconds is None else str(result.build_seconds),
    ]


def _latency_cells(result: Result) -> Iterator[list[str]]:
    if result.bench is None:
        return
    times = {(t.name, t.batch, t.sequence): t.median for t in result.bench.timings}
    ratios = {(r.name, r.batch, r.sequence): r for r in result.bench.ratios}
    for batch, sequence in dict.fromkeys((t.batch, t.sequence) for t in result.bench.timings):
        fp16, dense, sparse = (times.get((name, batch, sequence)) for name in (FP16, DENSE, SPARSE))
        ratio = ratios.get((SPARSE, batch, sequence))  # none where one of the twins has no CUDA graph
        yield [
            result.variant.name,
            f"{batch}x{sequence}",
            *("-" if each is None else f"{each:.4f}" for each in (fp16, dense, sparse)),
            "-" if ratio is None else f"{ratio.speedup:.2f} ({ratio.interval[0]:.2f} to {ratio.interval[1]:.2f})",
            "-" if fp16 is None or sparse is None else f"{fp16 / sparse:.2f}",
        ]


def _best(results: Sequence[Result]) -> dict[str, float | str] | None:
    """The speed-ups of the best variant at what is aimed at; None where none shows it. One without a proven sparse
    kernel, without right answers, or whose twins were not timed against each other shows nothing."""
    model, *shape = AIMED_AT
    reached = []
    for result in results:
        proven = result.sparsity is not None and bool(result.sparsity.share)
        right = bool(result.parity) and all(entry.passed for entry in (result.parity or {}).values())
        if result.variant.model != model or result.bench is None or not (proven and right):
            continue
        times = {t.name: t.median for t in result.bench.timings if [t.batch, t.sequence] == shape}
        for ratio in result.bench.ratios:
            if (ratio.name, ratio.reference, [ratio.batch, ratio.sequence]) == (SPARSE, DENSE, shape) and FP16 in times:
                reached.append((ratio.speedup, times[FP16] / times[SPARSE], result.variant.name))
    if not reached:
        return None
    over_dense, over_fp16, variant = max(reached)
    return {"over_dense": over_dense, "over_fp16": over_fp16, "variant": variant}


def _outcome(forced: Forced) -> str:
    if forced.error is not None:
        return f"error: {forced.error}"
    return "unknown" if forced.share is None else f"{forced.share:.1%} of the planned matrices run sparse"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())

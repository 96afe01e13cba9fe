#!/usr/bin/env python3
"""One command on a machine with an NVIDIA GPU: build, inspect, compare and time everything that a claim about 2:4 needs.

    python tools/gpu/evidence.py                      # MiniLM-L6, BERT-base and BERT-large shapes; about an hour
    python tools/gpu/evidence.py --models minilm --shapes 1x128,32x128 --rounds 30

Writes ``docs/gpu/<gpu>-<tensorrt version>.md`` with raw reports beside it, losing cases included. Models have the shapes of
the real ones and random weights, pruned 2:4 and quantized without training: kernels and latencies do not depend on what the
weights say, and parity is against PyTorch on the same weights. Each variant's result is kept under ``--work``: run the
same command again after an interruption and it goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# name -> (hidden, layers, heads, positions)
MODELS = {
    "tiny": (256, 1, 4, 64),
    "minilm": (384, 6, 12, 512),
    "bert-base": (768, 12, 12, 512),
    "bert-large": (1024, 24, 16, 512),
}
SHAPES = ("1x128", "8x128", "32x128", "128x128", "1x384", "8x384", "32x384", "128x384")
TARGET_DENSE, TARGET_FP16 = 1.3, 2.2  # at BERT-large, batch 128, sequence 384
MUST_BE_SPARSE = "-cask:sparsity=must"


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


def variants(model: str, weakly_typed: bool, capability: str) -> list[Variant]:
    """Against the base variant, one thing is changed at a time. On sm90, TensorRT 8.6 has sparse convolutions only."""
    first = "conv1x1" if weakly_typed and capability == "9.0" else "matmul"
    base = Variant(model, "attention", "tanh", first)
    second = "matmul" if first == "conv1x1" else "conv1x1"
    return [
        base,
        Variant(model, "inputs-outputs", "tanh", first),
        Variant(model, "inputs", "tanh", first),
        Variant(model, "attention", "erf", first),
        Variant(model, "attention", "tanh", second),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="minilm,bert-base,bert-large", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="batch x sequence, comma-separated")
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--level", type=int, default=4, help="builder optimization level")
    parser.add_argument("--only", default="", help="only variants whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("docs/gpu"))
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-evidence"))
    options = parser.parse_args(arguments)
    from engines.tensorrt import backend as trt
    from engines.tensorrt.cuda_driver import device_facts
    from nxm_export.errors import NxmError

    try:
        device, version = device_facts(), trt._runtime().__version__
    except NxmError as error:
        print(f"gpu_evidence: {error}", file=sys.stderr)
        return 1
    shapes = [
        (int(batch), int(sequence))
        for batch, _, sequence in (text.partition("x") for text in options.shapes.split(","))
    ]
    weakly_typed = int(version.split(".")[0]) < 10
    found: list[dict[str, Any]] = []
    for model in options.models.split(","):
        for variant in variants(model, weakly_typed, device["compute_capability"]):
            if options.only not in variant.name:
                continue
            file = options.work / version / device["gpu"].replace(" ", "_") / f"{variant.name}.json"
            if not file.is_file():
                print(f"{time.strftime('%H:%M:%S')} {variant.name}", file=sys.stderr, flush=True)
                file.parent.mkdir(parents=True, exist_ok=True)
                result = measure(variant, shapes, options, weakly_typed)
                file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            found.append(json.loads(file.read_text(encoding="utf-8")))
    page = write_page(options.out, device, version, found)
    print(page)
    return 0


def measure(variant: Variant, shapes: Sequence[tuple[int, int]], options: Any, weakly_typed: bool) -> dict[str, Any]:
    """Build the twins of one variant, then count, compare and time. An error is a result, too."""
    from engines.base import BuildOptions, Profile
    from nxm_export.errors import NxmError
    from nxm_export.pipeline.engine_commands import bench_engines
    from nxm_export.pipeline.inspection import inspect_path, measure_layers
    from nxm_export.pipeline.sparsity_twins import build_twins, twin_directories

    work = options.work / "build" / variant.name
    result: dict[str, Any] = {**asdict(variant), "name": variant.name, "shapes": list(shapes)}
    try:
        checkpoint = one_shot(variant, options.work / "checkpoints")
        limit = MODELS[variant.model][3]
        longest = [shape for shape in shapes if shape[1] <= limit]
        # one profile per sequence length, tuned for the largest batch of it: what a server would build
        lengths = sorted({sequence for _, sequence in longest})
        profiles = [Profile((1, 1), *[(max(b for b, s in longest if s == length), length)] * 2) for length in lengths]
        exported = {
            "target": "trt8" if weakly_typed else "trt",
            "lowering": variant.lowering,
            "placement": variant.placement,
        }
        settings = BuildOptions(profiles=profiles, level=options.level)
        began = time.monotonic()
        build_twins(checkpoint, work, "trt", settings, exported)
        result["build_seconds"] = round(time.monotonic() - began, 1)
        dense, sparse, _ = twin_directories(work)
        for engine in (dense, sparse):
            measure_layers(engine)
        report = inspect_path(sparse, twin=dense)
        result["truth"] = {key: report[key] for key in ("sparse_share", "counts", "weights")}
        result["log"] = [
            line for line in (sparse / "build.log").read_text(errors="replace").splitlines() if "(Sparsity)" in line
        ]
        result["parity"] = parity(checkpoint, work, max(lengths))
        bench = bench_engines([work], longest, options.rounds, None)
        result["bench"] = bench.to_dict()
        if not report["sparse_share"]:
            result["must"] = force(work, settings)
    except NxmError as error:
        result["error"] = str(error)
    return result


def one_shot(variant: Variant, directory: Path) -> Path:
    """A checkpoint of the model's shape: random weights, calibrated on random tokens, pruned by magnitude, baked."""
    import torch
    import transformers

    from compressors.quantization.fake_quant import bake, calibrate, prepare, quant_linears
    from nxm_export.contract.checkpoint import open_checkpoint, save_plan
    from nxm_export.contract.families import FAMILIES, GELUS
    from nxm_export.contract.plan import WeightSpec
    from nxm_export.storage.atomic import atomic_dir

    out = directory / f"{variant.model}-{variant.gelu}"
    if out.is_dir():
        return out
    hidden, layers, heads, positions = MODELS[variant.model]
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30522, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        max_position_embeddings=positions, hidden_act=GELUS[variant.gelu], num_labels=2,
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    family, facts = FAMILIES["bert"], config.to_dict()
    plan = family.uniform_plan(facts, WeightSpec.parse("2:4+W8"), placement="attention")
    prepare(model, plan, family, facts)
    ids = torch.randint(5, 30522, (4, min(64, positions)))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    calibrate(model, [batch], 99.99)
    for layer in quant_linears(model).values():
        layer.harden()
    scales = bake(model, plan)
    with atomic_dir(out) as scratch:
        model.save_pretrained(scratch)
        save_plan(scratch, plan, scales)
        open_checkpoint(scratch).require_valid()
    return out


def parity(checkpoint: Path, work: Path, longest: int) -> dict[str, Any]:
    """The sparse engine against PyTorch on 32 random sentences: the same tolerance as for everything else."""
    import numpy as np

    from engines.parity.compare import compare

    rng = np.random.default_rng(0)
    features = []
    for _ in range(32):
        length = int(rng.integers(4, min(48, longest) + 1))
        ids = [int(token) for token in rng.integers(5, 30522, size=length)]
        features.append({"input_ids": ids, "attention_mask": [1] * length, "token_type_ids": [0] * length, "labels": 0})
    found = {}
    for name in ("int8-sparse", "int8-dense"):
        report = compare(checkpoint, work / name, features)
        output = report.outputs[0]
        found[name] = {"passed": report.passed, "max_abs": output.max_abs, "tolerated": output.max_tolerance}
    return found


def force(work: Path, settings: Any) -> dict[str, Any]:
    """No sparse kernel ran: does one exist? Ask the builder to take sparse ones only, where it lists that as public."""
    from dataclasses import replace

    from nxm_export.errors import NxmError
    from nxm_export.pipeline.engine_commands import build_engine
    from nxm_export.pipeline.inspection import inspect_path

    out = work.with_name(f"{work.name}-must")
    try:
        build_engine(work / "onnx" / "int8" / "model.onnx", out, "trt", replace(settings, build_route=MUST_BE_SPARSE))
        return {"sparse_share": inspect_path(out)["sparse_share"]}
    except NxmError as error:
        return {"error": str(error)}


def write_page(out: Path, device: dict[str, str], version: str, found: Sequence[dict[str, Any]]) -> Path:
    """The Markdown page and, beside it, the raw results."""
    name = f"{device['gpu'].replace(' ', '-').lower()}-{version}"
    raw = out / name
    raw.mkdir(parents=True, exist_ok=True)
    for result in found:
        (raw / f"{result['name']}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# {device['gpu']}, TensorRT {version}",
        "",
        f"Compute capability {device['compute_capability']}, driver {device['driver']}, CUDA {device['cuda']}, {platform.platform()}. "
        f"Written by `tools/gpu/evidence.py` on {time.strftime('%Y-%m-%d')}; raw results in [{name}/]({name}/). Weights are random, 2:4 and INT8; "
        "latencies are medians of CUDA-event times, engines interleaved, inputs on the device.",
        "",
        "## Chosen kernels",
        "",
        "| variant | sparse / planned | share | why not | parity | build s |",
        "|---|---|---|---|---|---|",
    ]
    for result in found:
        if "error" in result:
            lines.append(f"| {result['name']} | - | - | error: {_cell(result['error'])} | - | - |")
            continue
        truth = result["truth"]
        planned = sum(row["planned_sparse"] for row in truth["weights"])
        chosen = sum(row["planned_sparse"] and row["chosen"] is True for row in truth["weights"])
        why = ", ".join(
            f"{count} {reason}" for reason, count in truth["counts"].items() if reason not in ("sparse", "not-planned")
        )
        passed = ", ".join(
            f"{twin}: {'pass' if entry['passed'] else 'FAIL'}" for twin, entry in result["parity"].items()
        )
        lines.append(
            f"| {result['name']} | {chosen} / {planned} | {truth['sparse_share']:.1%} | {why or '-'} | {passed} | {result['build_seconds']} |"
        )
    lines += ["", "## Latency, ms", "", "| variant | batch x sequence | FP16 | INT8 dense | INT8 sparse | sparse over dense (95 %) | sparse over FP16 |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for result in found:
        lines += _latency_rows(result)
    lines += ["", "## Verdicts", ""]
    lines += [f"- {result['name']}: {result['bench']['verdict']}" for result in found if "bench" in result]
    lines += ["", "## Target", "", _target(found), ""]
    forced = [result for result in found if "must" in result]
    if forced:
        lines += ["## Where no sparse kernel ran: asking for sparse ones only", ""]
        lines += [f"- {result['name']}: {_cell(json.dumps(result['must']))}" for result in forced] + [""]
    page = out / f"{name}.md"
    page.write_text("\n".join(lines), encoding="utf-8")
    return page


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _latency_rows(result: dict[str, Any]) -> list[str]:
    if "bench" not in result:
        return []
    times = {(t["name"], t["batch"], t["sequence"]): t["median"] for t in result["bench"]["timings"]}
    ratios = {(r["name"], r["batch"], r["sequence"]): r for r in result["bench"]["ratios"]}
    rows = []
    for batch, sequence in dict.fromkeys((t["batch"], t["sequence"]) for t in result["bench"]["timings"]):
        fp16, dense, sparse = (times[name, batch, sequence] for name in ("fp16", "int8-dense", "int8-sparse"))
        ratio = ratios["int8-sparse", batch, sequence]
        low, high = ratio["interval"]
        rows.append(
            f"| {result['name']} | {batch}x{sequence} | {fp16:.4f} | {dense:.4f} | {sparse:.4f} | "
            f"{ratio['speedup']:.2f} ({low:.2f} to {high:.2f}) | {fp16 / sparse:.2f} |"
        )
    return rows


def _target(found: Sequence[dict[str, Any]]) -> str:
    """What was aimed at, and what came out; a losing result is stated as one."""
    best = None
    for result in found:
        if result["model"] != "bert-large" or "bench" not in result:
            continue
        times = {(t["name"], t["batch"], t["sequence"]): t["median"] for t in result["bench"]["timings"]}
        if ("int8-sparse", 128, 384) in times:
            fp16, dense, sparse = (times[name, 128, 384] for name in ("fp16", "int8-dense", "int8-sparse"))
            best = max(best or (0.0, 0.0, ""), (dense / sparse, fp16 / sparse, result["name"]))
    aim = f"Aim: sparse INT8 at least {TARGET_DENSE}x dense INT8 and {TARGET_FP16}x FP16 at BERT-large, sequence 384, batch 128."
    if best is None:
        return f"{aim} Not measured here."
    reached = best[0] >= TARGET_DENSE and best[1] >= TARGET_FP16
    return f"{aim} {'Reached' if reached else 'Missed'}: {best[0]:.2f}x and {best[1]:.2f}x, with {best[2]}."


if __name__ == "__main__":
    sys.exit(main())

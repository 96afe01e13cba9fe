"""Build, inspect, compare and time engines with the product's own code; run by the carried Python 3.10.

    /tmp/nxm-trt86/python310 -m tools.gpu.tensorrt86.engines WORK OUT --budget 300 --level 3 STEP...

A STEP is ``variant:twin+twin:batchxlength+batchxlength``. Graphs come from `tools.gpu.tensorrt86.graphs`, which may
still be at work: a step waits for its own. ``OUT/engines.json`` is written after every engine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from engines.base import BuildOptions, Profile
from engines.benchmark.latency import BenchReport, bench
from engines.sparsity.engine_report import read_sparsity_report
from engines.tensorrt import backend as trt
from engines.tensorrt.builder_process import CACHE_FILE
from engines.tensorrt.cuda_driver import device_facts
from nxm_export.errors import NxmError
from nxm_export.pipeline.engine_sparsity import measure_layers
from nxm_export.storage.atomic import make_directory, write_atomic
from tools.gpu.arguments import shape
from tools.gpu.evidence import DENSE, FP16, SPARSE

LEAST_SECONDS = 45.0  # an engine is not begun with less
RAW = ("layers.json", "measured.json", "passport.json")


@dataclass(frozen=True)
class Step:
    """A variant, which of its engines are built, and the shapes that they are timed at."""

    variant: str
    twins: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def parse(cls, text: str) -> Step:
        """``variant:twin+twin:batchxlength+batchxlength``."""
        variant, twins, shapes = text.split(":")
        return cls(variant, tuple(twins.split("+")), tuple(shape(part) for part in shapes.split("+")))

    @property
    def profile(self) -> Profile:
        """One for all shapes, best at the largest."""
        largest = (max(batch for batch, _ in self.shapes), max(length for _, length in self.shapes))
        return Profile((1, 1), largest, largest)


@dataclass
class EngineOutcome:
    """What one engine came to. `deviations` are the largest differences from PyTorch, by output."""

    build_seconds: float | None = None
    engine_bytes: int | None = None
    sparse_share: float | None = None
    counts: dict[str, int] = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)
    deviations: dict[str, float] = field(default_factory=dict)
    sparsity_log: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass
class StepOutcome:
    """What a step came to."""

    variant: str
    engines: dict[str, EngineOutcome] = field(default_factory=dict)
    bench: BenchReport | None = None
    errors: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything; written after every engine."""

    schema: str = "nxm-tensorrt86/1"
    tensorrt: str = ""
    device: dict[str, str] = field(default_factory=dict)
    steps: list[StepOutcome] = field(default_factory=list)


class Evidence:
    """The steps, until the budget is spent."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.began, self.options = time.monotonic(), options
        version = trt._runtime().__version__
        self.report = Report(tensorrt=version, device=dict(device_facts()))
        self.cache = options.work / "cache" / CACHE_FILE
        make_directory(self.cache.parent)

    @property
    def left(self) -> float:
        """Seconds."""
        return float(self.options.budget) - (time.monotonic() - self.began)

    def run(self, step: Step) -> None:
        """Build and look at the engines of one step, then time them against each other."""
        outcome = StepOutcome(step.variant)
        self.report.steps.append(outcome)
        graphs = self.options.work / "onnx" / step.variant
        while not (graphs / "ready").is_file() and not (self.options.work / "failed").is_file() and self.left > 60:
            time.sleep(0.5)
        if not (graphs / "ready").is_file():
            outcome.errors.append("no graph")
        else:
            engines = {}
            for twin in step.twins:
                if self.left < LEAST_SECONDS:
                    outcome.errors.append(f"{twin}: no time")
                    continue
                made = self._build(step, twin, graphs, outcome)
                if made is not None:
                    engines[twin] = made
                self.flush()
            for twin, directory in engines.items():
                self._look(directory, graphs / "reference.npz", outcome.engines[twin])
                self._copy_raw(step, twin, directory)
                self.flush()
            if engines:
                self._time(step, engines, outcome)
        self.flush()
        print(json.dumps(asdict(outcome), default=str)[:3000], flush=True)

    def flush(self) -> None:
        """Write what there is."""
        make_directory(self.options.out)
        write_atomic(self.options.out / "engines.json", json.dumps(asdict(self.report), indent=1, default=str) + "\n")

    def _build(self, step: Step, twin: str, graphs: Path, outcome: StepOutcome) -> Path | None:
        began, out = time.monotonic(), self.options.work / "engines" / step.variant / twin
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        engine = outcome.engines[twin] = EngineOutcome()
        options = BuildOptions(
            profiles=[step.profile], level=self.options.level, sparse="auto" if twin == SPARSE else "never", twin=twin
        )
        if self.cache.is_file():
            options = replace(options, timing_cache=self.cache)
        made: Path | None = out
        try:
            trt.build(graphs / ("float" if twin == FP16 else "int8") / "model.onnx", out, options)
        except NxmError as error:
            engine.errors.append(str(error)[:1500])
            made = None
        else:
            engine.engine_bytes = (out / "model.engine").stat().st_size
            for file in out.glob(f"{CACHE_FILE}*"):
                shutil.copyfile(file, self.cache.with_name(file.name))
        engine.build_seconds = round(time.monotonic() - began, 1)
        log = out / "build.log"
        if log.is_file():
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            engine.sparsity_log = [line[:3000] for line in lines if "(Sparsity)" in line]
            engine.errors += [line[:400] for line in lines if "[E]" in line][:10]
        return made

    def _look(self, directory: Path, reference: Path, engine: EngineOutcome) -> None:
        try:
            measure_layers(directory)
            report = read_sparsity_report(directory)
            engine.sparse_share, engine.counts = report.sparse_share, dict(report.counts)
            engine.kernels = sorted({weight.kernel for weight in report.weights if weight.kernel})[:40]
            with np.load(reference) as arrays, trt.load(directory) as loaded:
                outputs = loaded.run({name: arrays[name] for name in loaded.inputs})
                for name, value in outputs.items():
                    engine.deviations[name] = float(np.abs(value - arrays[f"out_{name}"]).max())
        except NxmError as error:
            engine.errors.append(str(error)[:800])

    def _time(self, step: Step, engines: dict[str, Path], outcome: StepOutcome) -> None:
        loaded = {}
        try:
            for twin in (DENSE, SPARSE, FP16):  # the dense one is the reference of ratios
                if twin in engines:
                    try:
                        loaded[twin] = trt.load(engines[twin])
                    except NxmError as error:  # the others are timed
                        outcome.errors.append(f"{twin}: {error}"[:800])
            outcome.bench = bench(loaded, step.shapes, rounds=40)
        except NxmError as error:
            outcome.errors.append(str(error)[:800])
        finally:
            for engine in loaded.values():
                engine.close()

    def _copy_raw(self, step: Step, twin: str, directory: Path) -> None:
        raw = self.options.out / "raw"
        make_directory(raw)
        for name in RAW:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, raw / f"{step.variant}.{twin}.{name}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python310 -m tools.gpu.tensorrt86.engines",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", nargs="+", type=Step.parse)
    parser.add_argument("--budget", type=float, default=300, help="seconds")
    parser.add_argument("--level", type=int, default=3, help="builder optimization level")
    options = parser.parse_args(arguments)
    try:
        evidence = Evidence(options)
    except NxmError as error:
        print(f"tools.gpu.tensorrt86.engines: {error}", file=sys.stderr)
        return 1
    print(f"TensorRT {evidence.report.tensorrt}, {evidence.report.device}", flush=True)
    for step in options.steps:
        evidence.run(step)
    return 0


if __name__ == "__main__":
    sys.exit(main())

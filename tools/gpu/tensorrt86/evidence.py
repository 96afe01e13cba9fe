"""Evidence with TensorRT 8.6.0 in order of value, until the seconds are over; after `unpack` said that nothing is
missing.

    python3 -m tools.gpu.tensorrt86.evidence --out $OUT --budget 330

Graphs are made by this Python, which has torch, in the background while the carried Python 3.10 builds engines. Expect
the first two steps in 330 seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools import ROOT
from tools.gpu.pages import write_page
from tools.gpu.tensorrt86 import PLACE, PYTHON310, SITE312
from tools.rendering import table

_FIRST = "128x128+32x128+8x128+1x128"
VARIANTS = (
    ("minilm,attention,tanh,conv1x1", "int8-sparse+int8-dense+fp16", _FIRST),
    ("bert-base,attention,tanh,conv1x1", "int8-sparse+int8-dense+fp16", _FIRST),
    ("minilm,attention,tanh,matmul", "int8-sparse+int8-dense", "128x128+32x128"),
    ("bert-large,attention,tanh,conv1x1", "int8-sparse+int8-dense", "128x384+32x384"),
    ("bert-base,inputs-outputs,tanh,conv1x1", "int8-sparse+int8-dense", "128x128"),
)


def collect(work: Path, out: Path) -> None:
    """Put the ends of build logs and the raw reports into two archives: little and many files travel badly."""
    with tarfile.open(out / "logs.tgz", "w:gz") as archive:
        for log in work.glob("engines/*/*/build.log"):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            chosen = [line for line in lines if any(mark in line for mark in ("(Sparsity)", "[E]", "[W]"))]
            short = log.with_name("build.short.log")
            short.write_text("\n".join([*chosen[:200], *lines[-50:]]) + "\n", encoding="utf-8")
            archive.add(short, ".".join(log.parts[-3:-1]) + ".log")
    if (out / "raw").is_dir():
        with tarfile.open(out / "raw.tgz", "w:gz") as archive:
            archive.add(out / "raw", "raw")
        shutil.rmtree(out / "raw")


def write_report(out: Path) -> Path | None:
    """The page of docs/gpu from ``engines.json``; None where no engine came that far."""
    file = out / "engines.json"
    if not file.is_file():
        return None
    report = json.loads(file.read_text(encoding="utf-8"))
    engines, times, errors = [], [], []
    for step in report["steps"]:
        name = step["variant"]
        errors += [f"- {name}: {error}" for error in step["errors"]]
        for twin, engine in step["engines"].items():
            share, apart = engine["sparse_share"], engine["deviations"]
            proved = "-" if share is None else f"{share:.1%}"
            largest = ", ".join(f"{key} {value:.3g}" for key, value in apart.items()) or "-"
            counts = ", ".join(f"{count} {reason}" for reason, count in engine["counts"].items()) or "-"
            engines.append([name, twin, str(engine["build_seconds"]), proved, counts, largest])
            errors += [f"- {name} {twin}: {error}" for error in engine["errors"]]
        bench = step["bench"] or {"timings": [], "ratios": []}
        ratios = {(each["name"], each["batch"], each["sequence"]): each for each in bench["ratios"]}
        for each in bench["timings"]:
            ratio = ratios.get((each["name"], each["batch"], each["sequence"]))
            over = "-" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(ratio["speedup"], *ratio["interval"])
            times.append([name, f"{each['batch']}x{each['sequence']}", each["name"], f"{each['median']:.4f}", over])
    sections = [
        table(engines, ["model", "twin", "build, s", "proven sparse", "matrices", "differs from PyTorch"], "llrrll"),
        table(times, ["model", "shape", "twin", "ms", "times as fast as the dense twin"], "lllrr"),
        *(["\n".join(["## Errors", "", *errors])] if errors else []),
    ]
    device = report["device"]
    versions = {"TensorRT": report["tensorrt"], "CUDA of the driver": device.get("cuda", "unknown")}
    raw = [name for name in ("engines.json", "logs.tgz", "raw.tgz") if (out / name).is_file()]
    return write_page(out, "tensorrt86", device.get("gpu", "unknown GPU"), versions, sections, raw)


def run(options: argparse.Namespace) -> int:
    """Graphs in the background, engines in the foreground."""
    began, work = time.monotonic(), options.work
    work.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (work / "failed").unlink(missing_ok=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    graphs = [sys.executable, "-m", "tools.gpu.tensorrt86.graphs", str(work), *(variant for variant, _, _ in VARIANTS)]
    steps = [f"{variant.replace(',', '-')}:{twins}:{shapes}" for variant, twins, shapes in VARIANTS]
    budget = options.budget - (time.monotonic() - began) - 15
    python = str(options.place / PYTHON310.name)
    engines = [python, "-m", "tools.gpu.tensorrt86.engines", str(work), str(options.out), *steps]
    engines += ["--budget", f"{budget:.0f}", "--level", str(options.level)]
    with (options.out / "graphs.log").open("w", encoding="utf-8") as log:
        ours = environment | {"PYTHONPATH": str(options.place / SITE312.name)}
        making = subprocess.Popen(graphs, cwd=ROOT, env=ours, stdout=log, stderr=log)
        try:
            building = subprocess.Popen(engines, cwd=ROOT, env=environment)
            while building.poll() is None and time.monotonic() - began < options.budget - 5:
                if making.poll():
                    (work / "failed").touch()
                time.sleep(0.5)
            if building.poll() is None:
                building.terminate()
            status = building.wait()
        finally:
            making.terminate()
            making.wait()
    collect(work, options.out)
    write_report(options.out)
    print(f"{time.monotonic() - began:.0f} s; {options.out / 'engines.json'}", flush=True)
    return status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m tools.gpu.tensorrt86.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="where engines.json and the archives go")
    parser.add_argument("--budget", type=float, default=480, help="seconds, all together")
    parser.add_argument("--level", type=int, default=3, help="builder optimization level")
    parser.add_argument("--work", type=Path, default=Path("/tmp/nxm-trt86-work"))
    parser.add_argument("--place", type=Path, default=PLACE, help="where `unpack` put things together")
    options = parser.parse_args(arguments)
    launcher = options.place / PYTHON310.name
    if not launcher.is_file():
        print(
            f"tools.gpu.tensorrt86.evidence: {launcher} is missing; run tools.gpu.tensorrt86.unpack first",
            file=sys.stderr,
        )
        return 1
    return run(options)


if __name__ == "__main__":
    sys.exit(main())

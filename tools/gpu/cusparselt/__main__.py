"""What is measured, in order of value, until the budget is spent: JSON after every measurement, tables at the end."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from nxm_export.errors import NxmError
from nxm_export.storage.atomic import make_directory, write_atomic
from tools.gpu import cusparselt
from tools.gpu.arguments import counts, names_of
from tools.gpu.cusparselt import encoder_layer, gemms
from tools.gpu.cusparselt.encoder_layer import LayerBench, LayerTimes
from tools.gpu.cusparselt.gemms import LEAST_GAIN, Gemm, GemmBench, products_of, verdict_rows
from tools.gpu.cusparselt.products import Products
from tools.gpu.cusparselt.timing import ContextLost, Problem, Timer
from tools.gpu.pages import as_text, write_page

MODELS = {"tiny": (128, 512), "minilm": (384, 1536), "bert-base": (768, 3072), "bert-large": (1024, 4096)}
LAYERS = {4096: (32, 128), 16384: (128, 128), 49152: (128, 384), 1024: (8, 128), 128: (1, 128)}  # rows: batch, length
TABLE_CHARACTERS = 10_500  # of the output's end
TAIL = "problems and kernels"
VERDICTS = (
    "Both write int32, `_int_mm` and cuSPARSELt, and the 2:4 result is exact. 2:4 pays from an M on where it is faster "
    f"at that M and at every larger one that was measured, by {100 * (LEAST_GAIN - 1):.0f} % or more. *Scale and bias "
    "inside* compares the fastest form that has them in the product with the dense product alone, which has yet to be "
    "scaled."
)


@dataclass
class Report:
    """Everything; written after every measurement."""

    schema: str = "nxm-gpu-cusparselt/1"
    torch: str = torch.__version__
    rehearsed: bool = False
    gpu: str | None = None
    capability: str | None = None
    cusparselt: str | None = None
    signature: str | None = None
    arguments: dict[str, str] = field(default_factory=dict)
    forms: dict[str, float | str] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    gemms: list[Gemm] = field(default_factory=list)
    layers: list[LayerTimes] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    clocks: list[str] = field(default_factory=list)
    seconds: float | None = None


@dataclass(frozen=True)
class Job:
    """One product of a model's layer, or the whole layer (`product` None), at a number of rows."""

    model: str
    rows: int
    product: str | None = None

    def __str__(self) -> str:
        return f"{self.model} {self.product or 'layer'} {self.rows}"


def jobs(models: Sequence[str], rows: Sequence[int]) -> list[Job]:
    """In order of value: the first model at the first two numbers of rows, the other models there, then the rest."""

    def products(model: str, count: int) -> Iterator[Job]:
        yield from (Job(model, count, name) for name in products_of(*MODELS[model]))

    def layers(model: str, counts: Sequence[int]) -> Iterator[Job]:
        yield from (Job(model, count) for count in counts if count in LAYERS)

    lead, *others = models
    ordered = [*products(lead, rows[0]), *layers(lead, rows[:2])]
    for count in rows[1:2]:
        ordered += products(lead, count)
    for model in others:
        for count in rows[:2]:
            ordered += products(model, count)
        ordered += layers(model, rows[:2])
    ordered += layers(lead, rows[2:])
    for count in rows[2:]:
        for model in models:
            ordered += products(model, count)
    return ordered


class Probe:
    """The measuring, and the file that it is written to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.began, self.options = time.monotonic(), options
        device = "cpu" if options.rehearse else "cuda"
        self.report = Report(rehearsed=options.rehearse, arguments={k: str(v) for k, v in vars(options).items()})
        self.timer = Timer(device, options.calls, options.replays, self.report.problems)
        self.products = Products(device, self.report.problems)

    def run(self) -> None:
        """Until all is measured, the budget is spent, or a signal comes; `report` has what there is."""
        try:
            self._describe()
            self.timer.warm_up()
            self.report.clocks.append(clocks())
            self.report.forms = self.products.try_forms()
            self.report.choices = {output: str(choice) for output, choice in self.products.choices.items()}
            self.flush()
            print("forms", json.dumps(self.report.forms), flush=True)
            seen: set[tuple[int, ...]] = set()
            for job in jobs(self.options.models, self.options.rows):
                shape = products_of(*MODELS[job.model])[job.product] if job.product else (MODELS[job.model][0], 0)
                if (*shape, job.rows) in seen:
                    continue
                seen.add((*shape, job.rows))
                if time.monotonic() - self.began > self.options.budget:
                    self.report.skipped.append(str(job))
                    continue
                self._measure(job)
        except KeyboardInterrupt:
            self.report.problems.append(Problem("stop", "stopped by a signal"))
        except ContextLost as error:
            self.report.problems.append(Problem("context", f"lost: {error}"))
        self.report.clocks.append(clocks())
        self.report.seconds = round(time.monotonic() - self.began, 1)
        self.flush()
        write_report(self.report, self.options.out)

    def flush(self) -> None:
        """Write what there is; NaN, which JSON does not have, is a text."""
        text = json.dumps(asdict(self.report), indent=1)
        write_atomic(self.options.out, text.replace("NaN", '"NaN"').replace("Infinity", '"Infinity"') + "\n")

    def _describe(self) -> None:
        self.report.signature = self.products.signature
        if not self.options.rehearse:
            self.report.gpu = torch.cuda.get_device_name(0)
            self.report.capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
            library = torch.backends.cusparselt
            self.report.cusparselt = (
                f"{library.version()}, {'available' if library.is_available() else 'not available'}"
            )

    def _measure(self, job: Job) -> None:
        began = time.monotonic()
        hidden, wide = MODELS[job.model]
        if job.product is None:
            times = LayerTimes(job.model, *LAYERS[job.rows])
            self.report.layers.append(times)
            row: Gemm | LayerTimes = times
        else:
            gemm = Gemm(job.model, job.product, job.rows, *products_of(hidden, wide)[job.product])
            self.report.gemms.append(gemm)
            row = gemm
        try:
            if isinstance(row, Gemm):
                GemmBench(self.products, self.timer, row, self.flush).run()
            else:
                LayerBench(self.products, self.timer, hidden, wide, row).run()
        except ContextLost:
            raise
        except Exception as error:
            self.report.problems.append(Problem.of(str(job), error))
        row.seconds = round(time.monotonic() - began, 2)
        self.flush()
        write_report(self.report, self.options.out)
        came = {"microseconds": row.microseconds, "failed": row.failed}
        print(f"{time.monotonic() - self.began:4.0f} s  {job}", json.dumps(came), flush=True)


def clocks() -> str:
    """Clocks, power, temperature and driver, as the driver's tool says."""
    query = "--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,driver_version"
    try:
        done = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True, timeout=15, check=False
        )
    except (OSError, subprocess.SubprocessError) as error:
        return type(error).__name__
    return done.stdout.strip()


def write_report(report: Report, file: Path) -> Path:
    """The page of docs/gpu, beside the JSON file."""
    rows = verdict_rows(report.gemms)
    verdicts = ["| product | K x N | M measured | 2:4 pays | largest gain | over FP16 there | scale and bias inside |"]
    verdicts += ["|---|---|---|---|---:|---:|---:|", *(f"| {' | '.join(row)} |" for row in rows)]
    facts = {"torch": report.torch, "cuSPARSELt": str(report.cusparselt), "clocks": "; ".join(report.clocks)}
    sections = ["## Sparse against dense", VERDICTS, "\n".join(verdicts), "## All times", as_text(tables(report))]
    gpu = "stand-in" if report.rehearsed else str(report.gpu)
    return write_page(file.parent, "products", gpu, facts, sections, [file.name])


def shown(report: Report) -> str:
    """The end of the output: verdicts, then what fits of the tables."""
    lines = ["2:4 pays: product | K x N | M | from M on | largest gain | over FP16 | scale and bias inside"]
    lines += [" | ".join(row) for row in verdict_rows(report.gemms)]
    all_lines = tables(report)
    tail = all_lines[all_lines.index(TAIL) :]
    text = "\n".join([*lines, *all_lines[: -len(tail)]])
    return "\n".join([text[: TABLE_CHARACTERS - sum(len(line) + 1 for line in tail)], *tail])


def tables(report: Report) -> list[str]:
    """Layers first, then products in the order measured, then what failed, and kernels."""
    ways = (encoder_layer.FP16, encoder_layer.FP8, encoder_layer.INT8, encoder_layer.SPARSE_I32, encoder_layer.SPARSE)
    lines = [f"{report.gpu}, torch {report.torch}, cuSPARSELt {report.cusparselt}, {report.seconds} s; {report.clocks}"]
    lines += ["", "layer, us: " + " | ".join(ways) + " | speed-ups | errors"]
    for times in report.layers:
        cells = [str(times.microseconds.get(way, "-")) for way in ways]
        lines.append(
            f"{times.model} {times.batch}x{times.length}: "
            + " | ".join([*cells, str(times.speedups), str(times.errors)])
        )
    columns = (gemms.FP16, gemms.FP8, gemms.INT8, gemms.SPARSE, gemms.SPARSE_F16, gemms.SPARSE_I8, gemms.FP16_SPARSE)
    lines += ["", "product M N K, us: " + " | ".join(columns) + " | deviations"]
    for gemm in report.gemms:
        cells = [str(gemm.microseconds.get(way, "-")) for way in columns]
        deviations = " ".join(f"{value:g}" for value in gemm.deviations.values())
        failed = f" FAILED {', '.join(gemm.failed)}" if gemm.failed else ""
        lines.append(
            f"{gemm.model} {gemm.name} {gemm.m} {gemm.n} {gemm.k}: " + " | ".join([*cells, deviations]) + failed
        )
    problems = list(dict.fromkeys(f"{problem.at}: {problem.error}" for problem in report.problems))
    kernels = [f"{way}: {name}" for gemm in report.gemms for way, names in gemm.kernels.items() for name in names]
    tail = [TAIL, *(f"problem {text[:200]}" for text in problems[:8]), *list(dict.fromkeys(kernels))[:14]]
    tail += [f"not reached: {', '.join(report.skipped)}"] if report.skipped else []
    return [*lines, *tail]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu.cusparselt",
        description=cusparselt.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--budget", type=float, default=190, help="seconds; what was not reached is listed")
    models = "bert-base,bert-large,minilm"
    parser.add_argument(
        "--models", type=names_of(MODELS), default=models, help=f"of {', '.join(MODELS)}; the first leads"
    )
    parser.add_argument(
        "--rows", type=counts, default=",".join(map(str, LAYERS)), help="tokens of a batch; the first two lead"
    )
    parser.add_argument("--calls", type=int, default=16, help="calls in one CUDA graph")
    parser.add_argument("--replays", type=int, default=15, help="replays of a graph")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU: times mean nothing")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("tools.gpu.cusparselt: torch sees no CUDA device here; --rehearse runs on the CPU", file=sys.stderr)
        return 1
    try:
        make_directory(options.out.parent)
    except NxmError as error:
        print(f"tools.gpu.cusparselt: {error}", file=sys.stderr)
        return 1

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)  # `timeout` ends the measuring; the tables are printed all the same
    probe = Probe(options)
    probe.run()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(shown(probe.report), flush=True)
    return 0 if any(gemms.SPARSE in gemm.microseconds for gemm in probe.report.gemms) else 1


if __name__ == "__main__":
    sys.exit(main())

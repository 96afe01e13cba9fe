"""Compression on CUDA from the working tree: steps a second, memory, metrics, waits for the device; then masks against
the CPU.

    python -m tools.gpu.training_probe pack RUN --out .gpu-probe     here, from a finished `nxm run`: 45 MiB
    python3 -m tools.gpu.training_probe run .gpu-probe --out $OUT --budget 240      on the GPU machine

What is measured first matters most. Masks are compared last: the CPU is slow. Without a GPU `run` says so;
``--cpu-only`` rehearses the parts of it that need none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest import mock

from nxm_export.errors import DataError, NxmError
from nxm_export.storage.atomic import atomic_dir, make_directory, write_atomic
from nxm_export.storage.json_files import convert, to_json_object
from tools.gpu.half_precision import WEIGHTS, as_float, as_half
from tools.gpu.pages import write_page
from tools.gpu.transfers import require_fits
from tools.rendering import table

DATA = ("train.tsv", "dev.tsv")
FILE = "training_probe.json"


@dataclass(frozen=True)
class Request:
    """One compression: a name, the placement of quantizers, the option of every weight, and `Settings` that differ."""

    name: str
    placement: str
    option: str
    settings: dict[str, object] = field(default_factory=dict)
    on_cpu: bool = False


@dataclass
class Phase:
    """A phase of a compression by its progress calls; its rate is without the first five steps, which allocate."""

    seconds: float = 0.0
    done: int = 0
    per_second: float | None = None


@dataclass
class Outcome:
    """What one compression came to."""

    seconds: float | None = None
    phases: dict[str, Phase] = field(default_factory=dict)
    peak_mib: float | None = None
    metrics: dict[str, object] = field(default_factory=dict)
    error: str | None = None
    trace: str | None = None
    skipped: str | None = None


@dataclass(frozen=True)
class Alike:
    """How alike two checkpoints are: shares of equal mask entries and of equal weights, largest difference."""

    equal_masks: float
    equal_weights: float
    largest_difference: float


@dataclass
class Report:
    """Everything; written after every compression."""

    schema: str = "nxm-gpu-training/1"
    torch: str = ""
    gpu: str | None = None
    runs: dict[str, Outcome] = field(default_factory=dict)
    alike: dict[str, Alike] = field(default_factory=dict)
    waits: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None


class Rates:
    """Seconds and rate of every phase, from the product's own progress calls."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self._first: dict[str, float] = {}
        self._counted: dict[str, tuple[float, int]] = {}
        self._last: dict[str, tuple[float, int]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        import torch

        if self.on_gpu and done in (0, total):
            torch.cuda.synchronize()
        now = time.monotonic()
        self._first.setdefault(what, now)
        if done >= 5:
            self._counted.setdefault(what, (now, done))
        self._last[what] = (now, done)

    def phases(self) -> dict[str, Phase]:
        """What was seen so far."""
        phases = {}
        for what, (last, done) in self._last.items():
            since, before = self._counted.get(what, (self._first[what], 0))
            rate = round((done - before) / (last - since), 2) if last > since and done > before else None
            phases[what] = Phase(round(last - self._first[what], 2), done, rate)
        return phases


class Probe:
    """Runs compressions until the budget is spent."""

    def __init__(self, data: Path, out: Path, options: argparse.Namespace) -> None:
        import torch

        self.began, self.options, self.data, self.out = time.monotonic(), options, data, out
        self.has_gpu = torch.cuda.is_available()
        gpu = torch.cuda.get_device_name(0) if self.has_gpu else None
        self.report = Report(torch=torch.__version__, gpu=gpu)
        self.work = Path(tempfile.mkdtemp(prefix="nxm-training-probe-"))
        self.dense = self.work / "dense"
        as_float(data / "dense", self.dense)  # what is compared is compared with this model on both devices

    def run(self) -> None:
        """Everything, in order of value."""
        steps, few = self.options.steps, self.options.cpu_steps
        pairs = [
            Request("admm", "inputs", "2:4+W4", {"recipe": "admm", "steps": few}),
            Request("one-shot", "attention", "2:4+W8", {"recipe": "one-shot"}),
            Request("obs", "inputs", "2:4+W8", {"recipe": "obs", "steps": few}),
            Request("nxm-fp32", "inputs", "2:4+W4", {"recipe": "nxm", "steps": few}),
        ]
        pairs = [
            replace(pair, settings={"precision": "fp32", "calibration_samples": 64, **pair.settings}) for pair in pairs
        ]
        if self.has_gpu:
            self.one(Request("nxm-bf16", "inputs", "2:4+W8", {"recipe": "nxm", "steps": steps}))
            self.one(Request("attention-bf16", "attention", "2:4+W8", {"recipe": "nxm", "steps": steps}))
            for pair in pairs:
                self.one(pair)
            self.one(
                Request("sr-ste-bf16", "inputs", "2:4+W8", {"recipe": "sr-ste", "steps": steps, "precision": "bf16"})
            )
            large = {"recipe": "nxm", "batch_size": 128, "max_length": 128, "steps": steps // 2}
            self.one(Request("batch128-length128-bf16", "attention", "2:4+W8", large))
            self.waits()
            permuted = {"recipe": "nxm", "permute": True, "mask_scores": "activation", "steps": steps // 3}
            self.one(Request("permuted-activation", "inputs", "2:4+W8", permuted))
        for pair in pairs:
            self.one(replace(pair, name=f"{pair.name}-cpu", on_cpu=True))
            ours, theirs = self.work / pair.name / WEIGHTS, self.work / f"{pair.name}-cpu" / WEIGHTS
            if ours.is_file() and theirs.is_file():
                self.report.alike[pair.name] = alike(ours, theirs)
                print(pair.name, self.report.alike[pair.name], flush=True)
        self.report.seconds = round(time.monotonic() - self.began, 1)
        self.flush()

    def one(self, request: Request) -> None:
        """One compression; an error is a result, too."""
        if self.options.only not in request.name:
            return
        outcome = self.report.runs[request.name] = Outcome()
        share = 0.8 if request.on_cpu else 0.9
        if time.monotonic() - self.began > self.options.budget * share:
            outcome.skipped = "no time"
        else:
            self._compress(request, outcome)
        self.flush()
        shown = {key: value for key, value in asdict(outcome).items() if value and key != "trace"}
        print(f"{time.monotonic() - self.began:4.0f} s  {request.name}", json.dumps(shown, default=str), flush=True)

    def waits(self) -> None:
        """Where a training step waits for the device: torch's own warning, by line of ours."""
        import torch

        seen: Counter[str] = Counter()

        def show(message: Warning | str, *_: object, **__: object) -> None:
            if "synchroniz" in str(message):
                seen[_line_of_ours()] += 1

        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            with mock.patch("warnings.showwarning", show):
                try:
                    self.one(Request("waits", "attention", "2:4+W8", {"steps": 10, "precision": "bf16"}))
                finally:
                    torch.cuda.set_sync_debug_mode("default")
        self.report.waits = dict(seen.most_common(60))
        print("waits", json.dumps(self.report.waits), flush=True)

    def flush(self) -> None:
        """Write what there is."""
        write_atomic(self.out / FILE, json.dumps(asdict(self.report), indent=1, default=str) + "\n")
        gpu = self.report.gpu or "stand-in"
        write_page(self.out, "training", gpu, {"torch": self.report.torch}, sections(self.report), [FILE])

    def _compress(self, request: Request, outcome: Outcome) -> None:
        import torch

        from compressors.settings import Settings
        from compressors.training.compress import compress
        from nxm_export.contract.checkpoint import read_config
        from nxm_export.contract.config_values import size_of
        from nxm_export.contract.families import family_of
        from nxm_export.contract.plan import WeightSpec
        from nxm_export.contract.records.checkpoint_metrics import read_metrics

        on_gpu = self.has_gpu and not request.on_cpu
        config = read_config(self.dense)
        plan = family_of(config).uniform_plan(config, WeightSpec.parse(request.option), placement=request.placement)
        usual: dict[str, object] = {
            "batch_size": 32,
            "learning_rate": 3e-4,
            "augment": 0.0,
            "max_length": 64,
            "seed": 0,
        } | request.settings
        asked = convert(usual, Settings, source=request.name, way_out="correct its settings")
        longest = size_of(config, "max_position_embeddings")
        rates, out, began = Rates(on_gpu), self.work / request.name, time.monotonic()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        train, dev = (str(self.data / name) for name in DATA)
        try:
            with _without_gpu(request.on_cpu):
                settings = replace(asked, max_length=min(asked.max_length or longest, longest))
                compress(
                    self.dense,
                    task="classification",
                    train=train,
                    dev=dev,
                    plan=plan,
                    out=out,
                    settings=settings,
                    progress=rates,
                )
            outcome.metrics = to_json_object(read_metrics(out))
        except Exception as error:
            outcome.error = f"{type(error).__name__}: {error}"[:600]
            outcome.trace = traceback.format_exc()[-3000:]
        outcome.seconds = round(time.monotonic() - began, 1)
        outcome.phases = rates.phases()
        outcome.peak_mib = round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None


def sections(report: Report) -> list[str]:
    """What the page says: every compression, how alike those of both devices are, and where steps wait."""
    rows = []
    for name, run in report.runs.items():
        rates = ", ".join(f"{what} {phase.per_second}" for what, phase in run.phases.items() if phase.per_second)
        scores = ", ".join(f"{key} {value}" for key, value in run.metrics.items() if isinstance(value, float))
        rows.append([name, str(run.seconds), rates, str(run.peak_mib), scores, run.error or run.skipped or ""])
    head = ["compression", "seconds", "steps a second", "MiB at most", "metrics", "error"]
    pairs = [
        f"- {name}: {like.equal_masks:.4%} of masks and {like.equal_weights:.4%} of weights are the CPU's, largest "
        f"difference {like.largest_difference:.3g}"
        for name, like in report.alike.items()
    ]
    waits = [f"- {count} times at {line}" for line, count in report.waits.items()]
    cells = [[cell.replace("|", "\\|").replace("\n", " ") or "-" for cell in row] for row in rows]
    made = [table(cells, head, "lrlrll")]
    made += ["\n".join(["## Against the CPU", "", *pairs])] if pairs else []
    return made + (["\n".join(["## Where steps wait for the device", "", *waits])] if waits else [])


def alike(ours: Path, theirs: Path) -> Alike:
    """Compare two safetensors files, matrices outside the embeddings."""
    from safetensors.torch import load_file

    first, second = load_file(ours), load_file(theirs)
    masks = weights = total = 0
    largest = 0.0
    for name, value in first.items():
        if value.dim() == 2 and name in second and "embeddings" not in name:
            other = second[name]
            masks += int(((value != 0) == (other != 0)).sum())
            weights += int((value == other).sum())
            total += value.numel()
            apart = float((value - other).abs().max())
            largest = max(largest, apart if apart == apart else float("inf"))  # Python's max would pass NaN over
    return Alike(masks / max(total, 1), weights / max(total, 1), largest)


def pack(run: Path, data: Path, out: Path) -> Path:
    """A directory that fits into a transfer: a finished run's dense model, as FP16, and its data.

    Raises `DataError` where it does not fit, or where the run lacks any of it.
    """
    for file in (*(data / name for name in DATA), run / "dense" / WEIGHTS):
        if not file.is_file():
            raise DataError(f"{file} is not there; give a finished run, and --data with {' and '.join(DATA)}")
    with atomic_dir(out, replace_any=True) as scratch:
        for name in DATA:
            shutil.copy(data / name, scratch / name)
        as_half(run / "dense", scratch / "dense")
        require_fits(scratch, out, "pack a run of a smaller model, or with --data that has fewer rows")
    return out


def _line_of_ours() -> str:
    """The innermost line of ours on the stack, else of the libraries that we train with."""
    stack = traceback.extract_stack()
    for folder in ("/compressors/", "/transformers/", "/accelerate/"):
        lines = [frame for frame in stack if folder in frame.filename]
        if lines:
            return f"{Path(lines[-1].filename).name}:{lines[-1].lineno} {(lines[-1].line or '')[:80]}"
    return "elsewhere"


@contextmanager
def _without_gpu(hidden: bool) -> Iterator[None]:
    """Hide the GPU from the product, which asks torch for one."""
    with mock.patch("torch.cuda.is_available", return_value=False) if hidden else warnings.catch_warnings():
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="collect what the GPU machine needs")
    packing.add_argument("run", type=Path, help="a finished run directory, with dense/")
    packing.add_argument("--data", type=Path, help="directory with train.tsv and dev.tsv [RUN/data]")
    packing.add_argument("--out", type=Path, default=Path(".gpu-probe"))
    running = commands.add_parser("run", help="measure")
    running.add_argument("data", type=Path, help="what `pack` made")
    running.add_argument("--out", type=Path, required=True, help="where training_probe.json goes")
    running.add_argument("--budget", type=float, default=270, help="seconds; what was not reached says so")
    running.add_argument("--steps", type=int, default=120, help="optimizer steps of a compression")
    running.add_argument("--cpu-steps", type=int, default=20, help="of those that the CPU repeats")
    running.add_argument("--only", default="", help="only names that contain this")
    running.add_argument("--cpu-only", action="store_true", help="rehearse without a GPU")
    options = parser.parse_args(arguments)
    if options.command == "pack":
        try:
            print(pack(options.run, options.data or options.run / "data", options.out))
        except NxmError as error:
            print(f"tools.gpu.training_probe: {error}", file=sys.stderr)
            return 1
        return 0
    import torch

    if not torch.cuda.is_available() and not options.cpu_only:
        print("tools.gpu.training_probe: torch sees no CUDA device here; --cpu-only rehearses", file=sys.stderr)
        return 1
    try:
        if not (options.data / "dense").is_dir():
            raise DataError(f"{options.data} has no dense/; make it: python -m tools.gpu.training_probe pack RUN")
        make_directory(options.out)
    except NxmError as error:
        print(f"tools.gpu.training_probe: {error}", file=sys.stderr)
        return 1
    probe = Probe(options.data, options.out, options)
    try:
        probe.run()
    finally:
        shutil.rmtree(probe.work, ignore_errors=True)
    return 1 if any(outcome.error for outcome in probe.report.runs.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

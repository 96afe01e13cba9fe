"""What does INT8 2:4 give in whole models, with the product's own engine of torch and cuSPARSELt? FP16, dense INT8 and
sparse INT8 twins, and Hugging Face's model in FP16.

    python3 -m tools.gpu.engine_twins --out $OUT/twins --budget 400      on the GPU machine
    python3 -m tools.gpu.engine_twins --out $OUT/twins --checkpoint runs/a/checkpoint --shapes 32x128
    python3 -m tools.gpu.engine_twins --out /tmp/twins --rehearse --models tiny --shapes 2x16 --rounds 2    anywhere

Models have the shapes of `tools.gpu.evidence` and random weights: times do not depend on what weights say. Each subject
is a model with quantizers in front of products alone (``inputs``) or behind them, too (``inputs-outputs``). After every
shape the subject's JSON is written again; what is complete in ``--out``, of the same machine, shapes and rounds, is not
measured again. Tables come last. A rehearsal runs on exact integers on the CPU: nothing it says is about a GPU.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast
from unittest import mock

import numpy as np

from engines.base import BuildOptions, Engine
from engines.benchmark.latency import GPU_WARM_UP_S, BenchReport, bench, interleaved, sparse_verdict
from engines.cusparselt import backend
from engines.cusparselt.machine import Machine, this_machine
from engines.cusparselt.profiling import ProfiledRun, read_profile
from engines.cusparselt.program import Choice
from engines.cusparselt.stand_in import IntegerReferenceKernels
from engines.parity.reports import Comparison
from engines.passport import load_passport
from nxm_export.contract.checkpoint import read_config, task_at
from nxm_export.contract.choices import TASK
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import EngineUnavailable, NxmError
from nxm_export.hf.model_loading import load_task_model
from nxm_export.hf.protocols import HasAttention
from nxm_export.pipeline.engine_comparison import compare_engines
from nxm_export.pipeline.engine_sparsity import measure_layers
from nxm_export.pipeline.inspection import inspect_engine
from nxm_export.pipeline.sparsity_twins import DENSE, SPARSE, TWINS, TwinGraphs, build_twins
from nxm_export.storage.atomic import make_directory, write_atomic
from nxm_export.storage.json_files import encode, read_record
from tools.gpu.arguments import fitting, names_of, shapes
from tools.gpu.evidence import MODELS, Parity, Sparsity, parity, profiles_of
from tools.gpu.pages import write_page
from tools.gpu.random_checkpoint import write_checkpoint
from tools.gpu.twin_tables import table_of, tables

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
SCHEMA = "nxm-gpu-engine-twins/1"
PLACEMENTS = ("inputs-outputs", "inputs")
SHAPES = ("32x128", "128x128", "32x384", "8x128", "1x128", "128x384")
WIDE = 2  # models that come first, before anything is measured a second time
TABLE_CHARACTERS = 10_500  # of the output's end
STAND_IN = {
    "torch": "stand-in", "cuda": "stand-in", "cusparselt": "0.8.0", "gpu": "stand-in", "compute_capability": "9.0",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """What is measured: a model of `MODELS`, or a checkpoint; with which quantizers (None: those that were trained)."""

    model: str
    placement: str | None
    checkpoint: str | None = None
    layers: int | None = None

    @property
    def name(self) -> str:
        """The name of its files."""
        return "-".join([self.model, *([str(self.layers)] if self.layers else []), self.placement or "as-trained"])


@dataclass(frozen=True)
class Asked:
    """What a subject is to be measured at."""

    shapes: tuple[tuple[int, int], ...]
    rounds: int
    compiled: int
    data: str | None = None


@dataclass(frozen=True)
class Result:
    """What a subject came to; written after every measurement. `hugging_face` are milliseconds by shape: of the model
    as it is (``fp16``), and compiled. `profiles` are of the sparse engine, by shape. `captured` says which engines ran
    as a CUDA graph. `parity` is on random tokens, `compared` on labelled data. `unbuilt` says why a
    twin could not be built, `complete` that nothing of what was `asked` is left to do."""

    subject: Subject
    machine: Mapping[str, str]
    kind: str
    seconds: Mapping[str, float]
    sparsity: Sparsity | None = None
    choices: tuple[Choice, ...] = ()
    profiles: Mapping[str, ProfiledRun] = field(default_factory=dict)
    captured: Mapping[str, bool] = field(default_factory=dict)
    unbuilt: Mapping[str, str] = field(default_factory=dict)
    bench: tuple[BenchReport, ...] = ()
    parity: Mapping[str, Parity] | None = None
    compared: Comparison | None = None
    hugging_face: Mapping[str, Mapping[str, float]] | None = None
    verdict: str | None = None
    error: str | None = None
    trace: str | None = None
    skipped: tuple[str, ...] = ()
    complete: bool = False
    asked: Asked | None = None


@dataclass(frozen=True)
class Plan:
    """How subjects are measured, and until when (`time.monotonic`); Hugging Face's model is compiled at as many shapes
    as `compiled`, the first ones; checkpoints that are given are compared on `data`."""

    shapes: tuple[tuple[int, int], ...]
    rounds: int
    out: Path
    work: Path
    until: float
    compiled: int
    machine: Machine
    data: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() > self.until


def subjects(models: Sequence[str], checkpoints: Sequence[str], layers: int | None) -> list[Subject]:
    """In order of value: the first models in the first placement, checkpoints, the other models, then their second
    placement."""
    first, second = ([Subject(model, placement, layers=layers) for model in models] for placement in PLACEMENTS)
    return [*first[:WIDE], *(Subject(Path(path).name, None, path) for path in checkpoints), *first[WIDE:], *second]


class Measuring:
    """One subject; `result` is written whenever something is added to it."""

    def __init__(self, subject: Subject, plan: Plan) -> None:
        self.plan, self.subject = plan, subject
        self.file = plan.out / f"{subject.name}.json"
        self.work = plan.work / subject.name
        self.data = plan.data if subject.checkpoint is not None else None
        asked = Asked(plan.shapes, plan.rounds, plan.compiled, self.data)
        self.result = Result(subject, plan.machine.facts, plan.machine.kernels.kind, {}, asked=asked)
        self._unknown: str | None = None  # why it is not known which kernels the sparse engine runs

    def run(self) -> Result:
        """Until all is measured or the budget is spent; an error is a result, too."""
        if self.file.is_file():
            known = read_record(self.file, Result, schema=SCHEMA, way_out="remove it, and it is measured again")
            if known.complete and self._is_of_this(known):
                return known
        try:
            self._measure()
        except Exception as error:  # of any type: what was measured is kept, and the other subjects are measured
            self._failed(error)
        return self.result

    def _failed(self, error: Exception) -> None:
        """Keep the first error."""
        if self.result.error is None:
            self._add(error=f"{type(error).__name__}: {error}"[:600], trace=traceback.format_exc()[-3000:])

    def _is_of_this(self, known: Result) -> bool:
        """Whether a result is of this subject, on this machine, and of what is asked now."""
        mine = self.result
        return (known.subject, known.machine, known.kind, known.asked) == (
            mine.subject, dict(mine.machine), mine.kind, mine.asked,
        )  # fmt: skip

    def _measure(self) -> None:
        checkpoint = self._timed("checkpoint", self._checkpoint)
        positions = int(cast(int, read_config(checkpoint)["max_position_embeddings"]))
        taken = fitting(self.plan.shapes, positions)
        self._timed("twins", lambda: self._build(checkpoint, taken))
        self._tried("profile", self._inspect)
        vocabulary = int(cast(int, read_config(checkpoint)["vocab_size"]))
        with ExitStack() as stack:
            engines: dict[str, Engine] = {}
            for name in self._twins:
                try:
                    engines[name] = stack.enter_context(backend.load(self.work / name))
                except Exception as error:  # the other twins are timed
                    self._failed(error)
            for shape in taken:
                self._tried("x".join(map(str, shape)), partial(self._bench, engines, shape, vocabulary))
        theirs = self.subject.placement in (None, PLACEMENTS[0])  # it has no quantizers: once is enough
        longest, few = max(sequence for _, sequence in taken), taken[: self.plan.compiled]
        if theirs:
            self._tried("hugging face", lambda: self._hugging_face("fp16", checkpoint, taken, vocabulary))
        self._tried("parity", lambda: self._add(parity=parity(checkpoint, self.work, longest, vocabulary)))
        if (data := self.data) is not None:
            engines_at = [self.work / name for name in self._twins]
            self._tried("data", lambda: self._add(compared=compare_engines(checkpoint, engines_at, data)))
        if theirs and few:
            self._tried("compiled", lambda: self._hugging_face("compiled", checkpoint, few, vocabulary))
        self._add(complete=not self.result.skipped and self.result.error is None)

    def _tried(self, what: str, work: Callable[[], None]) -> None:
        """Something that the others do not depend on, if there is time: its error is kept, and they go on."""
        if self.plan.is_over:
            self._add(skipped=(*self.result.skipped, what))
            return
        try:
            self._timed(what, work)
        except Exception as error:
            self._failed(error)

    def _checkpoint(self) -> Path:
        if self.subject.checkpoint is not None:
            return Path(self.subject.checkpoint)
        model, layers = self.subject.model, self.subject.layers
        return write_checkpoint(model, self.plan.work / "checkpoints" / f"{model}-{layers or 'all'}", layers)

    def _build(self, checkpoint: Path, shapes: Sequence[tuple[int, int]]) -> None:
        settings = BuildOptions(profiles=profiles_of(shapes))
        if self.work.is_dir():
            shutil.rmtree(self.work)
        graphs = TwinGraphs(placement=self.subject.placement)
        built = build_twins(checkpoint, self.work, backend.NAME, settings, graphs)
        for name, why in built.failed.items():
            self._add(unbuilt=built.failed, error=f"{name} could not be built: {why}"[:600])

    @property
    def _twins(self) -> list[str]:
        """The names of the twins that were built."""
        return [name for name in TWINS if name not in self.result.unbuilt]

    def _inspect(self) -> None:
        sparse = self.work / SPARSE
        captured = {}
        for name in self._twins:
            measure_layers(self.work / name)
            profiled = read_profile(self.work / name, load_passport(self.work / name).engine_sha256)
            captured[name] = profiled is not None and profiled.replayed is not None
        self._add(captured=captured)
        if SPARSE not in self._twins:
            return
        inspected = inspect_engine(sparse)
        assert isinstance(inspected.facts, backend.CusparseltFacts)
        report = inspected.facts.sparsity
        if report.open_question is not None:
            self._unknown = f"which kernels the sparse engine runs is not known: {report.open_question.detail}"
        planned = [weight for weight in report.weights if weight.planned_sparse]
        chosen = sum(weight.chosen is True for weight in planned)
        self._add(
            sparsity=Sparsity(len(planned), chosen, report.sparse_share, report.counts),
            choices=inspected.facts.choices,
        )

    def _bench(self, engines: Mapping[str, Engine], shape: tuple[int, int], vocabulary: int) -> None:
        report = bench(engines, [shape], rounds=self.plan.rounds, vocabulary=vocabulary)
        reports = (*self.result.bench, report)
        together = BenchReport(
            tuple(timing for each in reports for timing in each.timings),
            tuple(ratio for each in reports for ratio in each.ratios),
            unmeasured=tuple(text for each in reports for text in each.unmeasured),
        )
        verdict = "no verdict: which kernels the sparse engine runs is not known"
        if (known := self.result.sparsity) is not None:
            gpu = self.plan.machine.facts["gpu"]
            verdict = sparse_verdict(together, SPARSE, DENSE, known.share, gpu, self._unknown)
        self._add(bench=reports, verdict=verdict)  # what is timed is kept if no profiler works
        profiles = dict(self.result.profiles)
        if isinstance(sparse := engines.get(SPARSE), backend.CusparseltEngine):
            sha256 = load_passport(self.work / SPARSE).engine_sha256
            profiles["x".join(map(str, shape))] = sparse.profiled(shape, sha256)
            self._add(profiles=profiles)
        medians = {timing.name: round(timing.median, 4) for timing in report.timings}
        print(f"{self.subject.name} {shape[0]}x{shape[1]}, ms: {medians}", flush=True)

    def _hugging_face(self, way: str, checkpoint: Path, shapes: Sequence[tuple[int, int]], vocabulary: int) -> None:
        """Their model as it is (``fp16``), or compiled for each shape (``compiled``)."""
        model = None
        for batch, sequence in shapes:
            shape = f"{batch}x{sequence}"
            if self.plan.is_over:
                self._add(skipped=(*self.result.skipped, f"hugging face {way} {shape}"))
                continue
            model = model or _model(checkpoint, self.plan.machine, compiled=way == "compiled")
            ms, in_graph = _milliseconds(model.call, (batch, sequence), vocabulary, self.plan)
            shown = f"{way}{'' if model.attention == 'sdpa' else f' with {model.attention} attention'}"
            shown += "" if in_graph else " launched one by one"
            known = dict(self.result.hugging_face or {})
            known[shape] = {**known.get(shape, {}), shown: ms}
            self._add(hugging_face=known)

    def _timed(self, what: str, work: Callable[[], T]) -> T:
        began = time.monotonic()
        made = work()
        self._add(seconds={**self.result.seconds, what: round(time.monotonic() - began, 1)})
        return made

    def _add(self, **fields: object) -> None:
        result = replace(self.result, **fields)  # type: ignore[arg-type]  # fields of `Result`
        write_atomic(self.file, encode(result, SCHEMA))  # raises for NaN, which then is not in `result`
        self.result = result


@dataclass(frozen=True)
class _Theirs:
    """Hugging Face's model: a function of the inputs that gives its first output, and how its attention runs, since not
    every model of theirs has a fused one."""

    call: Callable[..., torch.Tensor]
    attention: str


def _model(checkpoint: Path, machine: Machine, *, compiled: bool) -> _Theirs:
    """Hugging Face's own model in FP16, with its fused attention where it has one."""
    import torch

    task = TASKS[task_at(checkpoint, read_config(checkpoint)) or TASK]
    module = load_task_model(checkpoint, task)
    chosen = cast("HasAttention", module)
    chosen.set_attn_implementation("sdpa")
    attention = chosen.config._attn_implementation
    if machine.kernels.kind == "gpu":
        module = module.half()
    module = module.to(machine.kernels.device)
    called = torch.compile(module, mode="max-autotune-no-cudagraphs", dynamic=False) if compiled else module
    return _Theirs(lambda **feeds: cast(torch.Tensor, next(iter(called(**feeds).values()))), attention)


def _milliseconds(
    model: Callable[..., torch.Tensor], shape: tuple[int, int], vocabulary: int, plan: Plan
) -> tuple[float, bool]:
    """The median of runs on the device, and whether they are of a CUDA graph, as where there can be one."""
    import torch

    kernels = plan.machine.kernels
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, vocabulary, shape)).to(kernels.device)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def call() -> dict[str, torch.Tensor]:
        return {"logits": model(**feeds)}

    with torch.no_grad():
        call()
        captured = kernels.capture(call)
        run: Callable[[], object] = captured[0] if captured is not None else call
        warm_up_s = GPU_WARM_UP_S if kernels.kind == "gpu" else 0.0  # as for the engines that it is compared with
        taken = interleaved({"": lambda: kernels.milliseconds(run)}, plan.rounds, warm_up_s=warm_up_s)
        return statistics.median(taken[""]), captured is not None


@contextmanager
def rehearsal() -> Iterator[Machine]:
    """The verbs of the backend run on exact integers on the CPU, and say "stand-in" wherever they say a GPU."""
    stand_in = Machine(IntegerReferenceKernels(), STAND_IN)
    with mock.patch.object(backend, "this_machine", return_value=stand_in):
        yield stand_in


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.gpu.engine_twins",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files and the page")
    parser.add_argument("--budget", type=float, default=400, help="seconds; what was not reached is listed")
    models = "bert-base,minilm,bert-large"
    parser.add_argument(
        "--models", type=names_of(MODELS, or_none=True), default=models, help=f"of {', '.join(MODELS)}; '' for none"
    )
    parser.add_argument("--checkpoint", action="append", default=[], help="a compressed checkpoint; may be repeated")
    parser.add_argument("--data", help="labelled rows, such as a dev.tsv: checkpoints are compared on them, too")
    parser.add_argument(
        "--shapes", type=shapes, default=",".join(SHAPES), help="batch x sequence; the first matter most"
    )
    parser.add_argument("--layers", type=int, help="of the models, fewer than they have: export takes less time")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--compile",
        type=int,
        default=1,
        help="at how many shapes, the first ones, Hugging Face's model is compiled, too",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/gpu-engine-twins"), help="checkpoints, graphs, engines")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with exact integers: times mean nothing")
    options = parser.parse_args(arguments)
    names = [Path(path).name for path in options.checkpoint]
    if len(set(names)) < len(names):
        parser.error("--checkpoint: results are kept by the names of directories, and two have one name; link them")
    try:
        if options.rehearse:
            with rehearsal() as machine:
                return measure_all(options, machine)
        return measure_all(options, this_machine())
    except NxmError as error:
        way_out = "; --rehearse runs on the CPU" if isinstance(error, EngineUnavailable) else ""
        print(f"tools.gpu.engine_twins: {error}{way_out}", file=sys.stderr)
        return 1


def measure_all(options: argparse.Namespace, machine: Machine) -> int:
    """Every subject on a machine, until the budget is spent; 0 where anything was timed."""
    began = time.monotonic()
    make_directory(options.out)
    until = began + options.budget
    plan = Plan(
        tuple(options.shapes), options.rounds, options.out, options.work, until, options.compile, machine, options.data
    )
    results: list[Result] = []
    skipped: list[str] = []

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)  # `timeout` ends the measuring; the tables are printed all the same
    measuring = None
    try:
        for subject in subjects(options.models, options.checkpoint, options.layers):
            if plan.is_over:
                skipped.append(subject.name)
                continue
            measuring = Measuring(subject, plan)
            results.append(measuring.run())
            measuring = None
            _write(results, skipped, plan)
    except KeyboardInterrupt:
        results += [measuring.result] if measuring is not None else []
        skipped.append("what came after a signal")
    signal.signal(signal.SIGTERM, before)
    _write(results, skipped, plan)
    lines = tables(results)
    print("\n".join(lines)[:TABLE_CHARACTERS], *_not_reached(skipped), sep="\n", flush=True)
    return 0 if any(result.bench for result in results) else 1


def _write(results: Sequence[Result], skipped: Sequence[str], plan: Plan) -> None:
    """The page of docs/gpu, beside the JSON files."""
    facts = plan.machine.facts
    versions = {"torch": facts["torch"], "CUDA": facts["cuda"], "cuSPARSELt": facts["cusparselt"]}
    raw = [f"{result.subject.name}.json" for result in results]
    sections = ["\n".join(table_of(result)) for result in results]
    write_page(plan.out, "twins", facts["gpu"], versions, [*sections, *_not_reached(skipped)], raw)


def _not_reached(skipped: Sequence[str]) -> list[str]:
    return [f"not reached: {', '.join(skipped)}"] if skipped else []


if __name__ == "__main__":
    sys.exit(main())

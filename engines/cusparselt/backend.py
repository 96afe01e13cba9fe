"""Sparse and dense INT8 on an NVIDIA GPU through torch: cuSPARSELt, cuBLASLt, and torch's own kernels for the rest.

`build` and `load` are on this machine's GPU and on nothing else. `build_on` and `load_on` take any `Machine`: tests and
rehearsals give them a stand-in, whose engines say so in their passport and are refused by `load`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from engines.base import (
    BackendCapabilities,
    Binding,
    BuildOptions,
    Closing,
    LoadOptions,
    as_bound,
    copy_companions,
    require_feeds,
    require_within,
    spec_of,
)
from engines.compiled_shapes import Shape, cut, padded, padding_values
from engines.cusparselt.choosing import choices_for, rows_of
from engines.cusparselt.executor import KNOWN, Executor, compiler
from engines.cusparselt.graph_shapes import graph_shape
from engines.cusparselt.machine import Machine, this_machine
from engines.cusparselt.profiling import ProfiledRun, profiled, read_profile, save_profile
from engines.cusparselt.program import (
    ENGINE_FILE,
    Choice,
    Program,
    program_of,
    require_consistent,
    tensors_of,
    to_bytes,
)
from engines.cusparselt.report import sparsity_report
from engines.passport import Bindings, BuildFacts, EnginePassport, load_passport
from engines.sample_inputs import nearest_shape, sample_feeds
from engines.sparsity.engine_report import FACTS_FILE, write_weight_facts
from engines.sparsity.sparsity_report import SparsityReport, SparsityTarget
from engines.tensorrt.profiles import graph_inputs, profiles_for
from nxm_export.errors import EngineError
from nxm_export.storage.json_files import to_builtins

if TYPE_CHECKING:
    import onnx_ir as ir
    from torch import Tensor

NAME = "cusparselt"
CAPABILITIES = BackendCapabilities(
    "gpu", optimization_profiles=True, sparse_kernels=True, profiled_kernels=True, always_sparse=True
)
_VOCABULARY = 1000


@dataclass(frozen=True)
class CusparseltFacts:
    """What an engine requires of a machine, how many products are of integers, how attention is computed, what was
    measured and chosen for products of equal sizes, and the sparsity report; `profiled` is the run that it rests on,
    None where none was profiled."""

    backend: str
    requires: Mapping[str, str]
    integer_products: int
    attention: Mapping[str, int]
    choices: tuple[Choice, ...]
    profiled: ProfiledRun | None
    sparsity: SparsityReport

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``: the report's fields stand beside the others."""
        return {
            "backend": self.backend,
            "requires": dict(self.requires),
            "integer_products": self.integer_products,
            "attention": dict(self.attention),
            "choices": to_builtins(self.choices),
            "profiled": None if self.profiled is None else to_builtins(self.profiled),
            **self.sparsity.to_dict(),
        }


def build(onnx: str | Path, out: Path, options: BuildOptions = BuildOptions()) -> EnginePassport:
    """Write an engine directory with ``model.safetensors`` and ``weights.json``.

    Raises `EngineUnavailable` without what an engine needs here, `ExportError` for a graph that breaks its plan, and
    `EngineError` for operators that are not known.
    """
    return build_on(this_machine(), onnx, out, options)


def build_on(machine: Machine, onnx: str | Path, out: Path, options: BuildOptions = BuildOptions()) -> EnginePassport:
    """`build`, on a machine that is given."""
    from engines.cusparselt.lowering import lowered
    from nxm_export.graph.external_data import graph_files
    from nxm_export.graph.reading.graph_weights import load_graph
    from nxm_export.graph.verifier import verify_model

    onnx = Path(onnx)
    _require_options(options)
    model = load_graph(onnx)
    source = graph_files(model, onnx)
    verify_model(model, str(onnx)).require()
    profiles = profiles_for(options.profiles, onnx.parent, graph_inputs(model), options.max_batch_tokens)
    made, kernels = lowered(model, str(onnx)), machine.kernels
    compiled = compiler(kernels, fuse=options.fuse)
    choices = choices_for(
        made.program, made.tensors, kernels, rows_of(profiles), options.sparse, compiled, options.progress
    )
    program = made.with_choices(choices).program
    data = to_bytes(program, made.tensors)
    _require_running(program, data, machine, onnx)
    (out / ENGINE_FILE).write_bytes(data)
    copy_companions(onnx.parent, out)
    target = SparsityTarget(
        NAME, machine.facts["cusparselt"], machine.facts["compute_capability"], options.sparse != "never"
    )
    write_weight_facts(out, model, target)
    facts = BuildFacts(
        device={"kind": kernels.kind, **machine.facts},
        requires=machine.facts,
        options={
            "sparse": options.sparse,
            "fuse": options.fuse,
            "twin": options.twin,
            "integer_products": len(program.products),
            "attention": dict(program.attention),
        },
        graph=model.metadata_props,
        source=source,
        bindings=Bindings(program.inputs, _outputs(model)),
        profiles=profiles,
        evidence=(FACTS_FILE,),
    )
    return EnginePassport.issue(NAME, out / ENGINE_FILE, onnx, facts)


def load(directory: str | Path, options: LoadOptions = LoadOptions()) -> CusparseltEngine:
    """Load an engine directory; hash, versions and GPU are checked before anything is read of it."""
    passport = load_passport(directory)
    return load_on(this_machine(), directory, passport)


def load_on(machine: Machine, directory: str | Path, passport: EnginePassport | None = None) -> CusparseltEngine:
    """`load`, on a machine that is given."""
    directory = Path(directory)
    passport = passport or load_passport(directory)
    data = passport.read_engine(directory, machine.facts)
    return CusparseltEngine(directory, data, machine, fuse=passport.options.get("fuse") is not False)


def inspect(directory: str | Path) -> CusparseltFacts:
    """Facts of an engine directory, which needs no GPU."""
    directory = Path(directory)
    passport = load_passport(directory)
    program = program_of(passport.read_engine(directory, passport.requires), str(directory / passport.engine))
    run = read_profile(directory, passport.engine_sha256)
    report = sparsity_report(directory, passport, program, run)
    return CusparseltFacts(
        NAME, passport.requires, len(program.products), program.attention, program.choices, run, report
    )


def profile(directory: str | Path) -> None:
    """Profile a run at the first profile's best shape, and write ``kernels.json`` beside the engine."""
    profile_on(this_machine(), Path(directory))


def profile_on(machine: Machine, directory: Path) -> None:
    """`profile`, on a machine that is given."""
    passport = load_passport(directory)
    with load_on(machine, directory, passport) as engine:
        shape = nearest_shape(engine.input_bindings, *passport.profiles[0].optimum)
        save_profile(directory, engine.profiled(shape, passport.engine_sha256))


class CusparseltEngine(Closing):
    """A program on the GPU. See `engines.base.Engine`. It takes any shape that the model takes, and runs it padded to
    one of a few (`engines.cusparselt.graph_shapes`), of which each has a CUDA graph."""

    clock = "CUDA events"

    def __init__(self, directory: Path, data: bytes, machine: Machine, *, fuse: bool = True) -> None:
        file = directory / ENGINE_FILE
        program, tensors = program_of(data, str(file)), tensors_of(data, str(file))
        require_consistent(program, tensors, KNOWN, str(file))
        self.directory, self._spec, self._kernels = directory, spec_of(directory), machine.kernels
        with _failures_of_torch(directory):
            self._executor: Executor | None = Executor(program, tensors, machine.kernels, fuse=fuse)
        self._one_at_a_time = threading.Lock()
        self._bindings = program.inputs
        self._pads = padding_values(program.inputs, self._spec, program.outputs)
        self.inputs = tuple(binding.name for binding in program.inputs)
        self.outputs = program.outputs

    @property
    def input_bindings(self) -> tuple[Binding, ...]:
        """The inputs as the engine file has them."""
        return self._bindings

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name, float32."""
        executor = self._open()
        self._require(feeds)
        with self._working():
            outputs = executor.run(self._on_device(self._padded(feeds)))
            arrays = {name: tensor.cpu().numpy() for name, tensor in outputs.items()}
        if self._pads is None or self._spec is None:
            return {name: array.copy() for name, array in arrays.items()}
        size = next(iter(feeds.values())).shape
        return {name: cut(array, self._spec.outputs[name], *size) for name, array in arrays.items()}

    def compiled_shape(self, feeds: Mapping[str, np.ndarray]) -> Shape | None:
        """See `engines.base.ShapedEngine`; None: of inputs that cannot be padded."""
        if self._pads is None or self._spec is None:
            return None
        rows, length = next(iter(feeds.values())).shape
        return graph_shape(rows, length, self._spec.max_length)

    def _padded(self, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """`feeds` in the shape that runs them."""
        shape = self.compiled_shape(feeds)
        return feeds if shape is None or self._pads is None else padded(feeds, shape, self._pads)

    def timer(self, feeds: Mapping[str, np.ndarray]) -> Callable[[], float]:
        """A function that runs `feeds`, already on the GPU, and returns the milliseconds between two CUDA events."""
        return self.queue_timer(feeds, 1)

    def queue_timer(self, feeds: Mapping[str, np.ndarray], runs: int) -> Callable[[], float]:
        """See `engines.base.QueuedEngine`."""
        executor = self._open()
        self._require(feeds)
        with self._working():
            replay = executor.replayer(self._on_device(self._padded(feeds)))

        def queued() -> None:
            for _ in range(runs):
                replay()

        def timed() -> float:
            with self._working():
                return self._kernels.milliseconds(queued)

        return timed

    def launches_graph(self, feeds: Mapping[str, np.ndarray]) -> bool:
        """See `engines.base.QueuedEngine`."""
        return self._open().is_captured(self._padded(feeds))

    def profiled(self, shape: tuple[int, int], sha256: str) -> ProfiledRun:
        """The kernels of a run at a shape (batch, sequence), or at the one that runs it, of made-up inputs."""
        executor = self._open()
        if self._pads is not None and self._spec is not None:
            shape = graph_shape(*shape, self._spec.max_length)
        vocabulary = min(_VOCABULARY, self._spec.limits.get("input_ids", _VOCABULARY)) if self._spec else None
        feeds = sample_feeds(self._bindings, *shape, vocabulary)
        with self._working():
            return profiled(executor, self._on_device(feeds), shape, sha256)

    def close(self) -> None:
        """Let go of what is on the GPU."""
        self._executor = None

    @contextmanager
    def _working(self) -> Iterator[None]:
        """One run at a time; a failure in torch, such as too little memory, is an `EngineError`."""
        import torch

        with self._one_at_a_time, torch.no_grad(), _failures_of_torch(self.directory):
            yield

    def _open(self) -> Executor:
        if self._executor is None:
            raise EngineError(f"{self.directory}: this engine was closed")
        return self._executor

    def _require(self, feeds: Mapping[str, np.ndarray]) -> None:
        require_feeds(self, feeds)
        require_within(self._spec, feeds)

    def _on_device(self, feeds: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
        import torch

        return {
            binding.name: torch.from_numpy(np.ascontiguousarray(as_bound(binding, feeds[binding.name]))).to(
                self._kernels.device
            )
            for binding in self._bindings
        }


@contextmanager
def _failures_of_torch(directory: Path) -> Iterator[None]:
    """What torch raises becomes an `EngineError` of the engine in `directory`."""
    try:
        yield
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise EngineError(f"{directory}: torch failed: {str(error).strip()[:300]}") from error


def _require_options(options: BuildOptions) -> None:
    """Raise `EngineError` for options that are TensorRT's alone."""
    given = {
        "--level": options.level is not None,
        "--workspace": options.workspace_bytes is not None,
        "--build-route": options.build_route is not None,
        "--timing-cache": options.timing_cache is not None,
    }
    wrong = [name for name, was_given in given.items() if was_given]
    if wrong:
        raise EngineError(f"{', '.join(wrong)} is for TensorRT; leave it out with --backend {NAME}")


def _require_running(program: Program, data: bytes, machine: Machine, onnx: Path) -> None:
    """Run the engine once at its smallest: what it would refuse on every start, it refuses here."""
    import torch

    shape = nearest_shape(program.inputs, 1, 1)
    try:
        executor = Executor(program, tensors_of(data, str(onnx)), machine.kernels)
        feeds = {
            name: torch.from_numpy(array).to(machine.kernels.device)
            for name, array in sample_feeds(program.inputs, *shape, None).items()
        }
        with torch.no_grad():
            executor.run(feeds)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise EngineError(f"{onnx}: it cannot be run by torch: {str(error).splitlines()[0][:300]}") from error


def _outputs(model: ir.Model) -> tuple[Binding, ...]:
    """The graph's outputs; they are float32 here, whatever the graph has."""
    return tuple(
        Binding(
            str(value.name),
            "float32",
            () if value.shape is None else tuple(size if isinstance(size, int) else -1 for size in value.shape),
        )
        for value in model.graph.outputs
    )

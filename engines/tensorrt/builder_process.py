"""One TensorRT build, in a child process: parse, configure, build, inspect. TensorRT 8.6, 10, 11 and TensorRT-RTX.

A process of its own because polygraphy decides between TensorRT and TensorRT-RTX once per process, because a crash of
the builder must not take us along, and because everything that the builder prints then is ``build.log``. Polygraphy
creates network, configuration and engine; what it lacks is here: parser errors by layer, a timing cache that is
checked instead of dropped without a word, ``build_route``, and the inspector's report per profile.

TensorRT 10 and later are strongly typed: types come from the graph. 8.6 is weakly typed: its graph is float32, and
flags allow INT8 and FP16.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from engines.base import Binding, Profile, module_command
from engines.passport import Bindings
from engines.sample_inputs import shape_at
from engines.sparsity.build_evidence import LAYERS_FILE, LAYERS_SCHEMA, InspectedEngine, InspectedProfile
from nxm_export.errors import ArtifactError, EngineError
from nxm_export.progress import Progress
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import convert, encode, parse_json, read_record, to_builtins

if TYPE_CHECKING:
    from engines.tensorrt.bindings import BuilderConfig, Network, Parser, Tensor, TensorRT

CACHE_FILE = "timing.cache"
SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
STRONGLY_TYPED_SINCE = 10
# Lines that name no cause: a machine without a driver (the RTX builder needs none), and what follows an error.
_NOISE = ("cudaError 35", "CUDA driver version is insufficient", "Invalid Engine", "Invalid Node", "ModelImporter.cpp")
_SHAPES_REFUSED = re.compile(r"values for profile \d+ violate shape constraints|Dimension mismatch for tensor")
SEAL_SCHEMA = "nxm-timing-cache/1"


@dataclass(frozen=True)
class TimingCacheRequest:
    """A timing cache to begin with; where it is `required`, one that TensorRT refuses is an error."""

    path: str
    required: bool


@dataclass(frozen=True)
class BuildRequest:
    """One build. `module` is tensorrt or tensorrt_rtx; `onnx`, `engine` and `directory` are paths;
    `compute_capabilities` are for RTX; `inspect` writes the inspector's report, which needs a GPU."""

    module: str
    onnx: str
    engine: str
    directory: str
    profiles: tuple[Profile, ...]
    sparse: bool
    level: int | None
    workspace_bytes: int | None
    inspect: bool
    build_route: str | None = None
    timing_cache: TimingCacheRequest | None = None
    compute_capabilities: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class BuiltFacts:
    """What a finished build says. `cache_refused` says why the timing cache was not used, if it was not."""

    tensorrt: str
    strongly_typed: bool
    bindings: Bindings
    cache_refused: str | None = None


@dataclass(frozen=True)
class PhaseProgress:
    """How far a phase of the build is."""

    phase: str
    done: int
    total: int


@dataclass(frozen=True)
class BuilderMessage:
    """One line from the child: exactly one of these. An `error` is in words for the user; what a `failure` was, the
    builder's log says better."""

    progress: PhaseProgress | None = None
    facts: BuiltFacts | None = None
    error: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class CacheSeal:
    """What lies beside a timing cache: its hash, and the TensorRT version and GPU that it was measured on."""

    sha256: str
    identity: Mapping[str, str]


Report = Callable[[BuilderMessage], None]


def build_in_child(request: BuildRequest, log: Path, progress: Progress) -> BuiltFacts:
    """Run one build in a process of its own and return what it reports.

    Raises `EngineError` with the builder's own text, the layer it is about where that is known, and the log's path.
    """
    reading, writing = os.pipe()
    environment = {**os.environ, SWITCH: "1" if request.module == "tensorrt_rtx" else "0"}
    command = module_command("engines.tensorrt.builder_process", json.dumps(to_builtins(request)), str(writing))
    with log.open("w", encoding="utf-8") as stream, os.fdopen(reading, encoding="utf-8") as reports:
        child = subprocess.Popen(command, env=environment, stdout=stream, stderr=stream, pass_fds=(writing,))
        os.close(writing)
        facts: BuiltFacts | None = None
        error: str | None = None
        failure: str | None = None
        try:
            for line in reports:
                if not line.endswith("\n"):
                    break  # it was killed while it wrote
                message = _message(line, log)
                if message.progress is not None:
                    progress(message.progress.phase, message.progress.done, message.progress.total)
                facts, error = message.facts or facts, message.error or error
                failure = message.failure or failure
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.terminate()
            code = child.wait()
    if error is not None:
        raise EngineError(f"{request.onnx}: {error} (log: {log})")
    if failure is not None:
        cause = _cause(log, request.profiles) or failure
        raise EngineError(f"{request.onnx}: the builder failed: {cause} (log: {log})")
    if code or facts is None or not Path(request.engine).is_file():
        cause = _cause(log, request.profiles) or "no error text"
        raise EngineError(f"{request.onnx}: the builder ended with {code} and wrote no engine: {cause} (log: {log})")
    return facts


def _message(line: str, log: Path) -> BuilderMessage:
    source, way_out = "the builder's report", f"see its log: {log}"
    value = parse_json(line, source, way_out, EngineError)
    return convert(value, BuilderMessage, source=source, way_out=way_out, error=EngineError)


def _cause(log: Path, profiles: Sequence[Profile]) -> str | None:
    """What a build log says went wrong: the first error that means something, and what to do about it where that is
    known."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line.strip() for line in lines if line.startswith("[E]") or "Error" in line or "error" in line]
    telling = [line for line in errors if not any(noise in line for noise in _NOISE)]
    cause = next(iter(telling or errors[-1:]), None)
    if cause is not None and _SHAPES_REFUSED.search(cause):
        ranges = "; ".join(
            f"{p.minimum[0]}x{p.minimum[1]} to {p.maximum[0]}x{p.maximum[1]}, best {p.optimum[0]}x{p.optimum[1]}"
            for p in profiles
        )
        cause += (
            f". The graph does not take every shape of the profile ({ranges}, batch x sequence), as where a table of "
            "positions is shorter; give --profile with shapes that it takes"
        )
    return cause


def _without_noise(text: str) -> str:
    """A parser's words without the lines that every failure here ends in."""
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line and not any(noise in line for noise in _NOISE))


def usable_cache(cache: Path, identity: Mapping[str, str]) -> str | None:
    """Why a timing cache cannot be used here (damaged, or from another TensorRT or GPU), or None when it can."""
    if not cache.is_file():
        return "there is none"
    try:
        seal = read_record(_seal_of(cache), CacheSeal, schema=SEAL_SCHEMA, way_out="begin a new cache")
    except ArtifactError as error:
        return (
            f"{_seal_of(cache).name} beside it is missing or damaged, so nothing says what it was measured on ({error})"
        )
    if seal.sha256 != file_hash(cache):
        return "its contents are not what was written: it is damaged"
    if seal.identity != dict(identity):
        return f"it was measured on {_named(seal.identity)}, and this is {_named(identity)}"
    return None


def seal_cache(cache: Path, identity: Mapping[str, str]) -> None:
    """Write beside a timing cache what it is: hash, TensorRT version, GPU."""
    seal = CacheSeal(file_hash(cache), dict(identity))
    _seal_of(cache).write_text(encode(seal, SEAL_SCHEMA), encoding="utf-8")


def _seal_of(cache: Path) -> Path:
    return cache.with_name(f"{cache.name}.json")


def _named(identity: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in identity.items()) or "an unknown machine"


class _Refused(Exception):
    """What the builder refused, in words for the user."""


def run_build(request: BuildRequest, report: Report) -> None:
    """In the child: build as `request` says and `report` progress and facts."""
    from polygraphy.backend.common import SaveBytes
    from polygraphy.backend.trt import EngineBytesFromNetwork, PostprocessConfig
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.EXTRA_VERBOSE  # TensorRT's own verbose lines are printed at this level only
    trt = cast("TensorRT", importlib.import_module(request.module))
    rtx = request.module == "tensorrt_rtx"
    strongly_typed = rtx or int(trt.__version__.split(".")[0]) >= STRONGLY_TYPED_SINCE
    loaded = _parse(trt, request.onnx, strongly_typed)
    network, directory = loaded[1], Path(request.directory)
    refusals: list[str] = []

    def finish(_: object, __: object, config: BuilderConfig) -> None:
        _set_cache(config, request.timing_cache, refusals)
        _set_route(config, request.build_route)

    config = PostprocessConfig(_config(trt, network, request, strongly_typed, report), finish)
    engine = EngineBytesFromNetwork(
        loaded, config=config, save_timing_cache=None if rtx else str(directory / CACHE_FILE)
    )()
    SaveBytes(lambda: bytes(engine), request.engine)()
    refusal = refusals[0] if refusals else None
    report(BuilderMessage(facts=BuiltFacts(trt.__version__, strongly_typed, _bindings(network), refusal)))
    if request.inspect:
        layers = InspectedEngine(_inspect(trt, bytes(engine), request.profiles))
        (directory / LAYERS_FILE).write_text(encode(layers, LAYERS_SCHEMA), encoding="utf-8")


def _parse(trt: TensorRT, onnx: str, strongly_typed: bool) -> tuple[object, Network, Parser]:
    """(builder, network, parser); every parser error is kept, with the name of the ONNX node that it is about."""
    from polygraphy.backend.trt import CreateNetwork, get_trt_logger

    builder, network = CreateNetwork(strongly_typed=strongly_typed)()
    parser = trt.OnnxParser(network, get_trt_logger())
    if parser.parse_from_file(onnx):
        return builder, network, parser
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    names = _node_names(onnx)
    texts = []
    for error in errors:
        node = error.node()
        name = names[node] if 0 <= node < len(names) else "the graph"
        texts.append(f"{name}: {_without_noise(error.desc())}")
    raise _Refused(f"TensorRT cannot parse it: {'; '.join(texts) or 'no reason given'}")


def _bindings(network: Network) -> Bindings:
    """A network's inputs and outputs, as the passport has them."""
    return Bindings(
        tuple(_binding(network.get_input(i)) for i in range(network.num_inputs)),
        tuple(_binding(network.get_output(i)) for i in range(network.num_outputs)),
    )


def _binding(tensor: Tensor) -> Binding:
    dtype = tensor.dtype.name.lower()
    name = {"float": "float32", "half": "float16", "bf16": "bfloat16"}.get(dtype, dtype)
    return Binding(tensor.name, name, tuple(map(int, tensor.shape)))


def _node_names(onnx: str) -> list[str]:
    import onnx as onnx_

    model = onnx_.load(onnx, load_external_data=False)
    return [f"layer {node.name or node.output[0]} ({node.op_type})" for node in model.graph.node]


def _is_quantized(onnx: str) -> bool:
    import onnx as onnx_

    model = onnx_.load(onnx, load_external_data=False)
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)


def _config(trt: TensorRT, network: Network, request: BuildRequest, strongly_typed: bool, report: Report) -> object:
    """Polygraphy's loader of the builder's configuration."""
    from polygraphy.backend.trt import CreateConfig
    from polygraphy.backend.trt import Profile as TrtProfile

    profiles = []
    for sizes in request.profiles:
        profile = TrtProfile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            binding = _binding(tensor)
            if -1 in binding.shape:
                shapes = (shape_at(binding, *size) for size in (sizes.minimum, sizes.optimum, sizes.maximum))
                profile.add(tensor.name, *shapes)
        profiles.append(profile)
    options: dict[str, object] = {
        "profiles": profiles,
        "sparse_weights": request.sparse,
        "builder_optimization_level": request.level,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if request.workspace_bytes is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: request.workspace_bytes}
    if hasattr(trt, "IProgressMonitor"):
        options["progress_monitor"] = _monitor(trt, report)
    if request.module == "tensorrt_rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        return cast(object, CreateConfigRTX(**options, compute_capabilities=list(request.compute_capabilities)))
    if not strongly_typed:  # the flags allow what the graph's pairs ask for
        # INT8 without a pair in the graph would ask for a calibrator: the FP16 twin has none.
        options |= {"int8": _is_quantized(request.onnx), "fp16": True}
        libraries = ("CUBLAS", "CUBLAS_LT", "CUDNN")  # optional there, and not installed with the wheel
        options["tactic_sources"] = [
            source for name, source in trt.TacticSource.__members__.items() if name not in libraries
        ]
    return cast(object, CreateConfig(**options))


def _monitor(trt: TensorRT, report: Report) -> object:
    def say(phase: str, done: int, total: int) -> None:
        report(BuilderMessage(progress=PhaseProgress(phase, done, total)))

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]  # a class that is known at run time only
        """Reports the outermost phases."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = int(num_steps)
                say(phase_name, 0, int(num_steps))

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                steps = self.steps.pop(phase_name)
                say(phase_name, steps, steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                say(phase_name, int(step) + 1, self.steps[phase_name])
            return True

    return Monitor()


def _set_cache(config: BuilderConfig, cache: TimingCacheRequest | None, refusals: list[str]) -> None:
    if cache is None:
        return
    data = Path(cache.path).read_bytes()
    loaded = config.create_timing_cache(data)
    if loaded is not None and config.set_timing_cache(loaded, ignore_mismatch=False):
        return
    text = f"{cache.path}: TensorRT refuses this timing cache (damaged, or of another version or GPU); delete it"
    if cache.required:
        raise _Refused(text)
    refusals.append(text)
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _set_route(config: BuilderConfig, route: str | None) -> None:
    """Pass a build route on where the public API lists each of its options; undocumented knobs are not set."""
    if route is None:
        return
    listed = getattr(config, "all_build_routes", None)
    try:
        options = {option["option"].lstrip("-") for option in json.loads(listed)["tuner_options"]} if listed else set()
    except (ValueError, KeyError, TypeError):
        options = set()
    for part in route.split():
        name = part.lstrip("-").partition("=")[0]
        if name not in options:
            known = ", ".join(sorted(options)) or "it lists none"
            raise _Refused(
                f"this TensorRT does not list {name!r} among its build routes ({known}); leave --build-route out"
            )
    config.build_route = route
    if config.build_route != route:
        raise _Refused(f"TensorRT did not take the build route {route!r}; leave --build-route out")


def _inspect(trt: TensorRT, engine_bytes: bytes, profiles: Sequence[Profile]) -> tuple[InspectedProfile, ...]:
    """The engine inspector's report for every profile, at its best shape."""
    from polygraphy.backend.trt import get_trt_logger

    runtime = trt.Runtime(get_trt_logger())
    engine = runtime.deserialize_cuda_engine(engine_bytes)
    if engine is None:
        raise _Refused("TensorRT cannot load the engine that it just built; see the log")
    reports = []
    for index, sizes in enumerate(profiles):
        context = engine.create_execution_context()
        if context is None:
            raise _Refused("not enough GPU memory to inspect the engine that it just built; see the log")
        if index and not context.set_optimization_profile_async(index, 0):
            # The report would be that of another profile.
            raise _Refused(f"TensorRT does not inspect profile {index} of the engine that it just built; see the log")
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            free = Binding(name, "", tuple(map(int, engine.get_tensor_shape(name))))
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT and -1 in free.shape:
                shape = shape_at(free, *sizes.optimum)
                if not context.set_input_shape(name, shape):
                    raise _Refused(f"TensorRT does not inspect {name} of shape {shape} in profile {index}; see the log")
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        # TensorRT may write Infinity, which JSON does not have, and control characters of names as they are.
        information = json.loads(text, parse_constant=str, strict=False)
        reports.append(InspectedProfile(index, sizes.optimum, information))
    return tuple(reports)


def _main(request_text: str, descriptor: str) -> int:
    source, way_out = "the build request", "build again"
    value = parse_json(request_text, source, way_out, EngineError)
    request = convert(value, BuildRequest, source=source, way_out=way_out, error=EngineError)
    with os.fdopen(int(descriptor), "w", encoding="utf-8") as stream:

        def report(message: BuilderMessage) -> None:
            stream.write(json.dumps(to_builtins(message)) + "\n")
            stream.flush()

        try:
            run_build(request, report)
        except _Refused as refusal:
            report(BuilderMessage(error=str(refusal)))
            return 1
        except Exception as failure:  # polygraphy and TensorRT raise many kinds; the log has the rest
            print(f"[E] {failure}", file=sys.stderr, flush=True)
            report(BuilderMessage(failure=f"{type(failure).__name__}: {failure}"))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))

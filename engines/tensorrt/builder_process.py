"""One TensorRT build, in a child process: parse, configure, build, inspect. TensorRT 8.6, 10, 11 and TensorRT-RTX.

A process of its own because polygraphy decides between TensorRT and TensorRT-RTX once per process, because a crash of the
builder must not take us along, and because everything that the builder prints then is ``build.log``. Polygraphy creates
network, configuration and engine; what it lacks is here: parser errors by layer, a timing cache that is checked instead
of dropped without a word, ``build_route``, and the inspector's report per profile.

TensorRT 10 and later are strongly typed: types come from the graph. 8.6 is weakly typed: its graph is float32, and flags
allow INT8 and FP16.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from engines.base import Binding, module_command
from nxm_export.errors import EngineError
from nxm_export.storage.hashing import file_hash

LOG_FILE = "build.log"
LAYERS_FILE = "layers.json"
CACHE_FILE = "timing.cache"
SWITCH = "POLYGRAPHY_USE_TENSORRT_RTX"
STRONGLY_TYPED_SINCE = 10


def build_in_child(request: Mapping[str, Any], log: Path, progress: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Run one build and return what it reports; `request` is the argument of `run_build`.

    Raises `EngineError` with the builder's own text, the layer it is about where that is known, and the log's path.
    """
    reading, writing = os.pipe()
    environment = {**os.environ, SWITCH: "1" if request["module"] == "tensorrt_rtx" else "0"}
    with log.open("w", encoding="utf-8") as stream, os.fdopen(reading, encoding="utf-8") as reports:
        child = subprocess.Popen(
            module_command("engines.tensorrt.builder_process", json.dumps({**request, "report": writing})),
            env=environment,
            stdout=stream,
            stderr=stream,
            pass_fds=(writing,),
        )
        os.close(writing)
        facts: dict[str, Any] = {}
        error = None
        try:
            for line in reports:
                message = json.loads(line)
                if "progress" in message:
                    progress(*message["progress"])
                error = message.get("error", error)
                facts.update(message.get("facts", {}))
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.terminate()
            code = child.wait()
    if error is not None:
        raise EngineError(f"{request['onnx']}: {error} (log: {log})")
    if code or not Path(request["engine"]).is_file():
        raise EngineError(
            f"{request['onnx']}: the builder ended with {code} and wrote no engine: {last_error(log)} (log: {log})"
        )
    return facts


def last_error(log: Path) -> str:
    """The last line of a build log that reads as an error."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line.strip() for line in lines if line.startswith("[E]") or "Error" in line or "error" in line]
    return errors[-1] if errors else "no error text"


def usable_cache(cache: Path, identity: Mapping[str, str]) -> str | None:
    """Why a timing cache cannot be used here (damaged, or from another TensorRT or GPU), or None when it can."""
    if not cache.is_file():
        return "there is none"
    try:
        sealed = json.loads(_seal_of(cache).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{_seal_of(cache).name} beside it is missing or damaged, so nothing says what it was measured on"
    if not isinstance(sealed, dict) or sealed.get("sha256") != file_hash(cache):
        return "its contents are not what was written: it is damaged"
    if sealed.get("identity") != dict(identity):
        return f"it was measured on {_named(sealed.get('identity') or {})}, and this is {_named(identity)}"
    return None


def seal_cache(cache: Path, identity: Mapping[str, str]) -> None:
    """Write beside a timing cache what it is: hash, TensorRT version, GPU."""
    text = json.dumps(
        {"schema": "nxm-timing-cache/1", "sha256": file_hash(cache), "identity": dict(identity)}, indent=1
    )
    _seal_of(cache).write_text(text + "\n", encoding="utf-8")


def _seal_of(cache: Path) -> Path:
    return cache.with_name(f"{cache.name}.json")


def _named(identity: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in identity.items()) or "an unknown machine"


class _Refused(Exception):
    """What the builder refused, in words for the user."""


def run_build(request: Mapping[str, Any], report: Callable[..., None]) -> None:
    """In the child: build as `request` says and `report` progress and facts.

    Keys: ``module`` (tensorrt or tensorrt_rtx), ``onnx``, ``engine`` and ``directory`` (paths), ``profiles`` (dicts of
    minimum, optimum, maximum), ``sparse``, ``level``, ``workspace_bytes``, ``build_route``, ``timing_cache``,
    ``compute_capabilities`` (RTX), ``inspect``.
    """
    from polygraphy.backend.common import SaveBytes
    from polygraphy.backend.trt import EngineBytesFromNetwork, PostprocessConfig
    from polygraphy.logger import G_LOGGER

    G_LOGGER.module_severity = G_LOGGER.EXTRA_VERBOSE  # TensorRT's own verbose lines are printed at this level only
    trt = importlib.import_module(request["module"])
    rtx = request["module"] == "tensorrt_rtx"
    strongly_typed = rtx or int(trt.__version__.split(".")[0]) >= STRONGLY_TYPED_SINCE
    loaded = _parse(trt, request["onnx"], strongly_typed)
    network = loaded[1]
    refusals: list[str] = []

    def finish(builder: Any, _: Any, config: Any) -> None:
        _set_cache(config, request["timing_cache"], refusals)
        _set_route(config, request["build_route"])

    config = PostprocessConfig(_config(trt, network, request, strongly_typed, report), finish)
    engine = EngineBytesFromNetwork(
        loaded, config=config, save_timing_cache=None if rtx else str(Path(request["directory"]) / CACHE_FILE)
    )()
    SaveBytes(lambda: bytes(engine), request["engine"])()
    facts = {"tensorrt": trt.__version__, "strongly_typed": strongly_typed, "cache_refused": refusals}
    report(facts={**facts, "bindings": _bindings(network)})
    if request["inspect"]:
        (Path(request["directory"]) / LAYERS_FILE).write_text(
            json.dumps({"profiles": _inspect(trt, bytes(engine), request["profiles"])}, indent=1) + "\n",
            encoding="utf-8",
        )


def _parse(trt: Any, onnx: str, strongly_typed: bool) -> tuple[Any, Any, Any]:
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
        texts.append(f"{name}: {error.desc()}")
    raise _Refused(f"TensorRT cannot parse it: {'; '.join(texts) or 'no reason given'}")


def _bindings(network: Any) -> dict[str, list[dict[str, Any]]]:
    """A network's inputs and outputs, as the passport has them."""
    names = {"float": "float32", "half": "float16", "bf16": "bfloat16"}

    def binding(tensor: Any) -> dict[str, Any]:
        dtype = tensor.dtype.name.lower()
        return asdict(Binding(tensor.name, names.get(dtype, dtype), tuple(tensor.shape)))

    return {
        "inputs": [binding(network.get_input(i)) for i in range(network.num_inputs)],
        "outputs": [binding(network.get_output(i)) for i in range(network.num_outputs)],
    }


def _node_names(onnx: str) -> list[str]:
    import onnx as onnx_

    model = onnx_.load(onnx, load_external_data=False)
    return [f"layer {node.name or node.output[0]} ({node.op_type})" for node in model.graph.node]


def _config(
    trt: Any, network: Any, request: Mapping[str, Any], strongly_typed: bool, report: Callable[..., None]
) -> Any:
    from polygraphy.backend.trt import CreateConfig
    from polygraphy.backend.trt import Profile as TrtProfile

    profiles = []
    for sizes in request["profiles"]:
        profile = TrtProfile()
        for i in range(network.num_inputs):
            tensor = network.get_input(i)
            if -1 in tuple(tensor.shape):
                if len(tuple(tensor.shape)) != 2:
                    raise _Refused(
                        f"input {tensor.name} has shape {tuple(tensor.shape)}; only (batch, sequence) may be dynamic. "
                        "Export the graph with fixed sizes"
                    )
                profile.add(tensor.name, *(tuple(sizes[key]) for key in ("minimum", "optimum", "maximum")))
        profiles.append(profile)
    options: dict[str, Any] = {
        "profiles": profiles,
        "sparse_weights": request["sparse"],
        "builder_optimization_level": request["level"],
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,
    }
    if request["workspace_bytes"] is not None:
        options["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: request["workspace_bytes"]}
    if hasattr(trt, "IProgressMonitor"):
        options["progress_monitor"] = _monitor(trt, report)
    if request["module"] == "tensorrt_rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        return CreateConfigRTX(
            **options, compute_capabilities=[tuple(sizes) for sizes in request["compute_capabilities"]]
        )
    if not strongly_typed:  # the flags allow what the graph's pairs ask for
        options |= {"int8": True, "fp16": True}
        libraries = ("CUBLAS", "CUBLAS_LT", "CUDNN")  # optional there, and not installed with the wheel
        options["tactic_sources"] = [
            source for name, source in trt.TacticSource.__members__.items() if name not in libraries
        ]
    return CreateConfig(**options)


def _monitor(trt: Any, report: Callable[..., None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Reports the outermost phases."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if not parent_phase:
                self.steps[phase_name] = int(num_steps)
                report(progress=[phase_name, 0, int(num_steps)])

        def phase_finish(self, phase_name: str) -> None:
            if phase_name in self.steps:
                steps = self.steps.pop(phase_name)
                report(progress=[phase_name, steps, steps])

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self.steps:
                report(progress=[phase_name, int(step) + 1, self.steps[phase_name]])
            return True

    return Monitor()


def _set_cache(config: Any, cache: Mapping[str, Any] | None, refusals: list[str]) -> None:
    if cache is None:
        return
    data = Path(cache["path"]).read_bytes()
    loaded = config.create_timing_cache(data)
    if loaded is not None and config.set_timing_cache(loaded, ignore_mismatch=False):
        return
    text = f"{cache['path']}: TensorRT refuses this timing cache (damaged, or of another version or GPU); delete it"
    if cache["required"]:
        raise _Refused(text)
    refusals.append(text)
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)


def _set_route(config: Any, route: str | None) -> None:
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
            raise _Refused(
                f"this TensorRT does not list {name!r} among its build routes ({', '.join(sorted(options)) or 'it lists none'}); "
                "leave --build-route out"
            )
    config.build_route = route
    if config.build_route != route:
        raise _Refused(f"TensorRT did not take the build route {route!r}; leave --build-route out")


def _inspect(trt: Any, engine_bytes: bytes, profiles: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The engine inspector's report for every profile, at its best shape."""
    from polygraphy.backend.trt import get_trt_logger

    runtime = trt.Runtime(get_trt_logger())
    engine = runtime.deserialize_cuda_engine(engine_bytes)
    if engine is None:
        raise _Refused("TensorRT cannot load the engine that it just built; see the log")
    found = []
    for index, sizes in enumerate(profiles):
        context = engine.create_execution_context()
        if index:
            context.set_optimization_profile_async(index, 0)
        for i in range(engine.num_io_tensors):
            name = engine.get_tensor_name(i)
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT and -1 in tuple(engine.get_tensor_shape(name)):
                context.set_input_shape(name, tuple(sizes["optimum"]))
        inspector = engine.create_engine_inspector()
        inspector.execution_context = context
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        found.append({"profile": index, "shape": list(sizes["optimum"]), "information": json.loads(text)})
    return found


def _main() -> int:
    request = json.loads(sys.argv[1])
    with os.fdopen(request.pop("report"), "w", encoding="utf-8") as stream:

        def report(**message: Any) -> None:
            _write(stream, message)

        try:
            run_build(request, report)
        except _Refused as refusal:
            report(error=str(refusal))
            return 1
        except Exception as failure:  # polygraphy and TensorRT raise many kinds; the log has the rest
            print(f"[E] {failure}", file=sys.stderr, flush=True)
            report(error=f"the builder failed: {type(failure).__name__}: {failure}")
            return 1
    return 0


def _write(stream: TextIO, message: Mapping[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()


if __name__ == "__main__":
    sys.exit(_main())

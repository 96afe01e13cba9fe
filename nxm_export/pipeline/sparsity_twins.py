"""Twins: the same checkpoint as FP16, dense INT8 and sparse INT8 engines, same shapes, so that 2:4 can be judged by
itself.

The INT8 twins share one graph and differ in one flag; the FP16 twin is the float graph of the same compressed weights.
All share a timing cache, so that they differ in nothing that the builder measured twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.choices import LOWERING
from nxm_export.errors import ArtifactError, EngineError
from nxm_export.storage.atomic import atomic_dir
from nxm_export.storage.json_files import encode, read_record, to_json_object

if TYPE_CHECKING:
    from engines.base import BuildOptions

SCHEMA = "nxm-twins/1"
TWINS_FILE = "twins.json"
_BUILD_AGAIN = "build the twins again (`nxm build --twins`)"
DENSE, SPARSE, FLOAT = "int8-dense", "int8-sparse", "fp16"
TWINS = (DENSE, SPARSE, FLOAT)  # the dense one first: it is the reference of every ratio


@dataclass(frozen=True)
class TwinGraphs:
    """How the graph of the INT8 twins is exported (see `nxm_export.graph.exporter.export`); the float one differs in
    placement."""

    target: str = "trt"
    lowering: str = LOWERING
    placement: str | None = None


@dataclass(frozen=True)
class TwinHashes:
    """The sha256 of a twin's engine file and of the graph that it was built from."""

    engine_sha256: str
    onnx_sha256: str


@dataclass(frozen=True)
class BuiltTwins:
    """The file ``twins.json``: the backend, the hashes of every twin that was built, by name, and why others were
    not."""

    backend: str
    twins: Mapping[str, TwinHashes]
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return {"schema": SCHEMA, **to_json_object(self)}


def build_twins(
    checkpoint: Path, out: Path, backend_name: str, options: BuildOptions, graphs: TwinGraphs = TwinGraphs()
) -> BuiltTwins:
    """Export and build all three into directories under `out`; returns what ``twins.json`` says.

    One that cannot be built takes no other along: of its directory the builder's log stays. Raises its error where none
    can be built.
    """
    from engines.base import backend
    from engines.sparsity.build_evidence import LOG_FILE
    from engines.tensorrt.builder_process import CACHE_FILE
    from nxm_export.graph.exporter import export

    runtime = backend(backend_name)
    hashes: dict[str, TwinHashes] = {}
    failed: dict[str, EngineError] = {}
    with atomic_dir(out, kept_log=LOG_FILE) as scratch:
        for kind, placement in (("int8", graphs.placement), ("float", "float")):
            target, lowering = graphs.target, graphs.lowering
            export(checkpoint, scratch / "onnx" / kind, target=target, lowering=lowering, placement=placement)
        cache = options.timing_cache
        for name in TWINS:
            directory = scratch / name
            directory.mkdir()
            graph = scratch / "onnx" / ("float" if name == FLOAT else "int8") / "model.onnx"
            settings = replace(
                options,
                sparse="auto" if name == SPARSE else "never",
                twin=name,
                timing_cache=cache,
                require_timing_cache=options.require_timing_cache and cache == options.timing_cache,
            )
            try:
                passport = runtime.build(graph, directory, settings)
            except EngineError as error:
                failed[name] = error
                _keep_log(directory, LOG_FILE)
                continue
            if (directory / CACHE_FILE).is_file():
                cache = directory / CACHE_FILE
            hashes[name] = TwinHashes(passport.engine_sha256, passport.onnx_sha256)
        if not hashes:
            raise next(iter(failed.values()))
        built = BuiltTwins(backend_name, hashes, {name: str(error) for name, error in failed.items()})
        (scratch / TWINS_FILE).write_text(encode(built, SCHEMA), encoding="utf-8")
    return built


def _keep_log(directory: Path, log: str) -> None:
    """Remove what is in a directory but for the builder's log; all of it where there is none."""
    for file in directory.iterdir():
        if file.name != log:
            file.unlink()
    if not (directory / log).is_file():
        directory.rmdir()


def read_twins(directory: Path) -> BuiltTwins:
    """What ``twins.json`` says; raises `ArtifactError` for a directory that has none, or a damaged one."""
    return read_record(directory / TWINS_FILE, BuiltTwins, schema=SCHEMA, way_out=_BUILD_AGAIN)


def twin_directory(directory: Path, name: str) -> Path:
    """The engine directory of one of the twins; raises `EngineError`, with the reason, where it could not be built."""
    engines = twin_directories(directory)
    if name not in engines:
        why = read_twins(directory).failed.get(name, "no reason is known")
        raise EngineError(f"{directory}: its twin {name} could not be built: {why}")
    return engines[name]


def twin_directories(directory: Path) -> dict[str, Path]:
    """The engine directories of a twins directory that were built, by name, the dense INT8 one first; raises
    `ArtifactError` when it is none, and for a twin that is not the one that was built with the others."""
    from engines.passport import load_passport

    built = read_twins(directory)
    names = [name for name in TWINS if name not in built.failed]
    for name in names:
        passport = load_passport(directory / name)
        if built.twins.get(name) != TwinHashes(passport.engine_sha256, passport.onnx_sha256):
            raise ArtifactError(f"{directory / name} is not the engine that {TWINS_FILE} names there; {_BUILD_AGAIN}")
    return {name: directory / name for name in names}


def is_twins(directory: Path) -> bool:
    """True for a directory that `build_twins` made."""
    return (directory / TWINS_FILE).is_file()

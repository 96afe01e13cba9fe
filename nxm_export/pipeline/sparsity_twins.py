"""Twins: the same checkpoint as FP16, dense INT8 and sparse INT8 engines, same shapes, so that 2:4 can be judged by
itself.

The INT8 twins share one graph and differ in one flag; the FP16 twin is the float graph of the same compressed weights.
All share a timing cache, so that they differ in nothing that the builder measured twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nxm_export.contract.choices import LOWERING
from nxm_export.errors import ArtifactError
from nxm_export.storage.atomic import atomic_dir
from nxm_export.storage.json_files import encode, read_record, to_json_object

if TYPE_CHECKING:
    from engines.base import BuildOptions

SCHEMA = "nxm-twins/1"
TWINS_FILE = "twins.json"
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
    """The file ``twins.json``: the backend, and the hashes of every twin by name."""

    backend: str
    twins: Mapping[str, TwinHashes]

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return {"schema": SCHEMA, **to_json_object(self)}


def build_twins(
    checkpoint: Path, out: Path, backend_name: str, options: BuildOptions, graphs: TwinGraphs = TwinGraphs()
) -> BuiltTwins:
    """Export and build all three into directories under `out`; returns what ``twins.json`` says. All or nothing."""
    from engines.base import backend
    from engines.sparsity.build_evidence import LOG_FILE
    from engines.tensorrt.builder_process import CACHE_FILE
    from nxm_export.graph.exporter import export

    runtime = backend(backend_name)
    hashes: dict[str, TwinHashes] = {}
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
            passport = runtime.build(graph, directory, settings)
            if (directory / CACHE_FILE).is_file():
                cache = directory / CACHE_FILE
            hashes[name] = TwinHashes(passport.engine_sha256, passport.onnx_sha256)
        built = BuiltTwins(backend_name, hashes)
        (scratch / TWINS_FILE).write_text(encode(built, SCHEMA), encoding="utf-8")
    return built


def twin_directories(directory: Path) -> list[Path]:
    """The engine directories of a twins directory, the dense INT8 one first; raises `ArtifactError` when it is none,
    and for a twin that is not the one that was built with the others."""
    from engines.passport import load_passport

    way_out = "build the twins again (`nxm build --twins`)"
    built = read_record(directory / TWINS_FILE, BuiltTwins, schema=SCHEMA, way_out=way_out)
    for name in TWINS:
        passport = load_passport(directory / name)
        if built.twins.get(name) != TwinHashes(passport.engine_sha256, passport.onnx_sha256):
            raise ArtifactError(f"{directory / name} is not the engine that {TWINS_FILE} names there; {way_out}")
    return [directory / name for name in TWINS]


def is_twins(directory: Path) -> bool:
    """True for a directory that `build_twins` made."""
    return (directory / TWINS_FILE).is_file()

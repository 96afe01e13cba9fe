"""Twins: the same checkpoint as FP16, dense INT8 and sparse INT8 engines, same shapes, so that 2:4 can be judged by itself.

The INT8 twins share one graph and differ in one flag; the FP16 twin is the float graph of the same compressed weights.
All share a timing cache, so that they differ in nothing that the builder measured twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nxm_export.errors import ArtifactError
from nxm_export.storage.atomic import atomic_dir
from nxm_export.storage.json_files import require_schema

if TYPE_CHECKING:
    from engines.base import BuildOptions

SCHEMA = "nxm-twins/1"
TWINS_FILE = "twins.json"
DENSE, SPARSE, FLOAT = "int8-dense", "int8-sparse", "fp16"
TWINS = (DENSE, SPARSE, FLOAT)  # the dense one first: it is the reference of every ratio


def build_twins(
    checkpoint: Path, out: Path, backend_name: str, options: BuildOptions, export_options: Mapping[str, Any]
) -> dict[str, Any]:
    """Export and build all three into directories under `out`; returns what ``twins.json`` says. All or nothing."""
    from engines.base import backend
    from engines.tensorrt.builder_process import CACHE_FILE
    from nxm_export.graph.exporter import export

    runtime = backend(backend_name)
    facts: dict[str, Any] = {"schema": SCHEMA, "backend": backend_name, "twins": {}}
    with atomic_dir(out) as scratch:
        export(checkpoint, scratch / "onnx" / "int8", **export_options)
        export(checkpoint, scratch / "onnx" / "float", **{**export_options, "placement": "float"})
        cache = options.timing_cache
        for name in TWINS:
            directory = scratch / name
            directory.mkdir()
            graph = scratch / "onnx" / ("float" if name == FLOAT else "int8") / "model.onnx"
            built = replace(
                options,
                sparse=name == SPARSE,
                twin=name,
                timing_cache=cache,
                require_timing_cache=options.require_timing_cache and cache == options.timing_cache,
            )
            passport = runtime.build(graph, directory, built)
            if (directory / CACHE_FILE).is_file():
                cache = directory / CACHE_FILE
            facts["twins"][name] = {"engine_sha256": passport.engine_sha256, "onnx_sha256": passport.onnx_sha256}
        (scratch / TWINS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return facts


def twin_directories(directory: Path) -> list[Path]:
    """The engine directories of a twins directory, the dense INT8 one first; raises `ArtifactError` when it is none."""
    file = directory / TWINS_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error}); build the twins again (`nxm build --twins`)") from error
    require_schema(data, SCHEMA, str(file), ArtifactError)
    return [directory / name for name in TWINS]


def is_twins(directory: Path) -> bool:
    """True for a directory that `build_twins` made."""
    return (directory / TWINS_FILE).is_file()

"""Weights that lie in files beside an ONNX file, of whatever names: taken into one file, where protobuf allows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from nxm_export.errors import ArtifactError, EngineError
from nxm_export.graph.reading.graph_weights import PROTOBUF_LIMIT, hash_before_reading
from nxm_export.storage.hashing import HashedFiles


def has_external_data(model: ir.Model) -> bool:
    """True when a weight or a constant of the graph, or of one inside it, lies in another file."""
    return any(isinstance(tensor, ir.ExternalTensor) for tensor in _tensors(model))


def graph_files(model: ir.Model, file: Path) -> HashedFiles:
    """An ONNX file and those beside it that hold its weights, hashed; `model` was read from `file`.

    Raises `ArtifactError` when one of them cannot be read, or does not lie below the directory of `file`, and when
    `file` is no longer what `load_graph` read.
    """
    beside = {str(tensor.location) for tensor in _tensors(model) if isinstance(tensor, ir.ExternalTensor)}
    for location in sorted(beside):
        if Path(location).is_absolute() or ".." in Path(location).parts:
            raise ArtifactError(
                f"{file}: its weights cannot be read from outside of its directory ({location}); move them there"
            )
    try:
        files = HashedFiles.of(file.parent, [file.name, *sorted(beside)])
    except ArtifactError as error:
        raise ArtifactError(f"{file}: {error}; the file is truncated, or its .data file is missing") from error
    if hash_before_reading(model) not in (None, files.hashes[file.name]):
        raise ArtifactError(f"{file} changed while it was read; do it again when it is written")
    return files


def require_one_file(size: int, source: str, way_out: str) -> None:
    """Raise `EngineError` with `way_out` for a graph whose weights, of `size` bytes, do not fit into one ONNX file."""
    if size > PROTOBUF_LIMIT:
        raise EngineError(
            f"{source}: its weights have {size / 1e9:.1f} GB, and an engine for the CPU is one ONNX file, "
            f"which holds {PROTOBUF_LIMIT / 1e9:.1f} GB; {way_out}"
        )


def save_in_one_file(model: ir.Model, file: Path, source: Path) -> None:
    """Write an ONNX file that needs no other; `model` was read from `source`, and holds its weights afterwards.

    Raises `EngineError` where they do not fit into one file, and `ArtifactError` where they cannot be read.
    """
    size = sum(tensor.nbytes for tensor in _tensors(model))
    require_one_file(size, str(source), "build with a TensorRT backend, or make the model smaller")
    try:
        ir.external_data.load_to_model(model)
        for node in model.graph.all_nodes():
            for attribute in list(node.attributes.values()):
                if isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes.add(_loaded(attribute.name, attribute.value))
    except Exception as error:  # a missing file, one that is too short, a path that leads away: many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ArtifactError(
            f"{source}: weights in a file beside it cannot be read ({reason}); the file is missing or truncated"
        ) from error
    ir.save(model, file)


def _loaded(name: str, tensor: ir.ExternalTensor) -> ir.Attr:
    return ir.AttrTensor(name, ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name))


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)
    for node in model.graph.all_nodes():
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                yield attribute.as_tensor()

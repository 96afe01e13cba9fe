"""The word-embedding table of an ONNX graph in INT8: put in, and read back.

::

    float(Gather(codes, ids)) * Gather(scales, ids)        codes (tokens, features) INT8, scales (tokens, 1) float32

Rows are looked up before anything is dequantized, so no runtime can fold the table back to float when it loads the
graph, and a batch pays for its own tokens alone. The arithmetic is float32 in graphs of any dtype: the product of a
code and its scale is then the checkpoint's value, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from nxm_export.errors import ExportError
from nxm_export.graph.qdq import add_initializer, require_scale, use_name
from nxm_export.graph.reading.graph_weights import array_of

CODES, SCALE = "_quantized", "_scale"  # behind the parameter's name


def fold_int8_embedding(graph: ir.Graph, name: str, codes: np.ndarray, scale: np.ndarray, dtype: np.dtype) -> str:
    """Replace the float table `name` by INT8 `codes` (tokens, features) and `scale` (tokens,) wherever rows are looked
    up.

    `dtype` is the graph's. Returns `embedding_hash`. Raises `ExportError` when the table is missing or read in any
    other way.
    """
    if name not in graph.initializers:
        raise ExportError(
            f"the exported graph has no initializer {name}; this transformers version names its modules differently"
        )
    require_scale(scale, name)
    path, table = name.removesuffix(".weight"), graph.initializers[name]
    stored = add_initializer(graph, f"{name}{CODES}", codes)
    scales = add_initializer(graph, f"{name}{SCALE}", scale.astype(np.float32).reshape(-1, 1))
    for use, look_up in enumerate(list(table.consumers())):
        if not _is_look_up(look_up, table):
            raise ExportError(f"{name} feeds {look_up.op_type} node {look_up.name!r}; expected a Gather of its rows")
        ids, rows = look_up.inputs[1], look_up.outputs[0]
        nodes = [
            ir.node("Gather", [stored, ids], attributes={"axis": 0}, name=use_name(f"{path}.codes", use)),
            ir.node("Gather", [scales, ids], attributes={"axis": 0}, name=use_name(f"{path}.scales", use)),
        ]
        for node, constant in zip(nodes, (stored, scales), strict=True):
            node.outputs[0].type = constant.type
        nodes[0].outputs[0].shape = rows.shape
        nodes.append(_cast(nodes[0].outputs[0], ir.DataType.FLOAT, use_name(f"{path}.float", use)))
        nodes.append(ir.node("Mul", [nodes[2].outputs[0], nodes[1].outputs[0]], name=use_name(path, use)))
        nodes[3].outputs[0].type, nodes[3].outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), rows.shape
        if dtype != np.float32:
            nodes.append(
                _cast(nodes[3].outputs[0], ir.DataType.from_numpy(dtype), use_name(f"{path}.{dtype.name}", use))
            )
        graph.insert_before(look_up, nodes)
        for user, at in list(rows.uses()):
            user.replace_input_with(at, nodes[-1].outputs[0])
        graph.remove(look_up, safe=True)
    graph.initializers.pop(name)
    return embedding_hash(codes, scale)


def embedding_hash(codes: np.ndarray, scale: np.ndarray) -> str:
    """sha256 of INT8 codes (tokens, features) and float32 scales (tokens,), as hex: what the graph's metadata says."""
    return hashlib.sha256(codes.astype(np.int8).tobytes() + scale.astype(np.float32).tobytes()).hexdigest()


def stored_embedding(graph: ir.Graph, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """(INT8 codes (tokens, features), float32 scales (tokens, 1)) of a table that `fold_int8_embedding` put in, None
    where there is none."""
    codes, scale = (array_of(graph.initializers.get(f"{name}{suffix}")) for suffix in (CODES, SCALE))
    if codes is None or scale is None or codes.dtype != np.int8 or scale.dtype != np.float32:
        return None
    return (codes, scale) if codes.ndim == 2 and scale.shape == (len(codes), 1) else None


def misread(graph: ir.Graph, name: str) -> Iterator[str]:
    """What reads a stored table in another way than `fold_int8_embedding` wrote it; nothing, where all is well."""
    codes, scales = graph.initializers[f"{name}{CODES}"], graph.initializers[f"{name}{SCALE}"]
    look_ups = [node for node in codes.consumers() if _is_look_up(node, codes)]
    for node in codes.consumers():
        if node not in look_ups:
            yield f"{node.op_type} node {node.name!r} reads the whole table"
    if not look_ups:
        yield "nothing looks up its rows"
    for look_up in look_ups:
        product = _only(_only(look_up, "Cast"), "Mul")
        factors = [value.producer() for value in product.inputs if value is not None] if product else []
        if not any(
            node is not None and _is_look_up(node, scales) and node.inputs[1] is look_up.inputs[1] for node in factors
        ):
            yield f"what {look_up.name!r} looks up is not cast and multiplied by the scales of the same tokens"


def _is_look_up(node: ir.Node, table: ir.Value) -> bool:
    return (
        node.op_type == "Gather"
        and node.inputs[0] is table
        and node.inputs[1] is not table
        and ("axis" not in node.attributes or node.attributes["axis"].as_int() == 0)
    )


def _only(node: ir.Node | None, op: str) -> ir.Node | None:
    """The one reader of what a node writes, if it is an `op`."""
    users = node.outputs[0].consumers() if node is not None else ()
    return users[0] if len(users) == 1 and users[0].op_type == op else None


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=name)
    node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
    return node

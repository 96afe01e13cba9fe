"""Other forms of an exported BERT graph, each timed against the graph as it is, in processor time on one thread.

    nxm export CHECKPOINT --placement products --out GRAPH     (inputs, for ort)
    python -m tools.experiments.graph_forms GRAPH/model.onnx --runtime openvino
    python -m tools.experiments.graph_forms GRAPH/model.onnx --runtime ort --shapes 1x32 8x128 --seconds 10

Processor time on one thread holds on a busy machine, where wall clocks do not. Every round runs each form twice and
counts the second run. The graph itself stands there three times: what its copies differ by is what such a comparison
cannot tell. Numbers of forms that change the network (`head`, `residual`) say what a trained form would take, not what
it would answer.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from engines.ort.backend import LEFT_OUT, open_session, unsigned_activations
from engines.ort.graph_rewrites import fused_attention, integer_products
from nxm_export.graph.qdq import add_initializer
from nxm_export.graph.reading.graph_weights import load_graph, save_graph
from tools.benchmarks.measuring import paired_ratio

LAST = "as it is, last"  # what is loaded later can run faster by 2 %
SHAPES = ("1x32", "1x128", "8x32", "8x128")
Feeds = Mapping[str, np.ndarray]


def _constant(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _producer(value: ir.Value | None) -> ir.Node:
    node = None if value is None else value.producer()
    assert node is not None
    return node


def _op(graph: ir.Graph, before: ir.Node, op: str, inputs: Sequence[ir.Value | None], **attributes: int) -> ir.Value:
    """The value of a new node in front of another one."""
    node = ir.node(op, list(inputs), attributes=attributes)
    graph.insert_before(before, node)
    return node.outputs[0]


def _redirect(old: ir.Value, new: ir.Value, but: Sequence[ir.Node] = ()) -> None:
    for user, at in list(old.uses()):
        if user not in but:
            user.replace_input_with(at, new)


def query_key_value(graph: ir.Graph) -> None:
    """Query, key and value are one product, and what it writes is split."""
    for node in [
        node for node in graph if str(node.name).endswith("attention.self.query") and node.op_type == "MatMul"
    ]:
        base = str(node.name).removesuffix("query")
        parts = [other for other in graph if other.name in [f"{base}{part}" for part in ("query", "key", "value")]]
        adds = [part.outputs[0].consumers()[0] for part in parts]
        weights = [_producer(part.inputs[1]) for part in parts]
        codes, scales, zeros = (
            np.concatenate([_constant(weight.inputs[at]) for weight in weights], axis=1 if at == 0 else 0)
            for at in range(3)
        )
        bias = np.concatenate([_constant(next(v for v in add.inputs if v and v.const_value)) for add in adds])
        names = zip(("codes", "scales", "zeros", "bias"), (codes, scales, zeros, bias), strict=True)
        c, s, z, b = (add_initializer(graph, f"{base}{name}", array) for name, array in names)
        dense = _op(graph, parts[0], "DequantizeLinear", [c, s, z], axis=1)
        whole = _op(graph, parts[0], "Add", [_op(graph, parts[0], "MatMul", [node.inputs[0], dense]), b])
        sizes = add_initializer(graph, f"{base}sizes", np.array([len(scales) // 3] * 3, np.int64))
        split = ir.node("Split", [whole, sizes], attributes={"axis": -1}, num_outputs=3)
        graph.insert_before(parts[0], split)
        for add, output in zip(adds, split.outputs, strict=True):
            output.type, output.shape = add.outputs[0].type, add.outputs[0].shape
            _redirect(add.outputs[0], output)


def affine_for_each_reader(graph: ir.Graph) -> None:
    """A norm's weight and bias stand in front of the quantizer and in front of the residual, each once."""
    for norm in [node for node in graph if node.op_type == "LayerNormalization"]:
        output, (_, weight, bias) = norm.outputs[0], norm.inputs
        quantizers = [user for user in output.consumers() if user.op_type == "QuantizeLinear"]
        if not quantizers:
            continue
        before = output.consumers()[0]
        own, other = (_op(graph, before, "Add", [_op(graph, before, "Mul", [output, weight]), bias]) for _ in range(2))
        made = [_producer(own), _producer(other), *(_producer(_producer(value).inputs[0]) for value in (own, other))]
        _redirect(output, other, but=[*made, *quantizers])
        for quantizer in quantizers:
            quantizer.replace_input_with(0, own)
        ones = add_initializer(graph, "ones", np.ones_like(_constant(weight)))
        norm.replace_input_with(1, ones)
        norm.replace_input_with(2, None)


def context_quantized_first(graph: ir.Graph) -> None:
    """The context is quantized where it is multiplied, in front of the transposition of its heads."""
    for node in [node for node in graph if str(node.name).endswith("attention.output.dense.input_quantize")]:
        restored = node.outputs[0].consumers()[0]
        joined = _producer(node.inputs[0])
        turned = _producer(joined.inputs[0])
        _redirect(restored.outputs[0], joined.outputs[0])
        node.replace_input_with(0, turned.inputs[0])
        turned.replace_input_with(0, restored.outputs[0])
        node.outputs[0].shape = restored.outputs[0].shape = None if node.inputs[0] is None else node.inputs[0].shape


def one_table(graph: ir.Graph) -> None:
    """All tokens are of kind 0, whose row is added to the positions' table when the graph is made."""
    look_ups = {
        str(node.inputs[0].name).split(".")[-2]: node
        for node in graph
        if node.op_type == "Gather" and node.inputs[0] and "embeddings" in str(node.inputs[0].name)
    }
    kinds, positions = look_ups["token_type_embeddings"], look_ups["position_embeddings"]
    table = _constant(positions.inputs[0]) + _constant(kinds.inputs[0])[0]
    positions.replace_input_with(0, add_initializer(graph, "one_table", table))
    added = kinds.outputs[0].consumers()[0]
    _redirect(added.outputs[0], next(value for value in added.inputs if value and value is not kinds.outputs[0]))


def int8_head(graph: ir.Graph) -> None:
    """Pooler and classifier are products of integers, as the encoder's are."""
    for node in [node for node in graph if node.op_type == "Gemm"]:
        name, dense = str(node.inputs[1].name if node.inputs[1] else ""), _constant(node.inputs[1])
        scale = (np.abs(dense).max(axis=1) / 127).astype(np.float32)
        arrays = {
            "codes": np.rint(dense / scale[:, None]).astype(np.int8).T.copy(),
            "scale": scale,
            "zeros": np.zeros(len(scale), np.int8),
            "input_scale": np.array(0.03, np.float32),
            "input_zero": np.array(0, np.int8),
        }
        c, s, z, xs, xz = (add_initializer(graph, f"{name}.{key}", array) for key, array in arrays.items())
        x = _op(graph, node, "DequantizeLinear", [_op(graph, node, "QuantizeLinear", [node.inputs[0], xs, xz]), xs, xz])
        product = _op(graph, node, "MatMul", [x, _op(graph, node, "DequantizeLinear", [c, s, z], axis=1)])
        result = _op(graph, node, "Add", [product, node.inputs[2]])
        result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
        for at, output in enumerate(graph.outputs):
            if output is node.outputs[0]:
                graph.outputs[at] = result
                result.name, output.name = output.name, f"{output.name}_float"
        _redirect(node.outputs[0], result)


def quantized_residual(graph: ir.Graph) -> None:
    """The residual reads what the products read."""
    for norm in [node for node in graph if node.op_type == "LayerNormalization"]:
        quantizers = [user for user in norm.outputs[0].consumers() if user.op_type == "QuantizeLinear"]
        if quantizers:
            restored = quantizers[0].outputs[0].consumers()[0].outputs[0]
            _redirect(norm.outputs[0], restored, but=quantizers)


def equalized(graph: ir.Graph, tensors: Sequence[str] = ("intermediate.dense", "output.dense")) -> None:
    """What the FFN's products read is multiplied, each channel by a factor of its own, in front of the quantizer."""
    for node in [node for node in graph if node.op_type == "QuantizeLinear"]:
        name = str(node.name).removesuffix(".input_quantize")
        value = node.inputs[0]
        if not name.endswith(tuple(tensors)) or name.endswith("attention.output.dense") or value is None:
            continue
        assert value.shape is not None
        factors = np.ones(int(value.shape[-1]), np.float32)  # type: ignore[arg-type]  # features are a number
        factors[0] = 0.25
        scaled = _op(graph, node, "Mul", [value, add_initializer(graph, f"{name}.factors", factors)])
        scaled.type, scaled.shape = value.type, value.shape
        node.replace_input_with(0, scaled)


def equalized_wide(graph: ir.Graph) -> None:
    """The same of what the FFN's second product reads alone."""
    equalized(graph, ["output.dense"])


FORMS: dict[str, Callable[[ir.Graph], None]] = {
    "query-key-value": query_key_value,
    "affine": affine_for_each_reader,
    "context": context_quantized_first,
    "one-table": one_table,
    "head": int8_head,
    "residual": quantized_residual,
    "equalized": equalized,
    "equalized-wide": equalized_wide,
}


def write_form(graph: Path, form: str | None, runtime: str, out: Path) -> Path:
    """The graph file in this form (None: as it is), as the runtime is given it."""
    model = load_graph(graph)
    if form is not None:
        FORMS[form](model.graph)
        passes.RemoveUnusedNodesPass()(model)
        passes.TopologicalSortPass()(model)
    if runtime == "ort":
        unsigned_activations(model)
        integer_products(model)
        fused_attention(model)
    save_graph(model, out)
    return out


def runner(file: Path, runtime: str) -> Callable[[Feeds], object]:
    """A function that runs the file on one thread."""
    if runtime == "ort":
        session = open_session(file, 1, LEFT_OUT)
        names = [value.name for value in session.get_inputs()]
        return lambda feeds: session.run(None, {name: feeds[name] for name in names})
    import openvino

    from engines.openvino.backend import settings

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(file)), "CPU", settings(1))
    request, ports = compiled.create_infer_request(), [port.get_any_name() for port in compiled.inputs]
    return lambda feeds: request.infer({name: feeds[name] for name in ports})


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the ratio of every form's time to that of the graph as it is, at every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--runtime", choices=("ort", "openvino"), required=True)
    parser.add_argument("--forms", nargs="+", choices=tuple(FORMS), default=list(FORMS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--seconds", type=float, default=10.0, help="of every shape")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        chosen = {"as it is": None, "as it is, again": None} | {form: form for form in args.forms} | {LAST: None}
        runners = {
            name: runner(write_form(args.graph, form, args.runtime, Path(scratch) / f"{at}.onnx"), args.runtime)
            for at, (name, form) in enumerate(chosen.items())
        }
        for shape in args.shapes:
            batch, sequence = (int(part) for part in shape.split("x"))
            for name, taken in timed(runners, batch, sequence, args.seconds).items():
                print(f"{shape:6} {name:16} {np.median(taken[1]):7.2f} ms  {_ratio(*taken)}", flush=True)


def timed(
    runners: Mapping[str, Callable[[Feeds], object]], batch: int, sequence: int, seconds: float
) -> dict[str, tuple[list[float], list[float]]]:
    """Milliseconds of the first runner and of each, in rounds whose order turns."""
    ids = np.random.default_rng(0).integers(5, 30, (batch, sequence))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    taken: dict[str, list[float]] = {name: [] for name in runners}
    names, end = list(runners), time.monotonic() + seconds
    while time.monotonic() < end or len(taken[names[0]]) < 3:
        for name in names:
            runners[name](feeds)
            began = time.process_time()
            runners[name](feeds)
            taken[name].append(1e3 * (time.process_time() - began))
        names = [*names[1:], names[0]]
    first = next(iter(taken.values()))
    return {name: (first, times) for name, times in taken.items()}


def _ratio(first: list[float], times: list[float]) -> str:
    ratio = paired_ratio(times, first)
    low, high = ratio["interval"]
    return f"{ratio['ratio']:.3f} ({low:.3f} to {high:.3f})"


if __name__ == "__main__":
    main()

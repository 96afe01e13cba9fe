"""Checks on an ONNX file alone, whoever made it: N:M along K on the stored integers, scales, zero points, pairs.

Needs no checkpoint and runs nothing. Problems are what would make TensorRT refuse the graph or run it in float, and
what would make any runtime compute something else than the plan inside the file says. `VerifyReport.require` turns them
into an `ExportError`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from nxm_export.contract.checkpoint import EMBEDDING_QMAX
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import CompressionPlan, NMPattern, WeightSpec
from nxm_export.contract.quantizer_placement import names_in_graph, planned_spec
from nxm_export.contract.records.matrix_facts import UnreadProduct
from nxm_export.contract.records.verify_report import VerifyReport, WeightReport
from nxm_export.graph.external_data import graph_files
from nxm_export.graph.int8_embedding import embedding_hash, misread, stored_embedding
from nxm_export.graph.quantized_values import codes_type, values_behind
from nxm_export.graph.reading.graph_weights import (
    GraphWeight,
    array_of,
    graph_products,
    load_graph,
    parameter_of,
    sparse_tensors,
)
from nxm_export.graph.reading.products import PACKED_PRODUCTS, name_of

# Nodes that hand integer codes on as they are, and nodes that read codes by themselves.
_MOVES_CODES = (
    "Reshape",
    "Transpose",
    "Gather",
    "Identity",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Split",
    "Concat",
)
_READS_CODES = (
    "DequantizeLinear",
    "QLinearMatMul",
    "QLinearConv",
    "QGemm",
    "MatMulInteger",
    "ConvInteger",
    "MatMulIntegerToFloat",
    "QAttention",
    *_MOVES_CODES,
)
_SPARSE = NMPattern(2, 4)
_DYNAMIC = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")


def verify(file: str | Path, *, plan: CompressionPlan | None = None, pattern: NMPattern | None = None) -> VerifyReport:
    """Check an ONNX file. The plan inside the file, or `plan`, says what each weight must follow; `pattern` says it for
    every quantized weight, planned or not, of which the file must then hold some. Raises `ArtifactError` when the file
    cannot be read, and `PlanError` for a plan inside it that cannot.
    """
    model = load_graph(file)
    files = graph_files(model, Path(file))
    report = replace(verify_model(model, str(file), plan=plan, pattern=pattern), hashes=files.hashes)
    if len(files.hashes) > 1:  # what lies beside the file was read only now
        files.require_unchanged()
    return report


def verify_model(
    model: ir.Model,
    source: str,
    *,
    plan: CompressionPlan | None = None,
    pattern: NMPattern | None = None,
    products: Iterable[GraphWeight | UnreadProduct] | None = None,
) -> VerifyReport:
    """As `verify`, of a graph that `load_graph` read; `source` names its file in the report and in errors. `products`
    are those of the graph, where somebody else looks at them in the same pass."""
    plan = plan or embedded_plan(model, source)
    found = graph_products(model) if products is None else products
    reports, unread, quantized = _check_products(found, plan, pattern)
    problems, stored = list(_check_pairs(model)), None
    problems += [
        f"{name} is a sparse tensor, which TensorRT does not take; store it dense" for name in sparse_tensors(model)
    ]
    if plan or pattern:
        problems += [str(product) for product in unread]
    if plan:
        present = {report.name for report in reports}
        problems += [f"{name} is planned and not in the graph under its name" for name in _missing(plan, present)]
        if plan.embedding == "int8":
            if (family := FAMILIES.get(plan.model_type)) is None:
                problems.append(
                    f"the plan is for {plan.model_type!r}, a family whose embedding table is not known here"
                )
            else:
                problems += [
                    f"{family.word_embedding}: {problem}" for problem in _check_embedding(model, family.word_embedding)
                ]
                stored = stored_embedding(model.graph, family.word_embedding)
    if pattern and not quantized and not unread:
        problems.append(f"{pattern} is required of quantized weights, and the graph has none")
    count = Counter(node.op_type for node in model.graph.all_nodes())
    size = None if stored is None else (stored[0].shape[0], stored[0].shape[1])
    pairs = count["QuantizeLinear"], count["DequantizeLinear"]
    return VerifyReport(source, reports, tuple(problems), *pairs, size, unread)


def _missing(plan: CompressionPlan, present: Container[str]) -> Iterator[str]:
    """Planned matrices that a graph with the matrices `present` lacks: a fused one is there as a whole or in parts."""
    for name, spec in plan.weights.items():
        if not spec.is_dense:
            yield from (part for part in names_in_graph(plan, name, present) if part not in present)


def embedded_plan(model: ir.Model, source: str) -> CompressionPlan | None:
    """The plan that our exporter put into the file's metadata, if any."""
    text = model.metadata_props.get("nxm.plan")
    return CompressionPlan.from_json(text, source=f"{source} (metadata)") if text else None


def _check_products(
    products: Iterable[GraphWeight | UnreadProduct], plan: CompressionPlan | None, pattern: NMPattern | None
) -> tuple[tuple[WeightReport, ...], tuple[UnreadProduct, ...], bool]:
    """(a report for every weight, once for all products that read it alike; what was not read; whether any weight is
    quantized)."""
    nodes: dict[WeightReport, list[str]] = {}
    unread = []
    quantized = False
    for found in products:
        if isinstance(found, UnreadProduct):
            unread.append(found)
        else:
            quantized |= found.quantized
            nodes.setdefault(_check_weight(found, plan, pattern), []).append(name_of(found.node))
    reports = (replace(report, nodes=tuple(names)) for report, names in nodes.items())
    return tuple(reports), tuple(unread), quantized


def _check_weight(weight: GraphWeight, plan: CompressionPlan | None, pattern: NMPattern | None) -> WeightReport:
    name = parameter_of(weight.name)
    spec = planned_spec(plan, name) if plan else None
    required = spec.pattern if spec else pattern if weight.quantized else None
    problems = []
    if required and not weight.follows(required):
        problems.append(f"not {required} along K: {_why_not(weight, required)}")
    if plan and plan.shapes.get(name, (weight.n, weight.k)) != (weight.n, weight.k):
        problems.append(f"planned {' x '.join(map(str, plan.shapes[name]))} (out, in), and is {weight.n} x {weight.k}")
    if spec and spec.qmax is not None:
        problems += _quantization_problems(weight, spec, spec.qmax)
    problems += scale_problems(weight)
    if pattern and pattern != required and weight.quantized and not weight.follows(pattern):
        problems.append(f"not {pattern} along K, which is asked for: {_why_not(weight, pattern)}")
    return WeightReport(
        name=name,
        op=weight.node.op_type,
        k=weight.k,
        n=weight.n,
        stored=weight.stored,
        scale_axis=weight.scale_axis,
        zeros=round(1.0 - weight.density, 4) if weight.matrix.size else 0.0,
        pattern=str(weight.pattern() or "") or None,
        planned=str(spec) if spec else None,
        problems=tuple(problems),
        sparse=weight.follows(_SPARSE),
    )


def _quantization_problems(weight: GraphWeight, spec: WeightSpec, qmax: int) -> Iterator[str]:
    """What is not as planned of a weight in integers up to `qmax`, and of the quantizers around its product."""
    if not weight.is_quantized:
        yield f"planned {spec}, and stored as {weight.stored}"
    elif np.abs(weight.matrix.astype(np.int64)).max(initial=0) > qmax:
        yield f"a code exceeds {qmax}, the planned {spec.weight_bits} bits"
    multiplied = 1 if weight.operand == "input 0" else 0
    before, behind = _pair_before(weight.node.inputs[multiplied]), _pair_behind(weight.node.outputs[0])
    if spec.input_bits and before is None:
        yield "its input is planned INT8, and no QuantizeLinear and DequantizeLinear stand before it"
    if spec.output_bits and behind is None:
        yield "its output is planned INT8, and no QuantizeLinear stands behind it"
    for planned, what, quantizer in ((spec.input_bits, "input", before), (spec.output_bits, "output", behind)):
        if planned and quantizer is not None and (kind := codes_type(quantizer.outputs[0])) != "INT8":
            yield f"its {what} is planned INT8, and {name_of(quantizer)} quantizes it to {kind}"


def _why_not(weight: GraphWeight, pattern: NMPattern) -> str:
    if not weight.matrix.size:
        return f"it is empty, {weight.k} x {weight.n}"
    if weight.run % pattern.m:
        what = "K" if weight.run == weight.k else "the number of channels that are summed at one place of the kernel"
        return f"{what} is not a multiple of {pattern.m}: it is {weight.run}"
    broken, groups = weight.violations(pattern), weight.groups(pattern)
    text = f"{broken} of {groups} groups keep more than {pattern.n}"
    hidden = broken - weight.without_zero_points().violations(pattern)
    return (
        f"{text}, {hidden} of them because a zero point is not 0: what is stored as 0 is none" if hidden > 0 else text
    )


def _check_embedding(model: ir.Model, name: str) -> Iterator[str]:
    """A word-embedding table that is planned INT8."""
    embedding = stored_embedding(model.graph, name)
    if embedding is None:
        value = model.graph.initializers.get(name)
        yield (
            f"planned INT8, and stored as {value.dtype}"
            if value is not None
            else "planned INT8, and the graph has no INT8 codes with a float32 scale per row under its name"
        )
        return
    codes, scale = embedding
    if (codes < -EMBEDDING_QMAX).any():
        yield f"a code is below -{EMBEDDING_QMAX}"
    yield from (f"a scale {problem}" for problem in _scale_problems(scale))
    recorded = model.metadata_props.get("nxm.embedding_sha256") or model.metadata_props.get("nxm.table")  # nxm-onnx/1
    if recorded is not None and recorded != embedding_hash(codes, scale):
        yield "its codes and scales are not those of the checkpoint that the graph was made from"
    yield from misread(model.graph, name)


def scale_problems(weight: GraphWeight) -> list[str]:
    """What is wrong with the scales and zero points of a weight."""
    problems = []
    if weight.scale_axis == "K":
        problems.append(
            "its scales lie along K, the reduced axis: no integer kernel can apply them, and TensorRT silently runs "
            "the "
            "product in float"
        )
    if weight.scale_axis == "block":
        problems.append("it has several scales along K (blocks): no integer kernel can apply them")
    if weight.scale is not None:
        problems += [f"a scale {problem}" for problem in _scale_problems(weight.scale)]
        if weight.scale_axis in ("N", "nothing") and weight.scale.size != weight.n:
            problems.append(f"{weight.scale.size} scales for {weight.n} output channels")
        elif weight.scale_axis == "nothing":
            problems.append(f"its {weight.scale.size} scales do not fit the axis that they are said to lie along")
    if weight.has_zero_point:
        problems.append("its zero point is not 0, and TensorRT refuses asymmetric weights")
    return problems


def _scale_problems(scale: np.ndarray) -> list[str]:
    if scale.dtype.kind != "f":
        return [f"is of type {scale.dtype}, not a float"]
    values = scale.astype(np.float64)
    if not np.isfinite(values).all() or (values <= 0).any():
        return ["is not a positive number"]
    smallest = float(np.finfo(scale.dtype).smallest_normal)
    if (values < smallest).any():
        return [f"of {values.min():.3g} is subnormal in {scale.dtype} (below {smallest:.3g}): it has lost digits"]
    return []


def _check_pairs(model: ir.Model) -> Iterator[str]:
    """Activation pairs: Q feeds DQ with the same scale, per tensor, zero point 0, and one pair per tensor."""
    others: Counter[str] = Counter()
    quantized: dict[int, list[ir.Node]] = {}
    for node in model.graph.all_nodes():
        if node.op_type in _DYNAMIC:
            yield f"{name_of(node)}: dynamic quantization, which TensorRT does not take; calibrate static scales"
        elif node.op_type.startswith("QLinear") or node.op_type in ("QGemm", "QAttention", *PACKED_PRODUCTS):
            others[node.op_type] += 1
        elif node.op_type == "QuantizeLinear":
            yield from _check_readers(node)
            if not _is_constant(node.inputs[0]):
                quantized.setdefault(id(node.inputs[0]), []).append(node)
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not _is_constant(node.inputs[0]):
            yield from _check_activation(node)
    for nodes in quantized.values():
        if len(nodes) > 1:
            yield (
                f"{', '.join(map(name_of, nodes))}: {len(nodes)} QuantizeLinear nodes on one tensor; "
                "its readers only run as one product behind one pair"
            )
    for op, count in sorted(others.items()):
        what = "its weights are packed and cannot be checked" if op in PACKED_PRODUCTS else "only ONNX Runtime takes it"
        yield f"{count} {op} nodes: {what}; export with QuantizeLinear and DequantizeLinear pairs"


def _check_readers(node: ir.Node) -> Iterator[str]:
    """What a QuantizeLinear feeds: something that reads codes, dequantized by the same scale."""
    output = node.outputs[0]
    others = [user.op_type for user in output.consumers() if user.op_type not in _READS_CODES]
    if others or not (output.consumers() or output.is_graph_output()):
        yield f"{name_of(node)}: quantizes into {', '.join(others) or 'nothing'}; an orphan without DequantizeLinear"
    mine = [array_of(value) for value in _operands(node)]
    for user in output.consumers():
        if user.op_type != "DequantizeLinear":
            continue
        for what, one, other in zip(
            ("scale", "zero point"), mine, (array_of(value) for value in _operands(user)), strict=True
        ):
            if one is not None and other is not None and not np.array_equal(one.reshape(-1), other.reshape(-1)):
                yield f"{name_of(node)}: quantizes with another {what} than {name_of(user)} dequantizes with"


def _check_activation(node: ir.Node) -> Iterator[str]:
    """One half of a pair on an activation."""
    if node.op_type == "DequantizeLinear" and not _from_codes(node.inputs[0]):
        yield f"{name_of(node)}: dequantizes what nothing quantized"
    scale, zero = (array_of(value) for value in _operands(node))
    if scale is None:
        yield f"{name_of(node)}: its scale is not a constant: dynamic quantization, which TensorRT does not take"
    elif scale.size != 1:
        yield f"{name_of(node)}: {scale.size} scales on an activation; only one per tensor can run in integers"
    else:
        yield from (f"{name_of(node)}: its scale {problem}" for problem in _scale_problems(scale))
    if zero is not None and np.any(zero):
        value = zero.reshape(-1)[0]  # a float in a file of somebody else
        yield f"{name_of(node)}: zero point {value:g} is not 0, and TensorRT refuses asymmetric activations"


def _operands(node: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Scale and zero point of a QuantizeLinear or DequantizeLinear."""
    return node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None


def _is_constant(value: ir.Value | None) -> bool:
    """True for a constant, and for what only rearranges or quantizes one."""
    through = ("QuantizeLinear", "Transpose", "Reshape", "Identity", "Cast")
    return any(ir.convenience.get_const_tensor(moved) is not None for moved in values_behind(value, through))


def _from_codes(value: ir.Value | None) -> bool:
    """True when the value comes from a node that writes integers (or is an input of the graph)."""
    node = _behind(value)
    return node is None or node.op_type.startswith(("Quantize", "QLinear", "QGemm", "DynamicQuantize"))


def _pair_before(value: ir.Value | None) -> ir.Node | None:
    """The QuantizeLinear of the pair that a value comes out of."""
    node = _behind(value)
    if node is None or node.op_type != "DequantizeLinear":
        return None
    source = _behind(node.inputs[0])
    return source if source is not None and source.op_type == "QuantizeLinear" else None


def _pair_behind(value: ir.Value) -> ir.Node | None:
    """The QuantizeLinear through which everything reads the product, behind its bias."""
    users = value.consumers()
    if len(users) == 1 and users[0].op_type == "Add" and any(_is_constant(other) for other in users[0].inputs):
        users = users[0].outputs[0].consumers()
    return users[0] if len(users) == 1 and users[0].op_type == "QuantizeLinear" else None


def _behind(value: ir.Value | None) -> ir.Node | None:
    """The node that made a value, looking through nodes that only move it."""
    node = None
    for moved in values_behind(value, _MOVES_CODES):
        node = moved.producer()
    return node

"""Cost without a clock: passes over memory, nodes, bytes and modules, which do not depend on how busy the machine is.

A pass is an operator that writes a tensor as large as a weight or a batch. The numbers are what the code takes today;
who adds a pass should know it, and who saves one lowers the number.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compressors.projections import PROJECTIONS
from compressors.pruning.admm import Admm
from compressors.quantization.fake_quant import ActivationQuantizer, QuantLinear
from engines.ort.backend import unsigned_activations
from engines.ort.graph_rewrites import fused_attention, integer_products
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.graph.exporter import export
from nxm_export.graph.reading.graph_weights import load_graph
from tests.support import onnx_text
from tests.support.baked import write_checkpoint

TOKENS, OUT, IN = 256, 64, 128
SPEC = WeightSpec(NMPattern(2, 4), 4, 8)


class Passes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own __init_subclass__
    """Counts operators, by name, that write at least `least` elements; views write none."""

    def __init__(self, least: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.least = least
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        view = function.is_view or function in (torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default)
        if not view and isinstance(result, Tensor) and result.numel() >= self.least:
            self.counts[function.name().removeprefix("aten::").partition(".")[0].removesuffix("_")] += 1
        return result

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def layer_of(spec: WeightSpec) -> QuantLinear:
    layer = QuantLinear(nn.Linear(IN, OUT), spec, "w")
    layer.input_quantizer = ActivationQuantizer()
    layer.input_quantizer.set_scale(0.02)
    if isinstance(layer.output_quantizer, ActivationQuantizer):
        layer.output_quantizer.set_scale(0.02)
    return layer


def passes_of_a_step(module: nn.Module) -> Counter[str]:
    x = torch.randn(TOKENS, IN, requires_grad=True)
    upstream = {dtype: torch.randn(TOKENS, OUT, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    passes = Passes(OUT * IN)
    with passes:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        y.backward(upstream[y.dtype])
    return passes.counts


def test_a_quantized_layer_takes_few_passes_beyond_those_of_a_plain_one() -> None:
    plain, layer = passes_of_a_step(nn.Linear(IN, OUT)), layer_of(SPEC)
    layer.freeze_mask()
    found = passes_of_a_step(layer)
    assert (
        sum(found[name] for name in ("mm", "addmm", "bmm")) == sum(plain[name] for name in ("mm", "addmm", "bmm")) == 3
    )
    assert (
        found["hardtanh_backward"] == found["round"] == found["clamp"] == 2
    )  # once for the weight, once for the input
    assert found["div"] == 3  # weight and input going forward, the weight again going back
    assert (
        sum(found.values()) <= sum(plain.values()) + 19
    )  # the last one halves what the layers behind it read and keep


def test_an_output_quantizer_takes_seven_passes() -> None:
    bare, quantized = layer_of(SPEC), layer_of(WeightSpec(NMPattern(2, 4), 4, 8, 8))
    bare.freeze_mask()
    quantized.freeze_mask()
    more = passes_of_a_step(quantized) - passes_of_a_step(bare)
    # The copies are of its codes, to a byte each and back.
    assert dict(more) == {"div": 1, "round": 1, "clamp": 1, "mul": 1, "hardtanh_backward": 1, "_to_copy": 2}


def admm_of(mode: str) -> Admm:
    weights = {name: nn.Parameter(torch.randn(OUT, IN)) for name in ("a", "b")}
    return Admm({name: (weight, SPEC) for name, weight in weights.items()}, PROJECTIONS[mode])


def test_the_penalty_takes_three_passes_in_place_for_each_weight() -> None:
    admm = admm_of("mask")
    admm.set_rho(1.0)
    for constraint in admm._all():
        constraint.weight.grad = torch.zeros_like(constraint.weight)
    passes = Passes(OUT * IN)
    with passes:
        admm.add_penalty()
    assert dict(passes.counts) == {"add": 4, "sub": 2}


@pytest.mark.parametrize(("mode", "limit"), [("mask", 14), ("joint", 16)])
def test_a_dual_update_takes_a_fixed_number_of_passes(mode: str, limit: int) -> None:
    """Whole matrices only: the search for a scale runs over kept weights, of which there are half as many."""
    passes = Passes(OUT * IN)
    with passes:
        admm_of(mode).dual_update()
    made = passes.total
    admm = admm_of(mode)
    passes = Passes(OUT * IN)
    with passes:
        admm.dual_update()
    assert passes.total <= 2 * limit  # two weights
    assert (
        made > passes.total
    )  # making the state projects once, which the first count held: so passes are counted at all


def test_the_scale_search_never_works_on_dropped_weights() -> None:
    admm = admm_of("joint")
    with Passes(OUT * IN // 2) as half, Passes(OUT * IN) as whole:
        admm.dual_update()
    searched = half.counts - whole.counts
    assert searched["div"] >= 13 * 2  # a division for each scale tried, for each of two weights
    assert whole.counts["div"] == 2


def stored_bytes(checkpoint: Path) -> int:
    """What the graph has to hold: INT8 codes, a float32 scale and an INT8 zero point per output channel, the rest as it
    is."""
    total = 0
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (safe_open is no mapping)
            array = tensors.get_tensor(name)
            planned = name.endswith(".weight") and ".layer." in name and array.ndim == 2
            total += array.size + 5 * array.shape[0] if planned else array.nbytes
    return total


def test_a_block_more_is_as_many_nodes_and_bytes_more(tmp_path: Path) -> None:
    """In the `inputs` placement: four quantized tensors a block (one for query, key and value), and ten pairs' second
    halves, of which six are weights'."""
    sizes, nodes, stored, pairs = [], [], [], []
    for layers in (1, 2):
        checkpoint = write_checkpoint("bert", tmp_path / f"checkpoint-{layers}", layers=layers)
        exported = export(checkpoint, tmp_path / f"onnx-{layers}")
        sizes.append(exported.bytes)
        nodes.append(exported.nodes)
        stored.append(stored_bytes(checkpoint))
        pairs.append((exported.report.quantize_nodes, exported.report.dequantize_nodes))
    assert pairs == [(4, 10), (8, 20)]
    assert nodes[1] - nodes[0] == 44
    named = (sizes[1] - sizes[0]) - (stored[1] - stored[0])
    assert 0 <= named <= 44 * 400  # a node's names, shapes and attributes, and its part of the plan in the metadata


def bytes_moved(model: ir.Model, batch: int, sequence: int) -> int:
    """What the nodes of a graph read and write, constants among it, each node by itself. Every size must be known."""
    sizes = {"batch": batch, "sequence": sequence}
    total = 0
    for node in model.graph:
        for value in (value for value in (*node.inputs, *node.outputs) if value is not None):
            assert value.shape is not None, f"{value.name} has no shape"
            assert value.dtype is not None, f"{value.name} has no type"
            axes = [axis if isinstance(axis, int) else sizes[axis.value or ""] for axis in value.shape]
            total += int(math.prod(axes) * value.dtype.itemsize)
    return total


# Placement -> bytes at 2 x 8 of the exported graph, and of what ONNX Runtime is given.
BYTES_MOVED = {"inputs": (287_196, 122_874), "products": (307_716, 189_742)}


def test_a_graph_moves_no_more_bytes_than_were_recorded(tmp_path: Path) -> None:
    """One block of hidden size 32, its vocabulary and positions; who moves fewer lowers the number."""
    checkpoint = write_checkpoint("bert", tmp_path / "checkpoint", placement="attention", attention="int8")
    found = {}
    for placement in BYTES_MOVED:
        model = load_graph(export(checkpoint, tmp_path / placement, placement=placement).path)
        exported = bytes_moved(model, 2, 8)
        unsigned_activations(model)
        integer_products(model)
        fused_attention(model)
        found[placement] = exported, bytes_moved(model, 2, 8)
    assert found == BYTES_MOVED


def test_the_bytes_that_a_node_moves_are_counted_by_its_shapes() -> None:
    """A product of (2 * 3, 4) and (4, 5) in float32 and a copy of it: 24 + 20 + 30 elements, and 30 + 30."""
    head = "g (float[batch, sequence, 4] x, float[4, 5] w) => (float[batch, sequence, 5] y)"
    model = onnx_text.model(head + " { p = MatMul(x, w) y = Abs(p) }")
    passes.ShapeInferencePass()(model)
    assert bytes_moved(model, 2, 3) == 4 * (24 + 20 + 30 + 30 + 30)


def test_an_export_reads_each_weight_thrice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To check the checkpoint, to check what was traced, and for the codes."""
    import nxm_export.contract.checkpoint as checkpoint_module
    import nxm_export.graph.exporter as export_module

    checkpoint = write_checkpoint("bert", tmp_path / "checkpoint", layers=1)
    read: Counter[str] = Counter()
    original: Callable[[Path, str], Any] = checkpoint_module.read_tensor

    def counting(path: Path, name: str) -> Any:
        read[name] += 1
        return original(path, name)

    monkeypatch.setattr(checkpoint_module, "read_tensor", counting)
    monkeypatch.setattr(export_module, "read_tensor", counting)
    export(checkpoint, tmp_path / "onnx")
    assert len(read) == 6
    assert set(read.values()) == {3}


def test_help_imports_few_modules() -> None:
    """What `nxm --help` takes is imports: 187 modules today, of which a bare Python has a third, and no numpy."""
    code = """
import sys
from nxm_export.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print(len(sys.modules), "numpy" in sys.modules)
"""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, numpy = child.stdout.splitlines()[-1].split()
    assert int(count) < 230  # Python versions differ by some dozens
    assert numpy == "False"

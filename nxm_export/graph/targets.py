"""What graphs are made for: the targets of ``nxm export``.

``cpu`` is a float32 graph at opset 20, ``trt`` a float16 (or bfloat16) one at opset 21 for strongly typed TensorRT (10
and later, and RTX), ``trt8`` a float32 one at opset 17 for the weakly typed TensorRT 8.6, whose parser takes weights in
float with their own QuantizeLinear.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nxm_export.errors import ExportError
from nxm_export.graph.apply_plan import WeightForm
from nxm_export.graph.int4_storage import CAST, DIRECT, INT4_OPSET


@dataclass(frozen=True)
class GraphTarget:
    """What a graph is made for: float dtype of the graph, opset, how weights are stored, which quantizers stay (None:
    all that were trained), how an embedding table that is planned INT8 is stored, in which form INT4 weights are (None:
    not at all), and whether fused matrices are split."""

    name: str
    dtype: str
    opset: int
    placement: str | None
    stored: str = "int8"
    embedding: str = "float"  # TensorRT takes integer constants in front of DequantizeLinear alone
    int4: str | None = None
    splits_fused: bool = False  # a fused matrix is a product for each of its parts

    @property
    def weight_form(self) -> WeightForm:
        """How its quantized weights are written."""
        return WeightForm(self.stored, self.splits_fused)

    def for_int4(self) -> GraphTarget:
        """The target of a graph with INT4 weights."""
        return replace(self, opset=max(self.opset, INT4_OPSET))


TARGETS = {
    "cpu": GraphTarget("cpu", "float32", 20, "inputs", embedding="int8", int4=CAST),  # below 20 there is no Gelu
    "trt": GraphTarget("trt", "float16", 21, None, int4=DIRECT, splits_fused=True),
    "trt8": GraphTarget("trt8", "float32", 17, None, stored="float", splits_fused=True),
}


def target_named(name: str) -> GraphTarget:
    """The target of this name, or `ExportError` with the list."""
    if name not in TARGETS:
        raise ExportError(f"unknown target {name!r}; choose one of {', '.join(TARGETS)}")
    return TARGETS[name]

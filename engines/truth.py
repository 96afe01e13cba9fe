"""What a TensorRT engine really runs, read from what the builder prints about its layers.

The layer list is the same text in a verbose build log and in the inspector's output: one line a layer, with the types of
its inputs and constants, and the ONNX nodes that went into it. It says which products run on integers. It does not prove
sparsity: only a kernel's name does, and names are chosen on the GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: \d+, Metadata: ?(?P<metadata>.*)$"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_PRODUCTS = ("gemm", "correlation", "CaskConvolution", "CaskGemmConvolution", "mha")


@dataclass(frozen=True)
class LayerInfo:
    """One layer of a built engine. `onnx` are the names of the ONNX nodes inside it; types are TensorRT's names."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    kernel: str
    onnx: tuple[str, ...]

    @property
    def is_integer_product(self) -> bool:
        """True for a matrix product whose activations are INT8 (its weight then is, too: no kernel mixes them)."""
        return self.kind in _PRODUCTS and bool(self.inputs) and all(kind == "Int8" for kind in self.inputs)


def parse_layers(lines: Iterable[str]) -> list[LayerInfo]:
    """Every layer line among `lines`; other lines are skipped."""
    layers = []
    for line in lines:
        found = _LAYER.search(line.rstrip())
        if found:
            types = {part: tuple(_DATATYPE.findall(found[part])) for part in ("inputs", "constants", "outputs")}
            layers.append(
                LayerInfo(
                    found["name"].strip(),
                    found["kind"],
                    **types,
                    kernel=found["tactic"],
                    onnx=tuple(_ONNX.findall(found["metadata"])),
                )
            )
    return layers


def integer_products(layers: Iterable[LayerInfo], products: Iterable[str]) -> dict[str, bool]:
    """For each ONNX product node of `products`: whether a layer that contains it multiplies integers."""
    integer = {node for layer in layers if layer.is_integer_product for node in layer.onnx}
    return {product: product in integer for product in products}

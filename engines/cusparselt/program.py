"""The engine file: one safetensors file with the tensors, and in its header what is computed with them.

A `Program` is the ONNX graph as a list of steps, with its quantized products in a form of their own. Weights are stored
as INT8 codes (N, K); cuSPARSELt's compressed form is made from them on the GPU when the engine is loaded, since it
depends on the GPU and the library.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engines.base import Binding
from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import decode, encode, parse_json

if TYPE_CHECKING:
    import torch

ENGINE_FILE = "model.safetensors"
SCHEMA = "nxm-cusparselt/1"
# The operators of steps that are not ONNX's: a product of integers, fused attention, and a float product with a bias.
PRODUCT, ATTENTION, LINEAR = "nxm.Product", "nxm.Attention", "nxm.Linear"
_BUILD_AGAIN = "build the engine again"
Attribute = int | float | str | tuple[int, ...]


OUTPUTS = ("int8", "float16", "bfloat16", "float32")  # of products


@dataclass(frozen=True)
class Known:
    """Which operators and which forms of products there are, for `require_consistent`."""

    operator: Callable[[str], bool]
    form: Callable[[str], bool]


@dataclass(frozen=True)
class Step:
    """One operation: an ONNX operator, or one of those above; an input that is left out is the empty name."""

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]


@dataclass(frozen=True)
class Product:
    """INT8 codes (rows, K) times an INT8 matrix (N, K), times `alpha` (N,), plus `bias` (N,) in float32, as `output`:
    ``int8`` (rounded to the nearest and clipped) or a float type. `name` is the parameter's; the others name tensors of
    the file. `two_four` says that the codes are 2:4 along K."""

    name: str
    weight: str
    alpha: str
    bias: str | None
    k: int
    n: int
    output: str
    two_four: bool


@dataclass(frozen=True)
class Measurement:
    """One form of a product, tried when the engine was built: microseconds, or why it cannot be used; `algorithm` is
    cuSPARSELt's number, and without `in_graph` no CUDA graph could hold the form, so that launches are in its time."""

    form: str
    microseconds: float | None
    algorithm: int = 0
    problem: str | None = None
    in_graph: bool = True


@dataclass(frozen=True)
class Choice:
    """What runs products of these sizes at up to `rows` rows: the form, cuSPARSELt's algorithm, and what was
    measured."""

    n: int
    k: int
    output: str
    bias: bool
    rows: int
    form: str
    algorithm: int
    measured: tuple[Measurement, ...]


@dataclass(frozen=True)
class Program:
    """What an engine computes. `products` are by the name of their ONNX node; `attention` counts attentions: those
    that are one fused operation, those in parts, and of both those with operands that were quantized: they are rounded
    to their INT8 grid, and multiplied in float."""

    inputs: tuple[Binding, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    products: Mapping[str, Product]
    attention: Mapping[str, int]
    choices: tuple[Choice, ...] = ()


def to_bytes(program: Program, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The engine file of a program and the tensors that it names."""
    from safetensors.torch import save

    data: bytes = save(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, {"nxm": encode(program, SCHEMA)}
    )
    return data


def program_of(data: bytes, source: str) -> Program:
    """The program of an engine file, by its header alone; raises `ArtifactError`."""
    try:
        (size,) = struct.unpack_from("<Q", data)
        text = data[8 : 8 + size].decode("utf-8")
    except (struct.error, UnicodeDecodeError) as error:
        raise ArtifactError(f"{source}: no safetensors file; {_BUILD_AGAIN}") from error
    header = parse_json(text, source, _BUILD_AGAIN, ArtifactError)
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    described = metadata.get("nxm") if isinstance(metadata, dict) else None
    if not isinstance(described, str):
        raise ArtifactError(f"{source}: its header has no program; {_BUILD_AGAIN}")
    return decode(described, Program, schema=SCHEMA, source=source, way_out=_BUILD_AGAIN)


def require_consistent(program: Program, tensors: Mapping[str, torch.Tensor], known: Known, source: str) -> None:
    """Raise `ArtifactError` unless a program reads only what is there: names, products, operators, forms, sizes."""
    there = {*tensors, *(binding.name for binding in program.inputs)}
    for step in program.steps:
        missing = [name for name in step.inputs if name and name not in there]
        if missing:
            raise ArtifactError(f"{source}: a {step.op} reads {missing[0]!r}, which nothing makes; {_BUILD_AGAIN}")
        if not known.operator(step.op) or (
            step.op == PRODUCT and step.attributes.get("product") not in program.products
        ):
            raise ArtifactError(f"{source}: there is no {step.op} as its step {step.outputs} says; {_BUILD_AGAIN}")
        there |= set(step.outputs)
    absent = [name for name in program.outputs if name not in there]
    if absent:
        raise ArtifactError(f"{source}: nothing makes its output {absent[0]!r}; {_BUILD_AGAIN}")
    for node, product in program.products.items():
        sizes = {product.weight: (product.n, product.k), product.alpha: (product.n,)}
        sizes |= {product.bias: (product.n,)} if product.bias is not None else {}
        for name, size in sizes.items():
            if name not in tensors or tuple(tensors[name].shape) != size:
                raise ArtifactError(f"{source}: {node} has no tensor {name!r} of {size}; {_BUILD_AGAIN}")
        if product.output not in OUTPUTS:
            raise ArtifactError(f"{source}: {node} writes {product.output!r}, which no product does; {_BUILD_AGAIN}")
    for choice in program.choices:
        if not known.form(choice.form):
            raise ArtifactError(f"{source}: {choice.form!r} is no form of a product; {_BUILD_AGAIN}")


def tensors_of(data: bytes, source: str) -> dict[str, torch.Tensor]:
    """The tensors of an engine file, on the CPU; raises `ArtifactError`."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(data))
    except SafetensorError as error:
        raise ArtifactError(f"{source}: no safetensors file ({error}); {_BUILD_AGAIN}") from error

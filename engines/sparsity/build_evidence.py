"""What a build and an engine say about themselves: layers, kernels, the builder's lists of sparse layers, times.

Read from the files beside an engine and nowhere else; `engines.sparsity.judgement` judges. The wordings are those of
TensorRT 8.6 to 11 and of TensorRT-RTX.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from engines.passport import PASSPORT_FILE, load_passport
from engines.sparsity.kernel_names import kernel_named
from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import convert, read_json, require_schema

LOG_FILE = "build.log"
LAYERS_FILE = "layers.json"
LAYERS_SCHEMA = "nxm-layers/1"
MEASURED_FILE = "measured.json"
MEASURED_SCHEMA = "nxm-measured/1"
_BUILD_AGAIN = "build the engine again"
_MEASURE_AGAIN = "delete it, or measure again with `nxm inspect --measure`"
T = TypeVar("T")
_PRODUCT_KINDS = (
    "gemm",
    "correlation",
    "caskconvolution",
    "caskgemmconvolution",
    "caskgemmmatrixmultiply",
    "mha",
    "matrixmultiply",
    "convolution",
    "fc",
)
_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\]"
    r"(?:, Constants: \[(?P<constants>.*?)\])?, Outputs: \[(?P<outputs>.*?)\](?:, \w+: [^,\[\]{}]*?)*?"
    r", TacticName: (?P<tactic>.*?), StreamId: \d+, Metadata: ?(?P<metadata>.*)$"
)
_DATATYPE = re.compile(r"(?:Format/)?Datatype: (\w+)")
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_PROFILE = re.compile(r"\s*\[profile (\d+)\]$")
_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math|Found \d+ layer\(s\) eligible to use sparse tactics):?(.*)$"
)
_PICKED = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers"
    r"|Chose \d+ layer\(s\) using sparse tactics):?(.*)$"
)


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
    profile: int = 0
    saw_sparse_weights: bool = False

    @property
    def is_product(self) -> bool:
        """True for a matrix product or convolution."""
        return self.kind.lower() in _PRODUCT_KINDS or kernel_named(self.kernel) is not None

    @property
    def is_integer_product(self) -> bool:
        """True for a matrix product whose activations are INT8 (its weight then is, too: no kernel mixes them)."""
        return self.is_product and bool(self.inputs) and all(_is_int8(kind) for kind in self.inputs)

    @property
    def parts(self) -> list[str]:
        """The names that the layer's own name joins: ``a + b``, ``v_MatMul+k_MatMul_myl0_9``."""
        return _parts(self.name)


@dataclass(frozen=True)
class InspectedProfile:
    """The engine inspector's report (TensorRT's own JSON) for one profile at its best `shape` (batch, sequence)."""

    profile: int
    shape: tuple[int, int]
    information: Mapping[str, object]


@dataclass(frozen=True)
class InspectedEngine:
    """The file ``layers.json``: the inspector's report for every profile of an engine."""

    profiles: tuple[InspectedProfile, ...]


@dataclass(frozen=True)
class _InspectorLayer:
    """A layer of TensorRT's inspector report, by its words; tensors have more fields than are read."""

    Name: str = ""
    LayerType: str = ""
    Inputs: tuple[Mapping[str, object] | str, ...] = ()
    Constants: tuple[Mapping[str, object] | str, ...] = ()
    Outputs: tuple[Mapping[str, object] | str, ...] = ()
    TacticName: str | None = None
    Metadata: str | None = None
    HasSparseWeights: int | bool = 0


@dataclass(frozen=True)
class _InspectorReport:
    """TensorRT's inspector report; a layer without details is its name."""

    Layers: tuple[_InspectorLayer | str, ...] = ()


@dataclass(frozen=True)
class MeasuredLayers:
    """The file ``measured.json``: mean milliseconds of every layer at one `shape` (batch, sequence), and the names of
    kernels that a profiler saw, where one was asked."""

    engine_sha256: str
    shape: tuple[int, int]
    rounds: int
    layer_ms: Mapping[str, float]
    kernels: tuple[str, ...] | None = None


@dataclass(frozen=True)
class SparsityLog:
    """The builder's own words: layer names that it found eligible and picked; None where it said nothing at all."""

    eligible: frozenset[str] | None = None
    picked: frozenset[str] | None = None


@dataclass(frozen=True)
class Evidence:
    """What an engine and its build say: milliseconds by layer name; `running` are kernels that a profiler saw."""

    layers: Sequence[LayerInfo] = ()
    log: SparsityLog = SparsityLog()
    layer_ms: Mapping[str, float] = field(default_factory=dict)
    running: frozenset[str] | None = None


def parse_layers(lines: Iterable[str]) -> list[LayerInfo]:
    """Every layer line of a verbose build log (TensorRT 10, 11, RTX) among `lines`; other lines are skipped."""
    layers = []
    for line in lines:
        match = _LAYER.search(line.rstrip())
        if match:
            layers.append(
                LayerInfo(
                    name=match["name"].strip(),
                    kind=match["kind"],
                    inputs=tuple(_DATATYPE.findall(match["inputs"])),
                    constants=tuple(_DATATYPE.findall(match["constants"] or "")),
                    outputs=tuple(_DATATYPE.findall(match["outputs"])),
                    kernel=match["tactic"],
                    onnx=tuple(_ONNX.findall(match["metadata"])),
                )
            )
    return layers


def parse_inspector(
    information: Mapping[str, object], profile: int = 0, *, source: str = "the inspector's report"
) -> list[LayerInfo]:
    """The layers of an engine inspector's JSON report: TensorRT 8.6 and 10 (``Format/Datatype``) and 11 (``Datatype``).

    Layers of another profile, as their names say, are skipped. A report without details gives names only. Raises
    `ArtifactError` with `source` and the field for another report.
    """
    layers = []
    report = convert(information, _InspectorReport, source=source, way_out=_BUILD_AGAIN, foreign=True)
    for entry in report.Layers:
        layer = _InspectorLayer(entry) if isinstance(entry, str) else entry
        name = layer.Name
        other = _PROFILE.search(name)
        if other and int(other[1]) != profile:
            continue
        name = _PROFILE.sub("", name)
        onnx = tuple(_ONNX.findall(layer.Metadata or "")) or tuple(_parts(name))
        layers.append(
            LayerInfo(
                name,
                layer.LayerType,
                tuple(map(_tensor_type, layer.Inputs)),
                tuple(map(_tensor_type, layer.Constants)),
                tuple(map(_tensor_type, layer.Outputs)),
                layer.TacticName or "",
                onnx,
                profile,
                bool(layer.HasSparseWeights),
            )
        )
    return layers


def _tensor_type(tensor: Mapping[str, object] | str) -> str:
    if isinstance(tensor, str):
        return ""
    return str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")


def _is_int8(kind: str) -> bool:
    return bool(re.search(r"\bint8\b", kind, re.IGNORECASE))


def _parts(name: str) -> list[str]:
    bare = re.sub(r"_myl\d+_\d+$", "", _PROFILE.sub("", name))
    return [part.strip() for part in re.split(r"\s*\+\s*|\s*\|\|\s*", bare) if part.strip()]


def parse_sparsity_log(lines: Iterable[str]) -> SparsityLog:
    """The builder's lists of sparse layers, in the wording of TensorRT 8 to 10 and in that of 11.

    A build prints the lists once per subgraph: all are joined. A listed layer ``a + b`` counts for both of its parts.
    """
    eligible: set[str] | None = None
    picked: set[str] | None = None
    for line in lines:
        for pattern, is_picked in ((_ELIGIBLE, False), (_PICKED, True)):
            match = pattern.search(line.rstrip())
            if match is None:
                continue
            names = {part for item in match[1].split(",") for part in _parts(item.strip())}
            if is_picked:
                picked = (picked or set()) | names
            else:
                eligible = (eligible or set()) | names
    return SparsityLog(None if eligible is None else frozenset(eligible), None if picked is None else frozenset(picked))


def integer_products(layers: Iterable[LayerInfo], products: Iterable[str]) -> dict[str, bool]:
    """For each ONNX product node of `products`: whether a layer that contains it multiplies integers."""
    integer = {node for layer in layers if layer.is_integer_product for node in layer.onnx}
    return {product: product in integer for product in products}


def read_evidence(directory: Path, running: Iterable[str] | None = None) -> Evidence:
    """What lies beside an engine: inspector report, build log, layer times. Missing files are missing evidence.

    `running` are names of kernels that a profiler saw. Raises `ArtifactError` for a file that is damaged, and for a
    measurement of another engine than the one of the passport there.
    """
    layers: list[LayerInfo] = []
    log = SparsityLog()
    if (directory / LOG_FILE).is_file():
        lines = (directory / LOG_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
        layers, log = parse_layers(lines), parse_sparsity_log(lines)
    if (directory / LAYERS_FILE).is_file():
        layers = _inspected_layers(directory / LAYERS_FILE)
    measured = _measured(directory) if (directory / MEASURED_FILE).is_file() else None
    kernels = running if running is not None else measured.kernels if measured else None
    times = {_PROFILE.sub("", name): ms for name, ms in measured.layer_ms.items()} if measured else {}
    return Evidence(layers, log, times, None if kernels is None else frozenset(kernels))


def _inspected_layers(file: Path) -> list[LayerInfo]:
    inspected = _read(file, InspectedEngine, LAYERS_SCHEMA, _BUILD_AGAIN)
    return [
        layer
        for at, part in enumerate(inspected.profiles)
        for layer in parse_inspector(part.information, part.profile, source=f"{file}: profiles[{at}].information")
    ]


def _measured(directory: Path) -> MeasuredLayers:
    file = directory / MEASURED_FILE
    measured = _read(file, MeasuredLayers, MEASURED_SCHEMA, _MEASURE_AGAIN)
    # A directory may be built again while its former engine is measured.
    if (directory / PASSPORT_FILE).is_file() and measured.engine_sha256 != load_passport(directory).engine_sha256:
        raise ArtifactError(f"{file}: of another engine (sha256 {measured.engine_sha256[:12]}...); {_MEASURE_AGAIN}")
    return measured


def _read(file: Path, kind: type[T], schema: str, way_out: str) -> T:
    """The record in a file of this schema, or in one that was written before the file had a schema."""
    value = read_json(file, way_out)
    if isinstance(value, dict) and "schema" in value:
        require_schema(value, schema, str(file), ArtifactError)
        value = {key: entry for key, entry in value.items() if key != "schema"}
    return convert(value, kind, source=str(file), way_out=way_out)

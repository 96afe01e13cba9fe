"""What a build and an engine say about themselves: layers, kernels, the builder's lists of sparse layers, times.

Read from the files beside an engine and nowhere else; `engines.sparsity.judgement` judges. The wordings are those of
TensorRT 8.6 to 11 and of TensorRT-RTX. Names are compared whole: ``layer.1`` is no part of ``layer.10``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from engines.passport import EnginePassport, load_passport
from engines.sparsity.kernel_names import kernel_named
from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import convert, parse_json, read_json, require_schema

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

    @cached_property
    def joined(self) -> tuple[str, ...]:
        """The nodes of `onnx` that the layer's own name joins: those that it computes.

        `onnx` also has nodes that were computed elsewhere and only left a scale or a bias here. Myelin may write what
        is no letter or digit in a node's name as ``_``.
        """
        parts = self.parts
        whole = tuple(node for node in self.onnx if node in parts)
        if whole:
            return whole
        rewritten, alike = {_rewritten(part) for part in parts}, Counter(map(_rewritten, self.onnx))
        names = ((node, _rewritten(node)) for node in self.onnx)
        return tuple(node for node, name in names if name in rewritten and alike[name] == 1)


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
    """What an engine and its build say: milliseconds by layer name, at `shape` (batch, sequence); `running` are kernels
    that a profiler saw. `profiles` are those of the engine that were inspected. `untied` says why nothing ties all of
    it to the engine, so that it proves nothing."""

    layers: Sequence[LayerInfo] = ()
    log: SparsityLog = SparsityLog()
    layer_ms: Mapping[str, float] = field(default_factory=dict)
    running: frozenset[str] | None = None
    profiles: frozenset[int] = frozenset({0})
    shape: tuple[int, int] | None = None
    untied: str | None = None


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


def _rewritten(name: str) -> str:
    return re.sub(r"\W", "_", name)


def ambiguous_names(names: Iterable[str]) -> dict[str, str]:
    """Of the names of all nodes of a graph those by which evidence cannot tell a node from others, with the reason.

    A builder names a layer by joining names, and a report names the nodes of a layer in brackets. So a name is
    ambiguous that two nodes have, that is not read as itself, and that is read in the name of another node.
    """
    counts = Counter(names)
    read = {name: {*_parts(name), *_ONNX.findall(f"[ONNX Layer: {name}]"), *_listed(name)} for name in counts}
    readers: dict[str, list[str]] = {}
    for name, parts in read.items():
        for part in parts:
            readers.setdefault(part, []).append(name)
    found = {}
    for name, count in counts.items():
        others = [other for other in readers.get(name, ()) if other != name]
        if count > 1:
            found[name] = f"{count} nodes of the graph have the name {name!r}"
        elif read[name] != {name}:
            found[name] = f"a builder's report reads the name {name!r} as other names joined"
        elif others:
            found[name] = f"a builder's report reads the name {name!r} in that of the node {others[0]!r}, too"
    return found


def _listed(names: str) -> set[str]:
    """Every name in a builder's list of layers: a listed layer ``a + b`` counts for both of its parts."""
    return {part for item in names.split(",") for part in _parts(item.strip())}


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
            names = _listed(match[1])
            if is_picked:
                picked = (picked or set()) | names
            else:
                eligible = (eligible or set()) | names
    return SparsityLog(None if eligible is None else frozenset(eligible), None if picked is None else frozenset(picked))


def integer_products(
    layers: Iterable[LayerInfo], products: Sequence[str], ambiguous: Container[str] = ()
) -> tuple[bool, ...]:
    """For each ONNX product node of `products`: whether all layers that multiply it are known to multiply integers.

    False, too, for names that two of `products` have, that are `ambiguous` (see `ambiguous_names`), or whose layer does
    not say which of several products it multiplies.
    """
    layers, counts = tuple(layers), Counter(products)

    def is_integer(product: str) -> bool:
        found = product_layers(layers, product)
        return bool(found) and all(layer.is_integer_product and not unclear_products(layer, counts) for layer in found)

    return tuple(counts[product] == 1 and product not in ambiguous and is_integer(product) for product in products)


def product_layers(layers: Iterable[LayerInfo], node: str) -> list[LayerInfo]:
    """The layers that multiply for the ONNX node `node`: of every profile those that are named after it, and where none
    is those that hold it and are named after none of their nodes (see `unclear_products`)."""
    holding = [layer for layer in layers if node in layer.onnx and layer.is_product]
    named = {layer.profile for layer in holding if node in layer.joined}
    return [layer for layer in holding if node in layer.joined or not (layer.joined or layer.profile in named)]


def unclear_products(layer: LayerInfo, products: Container[str]) -> tuple[str, ...]:
    """The nodes of `products` in a layer that has several, and whose own name joins none of its nodes: one kernel runs
    there, and nothing says for which of them."""
    several = tuple(dict.fromkeys(node for node in layer.onnx if node in products))
    return () if layer.joined or len(several) < 2 else several


def read_evidence(directory: Path, running: Iterable[str] | None = None) -> Evidence:
    """What lies beside an engine: inspector report, build log, layer times. Missing files are missing evidence.

    `running` are names of kernels that a profiler saw. Raises `ArtifactError` for a directory without a passport, for a
    file that is damaged or not the one of the passport, and for a measurement of another engine.
    """
    passport = load_passport(directory)
    layers: list[LayerInfo] = []
    log, profiles = SparsityLog(), frozenset({0})
    if (text := passport.read_evidence(directory, LOG_FILE)) is not None:
        lines = text.splitlines()
        layers, log = parse_layers(lines), parse_sparsity_log(lines)
    if (text := passport.read_evidence(directory, LAYERS_FILE)) is not None:
        inspected = _inspected(text, directory / LAYERS_FILE)
        layers = _inspected_layers(inspected, directory / LAYERS_FILE)
        profiles = frozenset(part.profile for part in inspected.profiles) | frozenset(range(len(passport.profiles)))
    measured = _measured(directory, passport) if (directory / MEASURED_FILE).is_file() else None
    kernels = running if running is not None else measured.kernels if measured else None
    times = {_PROFILE.sub("", name): ms for name, ms in measured.layer_ms.items()} if measured else {}
    return Evidence(
        layers,
        log,
        times,
        None if kernels is None else frozenset(kernels),
        profiles,
        measured.shape if measured else None,
        passport.untied(directory, LAYERS_FILE),
    )


def _inspected(text: str, file: Path) -> InspectedEngine:
    return _read(
        parse_json(text, str(file), _BUILD_AGAIN, ArtifactError), file, InspectedEngine, LAYERS_SCHEMA, _BUILD_AGAIN
    )


def _inspected_layers(inspected: InspectedEngine, file: Path) -> list[LayerInfo]:
    return [
        layer
        for at, part in enumerate(inspected.profiles)
        for layer in parse_inspector(part.information, part.profile, source=f"{file}: profiles[{at}].information")
    ]


def _measured(directory: Path, passport: EnginePassport) -> MeasuredLayers:
    file = directory / MEASURED_FILE
    measured = _read(read_json(file, _MEASURE_AGAIN), file, MeasuredLayers, MEASURED_SCHEMA, _MEASURE_AGAIN)
    # A directory may be built again while its former engine is measured.
    if measured.engine_sha256 != passport.engine_sha256:
        raise ArtifactError(f"{file}: of another engine (sha256 {measured.engine_sha256[:12]}...); {_MEASURE_AGAIN}")
    return measured


def _read(value: object, file: Path, kind: type[T], schema: str, way_out: str) -> T:
    """The record that a file of this schema holds, or one that was written before the file had a schema."""
    if isinstance(value, dict) and "schema" in value:
        require_schema(value, schema, str(file), ArtifactError)
        value = {key: entry for key, entry in value.items() if key != "schema"}
    return convert(value, kind, source=str(file), way_out=way_out)

"""The compression plan: which pattern and how many bits every weight matrix gets, and what that costs in bits.

The plan is the contract between all stages. Search writes it, training obeys it, the exporter folds it into the graph,
and the engine report is judged by it. On disk it is ``nxm_plan.json``; rules and globs are resolved when it is written,
so that a reader never has to guess what a plan covers.

Counting (``COUNTINGS``), in bits for a matrix of ``n`` weights and ``o`` output channels at ``b`` bits a weight:

``values``  only the kept values, ``n * N/M * b``: no positions, no scales. It flatters, and is how papers count.
``packed``  kept values, ``ceil(log2 C(M, N))`` bits per group for their positions, and one 32-bit scale per output
            channel of a quantized matrix: what ``nxm pack`` writes.
``hw``      what a sparse tensor core reads: 2:4 storage with 2 bits per kept value, for 2:4 and the patterns that imply
            it, plus the scales. Other patterns are dense to the hardware and cost ``n * b``. Rows are padded to whole
            groups of 4, which costs something only where K is not divisible by 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nxm_export.contract.choices import STORAGES
from nxm_export.errors import PlanError, some
from nxm_export.storage.json_files import decode, encode, read_text, to_json_object

SCHEMA = "nxm-plan/1"
_WAY_OUT = "write it again with `nxm compress` or `nxm search`"
COUNTINGS = ("hw", "packed", "values")
# What training may place: pairs before each planned product; behind it, too; before every product, those inside
# attention included; all of these; before the FFN's products only.
PLACEMENTS = ("inputs", "inputs-outputs", "products", "attention", "ffn-only")
# What a graph may keep of it, from nothing to everything that was trained.
GRAPH_PLACEMENTS = ("float", "inputs", "inputs-outputs", "products", "attention")
INT8_ATTENTION = ("products", "attention")  # of all placements
SCALE_BITS = 32
DENSE_BITS = 16  # an unquantized weight is deployed in 16 bit
REFERENCE_BITS = 32  # ratios are against the FP32 checkpoint, as in the literature


def _is_size(text: str) -> bool:
    """Whether a text is a number in few enough digits to be the size of anything."""
    return text.isascii() and text.isdecimal() and len(text) <= 18


@dataclass(frozen=True, order=True)
class NMPattern:
    """At most `n` non-zeros in every `m` consecutive weights along the input axis (K).

    `n` counts what is *kept*: 1:4 is 75 % sparse.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if type(self.n) is not int or type(self.m) is not int or not 0 < self.n < self.m:
            raise PlanError(
                f"N:M pattern needs 0 < N < M, got {self}; for dense weights give none (in a plan: leave `pattern` out)"
            )

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """``"2:4"`` -> ``NMPattern(2, 4)``; anything else is a `PlanError`."""
        n, separator, m = text.partition(":")
        if not separator or not (_is_size(n) and _is_size(m)):
            raise PlanError(f"not an N:M pattern: {text!r:.80}; write N kept of every M, as in 2:4")
        return cls(int(n), int(m))

    @property
    def density(self) -> float:
        """Share of the weights that is kept."""
        return self.n / self.m

    @property
    def index_bits(self) -> int:
        """Bits that name one group's support: ``ceil(log2 C(M, N))``; 3 for 2:4."""
        return (math.comb(self.m, self.n) - 1).bit_length()  # in integers: log2 rounds for wide groups

    @property
    def implies_2_4(self) -> bool:
        """True when every matrix of this pattern is also 2:4, which is all that sparse tensor cores read."""
        span = math.lcm(self.m, 4)
        for start in range(0, span, 4):
            groups = {position // self.m for position in range(start, start + 4)}
            overlap = [sum(position // self.m == group for position in range(start, start + 4)) for group in groups]
            if sum(min(self.n, size) for size in overlap) > 2:
                return False
        return True


@dataclass(frozen=True)
class WeightSpec:
    """What happens to one weight matrix.

    `pattern=None` is dense, `weight_bits=None` is unquantized (deployed in 16 bit). `input_bits` and `output_bits` are
    the static per-tensor activation quantizers before and after the matrix product: 8 or None. A weight in the plan
    with all four None is an explicit "leave it in 16 bit".
    """

    pattern: NMPattern | None = None
    weight_bits: int | None = None
    input_bits: int | None = None
    output_bits: int | None = None

    def __post_init__(self) -> None:
        if self.weight_bits is not None and (type(self.weight_bits) is not int or not 2 <= self.weight_bits <= 8):
            raise PlanError(
                f"weight_bits must be 2 to 8, or left out for an unquantized weight; got {self.weight_bits!r}"
            )
        for field in ("input_bits", "output_bits"):
            bits = getattr(self, field)
            if bits is not None and (type(bits) is not int or bits != 8):
                raise PlanError(f"{field} must be 8, or left out for a float activation; got {bits!r}")
        if self.weight_bits is not None and self.input_bits is None:
            raise PlanError(
                "a quantized weight needs a quantized input: integer kernels take both; set input_bits to 8"
            )
        if self.weight_bits is None and (self.input_bits or self.output_bits):
            raise PlanError(
                "activation quantizers need a quantized weight; set weight_bits or drop input_bits/output_bits"
            )

    def __str__(self) -> str:
        """Short name as in tables: ``2:4+W8``, ``W4``, ``2:4``, ``dense``."""
        parts = [str(self.pattern) if self.pattern else "", f"W{self.weight_bits}" if self.weight_bits else ""]
        return "+".join(part for part in parts if part) or "dense"

    @classmethod
    def parse(cls, text: str) -> WeightSpec:
        """Read a weight option: ``2:4+W8``, ``W4``, ``2:4`` or ``dense``; quantized entries get an INT8 input."""
        pattern, bits = None, None
        for part in [] if text.strip().lower() == "dense" else text.split("+"):
            part = part.strip()
            if ":" in part and pattern is None:
                pattern = NMPattern.parse(part)
            elif part[:1] in ("W", "w") and _is_size(part[1:]) and bits is None:
                bits = int(part[1:])
            else:
                raise PlanError(f"not a weight option: {text!r:.80}; write 2:4+W8, W4, 2:4 or dense")
        return cls(pattern, bits, 8 if bits else None)

    @property
    def is_dense(self) -> bool:
        """True when the weight is left alone."""
        return self.pattern is None and self.weight_bits is None

    @property
    def qmax(self) -> int | None:
        """Largest integer code of the weight; the range is narrow, ``[-qmax, qmax]``."""
        return None if self.weight_bits is None else 2 ** (self.weight_bits - 1) - 1

    def stored_bits(self, shape: tuple[int, int], counting: str = "hw") -> int:
        """Bits that a matrix of ``shape`` (out, in) takes by one of `COUNTINGS`; see the module text."""
        if counting not in COUNTINGS:
            raise PlanError(f"unknown counting {counting!r}; choose one of {', '.join(COUNTINGS)}")
        out, in_ = shape
        bits = self.weight_bits or DENSE_BITS
        scales = out * SCALE_BITS if self.weight_bits and counting != "values" else 0
        if self.pattern is None:
            return out * in_ * bits + scales
        if in_ % self.pattern.m:
            raise PlanError(
                f"{self.pattern} needs in_features divisible by {self.pattern.m}, got a weight of {out}x{in_}"
            )
        groups = out * in_ // self.pattern.m
        if counting == "values":
            return groups * self.pattern.n * bits
        if counting == "packed":
            return groups * (self.pattern.n * bits + self.pattern.index_bits) + scales
        if self.pattern.implies_2_4:
            return out * math.ceil(in_ / 4) * 2 * (bits + 2) + scales  # two of four values, two index bits each
        return out * in_ * bits + scales

    def engine_bits(self, shape: tuple[int, int], *, sparse: bool) -> int:
        """Bits of the same matrix inside an INT8 engine: 2 to 8 bit codes all run as INT8, sparse or dense."""
        deployed = self if self.weight_bits is None else replace(self, weight_bits=8)
        if not sparse or self.pattern is None or not self.pattern.implies_2_4:
            deployed = replace(deployed, pattern=None)
        return deployed.stored_bits(shape, "hw")


@dataclass(frozen=True)
class CompressionPlan:
    """Every compressible weight of one model, by parameter name, with its spec; dense ones are listed too.

    `shapes` are (out, in). `attention` says how the two products inside attention run: ``float``, or ``int8`` (both of
    them with softmax in between quantized at 1/127: TensorRT fuses all or nothing). `residual` says what goes around
    the layers: ``float``, or ``int8``: where query, key and value, or the FFN's first matrix, read a quantized tensor,
    everything that reads that tensor reads its quantized value, so that the residual connection can travel as INT8,
    too. `embedding` says how the word-embedding table is stored: ``float``, or ``int8``: codes in [-127, 127] and one
    scale per row (token). No counting includes the table: they are about the matrices.
    """

    model_type: str
    weights: Mapping[str, WeightSpec]
    shapes: Mapping[str, tuple[int, int]]
    attention: str = "float"
    residual: str = "float"
    embedding: str = "float"

    def __post_init__(self) -> None:
        for field in ("attention", "residual", "embedding"):
            if getattr(self, field) not in STORAGES:
                raise PlanError(f"{field} must be float or int8, got {getattr(self, field)!r}")
        if not self.weights:
            raise PlanError("a plan names at least one weight; this one names none")
        if set(self.weights) != set(self.shapes):
            raise PlanError(f"plan weights and shapes differ: {some(set(self.weights) ^ set(self.shapes))}")
        for name, spec in self.weights.items():
            if spec.pattern and self.shapes[name][1] % spec.pattern.m:
                out, in_ = self.shapes[name]
                raise PlanError(
                    f"{name}: {spec.pattern} needs in_features divisible by {spec.pattern.m}, but the weight is "
                    f"{out}x{in_}. Keep it dense (--keep-dense '{name}') or choose another pattern."
                )

    def require_fits(self, model_type: str, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Raise `PlanError` unless this plan names exactly the weights of that model, with their shapes."""
        if self.model_type != model_type:
            raise PlanError(
                f"the plan is for a {self.model_type} model, this model is {model_type}; search or write a new plan"
            )
        if dict(self.shapes) != dict(shapes):
            wrong = [name for name in {**self.shapes, **shapes} if self.shapes.get(name) != shapes.get(name)]
            raise PlanError(
                f"the plan is for another model: {len(wrong)} weights differ in name or shape, such as {some(wrong)} "
                f"(plan {self.shapes.get(wrong[0])}, model {shapes.get(wrong[0])}); search or write a new plan"
            )

    @property
    def pattern_counts(self) -> dict[str, int]:
        """How many matrices have each option, as in ``{"2:4+W8": 36}``."""
        counts: dict[str, int] = {}
        for spec in self.weights.values():
            counts[str(spec)] = counts.get(str(spec), 0) + 1
        return counts

    def stored_bits(self, counting: str = "hw") -> int:
        """Bits of all matrices of the plan together."""
        return sum(spec.stored_bits(self.shapes[name], counting) for name, spec in self.weights.items())

    def compression(self, counting: str = "hw") -> float:
        """1 - compressed/FP32 over the planned matrices (the encoder's matrix weights; no embeddings, biases or
        norms)."""
        elements = sum(out * in_ for out, in_ in self.shapes.values())
        return 1.0 - self.stored_bits(counting) / (elements * REFERENCE_BITS)

    def engine_bytes(self, *, sparse: bool) -> int:
        """Bytes of the planned matrices inside an INT8 engine, with or without sparse storage."""
        return sum(spec.engine_bits(self.shapes[name], sparse=sparse) for name, spec in self.weights.items()) // 8

    def to_dict(self) -> dict[str, object]:
        """What ``nxm_plan.json`` holds."""
        # Readers that do not know a field yet refuse only the plans that use it: what is None or float is left out.
        newer = {name: getattr(self, name) for name in ("residual", "embedding") if getattr(self, name) != "float"}
        weights = {}
        for name, spec in self.weights.items():
            pattern = str(spec.pattern) if spec.pattern else None
            entry = _WeightEntry(self.shapes[name], pattern, spec.weight_bits, spec.input_bits, spec.output_bits)
            weights[name] = {key: value for key, value in to_json_object(entry).items() if value is not None}
        named = {"model_type": self.model_type, "attention": self.attention}
        return {"schema": SCHEMA, **named, **newer, "weights": weights}

    def to_json(self) -> str:
        """The text of ``nxm_plan.json``."""
        return encode(self.to_dict())

    @classmethod
    def from_json(cls, text: str, *, source: str = "plan") -> CompressionPlan:
        """Read the text of ``nxm_plan.json``; `source` names the file in errors. Unknown schemas and fields are
        refused."""
        file = decode(text, _PlanFile, schema=SCHEMA, source=source, way_out=_WAY_OUT, error=PlanError)
        try:
            weights = {name: entry.spec(name) for name, entry in file.weights.items()}
            shapes = {name: entry.shape for name, entry in file.weights.items()}
            return cls(file.model_type, weights, shapes, file.attention, file.residual, file.embedding)
        except PlanError as error:
            raise PlanError(f"{source}: {error}") from error

    @classmethod
    def load(cls, file: str | Path) -> CompressionPlan:
        """Read a plan file; raises `PlanError` when it is missing, unreadable or no plan of this schema."""
        return cls.from_json(read_text(Path(file), "check the path", PlanError), source=str(file))


@dataclass(frozen=True)
class _WeightEntry:
    """One weight in ``nxm_plan.json``; `shape` is (out, in), the rest is as in `WeightSpec`."""

    shape: tuple[int, int]
    pattern: str | None = None
    weight_bits: int | None = None
    input_bits: int | None = None
    output_bits: int | None = None

    def spec(self, name: str) -> WeightSpec:
        """What is planned for the weight; raises `PlanError` with its name, for a shape that no matrix has, too."""
        if min(self.shape) < 1:
            raise PlanError(f"{name}: shape must be two positive integers (out, in), got {list(self.shape)}")
        try:
            pattern = NMPattern.parse(self.pattern) if self.pattern is not None else None
            return WeightSpec(pattern, self.weight_bits, self.input_bits, self.output_bits)
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error


@dataclass(frozen=True)
class _PlanFile:
    """``nxm_plan.json`` without its schema."""

    model_type: str
    attention: str
    weights: dict[str, _WeightEntry]
    residual: str = "float"
    embedding: str = "float"

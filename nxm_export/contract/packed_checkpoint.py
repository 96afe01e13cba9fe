"""The compressed checkpoint in one file, at the size that the plan promises, and back again bit by bit.

A planned weight is stored as

    <name>.values   its codes, `weight_bits` each, of the kept positions only (float16 for an unquantized weight)
    <name>.index    for N:M, which of the C(M, N) supports each group has: ceil(log2 C(M, N)) bits a group
    <name>_scale    float32 per output channel

A word-embedding table that is planned INT8 is stored like a dense 8-bit weight, with a scale per row (token).
Everything else of the model (other embeddings, biases, norms, head) is stored as it is, and the directory's other files
(config, plan, tokenizer, and the folders of a sentence-transformers model) travel in the header, with a sha256 of all
tensors; further safetensors files are not part of the model and stay behind, and so do other folders. The payload is
``plan.stored_bits("packed")`` for the planned weights plus the table and the rest, to within the byte that each tensor
is rounded up to. A support of fewer than N non-zeros is filled up with zeros.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from nxm_export.contract.checkpoint import SCALES_FILE, WEIGHTS_FILE, Checkpoint, open_checkpoint
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import CompressionPlan, NMPattern, WeightSpec
from nxm_export.contract.pooling import is_embedding, module_folders, read_pooling
from nxm_export.errors import ArtifactError
from nxm_export.storage.atomic import atomic_dir, disk_errors, make_directory, widen
from nxm_export.storage.json_files import convert, parse_json, require_schema, to_json_object

T = TypeVar("T")

SCHEMA = "nxm-packed/1"
_INT8_EMBEDDING = WeightSpec(None, 8, 8)  # what an INT8 embedding table is stored like
_WIDEST_GROUP = 64  # a support is a mask of as many bits
_MOST_SUPPORTS = 2**16  # an index has as many bits


@dataclass(frozen=True)
class PackedSizes:
    """Bytes of a packed file, of its tensors, and of the whole model by the ``packed`` counting (`formula_bytes`)."""

    file_bytes: int
    payload_bytes: int
    formula_bytes: int

    def to_dict(self) -> dict[str, object]:
        """The form of ``--json``."""
        return to_json_object(self)


def pack(checkpoint: str | Path, out: str | Path) -> PackedSizes:
    """Write a checkpoint directory as one packed file and return its sizes; raises `ArtifactError`."""
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import save_file

    opened, out = open_checkpoint(checkpoint), Path(out)
    _require_packed_or_new(out)
    _require_indexable(opened.plan, f"{opened.path}")
    opened.require_valid()
    if is_embedding(opened.path):
        read_pooling(opened.path)
    source = opened.path / WEIGHTS_FILE
    if not source.is_file():
        raise ArtifactError(f"{opened.path} has no {WEIGHTS_FILE}; sharded models are not packed: save it in one file")
    specs = _packed_specs(opened.plan)
    tensors: dict[str, np.ndarray] = {f"scale/{name}": np.atleast_1d(scale) for name, scale in opened.scales.items()}
    with safe_open(source, framework="numpy") as weights:
        weights_metadata = weights.metadata() or {}
        for name in weights.keys():  # noqa: SIM118  (safe_open is no mapping)
            if name in specs:
                tensors |= _pack_weight(opened, name, specs[name])
            else:
                tensors[f"plain/{name}"] = weights.get_tensor(name)
    metadata = {
        "schema": SCHEMA,
        "sha256": _digest(tensors),
        "weights_metadata": json.dumps(weights_metadata),
        "scale_shapes": json.dumps({name: list(scale.shape) for name, scale in opened.scales.items()}),
        **dict(_as_text(file, opened.path) for file in _companions(opened.path)),
    }
    scratch = out.with_name(f".{out.name}.{os.getpid()}.partial")
    make_directory(out.parent)
    try:
        with disk_errors(out):
            scratch.touch()
            rights = stat.S_IMODE(scratch.stat().st_mode)
            save_file(tensors, scratch, metadata)
            widen(scratch, rights)
            scratch.replace(out)
    except SafetensorError as error:
        raise ArtifactError(f"{out}: cannot be written ({error}); choose another place") from error
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    return PackedSizes(out.stat().st_size, sum(tensor.nbytes for tensor in tensors.values()), formula_bytes(opened))


def unpack(file: str | Path, out: str | Path) -> Path:
    """Write the directory that `pack` read, every tensor bit-equal, and return it; raises `ArtifactError` for a file
    that is none of ours."""
    from safetensors.numpy import save_file

    file, out = Path(file), Path(out)
    if not file.is_file():
        raise ArtifactError(f"{file}: no such file")
    if out.exists():
        raise ArtifactError(f"{out} exists; choose a directory that does not")
    tensors, metadata = _read_packed(file)
    plan = CompressionPlan.from_json(metadata.get("file/nxm_plan.json", ""), source=f"{file} (nxm_plan.json)")
    _require_indexable(plan, f"{file}")
    shapes = _header_entry(file, metadata, "scale_shapes", dict[str, tuple[int, ...]])
    try:
        scales = {name: tensors[f"scale/{name}"].reshape(shape) for name, shape in shapes.items()}
    except (KeyError, ValueError) as error:
        raise ArtifactError(f"{file}: scale_shapes does not fit its scales ({error}); pack it again") from error
    weights = {name.removeprefix("plain/"): tensor for name, tensor in tensors.items() if name.startswith("plain/")}
    for name, spec in _packed_specs(plan).items():
        shape = plan.shapes.get(name) or FAMILIES[plan.model_type].word_embedding_shape(
            _header_entry(file, metadata, "file/config.json", dict[str, object])
        )
        weight = _unpack_weight(tensors, name, spec, shape, scales.get(f"{name}_scale"), file)
        factors = scales.get(f"{name.removesuffix('.weight')}.input_factors")
        if factors is not None and factors.shape != shape[1:]:
            raise ArtifactError(f"{file}: input factors of {name} have the wrong size; the file is damaged")
        weights[name] = weight if factors is None else weight / factors
    with atomic_dir(out) as scratch:
        save_file(weights, scratch / WEIGHTS_FILE, _header_entry(file, metadata, "weights_metadata", dict[str, str]))
        save_file(scales, scratch / SCALES_FILE)
        _write_companions(file, metadata, scratch)
        open_checkpoint(scratch).require_valid()
    return out


def _write_companions(file: Path, metadata: Mapping[str, str], out: Path) -> None:
    """The files that travel in the header of a packed file, and the folders that they say a model has."""
    for key, text in metadata.items():
        kind, separator, name = key.partition("/")
        if not separator or kind not in ("file", "bytes"):
            continue
        written = out / _inside(name, file)
        written.parent.mkdir(parents=True, exist_ok=True)
        written.write_bytes(text.encode() if kind == "file" else base64.b64decode(text))
    for folder in module_folders(out):
        (out / _inside(folder, file)).mkdir(parents=True, exist_ok=True)
    if is_embedding(out):
        try:
            read_pooling(out)
        except ArtifactError as error:
            raise ArtifactError(
                f"{file}: it does not say how its tokens become one embedding; pack the checkpoint again"
            ) from error


def _read_packed(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a packed file and its header, the sha256 checked."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as packed:
            metadata: dict[str, str] = packed.metadata() or {}
            require_schema(metadata, SCHEMA, str(file), ArtifactError)
            tensors = {name: packed.get_tensor(name) for name in packed.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error}); it is truncated or not a packed checkpoint") from error
    if metadata.get("sha256") != _digest(tensors):
        raise ArtifactError(f"{file}: its tensors are not those that were written (sha256); copy or pack it again")
    return tensors, metadata


def _header_entry(file: Path, metadata: Mapping[str, str], key: str, kind: type[T]) -> T:
    """The JSON value that the header of a packed file has under `key`."""
    source = f"{file} ({key})"
    value = parse_json(metadata.get(key, ""), source, "pack it again", ArtifactError)
    return convert(value, kind, source=source, way_out="pack it again")


def _require_packed_or_new(out: Path) -> None:
    """Raise `ArtifactError` when something else than a packed file is at `out`."""
    from safetensors import SafetensorError, safe_open

    if not os.path.lexists(out):
        return
    try:
        with safe_open(out, framework="numpy") as file:
            packed = (file.metadata() or {}).get("schema") == SCHEMA
    except (SafetensorError, OSError):
        packed = False
    if not packed:
        raise ArtifactError(f"{out} exists and is no packed checkpoint; choose another --out, or remove it")


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    """sha256 of all tensors, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + b"\0")
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def formula_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the whole model by the ``packed`` counting: the planned weights, and an INT8 embedding table, by
    formula, everything else as stored."""
    from safetensors import safe_open

    rest, specs = 0, _packed_specs(checkpoint.plan)
    embedding = checkpoint.family.word_embedding
    if embedding in specs:
        rows, features = checkpoint.weight(embedding).shape
        rest += _INT8_EMBEDDING.stored_bits((rows, features), "packed") // 8
    with safe_open(checkpoint.path / WEIGHTS_FILE, framework="numpy") as weights:
        for name in weights.keys():  # noqa: SIM118
            if name not in specs:
                rest += weights.get_tensor(name).nbytes
    activations = sum(scale.nbytes for name, scale in checkpoint.scales.items() if not name.endswith("weight_scale"))
    return rest + activations + -(-checkpoint.plan.stored_bits("packed") // 8)


def pack_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned `values` below ``2**bits``, as a bit string of `bits` each, in bytes; the lowest bit of a value
    first."""
    flat = np.ascontiguousarray(values, np.uint16 if bits > 8 else np.uint8).reshape(-1)
    if bits == 8:
        return flat
    if bits > 8:
        planes = ((flat[:, None] >> np.arange(bits, dtype=flat.dtype)) & 1).astype(np.uint8)  # (values, bits)
        return np.packbits(planes.reshape(-1), bitorder="little")
    eights = np.zeros(-(-flat.size // 8) * 8, np.uint8)  # eight values fill a whole number of bytes, at most eight
    eights[: flat.size] = flat
    words = np.zeros(eights.size // 8, "<u8")
    for i in range(8):
        words |= eights[i::8].astype("<u8") << np.uint64(bits * i)
    return np.ascontiguousarray(words.view(np.uint8).reshape(-1, 8)[:, :bits]).reshape(-1)[: -(-flat.size * bits // 8)]


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` values of `pack_bits`, as uint16; raises `ValueError` for a bit string that is too short."""
    if packed.size < -(-count * bits // 8):
        raise ValueError(f"{count} values of {bits} bits need more than {packed.size} bytes")
    if bits == 8:
        return packed[:count].astype(np.uint16)
    if bits > 8:
        planes = np.unpackbits(packed, count=count * bits, bitorder="little").reshape(count, bits)
        shifted = planes.astype(np.uint16) << np.arange(bits, dtype=np.uint16)
        return np.asarray(shifted.sum(axis=1, dtype=np.uint16))
    strings = np.zeros((-(-count // 8), bits), np.uint8)
    strings.reshape(-1)[: packed.size] = packed[: strings.size]
    words = np.zeros((len(strings), 8), np.uint8)
    words[:, :bits] = strings
    values = np.empty((len(strings), 8), np.uint16)
    for i in range(8):
        values[:, i] = (words.view("<u8")[:, 0] >> np.uint64(bits * i)) & np.uint64(2**bits - 1)
    return values.reshape(-1)[:count]


@lru_cache
def supports(pattern: NMPattern) -> np.ndarray:
    """Every support of a group as its positions (C(M, N), N), in lexicographic order: the meaning of an index."""
    return np.array(list(itertools.combinations(range(pattern.m), pattern.n)), np.int64)


def support_index(support_mask: npt.NDArray[np.bool_], pattern: NMPattern) -> npt.NDArray[np.int64]:
    """Index of each group's support in `supports`; `support_mask` is (groups, M) with exactly N true in each."""
    known = (1 << supports(pattern)).sum(axis=1)  # each support as a bit mask
    masks = np.zeros(len(support_mask), np.int64)
    for position in range(pattern.m):  # column by column: a matrix product of integers is many times slower
        masks |= support_mask[:, position].astype(np.int64) << position
    if pattern.m <= 16:
        index = np.zeros(1 << pattern.m, np.int64)
        index[known] = np.arange(len(known))
        return index[masks]
    order = np.argsort(known)
    return order[np.searchsorted(known[order], masks)]


def exact_support(nonzero_mask: npt.NDArray[np.bool_], pattern: NMPattern) -> npt.NDArray[np.bool_]:
    """(groups, M) with exactly N true in each group: those of `nonzero_mask`, at most N, filled up from the left."""
    support_mask = nonzero_mask.copy()
    free = pattern.n - support_mask.sum(axis=1)
    for position in range(pattern.m):
        column = support_mask[:, position]
        filled = (free > 0) & ~column
        free -= filled
        column |= filled
    return support_mask


def _packed_specs(plan: CompressionPlan) -> dict[str, WeightSpec]:
    """Everything that is stored in a packed form, by parameter name."""
    family = FAMILIES.get(plan.model_type)
    return {**plan.weights, **({family.word_embedding: _INT8_EMBEDDING} if family and plan.embedding == "int8" else {})}


def _require_indexable(plan: CompressionPlan, source: str) -> None:
    """Raise `ArtifactError` for a pattern whose supports have no number here."""
    for name, spec in plan.weights.items():
        pattern = spec.pattern
        if pattern and (pattern.m > _WIDEST_GROUP or math.comb(pattern.m, pattern.n) > _MOST_SUPPORTS):
            raise ArtifactError(
                f"{source}: {name} is planned {pattern}, and a packed file has groups of at most {_WIDEST_GROUP} "
                f"weights with at most {_MOST_SUPPORTS} choices of the kept ones; keep the directory"
            )


def _inside(name: str, source: Path) -> PurePosixPath:
    """A path that stays below the directory of a model; `source` names it otherwise."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ArtifactError(f"{source}: {name!r} is no path below the directory of a model")
    return path


def _pack_weight(checkpoint: Checkpoint, name: str, spec: WeightSpec) -> dict[str, np.ndarray]:
    weight = checkpoint.weight(name)
    if not spec.is_dense and np.signbit(weight[weight == 0]).any():
        raise ArtifactError(
            f"{checkpoint.path}: {name} holds negative zeros, which a code has no sign for: it would not come back bit "
            "by bit; "
            "compress again, or add 0.0 to the weight"
        )
    if spec.weight_bits is None:
        values = weight.astype(np.float16)
    else:
        assert spec.qmax is not None
        values = (checkpoint.codes(name).astype(np.int16) + spec.qmax).astype(np.uint8)  # 0 .. 2 * qmax
    if spec.pattern is None:
        return {f"{name}.values": _stored(values, spec)}
    groups = values.reshape(-1, spec.pattern.m)
    zero = 0 if spec.qmax is None else spec.qmax
    support_mask = exact_support(groups != zero, spec.pattern)
    index = support_index(support_mask, spec.pattern)
    return {
        f"{name}.values": _stored(groups[support_mask], spec),
        f"{name}.index": pack_bits(index, spec.pattern.index_bits),
    }


def _stored(values: np.ndarray, spec: WeightSpec) -> np.ndarray:
    return values.reshape(-1) if spec.weight_bits is None else pack_bits(values, spec.weight_bits)


def _unpack_weight(
    tensors: Mapping[str, np.ndarray],
    name: str,
    spec: WeightSpec,
    shape: tuple[int, int],
    scale: np.ndarray | None,
    file: Path,
) -> np.ndarray:
    out, in_ = shape
    count = out * in_ if spec.pattern is None else out * in_ // spec.pattern.m * spec.pattern.n
    if spec.qmax is not None and (scale is None or scale.shape != (out,)):
        raise ArtifactError(f"{file}: {name}_scale is missing or has the wrong size; the file is damaged")
    try:
        stored = tensors[f"{name}.values"]
        if stored.size != (count if spec.weight_bits is None else -(-count * spec.weight_bits // 8)):
            raise ValueError("another number of values")
        values = stored if spec.weight_bits is None else unpack_bits(stored, spec.weight_bits, count)
        if spec.pattern is not None:
            groups = out * in_ // spec.pattern.m
            index = unpack_bits(tensors[f"{name}.index"], spec.pattern.index_bits, groups)
            dense = np.full(groups * spec.pattern.m, spec.qmax or 0, values.dtype)
            first, columns = np.arange(groups) * spec.pattern.m, values.reshape(groups, spec.pattern.n)
            for number, positions in enumerate(supports(spec.pattern).T):
                dense[first + positions[index]] = columns[:, number]
            values = dense
        values = values.reshape(out, in_)
    except (KeyError, ValueError, IndexError) as error:
        raise ArtifactError(f"{file}: {name} is missing or has the wrong size; the file is damaged") from error
    if spec.qmax is None or scale is None:
        return values.astype(np.float32)
    weight: np.ndarray = (values.astype(np.int16) - spec.qmax).astype(np.float32) * scale[:, None]
    return weight


def _as_text(file: Path, directory: Path) -> tuple[str, str]:
    """(key, text) of a file of a directory in the header: as it is, or in base64 where it is no text."""
    content, name = file.read_bytes(), file.relative_to(directory).as_posix()
    try:
        return f"file/{name}", content.decode()
    except UnicodeDecodeError:
        return f"bytes/{name}", base64.b64encode(content).decode()


def _companions(directory: Path) -> list[Path]:
    """The files that make the directory a model: everything but tensor files and hidden ones, in the directory itself
    and in the folders of the modules behind an encoder."""
    folders = [directory, *(directory / _inside(folder, directory) for folder in module_folders(directory))]
    return sorted(
        file
        for folder in folders
        if folder.is_dir()
        for file in folder.iterdir()
        if file.is_file() and file.suffix != ".safetensors" and not file.name.startswith(".")
    )

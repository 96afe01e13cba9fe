"""A compressed checkpoint on disk: a plain Hugging Face directory with a plan and activation scales beside the weights.

::

    checkpoint/
      config.json, tokenizer files     as transformers wrote them
      model.safetensors                baked float32 weights: already N:M, already code * scale
      nxm_plan.json                    the plan (schema nxm-plan/1)
      nxm_scales.safetensors           "<param>_scale" (out,), "<module>.input_scale" (), "<module>.output_scale" (),
                                       of a part of a fused matrix "<module>.query.output_scale" (), and of attention
                                       behind a rotation "<module>.query_scale" () and its like; where channels are
                                       evened out "<module>.input_factors" (in,)

Because the weights are baked, plain ``from_pretrained`` gives the compressed model (without activation quantizers).
Everything here needs numpy and safetensors only; safetensors is imported when a file is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nxm_export.contract.encoder_family import Family
from nxm_export.contract.families import family_of
from nxm_export.contract.plan import CompressionPlan, NMPattern
from nxm_export.contract.pooling import is_embedding
from nxm_export.contract.tasks import Task, task_of
from nxm_export.errors import ArtifactError
from nxm_export.storage.hashing import file_hash
from nxm_export.storage.json_files import convert, read_foreign_json

PLAN_FILE = "nxm_plan.json"
SCALES_FILE = "nxm_scales.safetensors"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"  # of PEFT
EMBEDDING_QMAX = 127  # of an INT8 embedding table
LEGAL_FACTORS = np.exp2(np.arange(11, dtype=np.float32))  # of a layer's input channels
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Checkpoint:
    """An opened compressed checkpoint. Weights are read one at a time, never all at once."""

    path: Path
    config: Mapping[str, object]
    family: Family
    plan: CompressionPlan
    scales: Mapping[str, np.ndarray]

    def weight(self, name: str) -> np.ndarray:
        """One baked weight, float32 (out, in)."""
        return read_tensor(self.path, name)

    def weight_scale(self, name: str) -> np.ndarray:
        """Scales float32 of a quantized weight, per output channel (out,), or of an INT8 embedding table, per row
        (tokens,)."""
        return self._scale(f"{name}_scale")

    def input_scale(self, name: str) -> float:
        """Scale of the tensor that the linear layer of weight `name` reads."""
        return self._activation_scale(name, "input_scale")

    def input_factors(self, name: str) -> np.ndarray | None:
        """Float32 powers of two (in,) that the channels of what the linear layer of weight `name` reads are divided by
        before they are quantized; its integer weights are those of the weight times the factors. None: all 1."""
        key = f"{name.removesuffix('.weight')}.input_factors"
        if key not in self.scales:
            return None
        factors = self.scales[key]
        (channels,) = self.plan.shapes[name][1:]
        sane = factors.shape == (channels,) and np.isin(factors, LEGAL_FACTORS).all()
        if not sane or not self.plan.weights[name].input_bits:
            raise ArtifactError(
                f"{self.path}: {key} must be {channels} powers of two from 1 to {LEGAL_FACTORS[-1]:.0f}, of an INT8 "
                "layer; compress again"
            )
        return factors

    def output_scale(self, name: str) -> float:
        """Scale of the tensor that the linear layer of weight `name`, or of a part of a fused weight, writes."""
        return self._activation_scale(name, "output_scale")

    def operand_scales(self, block: str) -> dict[str, float]:
        """Scales of what the attention of a block quantizes itself, by operand (`Family.own_operands`)."""
        path, operands = f"{block}.{self.family.attention.path}", self.family.own_operands(self.plan, block)
        return {operand: self._activation_scale(path, f"{operand}_scale") for operand in operands}

    def _activation_scale(self, name: str, kind: str) -> float:
        scale = self._scale(f"{name.removesuffix('.weight')}.{kind}")
        if scale.size != 1 or not np.isfinite(scale).all() or not (scale > 0).all():
            raise ArtifactError(f"{self.path}: {name}: {kind} must be one positive number, got {scale}; compress again")
        return float(scale.reshape(()))

    def _scale(self, key: str) -> np.ndarray:
        if key not in self.scales:
            raise ArtifactError(f"{self.path / SCALES_FILE}: the plan needs {key}, and it is not there; compress again")
        return self.scales[key]

    def codes(self, name: str) -> np.ndarray:
        """Integer codes int8 (out, in) of a quantized weight, or (tokens, features) of an embedding table that is
        planned INT8: dividing baked values by their scale gives them back exactly."""
        scale = self.weight_scale(name)
        codes: np.ndarray = np.rint(self._multiplied(name, self.weight(name)) / scale[:, None]).astype(np.int8)
        return codes

    def _multiplied(self, name: str, weight: np.ndarray) -> np.ndarray:
        """The weight `name` (out, in) as it multiplies quantized inputs; exact, as factors are powers of two."""
        factors = self.input_factors(name) if name in self.plan.weights else None
        return weight if factors is None else weight * factors

    def require_valid(self) -> None:
        """Raise `ArtifactError` unless every planned weight keeps its pattern and lies on its integer grid, and so does
        an embedding table that is planned INT8."""
        self.plan.require_fits(self.family.model_type, self.family.weights(self.config))
        for name, spec in self.plan.weights.items():
            weight = self.weight(name)
            if weight.shape != self.plan.shapes[name]:
                raise ArtifactError(
                    f"{self.path}: {name} is {weight.shape} on disk and {self.plan.shapes[name]} in the plan"
                )
            if not np.isfinite(weight).all():
                raise ArtifactError(f"{self.path}: {name} holds NaN or infinite values; compress again")
            if spec.pattern:
                require_pattern(weight, spec.pattern, name, f"{self.path}")
            if spec.qmax is not None:
                self._require_grid(name, self._multiplied(name, weight), spec.qmax)
            elif not np.array_equal(weight.astype(np.float16).astype(np.float32), weight):
                raise ArtifactError(
                    f"{self.path}: {name} is planned in 16 bit and holds values that float16 cannot; compress again"
                )
            if spec.input_bits:
                self.input_scale(name)
            if spec.output_bits:
                for part in self.family.parts(name):
                    self.output_scale(part)
        self._require_shared_inputs()
        if self.plan.attention == "int8":
            for block in self.family.blocks(self.config):
                self.operand_scales(block)
        if self.plan.embedding == "int8":
            table, shape = self.weight(self.family.word_embedding), self.family.word_embedding_shape(self.config)
            if table.shape != shape:
                raise ArtifactError(
                    f"{self.path}: {self.family.word_embedding} is {table.shape} on disk and {shape} by config.json; "
                    "restore one of them"
                )
            if not np.isfinite(table).all():
                raise ArtifactError(
                    f"{self.path}: {self.family.word_embedding} holds NaN or infinite values; compress again"
                )
            self._require_grid(self.family.word_embedding, table, EMBEDDING_QMAX)

    def _require_shared_inputs(self) -> None:
        """Layers that read one tensor, as query, key and value do, quantize it once."""
        family = self.family
        for block, tensor in itertools.product(family.blocks(self.config), family.tensors()):
            names = family.readers(block, tensor)
            quantized = [name for name in names if self.plan.weights[name].input_bits]
            scales = {name: self.input_scale(name) for name in quantized}
            if (
                len({None if factors is None else factors.tobytes() for factors in map(self.input_factors, quantized)})
                > 1
            ):
                raise ArtifactError(
                    f"{self.path}: {', '.join(scales)} read the same tensor with different input factors; make them "
                    "equal, or compress again"
                )
            if len(set(scales.values())) > 1:
                raise ArtifactError(
                    f"{self.path}: {', '.join(scales)} read the same tensor with different input scales "
                    f"({', '.join(f'{scale:.6g}' for scale in scales.values())}); make them equal, or compress again"
                )

    def _require_grid(self, name: str, weight: np.ndarray, qmax: int) -> None:
        scale = self.weight_scale(name)
        if scale.shape != weight.shape[:1] or not np.isfinite(scale).all() or (scale <= 0).any():
            raise ArtifactError(f"{self.path}: {name}_scale must be {weight.shape[0]} positive numbers")
        codes = np.rint(weight / scale[:, None])
        if np.abs(codes).max(initial=0) > qmax:
            raise ArtifactError(
                f"{self.path}: {name} has a code of {np.abs(codes).max():.0f}, beyond the planned {qmax}"
            )
        if not np.array_equal(codes.astype(np.float32) * scale[:, None], weight):
            off = int((codes.astype(np.float32) * scale[:, None] != weight).sum())
            raise ArtifactError(
                f"{self.path}: {name}: {off} weights are not code * scale; it was changed after compression"
            )


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a compressed checkpoint directory; raises `ArtifactError` when it is not one, with the way out."""
    path = Path(path)
    config = read_config(path)
    family = family_of(config, source=str(path / "config.json"))
    plan_file = path / PLAN_FILE
    if not plan_file.is_file():
        raise ArtifactError(
            f"{path} has no {PLAN_FILE}: it is a plain model, not a compressed checkpoint; run `nxm compress` on it "
            "first"
        )
    plan = CompressionPlan.load(plan_file)
    family.require_own_positions(config, str(path / "config.json"))
    plan.require_fits(family.model_type, family.weights(config))
    family.require_placement(plan)
    return Checkpoint(path, config, family, plan, _load(path / SCALES_FILE))


def save_plan(path: Path, plan: CompressionPlan, scales: Mapping[str, np.ndarray]) -> None:
    """Write the plan and the scales beside a saved Hugging Face model."""
    from safetensors.numpy import save_file

    (path / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
    save_file({key: np.asarray(value, np.float32) for key, value in scales.items()}, path / SCALES_FILE)


def read_config(path: Path) -> dict[str, object]:
    """``config.json`` of a Hugging Face directory; pickled weights are refused here, before anything loads them."""
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such directory")
    _require_merged(path)
    if not (path / "config.json").is_file():
        raise ArtifactError(f"{path} has no config.json: not a Hugging Face model directory")
    require_safetensors(path)
    return read_config_file(path)


def read_config_file(path: Path) -> dict[str, object]:
    """``config.json`` of a directory, whether its weights are there or not."""
    config = read_foreign_json(path / "config.json", "restore it from the model")
    if not isinstance(config, dict):
        raise ArtifactError(f"{path / 'config.json'}: not a JSON object")
    return config


def _require_merged(path: Path) -> None:
    """Refuse a directory that PEFT wrote: an adapter is the difference to a model that lies elsewhere."""
    file = path / ADAPTER_FILE
    if not file.is_file():
        return
    if (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file():
        raise ArtifactError(
            f"{path} holds a model and a PEFT adapter ({ADAPTER_FILE}), and whether the one has the other in it nobody "
            f"says; if it has, remove {ADAPTER_FILE} and adapter_model.safetensors"
        )
    adapter = read_foreign_json(file, "restore it from the model")
    kind = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}
    name = kind.get(str(adapter.get("task_type")) if isinstance(adapter, dict) else "", "")
    merged = f"{path}-merged"
    script = (
        f"import peft, transformers as t; m = peft.AutoPeftModel{name}.from_pretrained({str(path)!r}); "
        f"m.merge_and_unload().save_pretrained({merged!r}); "
        f"t.AutoTokenizer.from_pretrained(m.peft_config['default'].base_model_name_or_path).save_pretrained({merged!r})"
    )
    raise ArtifactError(
        f"{path} is a PEFT adapter ({ADAPTER_FILE}), not a model: merge it into the model it was trained on, and use "
        f"{merged}: python -c {shlex.quote(script)}"
    )


def require_safetensors(path: Path) -> None:
    """Refuse a directory whose weights exist only as pickles: unpickling runs code of whoever wrote it."""
    if (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file():
        return
    pickles = sorted(file for pattern in PICKLES for file in path.glob(pattern) if file.is_file())
    if pickles:
        weights = [file for file in pickles if file.name.startswith("pytorch_model")] or pickles[:1]
        files = ", ".join(repr(str(file)) for file in weights)
        script = (
            f"import torch, safetensors.torch as s; s.save_file({{k: v.clone() for f in [{files}] for k, v in "
            f"torch.load(f, weights_only=True).items()}}, {str(path / WEIGHTS_FILE)!r}, {{'format': 'pt'}})"
        )
        raise ArtifactError(
            f"{pickles[0]} is a pickle, and loading a pickle runs code of whoever wrote it. If you trust it, convert "
            "it once: "
            f"python -c {shlex.quote(script)}"
        )
    raise ArtifactError(f"{path} has no {WEIGHTS_FILE}: no weights to load")


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor of a (possibly sharded) safetensors model, as float32 numpy; `name` is that of a task model, as in a
    plan, and a directory that holds the encoder alone has it without the family's prefix."""
    from safetensors import SafetensorError, safe_open

    file = _shard_of(path, name)
    with contextlib.suppress(ImportError):
        import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
    try:
        with safe_open(file, framework="numpy") as tensors:
            names = set(tensors.keys())
            tensor: np.ndarray = tensors.get_tensor(name if name in names else _own_name(name))
    except (SafetensorError, OSError, TypeError) as error:  # TypeError: a dtype that numpy does not have
        raise ArtifactError(
            f"{file}: {name} cannot be read ({error}); the file is truncated or from another model"
        ) from error
    return tensor.astype(np.float32, copy=False)


def holds_tensor(path: Path, name: str) -> bool:
    """Whether a (possibly sharded) safetensors model has a tensor under that name, as `read_tensor` looks it up. Files
    as their authors published them may have other names and forms, which transformers translates."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_shard_of(path, name), framework="numpy") as tensors:
            return bool({name, _own_name(name)} & set(tensors.keys()))
    except (ArtifactError, SafetensorError, OSError):
        return False


def task_at(path: Path, config: Mapping[str, object]) -> str | None:
    """The task of a model directory: that of its head, or ``embedding`` where sentence-transformers' files say how to
    pool."""
    return task_of(config) or ("embedding" if is_embedding(path) else None)


def has_head(path: Path, config: Mapping[str, object], task: Task) -> bool:
    """True when a model directory has the head that `task` needs."""
    served = task_at(path, config)
    return served is not None and served in (task.name, task.serves)


def float32_bytes(path: Path) -> int:
    """Bytes of all tensors of a (possibly sharded) safetensors model in float32, as it is trained and saved here,
    whatever the file has; 0 where there are no weights. Raises `ArtifactError` for a damaged file."""
    from safetensors import SafetensorError, safe_open

    values = 0
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="numpy") as tensors:
                values += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"{file}: cannot be read ({error}); the file is truncated or not safetensors"
            ) from error
    return 4 * values


def _weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold a model's weights: one, or its shards."""
    if (path / WEIGHTS_FILE).is_file():
        return [path / WEIGHTS_FILE]
    return sorted(file for file in path.glob("*.safetensors") if file.name != SCALES_FILE)


def weights_hash(path: Path) -> str:
    """sha256 over the weight files of a model directory, as hex: what a graph names as the weights it was made from."""
    if (path / WEIGHTS_FILE).is_file():
        return file_hash(path / WEIGHTS_FILE)
    shards = _weight_files(path)
    if not shards:
        raise ArtifactError(f"{path} has no {WEIGHTS_FILE}: no weights to load")
    return hashlib.sha256("".join(file_hash(file) for file in shards).encode()).hexdigest()


def _shard_of(path: Path, name: str) -> Path:
    if (path / WEIGHTS_FILE).is_file():
        return path / WEIGHTS_FILE
    index = path / INDEX_FILE
    if not index.is_file():
        raise ArtifactError(f"{path} has no {WEIGHTS_FILE}: no weights to load")
    way_out = "restore it from the model"
    read = read_foreign_json(index, way_out)
    shards = convert(read, _ShardIndex, source=str(index), way_out=way_out, foreign=True).weight_map
    shard = shards.get(name, shards.get(_own_name(name)))
    if shard is None:
        raise ArtifactError(f"{index}: {name} is not in the weight map")
    if Path(shard).name != shard:
        raise ArtifactError(f"{index}: the weight map points out of the directory ({shard})")
    return path / shard


@dataclass(frozen=True)
class _ShardIndex:
    """What is read of the index of a sharded model: the file of every tensor."""

    weight_map: Mapping[str, str]


def _own_name(name: str) -> str:
    """A parameter's name inside the encoder: without the prefix that a task model puts before it."""
    return name.partition(".")[2]


def _load(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not file.is_file():
        raise ArtifactError(f"{file} is missing: the checkpoint has a plan and no scales; compress again")
    try:
        return load_file(file)
    except (SafetensorError, OSError, TypeError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error}); the file is truncated or not safetensors") from error


def pattern_violations(weight: np.ndarray, pattern: NMPattern) -> Iterator[tuple[int, int]]:
    """(output channel, first input) of every group that keeps more than `pattern.n` weights; weight is (out, in)."""
    out, in_ = weight.shape
    nonzeros = (weight.reshape(out, in_ // pattern.m, pattern.m) != 0).sum(axis=-1)
    for channel, group in np.argwhere(nonzeros > pattern.n):
        yield int(channel), int(group) * pattern.m


def require_pattern(weight: np.ndarray, pattern: NMPattern, name: str, source: str) -> None:
    """Raise `ArtifactError` naming the first group of `weight` (out, in) that breaks `pattern`."""
    for channel, first in pattern_violations(weight, pattern):
        raise ArtifactError(
            f"{source}: {name} is planned {pattern}, but output channel {channel} keeps more than {pattern.n} of "
            "inputs "
            f"{first}..{first + pattern.m - 1}. Compress again, or plan this weight dense."
        )

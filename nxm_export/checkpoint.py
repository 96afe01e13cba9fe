"""A compressed checkpoint on disk: a plain Hugging Face directory with a plan and activation scales beside the weights.

::

    checkpoint/
      config.json, tokenizer files     as transformers wrote them
      model.safetensors                baked float32 weights: already N:M, already code * scale
      nxm_plan.json                    the plan (schema nxm-plan/1)
      nxm_scales.safetensors           "<param>_scale" (out,), "<module>.input_scale" (), "<module>.output_scale" ()

Because the weights are baked, plain ``from_pretrained`` gives the compressed model (without activation quantizers).
Everything here needs numpy and safetensors only; safetensors is imported when a file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nxm_export.errors import ArtifactError
from nxm_export.families import Family, family_of
from nxm_export.plan import CompressionPlan, NMPattern

PLAN_FILE = "nxm_plan.json"
SCALES_FILE = "nxm_scales.safetensors"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.ckpt", "pytorch_model.pt")


@dataclass(frozen=True)
class Checkpoint:
    """An opened compressed checkpoint. Weights are read one at a time, never all at once."""

    path: Path
    config: Mapping[str, Any]
    family: Family
    plan: CompressionPlan
    scales: Mapping[str, np.ndarray]

    def weight(self, name: str) -> np.ndarray:
        """One baked weight, float32 (out, in)."""
        return read_tensor(self.path, name)

    def weight_scale(self, name: str) -> np.ndarray:
        """Per output channel scales (out,) float32 of a quantized weight."""
        return self._scale(f"{name}_scale")

    def input_scale(self, name: str) -> float:
        """Scale of the tensor that the linear layer of weight `name` reads."""
        return float(self._scale(f"{name.removesuffix('.weight')}.input_scale"))

    def output_scale(self, name: str) -> float:
        """Scale of the tensor that the linear layer of weight `name` writes."""
        return float(self._scale(f"{name.removesuffix('.weight')}.output_scale"))

    def _scale(self, key: str) -> np.ndarray:
        if key not in self.scales:
            raise ArtifactError(f"{self.path / SCALES_FILE}: the plan needs {key}, and it is not there; compress again")
        return self.scales[key]

    def codes(self, name: str) -> np.ndarray:
        """The weight's integer codes, int8 (out, in): dividing baked weights by their scale gives them back exactly."""
        scale = self.weight_scale(name)
        return np.rint(self.weight(name) / scale[:, None]).astype(np.int8)

    def require_valid(self) -> None:
        """Raise `ArtifactError` unless every planned weight keeps its pattern and lies on its integer grid."""
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
                self._require_grid(name, weight, spec.qmax)
            elif not np.array_equal(weight.astype(np.float16).astype(np.float32), weight):
                raise ArtifactError(
                    f"{self.path}: {name} is planned in 16 bit and holds values that float16 cannot; compress again"
                )
            for bits, kind in ((spec.input_bits, "input_scale"), (spec.output_bits, "output_scale")):
                if bits:
                    scale = float(self._scale(f"{name.removesuffix('.weight')}.{kind}"))
                    if not np.isfinite(scale) or scale <= 0:
                        raise ArtifactError(f"{self.path}: {name}: {kind} must be positive, got {scale}")

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
            f"{path} has no {PLAN_FILE}: it is a plain model, not a compressed checkpoint; run `nxm compress` on it first"
        )
    plan = CompressionPlan.from_json(plan_file.read_text(encoding="utf-8"), source=str(plan_file))
    plan.require_fits(family.model_type, family.weights(config))
    family.require_placement(plan)
    return Checkpoint(path, config, family, plan, _load(path / SCALES_FILE))


def save_plan(path: Path, plan: CompressionPlan, scales: Mapping[str, np.ndarray]) -> None:
    """Write the plan and the scales beside a saved Hugging Face model."""
    from safetensors.numpy import save_file

    (path / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
    save_file({key: np.asarray(value, np.float32) for key, value in scales.items()}, path / SCALES_FILE)


def read_config(path: Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face directory; pickled weights are refused here, before anything loads them."""
    if not path.is_dir():
        raise ArtifactError(f"{path}: no such directory")
    if not (path / "config.json").is_file():
        raise ArtifactError(f"{path} has no config.json: not a Hugging Face model directory")
    require_safetensors(path)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path / 'config.json'}: not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path / 'config.json'}: not a JSON object")
    return config


def require_safetensors(path: Path) -> None:
    """Refuse a directory whose weights exist only as pickles: unpickling runs code of whoever wrote it."""
    if (path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file():
        return
    pickles = [name for name in PICKLES if (path / name).is_file()]
    if pickles:
        raise ArtifactError(
            f"{path / pickles[0]} is a pickle, and loading a pickle runs code of whoever wrote it. If you trust it, convert it once: "
            f"python -c \"import torch, safetensors.torch as s; s.save_file({{k: v.clone() for k, v in torch.load('{path / pickles[0]}', "
            f"weights_only=True).items()}}, '{path / WEIGHTS_FILE}', {{'format': 'pt'}})\""
        )
    raise ArtifactError(f"{path} has no {WEIGHTS_FILE}: no weights to load")


def read_tensor(path: Path, name: str) -> np.ndarray:
    """One tensor of a (possibly sharded) safetensors model, as numpy."""
    from safetensors import SafetensorError, safe_open

    file = _shard_of(path, name)
    try:
        with safe_open(file, framework="numpy") as tensors:
            return tensors.get_tensor(name)
    except SafetensorError as error:
        raise ArtifactError(
            f"{file}: {name} cannot be read ({error}); the file is truncated or from another model"
        ) from error


def _shard_of(path: Path, name: str) -> Path:
    if (path / WEIGHTS_FILE).is_file():
        return path / WEIGHTS_FILE
    index = path / INDEX_FILE
    if not index.is_file():
        raise ArtifactError(f"{path} has no {WEIGHTS_FILE}: no weights to load")
    try:
        return path / json.loads(index.read_text(encoding="utf-8"))["weight_map"][name]
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"{index}: {name} is not in the weight map") from error


def _load(file: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not file.is_file():
        raise ArtifactError(f"{file} is missing: the checkpoint has a plan and no scales; compress again")
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error}); the file is truncated or not safetensors") from error


def pattern_violations(weight: np.ndarray, pattern: NMPattern) -> Iterator[tuple[int, int]]:
    """(output channel, first input) of every group that keeps more than `pattern.n` weights; weight is (out, in)."""
    out, in_ = weight.shape
    kept = (weight.reshape(out, in_ // pattern.m, pattern.m) != 0).sum(axis=-1)
    for channel, group in np.argwhere(kept > pattern.n):
        yield int(channel), int(group) * pattern.m


def require_pattern(weight: np.ndarray, pattern: NMPattern, name: str, source: str) -> None:
    """Raise `ArtifactError` naming the first group of `weight` (out, in) that breaks `pattern`."""
    for channel, first in pattern_violations(weight, pattern):
        raise ArtifactError(
            f"{source}: {name} is planned {pattern}, but output channel {channel} keeps more than {pattern.n} of inputs "
            f"{first}..{first + pattern.m - 1}. Compress again, or plan this weight dense."
        )

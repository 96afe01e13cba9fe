"""Compressed checkpoints without training, in a fraction of a second: magnitude mask, max-abs scales, ranges of random
input.

Written with numpy alone, so that exporter and engines are tested on files that `compressors` had no part in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nxm_export.contract.checkpoint import read_config, save_plan
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.data.features import Features, sample_of
from tests.support import tiny

if TYPE_CHECKING:
    import torch


def write_checkpoint(
    family: str,
    out: Path,
    *,
    task: str = "classification",
    spec: str = "2:4+W8",
    placement: str = "inputs-outputs",
    attention: str = "float",
    embedding: str = "float",
    specs: Mapping[str, str] | None = None,
    layers: int = 1,
    classes: tuple[str, ...] = ("0", "1"),
    seed: int = 0,
    options: Mapping[str, object] | None = None,
) -> Path:
    """Write a tiny compressed checkpoint of `family` to `out` and return it.

    `spec` is a spec such as ``2:4+W8``; `specs` are others, for the weights that a glob matches.
    """
    from safetensors.numpy import load_file, save_file

    if family == "deberta-v2":  # what positions are multiplied with is not compressed
        options = {"share_att_key": False, **(options or {})}
    tiny.write_model(family, out, head=task, classes=classes, layers=layers, seed=seed, options=options)
    config = read_config(out)
    kind = FAMILIES[family]
    shapes = kind.weights(config)
    chosen = {name: next((s for glob, s in (specs or {}).items() if fnmatchcase(name, glob)), spec) for name in shapes}
    weights = {name: kind.placed(name, WeightSpec.parse(entry), placement) for name, entry in chosen.items()}
    plan = CompressionPlan(family, weights, shapes, attention, embedding=embedding)
    tensors, scales = load_file(out / "model.safetensors"), {}
    for name, weight_spec in plan.weights.items():
        tensors[name], scale = baked(tensors[name], weight_spec)
        if scale is not None:
            scales[f"{name}_scale"] = scale
    if embedding == "int8":  # a row of a matrix is a channel; a row of the table is a token
        tensors[kind.word_embedding], scales[f"{kind.word_embedding}_scale"] = baked_table(tensors[kind.word_embedding])
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    scales |= _ranges(out, plan, task)
    save_plan(out, plan, scales)
    return out


def baked(weight: np.ndarray, spec: WeightSpec) -> tuple[np.ndarray, np.ndarray | None]:
    """(weight on the pattern and grid of `spec`, scales (out,)); keeps the largest of every group, scales by
    max-abs."""
    out, in_ = weight.shape
    if spec.pattern:
        groups = np.abs(weight).reshape(out, in_ // spec.pattern.m, spec.pattern.m)
        rank = groups.argsort(axis=-1)[..., ::-1].argsort(axis=-1)
        weight = weight * (rank < spec.pattern.n).reshape(out, in_)
    if spec.qmax is None:
        return weight.astype(np.float16).astype(np.float32), None
    scale = (np.abs(weight).max(axis=1) / spec.qmax).astype(np.float32)
    codes = np.clip(np.rint(weight / scale[:, None]), -spec.qmax, spec.qmax).astype(np.float32)
    return codes * scale[:, None] + np.float32(0), scale  # never -0.0


def baked_table(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(table on its grid, scales (tokens,)): every row's largest value is code 127; rows of zeros have scale 1."""
    largest = np.abs(table).max(axis=1)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    return np.rint(table / scale[:, None]).astype(np.float32) * scale[:, None] + np.float32(0), scale


def features(samples: int = 24, *, family: str = "bert", seed: int = 0, classes: int = 2) -> list[Features]:
    """Token features of random sentences with labels, of mixed lengths up to the longest."""
    rng = np.random.default_rng(seed)
    vocabulary = len(tiny.WORDS) + 5
    made: list[Features] = []
    for _ in range(samples):
        length = int(rng.integers(2, tiny.POSITIONS + 1))
        ids = rng.integers(5, vocabulary, length)
        inputs = {"input_ids": ids.tolist(), "attention_mask": [1] * length, "token_type_ids": [0] * length}
        sample = sample_of({name: inputs[name] for name in tiny.inputs(family)})
        made.append({**sample, "labels": int(rng.integers(classes))})
    return made


def feeds(family: str, batch: int, sequence: int, *, padding: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    """Engine inputs: random tokens, the last `padding` of every second row padded."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, len(tiny.WORDS) + 5, (batch, sequence))
    mask = np.ones_like(ids)
    if padding:
        mask[::2, sequence - padding :] = 0
        ids[mask == 0] = tiny.pad_id(family)
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: values[name] for name in tiny.inputs(family)}


def _ranges(path: Path, plan: CompressionPlan, task: str) -> dict[str, np.ndarray]:
    """Activation scales: the largest value that each linear layer reads and writes over random input, mapped to 127."""
    import torch

    from nxm_export.contract.tasks import TASKS
    from nxm_export.hf.model_loading import load_task_model

    model = load_task_model(path, TASKS[task])
    largest: dict[str, float] = {}
    kind = FAMILIES[plan.model_type]

    def watch(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...], torch.Tensor], None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            parts = [path.removesuffix(".weight") for path in kind.parts(f"{name}.weight")]
            written = zip(parts, output.chunk(len(parts), dim=-1), strict=True)
            for key, tensor in (
                (f"{name}.input_scale", args[0]),
                *((f"{part}.output_scale", x) for part, x in written),
            ):
                largest[key] = max(largest.get(key, 0.0), float(tensor.abs().max()))

        return hook

    for name in plan.weights:
        module = name.removesuffix(".weight")
        model.get_submodule(module).register_forward_hook(watch(module))
    family = plan.model_type
    operands = _watch_operands(model, plan, largest) if plan.attention == "int8" else set()
    with torch.no_grad():
        for seed in range(3):
            batch = feeds(family, 8, tiny.POSITIONS, padding=5, seed=seed + 100)
            model(**{key: torch.from_numpy(value) for key, value in batch.items()})
    inputs = [name for name, spec in plan.weights.items() if spec.input_bits]
    outputs = [part for name, spec in plan.weights.items() if spec.output_bits for part in kind.parts(name)]
    quantized = {f"{name.removesuffix('.weight')}.input_scale" for name in inputs}
    quantized |= {f"{name.removesuffix('.weight')}.output_scale" for name in outputs}
    quantized |= operands
    return {key: np.asarray(value / 127.0, np.float32) for key, value in largest.items() if key in quantized}


def _watch_operands(model: torch.nn.Module, plan: CompressionPlan, largest: dict[str, float]) -> set[str]:
    """Let `largest` have the range of what attention multiplies; returns the keys of what no linear layer quantizes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    family = FAMILIES[config["model_type"]]
    if family.operands_are_outputs:
        return set()
    blocks = family.blocks(config)
    attentions = [f"{block}.{family.attention.path}" for block in blocks]
    paths = {id(model.get_submodule(path)): path for path in attentions}

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **_: Any) -> Any:
        for name, x in (("query", query), ("key", key), ("value", value)):
            entry = f"{paths[id(module)]}.{name}_scale"
            largest[entry] = max(largest.get(entry, 0.0), float(x.abs().max()))
        probabilities = (query @ key.transpose(2, 3) * scaling + mask).softmax(-1)
        return (probabilities @ value).transpose(1, 2), None

    AttentionInterface.register("test_watch", attention)
    AttentionMaskInterface.register("test_watch", eager_mask)
    model.set_attn_implementation("test_watch")  # type: ignore[operator]
    return {
        f"{block}.{family.attention.path}.{name}_scale" for block in blocks for name in family.own_operands(plan, block)
    }

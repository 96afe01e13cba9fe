"""Tiny seeded models, compressed without training: for TensorRT's tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from nxm_export.hf.protocols import AutoClass, SavedModel
from tests.support import tiny

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Checkpoints = Callable[..., Path]


def tiny_config(
    family: str, gelu: str = "gelu", hidden: int = 128, layers: int = 1, positions: int = 64
) -> PreTrainedConfig:
    import transformers

    labels = {number: f"LABEL_{number}" for number in range(3)}
    ids = {name: number for number, name in labels.items()}
    if family == "distilbert":
        return transformers.DistilBertConfig(
            dim=hidden, hidden_dim=4 * hidden, n_layers=layers, n_heads=2, max_position_embeddings=positions,
            activation=gelu, seq_classif_dropout=0.0, vocab_size=1024, pad_token_id=0, id2label=labels, label2id=ids,
        )  # fmt: skip
    kinds: dict[str, Callable[..., PreTrainedConfig]] = {
        "bert": transformers.BertConfig,
        "roberta": transformers.RobertaConfig,
        "electra": transformers.ElectraConfig,
        "albert": transformers.AlbertConfig,
        "xlm-roberta": transformers.XLMRobertaConfig,
        "camembert": transformers.CamembertConfig,
        "mpnet": transformers.MPNetConfig,
        "modernbert": transformers.ModernBertConfig,
        "nomic_bert": transformers.NomicBertConfig,
        "gte": transformers.GteConfig,
        "jina_embeddings_v3": transformers.JinaEmbeddingsV3Config,
    }
    extra: dict[str, object] = {"hidden_act": gelu}
    if family in ("electra", "albert"):
        extra["embedding_size"] = hidden
    if family == "modernbert":
        extra = {"hidden_activation": gelu}
        extra |= {"local_attention": 8, "layer_types": ["sliding_attention"] * layers}
        extra |= dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), 1)
    return kinds[family](
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=2,
        max_position_embeddings=positions + (2 if family in tiny.LIKE_ROBERTA else 0),
        vocab_size=1024, pad_token_id=1 if family == "mpnet" else 0, id2label=labels, label2id=ids, **extra,
    )  # fmt: skip


def feeds_for(inputs: Sequence[str], batch: int, sequence: int, seed: int = 0) -> dict[str, np.ndarray]:
    """int64 inputs: random ids, the second half of the last row padding."""
    ids = np.random.default_rng(seed).integers(3, 64, size=(batch, sequence))
    mask = np.ones_like(ids)
    mask[-1, sequence // 2 :] = 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    return {name: values[name] for name in inputs}


def compressed(
    out: Path,
    config: PreTrainedConfig,
    placement: str,
    residual: str = "float",
    keep_dense: tuple[str, ...] = (),
    spec: str = "2:4+W8",
) -> Path:
    """A random model under a uniform plan, calibrated on random tokens, pruned by magnitude, baked; no training."""
    import torch
    import transformers

    from compressors.quantization.fake_quant import quant_linears
    from compressors.quantization.prepare_bake import bake, calibrate, prepare
    from nxm_export.contract.checkpoint import open_checkpoint, save_plan
    from nxm_export.contract.families import FAMILIES
    from nxm_export.contract.plan import WeightSpec

    torch.manual_seed(0)
    family = FAMILIES[config.model_type].of_config(config.to_dict(), "config")
    made = cast("AutoClass", transformers.AutoModelForSequenceClassification)
    model = torch.nn.Module.eval(made.from_config(config, attn_implementation="eager"))
    for name, parameter in model.named_parameters():  # large enough that quantization and attention matter
        if name.endswith(".weight") and parameter.dim() == 2 and "embedding" not in name:
            torch.nn.init.normal_(parameter, std=0.08)
        elif name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.half().float()  # what baking does to the weights that a plan keeps in 16 bit
    facts = config.to_dict()
    plan = family.uniform_plan(
        facts, WeightSpec.parse(spec), placement=placement, residual=residual, keep_dense=keep_dense
    )
    prepare(model, plan, family, facts)
    batch = {name: torch.from_numpy(value) for name, value in feeds_for(family.inputs, 4, 16).items()}
    calibrate(model, [batch], 99.9)
    for layer in quant_linears(model).values():
        layer.freeze_mask()
    with torch.inference_mode():
        logits = model(**batch).logits
    scales = bake(model, plan)
    cast("SavedModel", model).save_pretrained(out, save_original_format=False)
    save_plan(out, plan, scales)
    torch.save(logits, out / "fake_quant_logits.pt")
    open_checkpoint(out).require_valid()
    return out

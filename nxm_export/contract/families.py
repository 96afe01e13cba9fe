"""The encoder families that are supported, one entry each; everything else follows from it.

An entry is read from ``config.json`` alone, so that a host without torch can use it.
"""

from __future__ import annotations

from collections.abc import Mapping

from nxm_export.contract.config_checks import require_honoured
from nxm_export.contract.config_values import flag_of
from nxm_export.contract.encoder_family import (
    BLOCK,
    CONTEXT,
    FFN,
    GATED,
    INSIDE,
    OPERAND,
    RESIDUAL,
    ROTATED,
    WIDE,
    Attention,
    Family,
    Linear,
    OnlyValue,
    Part,
)
from nxm_export.errors import ArtifactError


def _separate(
    query: str, key: str, value: str, output: str, *, matched: str = OPERAND, across: str = "hidden"
) -> tuple[Linear, ...]:
    """Attention with a matrix for each operand, by module path; `matched` is what query and key write, and `across`
    names the size of all heads together."""
    return (
        Linear("query", query, across, "hidden", BLOCK, matched),
        Linear("key", key, across, "hidden", BLOCK, matched),
        Linear("value", value, across, "hidden", BLOCK, OPERAND),
        Linear("attention_output", output, "hidden", across, CONTEXT, RESIDUAL),
    )


def _ffn(up: str, down: str) -> tuple[Linear, ...]:
    """A feed-forward network of two matrices with an activation between."""
    return (
        Linear("ffn_up", up, "wide", "hidden", FFN, INSIDE),
        Linear("ffn_down", down, "hidden", "wide", WIDE, RESIDUAL),
    )


_BERT_BLOCK = (
    *_separate("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *_ffn("intermediate.dense", "output.dense"),
)
_ROTARY_ATTENTION = _separate(  # query and key are rotated before they are multiplied
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), matched=ROTATED, across="heads"
)
_GATED_FFN = (
    Linear("ffn_gate", "mlp.gate_proj", "wide", "hidden", FFN, GATED),
    Linear("ffn_up", "mlp.up_proj", "wide", "hidden", FFN, GATED),
    Linear("ffn_down", "mlp.down_proj", "hidden", "wide", WIDE, RESIDUAL),
)
_QUERY_KEY_VALUE = (Part("query", ROTATED), Part("key", ROTATED), Part("value", OPERAND))
_INPUT_GATE = (Part("input", GATED), Part("gate", GATED))  # the activation is of the first
_TWO_INPUTS = ("input_ids", "attention_mask")
_WITH_TYPES = (*_TWO_INPUTS, "token_type_ids")
_SELF_ATTENTION = Attention("attention.self")
_BERT_NORM = "attention.output.LayerNorm"
_LAYERS = "encoder.layer.{i}"


def _like_roberta(model_type: str) -> Family:
    return Family(
        model_type,
        "roberta",
        _LAYERS,
        _BERT_BLOCK,
        _TWO_INPUTS,
        _SELF_ATTENTION,
        _BERT_NORM,
        positions_after_padding=True,
    )


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("bert", "bert", _LAYERS, _BERT_BLOCK, _WITH_TYPES, _SELF_ATTENTION, _BERT_NORM),
        _like_roberta("roberta"),
        Family(
            "distilbert",
            "distilbert",
            "transformer.layer.{i}",
            (
                *_separate("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
                *_ffn("ffn.lin1", "ffn.lin2"),
            ),
            _TWO_INPUTS,
            Attention("attention"),
            "sa_layer_norm",
            layers_key="n_layers",
            hidden_key="dim",
            intermediate_key="hidden_dim",
            heads_key="n_heads",
            activation_key="activation",
        ),
        Family(
            "electra",
            "electra",
            _LAYERS,
            _BERT_BLOCK,
            _WITH_TYPES,
            _SELF_ATTENTION,
            _BERT_NORM,
            embedding_key="embedding_size",
        ),
        Family(
            "albert",
            "albert",
            "encoder.albert_layer_groups.{group}.albert_layers.{i}",
            (
                *_separate("attention.query", "attention.key", "attention.value", "attention.dense"),
                *_ffn("ffn", "ffn_output"),
            ),
            _WITH_TYPES,
            Attention("attention"),
            "attention.LayerNorm",
            shared_keys=("num_hidden_groups", "inner_group_num"),
            embedding_key="embedding_size",
        ),
        _like_roberta("xlm-roberta"),
        _like_roberta("camembert"),
        Family(
            "mpnet",
            "mpnet",
            _LAYERS,
            (
                *_separate("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o"),
                *_ffn("intermediate.dense", "output.dense"),
            ),
            _TWO_INPUTS,
            Attention("attention.attn", interface=False, dropout="dropout"),
            "attention.LayerNorm",
            positions_after_padding=True,
            block_returns=1,
            only_values={
                "relative_attention_num_buckets": OnlyValue(32, "transformers tells so many apart, whatever this says"),
                "pad_token_id": OnlyValue(1, "transformers counts positions from there, whatever this says"),
            },
        ),
        Family(
            "modernbert",
            "model",
            "layers.{i}",
            (
                Linear("qkv", "attn.Wqkv", "3 heads", "hidden", BLOCK, ROTATED, _QUERY_KEY_VALUE),
                Linear("attention_output", "attn.Wo", "hidden", "heads", CONTEXT, RESIDUAL),
                Linear("ffn_up", "mlp.Wi", "2 wide", "hidden", FFN, GATED, _INPUT_GATE),
                Linear("ffn_down", "mlp.Wo", "hidden", "wide", WIDE, RESIDUAL),
            ),
            _TWO_INPUTS,
            Attention("attn", takes_bias_mask=False),  # two masks, one of them a window
            "mlp_norm",
            block_norm="attn_norm",
            final_norm="final_norm",
            activation_key="hidden_activation",
            words="embeddings.tok_embeddings",
            only_values={"head_dim": OnlyValue("head", "transformers splits its fused matrix into heads of that size")},
        ),
        Family(
            "nomic_bert",
            "nomic_bert",
            "layers.{i}",
            _ROTARY_ATTENTION + _GATED_FFN,
            _WITH_TYPES,
            Attention("self_attn"),
            "post_attention_layernorm",
            missing_heads=frozenset({"question-answering"}),
        ),
        Family(
            "gte",
            "gte",
            "layers.{i}",
            _ROTARY_ATTENTION + _GATED_FFN,
            _WITH_TYPES,
            Attention("self_attn"),
            "post_attention_layernorm",
            fewest_types=2,
            missing_heads=frozenset({"question-answering"}),
        ),
        Family(
            "jina_embeddings_v3",
            "roberta",
            "layers.{i}",
            _ROTARY_ATTENTION + _ffn("mlp.fc1", "mlp.fc2"),
            _WITH_TYPES,
            Attention("self_attn"),
            "post_attention_layernorm",
            fewest_types=2,
        ),
        Family(
            "deberta-v2",
            "deberta",
            _LAYERS,
            (
                *_separate(
                    *("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
                    "attention.output.dense",
                ),
                *_ffn("intermediate.dense", "output.dense"),
            ),
            _WITH_TYPES,
            # Its scores are sums of three products, two of them with positions (`nxm_export.hf.deberta`).
            Attention("attention.self", interface=False, takes_bias_mask=False),
            _BERT_NORM,
            embedding_key="embedding_size",
            fewest_types=1,
            block_returns=2,
            position_readers=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
            refused_keys={"conv_kernel_size": "its convolution reads across the end of the first block"},
            only_values={
                "attention_head_size": OnlyValue("head", "all heads together are as wide as the residual stream"),
                "pooler_hidden_size": OnlyValue("hidden", "its pooler reads the residual stream"),
            },
        ),
    )
}


def family_of(config: Mapping[str, object], *, source: str = "config.json") -> Family:
    """The family of a ``config.json``; families that are not supported are refused with the list of those that are,
    and so is what no family honours (`nxm_export.contract.config_checks`)."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ArtifactError(
            f"{source}: model_type {model_type!r} is not supported; supported families: {', '.join(FAMILIES)}"
        )
    if flag_of(config, "is_decoder") or flag_of(config, "add_cross_attention"):
        raise ArtifactError(f"{source}: decoders are not supported; only encoders of: {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    require_honoured(config, family.activation_key, source)
    return family.of_config(config, source)

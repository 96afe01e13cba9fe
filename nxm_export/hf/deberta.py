"""DeBERTa's attention written out, and its shared projections taken apart.

DeBERTa adds to the scores what queries make of the embeddings of relative positions (c2p), and what keys make of them
(p2c). transformers repeats those embeddings for every sample, which in a graph are products of two tensors that depend
on the batch; and it masks with the smallest float32, which bfloat16 does not hold. Here they are one constant for all
samples, and what is masked has a finite score.

With ``share_att_key`` (all published v3 models), the query and key matrices of a block multiply two things: what the
block reads, and the embeddings of relative positions. A quantizer or a mask that is right for the one is wrong for the
other. transformers knows the form with matrices of their own for the positions; it computes the same.
"""

from __future__ import annotations

import copy
import math
from types import MethodType
from typing import TYPE_CHECKING, Protocol, cast

from nxm_export.hf.finite_masks import MASKED

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_KEYS, _QUERIES = "position_keys", "position_queries"  # buffers of an attention with fixed positions
_TABLE = "position_of_distance"  # buffer of the encoder


class _Linear(Protocol):
    def __call__(self, x: Tensor) -> Tensor: ...


class _Attention(Protocol):
    """What is used of transformers' ``DisentangledSelfAttention``."""

    num_attention_heads: int
    attention_head_size: int
    pos_att_type: list[str]
    share_att_key: bool
    query_proj: _Linear
    key_proj: _Linear
    value_proj: _Linear
    pos_query_proj: _Linear
    pos_key_proj: _Linear
    dropout: _Linear
    pos_dropout: _Linear


class _Encoder(Protocol):
    """What is used of transformers' ``DebertaV2Encoder``."""

    max_relative_positions: int
    position_buckets: int

    def get_rel_embedding(self) -> Tensor | None:
        """The embeddings of positions (positions, features), normalised; None for a model without."""


def split_shared_projections(model: torch.nn.Module) -> None:
    """Give every attention of a DeBERTa that shares its projections copies of them for the positions, in place; the
    model's outputs stay, and its configuration says so. Any other model is left alone."""
    for module in model.modules():
        if getattr(module, "share_att_key", None) is not True:
            continue
        kinds: list[str] = list(getattr(module, "pos_att_type", None) or ())
        if getattr(module, "relative_attention", False):
            for kind, of, to in (("c2p", "key_proj", "pos_key_proj"), ("p2c", "query_proj", "pos_query_proj")):
                if kind in kinds:
                    setattr(module, to, copy.deepcopy(module.get_submodule(of)))
        setattr(module, "share_att_key", False)  # noqa: B010  (nn.Module declares no such attribute)
    config = getattr(model, "config", None)
    if getattr(config, "share_att_key", None) is True:
        setattr(config, "share_att_key", False)  # noqa: B010


def write_out_attention(model: torch.nn.Module, *, fixed_positions: bool = False) -> None:
    """Let every attention of a DeBERTa compute as `_attend` does, in place; its outputs stay within rounding. Any other
    model is left alone.

    With `fixed_positions` what the embeddings of positions are multiplied as is computed here, once: for a graph.
    """
    if getattr(getattr(model, "config", None), "model_type", None) != "deberta-v2":
        return
    from transformers.models.deberta_v2.modeling_deberta_v2 import DebertaV2Encoder, DisentangledSelfAttention

    encoder = next(module for module in model.modules() if isinstance(module, DebertaV2Encoder))
    embeddings = cast(_Encoder, encoder).get_rel_embedding()
    if embeddings is not None:
        most = int(getattr(model.config, "max_position_embeddings", 0))
        table = _position_of_distance(cast(_Encoder, encoder), most)
        encoder.register_buffer(_TABLE, table.to(embeddings.device), persistent=False)
        setattr(encoder, "get_rel_pos", MethodType(_positions, encoder))  # noqa: B010  (methods cannot be assigned)
    for module in encoder.modules():
        if not isinstance(module, DisentangledSelfAttention):
            continue
        if fixed_positions and embeddings is not None:
            _fix_positions(module, embeddings)
        setattr(module, "forward", MethodType(_attend, module))  # noqa: B010


def _position_of_distance(encoder: _Encoder, tokens: int) -> Tensor:
    """The row of the position embeddings that belongs to each distance of a query from a key, from 1 - `tokens` to
    `tokens` - 1.

    A table, because buckets are rounded logarithms, which another runtime might round to another bucket.
    """
    import torch
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    longest, buckets = encoder.max_relative_positions, encoder.position_buckets
    found = torch.arange(1 - tokens, tokens)
    if buckets > 0 and longest > 0:
        found = make_log_bucket_position(found, buckets, longest).long()
    span = buckets if buckets > 0 else longest
    return (found + span).clamp(0, 2 * span - 1)


def _positions(encoder: torch.nn.Module, hidden_states: Tensor, *_: object) -> Tensor:
    """The position of every query (rows) from every key, (sequence, sequence), for `hidden_states` (batch, sequence,
    features): what stands in place of transformers' distances."""
    import torch

    table, at = encoder.get_buffer(_TABLE), torch.arange(hidden_states.shape[1], device=hidden_states.device)
    distance = at[:, None] - at[None, :]
    return table.index_select(0, distance.flatten() + len(table) // 2).view_as(distance)


def _picked(scores: Tensor, positions: Tensor) -> Tensor:
    """Of scores with every position (batch, heads, sequence, positions) those that `positions` (sequence, sequence)
    names for each row."""
    return scores.gather(3, positions.expand(*scores.shape[:2], -1, -1))


def _fix_positions(module: torch.nn.Module, embeddings: Tensor) -> None:
    """Keep the operands of an attention that positions make, in the type of its parameters, computed in float32."""
    import torch

    exact = copy.deepcopy(module).float()
    with torch.no_grad():
        operands = _position_operands(cast(_Attention, exact), embeddings.float())
    for name, operand in zip((_KEYS, _QUERIES), operands, strict=True):
        if operand is not None:
            module.register_buffer(name, operand.to(embeddings.dtype).contiguous(), persistent=False)


def _position_operands(module: _Attention, embeddings: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What queries and what keys are multiplied with, (heads, head, positions) each, None for what the model lacks;
    those of keys have the scale of the scores in them. `embeddings` are (positions, features)."""
    shared, kinds = module.share_att_key, module.pos_att_type
    embeddings = module.pos_dropout(embeddings)

    def operand(project: _Linear) -> Tensor:
        return project(embeddings).view(len(embeddings), module.num_attention_heads, -1).permute(1, 2, 0)

    keys = operand(module.key_proj if shared else module.pos_key_proj) if "c2p" in kinds else None
    queries = operand(module.query_proj if shared else module.pos_query_proj) if "p2c" in kinds else None
    return keys, None if queries is None else queries * _scale(module)


def _scale(module: _Attention) -> float:
    """Of the scores: they are sums of as many products as there are kinds."""
    products = 1 + ("c2p" in module.pos_att_type) + ("p2c" in module.pos_att_type)
    return 1.0 / math.sqrt(module.attention_head_size * products)


def _attend(
    self: _Attention,
    hidden_states: Tensor,
    attention_mask: Tensor,
    output_attentions: bool = False,
    query_states: Tensor | None = None,
    relative_pos: Tensor | None = None,
    rel_embeddings: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `hidden_states` (batch, sequence, features) under a mask (batch, 1, sequence, sequence); the
    signature is that of transformers' ``DisentangledSelfAttention``, with other relative positions."""
    query, key, value = (
        project(states).view(*states.shape[:2], self.num_attention_heads, -1).transpose(1, 2)
        for project, states in (
            (self.query_proj, hidden_states if query_states is None else query_states),
            (self.key_proj, hidden_states),
            (self.value_proj, hidden_states),
        )
    )
    query = query * _scale(self)  # first, so that no product is too large for float16
    scores = query @ key.transpose(2, 3)
    if relative_pos is not None and rel_embeddings is not None:
        keys, queries = getattr(self, _KEYS, None), getattr(self, _QUERIES, None)
        if keys is None and queries is None:
            keys, queries = _position_operands(self, rel_embeddings)
        if keys is not None:
            scores = scores + _picked(query @ keys, relative_pos)
        if queries is not None:
            scores = scores + _picked(key @ queries, relative_pos.T).transpose(2, 3)
    scores = scores.masked_fill(~attention_mask.bool(), MASKED)  # all of a row of padding: then it reads all alike
    probabilities = self.dropout(scores.softmax(-1))
    context = (probabilities @ value).transpose(1, 2).flatten(2)
    return context, probabilities if output_attentions else None

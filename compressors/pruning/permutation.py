"""Function-preserving channel permutation: put channels next to each other so that N:M drops less.

N:M groups are M neighbouring inputs of a matrix, and which inputs are neighbours is arbitrary where only the matrix
before says so. Three places are free. Two lie inside a block, and moving channels there changes no hidden state between
blocks:

* the FFN's intermediate channels: rows and bias of the first matrix with columns of the second;
* the value channels inside a head: rows and bias of the value matrix with columns of the attention output. (Query and
  key are no one's inputs, and the order of heads cannot matter where M divides the size of a head.)

The third is the residual stream, which embeddings and norms write and query, key, value and the FFN's first matrix of
every block read: one order for them all. It moves the channels of hidden states, so a teacher has to be permuted with
it.

The order is searched by swaps of two channels between groups, those that keep the most of the masks' scores first, in
the spirit of Pool & Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021). Deterministic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compressors.projections import magnitude_scores
from compressors.quantization.fake_quant import QuantLinear
from nxm_export.contract.config_values import size_of
from nxm_export.contract.encoder_family import BLOCK, CONTEXT, FFN, RESIDUAL, WIDE, Family
from nxm_export.contract.plan import CompressionPlan, NMPattern
from nxm_export.errors import PlanError

ROUNDS = 40  # at most; each takes the best swaps that touch no group twice
_LEAST_GAIN = 1e-4  # of what is kept: a round that gains less is the last
_ROUNDING = 1e-3  # of the largest output: sums in another order in float32 differ by far less, another function by more
_RESIDUAL_ROWS = (
    16_384  # of all readers' rows, evenly spaced, are enough to choose an order by; a large model has 200 000
)

# weight -> share of the sum of its scores that the pattern kept before, and keeps now
RetainedShares = dict[str, tuple[float, float]]


@torch.no_grad()
def permute_channels(
    model: nn.Module, plan: CompressionPlan, family: Family, config: Mapping[str, object]
) -> RetainedShares:
    """Reorder the free channels inside the blocks of `model`, in place, for the patterns of `plan`.

    Returns every matrix whose columns were reordered.
    """
    shares: RetainedShares = {}
    for block in family.blocks(config):
        for tensor in (WIDE, CONTEXT):
            [name] = family.readers(block, tensor)
            pattern, reader = plan.weights[name].pattern, _linear(model, name)
            size = reader.in_features if tensor == WIDE else reader.in_features // family.heads(config)
            if pattern is None or size % pattern.m:
                continue
            scores = _scores(reader)
            parts = torch.split(scores, size, dim=1)
            order = torch.cat([channel_order(part, pattern) + i * size for i, part in enumerate(parts)])
            shares[name] = _shares(scores, order, pattern)
            _move_inputs(reader, order)
            for writer in _writers(model, family, block, tensor):
                _move_outputs(writer, _within_rows(order, writer.out_features, repeats=tensor == WIDE))
    return shares


def _writers(model: nn.Module, family: Family, block: str, tensor: str) -> list[nn.Linear]:
    """The layers whose results become the channels of a tensor inside a block, one by one."""
    if tensor == WIDE:  # what the FFN's first matrices write, a gate among them
        return [_linear(model, name) for name in family.readers(block, FFN)]
    return [_linear(model, family.weight(block, linear)) for linear in family.linears if linear.role == family.values]


def _within_rows(order: Tensor, rows: int, *, repeats: bool) -> Tensor:
    """The order of all `rows` of a matrix of which each part (of a fused FFN), or only the last (the values of a fused
    attention), has the order given."""
    parts = rows // len(order)
    start = torch.arange(len(order), device=order.device)
    return torch.cat([(order if repeats or part == parts - 1 else start) + part * len(order) for part in range(parts)])


@torch.no_grad()
def residual_order(
    model: nn.Module, plan: CompressionPlan, family: Family, config: Mapping[str, object]
) -> tuple[Tensor, RetainedShares]:
    """The order (hidden,) of the residual stream under which what reads it keeps more, and every matrix that this
    concerns.

    It is chosen for the pattern that most of its readers have; without any, nothing is to be kept.
    """
    hidden = size_of(config, family.hidden_key)
    readers = [name for block in family.blocks(config) for name in _residual_readers(family, block)]
    patterns = Counter(pattern for name in readers if (pattern := plan.weights[name].pattern) is not None)
    if not patterns:
        return torch.arange(hidden), {}
    pattern = patterns.most_common(1)[0][0]
    scores = {name: _scores(_linear(model, name)) for name in readers if plan.weights[name].pattern == pattern}
    rows = torch.cat(list(scores.values()))
    order = channel_order(rows[:: -(-len(rows) // _RESIDUAL_ROWS)], pattern)
    return order, {name: _shares(score, order, pattern) for name, score in scores.items()}


@torch.no_grad()
def permute_residual(model: nn.Module, order: Tensor, family: Family, config: Mapping[str, object]) -> None:
    """Give the residual stream of `model` another `order` (hidden,), in place; its outputs stay what they were.

    Outside the blocks every feature axis of the hidden size is moved, of whatever module: what reads one that was
    written in the new order then finds it there. Raises `PlanError` where the model's own outputs are of that size.
    """
    hidden = size_of(config, family.hidden_key)
    blocks = family.blocks(config)
    for block in blocks:
        for name in _residual_readers(family, block):
            _move_inputs(_linear(model, name), order)
        for linear in family.linears:
            if linear.writes == RESIDUAL:
                _move_outputs(_linear(model, family.weight(block, linear)), order)
        for path, module in model.get_submodule(block).named_modules():
            if path in family.position_readers:  # the embeddings that it reads are moved below, and their norm
                assert isinstance(module, nn.Linear)
                _move_inputs(module, order)
    if int(getattr(getattr(model, "config", None), "num_labels", 0)) == hidden:
        raise PlanError(f"a head with as many outputs as the hidden size, {hidden}, cannot be permuted")
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{block}.") for block in blocks)
        if isinstance(module, nn.LayerNorm) and module.normalized_shape == (hidden,):
            for parameter in module.parameters():  # some norms have no bias
                parameter.copy_(parameter[order])
        elif isinstance(module, nn.Embedding) and module.embedding_dim == hidden and not inside:
            module.weight.copy_(module.weight[:, order])
        elif isinstance(module, nn.Linear) and not inside:
            if module.in_features == hidden:
                _move_inputs(module, order)
            if module.out_features == hidden:
                _move_outputs(module, order)


def require_unchanged(before: Tensor, after: Tensor, family: Family) -> None:
    """Raise `PlanError` where a model's outputs on the same input are others after permuting than `before`."""
    moved, largest = float((after - before).abs().max()), float(before.abs().max())
    if not moved <= _ROUNDING * largest:
        raise PlanError(
            f"--permute changes what this {family.model_type} model computes (its outputs of up to {largest:.3g} move "
            f"by {moved:.3g}): something else of it reads the same channels. Train without --permute"
        )


def _residual_readers(family: Family, block: str) -> list[str]:
    return family.readers(block, BLOCK) + family.readers(block, FFN)


def _scores(layer: nn.Linear) -> Tensor:
    """What the masks of a layer are chosen by, (out, in) float32."""
    importance = layer.importance if isinstance(layer, QuantLinear) else None
    return magnitude_scores(layer.weight.float(), None if importance is None else importance.to(layer.weight.device))


def _shares(scores: Tensor, order: Tensor, pattern: NMPattern) -> tuple[float, float]:
    total = float(scores.sum().clamp(min=1e-30))
    return float(retained_sum(scores, pattern)) / total, float(retained_sum(scores[:, order], pattern)) / total


def _move_inputs(layer: nn.Linear, order: Tensor) -> None:
    layer.weight.copy_(layer.weight[:, order])
    if isinstance(layer, QuantLinear) and layer.importance is not None:
        layer.importance = layer.importance[order.to(layer.importance.device)]
    if isinstance(layer, QuantLinear) and layer.input_factors is not None:
        layer.input_factors = layer.input_factors[order.to(layer.input_factors.device)]


def _move_outputs(layer: nn.Linear, order: Tensor) -> None:
    layer.weight.copy_(layer.weight[order])
    if layer.bias is not None:
        layer.bias.copy_(layer.bias[order])
    if isinstance(layer, QuantLinear) and layer.spec.weight_bits:
        layer.log_scale.copy_(layer.log_scale[order])


def retained_sum(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Sum of the `n` largest `scores` (rows, channels) of every `m` neighbours."""
    groups = scores.reshape(len(scores), -1, pattern.m)
    return groups.topk(pattern.n, dim=-1).values.sum()


def channel_order(scores: Tensor, pattern: NMPattern, rounds: int = ROUNDS) -> Tensor:
    """The order (channels,) of the columns of `scores` (rows, channels) under which `pattern` keeps more of their sum.

    Let channel i leave its group and b take its place. Of a row x, with s_N and s_{N+1} the N-th and next largest of
    the group, the group keeps ``max(t, x_b) - max(x_i, s_N)`` more than before, where t is s_{N+1} if i was kept and
    s_N if not. Summed over rows, ``max(t, x_b)`` is half of ``t + x_b + |t - x_b|``: one L1 distance matrix gives all
    swaps.
    """
    n, m = pattern.n, pattern.m
    columns = scores.T.contiguous()  # (channels, rows)
    channels = len(columns)
    order = torch.arange(channels, device=scores.device)
    sums = columns.sum(dim=1)
    gains = torch.empty(channels, channels, device=scores.device)  # [i, b]: of i's group when b takes its place
    stale = order  # positions whose group has changed
    for _ in range(rounds):
        members = columns[order[stale]].reshape(-1, m, columns.shape[1])  # (groups, m, rows)
        ranked = members.topk(n + 1, dim=1).values
        last, following = ranked[:, n - 1 : n], ranked[:, n : n + 1]  # (groups, 1, rows)
        threshold = torch.where(members >= last, following, last).flatten(0, 1)  # (positions, rows)
        lost = torch.maximum(members, last).sum(dim=-1).flatten()
        distance = torch.cdist(threshold, columns, p=1.0)
        gains[order[stale]] = (threshold.sum(dim=1)[:, None] + sums + distance) / 2 - lost[:, None]
        swaps = _disjoint_swaps(gains, order, m)
        retained = float(retained_sum(columns[order].T, pattern))
        if not swaps or sum(gain for gain, _, _ in swaps) < _LEAST_GAIN * retained:
            break
        for _, i, j in swaps:
            order[i], order[j] = order[j].clone(), order[i].clone()
        changed = sorted({group for _, i, j in swaps for group in (i // m, j // m)})
        stale = (torch.tensor(changed)[:, None] * m + torch.arange(m)).flatten().to(order.device)
    return order


def _disjoint_swaps(gains: Tensor, order: Tensor, m: int) -> list[tuple[float, int, int]]:
    """(gain, position, position) of the best swaps, none of which shares a group with another."""
    by_position = gains[order][:, order]
    total = by_position + by_position.T
    groups = torch.arange(len(order), device=gains.device) // m
    total.masked_fill_(groups[:, None] == groups[None, :], 0.0)
    best, partner = total.max(dim=1)
    ranked = best.argsort(descending=True, stable=True).tolist()
    values, partners = best.tolist(), partner.tolist()
    taken: set[int] = set()
    chosen = []
    for i in ranked:
        j = partners[i]
        if values[i] <= 1e-6 * abs(values[ranked[0]]) or values[i] <= 0:
            break
        if i // m not in taken and j // m not in taken:
            taken |= {i // m, j // m}
            chosen.append((values[i], i, j))
    return chosen


def _linear(model: nn.Module, weight: str) -> nn.Linear:
    module = model.get_submodule(weight.removesuffix(".weight"))
    assert isinstance(module, nn.Linear)
    return module

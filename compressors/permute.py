"""Function-preserving channel permutation: put channels next to each other so that N:M drops less.

N:M groups are M neighbouring inputs of a matrix, and which inputs are neighbours is arbitrary where only the matrix before
says so. Two places inside a block are free, and moving channels there changes neither the function nor any hidden state
between blocks, so that a teacher needs no permutation of its own:

* the FFN's intermediate channels: rows and bias of the first matrix with columns of the second;
* the value channels inside a head: rows and bias of the value matrix with columns of the attention output. (Query and key
  are no one's inputs, and the order of heads cannot matter where M divides the size of a head.)

The order is searched by swaps of two channels between groups, those that keep the most magnitude first, in the spirit of
Pool & Yu, "Channel Permutations for N:M Sparsity" (NeurIPS 2021). Deterministic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nxm_export.families import Family
from nxm_export.plan import CompressionPlan, NMPattern

ROUNDS = 40  # at most; each takes the best swaps that touch no group twice
_LEAST_GAIN = 1e-4  # of what is kept: a round that gains less is the last


@torch.no_grad()
def permute_channels(
    model: nn.Module, plan: CompressionPlan, family: Family, config: Mapping[str, Any], rounds: int = ROUNDS
) -> dict[str, tuple[float, float]]:
    """Reorder the free channels of `model`, in place, for the patterns of `plan`.

    Returns, for every matrix whose columns were reordered, the share of its absolute sum that its pattern kept before and
    keeps now.
    """
    found: dict[str, tuple[float, float]] = {}
    for block in family.blocks(config):
        for reader_role, writer_role in (("ffn_down", "ffn_up"), ("attention_output", "value")):
            name = f"{family.linear(block, reader_role)}.weight"
            spec = plan.weights[name]
            reader, writer = (_linear(model, family.linear(block, role)) for role in (reader_role, writer_role))
            size = reader.in_features if reader_role == "ffn_down" else reader.in_features // family.heads(config)
            if name in found or spec.pattern is None or size % spec.pattern.m:
                continue
            scores = reader.weight.abs().float()
            parts = scores.split(size, dim=1)
            order = torch.cat([channel_order(part, spec.pattern, rounds) + i * size for i, part in enumerate(parts)])
            total = float(scores.sum().clamp(min=1e-30))
            found[name] = (
                float(kept_sum(scores, spec.pattern)) / total,
                float(kept_sum(scores[:, order], spec.pattern)) / total,
            )
            reader.weight.copy_(reader.weight[:, order])
            writer.weight.copy_(writer.weight[order])
            if writer.bias is not None:
                writer.bias.copy_(writer.bias[order])
    return found


def kept_sum(scores: Tensor, pattern: NMPattern) -> Tensor:
    """Sum of the `n` largest `scores` (rows, channels) of every `m` neighbours."""
    groups = scores.reshape(len(scores), -1, pattern.m)
    return groups.topk(pattern.n, dim=-1).values.sum()


def channel_order(scores: Tensor, pattern: NMPattern, rounds: int = ROUNDS) -> Tensor:
    """The order (channels,) of the columns of `scores` (rows, channels) under which `pattern` keeps more of their sum.

    Let channel i leave its group and b take its place. Of a row x, with s_N and s_{N+1} the N-th and next largest of the
    group, the group keeps ``max(t, x_b) - max(x_i, s_N)`` more than before, where t is s_{N+1} if i was kept and s_N if
    not. Summed over rows, ``max(t, x_b)`` is half of ``t + x_b + |t - x_b|``: one L1 distance matrix gives all swaps.
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
        kept = float(kept_sum(columns[order].T, pattern))
        if not swaps or sum(gain for gain, _, _ in swaps) < _LEAST_GAIN * kept:
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


def _linear(model: nn.Module, path: str) -> nn.Linear:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module

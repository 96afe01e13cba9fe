"""Matrices in few lines: short names, and one row for all that are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from nxm_export.contract.block_ranges import ranges

_FILLERS = {"weight", "dense", "self", "linear", "encoder", "layers", "layer", "matmul"}
_READS = {"query", "key", "value", "q", "k", "v", "q_proj", "k_proj", "v_proj", "query_proj", "key_proj", "value_proj"}
_ATTENTION = {"attention", "attn", "self_attn"}
Row = tuple[str, ...]


def short_names(names: Sequence[str]) -> list[str]:
    """Names as people say them: ``L0 query`` for ``bert.encoder.layer.0.attention.self.query.weight``.

    The number is the first that stands in a name. Names that would become one keep their full form.
    """
    short = [_short(name) for name in names]
    of_each = {one: {name for name, other in zip(names, short, strict=True) if other == one} for one in set(short)}
    return [one if len(of_each[one]) == 1 else name for one, name in zip(short, names, strict=True)]


def _short(name: str) -> str:
    if "(" in name:  # with the product that reads it: it has been told apart from others already
        return name
    parts = [part for part in name.replace("/", ".").split(".") if part]
    place = next((number for number, part in enumerate(parts) if part.isdecimal()), None)
    if place is None:
        kept = [part for part in parts if part.lower() not in _FILLERS]
        return ".".join(kept[-2:]) or name
    behind = [part for part in parts[place + 1 :] if part.lower() not in _FILLERS]
    if behind and behind[-1] in _READS:
        behind = [part for part in behind if part not in _ATTENTION]
    return f"L{int(parts[place])} {'.'.join(behind)}" if behind else name


def folded(names: Sequence[str], rows: Sequence[Row]) -> list[tuple[str, int, Row]]:
    """(names, how many, row) of all rows that are equal, the most frequent first."""
    groups: dict[Row, list[str]] = {}
    for name, row in zip(short_names(names), rows, strict=True):
        groups.setdefault(row, []).append(name)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return [(joined(group), len(group), row) for row, group in ordered]


def joined(names: Sequence[str]) -> str:
    """``L0-11 query, key; pooler`` for the short names of matrices: layers with the same matrices stand together."""
    roles: dict[str, list[int]] = {}
    others: list[str] = []
    for name in names:
        layer, _, role = name.partition(" ")
        if role and layer[:1] == "L" and layer[1:].isdecimal():
            roles.setdefault(role, []).append(int(layer[1:]))
        else:
            others.append(name)
    by_layers: dict[str, list[str]] = {}
    for role, layers in roles.items():
        by_layers.setdefault(ranges(layers), []).append(role)
    parts = [f"L{layers} {', '.join(same)}" for layers, same in by_layers.items()]
    return "; ".join([*parts, *others])


def shortened(text: str, width: int) -> str:
    """The text, cut where it is longer than `width`."""
    return text if len(text) <= width else f"{text[: width - 3].rstrip(' ,;')}..."


def counted(reasons: Sequence[str]) -> str:
    """``70 kernel-unknown, 4 not-planned``: how often each stands there."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(reasons).most_common())

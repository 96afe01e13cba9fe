"""Where two backends agree on the samples of a comparison: changed classes with their margins, and the table of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

WORST_FLIPS = 5
DECIDING = ("softmax", "sigmoid", "span")  # output kinds that decide something


@dataclass(frozen=True)
class Flip:
    """A sample (and position, in outputs that have some) whose class changed.

    `margin` is how far the reference's class led its second: the wider, the worse the change.
    """

    sample: int
    position: tuple[int, ...]
    reference: int
    engine: int
    margin: float
    excused: bool


@dataclass(frozen=True)
class Pair:
    """One output of this engine against the same of another engine. Two that round differently differ lawfully: no verdict."""

    other: str
    other_sha256: str
    output: str
    max_abs: float
    mean_abs: float
    cosine: float
    agreement: float | None
    difference: float
    difference_interval: tuple[float, float]


def spread(samples: int, count: int) -> np.ndarray:
    """At most `count` indices, evenly over all samples."""
    return np.linspace(0, samples - 1, min(count, samples)).astype(int)


def real_tokens(values: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Boolean (samples, tokens): what is no padding, in outputs (samples, tokens, ...)."""
    return np.asarray(np.arange(values.shape[1]) < np.asarray(lengths)[:, None])


def decisions(values: np.ndarray, output_kind: str, allowed: np.ndarray | None = None) -> np.ndarray | None:
    """What outputs (samples, ..., classes) decide: the class of the largest logit, or for every label whether its logit is
    above 0 (1 or 0), or, for spans (samples, sequence), the position where an answer begins or ends, of those `allowed`; None
    for scores, which decide nothing."""
    if output_kind == "span":
        return _among(values, allowed).argmax(-1)
    if output_kind == "sigmoid":
        return (values > 0).astype(int)
    return values.argmax(-1) if output_kind == "softmax" and values.shape[-1] > 1 else None


def _among(values: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
    return values if allowed is None else np.where(allowed, values, -np.inf)


def margins(wanted: np.ndarray, output_kind: str = "softmax", allowed: np.ndarray | None = None) -> np.ndarray:
    """By how much each decision was taken: errors of up to half of it change none."""
    if output_kind == "span":
        wanted = _among(wanted, allowed)
        wanted = np.concatenate([wanted, np.full((len(wanted), 1), -np.inf)], axis=1)  # a single token has no rival
    if output_kind == "sigmoid":
        return np.asarray(2 * np.abs(wanted))
    top = np.partition(wanted, -2, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2])


def flips(
    wanted: np.ndarray,
    found: np.ndarray,
    tolerance: float,
    output_kind: str = "softmax",
    allowed: np.ndarray | None = None,
) -> list[Flip]:
    """All changed decisions, the widest margin first. A change is excused where both logits may have moved by `tolerance`,
    towards each other. Padding, 0 on both sides, changes nothing."""
    ours, theirs = decisions(wanted, output_kind, allowed), decisions(found, output_kind, allowed)
    if ours is None or theirs is None:
        return []
    margin = margins(wanted, output_kind, allowed)
    made = [
        Flip(
            int(at[0]),
            tuple(int(i) for i in at[1:]),
            int(ours[tuple(at)]),
            int(theirs[tuple(at)]),
            float(margin[tuple(at)]),
            bool(margin[tuple(at)] <= 2 * tolerance),
        )
        for at in np.argwhere(ours != theirs)
    ]
    return sorted(made, key=lambda flip: -flip.margin)


def agreement(
    wanted: np.ndarray,
    found: np.ndarray,
    output_kind: str = "softmax",
    real: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
) -> float | None:
    """Share of equal decisions, of those where `real` holds; None for outputs that decide nothing. `allowed` is as in
    `decisions`."""
    ours, theirs = decisions(wanted, output_kind, allowed), decisions(found, output_kind, allowed)
    if ours is None or theirs is None:
        return None
    same = ours == theirs
    return float((same if real is None or output_kind == "span" else same[real]).mean())


def cosine(wanted: np.ndarray, found: np.ndarray) -> float:
    """Cosine of all values of an output; 1.0 where either is all zero."""
    norms = float(np.linalg.norm(wanted) * np.linalg.norm(found))
    return float((wanted * found).sum() / norms) if norms else 1.0


def cosines(wanted: np.ndarray, found: np.ndarray) -> np.ndarray:
    """(samples,): cosine of every sample's vector with its counterpart; 1.0 where either is all zero, NaN stays."""
    lengths = np.linalg.norm(wanted, axis=-1) * np.linalg.norm(found, axis=-1)
    products = (wanted * found).sum(axis=-1)
    return np.asarray(np.where(lengths == 0.0, 1.0, products / np.where(lengths == 0.0, 1.0, lengths)))


def pair_of(
    other: tuple[str, str],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    difference: tuple[float, tuple[float, float]],
    output_kind: str = "softmax",
    lengths: Mapping[str, Sequence[int]] = MappingProxyType({}),
    allowed: np.ndarray | None = None,
) -> list[Pair]:
    """The outputs of an engine against those of `other` (directory, sha256); `difference` is of the metric, with interval.

    `lengths` are the samples' in tokens, for outputs that have a row for every token; `allowed` is as in `decisions`.
    """
    made = []
    for name, found in ours.items():
        error = np.abs(found - theirs[name])
        real = real_tokens(found, lengths[name]) if name in lengths else None
        made.append(
            Pair(
                *other,
                name,
                float(error.max()),
                float(error.mean()),
                cosine(theirs[name], found),
                agreement(theirs[name], found, output_kind, real, allowed),
                *difference,
            )
        )
    return made

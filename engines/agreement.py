"""Where two backends agree on the samples of a comparison: changed classes with their margins, and the table of pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

WORST_FLIPS = 5


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
    agreement: float
    difference: float
    difference_interval: tuple[float, float]


def margins(wanted: np.ndarray) -> np.ndarray:
    """How far the highest class leads the second; infinite without classes. `wanted` is (samples, ..., classes)."""
    if wanted.shape[-1] < 2:
        return np.full(wanted.shape[:-1], np.inf)
    top = np.partition(wanted, -2, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2])


def flips(wanted: np.ndarray, found: np.ndarray, tolerance: float) -> list[Flip]:
    """All changed classes, the widest margin first. A change is excused where both logits may have moved by `tolerance`,
    towards each other."""
    if wanted.shape[-1] < 2:
        return []
    ours, theirs, margin = wanted.argmax(-1), found.argmax(-1), margins(wanted)
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


def agreement(wanted: np.ndarray, found: np.ndarray) -> float:
    """Share of equal argmax; 1.0 without classes."""
    return float((wanted.argmax(-1) == found.argmax(-1)).mean()) if wanted.shape[-1] > 1 else 1.0


def cosine(wanted: np.ndarray, found: np.ndarray) -> float:
    """Cosine of all values of an output; 1.0 where either is all zero."""
    norms = float(np.linalg.norm(wanted) * np.linalg.norm(found))
    return float((wanted * found).sum() / norms) if norms else 1.0


def pair_of(
    other: tuple[str, str],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    difference: tuple[float, tuple[float, float]],
) -> list[Pair]:
    """The outputs of an engine against those of `other` (directory, sha256); `difference` is of the metric, with interval."""
    made = []
    for name, found in ours.items():
        error = np.abs(found - theirs[name])
        made.append(
            Pair(
                *other,
                name,
                float(error.max()),
                float(error.mean()),
                cosine(theirs[name], found),
                agreement(theirs[name], found),
                *difference,
            )
        )
    return made

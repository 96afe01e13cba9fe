"""Where two backends agree on the samples of a comparison: changed classes with their margins, and engines in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WORST_FLIPS = 5
DECIDING = ("softmax", "sigmoid", "span")  # kinds of output that decide something


@dataclass(frozen=True)
class Reading:
    """How the values of an output are read: what kind they are, and which of them count.

    `output_kind` is the task's. `lengths` are the samples' in tokens where the output has a row for every token: what
    stands behind them is padding. `allowed` (samples, sequence) are the positions of an answer, where the output says
    where one begins or ends.
    """

    output_kind: str = "softmax"
    lengths: Sequence[int] | None = None
    allowed: np.ndarray | None = None


@dataclass(frozen=True)
class Flip:
    """A sample (and position, in outputs that have some) whose class changed.

    `margin` is how far the reference's class led its second: the wider, the worse the change; None where it has no
    second, as an answer of which one position is allowed.
    """

    sample: int
    position: tuple[int, ...]
    reference: int
    engine: int
    margin: float | None
    excused: bool


@dataclass(frozen=True)
class Pair:
    """One output of this engine against the same of another engine. Two that round differently differ lawfully: no
    verdict.

    A number is None where a NaN or an infinity leaves none; `difference` is of the task metric, with its paired
    interval.
    """

    other: str
    other_sha256: str
    output: str
    max_abs: float | None
    mean_abs: float | None
    cosine: float | None
    agreement: float | None
    difference: float | None
    difference_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Distance:
    """How far one set of values is from another; None where either holds NaN or infinity, or where a number is too
    large for one."""

    max_abs: float | None
    mean_abs: float | None
    cosine: float | None


def spread(samples: int, count: int) -> np.ndarray:
    """At most `count` indices, evenly over all samples."""
    return np.linspace(0, samples - 1, min(count, samples)).astype(int)


def real_tokens(values: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Boolean (samples, tokens): what is no padding, in outputs (samples, tokens, ...)."""
    return np.asarray(np.arange(values.shape[1]) < np.asarray(lengths)[:, None])


def decisions(values: np.ndarray, reading: Reading) -> np.ndarray | None:
    """What outputs (samples, ..., classes) decide: the class of the largest logit, or for every label whether its logit
    is above 0 (1 or 0), or, for spans (samples, sequence), the position where an answer begins or ends, of those
    allowed; None for scores, which decide nothing."""
    if reading.output_kind == "span":
        return np.asarray(_among(values, reading.allowed).argmax(-1))
    if reading.output_kind == "sigmoid":
        return np.asarray(values > 0, dtype=int)
    return np.asarray(values.argmax(-1)) if reading.output_kind == "softmax" and values.shape[-1] > 1 else None


def _among(values: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
    return values if allowed is None else np.where(allowed, values, -np.inf)


def margins(expected: np.ndarray, reading: Reading) -> np.ndarray:
    """By how much each decision was taken: errors of up to half of it change none."""
    if reading.output_kind == "span":
        expected = _among(expected, reading.allowed)
        expected = np.concatenate(
            [expected, np.full((len(expected), 1), -np.inf)], axis=1
        )  # a single token has no rival
    if reading.output_kind == "sigmoid":
        return np.asarray(2 * np.abs(expected))
    top = np.partition(expected, -2, axis=-1)
    return np.asarray(top[..., -1] - top[..., -2])


def flips(expected: np.ndarray, actual: np.ndarray, tolerance: float, reading: Reading = Reading()) -> list[Flip]:
    """All changed decisions, the widest margin first. A change is excused where both logits may have moved by
    `tolerance`, towards each other. Padding, 0 on both sides, changes nothing."""
    before, after = decisions(expected, reading), decisions(actual, reading)
    if before is None or after is None:
        return []
    margin = margins(expected, reading)
    made = [
        Flip(
            int(at[0]),
            tuple(int(i) for i in at[1:]),
            int(before[tuple(at)]),
            int(after[tuple(at)]),
            float(margin[tuple(at)]) if np.isfinite(margin[tuple(at)]) else None,
            bool(margin[tuple(at)] <= 2 * tolerance),
        )
        for at in np.argwhere(before != after)
    ]
    return sorted(made, key=lambda flip: -np.inf if flip.margin is None else -flip.margin)


def agreement(expected: np.ndarray, actual: np.ndarray, reading: Reading = Reading()) -> float | None:
    """Share of equal decisions, without those of padding; None for outputs that decide nothing."""
    before, after = decisions(expected, reading), decisions(actual, reading)
    if before is None or after is None:
        return None
    same = before == after
    if reading.lengths is None or reading.output_kind == "span":  # a span has one decision a sample
        return float(same.mean())
    return float(same[real_tokens(expected, reading.lengths)].mean())


def distance(expected: np.ndarray, actual: np.ndarray, lengths: Sequence[int] | None = None) -> Distance:
    """How far `actual` is from `expected`; the mean leaves out what stands behind a sample's length in tokens."""
    if nonfinite_values(expected) or nonfinite_values(actual):
        return Distance(None, None, None)
    error = apart(expected, actual)
    with np.errstate(over="ignore", invalid="ignore"):
        numbers = float(error.max()), mean_of(error, lengths), cosine(expected, actual)
    return Distance(*(number if np.isfinite(number) else None for number in numbers))


def apart(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """|actual - expected| in float64, which holds what float32 values are apart."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.abs(actual.astype(np.float64) - expected.astype(np.float64)))


def mean_of(change: np.ndarray, lengths: Sequence[int] | None) -> float:
    """Mean of a change (samples, ...), without what stands behind a sample's length in tokens."""
    if lengths is None:
        return float(change.mean())
    return float(change.sum() / (sum(lengths) * np.prod(change.shape[2:])))


def nonfinite_values(values: np.ndarray) -> int:
    """How many of `values` are NaN or infinity."""
    return int((~np.isfinite(values)).sum())


def cosine(expected: np.ndarray, actual: np.ndarray) -> float:
    """Cosine of all values of an output; 1.0 where both are all zero, 0.0 where one of them is."""
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    norms = float(np.linalg.norm(expected) * np.linalg.norm(actual))
    return float((expected * actual).sum() / norms) if norms else float(not expected.any() and not actual.any())


def cosines(expected: np.ndarray, actual: np.ndarray) -> np.ndarray:
    """(samples,): cosine of every sample's vector with its counterpart; 1.0 where both are all zero, 0.0 where one of
    them is, NaN stays."""
    expected, actual = expected.astype(np.float64), actual.astype(np.float64)
    lengths = np.linalg.norm(expected, axis=-1) * np.linalg.norm(actual, axis=-1)
    products = (expected * actual).sum(axis=-1)
    alike = ~expected.any(axis=-1) & ~actual.any(axis=-1)
    return np.asarray(np.where(lengths == 0.0, alike, products / np.where(lengths == 0.0, 1.0, lengths)))

"""How far an output may be from its reference, and how far it is: the arithmetic of `engines.parity.compare`, on arrays
alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.parity.decisions import (
    WORST_FLIPS,
    Flip,
    Reading,
    agreement,
    apart,
    distance,
    flips,
    mean_of,
    nonfinite_values,
    spread,
)

# How the reference is made to round as the engine's float type does: float32 it computes in itself; of the shorter
# types, half a unit in the last place of what every module reads and writes. At the inputs of linear layers alone it
# is too little: PyTorch in float16 is 2.4 times as far off (trained MiniLM-L6, not quantized; by hand).
DTYPE_ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Backends whose quantizer rounds before it rounds to a code: OpenVINO computes x * (1/s) + 128 in float32, whose sum
# errs by up to 2**-17 of a code however small the value, where a division errs by 2**-21 at 8 codes. 2**-17 of a code
# is 2**-20 of a value of 8 codes, a usual size; so much is added to the reference's rounding, like that of a float
# type. (Measured: docs/parity.md.)
QUANTIZER_ROUNDING = {"openvino": 2.0**-20}
MAX_FACTOR = 3.0  # several codes may move in one sample
MEAN_FACTOR = 2.0  # rounding noise and engine are two draws of a random quantity, from different implementations
UNCHANGED = 1e-4  # of the largest output: float32 sums stay below, a code that moves does not
UNCHANGED_FACTOR = 4.0  # an engine may move codes in more samples than the rounding noise does, but not in nearly all
UNCHANGED_SAMPLES = (
    20  # fewer are no statistics: were 20 expected, chance alone would leave under 5 once in 60,000 runs
)


@dataclass(frozen=True)
class Expectation:
    """What the reference gives for an output, `values` (samples, ...), and how far it moves: |changes| of some of the
    samples by the rounding of the engine's arithmetic (`rounding_noise`), and where one code of every quantized tensor
    moves by one step (`one_step_shift`). All three are finite."""

    values: np.ndarray
    rounding_noise: np.ndarray
    one_step_shift: np.ndarray

    @property
    def max_tolerance(self) -> float:
        """How far any value may be off."""
        return MAX_FACTOR * float(max(self.rounding_noise.max(), self.one_step_shift.max())) + floor(self.values)


@dataclass(frozen=True)
class OutputParity:
    """One output of an engine against the reference.

    `nonfinite` is the number of its values that are NaN or infinity: with any it failed, and how far it is off
    (`max_abs`, `mean_abs`, `cosine`) is None. `agreement` is the share of equal argmax (None without classes),
    `unchanged_share` the share of samples that are equal to within float32 rounding. A changed class is excused only
    where the reference's own margin is within the tolerance.

    `one_step_shift` is one quantization step as this output shows it: by how much its most sensitive value changes when
    one random code of every quantized tensor of a sample moves by one step, averaged over samples. `max_steps` and
    `mean_steps` are the errors in that unit; all three are None where nothing is quantized.
    """

    output: str
    max_abs: float | None
    mean_abs: float | None
    cosine: float | None
    nonfinite: int
    agreement: float | None
    worst_sample: int
    max_tolerance: float
    mean_tolerance: float
    unexcused_flips: int
    passed: bool
    unchanged_share: float
    unchanged_required: float
    one_step_shift: float | None
    max_steps: float | None
    mean_steps: float | None
    flips: int
    worst_flips: tuple[Flip, ...]

    @property
    def complaint(self) -> str:
        """What is wrong with an output that failed, in numbers."""
        numbers = (
            (
                f"{self.nonfinite} of its values are NaN or infinity"
                if self.nonfinite
                else "no distance to the checkpoint"
            )
            if self.max_abs is None or self.mean_abs is None
            else f"max {self.max_abs:.4g} (tolerated {self.max_tolerance:.4g}), "
            f"mean {self.mean_abs:.4g} (tolerated {self.mean_tolerance:.4g})"
        )
        return (
            f"{numbers}, {self.unchanged_share:.1%} of the samples equal (required {self.unchanged_required:.1%}), "
            f"{self.unexcused_flips} classes changed beyond the tolerance, worst at sample {self.worst_sample}"
        )


def floor(expected: np.ndarray) -> float:
    """What float32 sums may err by."""
    return UNCHANGED * largest(expected)


def largest(values: np.ndarray) -> float:
    """Largest absolute value."""
    return float(np.abs(values).max())


def compare_output(
    name: str, expectation: Expectation, actual: np.ndarray, reading: Reading = Reading(), *, quantized: bool
) -> OutputParity:
    """How far `actual` (samples, ...) is from the expectation, and whether that is tolerated; NaN and infinity never
    are.

    What stands behind a sample's length (see `Reading`) is 0 in all arrays and counts neither for a mean nor as a
    decision.
    """
    expected, lengths, samples = expectation.values, reading.lengths, len(expectation.values)
    error = apart(expected, actual)
    low, tolerated = floor(expected), expectation.max_tolerance
    mean_tolerance = _mean_tolerance(expectation, lengths)
    same, same_noise = unchanged_share(error, low), unchanged_share(expectation.rounding_noise, low)
    required = same_noise / UNCHANGED_FACTOR if same_noise * samples >= UNCHANGED_SAMPLES else 0.0
    changed = flips(expected, actual, tolerated, reading)
    unexcused = sum(not flip.excused for flip in changed)
    off = distance(expected, actual, lengths)
    within = off.max_abs is not None and off.max_abs <= tolerated and same >= required
    within = within and off.mean_abs is not None and off.mean_abs <= mean_tolerance
    unit = _one_step(expectation.one_step_shift) if quantized else 0.0
    return OutputParity(
        output=name,
        max_abs=off.max_abs,
        mean_abs=off.mean_abs,
        cosine=off.cosine,
        nonfinite=nonfinite_values(actual),
        agreement=agreement(expected, actual, reading),
        worst_sample=int(error.reshape(samples, -1).max(axis=1).argmax()),
        max_tolerance=tolerated,
        mean_tolerance=mean_tolerance,
        unexcused_flips=unexcused,
        passed=within and unexcused == 0,
        unchanged_share=same,
        unchanged_required=required,
        one_step_shift=unit or None,
        max_steps=off.max_abs / unit if unit and off.max_abs is not None else None,
        mean_steps=off.mean_abs / unit if unit and off.mean_abs is not None else None,
        flips=len(changed),
        worst_flips=tuple(changed[:WORST_FLIPS]),
    )


def unchanged_share(error: np.ndarray, low: float) -> float:
    """Share of samples whose outputs are all within `low`."""
    return float((error.reshape(len(error), -1) <= low).all(axis=1).mean())


def _mean_tolerance(expectation: Expectation, lengths: Sequence[int] | None) -> float:
    """With few samples, one more of them with a moved code is no surprise: the largest shift counts for one sample."""
    samples, noise = len(expectation.values), expectation.rounding_noise
    noise_lengths = None if lengths is None else [lengths[i] for i in spread(samples, len(noise))]
    one_more = float(expectation.one_step_shift.max()) / samples
    return MEAN_FACTOR * (mean_of(noise, noise_lengths) + one_more) + floor(expectation.values)


def _one_step(one_step_shift: np.ndarray) -> float:
    return float(one_step_shift.reshape(len(one_step_shift), -1).max(axis=1).mean())

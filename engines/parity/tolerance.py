"""How far an output may be from its reference, and how far it is: the arithmetic of `engines.parity.compare`, on arrays alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engines.parity.decisions import WORST_FLIPS, Flip, agreement, cosine, flips, real_tokens, spread

# How the reference is made to round as the engine's float type does: float32 it computes in itself; of the shorter types,
# half a unit in the last place at the input of every linear layer. (Sixteen times more changes nothing: all codes that
# can move already do.)
JITTER = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# Backends whose quantizer rounds before it rounds to a code: OpenVINO computes x * (1/s) + 128 in float32, whose sum errs by
# up to 2**-17 of a code however small the value, where a division errs by 2**-21 at 8 codes. 2**-17 of a code is 2**-20 of a
# value of 8 codes, a usual size; so much is added to the reference's rounding, as JITTER is. (Measured: docs/parity.md.)
QUANTIZER_JITTER = {"openvino": 2.0**-20}
MAX_FACTOR = 3.0  # several codes may move in one sample
MEAN_FACTOR = 2.0  # noise and engine are two draws of a random quantity, from different implementations
QUIET = 1e-4  # of the largest output: float32 sums stay below, a code that moves does not
QUIET_FACTOR = 4.0  # an engine may move codes in more samples than the noise run does, but not in nearly all
QUIET_SAMPLES = 20  # fewer are no statistics: were 20 expected, chance alone would leave under 5 once in 60,000 runs


@dataclass(frozen=True)
class OutputParity:
    """One output of an engine against the reference.

    `agreement` is the share of equal argmax (None without classes), `quiet` the share of samples that are equal to within
    float32 rounding. A changed class is excused only where the reference's own margin is within the tolerance.

    `step` is one quantization step as this output shows it: by how much its most sensitive value changes when one random
    code of every quantized tensor of a sample moves by one step, averaged over samples. `max_steps` and `mean_steps` are
    the errors in that unit; all three are None where nothing is quantized.
    """

    output: str
    max_abs: float
    mean_abs: float
    cosine: float
    agreement: float | None
    worst_sample: int
    max_tolerance: float
    mean_tolerance: float
    unexcused_flips: int
    passed: bool
    quiet: float
    quiet_required: float
    step: float | None
    max_steps: float | None
    mean_steps: float | None
    flips: int
    worst_flips: list[Flip]


def floor(wanted: np.ndarray) -> float:
    """What float32 sums may err by."""
    return QUIET * largest(wanted)


def largest(values: np.ndarray) -> float:
    """Largest absolute value."""
    return float(np.abs(values).max())


def max_tolerance(wanted: np.ndarray, noise: np.ndarray, step: np.ndarray) -> float:
    """How far any value may be off; `noise` and `step` are absolute changes of the reference."""
    return MAX_FACTOR * float(max(noise.max(), step.max())) + floor(wanted)


def compare_output(
    name: str,
    wanted: np.ndarray,
    noise: np.ndarray,
    step: np.ndarray,
    found: np.ndarray,
    quantized: bool,
    *,
    output_kind: str = "softmax",
    lengths: Sequence[int] | None = None,
    allowed: np.ndarray | None = None,
) -> OutputParity:
    """`noise` and `step` are absolute changes of the reference. NaN fails: it is never within a tolerance.

    `output_kind` is the task's. `lengths` are the samples' in tokens where the output has a row for every token: what stands
    behind them is 0 in all four and counts neither for a mean nor as a decision. `allowed` (samples, sequence) are the
    positions of an answer, where the output says where one begins or ends.
    """
    samples = len(wanted)
    real = None if lengths is None else real_tokens(wanted, lengths)
    noise_lengths = None if lengths is None else [lengths[i] for i in spread(samples, len(noise))]
    error = np.abs(found - wanted)
    low = floor(wanted)
    tolerated = max_tolerance(wanted, noise, step)
    # With few samples, one more of them with a moved code is no surprise.
    mean_tolerance = MEAN_FACTOR * (mean_of(noise, noise_lengths) + float(step.max()) / samples) + low
    same, same_noise = quiet(error, low), quiet(noise, low)
    required = same_noise / QUIET_FACTOR if same_noise * samples >= QUIET_SAMPLES else 0.0
    changed = flips(wanted, found, tolerated, output_kind, allowed)
    mean = mean_of(error, lengths)
    unexcused = sum(not flip.excused for flip in changed)
    within = bool(error.max() <= tolerated) and mean <= mean_tolerance and same >= required
    unit = float(step.reshape(len(step), -1).max(axis=1).mean()) if quantized else 0.0
    return OutputParity(
        output=name,
        max_abs=float(error.max()),
        mean_abs=mean,
        cosine=cosine(wanted, found),
        agreement=agreement(wanted, found, output_kind, real, allowed),
        worst_sample=int(error.reshape(samples, -1).max(axis=1).argmax()),
        max_tolerance=tolerated,
        mean_tolerance=mean_tolerance,
        unexcused_flips=unexcused,
        passed=within and unexcused == 0,
        quiet=same,
        quiet_required=required,
        step=unit or None,
        max_steps=float(error.max()) / unit if unit else None,
        mean_steps=mean / unit if unit else None,
        flips=len(changed),
        worst_flips=changed[:WORST_FLIPS],
    )


def mean_of(change: np.ndarray, lengths: Sequence[int] | None) -> float:
    """Mean of a change (samples, ...), without what stands behind a sample's length in tokens."""
    if lengths is None:
        return float(change.mean())
    return float(change.sum() / (sum(lengths) * np.prod(change.shape[2:])))


def quiet(error: np.ndarray, low: float) -> float:
    """Share of samples whose outputs are all within `low`."""
    return float((error.reshape(len(error), -1) <= low).all(axis=1).mean())

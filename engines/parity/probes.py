"""Inputs that data seldom holds and users send: each a named result that passes, fails or does not apply, with the
reason.

*Against the checkpoint*: one token, and the maximum length. *Against itself*: the same sample alone, in a batch, in
another order, with more padding, and beside a row that is all padding; and of an engine that keeps models compiled for
some shapes, samples in each of these and at another shape, which another model runs. *By itself*: no NaN and no
infinity, anywhere.
A row of padding is meaningless to a model (there is nothing to attend to), so it must be finite, and must not touch its
neighbours.

Batches keep to the budget of tokens, so long samples are cut for them; the maximum length runs alone, and does not
apply where this machine has no memory for it.

Tolerances are the outputs' own (see `engines.parity.compare`): a batch of another shape may take another kernel, which
rounds differently and moves a code by a step. Padding that leaks into a sample, or rows that mix, change far more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from engines.base import Engine, Profile
from engines.compiled_shapes import smallest_holding
from engines.parity.decisions import apart, nonfinite_values
from nxm_export.contract.io_spec import IOSpec
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS
from nxm_export.data.features import Features, inputs_of, pad, sample_of
from nxm_export.errors import EngineError

ONE_TOKEN, MAXIMUM = "one token", "maximum length"
BATCH = 8  # samples of the batch probes
# Tokens of one of them at most: all together, and a row of padding, are one batch of the usual budget.
BATCH_LENGTH = MAX_BATCH_TOKENS // (BATCH + 1)
PADDING = 16  # tokens of padding added by the padding probe, where the model has room
Rows = list[dict[str, np.ndarray]]  # outputs by name, of each sample


@dataclass(frozen=True)
class ProbeResult:
    """One probe; `passed` is None where it does not apply. `actual` and `tolerated` are |differences| of an output, or
    a number of values; None where nothing could be measured."""

    name: str
    passed: bool | None
    actual: float | None
    tolerated: float | None
    reason: str

    @property
    def numbers(self) -> str:
        """What was measured, in brackets for the end of a sentence."""
        return "" if self.actual is None else f" (found {self.actual:.4g}, tolerated {self.tolerated:.4g})"


@dataclass(frozen=True)
class Expected:
    """What the checkpoint gives for the samples of the probes, and by how much an engine may differ there, per
    output. `beyond` says why there is no sample of the maximum length."""

    samples: Mapping[str, Features]
    outputs: Mapping[str, Mapping[str, np.ndarray]]
    tolerances: Mapping[str, Mapping[str, float]]
    beyond: str | None = None


@dataclass(frozen=True)
class Loaded:
    """An engine that runs, what its inputs and outputs mean, and the shapes that it was built for."""

    engine: Engine
    spec: IOSpec
    profiles: Sequence[Profile] = ()
    shapes: Sequence[tuple[int, int]] = ()  # that it keeps compiled

    @property
    def longest_sequence(self) -> int:
        """The longest input in tokens that model and engine take."""
        return longest_sequence(self.spec, self.profiles)

    def fits(self, batch: int, sequence: int) -> bool:
        """Whether it takes this shape."""
        return not self.profiles or any(
            p.minimum[0] <= batch and p.minimum[1] <= sequence <= p.maximum[1] for p in self.profiles
        )

    def rows(self, samples: Sequence[Features], length: int) -> Rows:
        """Outputs of each sample of one batch, without what belongs to padding; raises `EngineError` for NaN and
        infinity."""
        outputs = self.engine.run(pad(samples, self.spec.pad_id, length))
        wrong = [name for name, array in outputs.items() if nonfinite_values(array)]
        if wrong:
            raise EngineError(f"NaN or infinity in {', '.join(wrong)}")
        return [
            {name: self._real(name, array[i], len(sample["input_ids"])) for name, array in outputs.items()}
            for i, sample in enumerate(samples)
        ]

    def _real(self, name: str, row: np.ndarray, tokens: int) -> np.ndarray:
        axes = self.spec.outputs[name][1:]
        return row[tuple(slice(tokens) if axis == "sequence" else slice(None) for axis in axes)]


def probe_samples(
    features: Sequence[Features], spec: IOSpec, profiles: Sequence[Profile], *, maximum: bool = True
) -> dict[str, Features]:
    """The samples whose answers are compared with the checkpoint's, by the name of their probe; without `maximum` none
    of the maximum length, which this machine has no memory for."""
    made = {ONE_TOKEN: _cut(features[0], 1)}
    if maximum:
        made[MAXIMUM] = _cut(_longest(features), longest_sequence(spec, profiles))
    return made


def longest_sequence(spec: IOSpec, profiles: Sequence[Profile]) -> int:
    """The longest input in tokens that model and engine take."""
    return min([spec.max_length, *([max(profile.maximum[1] for profile in profiles)] if profiles else [])])


def probe(
    loaded: Loaded, features: Sequence[Features], tolerances: Mapping[str, float], expected: Expected
) -> list[ProbeResult]:
    """Run all probes; `tolerances` are those of the outputs. What an engine refuses to run has failed, with its own
    words."""
    limit = loaded.longest_sequence
    single = {
        ONE_TOKEN: (1, "against the checkpoint"),
        MAXIMUM: (limit, f"{limit} tokens, against the checkpoint"),
    }
    work = {name: partial(_against_checkpoint, loaded, expected, name) for name in single}
    return [
        *(
            ProbeResult(name, None, None, None, expected.beyond)
            if name == MAXIMUM and expected.beyond is not None
            else _judged(loaded, name, [(1, size)], work[name], about)
            for name, (size, about) in single.items()
        ),
        *_batch_probes(loaded, features, tolerances),
        *(_compiled_probe(loaded, features, tolerances, shape) for shape in loaded.shapes),
    ]


def _compiled_probe(
    loaded: Loaded, features: Sequence[Features], tolerances: Mapping[str, float], shape: tuple[int, int]
) -> ProbeResult:
    """Samples in a compiled shape, filled with them, and the same ones at a length that no compiled shape has."""
    batch, sequence = shape
    picks = np.linspace(0, len(features) - 1, batch).astype(int)
    samples = [_cut(features[i], min(len(features[i]["input_ids"]), sequence)) for i in picks]
    longest = max(range(batch), key=lambda row: len(samples[row]["input_ids"]))
    samples[longest] = _cut(samples[longest], sequence)
    other = _uncompiled(loaded, batch, sequence)
    name, about = f"compiled shape {batch}x{sequence}", f"the same samples at {other[0]}x{other[1]}"

    def elsewhere() -> Rows:
        added = [samples[0]] * (other[0] - batch)
        return loaded.rows([*samples, *added], other[1])[:batch]

    return _judged(
        loaded, name, [shape], lambda: _Contrast(loaded.rows(samples, sequence), elsewhere(), tolerances), about
    )


def _uncompiled(loaded: Loaded, batch: int, sequence: int) -> tuple[int, int]:
    """A shape that holds (batch, sequence) and that no compiled shape runs, not even padded: longer where the model
    takes that, of more rows otherwise."""
    longest = loaded.longest_sequence
    longer = ((batch, length) for length in range(sequence + 1, longest + 1))
    larger = ((rows, sequence) for rows in range(batch + 1, 2 * max(shape[0] for shape in loaded.shapes) + 2))
    return next(shape for shape in (*longer, *larger) if smallest_holding(loaded.shapes, *shape) is None)


@dataclass(frozen=True)
class _Contrast:
    """Rows that should be alike, and by how much each output may differ."""

    actual: Rows
    expected: Rows
    tolerances: Mapping[str, float]


def _against_checkpoint(loaded: Loaded, expected: Expected, name: str) -> _Contrast:
    sample = expected.samples[name]
    answers = {key: array[0] for key, array in expected.outputs[name].items()}
    return _Contrast(loaded.rows([sample], len(sample["input_ids"])), [answers], expected.tolerances[name])


def _batch_probes(loaded: Loaded, features: Sequence[Features], tolerances: Mapping[str, float]) -> list[ProbeResult]:
    """The probes of an engine against itself: the same samples, batched otherwise."""
    limit = loaded.longest_sequence
    picks = np.linspace(0, len(features) - 1, min(BATCH, len(features))).astype(int)
    most = min(limit, BATCH_LENGTH)
    samples = [_cut(features[i], min(len(features[i]["input_ids"]), most)) for i in picks]
    length = max(len(sample["input_ids"]) for sample in samples)
    longer = min(length + PADDING, limit)
    zeros = {name: [0] * length for name in loaded.spec.inputs}
    empty = sample_of(zeros | {"input_ids": [loaded.spec.pad_id] * length})

    def together() -> Rows:
        return loaded.rows(samples, length)

    def alone(size: int) -> Rows:
        return [loaded.rows([sample], size)[0] for sample in samples]

    def beside_padding() -> Rows:
        half = (len(samples) + 1) // 2
        mixed = loaded.rows([*samples[:half], empty, *samples[half:]], length)
        return [*mixed[:half], *mixed[half + 1 :]]

    batch, single = (len(samples), length), (1, length)
    room = longer > length
    several = len(samples) > 1
    one = "the data has one sample, which is no batch: compare on more"
    return [
        _judged(
            loaded,
            "all-padding row",
            [batch, (len(samples) + 1, length)],
            lambda: _Contrast(beside_padding(), together(), tolerances),
            "its neighbours with and without it in the batch",
        ),
        _judged(
            loaded,
            "alone as in a batch",
            [single, batch],
            lambda: _Contrast(together(), alone(length), tolerances),
            f"{len(samples)} samples one by one and in one batch, padded alike",
        )
        if several
        else ProbeResult("alone as in a batch", None, None, None, one),
        _judged(
            loaded,
            "permuted batch",
            [batch],
            lambda: _Contrast(loaded.rows(samples[::-1], length)[::-1], together(), tolerances),
            "the same batch in reverse order",
        )
        if several
        else ProbeResult("permuted batch", None, None, None, one),
        _judged(
            loaded,
            "extra padding",
            [single, (1, longer)],
            lambda: _Contrast(alone(longer), alone(length), tolerances),
            f"padded to {longer} tokens instead of {length}",
        )
        if room
        else ProbeResult("extra padding", None, None, None, "no room: the samples are as long as the engine allows"),
    ]


def finite_probe(outputs: Mapping[str, np.ndarray]) -> ProbeResult:
    """NaN and infinity in the outputs of all samples; those in probes are named by the probes."""
    bad = {name: nonfinite_values(array) for name, array in outputs.items()}
    named = ", ".join(f"{count} in {name}" for name, count in bad.items() if count)
    total = sum(bad.values())
    reason = f"NaN or infinity: {named}" if total else "no NaN, no infinity in any output of any sample"
    return ProbeResult("finite outputs", total == 0, float(total), 0.0, reason)


def _judged(
    loaded: Loaded, name: str, shapes: Sequence[tuple[int, int]], work: Callable[[], _Contrast], about: str
) -> ProbeResult:
    """Run a probe's `work` where the engine takes all of its `shapes`; the output that is furthest off decides."""
    outside = [shape for shape in shapes if not loaded.fits(*shape)]
    if outside:
        shown = "x".join(map(str, outside[0]))
        return ProbeResult(name, None, None, None, f"the engine was not built for batch x sequence {shown}")
    try:
        contrast = work()
    except EngineError as error:
        return ProbeResult(name, False, None, None, f"{about}: {error}")
    worst: tuple[float, float, float] = (-1.0, 0.0, 0.0)  # error in tolerances, error, tolerance
    for output, tolerance in contrast.tolerances.items():
        pairs = zip(contrast.actual, contrast.expected, strict=True)
        # NumPy's largest number of some is NaN where one is; Python's hides it behind a number that came first.
        error_ = float(np.max([apart(theirs[output], ours[output]).max() for ours, theirs in pairs]))
        if not np.isfinite((error_, tolerance)).all():
            return ProbeResult(name, False, None, None, f"{about}: {output} is too far off for a number")
        worst = max(worst, (error_ / tolerance if tolerance else np.inf if error_ else 0.0, error_, tolerance))
    _, actual, tolerated = worst
    return ProbeResult(name, actual <= tolerated, actual, tolerated, about)


def _cut(sample: Features, length: int) -> Features:
    """The sample with exactly `length` tokens: cut, or repeated."""
    return sample_of({name: _resized(value, length) for name, value in inputs_of(sample).items()})


def _resized(values: Sequence[int], length: int) -> list[int]:
    return (list(values) * -(-length // len(values)))[:length]


def _longest(features: Sequence[Features]) -> Features:
    return max(features, key=lambda sample: len(sample["input_ids"]))

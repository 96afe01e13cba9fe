"""Inputs that data seldom holds and users send: each a named row that passes, fails or does not apply, with the reason.

*Against the checkpoint*: one token, and the maximum length. *Against itself*: the same sample alone, in a batch, in another
order, with more padding, and beside a row that is all padding. *By itself*: no NaN and no infinity, anywhere. Such a row of
padding is meaningless to a model (there is nothing to attend to), so it must be finite, and must not touch its neighbours.

Tolerances are the outputs' own (see `engines.parity.compare`): a batch of another shape may take another kernel, which rounds
differently and moves a code by a step. Padding that leaks into a sample, or rows that mix, change far more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.base import Engine, Profile
from nxm_export.contract.io_spec import IOSpec
from nxm_export.data.examples import Features, inputs_of, pad
from nxm_export.errors import EngineError

BATCH = 8  # samples of the batch probes
PADDING = 16  # tokens of padding added by the padding probe, where the model has room
Rows = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class Probe:
    """One probe; `passed` is None where it does not apply. `found` and `tolerated` are |differences| of an output, or a
    number of values."""

    name: str
    passed: bool | None
    found: float | None
    tolerated: float | None
    reason: str


@dataclass(frozen=True)
class Expected:
    """What the checkpoint gives for the samples of the probes, and by how much an engine may differ there, per output."""

    samples: Mapping[str, Features]
    outputs: Mapping[str, Mapping[str, np.ndarray]]
    tolerances: Mapping[str, Mapping[str, float]]


def probe_samples(features: Sequence[Features], spec: IOSpec, profiles: Sequence[Profile]) -> dict[str, Features]:
    """The samples whose answers are compared with the checkpoint's, by the name of their probe."""
    longest = longest_sequence(spec, profiles)
    return {"one token": _cut(features[0], 1), "maximum length": _cut(_longest(features), longest)}


def longest_sequence(spec: IOSpec, profiles: Sequence[Profile]) -> int:
    """The longest input in tokens that model and engine take."""
    return min([spec.max_length, *([max(profile.maximum[1] for profile in profiles)] if profiles else [])])


def probe(
    engine: Engine,
    features: Sequence[Features],
    spec: IOSpec,
    profiles: Sequence[Profile],
    tolerances: Mapping[str, float],
    expected: Expected,
) -> list[Probe]:
    """Run all probes; `tolerances` are those of the outputs. What an engine refuses to run has failed, with its own words."""
    desk = _Desk(engine, spec, profiles, tolerances)
    limit = longest_sequence(spec, profiles)
    picks = np.linspace(0, len(features) - 1, min(BATCH, len(features))).astype(int)
    samples = [_cut(features[i], min(len(features[i]["input_ids"]), limit)) for i in picks]
    length = max(len(sample["input_ids"]) for sample in samples)
    longer = min(length + PADDING, limit)
    empty = {name: [0] * length for name in spec.inputs} | {"input_ids": [spec.pad_id] * length}

    def alone(size: int) -> Rows:
        return [desk.rows([sample], size)[0] for sample in samples]

    def against(name: str) -> tuple[Rows, Rows, Mapping[str, float]]:
        sample = expected.samples[name]
        wanted = {key: array[0] for key, array in expected.outputs[name].items()}
        return desk.rows([sample], len(sample["input_ids"])), [wanted], expected.tolerances[name]

    def padding_row() -> tuple[Rows, Rows, Mapping[str, float]]:
        half = (len(samples) + 1) // 2
        mixed = desk.rows([*samples[:half], empty, *samples[half:]], length)
        return [*mixed[:half], *mixed[half + 1 :]], desk.rows(samples, length), tolerances

    batch, single = (len(samples), length), (1, length)
    return [
        desk.compare("one token", [(1, 1)], lambda: against("one token"), "against the checkpoint"),
        desk.compare(
            "maximum length", [(1, limit)], lambda: against("maximum length"), f"{limit} tokens, against the checkpoint"
        ),
        desk.compare(
            "all-padding row",
            [batch, (len(samples) + 1, length)],
            padding_row,
            "its neighbours with and without it in the batch",
        ),
        desk.compare(
            "alone as in a batch",
            [single, batch],
            lambda: (desk.rows(samples, length), alone(length), tolerances),
            f"{len(samples)} samples one by one and in one batch, padded alike",
        ),
        desk.compare(
            "permuted batch",
            [batch],
            lambda: (desk.rows(samples[::-1], length)[::-1], desk.rows(samples, length), tolerances),
            "the same batch in reverse order",
        ),
        desk.compare(
            "extra padding",
            [single, (1, longer)],
            lambda: (alone(longer), alone(length), tolerances),
            f"padded to {longer} tokens instead of {length}"
            if longer > length
            else "no room: the samples are as long as the engine allows",
            applies=longer > length,
        ),
    ]


def finite_probe(found: Mapping[str, np.ndarray]) -> Probe:
    """NaN and infinity in the outputs of all samples; those in probes are named by the probes."""
    bad = {name: int((~np.isfinite(array)).sum()) for name, array in found.items()}
    named = ", ".join(f"{count} in {name}" for name, count in bad.items() if count)
    total = sum(bad.values())
    reason = f"NaN or infinity: {named}" if total else "no NaN, no infinity in any output of any sample"
    return Probe("finite outputs", total == 0, float(total), 0.0, reason)


@dataclass(frozen=True)
class _Desk:
    engine: Engine
    spec: IOSpec
    profiles: Sequence[Profile]
    tolerances: Mapping[str, float]

    def rows(self, samples: Sequence[Features], length: int) -> Rows:
        """Outputs of each sample of one batch, without what belongs to padding; raises `EngineError` for NaN and infinity."""
        outputs = self.engine.run(pad([inputs_of(sample) for sample in samples], self.spec.pad_id, length))
        wrong = [name for name, array in outputs.items() if not np.isfinite(array).all()]
        if wrong:
            raise EngineError(f"NaN or infinity in {', '.join(wrong)}")
        return [
            {name: self._real(name, array[i], len(sample["input_ids"])) for name, array in outputs.items()}
            for i, sample in enumerate(samples)
        ]

    def _real(self, name: str, row: np.ndarray, tokens: int) -> np.ndarray:
        axes = self.spec.outputs[name][1:]
        return row[tuple(slice(tokens) if axis == "sequence" else slice(None) for axis in axes)]

    def compare(
        self,
        name: str,
        shapes: Sequence[tuple[int, int]],
        work: Callable[[], tuple[Rows, Rows, Mapping[str, float]]],
        what: str,
        *,
        applies: bool = True,
    ) -> Probe:
        if not applies:
            return Probe(name, None, None, None, what)
        outside = [shape for shape in shapes if not self._fits(*shape)]
        if outside:
            shown = "x".join(map(str, outside[0]))
            return Probe(name, None, None, None, f"the engine was not built for batch x sequence {shown}")
        try:
            ours, wanted, tolerances = work()
        except EngineError as error:
            return Probe(name, False, None, None, f"{what}: {error}")
        worst: tuple[float, float, float] = (-1.0, 0.0, 0.0)
        for output, tolerance in tolerances.items():
            error_ = max(float(np.abs(a[output] - b[output]).max()) for a, b in zip(ours, wanted, strict=True))
            worst = max(worst, (error_ / tolerance if tolerance else float(error_ > 0) * np.inf, error_, tolerance))
        _, found, tolerated = worst
        return Probe(name, found <= tolerated, found, tolerated, what)

    def _fits(self, batch: int, sequence: int) -> bool:
        return not self.profiles or any(
            p.minimum[0] <= batch and p.minimum[1] <= sequence <= p.maximum[1] for p in self.profiles
        )


def _cut(sample: Features, length: int) -> Features:
    """The sample with exactly `length` tokens: cut, or repeated."""
    return {name: _resized(value, length) for name, value in inputs_of(sample).items()}


def _resized(values: Sequence[Any], length: int) -> list[Any]:
    return (list(values) * -(-length // len(values)))[:length]


def _longest(features: Sequence[Features]) -> Features:
    return max(features, key=lambda sample: len(sample["input_ids"]))

"""The session of an engine for a server that knows optimization levels alone.

An engine is built, compared and timed without some optimizers of ONNX Runtime (`engines.ort.backend.LEFT_OUT`), and
its passport names them. Triton's onnxruntime backend cannot leave single ones out: its configuration has a level. With
all optimizers it runs another session than the proven one, slower and with other last bits. The basic level has none of
the slow ones, and the graph of an engine holds its integer products and its attention already, so little is missing.
Which level gives the same answers is tried, here, with the engine itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.ort.backend import ENGINE_FILE, INTEGER_PRODUCTS, left_out, open_session, operators
from engines.passport import EnginePassport
from nxm_export.contract.io_spec import IOSpec
from nxm_export.errors import EngineError, EngineUnavailable

ALL, BASIC = "all", "basic"  # optimization levels of ONNX Runtime; all is its default
_SHAPES = ((1, 5), (3, 17), (4, 64))  # (batch, sequence) that are tried, sequences as far as the model goes


@dataclass(frozen=True)
class SessionLevel:
    """The level that comes closest to the proven session.

    `difference` is the largest of any output on random input, 0 for bit for bit; None where nothing was tried, for the
    reason `untried`. `integer_products` are (proven session, this one).
    """

    level: str
    difference: float | None
    integer_products: tuple[int, int] | None
    untried: str | None = None

    @property
    def words(self) -> str:
        """How it stands to the proven session."""
        if self.difference is None:
            return f"not compared with the proven one: {self.untried}"
        proven, here = self.integer_products or (0, 0)
        if proven != here:
            return (
                f"{here} products on integers, {proven} in the proven one; outputs differ by up to {self.difference:g}"
            )
        if self.difference:
            return f"outputs differ from those of the proven one by up to {self.difference:g}"
        return "outputs are those of the proven one, bit for bit"


def closest_level(directory: Path, passport: EnginePassport, spec: IOSpec, *, kind: str = "cpu") -> SessionLevel:
    """The level at which ONNX Runtime runs an engine directory as it was proven, or most nearly so.

    Engines are proven on the CPU, and a `kind` of instances other than ``cpu`` runs them by other kernels.
    """
    if kind != "cpu":
        return SessionLevel(BASIC, None, None, f"it ran on the CPU, and instances of {kind} run other kernels")
    if not left_out(passport):
        return SessionLevel(ALL, None, None, "both have every optimizer, so that nothing was tried")
    if any(binding.shape[:1] != (-1,) for binding in passport.tensors("inputs")):
        return SessionLevel(BASIC, None, None, "its batch is fixed, and Triton takes no such engine")
    try:
        tried = [_tried(directory, passport, spec, level) for level in (BASIC, ALL)]
    except EngineUnavailable:
        return SessionLevel(BASIC, None, None, "ONNX Runtime does not run here")
    return min(tried, key=_distance)


def _distance(tried: SessionLevel) -> tuple[int, float]:
    """Integer products that run in float weigh more than any difference of outputs."""
    proven, here = tried.integer_products or (0, 0)
    return abs(proven - here), float("inf") if tried.difference is None else tried.difference


def _tried(directory: Path, passport: EnginePassport, spec: IOSpec, level: str) -> SessionLevel:
    file = directory / ENGINE_FILE
    data = passport.read_engine(directory, passport.requires)
    proven = open_session(file, 1, left_out(passport), model=data)
    other = open_session(file, 1, model=data, level=level)
    generator, largest = np.random.default_rng(0), 0.0
    for batch, sequence in _SHAPES:
        try:
            feeds = _feeds(passport, spec, batch, sequence, generator)
            outputs = proven.run(None, feeds), other.run(None, feeds)
        except Exception as error:  # onnxruntime raises its own types, which are no stable API
            raise EngineError(
                f"{directory}: the engine does not run with the inputs that its passport names: {error}; build it again"
            ) from error
        for ours, theirs in zip(*outputs, strict=True):
            gap = float(np.abs(ours - theirs).max())
            if not np.isfinite(gap):  # no number is larger than NaN, so it would pass for no difference
                raise EngineError(f"{directory}: the engine gives numbers that are not finite at the level {level!r}")
            largest = max(largest, gap)
    counts = tuple(
        sum(counted.get(operator, 0) for operator in INTEGER_PRODUCTS)
        for counted in (operators(file, passport), operators(file, passport, level=level))
    )
    return SessionLevel(level, largest, (counts[0], counts[1]))


def _feeds(
    passport: EnginePassport, spec: IOSpec, batch: int, sequence: int, generator: np.random.Generator
) -> dict[str, np.ndarray]:
    feeds = {}
    for binding in passport.tensors("inputs"):
        shape = (batch, *(min(sequence, spec.max_length) if size < 0 else size for size in binding.shape[1:]))
        is_mask = binding.name == "attention_mask"
        values = np.ones(shape) if is_mask else generator.integers(0, spec.limits.get(binding.name, 2), shape)
        feeds[binding.name] = values.astype(binding.dtype)
    return feeds

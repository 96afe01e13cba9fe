"""Inputs made up for an engine: what timing, measuring and a first run feed it.

The first axis of an input is the batch where its size is free, and every other free axis is as long as the sequence.
Fixed sizes stay as they are, so an engine may take one batch or one length alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engines.base import Binding
from nxm_export.errors import EngineError


def shape_at(binding: Binding, batch: int, sequence: int) -> tuple[int, ...]:
    """The shape of an input at a batch and a sequence length."""
    return tuple(size if size >= 0 else sequence if axis else batch for axis, size in enumerate(binding.shape))


def nearest_shape(inputs: Sequence[Binding], batch: int, sequence: int) -> tuple[int, int]:
    """What the inputs can have of a batch and a sequence length: where no input leaves a size free it is the first
    input's own, and 1 where that has no such axis."""
    first = inputs[0].shape if inputs else ()
    if not any(binding.shape and binding.shape[0] < 0 for binding in inputs):
        batch = first[0] if first else 1
    if not any(size < 0 for binding in inputs for size in binding.shape[1:]):
        sequence = first[1] if len(first) > 1 else 1
    return batch, sequence


def require_shape(inputs: Sequence[Binding], batch: int, sequence: int) -> None:
    """Raise `EngineError` where the inputs cannot have this batch and sequence length."""
    nearest = nearest_shape(inputs, batch, sequence)
    if nearest != (batch, sequence):
        raise EngineError(
            f"the engine does not take {batch}x{sequence} (batch x sequence): its inputs are "
            f"{', '.join(map(str, inputs))}; give {nearest[0]}x{nearest[1]}"
        )


def sample_feeds(
    inputs: Sequence[Binding], batch: int, sequence: int, vocabulary: int | None, seed: int = 0
) -> dict[str, np.ndarray]:
    """Values for every input: random token ids below `vocabulary` (all 1 where it is None: nobody knows how many there
    are), no padding, ones for other integers, and normal random numbers for floats.

    Integers are int64 where the input takes any two sizes, as `engines.base.require_feeds` asks. Raises `EngineError`
    for a type that has no values here.
    """
    random = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for binding in inputs:
        shape, dtype = shape_at(binding, batch, sequence), _dtype(binding)
        if dtype.kind == "f":
            feeds[binding.name] = random.standard_normal(shape).astype(dtype)
        elif binding.name == "input_ids" and vocabulary is not None:
            feeds[binding.name] = random.integers(min(5, vocabulary - 1), vocabulary, size=shape).astype(np.int64)
        else:
            value = 0 if binding.name == "token_type_ids" else 1
            feeds[binding.name] = np.full(shape, value, np.int64 if binding.is_tokens else dtype)
    return feeds


def _dtype(binding: Binding) -> np.dtype[np.generic]:
    try:
        dtype: np.dtype[np.generic] = np.dtype(binding.dtype)
    except TypeError:
        dtype = np.dtype(np.object_)
    if dtype.kind not in "biuf":
        raise EngineError(f"cannot make up values for the input {binding}")
    return dtype

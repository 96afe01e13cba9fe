"""Shapes known ahead: an engine can keep models that were compiled for a few shapes beside the one that takes any.

A runtime that knows all sizes plans its memory and chooses its kernels once, when it loads; the model of free sizes
does some of that whenever the shape changes. So a run takes the compiled shape of just its sizes, or the smallest that
holds them with little padding (`smallest_holding`), and the free model otherwise. Rows and tokens are added as servers
add them: tokens with the padding id and a mask of 0, rows as copies of the first. Outputs are cut back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from engines.base import Binding
from engines.sample_inputs import require_shape, shape_at
from nxm_export.contract.io_spec import IOSpec
from nxm_export.errors import EngineError

Shape = tuple[int, int]  # batch, sequence
# Padding of a run at most: so many tokens, or this part of the compiled shape where that is more. A change of the shape
# costs the free model about as much as they do (docs/research-notes.md).
PADDED_TOKENS, PADDED_PART = 8, 8


def smallest_holding(shapes: Iterable[Shape], rows: int, length: int) -> Shape | None:
    """The smallest of `shapes` that holds (rows, length) with bounded padding; None: there is none."""
    holding = [shape for shape in shapes if _holds(shape, rows, length)]
    return min(holding, key=lambda shape: shape[0] * shape[1], default=None)


def _holds(shape: Shape, rows: int, length: int) -> bool:
    tokens = shape[0] * shape[1]
    padding = tokens - rows * length
    return rows <= shape[0] and length <= shape[1] and padding <= max(PADDED_TOKENS, tokens // PADDED_PART)


def shapes_to_compile(shapes: Iterable[Shape], inputs: Sequence[Binding], spec: IOSpec | None) -> tuple[Shape, ...]:
    """Each of `shapes` once, without those whose sizes the inputs have fixed already: these are compiled as they stand.

    Raises `EngineError` for a shape that the inputs cannot have, and for one that is longer than the model.
    """
    chosen = tuple(dict.fromkeys(shapes))
    for batch, sequence in chosen:
        require_shape(inputs, batch, sequence)
        if spec is not None and sequence > spec.max_length:
            raise EngineError(
                f"the shape {batch}x{sequence} is longer than the model's {spec.max_length} tokens; "
                f"take {batch}x{spec.max_length} at most"
            )
    free = any(size < 0 for binding in inputs for size in binding.shape)
    return chosen if free else ()


def shapes_of_lengths(lengths: Sequence[int], edges: Sequence[int], count: int) -> tuple[Shape, ...]:
    """At most `count` shapes of one row, of the lengths `edges`, that run as many tokens of texts of `lengths` as
    they can, chosen one after the other."""
    left, chosen = Counter(lengths), list[Shape]()
    while len(chosen) < count:
        gains = {
            edge: sum(length * number for length, number in left.items() if _holds((1, edge), 1, length))
            for edge in edges
        }
        best = max(gains, key=lambda edge: gains[edge], default=0)
        if not best or not gains[best]:
            break
        chosen.append((1, best))
        left = Counter({length: number for length, number in left.items() if not _holds((1, best), 1, length)})
    return tuple(sorted(chosen))


def exact_shape(shapes: Iterable[Shape], inputs: Sequence[Binding], feeds: Mapping[str, np.ndarray]) -> Shape | None:
    """The one of `shapes` at which `inputs` have just the sizes of `feeds`; None: there is none."""
    for shape in shapes:
        if all(feeds[binding.name].shape == shape_at(binding, *shape) for binding in inputs):
            return shape
    return None


def padding_values(inputs: Sequence[Binding], spec: IOSpec | None, outputs: Iterable[str]) -> dict[str, int] | None:
    """What padding is made of, by input; None where an engine cannot be padded: its inputs are not all tokens of any
    shape with a mask, or nobody says which axes of its outputs to cut."""
    tokens = all(binding.is_tokens and binding.shape == (-1, -1) for binding in inputs)
    names = [binding.name for binding in inputs]
    if spec is None or not tokens or "attention_mask" not in names:
        return None
    if not all("batch" in spec.outputs.get(name, ()) for name in outputs):
        return None
    return {name: spec.pad_id if name == "input_ids" else 0 for name in names}


def padded(feeds: Mapping[str, np.ndarray], shape: Shape, pads: Mapping[str, int]) -> dict[str, np.ndarray]:
    """`feeds` of (rows, length) in the larger `shape`; added rows are copies of the first, which stay finite."""
    made = {}
    for name, array in feeds.items():
        rows, length = array.shape
        made[name] = np.full(shape, pads[name], array.dtype)
        made[name][:rows, :length] = array
        made[name][rows:] = made[name][0]
    return made


def cut(array: np.ndarray, axes: Sequence[str], rows: int, length: int) -> np.ndarray:
    """A copy of an output without what belongs to padding."""
    sizes = {"batch": rows, "sequence": length}
    return array[tuple(slice(sizes.get(axis)) for axis in axes)].copy()

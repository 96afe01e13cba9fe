"""Few shapes for many: a run is padded to a shape that others come to, too, since a CUDA graph holds one shape alone.

Without it a server's batches, of any number of rows, would hardly ever come in a shape that was captured, and graphs
would push each other out. Four steps to an octave add a sixth to runs of mixed sizes; the sizes that people measure
(powers of two, half as much again, the lengths of a server) stay as they are. How rows and tokens are added,
`engines.compiled_shapes` says.
"""

from __future__ import annotations

from bisect import bisect_left

from engines.compiled_shapes import Shape
from engines.serving.shapes import usual_lengths


def graph_shape(rows: int, length: int, longest: int) -> Shape:
    """The shape (batch, sequence) that runs `rows` of `length` tokens, of a model that takes up to `longest`."""
    lengths = usual_lengths(longest)
    return _stepped(rows), lengths[bisect_left(lengths, length)]


def _stepped(rows: int) -> int:
    """1, 2 ... 8, 10, 12, 14, 16, 20 ...: four steps to every octave."""
    step = 1 << max(0, (rows - 1).bit_length() - 3)
    return -(-rows // step) * step

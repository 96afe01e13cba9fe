"""Optimization profiles: the ranges of shapes that a TensorRT engine is tuned for, by default or from the user's
lengths.

Every sequence is padded to the profile that holds it, at worst to that profile's maximum; few profiles waste work on
padding, many waste memory and build time. Given a histogram of lengths, `choose_buckets` finds the boundaries that
waste least, exactly, by dynamic programming over the multiples of `STEP`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.base import Binding, Profile, spec_of
from engines.sample_inputs import nearest_shape
from nxm_export.contract.plain_numbers import size_of
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS, rows_within
from nxm_export.errors import EngineError

if TYPE_CHECKING:
    import onnx_ir as ir

STEP = 16  # tokens; INT8 kernels work on tiles of 16 or 32 rows
FIRST_LENGTH, FIRST_BEST = 512, (8, 128)  # the longest sequence of the first profile, and the shape it is tuned for
UNKNOWN_LENGTH = 512  # tokens that a model takes whose graph has no spec beside it


def default_profiles(max_length: int, batch_tokens: int = MAX_BATCH_TOKENS) -> tuple[Profile, ...]:
    """Profiles that together take every length up to `max_length`, each as many rows of its longest as `batch_tokens`
    hold (`nxm_export.contract.token_budget`).

    The first, for up to 512 tokens, is tuned for 8 sequences of 128. Those of longer models go to four times the
    length of the one before, and are tuned for a quarter of their rows at half their length.
    """
    lengths = [min(FIRST_LENGTH, max_length)]
    while lengths[-1] < max_length:
        lengths.append(min(4 * lengths[-1], max_length))
    profiles = []
    for at, length in enumerate(lengths):
        rows = rows_within(length, batch_tokens)
        best = FIRST_BEST if at == 0 else (max(1, rows // 4), length // 2)
        profiles.append(Profile((1, 1), (min(best[0], rows), min(best[1], length)), (rows, length)))
    return tuple(profiles)


def choose_buckets(lengths: Iterable[int], count: int, max_length: int) -> list[int]:
    """At most `count` rising boundaries (multiples of `STEP`, the last one holds the longest) that minimise the sum
    over samples of boundary minus length."""
    histogram = Counter(lengths)
    if not histogram or count < 1:
        raise EngineError("choosing profiles needs at least one length and one profile")
    if min(histogram) < 1 or max(histogram) > max_length:
        raise EngineError(
            f"lengths run from {min(histogram)} to {max(histogram)} tokens, and the model takes 1 to {max_length}; "
            "truncate them"
        )
    edges = sorted({min(max_length, -(-length // STEP) * STEP) for length in histogram})
    at = [sum(n for length, n in histogram.items() if length <= edge) for edge in edges]  # samples up to each edge
    # After b buckets: padded[j] are the least padded tokens when edge j closes the last of them, and origin[j] is the
    # edge that closes the one before it.
    padded = [float(samples * edge) for samples, edge in zip(at, edges, strict=True)]
    origins = [[-1] * len(edges)]
    total, chosen = padded[-1], 0
    for _ in range(1, min(count, len(edges))):
        longer, origin = [float("inf")] * len(edges), [-1] * len(edges)
        for j in range(len(edges)):
            for i in range(j):
                tokens = padded[i] + (at[j] - at[i]) * edges[j]
                if tokens < longer[j]:
                    longer[j], origin[j] = tokens, i
        padded = longer
        origins.append(origin)
        if padded[-1] < total:
            total, chosen = padded[-1], len(origins) - 1
    picked, j = [], len(edges) - 1
    for level in range(chosen, -1, -1):
        picked.append(edges[j])
        j = origins[level][j]
    return picked[::-1]


def profiles_from_lengths(
    lengths: Sequence[int], max_length: int, *, count: int = 3, batch_tokens: int = MAX_BATCH_TOKENS
) -> list[Profile]:
    """One profile per bucket of the histogram, each for any shape up to the bucket's boundary and tuned for a full one:
    as many rows as `batch_tokens` hold.

    A last profile holds everything up to `max_length` where the data's longest is shorter, so that no input is refused.
    """
    buckets = choose_buckets(lengths, count, max_length)
    if buckets[-1] < max_length:
        buckets.append(max_length)
    full = [(rows_within(edge, batch_tokens), edge) for edge in buckets]
    return [Profile((1, 1), shape, shape) for shape in full]


def parse_profile(text: str) -> Profile:
    """The profile of ``8x128`` (best; everything below runs) or of ``1x1,8x128,32x512`` (minimum, optimum,
    maximum)."""
    shapes = [[size_of(side) for side in part.lower().split("x")] for part in text.split(",")]
    pairs = [(shape[0], shape[1]) for shape in shapes if len(shape) == 2 and shape[0] and shape[1]]
    if len(pairs) != len(shapes) or len(pairs) not in (1, 3):
        raise EngineError(
            f"not a profile: {text!r:.80}; write batch x sequence as 8x128, or minimum, optimum, maximum as "
            "1x1,8x128,32x512"
        )
    return Profile(*pairs) if len(pairs) == 3 else Profile((1, 1), pairs[0], pairs[0])


def profiles_for(
    given: Sequence[Profile],
    directory: Path,
    inputs: Sequence[Binding],
    batch_tokens: int = MAX_BATCH_TOKENS,
) -> tuple[Profile, ...]:
    """The profiles to build for: those `given`, or `default_profiles` for everything that the model of a graph
    directory takes; with the batch or the length that the graph's `inputs` have fixed.

    Raises `EngineError` for a given one that is longer than the model, or without the size that is fixed.
    """
    empty = next((binding for binding in inputs if 0 in binding.shape), None)
    if empty is not None:
        raise EngineError(f"the graph's input {empty} has a size of 0: there is nothing to build")
    spec = spec_of(directory)
    if given and spec:
        require_positions(given, spec.max_length)
    for profile in given:
        _require_fixed(profile, inputs)
    profiles = given or _defaults(spec.max_length if spec else UNKNOWN_LENGTH, inputs, batch_tokens)
    fitted = (
        Profile(*(nearest_shape(inputs, *shape) for shape in (profile.minimum, profile.optimum, profile.maximum)))
        for profile in profiles
    )
    return tuple(dict.fromkeys(fitted))


def _defaults(max_length: int, inputs: Sequence[Binding], batch_tokens: int) -> tuple[Profile, ...]:
    """The default profiles of a graph; one alone where it has fixed the length, with the rows that this allows."""
    _, fixed = nearest_shape(inputs, 0, 0)
    return default_profiles(fixed, batch_tokens)[-1:] if fixed else default_profiles(max_length, batch_tokens)


def _require_fixed(profile: Profile, inputs: Sequence[Binding]) -> None:
    """Raise `EngineError` where `profile` leaves out the batch or length that is fixed."""
    fixed = nearest_shape(inputs, 0, 0)  # 0 where it is free
    for name, size, low, high in zip(("batch", "sequence"), fixed, profile.minimum, profile.maximum, strict=True):
        if size and not low <= size <= high:
            raise EngineError(
                f"a profile has {name} {low} to {high}, and the graph takes {size} alone: its inputs are "
                f"{', '.join(map(str, inputs))}"
            )


def graph_inputs(model: ir.Model) -> tuple[Binding, ...]:
    """The inputs of a graph that no initializer stands for; a size that is not a number is free."""
    bindings = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        dtype = value.dtype.name.lower() if value.dtype is not None else "unknown"
        sizes = () if value.shape is None else tuple(size if isinstance(size, int) else -1 for size in value.shape)
        bindings.append(Binding(value.name or "", {"float": "float32", "double": "float64"}.get(dtype, dtype), sizes))
    return tuple(bindings)


def require_positions(profiles: Sequence[Profile], max_length: int) -> None:
    """Raise `EngineError` for a profile that is longer than what the model takes."""
    for profile in profiles:
        if profile.maximum[1] > max_length:
            raise EngineError(
                f"a profile goes to {profile.maximum[1]} tokens, and the model takes at most {max_length}; "
                "lower its maximum"
            )


def pick(profiles: Sequence[Profile], batch: int, sequence: int) -> int | None:
    """Index of the profile that holds the shape and is the shortest, then of the fewest rows; None when none does."""
    fits = [
        (profile.maximum[1], profile.maximum[0], index)
        for index, profile in enumerate(profiles)
        if profile.minimum[0] <= batch <= profile.maximum[0] and profile.minimum[1] <= sequence <= profile.maximum[1]
    ]
    return min(fits)[-1] if fits else None

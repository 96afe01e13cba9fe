"""Length buckets: the few sequence lengths that a server runs, so that requests of about one length share a batch.

A batch is a rectangle, and padding is computed like text: in a batch of mixed lengths the short ones pay for the long
ones. So only requests of one bucket are batched, and buckets grow with the length, which bounds the padding at a fifth
of a row of more than 16 tokens. A batch has as many rows as a budget of tokens holds: a long document is not joined by
as many others as a sentence is. An engine that was built for profiles gets only buckets that fit into one of them, and
every batch is padded to its bucket: TensorRT prefers few different shapes. An engine without profiles takes any shape,
so its batches are as long as their longest request. Where it keeps models compiled for some shapes, their lengths are
buckets, too: what a bucket holds then nearly fills that shape, and the engine pads it (`engines.compiled_shapes`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from engines.base import Profile
from nxm_export.contract.token_budget import MAX_BATCH_TOKENS, rows_within
from nxm_export.errors import RequestRefused, ServeError


@dataclass(frozen=True)
class Bucket:
    """Sequences of up to `length` tokens (`fixed`: padded to just that), run as batches of `least` to `most` rows."""

    length: int
    least: int
    most: int
    fixed: bool = False


@dataclass(frozen=True)
class Buckets:
    """The buckets of an engine, by rising length."""

    buckets: tuple[Bucket, ...]

    @property
    def longest(self) -> Bucket:
        """The bucket of the longest sequences."""
        return self.buckets[-1]

    @property
    def most(self) -> int:
        """Rows of the largest request that fits into any bucket."""
        return max(bucket.most for bucket in self.buckets)

    def index(self, rows: int, length: int) -> int:
        """Index of the first bucket for a request of this shape; raises `RequestRefused` (400) when none has room."""
        if length > self.longest.length:
            raise RequestRefused(
                400, f"a sequence of {length} tokens is longer than the {self.longest.length} that this engine takes"
            )
        first = bisect_left(self.buckets, length, key=lambda bucket: bucket.length)
        for i in range(first, len(self.buckets)):
            if rows <= self.buckets[i].most:
                return i
        most = max(bucket.most for bucket in self.buckets[first:])
        raise RequestRefused(
            400, f"a batch of {rows} rows of {length} tokens is larger than the {most} that are served; split it"
        )


def plan_buckets(
    max_length: int,
    max_batch: int,
    profiles: Sequence[Profile],
    lengths: Sequence[int] | None = None,
    *,
    max_batch_tokens: int = MAX_BATCH_TOKENS,
    compiled: Sequence[tuple[int, int]] = (),
) -> Buckets:
    """The buckets of an engine: of `lengths` (by default `usual_lengths`, and those of its `compiled` shapes), those
    that its `profiles` have room for, with at most `max_batch` rows and `max_batch_tokens` (or the least batch of its
    profile).

    The longest length that fits is always a bucket, so nothing that the engine can run is refused. Raises `ServeError`
    when `lengths` are no lengths of this engine.
    """
    longest = min(max_length, max((p.maximum[1] for p in profiles), default=max_length))
    usual = {*usual_lengths(longest), *(length for _, length in compiled if length <= longest)}
    requested = sorted({*(usual if lengths is None else lengths), longest})
    if requested[0] < 1 or requested[-1] > longest:
        raise ServeError(f"--buckets must be lengths from 1 to {longest}, the longest that this engine takes")
    buckets = []
    for length in requested:
        rows = rows_within(length, max_batch_tokens, max_batch)
        if not profiles:
            buckets.append(Bucket(length, 1, rows))
            continue
        fitting = [p for p in profiles if p.minimum[1] <= length <= p.maximum[1] and p.minimum[0] <= max_batch]
        if fitting:
            best = max(fitting, key=lambda p: p.maximum[0])
            least = best.minimum[0]
            buckets.append(Bucket(length, least, max(least, min(rows, best.maximum[0])), fixed=True))
    if not buckets:
        raise ServeError(f"no profile of the engine takes batches of {max_batch} rows or less; raise --max-batch")
    return Buckets(tuple(buckets))


def usual_lengths(longest: int) -> list[int]:
    """4, 8, 12 ... 32, 40, 48 ... 64, 80, 96 ... 128, 160 ...: steps of 4 up to 32 tokens, doubling with every
    octave."""
    lengths, length, rise = [], 0, 4
    while length < longest:
        length = min(length + rise, longest)
        lengths.append(length)
        if length >= 8 * rise:
            rise *= 2
    return lengths

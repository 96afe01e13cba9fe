"""A run is padded a little to a shape that others come to, too, and not at all where people measure."""

from __future__ import annotations

import itertools

import pytest

from engines.cusparselt.executor import MOST_SHAPES
from engines.cusparselt.graph_shapes import graph_shape


def test_padding_is_bounded_and_a_sixth_of_mixed_sizes() -> None:
    sizes = [*itertools.product(range(1, 129), range(9, 513))]
    ran = [graph_shape(*size, 512) for size in sizes]
    assert all(rows >= r and length >= n for (rows, length), (r, n) in zip(ran, sizes, strict=True))
    assert all(
        4 * rows <= 5 * r + 3 and 4 * length <= 5 * n + 12 for (rows, length), (r, n) in zip(ran, sizes, strict=True)
    )
    padded = sum(rows * length for rows, length in ran) / sum(rows * length for rows, length in sizes)
    assert padded < 7 / 6
    assert {graph_shape(*shape, 512) for shape in ran} == {*ran}, "what is padded is not padded again"


@pytest.mark.parametrize("shape", [(1, 8), (1, 32), (8, 128), (32, 128), (32, 384), (128, 384), (24, 96), (6, 512)])
def test_shapes_of_measurements_stay_as_they_are(shape: tuple[int, int]) -> None:
    assert graph_shape(*shape, 512) == shape


def test_the_longest_input_is_no_longer() -> None:
    assert graph_shape(3, 50, 50) == (3, 50)
    assert graph_shape(3, 49, 50) == (3, 50)


def test_a_server_of_short_texts_keeps_a_graph_for_every_shape() -> None:
    assert len({graph_shape(*size, 64) for size in itertools.product(range(1, 17), range(1, 49))}) <= 140
    assert len({graph_shape(*size, 64) for size in itertools.product(range(1, 9), range(9, 49))}) <= MOST_SHAPES

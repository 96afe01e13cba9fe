"""Which compiled shape runs some feeds, and what is added and cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.base import MOST_SHAPES, Binding, BuildOptions
from engines.compiled_shapes import (
    cut,
    exact_shape,
    padded,
    padding_values,
    shapes_of_lengths,
    shapes_to_compile,
    smallest_holding,
)
from nxm_export.contract.io_spec import IOSpec
from nxm_export.errors import EngineError

TOKENS = tuple(Binding(name, "int64", (-1, -1)) for name in ("input_ids", "attention_mask"))
SPEC = IOSpec("bert", "embedding", ("input_ids", "attention_mask"), {"vector": ("batch", "hidden")}, (), 64, 7)
sizes = st.tuples(st.integers(1, 40), st.integers(1, 300))


@given(st.lists(sizes, max_size=8), sizes)
def test_the_smallest_shape_with_little_padding_is_taken(shapes: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    rows, length = asked
    allowed = {
        (batch, sequence)
        for batch, sequence in shapes
        if batch >= rows
        and sequence >= length
        and (batch * sequence - rows * length <= 8 or 8 * (batch * sequence - rows * length) <= batch * sequence)
    }
    chosen = smallest_holding(shapes, rows, length)
    assert (chosen is None) == (not allowed)
    if chosen is not None:
        assert chosen in allowed
        assert chosen[0] * chosen[1] == min(batch * sequence for batch, sequence in allowed)
        assert chosen == asked or asked not in shapes


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 3), st.integers(0, 4))
def test_what_is_padded_is_cut_back_and_masked(rows: int, length: int, more_rows: int, more_tokens: int) -> None:
    ids = np.arange(1, rows * length + 1, dtype=np.int64).reshape(rows, length)
    shape = (rows + more_rows, length + more_tokens)
    made = padded({"input_ids": ids, "attention_mask": np.ones_like(ids)}, shape, {"input_ids": 7, "attention_mask": 0})
    assert made["input_ids"].shape == shape
    np.testing.assert_array_equal(made["input_ids"][:rows, :length], ids)
    assert (made["input_ids"][:, length:] == 7).all()
    assert not made["attention_mask"][:, length:].any()
    for array in made.values():
        assert (array[rows:] == array[0]).all()
    np.testing.assert_array_equal(cut(made["input_ids"], ("batch", "sequence"), rows, length), ids)
    assert cut(np.zeros((*shape, 3)), ("batch", "sequence", "tags"), rows, length).shape == (rows, length, 3)
    assert cut(np.zeros((shape[0], 50)), ("batch", "hidden"), rows, length).shape == (rows, 50)


def test_shapes_are_taken_once_and_none_of_what_the_inputs_have_fixed() -> None:
    assert shapes_to_compile([(1, 32), (8, 16), (1, 32)], TOKENS, SPEC) == ((1, 32), (8, 16))
    one = (Binding("input_ids", "int64", (1, -1)),)
    assert shapes_to_compile([(1, 32)], one, None) == ((1, 32),)
    assert shapes_to_compile([(2, 8)], (Binding("input_ids", "int64", (2, 8)),), SPEC) == ()


@pytest.mark.parametrize(
    ("shape", "inputs", "message"),
    [
        ((1, 65), TOKENS, "longer than the model's 64 tokens; take 1x64"),
        ((2, 32), (Binding("input_ids", "int64", (1, -1)),), "does not take 2x32 .* give 1x32"),
        ((2, 9), (Binding("input_ids", "int64", (2, 8)),), "does not take 2x9 .* give 2x8"),
    ],
)
def test_a_shape_that_the_model_cannot_have_is_refused(
    shape: tuple[int, int], inputs: tuple[Binding, ...], message: str
) -> None:
    with pytest.raises(EngineError, match=message):
        shapes_to_compile([shape], inputs, SPEC)


def test_a_build_is_told_of_shapes_that_hold_nothing_and_of_too_many() -> None:
    with pytest.raises(EngineError, match="the shape 0x8 holds nothing"):
        BuildOptions(shapes=[(1, 8), (0, 8)])
    with pytest.raises(EngineError, match=f"300 shapes were given, and an engine keeps {MOST_SHAPES} compiled at most"):
        BuildOptions(shapes=[(1, length) for length in range(1, 301)])
    BuildOptions(shapes=[(1, 8)] * 300)  # one that is given often is one


def test_only_tokens_with_a_mask_and_outputs_with_known_axes_are_padded() -> None:
    assert padding_values(TOKENS, SPEC, ["vector"]) == {"input_ids": 7, "attention_mask": 0}
    assert padding_values(TOKENS, None, ["vector"]) is None
    assert padding_values(TOKENS, SPEC, ["vector", "another"]) is None
    assert padding_values(TOKENS[:1], SPEC, ["vector"]) is None
    assert padding_values((*TOKENS, Binding("pixels", "float32", (-1, 3))), SPEC, ["vector"]) is None


def test_other_inputs_take_a_shape_of_just_their_sizes() -> None:
    inputs = (Binding("x", "float32", (-1, 4)), Binding("y", "float32", (-1, -1)), Binding("scale", "float32", ()))
    feeds = {"x": np.zeros((2, 4)), "y": np.zeros((2, 9)), "scale": np.zeros(())}
    assert exact_shape([(1, 9), (2, 9)], inputs, feeds) == (2, 9)
    assert exact_shape([(2, 10), (3, 9)], inputs, feeds) is None


def test_the_shapes_of_data_run_most_of_its_tokens() -> None:
    lengths = [30] * 50 + [12] * 10 + [60] * 5 + [100]
    edges = [12, 16, 32, 64, 128]
    assert shapes_of_lengths(lengths, edges, 1) == ((1, 32),)
    assert shapes_of_lengths(lengths, edges, 2) == ((1, 32), (1, 64))
    assert shapes_of_lengths(lengths, edges, 9) == ((1, 12), (1, 32), (1, 64))  # 100 nearly fills none
    assert shapes_of_lengths([], edges, 3) == ()

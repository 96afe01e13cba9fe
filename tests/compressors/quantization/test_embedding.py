"""The grid of the INT8 word-embedding table, and the module that trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from compressors.models import load_model, resolve
from compressors.quantization.embedding import QuantEmbedding, quant_embeddings, row_codes
from compressors.quantization.prepare_bake import bake, prepare
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import TASKS
from tests.support import tiny
from tests.support.variants import variants

SMALLEST = np.finfo(np.float32).smallest_normal
# Rows of any size that training could leave, and all the odd ones: zeros, subnormal numbers, one value among zeros.
ROWS = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 9)),
    elements=st.floats(-(2.0**100), 2.0**100, width=32)
    | st.floats(-(2.0**-126), 2.0**-126, width=32)
    | st.sampled_from([0.0, 1.0]),
)


def by_definition(row: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """(codes, scale) of one row, in float64 but for the scale."""
    scale = max(np.float32(np.abs(row).max() / np.float32(127)), SMALLEST)
    return np.clip(np.rint((row / scale).astype(np.float64)), -127, 127), scale


class TestGrid:
    @given(ROWS)
    def test_codes_and_scales_are_those_of_the_definition_and_come_back_from_the_rounded_table(self, rows: Any) -> None:
        codes, scales = (tensor.numpy() for tensor in row_codes(torch.from_numpy(rows)))
        for row, actual, scale in zip(rows, codes, scales, strict=True):
            expected, expected_scale = by_definition(row)
            np.testing.assert_array_equal(actual, expected)
            assert scale == expected_scale
        assert (scales >= SMALLEST).all()
        assert np.isfinite(scales).all()
        assert not np.signbit(codes[codes == 0]).any()
        np.testing.assert_array_equal(np.rint(codes * scales / scales), codes)
        # half a step, and the rounding of the product: as near as the grid allows
        assert (np.abs(codes * scales - rows) <= scales * np.float32(0.5 + 1e-4)).all()

    @pytest.mark.parametrize("row", [[0.0] * 4, [-0.0] * 4, [1e-45, -1e-45, 0.0, 0.0], [3e-39, -1e-40, 0.0, 0.0]])
    def test_a_row_without_a_normal_number_has_codes_0_and_a_scale(self, row: list[float]) -> None:
        codes, scales = row_codes(torch.tensor([row]))
        assert codes.tolist() == [[0.0] * 4]
        assert scales.item() == SMALLEST

    def test_a_row_of_one_value_has_it_as_its_largest_code(self) -> None:
        codes, scales = row_codes(torch.diag(torch.tensor([0.3, -7.0, 1e-20])))
        assert codes.tolist() == [[127, 0, 0], [0, -127, 0], [0, 0, 127]]
        torch.testing.assert_close((codes * scales).diag(), torch.tensor([0.3, -7.0, 1e-20]), rtol=1e-6, atol=0)


class TestModule:
    def test_rows_are_those_of_the_rounded_table_and_the_gradient_that_of_a_plain_one(self) -> None:
        torch.manual_seed(0)
        plain = nn.Embedding(11, 6, padding_idx=2)
        rounded = QuantEmbedding(nn.Embedding(11, 6, padding_idx=2), "x.weight")
        rounded.weight = nn.Parameter(plain.weight.detach().clone())
        ids, upstream = torch.tensor([[1, 2, 3], [3, 3, 10]]), torch.randn(2, 3, 6)
        codes, scales = row_codes(plain.weight.detach())
        actual = rounded(ids)
        assert torch.equal(actual, (codes * scales)[ids])
        for rows in (actual, plain(ids)):
            (rows * upstream).sum().backward()
        assert plain.weight.grad is not None
        assert rounded.weight.grad is not None
        assert torch.equal(rounded.weight.grad, plain.weight.grad)
        assert not rounded.weight.grad[2].any()  # padding is not trained
        rounded.rounds = False
        assert torch.equal(rounded(ids), plain(ids))

    @pytest.mark.parametrize("family", variants(FAMILIES, tiny.SHORT))
    def test_baking_puts_a_plain_table_with_the_very_rows_that_training_saw(self, family: str, tmp_path: Path) -> None:
        source = resolve(tiny.write_model(family, tmp_path, head="classification"))
        plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"), embedding="int8")
        model: Any = load_model(source, TASKS["classification"])
        before = model.get_parameter(source.family.word_embedding).detach().clone()
        assert tuple(before.shape) == source.family.word_embedding_shape(source.config)
        prepare(model, plan, source.family, source.config)
        assert len(quant_embeddings(model)) == 1
        ids = torch.arange(len(before))[None]
        rows = model.get_input_embeddings()(ids)
        scales = bake(model, plan)
        assert type(model.get_input_embeddings()) is nn.Embedding
        assert torch.equal(model.get_input_embeddings()(ids), rows)
        codes, expected = row_codes(before)
        np.testing.assert_array_equal(scales[f"{source.family.word_embedding}_scale"], expected[:, 0].numpy())
        assert torch.equal(rows[0].detach(), codes * expected)
        assert not torch.equal(rows[0].detach(), before)

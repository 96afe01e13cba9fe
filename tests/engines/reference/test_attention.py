"""Attention in blocks of queries is attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.reference import attention, pytorch
from nxm_export.contract.families import FAMILIES
from tests.support import baked, tiny


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
    """(rows, length, heads, features), every score at once."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
    if added is not None:
        scores = scores + added
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value)


@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (3, 3, 17, 5))),
    scores=st.integers(1, 400),
    masked=st.sampled_from(["no", "boolean", "added"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_blocks_of_queries_give_what_all_at_once_give(
    sizes: tuple[int, int, int, int], scores: int, masked: str, seed: int
) -> None:
    rows, heads, length, features = sizes
    torch.manual_seed(seed)
    query, key, value = torch.randn(3, rows, length, heads, features, dtype=torch.float64).transpose(2, 3)
    allowed = torch.rand(rows, 1, length, length) < 0.7
    allowed[..., 0] = True  # a query that sees nothing has no attention
    added = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)
    mask = {"no": None, "boolean": allowed, "added": added}[masked]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES", scores)
        actual, _ = attention.blocked_attention(torch.nn.Module(), query, key, value, mask)
    expected = plain(query, key, value, None if mask is None else added)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (3, 3, 17, 5))),
    scores=st.integers(1, 400),
    window=st.integers(0, 5),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_keys_outside_of_windows_are_left_out_and_change_nothing(
    sizes: tuple[int, int, int, int], scores: int, window: int, dtype: torch.dtype, seed: int
) -> None:
    """Rows of all lengths: a query of padding, which may see no key at all, reads them all alike."""
    rows, heads, length, features = sizes
    torch.manual_seed(seed)
    query, key, value = torch.randn(3, rows, length, heads, features, dtype=dtype).transpose(2, 3)
    at = torch.arange(length)
    real = at[None] < torch.randint(1, length + 1, (rows, 1))
    allowed = ((at[:, None] - at[None]).abs() <= window) & real[:, None, None, :]
    widths: list[int] = []

    def watched(probabilities: torch.Tensor) -> torch.Tensor:
        widths.append(probabilities.shape[-1])
        return probabilities

    module = torch.nn.Module()
    attention.change_operands(module, {attention.PROBABILITIES: watched})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SCORES", scores)
        actual, _ = attention.blocked_attention(module, query, key, value, allowed)
    added = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
    expected = plain(query, key, value, added)
    seen = allowed.any(-1)[:, 0, :, None, None]
    mean = value.mean(2)[:, None].expand(expected.shape)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual, torch.where(seen, expected, mean), rtol=tolerance, atol=tolerance)
    step = min(length, max(1, scores // (rows * heads * length)))
    if real.all():
        assert max(widths) <= step + 2 * window


def feeds(inputs: Sequence[str], length: int) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(0).integers(5, 20, (3, length))
    given = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    given["attention_mask"][1, length // 2 :] = 0
    return {name: given.get(name, np.zeros_like(ids)) for name in inputs}


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if FAMILIES[name].attention.interface])
def test_the_reference_of_every_family_runs_in_blocks(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny.write_model(family, tmp_path / "model", head="classification")
    blocks: list[int] = []

    def counted(module: torch.nn.Module, query: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, None]:
        blocks.append(query.shape[2] // max(1, attention.SCORES // (query.shape[0] * query.shape[1] * query.shape[2])))
        return whole(module, query, *rest, **options)

    whole: Callable[..., tuple[torch.Tensor, None]] = attention.blocked_attention
    monkeypatch.setattr(attention, "blocked_attention", counted)
    outputs = []
    for scores in (2**22, 3 * tiny.HEADS * 23 * 4):  # all queries at once, four at once
        monkeypatch.setattr(attention, "SCORES", scores)
        with pytorch.load(directory, task="classification", exact=True) as engine:
            outputs.append(engine.run(feeds(engine.inputs, 23))["logits"])
    assert blocks == [0] * tiny.LAYERS + [5] * tiny.LAYERS
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=0, atol=1e-7)  # float32 of what float64 computed


def test_references_that_are_loaded_together_quantize_their_own_probabilities() -> None:
    """The function is registered once for all of them; what it does to probabilities belongs to each."""
    query = key = value = torch.ones(1, 1, 2, 1)
    models = [torch.nn.Linear(1, 1) for _ in range(3)]
    for model, factor in zip(models, (2.0, 3.0), strict=False):
        change = partial(torch.mul, factor)
        attention.change_operands(model, {attention.PROBABILITIES: change})
    results = [attention.blocked_attention(model, query, key, value, None)[0] for model in models]
    assert [float(result[0, 0, 0, 0]) for result in results] == [2.0, 3.0, 1.0]


def test_a_module_that_attends_by_itself_multiplies_quantized_probabilities(tmp_path: Path) -> None:
    path = baked.write_checkpoint("mpnet", tmp_path / "c", attention="int8", placement="products")
    read: list[torch.Tensor] = []
    with pytorch.load(path, task="classification", exact=True) as engine:
        model = engine._opened()
        dropout = model.get_submodule("mpnet.encoder.layer.0.attention.attn.dropout")
        dropout.register_forward_hook(lambda module, args, output: read.append(args[0]))
        engine.run(feeds(engine.inputs, 9))
    codes = 127 * read[0].numpy()
    np.testing.assert_allclose(codes, codes.round(), rtol=0, atol=1e-6)  # the scale is the float32 next to 1 / 127
    assert len(np.unique(codes.round())) > 1

"""Channel permutation against enumeration, and exact for every family."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from compressors.models import load_model, resolve
from compressors.projections import magnitude_scores
from compressors.pruning.layer_inputs import second_moments
from compressors.pruning.permutation import (
    channel_order,
    permute_channels,
    permute_residual,
    require_unchanged,
    residual_order,
    retained_sum,
)
from compressors.quantization.fake_quant import quant_linears
from compressors.quantization.prepare_bake import calibrate, prepare
from compressors.training.phases import Job
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.config_values import size_of
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, read_metrics
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import PlanError
from tests.support import tiny
from tests.support.random_tensors import randn
from tests.support.variants import variants

PATTERNS = [NMPattern(2, 4), NMPattern(1, 4), NMPattern(4, 8), NMPattern(1, 2)]


def answers(model: Any) -> Any:
    """Outputs with hidden states, on the same tokens every time."""
    ids = torch.randint(5, len(tiny.WORDS), (4, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_order_is_a_permutation_that_keeps_more(pattern: NMPattern) -> None:
    scores = randn(24, 64).abs() * (1 + torch.arange(64) % 5)
    order = channel_order(scores, pattern)
    assert sorted(order.tolist()) == list(range(64))
    assert retained_sum(scores[:, order], pattern) > 1.01 * retained_sum(scores, pattern)
    assert torch.equal(order, channel_order(scores, pattern))


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_gain_of_every_swap_is_what_swapping_gains(pattern: NMPattern) -> None:
    """After enough rounds no swap of two channels is left that keeps more by over a ten-thousandth, tried one by
    one."""
    scores = randn(12, 16, seed=3).abs()
    order = channel_order(scores, pattern, rounds=200)
    retained = float(retained_sum(scores[:, order], pattern))
    for i, j in itertools.combinations(range(16), 2):
        swapped = order.clone()
        swapped[[i, j]] = order[[j, i]]
        assert float(retained_sum(scores[:, swapped], pattern)) <= retained * (1 + 1.01e-4)  # where the search stops


def test_the_search_comes_close_to_the_best_of_all_orders() -> None:
    ratios = []
    for seed in range(12):
        scores = randn(6, 8, seed=seed).abs()
        best = max(
            float(retained_sum(scores[:, [*group, *(c for c in range(8) if c not in group)]], NMPattern(2, 4)))
            for group in itertools.combinations(range(8), 4)
        )
        ratios.append(float(retained_sum(scores[:, channel_order(scores, NMPattern(2, 4))], NMPattern(2, 4))) / best)
    assert sum(ratios) / len(ratios) > 0.99  # a local optimum of swaps; mean over 12 matrices
    assert max(ratios) <= 1 + 1e-6


@pytest.mark.parametrize("family", variants(FAMILIES, tiny.SHORT))
def test_permuting_changes_no_output_and_no_hidden_state(family: str, tmp_path: Path) -> None:
    source = resolve(tiny.write_model(family, tmp_path / "model", head="classification"))
    before, after = (load_model(source, TASKS["classification"]).eval() for _ in range(2))
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W4"))
    gains = permute_channels(after, plan, source.family, source.config)
    assert gains
    assert all(now > was for was, now in gains.values())
    expected, actual = answers(before), answers(after)
    # Sums over the same products in another order: float32 rounding.
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    for one, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_heads_too_small_for_the_pattern_are_left_alone(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="classification"))  # 8 channels a head
    model = load_model(source, TASKS["classification"])
    plan = source.family.uniform_plan(source.config, WeightSpec(NMPattern(2, 16), 4, 8))
    assert all("attention" not in name for name in permute_channels(model, plan, source.family, source.config))


def test_a_compression_with_both_options_gives_a_valid_checkpoint(tmp_path: Path) -> None:
    checkpoint = tiny.compress_tiny(
        "bert", tmp_path, dense_steps=4, settings={"recipe": "nxm", "permute": True, "mask_scores": "activation"}
    )
    open_checkpoint(checkpoint).require_valid()
    metrics = read_metrics(checkpoint)
    assert isinstance(metrics, CompressionMetrics)
    assert metrics.permutation is not None
    assert metrics.permutation.matrices == 12
    assert metrics.permutation.retained_after > metrics.permutation.retained_before


def test_a_run_that_permutes_gives_its_teacher_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states are compared, channel by channel: the dense student and its teacher must have them in one order."""
    before: list[Any] = []
    gaps: list[float] = []

    def watched(student: Any, phase: Any, data: Any, *, teacher: Any, **_: Any) -> None:
        dense = load_model(before[0], TASKS["classification"]).eval()
        expected, actual = answers(dense).hidden_states[1], answers(teacher.eval()).hidden_states[1]
        assert not torch.allclose(actual, expected, atol=1e-3)  # it was reordered
        ours = answers(student.eval()).hidden_states[1]
        gaps.extend(float((ours - other).abs().mean()) for other in (actual, expected))

    def remembered(source: Any, *arguments: Any) -> Any:
        before.append(source)
        return Job(source, *arguments)

    monkeypatch.setattr("compressors.training.phases.run_phase", watched)
    monkeypatch.setattr("compressors.training.compress.Job", remembered)
    tiny.compress_tiny("bert", tmp_path, dense_steps=4, settings={"permute": True, "recipe": "magnitude"})
    to_teacher, to_dense = gaps
    assert to_teacher < to_dense / 5  # what pruning and quantizing changed, against another order of the channels


@pytest.mark.parametrize("family", variants(FAMILIES, tiny.SHORT))
def test_another_order_of_the_residual_stream_changes_no_output(family: str, tmp_path: Path) -> None:
    source = resolve(tiny.write_model(family, tmp_path / "model", head="classification"))
    before, after = (load_model(source, TASKS["classification"]).eval() for _ in range(2))
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W4"))
    order, shares = residual_order(after, plan, source.family, source.config)
    assert order.tolist() != sorted(order.tolist())
    assert {source.family.linear(name).reads for name in shares} == {"block", "ffn"}
    was, now = (sum(shares) for shares in zip(*shares.values(), strict=True))
    assert now > was  # all readers together: one of them may lose
    permute_residual(after, order, source.family, source.config)
    expected, actual = answers(before), answers(after)
    # Sums over the same products in another order: float32 rounding.
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    for one, other in zip(actual.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other[..., order], rtol=0, atol=1e-5)


def test_another_function_is_refused_and_rounding_is_not() -> None:
    family, outputs = FAMILIES["bert"], torch.linspace(-2.0, 2.0, 12).reshape(4, 3)
    require_unchanged(outputs, outputs + 1e-6, family)
    for other in (outputs + 0.01, torch.full_like(outputs, torch.nan)):
        with pytest.raises(PlanError, match="--permute changes what this bert model computes"):
            require_unchanged(outputs, other, family)


def test_a_head_as_wide_as_the_model_keeps_its_order(tmp_path: Path) -> None:
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="classification"))
    hidden = size_of(source.config, "hidden_size")
    model = load_model(source, TASKS["classification"], classes=[str(i) for i in range(hidden)])
    with pytest.raises(PlanError, match="cannot be permuted"):
        permute_residual(model, torch.arange(hidden), source.family, source.config)


@pytest.mark.parametrize("scores", ["magnitude", "activation"])
def test_prepared_layers_move_with_their_steps_and_importance(scores: str, tmp_path: Path) -> None:
    """Permuting a prepared model is permuting a plain one: the same outputs while nothing is pruned."""
    source = resolve(tiny.write_model("bert", tmp_path / "model", head="classification"))
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"), placement="inputs")
    model = load_model(source, TASKS["classification"]).eval()
    prepare(model, plan, source.family, source.config)
    ids = torch.randint(5, len(tiny.WORDS), (4, 11), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    calibrate(model, [batch], 99.99)
    layers = quant_linears(model)
    if scores == "activation":
        for name, moment in second_moments(model, layers, [batch], diagonal=True).items():
            layers[name].importance = moment.sqrt()
    before = {name: magnitude_scores(layer.weight.detach(), layer.importance).sum() for name, layer in layers.items()}
    with torch.no_grad():
        expected = model(**batch).logits
        shares = permute_channels(model, plan, source.family, source.config)
        order, residual_shares = residual_order(model, plan, source.family, source.config)
        permute_residual(model, order, source.family, source.config)
        actual = model(**batch).logits
    # Codes are the same integers in another order; a sum over them rounds differently.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    for name, layer in layers.items():
        after = magnitude_scores(layer.weight.detach(), layer.importance)
        torch.testing.assert_close(after.sum(), before[name])  # each weight still has the importance of its own input
    for name, (was, now) in (shares | residual_shares).items():
        scores_now = magnitude_scores(layers[name].weight.detach(), layers[name].importance)
        assert float(retained_sum(scores_now, NMPattern(2, 4)) / scores_now.sum()) == pytest.approx(now, rel=1e-5)
        assert was <= now or name in residual_shares

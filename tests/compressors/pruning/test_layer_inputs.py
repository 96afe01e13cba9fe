"""Second moments against sums written out, one sentence at a time, and what is said where there are none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compressors.models import load_model
from compressors.pruning.layer_inputs import by_block, count_with_tokens, require_enough_tokens, second_moments
from compressors.pruning.layerwise import metrics
from nxm_export.contract.tasks import task_named
from nxm_export.data.features import Features
from nxm_export.errors import DataError
from tests.support import tiny
from tests.support.memory import PeakOfLiveBytes
from tests.support.probing import Probed, probed


def layers_of(opened: Probed) -> dict[str, nn.Linear]:
    return {weight: opened.probe.layer(weight) for weight in opened.probe.weights}


@torch.no_grad()
def slow_moments(opened: Probed, count: int) -> dict[str, Tensor]:
    """One sentence after the other, so without padding; every run of a layer counts."""
    model = load_model(opened.source, task_named("classification")).eval()
    sums = {weight: torch.zeros(()).double() for weight in opened.probe.weights}
    rows = dict.fromkeys(sums, 0)

    def count_in(weight: str, x: Tensor) -> None:
        values = x[0].double()
        sums[weight], rows[weight] = sums[weight] + values.T @ values, rows[weight] + len(values)

    for weight in sums:
        model.get_submodule(weight.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, weight=weight: count_in(weight, args[0])
        )
    for batch in opened.batches(0, count, batch_size=1):
        model(**{name: value for name, value in batch.items() if name != "labels"})
    return {weight: total / rows[weight] for weight, total in sums.items()}


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
def test_moments_are_those_of_sentences_without_padding(tmp_path: Path, family: str) -> None:
    opened = probed(tmp_path, family)
    expected, layers = slow_moments(opened, 20), layers_of(opened)
    batches = opened.batches(0, 20)
    assert any(not bool(batch["attention_mask"].all()) for batch in batches), "there is padding to leave out"
    found: dict[str, Tensor] = {}
    for block in by_block(layers, opened.probe.blocks):
        found |= second_moments(opened.probe.model, block, batches)
    assert list(found) == list(layers)
    for weight, moment in found.items():
        torch.testing.assert_close(moment.double(), expected[weight], rtol=1e-4, atol=1e-5)  # float32 sums
    for weight, moment in second_moments(opened.probe.model, layers, batches, diagonal=True).items():
        torch.testing.assert_close(moment.double(), expected[weight].diagonal(), rtol=1e-4, atol=1e-5)
    query, key, value, output, *_ = layers
    assert found[query] is found[key] is found[value] is not found[output]
    assert not any(module._forward_pre_hooks for module in opened.probe.model.modules())


def test_samples_run_no_further_than_the_layers_that_are_asked_for(tmp_path: Path) -> None:
    opened = probed(tmp_path)
    first, *_ = by_block(layers_of(opened), opened.probe.blocks)
    runs: list[str] = []
    opened.probe.model.get_submodule(opened.probe.blocks[1]).register_forward_hook(lambda *_: runs.append("block 1"))
    second_moments(opened.probe.model, first, opened.batches(0, 24))
    assert runs == ["block 1"], "the first batch tells how often layers run, and the others stop there"


def test_memory_is_that_of_one_block(tmp_path: Path) -> None:
    blocks, wide = 8, 512
    opened = probed(tmp_path, layers=blocks, intermediate=wide)
    batches = opened.batches(0, 8)
    with PeakOfLiveBytes() as measured:
        for block in by_block(layers_of(opened), opened.probe.blocks):
            for _, metric in metrics(second_moments(opened.probe.model, block, batches)):
                assert len(metric.h) > 0
    # One block's sum, its mean and what is added to it; all blocks' would be eight by themselves.
    assert 1 <= measured.peak // (wide * wide * 4) < blocks


class Ward(nn.Module):
    """A model with a layer that no text reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.used, self.unused = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.as_tensor(self.used(self.table(input_ids)))


def ids(real: list[int]) -> dict[str, Tensor]:
    return {"input_ids": torch.arange(4).reshape(1, 4), "attention_mask": torch.tensor([real])}


def test_a_layer_that_never_runs_is_named() -> None:
    model = Ward()
    with pytest.raises(DataError, match=r"unused.weight never runs .*--keep-dense 'unused.weight'"):
        second_moments(model, {"used.weight": model.used, "unused.weight": model.unused}, [ids([1, 1, 1, 1])])


@pytest.mark.parametrize("batches", [[], [ids([0, 0, 0, 0])]], ids=["no batch", "padding alone"])
def test_no_token_is_no_calibration(batches: list[dict[str, Tensor]]) -> None:
    model = Ward()
    with pytest.raises(DataError, match="no token that is not padding"):
        second_moments(model, {"used.weight": model.used}, batches)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_name_the_layer_that_reads_them(value: float, diagonal: bool) -> None:
    model = Ward()
    with torch.no_grad():
        model.table.weight[2, 1] = value
    layers = {"used.weight": model.used}
    with pytest.raises(DataError, match=r"used.weight reads NaN or infinite values on the calibration texts"):
        second_moments(model, layers, [ids([1, 1, 1, 1])], diagonal=diagonal)
    second_moments(model, layers, [ids([1, 1, 0, 1])], diagonal=diagonal)  # of padding nothing is asked


def test_too_little_text_is_refused_with_how_much_is_needed(tmp_path: Path) -> None:
    opened = probed(tmp_path, intermediate=128)
    widths = {weight: layer.in_features for weight, layer in layers_of(opened).items()}
    few = opened.features[:4]
    tokens = sum(len(sample["input_ids"]) for sample in few)
    assert tokens < 128
    needed = math.ceil(128 * 4 / tokens * 20 / 19)  # of twenty texts training holds one out
    said = rf"have {tokens} tokens, .*output.dense.weight reads 128 .* about {needed} different texts .*read: 4\)"
    for samples in (few, few * 100):  # what is read again tells nothing new of a layer's inputs
        with pytest.raises(DataError, match=said):
            require_enough_tokens(widths, samples)
    require_enough_tokens(widths, opened.features[: 2 * needed])
    assert tiny.HIDDEN < 128


def test_a_text_that_comes_again_brings_no_tokens() -> None:
    samples: list[Features] = [{"input_ids": [1, text, 2]} for text in (7, 7, 8, 7, 9, 9)]
    assert [count_with_tokens(samples, tokens) for tokens in (0, 1, 3, 4, 6, 7, 9, 10)] == [0, 1, 1, 3, 3, 5, 5, 6]
    assert count_with_tokens([], 5) == 0

"""The mean loss that is watched in training does not depend on how samples are batched."""

import math

import pytest
import torch
import transformers

from compressors.training.trainer import mean_loss
from nxm_export.data.features import Features
from nxm_export.data.token_labels import NO_LABEL


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    config.num_labels = 3
    made: torch.nn.Module = transformers.BertForTokenClassification(config)
    return made.eval()


def sample(length: int, labels: int) -> Features:
    """So many tokens, the first few of which have a label."""
    return {
        "input_ids": [5 + length] * length,
        "attention_mask": [1] * length,
        "labels": [i % 3 if i < labels else NO_LABEL for i in range(length)],
    }


def test_every_label_counts_alike_whatever_batch_it_is_in(model: torch.nn.Module) -> None:
    features = [sample(12, 1), sample(9, 9), sample(4, 0), sample(3, 2)]
    one, apart, pairs = (mean_loss(model, features, 0, batch_size=size) for size in (4, 1, 2))
    assert apart == pytest.approx(one, rel=1e-5)
    assert pairs == pytest.approx(one, rel=1e-5)


def test_of_no_label_it_is_no_number(model: torch.nn.Module) -> None:
    assert math.isnan(mean_loss(model, [sample(4, 0)], 0))

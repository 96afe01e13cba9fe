"""The average of the weights over a phase: by the formula, and saved in place of the last ones."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

from compressors.settings import Settings
from compressors.training.trainer import Phase, PhaseData, run_phase
from nxm_export.data.features import Features
from nxm_export.errors import DataError


class Model(nn.Module):
    """Classes of a bag of tokens; one of its weights is not trained."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(8, 2, generator=generator))
        self.bias = nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, input_ids: Tensor, labels: Tensor, **_: object) -> SimpleNamespace:
        logits = self.weight[input_ids].sum(1) + self.bias
        return SimpleNamespace(logits=logits, loss=functional.cross_entropy(logits, labels))


class Watch(TrainerCallback):
    """Keeps the weights as they are after every step."""

    def __init__(self, model: Model) -> None:
        self.model, self.seen = model, [model.weight.detach().clone()]

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seen.append(self.model.weight.detach().clone())


def averaged(seen: list[Tensor], decay: float) -> Tensor:
    """The average of a list of weights, without the first, which no step has made: of the first few, the plain mean."""
    count = math.floor(1 / (1 - decay) + 1e-9)
    average = torch.stack(seen[1 : 1 + count]).double().mean(dim=0)
    for weights in seen[1 + count :]:
        average = decay * average + (1 - decay) * weights.double()
    return average


@pytest.mark.parametrize(
    ("steps", "share", "decay"), [(20, 0.25, 0.8), (20, 1.0, 0.95), (20, 0.0, 0.0), (4, 0.125, 0.0)]
)
def test_a_phase_leaves_the_average_of_its_steps(tmp_path: Path, steps: int, share: float, decay: float) -> None:
    """A share of less than one step, and none, leave the weights of the last step."""
    samples: list[Features] = [
        {"input_ids": [i % 8, (3 * i) % 8], "attention_mask": [1, 1], "labels": i % 2} for i in range(32)
    ]
    model = Model()
    watch = Watch(model)
    run_phase(
        model,
        Phase("qat", steps, 0.1, batch_size=4, average=share),
        PhaseData(samples, 0, tmp_path, seed=0),
        callbacks=[watch],
    )
    assert len(watch.seen) == steps + 1
    expected = averaged(watch.seen, decay)
    torch.testing.assert_close(model.weight.double(), expected, rtol=1e-6, atol=1e-6)  # sums in float32
    assert torch.equal(model.weight, watch.seen[-1]) == (decay == 0)
    assert torch.equal(model.frozen, torch.ones(3))

    again = Model()
    run_phase(again, Phase("qat", steps, 0.1, batch_size=4, average=share), PhaseData(samples, 0, tmp_path, seed=0))
    assert torch.equal(again.weight, model.weight), "a finished phase is loaded as it was left"


@pytest.mark.parametrize("average", [-0.1, 1.5, math.nan])
def test_a_share_that_is_none_is_refused(average: float) -> None:
    with pytest.raises(DataError, match="average must be"):
        Settings(average=average)

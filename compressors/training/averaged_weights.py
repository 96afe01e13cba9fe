"""An exponential average of the trained weights over the steps of a phase, which is saved in their place.

The weights of single steps lie around where they are going, as far off as the learning rate and the scatter of the
batches take them; their average is meant to lie nearer (Polyak and Juditsky 1992; Izmailov et al. 2018, arXiv
1803.05407). What it brings is measured in docs/comparison.md. It is taken of everything that is trained, the logarithms
of the quantizers' scales among it. What a mask has dropped is zero at every step, and so on average.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class AveragedWeights(nn.Module):
    """The average of the trained parameters of `model`, as buffers: part of a training checkpoint, on one device with
    them.

    `span` is over how many steps it reaches back: weights of that many steps ago count for about 1 / e of the newest.
    Of a single step or less, it is the weights of the last. While fewer steps than that were taken, it is their plain
    mean: the weights before the first step count for nothing. The model is held outside the module tree.
    """

    steps: Tensor

    def __init__(self, model: nn.Module, span: float) -> None:
        super().__init__()
        self._trained = [[parameter for parameter in model.parameters() if parameter.requires_grad]]
        self.span = max(span, 1.0)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=self.trained[0].device))
        for number, parameter in enumerate(self.trained):
            self.register_buffer(str(number), parameter.detach().clone())

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that are averaged."""
        return self._trained[0]

    @property
    def averages(self) -> list[Tensor]:
        """Those of the parameters, in their order."""
        return [self.get_buffer(str(number)) for number in range(len(self.trained))]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters as they are: (1 - weight) * average + weight * parameter."""
        self.steps += 1
        weight = (1 / self.steps).clamp(min=1 / self.span)  # a tensor: no step waits for the device to say it
        for parameter, average in zip(self.trained, self.averages, strict=True):
            average.lerp_(parameter, weight.to(average.dtype))

    @torch.no_grad()
    def put(self) -> None:
        """Make the average the parameters."""
        for parameter, average in zip(self.trained, self.averages, strict=True):
            parameter.copy_(average)


class AverageCallback(TrainerCallback):
    """Takes the weights of every step into their average, before a training checkpoint is written."""

    def __init__(self, averages: AveragedWeights) -> None:
        self.averages = averages

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Take in the weights after this step."""
        self.averages.update()

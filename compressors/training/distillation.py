"""Distillation: the dense model, frozen, as teacher of the compressed one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressors.distributed import summed, world_size
from compressors.pruning.admm import Admm
from compressors.settings import Losses
from compressors.training.output_divergence import OUTPUT_LOSSES


class Student(nn.Module):
    """A model with its losses, which the Trainer sees as an ordinary module: its state includes ADMM's Z and U.

    `teacher` is held outside the module tree: it is neither trained nor saved.
    """

    accepts_loss_kwargs = False  # read by the Trainer: the loss is a plain mean over the batch

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        teacher: nn.Module | None,
        admm: Admm | None,
        output_kind: str = "softmax",
    ) -> None:
        super().__init__()
        self._output_loss, self._by_token = OUTPUT_LOSSES[output_kind], output_kind != "span"
        self.model, self.losses, self.admm = model, losses, admm
        self._teacher = [teacher] if teacher is not None else []

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a padded batch with ``labels``."""
        deep = self.losses.hidden > 0
        taught = None
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if self.losses.task == 0:
            batch = inputs
        if self._teacher:  # first: what it needs on its way is free again before the student keeps its activations
            with torch.no_grad():
                taught = self._teacher[0](**inputs, output_hidden_states=deep)
        output = self.model(**batch, output_hidden_states=deep and taught is not None)
        loss = output.logits.new_zeros(()) if output.loss is None else self.losses.task * output.loss
        if taught is not None:
            ours, theirs = output.logits, taught.logits
            if ours.dim() == 3 and self._by_token:  # (batch, sequence, classes): padding says nothing
                real = batch["attention_mask"].bool()
                ours, theirs = ours[real], theirs[real]
            loss = loss + self.losses.logits * self._output_loss(ours, theirs)
            if deep:
                loss = loss + self.losses.hidden * hidden_loss(
                    output.hidden_states, taught.hidden_states, batch["attention_mask"]
                )
        return {"loss": loss, "logits": output.logits}


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Mean squared error of hidden states (batch, sequence, features) over real tokens, averaged over layers.

    Normalised by the teacher's mean square, so that the weight of this loss does not depend on the model's scale. Under
    ``torchrun`` the mean of all processes' losses is the loss of the whole batch, whichever process has the long
    sentences.
    """
    tokens = attention_mask.bool()
    references = [hidden[tokens].float() for hidden in teacher]  # (tokens, features)
    energies = summed(torch.stack([reference.square().sum() for reference in references])).clamp(min=1e-12)
    total = torch.zeros((), device=attention_mask.device)
    for hidden, reference, energy in zip(student, references, energies, strict=True):
        total = total + functional.mse_loss(hidden[tokens].float(), reference, reduction="sum") / energy
    return total * world_size() / len(student)

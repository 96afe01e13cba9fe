"""Distillation: the dense model, frozen, as teacher of the compressed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from compressors.distributed import summed, world_size
from compressors.pruning.admm import Admm
from compressors.settings import Losses
from compressors.training.averaged_weights import AveragedWeights
from compressors.training.output_divergence import OUTPUT_LOSSES
from nxm_export.data.token_labels import NO_LABEL
from nxm_export.hf.protocols import TaskOutput


class Student(nn.Module):
    """A model with its losses, which the Trainer sees as an ordinary module: its state includes ADMM's Z and U, and
    `averages` where there are any.

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
        self.averages: AveragedWeights | None = None

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a padded batch with ``labels``."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        real = batch["attention_mask"].bool()
        labels = known_labels(batch.get("labels"), real.device)
        # Whatever losses this part of a batch has: every process has to ask.
        of_labels, of_tokens = mean_shares(torch.stack([labels, real.sum()]))
        if self.losses.task == 0 or not labels:
            batch = inputs  # of no label at all the task's loss is 0 / 0
        # First: what the teacher needs on its way is free again before the student keeps its activations.
        taught = self._asked(inputs) if self._teacher else None
        deep = taught is not None and self.losses.hidden > 0
        output = self.model(**batch, output_hidden_states=deep)
        if output.loss is not None:
            loss = self.losses.task * of_labels * output.loss
        elif self.losses.task:
            loss = 0.0 * output.logits.sum()  # it has a gradient, which the other processes wait for
        else:
            loss = output.logits.new_zeros(())
        if taught is not None:
            ours, theirs, share = output.logits, taught.logits, torch.ones_like(of_tokens)
            if ours.dim() == 3 and self._by_token:  # (batch, sequence, classes): padding says nothing
                ours, theirs, share = ours[real], theirs[real], of_tokens
            loss = loss + self.losses.logits * share * self._output_loss(ours, theirs)
            if deep:
                loss = loss + self.losses.hidden * hidden_loss(output.hidden_states, taught.hidden, taught.rows)
        return {"loss": loss, "logits": output.logits}

    def apply_averages(self) -> None:
        """Training is over: give the model its averaged weights, where there are any."""
        if self.averages is not None:
            self.averages.put()
            self.averages = None

    def _asked(self, inputs: Mapping[str, Tensor]) -> Taught:
        deep = self.losses.hidden > 0
        with torch.no_grad():
            output: TaskOutput = self._teacher[0](**inputs, output_hidden_states=deep)
            rows = real_rows(inputs["attention_mask"])
            states = output.hidden_states if deep and output.hidden_states is not None else ()
            return Taught(output.logits, [tokens_of(states_of_one, rows) for states_of_one in states], rows)


def known_labels(labels: Tensor | None, device: torch.device) -> Tensor:
    """How many labels the task's loss is the mean over, int64 (): of classes those that are known, of scores all.

    A process's part of a batch, or a batch of one, may have none.
    """
    if labels is None:
        return torch.zeros((), dtype=torch.int64, device=device)
    if labels.is_floating_point():
        return torch.tensor(labels.numel(), device=device)
    return (labels != NO_LABEL).sum()


def mean_shares(counts: Tensor) -> Tensor:
    """What to multiply this process's means with, float32 (means,); `counts` int64 (means,) says of how many each is.

    Under ``torchrun`` gradients are averaged over processes. That is the gradient of the whole batch's mean only where
    one that holds more counts for more. With one process all are 1.
    """
    if world_size() == 1:
        return torch.ones_like(counts, dtype=torch.float32)
    return (counts * world_size() / summed(counts).clamp(min=1)).float()


@dataclass(frozen=True)
class Taught:
    """What the teacher says to a batch: logits, and of every layer the hidden states of `rows` (`real_rows`)."""

    logits: Tensor
    hidden: list[Tensor]
    rows: Tensor | None


def real_rows(attention_mask: Tensor) -> Tensor | None:
    """Which of all batch * sequence tokens are no padding, as indices; None where all are."""
    rows = attention_mask.flatten().nonzero().squeeze(-1)
    return None if len(rows) == attention_mask.numel() else rows


def tokens_of(hidden: Tensor, rows: Tensor | None) -> Tensor:
    """Hidden states (batch, sequence, features) of those tokens, float32 (tokens, features)."""
    tokens = hidden.flatten(0, 1)
    return (tokens if rows is None else tokens.index_select(0, rows)).float()


def hidden_loss(student: Sequence[Tensor], teacher: list[Tensor], rows: Tensor | None) -> Tensor:
    """Mean squared error of hidden states (batch, sequence, features) over real tokens, averaged over layers.

    The teacher's are `tokens_of` these `rows`; the list is emptied, so that each is free again once it is compared.

    Normalised by the teacher's mean square, so that the weight of this loss does not depend on the model's scale. Under
    ``torchrun`` the mean of all processes' losses is the loss of the whole batch, whichever process has the long
    sentences.
    """
    energies = summed(torch.stack([reference.square().sum() for reference in teacher])).clamp(min=1e-12)
    total = torch.zeros((), device=energies.device)
    for hidden, energy in zip(student, energies, strict=True):
        total = total + squared_error(hidden, teacher.pop(0), rows) / energy
    return total * world_size() / len(student)


class _Ctx(Protocol):
    """What `_SquaredError` hands from its forward pass to its backward pass."""

    saved_tensors: tuple[Tensor, Tensor | None]
    shape: torch.Size
    dtype: torch.dtype

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors for the backward pass."""


class _SquaredError(torch.autograd.Function):
    """Sum of the squared differences of `hidden` (batch, sequence, features) from `reference` (tokens, features) over
    the tokens `rows`. It keeps the difference alone, where autograd would keep both."""

    @staticmethod
    def forward(ctx: _Ctx, hidden: Tensor, reference: Tensor, rows: Tensor | None) -> Tensor:
        difference = tokens_of(hidden, rows) - reference
        ctx.save_for_backward(difference, rows)
        ctx.shape, ctx.dtype = hidden.shape, hidden.dtype
        return difference.square().sum()

    @staticmethod
    def backward(ctx: _Ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        difference, rows = ctx.saved_tensors
        gradient = (difference * (2 * grad)).to(ctx.dtype)
        if rows is not None:
            tokens = gradient.new_zeros(ctx.shape).flatten(0, 1)
            gradient = tokens.index_copy_(0, rows, gradient)
        return gradient.reshape(ctx.shape), None, None


squared_error: Callable[[Tensor, Tensor, Tensor | None], Tensor] = _SquaredError.apply


def free_teacher_memory(teacher: nn.Module, model: nn.Module, bf16: bool) -> None:
    """Free memory of a frozen `teacher`, in place, without a change of what it answers while `model` is trained.

    Parameters that `model` has with the same values and does not train become the model's own: embedding tables, which
    are most of a small model. Under `bf16` autocast linear layers keep the weights that every pass would round anew.
    """
    own = {name: parameter for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for path, module in teacher.named_modules():
        for name, parameter in list(module.named_parameters(path, recurse=False)):
            twin, leaf = own.get(name), name.rpartition(".")[2]
            if twin is not None and twin.dtype == parameter.dtype and torch.equal(twin, parameter):
                setattr(module, leaf, twin)
            elif bf16 and type(module) is nn.Linear:
                setattr(module, leaf, nn.Parameter(parameter.detach().bfloat16(), requires_grad=False))

"""Distillation: the dense model, frozen, as teacher of the compressed one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from compressors.distributed import summed, world_size


def logits_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of the class distributions, times T**2 (Hinton et al. 2015); (batch, classes)."""
    target = (teacher.float() / temperature).log_softmax(dim=-1)
    found = (student.float() / temperature).log_softmax(dim=-1)
    return functional.kl_div(found, target, log_target=True, reduction="batchmean") * temperature**2


def labels_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) of independent yes-or-no labels; logits (batch, labels).

    A label with logit z is a choice between two classes with logits z and 0, so this is `logits_loss` of those.
    """
    return logits_loss(two_classes(student).flatten(0, -2), two_classes(teacher).flatten(0, -2))


def two_classes(logits: Tensor) -> Tensor:
    """(..., 2): class logits of which softmax gives (sigmoid(z), 1 - sigmoid(z))."""
    return torch.stack([logits, torch.zeros_like(logits)], dim=-1)


def score_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of regression scores (batch, scores)."""
    return functional.mse_loss(student.float(), teacher.float())


def vector_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared distance of embeddings (batch, features), each relative to the teacher's squared length.

    For vectors of length 1 it is 2 (1 - cosine). Other lengths are learned, too: some indexes compare by dot product.
    """
    return (student.float() - teacher.float()).square().sum(-1).div(squared_length(teacher.float())).mean()


def squared_length(vectors: Tensor) -> Tensor:
    """(batch,): never 0, so that one may divide by it."""
    return vectors.square().sum(-1).clamp(min=1e-12)


def spans_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL(teacher || student) of where answers begin and where they end, each a distribution over the sequence; logits
    (batch, sequence, 2), with padding far below all others."""
    return logits_loss(student.transpose(1, 2).flatten(0, 1), teacher.transpose(1, 2).flatten(0, 1))


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
    """Mean squared error of hidden states (batch, sequence, features) over real tokens, averaged over layers.

    Normalised by the teacher's mean square, so that the weight of this loss does not depend on the model's scale. Under
    ``torchrun`` the mean of all processes' losses is the loss of the whole batch, whichever process has the long sentences.
    """
    tokens = attention_mask.bool()
    wanted = [target[tokens].float() for target in teacher]  # (tokens, features)
    energies = summed(torch.stack([target.square().sum() for target in wanted])).clamp(min=1e-12)
    total = torch.zeros((), device=attention_mask.device)
    for found, target, energy in zip(student, wanted, energies, strict=True):
        total = total + functional.mse_loss(found[tokens].float(), target, reduction="sum") / energy
    return total * world_size() / len(student)


# How student and teacher are held together, by `nxm_export.contract.tasks.Task.output_kind`.
AGREEMENT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": logits_loss,
    "sigmoid": labels_loss,
    "identity": score_loss,
    "vector": vector_loss,
    "span": spans_loss,
}

"""How far one model's outputs are from another's, by what a task's first output means (`Task.output_kind`).

The same notion twice: as a loss that trains a student on its teacher's outputs (`OUTPUT_LOSSES`: means, with
gradients), and as a number that search and reports add up over samples (`divergence`: sums, in float64).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def logits_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of the class distributions; (batch, classes)."""
    reference = teacher.float().log_softmax(dim=-1)
    actual = student.float().log_softmax(dim=-1)
    return functional.kl_div(actual, reference, log_target=True, reduction="batchmean")


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
    """Mean KL(teacher || student) of where answers begin and where they end, each a distribution over the sequence;
    logits (batch, sequence, 2), with padding far below all others."""
    return logits_loss(student.transpose(1, 2).flatten(0, 1), teacher.transpose(1, 2).flatten(0, 1))


# The loss that holds student and teacher together, by `nxm_export.contract.tasks.Task.output_kind`.
OUTPUT_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": logits_loss,
    "sigmoid": labels_loss,
    "identity": score_loss,
    "vector": vector_loss,
    "span": spans_loss,
}


def divergence(reference: Tensor, actual: Tensor, output_kind: str = "softmax") -> float:
    """Summed KL(reference || actual) of class logits (..., classes), or, by the task's `output_kind`, of labels each
    for itself; squared error of scores, and of vectors relative to their squared length."""
    reference, actual = reference.double(), actual.double()  # in float32 small divergences come out negative
    if output_kind == "vector":
        return float(((reference - actual).square().sum(-1) / squared_length(reference)).sum())
    if output_kind == "identity":
        return float((reference - actual).square().sum())
    if output_kind == "sigmoid":
        reference, actual = two_classes(reference), two_classes(actual)
    if output_kind == "span":  # (batch, sequence, 2): positions compete
        reference, actual = reference.transpose(1, 2), actual.transpose(1, 2)
    log_reference = reference.log_softmax(dim=-1)
    return float(functional.kl_div(actual.log_softmax(dim=-1), log_reference, log_target=True, reduction="sum"))


def real_logits(logits: Tensor, attention_mask: Tensor, output_kind: str) -> Tensor:
    """Logits in float32; those of tokens (batch, sequence, classes) are 0 where the mask is, but for spans, whose
    padding is far below all others."""
    by_token = logits.dim() == 3 and output_kind != "span"
    return logits.float() * attention_mask[..., None] if by_token else logits.float()

"""How fast and from what to learn where nobody has said so: it depends on the task, the recipe and the width of the
model.

Chosen by experiment on CoLA and rotten tomatoes with MiniLM-L6 (docs/research-notes.md, docs/results.md). A compressed
model that trains on few labelled sentences learns them by heart and drifts from its teacher on all others; distorted
sentences that the teacher alone answers (`compressors.training.augmentation`) take that away. With texts from elsewhere
the dense model is learned from in the same way. ADMM and a fixed magnitude mask then do best at a high learning rate,
and SR-STE about as well as at a low one; from second-order pruning a low one leads as near to the dense model at
2:4+W4, and nearer where a plan prunes less.
"""

from __future__ import annotations

from dataclasses import dataclass

from compressors.settings import SECOND_ORDER, Losses, Settings
from nxm_export.contract.tasks import Task

MEASURED_WIDTH = 384


@dataclass(frozen=True)
class Training:
    """What the phases train with: Adam's learning rate, the weights of the losses, the share of distorted samples."""

    learning_rate: float
    losses: Losses
    augment: float


_FAR_START = 3e-4  # where masks are found in training, or weights pruned without making up for it
_DISTORTED = Training(1e-4, Losses(task=0.0, logits=1.0, hidden=10.0), 0.7)
_LABELLED = Training(1e-4, Losses(task=0.5, logits=1.0, hidden=1.0), 0.0)
_TAUGHT = Training(1e-4, _DISTORTED.losses, 0.0)


def training_of(settings: Settings, task: Task, width: int, *, more_text: bool = False) -> Training:
    """What `settings` leave open, for a task and a model of this hidden size, with texts without labels or not.

    Text is distorted for classes of whole texts, where there is a teacher. Models for several labels a text learn from
    the teacher alone, too, from text as it is; in other tasks too little speaks against labels and teacher. The
    rate that goes with distorted text was found at a width of 384 and is lowered for wider models, in proportion: the
    step that a layer's output takes under Adam grows with the number of its inputs (Yang et al. 2022, arXiv
    2203.03466).
    """
    taught = settings.has_teacher
    augment = settings.augment
    if augment is None:
        augment = _DISTORTED.augment if taught and task.name == "classification" else 0.0
    plain = _TAUGHT if task.name == "multi-label" else _LABELLED
    usual = _DISTORTED if augment or more_text else plain
    rate = usual.learning_rate
    if augment or more_text:
        rate = (rate if settings.recipe in SECOND_ORDER else _FAR_START) * min(1.0, MEASURED_WIDTH / width)
    return Training(settings.learning_rate or rate, (settings.losses or usual.losses) if taught else Losses(), augment)

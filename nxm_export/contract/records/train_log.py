"""``train_log.jsonl``: what training wrote while it ran, a line every few steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nxm_export.storage.json_files import encode_line, nonfinite_as_none, read_lines, to_json_object

TRAIN_LOG_FILE = "train_log.jsonl"


@dataclass(frozen=True)
class TrainLogLine:
    """What was measured behind optimizer step `step` of a phase; None, and not in the file, where it was not, or was no
    number.

    `residual` is ||W - Z|| / ||W|| and `flips` the share of mask entries that changed, both at a dual update of ADMM;
    `projected_loss` is the loss with the weights projected.
    """

    phase: str
    step: int
    loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    residual: float | None = None
    flips: float | None = None
    projected_loss: float | None = None

    def to_text(self) -> str:
        """The line of the file, with its end."""
        fields = nonfinite_as_none(vars(self))
        return encode_line({key: value for key, value in to_json_object(fields).items() if value is not None})


def read_train_log(file: Path) -> tuple[TrainLogLine, ...]:
    """The lines of a training log; raises `ArtifactError` that names line and field."""
    return read_lines(file, TrainLogLine, way_out="delete it: nothing but the training curves is made of it")

"""What a training phase does between steps: progress, the JSON-lines log, NaN, and marks on complete checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from compressors.distributed import wait
from nxm_export.contract.records.train_log import TrainLogLine, read_train_log
from nxm_export.errors import DataError
from nxm_export.progress import Progress

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

COMPLETE = "nxm_complete"  # marks a training checkpoint that was written to its end


class JsonLog(TrainerCallback):
    """Appends metrics to ``train_log.jsonl``; a resumed phase first drops what it will log again."""

    def __init__(self, file: Path, phase: str) -> None:
        self.file, self.phase = file, phase

    def write(self, step: int, **values: float | None) -> None:
        """Append one line."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(TrainLogLine(self.phase, step, **values).to_text())

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Drop this phase's lines beyond the step that it starts from."""
        if not state.is_world_process_zero or not self.file.is_file():
            return
        lines = read_train_log(self.file)
        earlier = [line for line in lines if line.phase != self.phase or line.step <= state.global_step]
        self.file.write_text("".join(line.to_text() for line in earlier), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_: object,
    ) -> None:
        """Log, and stop at a loss that is no number."""
        logs = logs or {}
        loss = logs.get("loss")
        if loss is not None and not math.isfinite(loss):
            raise DataError(
                f"the loss is {loss} at step {state.global_step} of phase {self.phase!r}; lower the learning rate, or "
                "try "
                "--precision fp32"
            )
        if state.is_world_process_zero and loss is not None:
            values = {key: logs[key] for key in ("loss", "learning_rate", "grad_norm") if key in logs}
            self.write(state.global_step, **values)


class ProgressCallback(TrainerCallback):
    """Reports the steps of a phase."""

    def __init__(self, phase: str, steps: int, progress: Progress) -> None:
        self.phase, self.steps, self.progress = phase, steps, progress

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Report the step that a resumed phase starts from."""
        self.progress(self.phase, state.global_step, self.steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Report every step."""
        self.progress(self.phase, state.global_step, self.steps)


class CompleteCallback(TrainerCallback):
    """Marks a training checkpoint as complete when all processes have written their part, and removes former ones.

    The Trainer would remove them before this one is marked, and takes one that lacks files without a word: half of a
    former one, still marked, would be gone on with.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Mark the checkpoint that was saved; then take the mark of every other, and remove it."""
        wait()  # each writes the state of its random numbers
        if not state.is_world_process_zero or args.output_dir is None:
            return
        saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (saved / COMPLETE).touch()
        for former in saved.parent.glob("checkpoint-*"):
            if former != saved:
                (former / COMPLETE).unlink(missing_ok=True)
                shutil.rmtree(former, ignore_errors=True)

"""ADMM inside a training phase: when its dual is updated, how hard it pulls, and the callback that does both."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from transformers import TrainerCallback

from compressors.pruning.admm import Admm
from compressors.training.callbacks import JsonLog

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

MAX_DUAL_UPDATES = 16
# What fixing the masks would cost is watched at every fourth dual update and on this many held-out samples: at all of
# them, and on 256, it took as long as a sixth of the phase.
WATCH_EVERY, WATCHED_SAMPLES = 4, 64


class Schedule(Protocol):
    """When ADMM updates its dual, and how hard it pulls at a step (counted from 1)."""

    def penalize(self, admm: Admm, step: int) -> None:
        """Add the penalty to the gradients of a step."""

    def updates_at(self, step: int) -> bool:
        """Whether the dual is updated behind a step."""


class Ramp:
    """Evenly spaced dual updates; after each, rho for a strength that grows geometrically from first to last.

    Under Adam a weight moves by at most the learning rate a step, whatever pulls it. Where the number of updates is not
    set, they are spaced so that between two of them a weight can travel the distance that a dropped one has to go:
    updating the dual more often only piles up U before W has followed, and the mask flips back and forth.
    """

    def __init__(
        self, admm: Admm, steps: int, learning_rate: float, strength: tuple[float, float], updates: int | None
    ) -> None:
        self.steps, (self.first, self.last) = steps, strength
        if updates is None:
            updates = round(steps * learning_rate / max(admm.mean_gap(), 1e-12))
        updates = max(1, min(updates, steps, MAX_DUAL_UPDATES))
        self.dual_steps = {round((i + 1) * steps / updates) for i in range(updates)}

    def penalize(self, admm: Admm, step: int) -> None:
        """Add the penalty to the gradients of a step."""
        if step == 1 or step - 1 in self.dual_steps:
            admm.set_strength(self.first * (self.last / self.first) ** (step / self.steps))
        admm.add_penalty()

    def updates_at(self, step: int) -> bool:
        """Whether the dual is updated behind a step."""
        return step in self.dual_steps


class PaperSchedule:
    """The authors': a constant penalty and one dual update at the end of every epoch."""

    rho = 4e-3  # the middle of their grid

    def __init__(self, epoch_steps: int) -> None:
        self.epoch_steps = epoch_steps

    def penalize(self, admm: Admm, step: int) -> None:
        """Add the penalty to the gradients of a step."""
        if step == 1:
            admm.set_rho(self.rho)
        admm.add_penalty()

    def updates_at(self, step: int) -> bool:
        """Whether the dual is updated behind a step."""
        return step % self.epoch_steps == 0


class AdmmCallback(TrainerCallback):
    """The penalty before every optimizer step (the Trainer has clipped by then), and the dual updates after some."""

    def __init__(
        self, admm: Admm, schedule: Schedule, log: JsonLog, projected_loss: Callable[[], float | None]
    ) -> None:
        self.admm, self.schedule, self.log, self.projected_loss = admm, schedule, log, projected_loss
        self.updates = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Count the dual updates of a resumed phase that are done: which ones are watched depends on it."""
        self.updates = sum(self.schedule.updates_at(step) for step in range(1, state.global_step + 1))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Add the penalty to the clipped task gradient."""
        self.schedule.penalize(self.admm, state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Update the dual where the schedule says so, and log what it did."""
        if not self.schedule.updates_at(state.global_step):
            return
        update = self.admm.dual_update()
        watched = {"projected_loss": self.projected_loss()} if self.updates % WATCH_EVERY == 0 else {}
        self.updates += 1
        if state.is_world_process_zero:
            self.log.write(state.global_step, residual=update.residual, flips=update.flips, **watched)

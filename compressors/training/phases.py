"""The phases of one compression run: calibrate -> find the masks -> harden (hard projection) -> masked QAT.

The recipe (`compressors.settings.RECIPES`) says how masks are found: by second-order pruning or by magnitude at once, by ADMM or
SR-STE in a phase of training. Each phase is a `compressors.training.trainer.run_phase`; what ADMM adds to it (penalty, dual updates) is a
callback here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from compressors.models import Source, load_model
from compressors.pruning.admm import Admm
from compressors.pruning.permutation import permute_channels, permute_residual, residual_order
from compressors.pruning.sparsegpt import input_moments, prune_layers
from compressors.quantization.fake_quant import QuantLinear, calibrate, prepare, quant_linears, require_invariants
from compressors.settings import Settings
from compressors.training.augmentation import require_augmentable
from compressors.training.default_recipe import training_of
from compressors.training.output_sensitivity import output_costs
from compressors.training.task_data import TaskData
from compressors.training.trainer import LOG_FILE, JsonLog, Phase, Progress, collate, mean_loss, run_phase, wants_bf16
from nxm_export.contract.families import size_of
from nxm_export.contract.placement import residual_output_weights
from nxm_export.contract.plan import CompressionPlan
from nxm_export.data.examples import sorted_batches, split_indices

MAX_DUAL_UPDATES = 16
# What hardening would cost is watched at every fourth dual update and on this many held-out samples: at all of them, and on
# 256, it took as long as a sixth of the phase.
WATCH_EVERY, WATCHED_SAMPLES = 4, 64


class Job:
    """One compression run: holds what the phases share."""

    def __init__(
        self,
        source: Source,
        data: TaskData,
        plan: CompressionPlan,
        settings: Settings,
        work_dir: Path,
        progress: Progress,
    ) -> None:
        self.source, self.data, self.plan = source, data, plan
        self.settings, self.work_dir, self.progress = settings, work_dir, progress
        width = size_of(source.config, source.family.hidden_key)
        self.training = training_of(settings, data.task, width)
        # A slice of train that no phase trains on: it tells what hardening would cost, and dev is never asked.
        held_out, rest = split_indices(data.train, min(256, len(data.train) // 20), settings.seed)
        self.held_out = [data.train[i] for i in sorted(held_out)]
        self.train = [data.train[i] for i in sorted(rest)]
        self.steps = settings.steps or steps_of(self.train, settings.epochs, settings.batch_size)

    def run(self) -> tuple[nn.Module, dict[str, Any]]:
        """Calibrate, find the masks, harden, masked QAT; returns the trained student (not yet baked) and facts for the metrics."""
        settings = self.settings
        if self.training.augment and self.training.losses.task:
            require_augmentable(self.data.task)
        set_seed(settings.seed)
        student = load_model(self.source, self.data.task, gelu=settings.gelu)
        teacher = (
            load_model(self.source, self.data.task).requires_grad_(False)
            if settings.distill and settings.recipe != "paper"
            else None
        )
        _without_dropout(student)
        prepare(student, self.plan, self.source.family, self.source.config)
        self._freeze(student)
        self._calibrate(student)
        in_float = self._leave_in_float(student)
        layers = quant_linears(student)
        if settings.mask_scores == "activation":
            moments = input_moments(student, self._calibration_batches(), diagonal=True)
            for name, layer in layers.items():
                layer.importance = moments[name].sqrt()
        permuted = self._permute(student, teacher) if settings.permute else {}
        facts: dict[str, Any] = {
            "recipe": settings.recipe,
            "steps": self.steps,
            "train_samples": len(self.train),
            "held_out_samples": len(self.held_out),
        }
        if in_float:
            facts["outputs_in_float"] = in_float
        if permuted:
            before_, after = (sum(shares) / len(permuted) for shares in zip(*permuted.values(), strict=True))
            facts["permutation"] = {"matrices": len(permuted), "kept_before": before_, "kept_after": after}
        if settings.recipe == "obs":
            prune_layers(layers, input_moments(student, self._calibration_batches()))
        before = 0  # steps of the phase that looks for the masks
        if settings.recipe in ("nxm", "paper"):
            facts |= self._admm(student, layers, teacher)
            before = facts["admm_steps"]
        elif settings.recipe == "sr-ste":
            before = facts["sr_ste_steps"] = self._sr_ste(student, layers, teacher)
        for layer in layers.values():
            layer.harden()
        qat_steps = 0 if settings.recipe in ("paper", "one-shot") else self.steps - before
        if settings.recipe == "one-shot":
            facts["steps"] = 0
            self._calibrate(student)  # again: nothing else will fit the ranges to the weights as they are now
        if qat_steps > 0:
            phase = Phase(
                "qat", qat_steps, self.training.learning_rate, settings.batch_size, losses=self.training.losses
            )
            self._run(student, phase, teacher)
        require_invariants(student)
        return student, facts | {"qat_steps": qat_steps, "mask_hash": mask_hash(layers)}

    def _admm(self, student: nn.Module, layers: Mapping[str, QuantLinear], teacher: nn.Module | None) -> dict[str, Any]:
        """The ADMM phase; goes on, up to twice a tenth of all steps, while the residual is above the gate."""
        settings = self.settings
        paper = settings.recipe == "paper"
        admm = Admm.of(
            layers,
            settings.admm,
            1.0 if paper else settings.damping,
            warm_dual=paper,
        )
        steps = self.steps if paper else max(1, round(self.steps * settings.admm_share))
        schedule: _Schedule = (
            _PaperSchedule(steps_of(self.train, 1.0, settings.batch_size))
            if paper
            else _Ramp(admm, steps, self.training.learning_rate, settings.strength, settings.dual_updates)
        )
        done = 0
        for name, count in (("admm", steps), ("admm-more-1", self.steps // 10), ("admm-more-2", self.steps // 10)):
            if name != "admm" and (paper or count < 1 or admm.residual() <= settings.residual_gate):
                break
            phase = Phase(
                name,
                count,
                self.training.learning_rate,
                settings.batch_size,
                losses=self.training.losses,
                scheduler="linear" if paper else "constant_with_warmup",
            )
            watch = _AdmmCallback(
                admm, schedule, JsonLog(self.work_dir / LOG_FILE, name), lambda: self._projected_loss(student, admm)
            )
            self._run(student, phase, teacher, admm, watch)
            done += count
            schedule = _Ramp(admm, max(1, count), self.training.learning_rate, (settings.strength[1],) * 2, 1)
        residual = admm.residual()
        return {
            "admm": settings.admm,
            "admm_steps": done,
            "residual": residual,
            "residual_gate_passed": residual <= settings.residual_gate,
        }

    def _sr_ste(self, student: nn.Module, layers: Mapping[str, QuantLinear], teacher: nn.Module | None) -> int:
        """Train with masks that follow the weights; returns the steps."""
        settings = self.settings
        steps = max(1, round(self.steps * settings.sr_ste_share))
        for layer in layers.values():
            layer.follow_decay = settings.sr_ste_decay
        phase = Phase(
            "sr-ste",
            steps,
            self.training.learning_rate,
            settings.batch_size,
            losses=self.training.losses,
            scheduler="constant_with_warmup",
        )
        self._run(student, phase, teacher)
        return steps

    def _run(
        self,
        student: nn.Module,
        phase: Phase,
        teacher: nn.Module | None,
        admm: Admm | None = None,
        *callbacks: TrainerCallback,
    ) -> None:
        run_phase(
            student, self.train, self.data.pad_id, phase, work_dir=self.work_dir, seed=self.settings.seed, precision=self.settings.precision,
            teacher=teacher, admm=admm, callbacks=callbacks, progress=self.progress, save_every=save_every(phase.steps), output_kind=self.data.task.output_kind, augment=self.training.augment,
        )  # fmt: skip
        require_invariants(student)

    def _projected_loss(self, student: nn.Module, admm: Admm) -> float | None:
        if not self.held_out or not self.data.task.own_loss:
            return None
        kind = next(student.parameters()).device.type
        with admm.projected(), torch.autocast(kind, torch.bfloat16, enabled=wants_bf16(self.settings.precision)):
            return mean_loss(student, self.held_out[:WATCHED_SAMPLES], self.data.pad_id)

    def _leave_in_float(self, student: nn.Module) -> dict[str, float]:
        """Drop the quantizers behind matrices that write into the residual and cost more than the limit; returns what they
        cost, by weight."""
        limit = self.settings.output_limit
        if limit is None:
            return {}
        costs = output_costs(
            student, residual_output_weights(self.plan), self.train, self.data.pad_id, self.data.task.output_kind, self.settings.seed,
            self.progress,
        )  # fmt: skip
        costly = {name: cost for name, cost in costs.items() if cost > limit}
        layers = quant_linears(student)
        for name in costly:
            layers[name].output_quantizer = None
            layers[name].spec = replace(layers[name].spec, output_bits=None)
        specs = {name: layers[name].spec for name in costly}
        self.plan = replace(self.plan, weights={**self.plan.weights, **specs})
        return costly

    def _permute(self, student: nn.Module, teacher: nn.Module | None) -> dict[str, tuple[float, float]]:
        """Reorder channels of the student, and those of the residual stream in the teacher, too: hidden states are compared.

        An embedding's own channels stay: its vectors are stored, and compared with those of the dense model.
        """
        family, config = self.source.family, self.source.config
        shares = permute_channels(student, self.plan, family, config)
        if self.data.task.output_kind == "vector":
            return shares
        order, kept = residual_order(student, self.plan, family, config)
        for model in (student, teacher):
            if model is not None and kept:
                permute_residual(model, order, family, config)
        return shares | kept

    def _freeze(self, student: nn.Module) -> None:
        if self.settings.recipe == "paper":
            compressed = {id(p) for layer in quant_linears(student).values() for p in layer.parameters()}
            for parameter in student.parameters():
                parameter.requires_grad_(id(parameter) in compressed)
        elif self.settings.freeze_embeddings:
            freeze_embeddings(student)

    def _calibration_batches(self) -> list[dict[str, Tensor]]:
        pick = np.random.default_rng(self.settings.seed).permutation(len(self.train))[
            : self.settings.calibration_samples
        ]
        samples = [self.train[i] for i in sorted(pick)]
        batches = sorted_batches(samples, 32)
        return [collate([samples[i] for i in batch], self.data.pad_id) for batch in batches]

    def _calibrate(self, student: nn.Module) -> None:
        batches = self._calibration_batches()
        done = iter(range(1, len(batches) + 1))
        student.eval()
        calibrate(
            student,
            batches,
            self.settings.percentile,
            lambda: self.progress("calibrate", next(done), len(batches)),
        )


class _Schedule(Protocol):
    """When ADMM updates its dual, and how hard it pulls at a step (counted from 1)."""

    def penalize(self, admm: Admm, step: int) -> None: ...

    def updates_at(self, step: int) -> bool: ...


class _Ramp:
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
        if step == 1 or step - 1 in self.dual_steps:
            admm.set_strength(self.first * (self.last / self.first) ** (step / self.steps))
        admm.add_penalty()

    def updates_at(self, step: int) -> bool:
        return step in self.dual_steps


class _PaperSchedule:
    """The authors': a constant penalty and one dual update at the end of every epoch."""

    rho = 4e-3  # the middle of their grid

    def __init__(self, epoch_steps: int) -> None:
        self.epoch_steps = epoch_steps

    def penalize(self, admm: Admm, step: int) -> None:
        if step == 1:
            admm.set_rho(self.rho)
        admm.add_penalty()

    def updates_at(self, step: int) -> bool:
        return step % self.epoch_steps == 0


class _AdmmCallback(TrainerCallback):
    """The penalty before every optimizer step (the Trainer has clipped by then), and the dual updates after some."""

    def __init__(
        self, admm: Admm, schedule: _Schedule, log: JsonLog, projected_loss: Callable[[], float | None]
    ) -> None:
        self.admm, self.schedule, self.log, self.projected_loss = admm, schedule, log, projected_loss
        self.updates = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Add the penalty to the clipped task gradient."""
        self.schedule.penalize(self.admm, state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Update the dual where the schedule says so, and log what it did."""
        if not self.schedule.updates_at(state.global_step):
            return
        update = self.admm.dual_update()
        watched = {"projected_loss": self.projected_loss()} if self.updates % WATCH_EVERY == 0 else {}
        self.updates += 1
        if state.is_world_process_zero:
            self.log.write(state.global_step, residual=update.residual, flips=update.flips, **watched)


def mask_hash(layers: Mapping[str, QuantLinear]) -> str:
    """sha256 over all masks, in model order."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        if layer.mask is not None:
            digest.update(name.encode())
            digest.update(np.packbits(layer.mask.cpu().numpy()).tobytes())
    return digest.hexdigest()


def freeze_embeddings(model: nn.Module) -> None:
    """Stop training of every embedding table."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(False)


def _without_dropout(model: nn.Module) -> None:
    """Quantization is regularisation enough, and distillation wants a student without noise of its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def steps_of(samples: Sequence[Any], epochs: float, batch_size: int) -> int:
    """Optimizer steps of a number of epochs."""
    return max(1, math.ceil(epochs * len(samples) / batch_size))


def save_every(steps: int) -> int:
    """Steps between training checkpoints: a tenth of a phase is the most that a kill can cost."""
    return max(1, math.ceil(steps / 10))

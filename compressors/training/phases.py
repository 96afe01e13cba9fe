"""The phases of one compression run: calibrate -> find the masks -> fix them (hard projection) -> masked QAT.

The recipe (`compressors.settings.RECIPES`) says how masks are found: layer by layer by ADMM or second-order pruning, or
by magnitude, at once; by ADMM on the loss or SR-STE in a phase of training. Each phase is a
`compressors.training.trainer.run_phase`; what ADMM adds to it (penalty, dual updates) is in
`compressors.training.admm_schedule`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from compressors.models import ModelSource, load_model
from compressors.pruning.admm import Admm
from compressors.pruning.layer_inputs import by_block, count_with_tokens, require_enough_tokens, second_moments
from compressors.pruning.layerwise import SOLVERS, solve_layers
from compressors.pruning.permutation import permute_channels, permute_residual, require_unchanged, residual_order
from compressors.pruning.solved_blocks import SolvedBlocks
from compressors.quantization.even_channels import even_out_channels
from compressors.quantization.fake_quant import QuantLinear, quant_linears
from compressors.quantization.prepare_bake import calibrate, in_float, prepare, require_invariants, set_scales
from compressors.settings import REFITTING, Settings
from compressors.training.admm_schedule import WATCHED_SAMPLES, AdmmCallback, PaperSchedule, Ramp, Schedule
from compressors.training.augmentation import require_augmentable
from compressors.training.callbacks import JsonLog
from compressors.training.default_recipe import training_of
from compressors.training.kept_measurements import kept
from compressors.training.output_divergence import real_logits
from compressors.training.output_sensitivity import output_costs
from compressors.training.task_data import TaskData
from compressors.training.trainer import (
    Phase,
    PhaseData,
    collate,
    mean_loss,
    run_phase,
    steps_of,
    wants_bf16,
)
from nxm_export.contract.config_values import size_of
from nxm_export.contract.plan import CompressionPlan
from nxm_export.contract.quantizer_placement import droppable_outputs
from nxm_export.contract.records.checkpoint_metrics import PermutationFacts, TrainingFacts
from nxm_export.contract.records.train_log import TRAIN_LOG_FILE
from nxm_export.data.features import Features, sorted_batches, split_indices
from nxm_export.hf.protocols import TaskOutput
from nxm_export.progress import Progress

Layers = Mapping[str, QuantLinear]
_FEW = 10  # at most one sample of so many is held out


@dataclass(frozen=True)
class MaskSearch:
    """What the phase that looks for the masks did: steps of ADMM with the residual that is left, or of SR-STE, or
    none."""

    admm_steps: int | None = None
    residual: float | None = None
    sr_ste_steps: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps of whichever it was."""
        return (self.admm_steps or 0) + (self.sr_ste_steps or 0)


class Job:
    """One compression run: holds what the phases share. Raises `DataError` for a train set of too few tokens for its
    recipe."""

    def __init__(
        self,
        source: ModelSource,
        data: TaskData,
        plan: CompressionPlan,
        settings: Settings,
        work_dir: Path,
        progress: Progress,
    ) -> None:
        self.source, self.data, self.plan = source, data, plan
        self.settings, self.work_dir, self.progress = settings, work_dir, progress
        width = size_of(source.config, source.family.hidden_key)
        self.training = training_of(settings, data.task, width, more_text=bool(data.more_text))
        # A slice of train that no phase trains on: it tells what fixing the masks would cost, and dev is never asked.
        held_out, rest = split_indices(data.train, min(256, len(data.train) // 20), settings.seed)
        if len(held_out) * _FEW > len(data.train):  # few large groups, which are not divided
            held_out, rest = [], list(range(len(data.train)))
        self.held_out = [data.train[i] for i in sorted(held_out)]
        self.train = [data.train[i] for i in sorted(rest)]
        shapes = source.family.weights(source.config)
        widths = {name: shapes[name][1] for name, spec in plan.weights.items() if not spec.is_dense}
        self.tokens = 0  # that inputs of layers are measured on, at least
        if settings.recipe in REFITTING and widths:
            self.tokens = max(widths.values())
            require_enough_tokens(widths, self._calibration_samples(self.tokens))
        self.steps = 0
        if settings.trains:
            self.steps = settings.steps or steps_of(self.train, settings.epochs, settings.batch_size)
        self.phase_data = PhaseData(
            self.train,
            data.pad_id,
            work_dir,
            settings.seed,
            settings.precision,
            data.task.output_kind,
            self.training.augment,
            data.more_text,
            data.more_share,
            progress,
        )

    def run(self) -> tuple[nn.Module, TrainingFacts]:
        """Calibrate, find the masks, fix them, masked QAT; returns the trained student (not yet baked) and what was
        done."""
        settings = self.settings
        if self.training.losses.task:
            for option, share in (("--augment", self.training.augment), ("--more-text", self.data.more_share)):
                if share:
                    require_augmentable(self.data.task, option)
        set_seed(settings.seed)
        student, teacher = self.prepared(), self._teacher()
        in_float = self._leave_in_float(student)
        layers = quant_linears(student)
        if settings.mask_scores == "activation":
            squares = second_moments(student, layers, self.calibration_batches(), diagonal=True)
            for name, layer in layers.items():
                layer.importance = squares[name].sqrt()
        permutation = self._permute(student, teacher) if settings.permute else None
        searched = self._find_masks(student, layers, teacher)
        if settings.recipe not in SOLVERS:
            freeze_masks(layers)
        if not self.steps:
            self._calibrate(student)  # again: nothing else will fit the ranges to the weights as they are now
        qat_steps = 0 if settings.recipe == "paper" else self.steps - searched.steps
        if qat_steps > 0:
            self._run(student, replace(self._phase("qat", qat_steps), average=settings.average), teacher)
        require_invariants(student)
        residual = searched.residual
        return student, TrainingFacts(
            recipe=settings.recipe,
            steps=self.steps,
            train_samples=len(self.train),
            held_out_samples=len(self.held_out),
            qat_steps=qat_steps,
            average=settings.average if qat_steps else None,
            mask_hash=mask_hash(layers),
            outputs_in_float=in_float,
            permutation=permutation,
            more_text=self.data.more_text_facts,
            admm=None if residual is None else settings.admm,
            admm_steps=searched.admm_steps,
            residual=residual,
            residual_gate_passed=None if residual is None else residual <= settings.residual_gate,
            sr_ste_steps=searched.sr_ste_steps,
        )

    def prepared(self) -> nn.Module:
        """The model that is compressed, with the plan's quantizers in it, calibrated."""
        student = load_model(self.source, self.data.task, gelu=self.settings.gelu)
        without_dropout(student)
        prepare(student, self.plan, self.source.family, self.source.config)
        self._freeze(student)
        if not self.steps:  # training starts where its defaults were found, and moves weights and ranges itself
            even_out_channels(student, self.plan, self.source.family, self.source.config, self.calibration_batches())

        def measure() -> dict[str, float]:
            return {str(number): scale for number, scale in enumerate(self._calibrate(student))}

        set_scales(student, kept(self.work_dir / "calibration.json", measure).values())
        return student

    def _teacher(self) -> nn.Module | None:
        if not self.settings.has_teacher:
            return None
        return load_model(self.source, self.data.task).requires_grad_(False)

    def _phase(self, name: str, steps: int, scheduler: str = "linear") -> Phase:
        training, batch_size = self.training, self.settings.batch_size
        return Phase(name, steps, training.learning_rate, batch_size, losses=training.losses, scheduler=scheduler)

    def _find_masks(self, student: nn.Module, layers: Layers, teacher: nn.Module | None) -> MaskSearch:
        """Whatever the recipe does before masks are fixed."""
        recipe = self.settings.recipe
        if recipe in SOLVERS and layers:
            self._solve(student, layers)
        if recipe in ("nxm", "paper"):
            return self._admm(student, layers, teacher)
        return self._sr_ste(student, layers, teacher) if recipe == "sr-ste" else MaskSearch()

    def _solve(self, student: nn.Module, layers: Layers) -> None:
        """Masks, weights and scales of every layer from what it reads, before any training."""
        recipe = self.settings.recipe
        if recipe in REFITTING:
            for layer in layers.values():
                # For `admm`, what layers read while no weight is rounded leads nearer (docs/research-notes.md); for
                # `obs` it does not, and it stays as its results were measured.
                layer.quantize_weight = False
        solve_layers(
            student,
            by_block(layers, self.source.family.blocks(self.source.config)),
            self.calibration_batches(self.tokens),
            SOLVERS[recipe],
            deployed=not self.steps,
            finished=SolvedBlocks(self.work_dir),
            progress=partial(self.progress, "solve"),
        )

    def _admm(self, student: nn.Module, layers: Layers, teacher: nn.Module | None) -> MaskSearch:
        """The ADMM phase; goes on, up to twice a tenth of all steps, while the residual is above the gate."""
        settings = self.settings
        paper = settings.recipe == "paper"
        admm = Admm.of(layers, settings.admm, 1.0 if paper else settings.damping, warm_dual=paper)
        steps = self.steps if paper else max(1, round(self.steps * settings.admm_share))
        schedule: Schedule = (
            PaperSchedule(steps_of(self.train, 1.0, settings.batch_size))
            if paper
            else Ramp(admm, steps, self.training.learning_rate, settings.strength, settings.dual_updates)
        )
        done = 0
        for name, count in (("admm", steps), ("admm-more-1", self.steps // 10), ("admm-more-2", self.steps // 10)):
            if name != "admm" and (paper or count < 1 or admm.residual() <= settings.residual_gate):
                break
            phase = self._phase(name, count, "linear" if paper else "constant_with_warmup")
            log = JsonLog(self.work_dir / TRAIN_LOG_FILE, name)
            watch = AdmmCallback(admm, schedule, log, lambda: self._projected_loss(student, admm))
            self._run(student, phase, teacher, admm, watch)
            done += count
            schedule = Ramp(admm, max(1, count), self.training.learning_rate, (settings.strength[1],) * 2, 1)
        return MaskSearch(admm_steps=done, residual=admm.residual())

    def _sr_ste(self, student: nn.Module, layers: Layers, teacher: nn.Module | None) -> MaskSearch:
        """Train with masks that follow the weights."""
        steps = max(1, round(self.steps * self.settings.sr_ste_share))
        for layer in layers.values():
            layer.sr_ste_decay = self.settings.sr_ste_decay
        self._run(student, self._phase("sr-ste", steps, "constant_with_warmup"), teacher)
        return MaskSearch(sr_ste_steps=steps)

    def _run(
        self,
        student: nn.Module,
        phase: Phase,
        teacher: nn.Module | None,
        admm: Admm | None = None,
        *callbacks: TrainerCallback,
    ) -> None:
        run_phase(student, phase, self.phase_data, teacher=teacher, admm=admm, callbacks=callbacks)
        require_invariants(student)

    def _projected_loss(self, student: nn.Module, admm: Admm) -> float | None:
        if not self.held_out or not self.data.task.own_loss:
            return None
        kind = next(student.parameters()).device.type
        with admm.projected(), torch.autocast(kind, torch.bfloat16, enabled=wants_bf16(self.settings.precision)):
            return mean_loss(student, self.held_out[:WATCHED_SAMPLES], self.data.pad_id)

    def _leave_in_float(self, student: nn.Module) -> dict[str, float]:
        """Drop the output quantizers that cost more than the limit, of all but what attention multiplies; returns what
        they cost, by weight."""
        limit = self.settings.output_limit
        if limit is None:
            return {}
        outputs, kind = droppable_outputs(self.plan), self.data.task.output_kind
        seed, pad_id = self.settings.seed, self.data.pad_id
        costs = kept(
            self.work_dir / "output-costs.json",
            lambda: output_costs(student, outputs, self.train, pad_id, kind, seed, self.progress),
        )
        costly = {name: cost for name, cost in costs.items() if cost > limit}
        layers = quant_linears(student)
        for name in costly:
            layers[name].output_quantizer = None
            layers[name].spec = replace(layers[name].spec, output_bits=None)
        specs = {name: layers[name].spec for name in costly}
        self.plan = replace(self.plan, weights={**self.plan.weights, **specs})
        return costly

    def _permute(self, student: nn.Module, teacher: nn.Module | None) -> PermutationFacts | None:
        """Reorder channels of the student, and those of the residual stream in the teacher, too: hidden states are
        compared.

        An embedding's own channels stay: its vectors are stored, and compared with those of the dense model.
        """
        family, config = self.source.family, self.source.config
        before = self._float_outputs(student)
        shares = permute_channels(student, self.plan, family, config)
        if self.data.task.output_kind != "vector":
            order, residual_shares = residual_order(student, self.plan, family, config)
            for model in (student, teacher):
                if model is not None and residual_shares:
                    permute_residual(model, order, family, config)
            shares = shares | residual_shares
        require_unchanged(before, self._float_outputs(student), family)
        if not shares:
            return None
        earlier, now = (sum(column) / len(shares) for column in zip(*shares.values(), strict=True))
        return PermutationFacts(len(shares), earlier, now)

    @torch.no_grad()
    def _float_outputs(self, student: nn.Module) -> Tensor:
        """What a student answers to the first calibration batch without its quantizers."""
        batch = self.calibration_batches()[0]
        inputs = {key: value.to(next(student.parameters()).device) for key, value in batch.items() if key != "labels"}
        student.eval()
        with in_float(student):
            output: TaskOutput = student(**inputs)
        return real_logits(output.logits, inputs["attention_mask"], self.data.task.output_kind)

    def _freeze(self, student: nn.Module) -> None:
        if self.settings.recipe == "paper":
            compressed = {id(p) for layer in quant_linears(student).values() for p in layer.parameters()}
            for parameter in student.parameters():
                parameter.requires_grad_(id(parameter) in compressed)
        elif self.settings.freeze_embeddings:
            freeze_embeddings(student)

    def calibration_batches(self, tokens: int = 0) -> list[dict[str, Tensor]]:
        """The samples that ranges and inputs are measured on, in batches; as many more as it takes to have that many
        `tokens`, where train has them."""
        samples = self._calibration_samples(tokens)
        return [collate([samples[i] for i in batch], self.data.pad_id) for batch in sorted_batches(samples, 32)]

    def _calibration_samples(self, tokens: int) -> list[Features]:
        order = np.random.default_rng(self.settings.seed).permutation(len(self.train))
        count = max(self.settings.calibration_samples, count_with_tokens((self.train[i] for i in order), tokens))
        return [self.train[i] for i in sorted(order[:count])]

    def _calibrate(self, student: nn.Module) -> list[float]:
        batches = self.calibration_batches()
        done = iter(range(1, len(batches) + 1))
        student.eval()
        return calibrate(
            student,
            batches,
            self.settings.range_percentile,
            lambda: self.progress("calibrate", next(done), len(batches)),
        )


def freeze_masks(layers: Layers) -> None:
    """Fix the mask of every layer, and zero what it masks."""
    for layer in layers.values():
        layer.freeze_mask()


def mask_hash(layers: Layers) -> str:
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


def without_dropout(model: nn.Module) -> None:
    """Stop dropout in `model`, in place.

    Quantization is regularisation enough, and distillation wants a student without noise of its own.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # of families that drop by a function
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  (nn.Module declares no such attribute)

"""What masked training from layer-wise ADMM gains by weights that are averaged, by rounds, by what it learns from.

    python -m tools.experiments.training_variants DENSE --train train.tsv --dev dev.tsv --option 2:4+W4

One line per variant: how far the compressed model is from the dense one on dev (mean KL in nats; of scores the squared
error, of embeddings the squared distance), the share of samples that both put in the same class where it is one class
a sample, and the metric. Behind each stand the same for averages of the weights over the steps of the same run, by
their decay. An experiment keeps nothing: a run that was interrupted begins anew.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from transformers import TrainerCallback

from compressors.freed_memory import keep_freed_memory
from compressors.models import load_model
from compressors.process_setup import prepare_process
from compressors.projections import nm_mask
from compressors.pruning.admm import Admm
from compressors.quantization.fake_quant import quant_linears
from compressors.settings import Losses, Settings
from compressors.training.admm_schedule import AdmmCallback
from compressors.training.averaged_weights import AveragedWeights
from compressors.training.callbacks import JsonLog
from compressors.training.phases import Job
from compressors.training.trainer import Phase
from nxm_export.api.functions import finetune
from nxm_export.cli.progress_bars import progress_bars
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.contract.records.train_log import TRAIN_LOG_FILE
from nxm_export.contract.tasks import TASKS
from nxm_export.progress import Progress
from tools.experiments.carried_duals import CarriedDuals, layer_duals
from tools.experiments.one_shot import Dense, parser

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

DECAYS = (0.99, 0.995, 0.998)
FIRST_SHARE = 0.4  # of the steps, for the weaker pattern of `rounds`
WEAKER = {"1:4": "2:4", "2:4": "4:8"}


class Averages(TrainerCallback):
    """Averages of all trained parameters over the steps, one of each decay."""

    def __init__(self, model: nn.Module) -> None:
        self.kept = {decay: AveragedWeights(model, 1 / (1 - decay)) for decay in DECAYS}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Move each average towards the weights as they are."""
        for averages in self.kept.values():
            averages.update()


class VariantJob(Job):
    """A compression that is averaged, or that reaches its pattern in two rounds."""

    averages: Averages | None = None
    rounds = False
    duals: bool | None = None

    def _run(
        self,
        student: nn.Module,
        phase: Phase,
        teacher: nn.Module | None,
        admm: Admm | None = None,
        *callbacks: TrainerCallback,
    ) -> None:
        if self.rounds:
            first = round(phase.steps * FIRST_SHARE)
            super()._run(student, replace(phase, name="first", steps=first), teacher, admm, *callbacks)
            self._strengthen(student)
            phase = replace(phase, steps=phase.steps - first)
        if self.duals is not None:
            first = max(1, round(phase.steps / self.settings.epochs))
            self._move_masks(
                student, replace(phase, name="first", steps=first, scheduler="constant_with_warmup"), teacher
            )
            phase = replace(phase, steps=phase.steps - first)
        self.averages = Averages(student)
        super()._run(student, phase, teacher, admm, *callbacks, self.averages)

    def _move_masks(self, student: nn.Module, phase: Phase, teacher: nn.Module | None) -> None:
        """ADMM on the task's loss from the layers' solutions, with their duals or with none; fixes the masks again."""
        layers = quant_linears(student)
        before = {name: layer.mask for name, layer in layers.items() if layer.mask is not None}
        dense = load_model(self.source, self.data.task).eval()
        duals = layer_duals(dense, layers, self.calibration_batches()) if self.duals else {}
        for layer in layers.values():
            layer.mask = None
        admm, schedule = Admm.of(layers, "mask", self.settings.damping), CarriedDuals(phase.steps, duals)
        log = JsonLog(self.work_dir / TRAIN_LOG_FILE, phase.name)
        super()._run(student, phase, teacher, admm, AdmmCallback(admm, schedule, log, lambda: None))
        moved = 0.0
        for name, mask in before.items():
            layer = layers[name]
            assert layer.spec.pattern is not None
            kept = nm_mask(layer.weight.detach().abs(), layer.spec.pattern)
            moved += float((kept & ~mask).sum() / mask.sum()) / len(before)
            layer.start_from(layer.weight.detach() * kept, kept, layer.weight_scale)
        cosine = sum(schedule.cosines.values()) / max(len(schedule.cosines), 1)
        print(
            f"kept weights that moved: {100 * moved:.2f} %; mean cosine of dual and gradient: {cosine:.3f}", flush=True
        )

    def _strengthen(self, student: nn.Module) -> None:
        """Solve every layer again, under the stronger pattern that its weaker one stands for."""
        layers = quant_linears(student)
        for layer in layers.values():
            stronger = next(strong for strong, weak in WEAKER.items() if weak == str(layer.spec.pattern))
            layer.spec = replace(layer.spec, pattern=NMPattern.parse(stronger))
            layer.mask = None
        self.work_dir = self.work_dir / "second"  # what was solved lies in the other
        self._solve(student.eval(), layers)


@dataclass(frozen=True)
class Variant:
    """What differs from the task's default."""

    rounds: bool = False
    duals: bool | None = None  # whether those of the layers' solver pull in the first epoch, in which masks move
    learning_rate: float | None = None
    losses: Losses | None = None
    augment: float | None = None
    batch_size: int = 32


_TAUGHT, _LAYERS = Losses(task=0.0, logits=1.0, hidden=1.0), Losses(task=0.0, logits=1.0, hidden=10.0)
VARIANTS = {
    "default": Variant(),
    "rounds": Variant(rounds=True),
    "free masks": Variant(duals=False),
    "carried duals": Variant(duals=True),
    "5e-5": Variant(learning_rate=5e-5),
    "2e-4": Variant(learning_rate=2e-4),
    "3e-4": Variant(learning_rate=3e-4),
    "batch 16": Variant(batch_size=16),  # twice the steps
    # By the teacher alone; hidden states with ten times the weight; and most samples distorted.
    "taught": Variant(losses=_TAUGHT, augment=0.0),
    "layers": Variant(losses=_LAYERS, augment=0.0),
    "distorted": Variant(losses=_LAYERS, augment=0.7),
    "distorted, 2e-4": Variant(losses=_LAYERS, augment=0.7, learning_rate=2e-4),
}


def main() -> None:
    made = parser(__doc__, max_length=128)
    made.add_argument("--task", choices=tuple(TASKS), default="classification")
    made.add_argument("--option", default="2:4+W4", help="Pattern and bits of every matrix.")
    made.add_argument("--variants", default=";".join(VARIANTS), help="Separated by semicolons.")
    made.add_argument("--epochs", type=float, default=6.0)
    made.add_argument("--steps", type=int, help="Instead of --epochs.")
    made.add_argument("--dense-steps", type=int, help="Train DENSE for the task first, with so many steps.")
    made.add_argument("--dense-learning-rate", type=float, default=3e-4)
    made.add_argument("--metric", help="In place of the task's own.")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int)
    arguments = made.parse_args()
    prepare_process(arguments.threads)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as own, progress_bars() as progress:
        if arguments.dense_steps:
            arguments.dense = _finetuned(arguments, Path(own) / "dense", progress)
        dense = Dense.of(arguments, arguments.task)
        print(f"dense: {_score(dense, dense.model(), arguments.metric)}", flush=True)
        for number, name in enumerate(arguments.variants.split(";")):
            work = Path(own) / str(number)
            work.mkdir()
            for line in _lines(dense, name.strip(), arguments, work, progress):
                print(line, flush=True)


def _finetuned(arguments: argparse.Namespace, out: Path, progress: Progress) -> Path:
    """The directory of a dense model of the task, trained from `arguments.dense`."""
    settings = Settings(
        dense_steps=arguments.dense_steps,
        dense_learning_rate=arguments.dense_learning_rate,
        seed=arguments.seed,
        max_length=arguments.max_length,
        threads=arguments.threads,
    )
    finetune(
        arguments.dense,
        task=arguments.task,
        train=arguments.train,
        dev=arguments.dev,
        out=out,
        settings=settings,
        progress=progress,
    )
    return out


def _lines(dense: Dense, name: str, arguments: argparse.Namespace, work: Path, progress: Progress) -> Iterator[str]:
    """Train one variant; what its last weights and its averages do."""
    variant = VARIANTS[name]
    settings = Settings(
        epochs=arguments.epochs,
        steps=arguments.steps,
        learning_rate=variant.learning_rate,
        losses=variant.losses,
        augment=variant.augment,
        batch_size=variant.batch_size,
        average=0,
        seed=arguments.seed,
        max_length=arguments.max_length,
        threads=arguments.threads,
    )
    family, config = dense.source.family, dense.source.config
    spec = WeightSpec.parse(arguments.option)
    if variant.rounds:
        spec = replace(spec, pattern=NMPattern.parse(WEAKER[str(spec.pattern)]))
    job = VariantJob(dense.source, dense.data, family.uniform_plan(config, spec), settings, work, progress)
    job.rounds, job.duals = variant.rounds, variant.duals
    student, _ = job.run()
    yield f"{arguments.option}, {name}: {_score(dense, student, arguments.metric)}"
    assert job.averages is not None
    for decay, averages in job.averages.kept.items():
        averages.put()
        yield f"{arguments.option}, {name}, average of {decay}: {_score(dense, student, arguments.metric)}"


def _score(dense: Dense, model: nn.Module, metric: str | None) -> str:
    outputs = dense.predict(model)
    one_class = dense.task.output_kind == "softmax" and outputs.ndim == 2
    same = f", agreement {100 * dense.agreement(outputs):.1f}" if one_class else ""
    name = metric or dense.task.metric
    return f"distance {dense.distance(outputs):.4f}{same}, {name} {100 * dense.metric(name, outputs):.2f}"


if __name__ == "__main__":
    main()

"""What masked training from layer-wise ADMM gains by weights that are averaged, by attention relations, by rounds.

    python -m tools.experiments.training_variants DENSE --train train.tsv --dev dev.tsv --option 2:4+W4

One line per variant: mean KL(dense || compressed) in nats, agreement with the dense model and the task's metric over
dev. Behind each stand the same for averages of the weights over the steps of the same run, by their decay. An
experiment keeps nothing: a run that was interrupted begins anew.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import TrainerCallback

from compressors.freed_memory import keep_freed_memory
from compressors.process_setup import prepare_process
from compressors.pruning.admm import Admm
from compressors.quantization.fake_quant import quant_linears
from compressors.settings import Losses, Settings
from compressors.training import trainer
from compressors.training.averaged_weights import AveragedWeights
from compressors.training.distillation import Student
from compressors.training.phases import Job
from compressors.training.trainer import Phase
from nxm_export.cli.progress_bars import progress_bars
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.data.metrics import metric_named
from nxm_export.progress import Progress
from tools.experiments.one_shot import Dense, parser

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

DECAYS = (0.99, 0.995, 0.998)
RELATION_WEIGHT = 1.0
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


class RelationStudent(Student):
    """A student that learns the last block's relations, too: which tokens' queries, keys and values are alike.

    MiniLMv2's loss (Wang et al. 2021, arXiv 2012.15828): KL of softmax(A A^T / sqrt(d)) for A of queries, keys and
    values, heads apart; the mean over heads and real tokens.
    """

    heads = 0
    operands: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        teacher: nn.Module | None,
        admm: Admm | None,
        output_kind: str = "softmax",
    ) -> None:
        super().__init__(model, losses, teacher, admm, output_kind)
        self._seen: dict[bool, list[Tensor]] = {False: [], True: []}
        for taught, network in ((False, model), (True, teacher)):
            for name in self.operands:
                assert network is not None
                network.get_submodule(name).register_forward_hook(self._keep(self._seen[taught]))

    @staticmethod
    def _keep(kept: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
            kept.append(output)

        return hook

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Loss and logits of a padded batch, the relations' loss among it."""
        for kept in self._seen.values():
            kept.clear()
        output = super().forward(**batch)
        pairs = zip(self._seen[False], self._seen[True], strict=True)
        relations = [relation_loss(ours, theirs, batch["attention_mask"], self.heads) for ours, theirs in pairs]
        return {**output, "loss": output["loss"] + RELATION_WEIGHT * torch.stack(relations).mean()}


def relation_loss(student: Tensor, teacher: Tensor, attention_mask: Tensor, heads: int) -> Tensor:
    """Mean KL(teacher || student) of the relations of (batch, sequence, features) over heads and real tokens."""
    hidden = ~attention_mask.bool()[:, None, None, :]

    def relations(states: Tensor) -> Tensor:
        split = states.float().reshape(*states.shape[:2], heads, -1).transpose(1, 2)
        scores: Tensor = split @ split.transpose(-1, -2) / split.shape[-1] ** 0.5
        return scores.masked_fill(hidden, -1e4).log_softmax(dim=-1)

    apart = functional.kl_div(relations(student), relations(teacher), log_target=True, reduction="none").sum(-1)
    real = attention_mask[:, None, :].float()
    return (apart * real).sum() / (real.sum() * heads)


class VariantJob(Job):
    """A compression that is averaged, or that reaches its pattern in two rounds."""

    averages: Averages | None = None
    rounds = False

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
        self.averages = Averages(student)
        super()._run(student, phase, teacher, admm, *callbacks, self.averages)

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
    """What differs from the default."""

    student: type[Student] = Student
    rounds: bool = False
    learning_rate: float | None = None


VARIANTS = {
    "default": Variant(),
    "relations": Variant(student=RelationStudent),
    "rounds": Variant(rounds=True),
    "5e-5": Variant(learning_rate=5e-5),
    "2e-4": Variant(learning_rate=2e-4),
    "3e-4": Variant(learning_rate=3e-4),
}


def main() -> None:
    made = parser(__doc__, max_length=128)
    made.add_argument("--option", default="2:4+W4", help="Pattern and bits of every matrix.")
    made.add_argument("--variants", default=",".join(VARIANTS), help="Separated by commas.")
    made.add_argument("--epochs", type=float, default=6.0)
    made.add_argument("--steps", type=int, help="Instead of --epochs.")
    made.add_argument("--metric", default="accuracy")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int)
    arguments = made.parse_args()
    prepare_process(arguments.threads)
    keep_freed_memory()
    dense = Dense.of(arguments)
    for name in arguments.variants.split(","):
        with tempfile.TemporaryDirectory() as work, progress_bars() as progress:
            for line in _lines(dense, name, arguments, Path(work), progress):
                print(line, flush=True)


def _lines(dense: Dense, name: str, arguments: argparse.Namespace, work: Path, progress: Progress) -> Iterator[str]:
    """Train one variant; what its last weights and its averages do."""
    variant = VARIANTS[name]
    settings = Settings(
        epochs=arguments.epochs,
        steps=arguments.steps,
        learning_rate=variant.learning_rate,
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
    job.rounds = variant.rounds
    last = family.blocks(config)[-1]
    RelationStudent.heads = int(str(config["num_attention_heads"]))
    RelationStudent.operands = tuple(
        weight.removesuffix(".weight")
        for weight in family.weights(config)
        if weight.startswith(f"{last}.") and family.role(weight) in ("query", "key", "value")
    )
    with _student_of(variant.student):
        student, _ = job.run()
    yield f"{arguments.option}, {name}: {_score(dense, student, arguments.metric)}"
    assert job.averages is not None
    for decay, averages in job.averages.kept.items():
        averages.put()
        yield f"{arguments.option}, {name}, average of {decay}: {_score(dense, student, arguments.metric)}"


@contextmanager
def _student_of(kind: type[Student]) -> Iterator[None]:
    """Inside, phases train students of this class."""
    setattr(trainer, "Student", kind)  # noqa: B010 - the name that `run_phase` looks up
    try:
        yield
    finally:
        setattr(trainer, "Student", Student)  # noqa: B010


def _score(dense: Dense, model: nn.Module, metric: str) -> str:
    logits = dense.predict(model)
    value = metric_named(metric)(logits, dense.labels)
    return f"KL {dense.kl(logits):.4f}, agreement {100 * dense.agreement(logits):.1f}, {metric} {100 * value:.2f}"


if __name__ == "__main__":
    main()

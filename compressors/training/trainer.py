"""One training phase on `transformers.Trainer`: what is trained, in which order the data comes, what is logged and
saved.

The Trainer brings accumulation, mixed precision, logging, checkpoints and ``torchrun``. This module adds

* the student with its losses (`compressors.training.distillation`), so that the Trainer sees an ordinary module whose
  state includes ADMM's Z and U, masks and scales;
* a data order that is written down before training starts (`schedule`), so that a resumed run, or one on several
  processes, sees the same batches;
* callbacks (`compressors.training.callbacks`).
"""

from __future__ import annotations

import hashlib
import math
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from compressors.distributed import world_size
from compressors.pruning.admm import Admm
from compressors.quantization.fake_quant import quant_linears
from compressors.settings import PRECISIONS, Losses
from compressors.training.augmentation import WINDOW, augmented, mixed
from compressors.training.averaged_weights import AverageCallback, AveragedWeights
from compressors.training.callbacks import (
    COMPLETE,
    CompleteCallback,
    JsonLog,
    ProgressCallback,
)
from compressors.training.distillation import Student, free_teacher_memory, known_labels
from compressors.training.resume import pin
from compressors.training.task_data import TaskData
from compressors.work_files import read_tensors, write_tensors
from nxm_export.contract.records.train_log import TRAIN_LOG_FILE
from nxm_export.data.features import Features, filled, label_array, pad, sorted_batches
from nxm_export.data.label_order import require_label_order, rows_to_look_at
from nxm_export.data.token_labels import training_labels
from nxm_export.errors import DataError
from nxm_export.hf.model_loading import quiet_log
from nxm_export.progress import Progress, silent
from nxm_export.storage.atomic import disk_errors
from nxm_export.storage.disk_space import require_space, written_in


@dataclass(frozen=True)
class Phase:
    """One training phase. `steps` are optimizer steps of `batch_size` samples (all processes together)."""

    name: str
    steps: int
    learning_rate: float
    batch_size: int = 32
    warmup: float = 0.06
    weight_decay: float = 0.01
    scheduler: str = "linear"
    losses: Losses = Losses()
    scale_learning_rate: float | None = None  # of quantizers' scales; None = learning_rate
    save_every: int | None = None  # steps between training checkpoints; None = a tenth of the phase
    average: float = 0.0  # share of the steps over which weights are averaged; 0: those of the last step are kept


def schedule(features: Sequence[Features], steps: int, batch_size: int, seed: int) -> list[int]:
    """The order of samples for a whole phase: shuffled per epoch, batches of similar length, as indices.

    Among `WINDOW` batches samples are sorted by length, then the batches are shuffled again: little padding, and still
    random. Every batch is full: of an epoch so many samples are left out as do not fill one, others in each. The order
    depends on the data, the sizes and the seed only.
    """
    rng = random.Random(seed)
    order: list[int] = []
    whole = len(features) - len(features) % batch_size or len(features)
    while len(order) < steps * batch_size:
        epoch = rng.sample(range(len(features)), len(features))[:whole]  # before they are sorted: long ones count, too
        window = WINDOW * batch_size
        batches = []
        for start in range(0, len(epoch), window):
            chunk = sorted(epoch[start : start + window], key=lambda i: (len(features[i]["input_ids"]), i))
            batches += [chunk[at : at + batch_size] for at in range(0, len(chunk), batch_size)]
        rng.shuffle(batches)
        order += [i for batch in batches for i in batch]
    return order[: steps * batch_size]


def _in_batches(features: Sequence[Features], order: Sequence[int], batch_size: int) -> list[Features]:
    """The samples in their order, each with the length of the longest in its batch, to which every process pads its
    part."""
    samples: list[Features] = []
    for start in range(0, len(order), batch_size):
        batch = [features[i] for i in order[start : start + batch_size]]
        longest = max(len(sample["input_ids"]) for sample in batch)
        samples += [{**sample, "pad_to": longest} for sample in batch]
    return samples


@dataclass(frozen=True)
class PhaseData:
    """What the phases of a run share: the samples, and where and how they are trained on.

    Results and training checkpoints lie in `work_dir`. `output_kind` is the task's (`nxm_export.contract.tasks.Task`),
    `augment` the share of distorted samples, `more_share` that of `more_text`, which have no labels, both but for the
    first of every batch
    (`compressors.training.augmentation`).
    """

    features: Sequence[Features]
    pad_id: int
    work_dir: Path
    seed: int
    precision: str = "auto"
    output_kind: str = "softmax"
    augment: float = 0.0
    more_text: Sequence[Features] = ()
    more_share: float = 0.0
    progress: Progress = silent


def run_phase(
    model: nn.Module,
    phase: Phase,
    data: PhaseData,
    *,
    teacher: nn.Module | None = None,
    admm: Admm | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train `model` in place for one phase.

    Resumes from the newest complete checkpoint in ``work_dir/phase.name``; a phase that was finished is loaded. Raises
    `ArtifactError` where what is there was begun with other samples, in another order, or in another way.
    """
    set_seed(data.seed)
    directory, finished = data.work_dir / phase.name, data.work_dir / f"{phase.name}.safetensors"
    student = Student(model, phase.losses, teacher, admm, data.output_kind)
    features, order = _samples(phase, data)
    resume = _newest_complete(directory)
    begun = finished.is_file() or resume is not None
    pin(data.work_dir / f"{phase.name}.json", _facts(phase, data, features, order), begun=begun)
    if finished.is_file():
        student.load_state_dict(read_tensors(finished, f"the phase {phase.name} is trained again"))
        data.progress(phase.name, phase.steps, phase.steps)
        return
    arguments = training_arguments(phase, directory, data.seed, data.precision)
    # Scales of weights that the forward pass leaves in float have no gradient, and DDP wants to be told.
    arguments.ddp_find_unused_parameters = any(
        layer.spec.weight_bits and not layer.quantize_weight for layer in quant_linears(model).values()
    )
    student.to(arguments.device)
    if teacher is not None:
        free_teacher_memory(teacher.eval().to(arguments.device), model, arguments.bf16)
    callbacks = list(callbacks)
    if phase.average:
        student.averages = AveragedWeights(model, phase.average * phase.steps)
        callbacks.append(AverageCallback(student.averages))
    _require_space(student, phase, data.work_dir)
    log = JsonLog(data.work_dir / TRAIN_LOG_FILE, phase.name)
    trainer = Trainer(
        model=student,
        args=arguments,
        train_dataset=_in_batches(features, order, phase.batch_size),
        data_collator=lambda samples: collate(samples, data.pad_id),
        optimizers=(optimizer_of(student, phase), None),  # the schedule is the Trainer's
        callbacks=[log, ProgressCallback(phase.name, phase.steps, data.progress), *callbacks, CompleteCallback()],
    )
    trainer.remove_callback(PrinterCallback)
    # transformers logs by itself; what there is to know, progress and errors say.
    with quiet_log(), disk_errors(data.work_dir):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.accelerator.wait_for_everyone()  # each lists the directory as its training ends
    student.apply_averages()
    if trainer.is_world_process_zero():
        write_tensors(finished, student.state_dict())
        shutil.rmtree(directory, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _samples(phase: Phase, data: PhaseData) -> tuple[Sequence[Features], list[int]]:
    """(samples, their order) of a whole phase, with distorted samples and those of more text among them."""
    features, order = data.features, schedule(data.features, phase.steps, phase.batch_size, data.seed)
    if data.augment:
        features, order = augmented(features, order, phase.batch_size, data.augment, data.seed)
    if data.more_text:
        features, order = mixed(features, order, data.more_text, phase.batch_size, data.more_share, data.seed)
    return features, order


def _facts(phase: Phase, data: PhaseData, features: Sequence[Features], order: Sequence[int]) -> dict[str, str]:
    """What a phase's weights depend on, by name: a checkpoint of one that differs in it is not gone on from."""
    digest = hashlib.sha256(np.array(order, np.int64).tobytes())
    for sample in features:
        digest.update(np.array(sample["input_ids"], np.int64).tobytes())
    return {
        "order of samples": digest.hexdigest()[:16],
        "precision": "bf16" if wants_bf16(data.precision) else "fp32",
        "output": data.output_kind,
        **{name: str(value) for name, value in vars(phase).items()},
    }


def _require_space(student: nn.Module, phase: Phase, work_dir: Path) -> None:
    """Raise `ArtifactError` where the disk has no room for a phase: its training checkpoints, of which the former goes
    when the next one is complete, and its result."""
    state = sum(tensor.numel() * tensor.element_size() for tensor in student.state_dict().values())
    moments = 2 * sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)  # AdamW's
    checkpoints = min(2, phase.steps // (phase.save_every or save_every(phase.steps)))
    needed = checkpoints * (state + moments) + state - written_in(work_dir / phase.name)
    require_space(work_dir, needed, f"the phase {phase.name}, with its training checkpoints,")


def training_arguments(phase: Phase, directory: Path, seed: int, precision: str) -> TrainingArguments:
    """Arguments of a phase for this machine; `batch_size` is divided over the processes of ``torchrun``."""
    world = world_size()
    if phase.batch_size % world:
        raise DataError(f"batch size {phase.batch_size} is not divisible by {world} processes")
    cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=phase.steps,
        per_device_train_batch_size=phase.batch_size // world,
        learning_rate=phase.learning_rate,
        lr_scheduler_type=phase.scheduler,
        warmup_steps=math.ceil(phase.warmup * phase.steps),
        weight_decay=phase.weight_decay,
        max_grad_norm=1.0,
        bf16=wants_bf16(precision),
        use_cpu=cpu,
        train_sampling_strategy="sequential",  # the order is already in the data
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        logging_steps=max(1, phase.steps // 100),
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=phase.save_every or save_every(phase.steps),
        seed=seed,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    # Of several GPUs without ``torchrun`` the Trainer would make copies of the model by DataParallel, whose quantizers
    # share nothing, and batches as many times as large. One process trains on one GPU.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def wants_bf16(precision: str) -> bool:
    """Whether to train under bfloat16 autocast: as asked (``fp32``, ``bf16``), or where the hardware gains by it."""
    if precision not in PRECISIONS:
        raise DataError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return _cpu_gains_by_bf16(torch.cpu.get_capabilities()) if hasattr(torch.cpu, "get_capabilities") else False


def _cpu_gains_by_bf16(capabilities: Mapping[str, object]) -> bool:
    """Whether products of bfloat16 are faster than those of float32 on a CPU of these `capabilities` (PyTorch's).

    It is read from the CPU, not timed: all processes of ``torchrun`` and a resumed run decide alike. Intel has
    AMX for bfloat16; where a virtual machine hides that, it loses to float32 (docs/research-notes.md).
    """
    if str(capabilities.get("cpu_name", "")).startswith("Intel"):
        return bool(capabilities.get("amx_bf16"))
    return bool(capabilities.get("avx512_bf16"))


def collate(samples: Sequence[Features], pad_id: int) -> dict[str, Tensor]:
    """Pad samples to the longest of the batch; labels become int64 classes or float32 scores, or the place of the
    answer (batch, 2).

    Labels of tokens are padded like the tokens (`nxm_export.data.token_labels.training_labels`).
    """
    padded = pad(samples, pad_id, samples[0].get("pad_to"))
    batch = {name: torch.from_numpy(array) for name, array in padded.items()}
    if "span" in samples[0]:
        batch["labels"] = torch.tensor([sample["span"] for sample in samples])
    elif "labels" in samples[0]:
        array = label_array(samples)
        if array.ndim == 2 and array.dtype.kind == "i":
            array = training_labels(array, batch["input_ids"].shape[1])
        labels = torch.from_numpy(array)
        batch["labels"] = labels.float() if labels.is_floating_point() else labels
    return batch


@torch.no_grad()
def predict(
    model: nn.Module,
    features: Sequence[Features],
    pad_id: int,
    *,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Logits of every sample, float32, in the order of `features`; float32 arithmetic, no dropout.

    Those of tokens are (samples, longest sequence, classes), 0 for padding.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    batches = sorted_batches(features, batch_size)
    logits_by_sample: list[tuple[int, np.ndarray]] = []
    for number, indices in enumerate(batches):
        batch = collate([features[i] for i in indices], pad_id)
        batch.pop("labels", None)
        logits = model(**{key: value.to(device) for key, value in batch.items()}).logits
        rows = logits.float().cpu().numpy()
        if rows.ndim == 3:  # a row for every token: without those of padding
            rows = [row[: len(features[i]["input_ids"])] for row, i in zip(rows, indices, strict=True)]
        logits_by_sample += zip(indices, rows, strict=True)
        if progress:
            progress(number + 1, len(batches))
    model.train(was_training)
    return filled([logits for _, logits in sorted(logits_by_sample, key=lambda item: item[0])], 0.0)


def require_counted_alike(model: nn.Module, data: TaskData, source: str) -> None:
    """Raise `DataError` where labels are numbers that cannot be those of the classes of `model`, by some samples of
    dev."""
    if data.numbered and data.dev:
        some = [data.dev[row] for row in rows_to_look_at(len(data.dev))]
        require_label_order(predict(model, some, data.pad_id), label_array(some), data.classes or (), source)


@torch.no_grad()
def mean_loss(model: nn.Module, features: Sequence[Features], pad_id: int, *, batch_size: int = 64) -> float:
    """Mean task loss over all labels that are known, as training has it, without dropout; NaN where none is."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for indices in sorted_batches(features, batch_size):
        batch = collate([features[i] for i in indices], pad_id)
        labels = int(known_labels(batch["labels"], batch["labels"].device))
        if labels:  # of none, the loss is 0 / 0
            total += float(model(**{key: value.to(device) for key, value in batch.items()}).loss) * labels
            count += labels
    model.train(was_training)
    return total / count if count else math.nan


def optimizer_of(student: nn.Module, phase: Phase) -> torch.optim.Optimizer:
    """AdamW; no weight decay on biases, norms and quantizers' scales, and a learning rate of their own for the
    scales."""
    decay: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("log_scale"):
            scales.append(parameter)
        else:
            (decay if parameter.dim() > 1 else plain).append(parameter)
    groups = [
        {"params": decay, "weight_decay": phase.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": scales, "weight_decay": 0.0, "lr": phase.scale_learning_rate or phase.learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=phase.learning_rate, fused=True)


def steps_of(samples: Sequence[Features], epochs: float, batch_size: int) -> int:
    """Optimizer steps of a number of epochs."""
    return max(1, math.ceil(epochs * len(samples) / batch_size))


def save_every(steps: int) -> int:
    """Steps between training checkpoints: a tenth of a phase is the most that a kill can cost."""
    return max(1, math.ceil(steps / 10))


def _newest_complete(directory: Path) -> Path | None:
    """The newest training checkpoint that was written to its end; incomplete ones are removed."""
    complete: list[tuple[int, Path]] = []
    for path in directory.glob("checkpoint-*"):
        if (path / COMPLETE).is_file():
            complete.append((int(path.name.rpartition("-")[2]), path))
        else:
            shutil.rmtree(path, ignore_errors=True)
    return max(complete)[1] if complete else None

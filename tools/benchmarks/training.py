"""What compression costs in training, against plain fine-tuning of the same model on the same batches.

    python -m tools.benchmarks.training            measure, write results/performance/training.json and the document
    python -m tools.benchmarks.training --render   the section of docs/performance.md again, from the record

Every round takes one optimizer step with every arm, in an order that rotates; ratios are medians over rounds. The arms
freeze the same parameters, have no dropout and no noise of their own, clip and step as the Trainer does, under the same
precision. Memory is that of a process of its own per arm, which trains through
`compressors.training.trainer.run_phase`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from compressors.freed_memory import keep_freed_memory
from compressors.pruning.admm import Admm
from compressors.quantization.fake_quant import activation_quantizers, quant_linears
from compressors.quantization.prepare_bake import prepare
from compressors.settings import Losses, Settings
from compressors.training.admm_schedule import MAX_DUAL_UPDATES, WATCH_EVERY, WATCHED_SAMPLES
from compressors.training.averaged_weights import AveragedWeights
from compressors.training.default_recipe import MEASURED_WIDTH, training_of
from compressors.training.distillation import Student, free_teacher_memory
from compressors.training.phases import freeze_embeddings
from compressors.training.trainer import Phase, PhaseData, mean_loss, optimizer_of, run_phase, wants_bf16
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import task_named
from nxm_export.data.features import Features
from tools.benchmarks.measuring import (
    DOCUMENT,
    RECORDS,
    Marks,
    Median,
    circumstances,
    in_child,
    load_record,
    median_of,
    paired_ratio,
    peak_bytes,
    resident_bytes,
    save_record,
)
from tools.benchmarks.training_section import (
    ARMS,
    MEMORY,
    CompiledRow,
    DualRow,
    MemoryRow,
    Record,
    StepRow,
    section,
)
from tools.rendering import write_section

TOOL = "tools/benchmarks/training.py"
FILE = RECORDS / "training.json"


class Sizes(TypedDict):
    """Of a BERT, by the names of its configuration."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int


MODELS: dict[str, Sizes] = {
    "MiniLM-L6": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12},
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "BERT-base, 3 of 12 blocks": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 3,
        "num_attention_heads": 12,
    },
}
SHAPES = (("MiniLM-L6", 32, 32), ("MiniLM-L6", 32, 128), ("BERT-base, 3 of 12 blocks", 16, 64))
SPAN = 200.0  # steps that the average of a usual run reaches back
AGAINST = {
    "teacher": "plain",
    "admm without penalty": "plain",
    "admm": "admm without penalty",
    "qat": "plain",
    "qat with teacher": "qat",
}
OPTION = "2:4+W4"
VOCABULARY = 30522


@dataclass
class Arm:
    """One way to train: `step` takes a batch through forward, backward, clipping, `before` (a penalty), the optimizer
    and the average of the weights."""

    student: Student
    optimizer: torch.optim.Optimizer
    bf16: bool
    before: Callable[[], None] = lambda: None
    averages: AveragedWeights | None = None

    def step(self, batch: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if self.bf16 else nullcontext():
            loss = self.student(**batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.before()
        self.optimizer.step()
        if self.averages is not None:
            self.averages.update()


def model_of(name: str) -> nn.Module:
    """A BERT of these sizes with random weights, two classes, no dropout, embeddings frozen."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **MODELS[name]
    )
    config._attn_implementation = "eager"  # what `compressors.models.load_model` takes on CPUs
    model: nn.Module = transformers.BertForSequenceClassification(config)
    freeze_embeddings(model)
    return model


def prepared(name: str) -> nn.Module:
    """The same model under `OPTION`, its ranges set as if it were calibrated."""
    model = model_of(name)
    family = FAMILIES["bert"]
    config = model.config.to_dict()  # type: ignore[operator, union-attr]
    plan = family.uniform_plan(config, WeightSpec.parse(OPTION))
    prepare(model, plan, family, config)
    freeze_embeddings(model)
    for quantizer in activation_quantizers(model):
        quantizer.set_scale(4.0 / 127)  # inputs of unit variance, and few are clipped
    return model


def batches(batch: int, sequence: int) -> Iterator[dict[str, Tensor]]:
    """Random token ids without padding, endlessly."""
    generator = torch.Generator().manual_seed(1)
    while True:
        ids = torch.randint(1000, VOCABULARY, (batch, sequence), generator=generator)
        labels = torch.randint(0, 2, (batch,), generator=generator)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def samples_of(batch: dict[str, Tensor]) -> list[Features]:
    """The samples of a batch without padding."""
    return [
        {"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": int(label)}
        for ids, label in zip(batch["input_ids"], batch["labels"], strict=True)
    ]


def arm(kind: str, name: str, bf16: bool, mode: str = "mask") -> tuple[Arm, Admm | None]:
    """The arm of this name (one of `ARMS`), and its ADMM state if it has one."""
    settings, admm = Settings(), None
    teacher = model_of(name).requires_grad_(False).eval() if "teacher" in kind else None
    training = training_of(settings, task_named("classification"), MEASURED_WIDTH)
    losses = training.losses if teacher is not None else Losses()
    model = model_of(name) if kind in ("plain", "teacher") else prepared(name)
    layers = quant_linears(model)
    if kind.startswith("qat"):
        for layer in layers.values():
            layer.freeze_mask()
    if kind.startswith("admm"):
        admm = Admm.of(layers, mode, settings.damping)
    if teacher is not None:
        free_teacher_memory(teacher, model, bf16)
    student = Student(model, losses, teacher, admm).train()
    made = Arm(student, optimizer_of(student, Phase("bench", 1, training.learning_rate)), bf16)
    if kind.startswith("qat"):
        made.averages = AveragedWeights(model, SPAN)
    if admm is not None and kind != "admm without penalty":
        admm.set_rho(1e-3)
        made.before = admm.add_penalty
    return made, admm


def time_steps(name: str, batch: int, sequence: int, rounds: int, bf16: bool) -> StepRow:
    """Seconds of a step of every arm, round by round."""
    arms = {kind: arm(kind, name, bf16)[0] for kind in ARMS}
    feed = batches(batch, sequence)
    taken: dict[str, list[float]] = {kind: [] for kind in ARMS}
    for number in range(-2, rounds):  # two rounds warm up
        sample, start = next(feed), number % len(ARMS)
        for kind in ARMS[start:] + ARMS[:start]:
            began = time.perf_counter()
            arms[kind].step(sample)
            if number >= 0:
                taken[kind].append(time.perf_counter() - began)
    return {
        "model": name,
        "batch": batch,
        "sequence": sequence,
        "rounds": rounds,
        "seconds": {kind: median_of(times) for kind, times in taken.items()},
        "ratios": {kind: {**paired_ratio(taken[kind], taken[other]), "to": other} for kind, other in AGAINST.items()},
    }


def time_compiled(name: str, batch: int, sequence: int, rounds: int, bf16: bool) -> list[CompiledRow]:
    """Steps of a model under ``torch.compile`` against the same steps without, and the seconds until its first is done.

    For a model that it cannot compile, ``failed`` is the first line of its error.
    """
    rows: list[CompiledRow] = []
    for kind in ("plain", "qat"):
        eager, compiled = (arm(kind, name, bf16)[0] for _ in range(2))
        compiled.student.model = torch.compile(compiled.student.model)  # type: ignore[assignment]  # it is called like one
        feed = batches(batch, sequence)
        taken: dict[str, list[float]] = {"eager": [], "compiled": []}
        row: CompiledRow = {"model": name, "batch": batch, "sequence": sequence, "arm": kind}
        rows.append(row)
        began = time.perf_counter()
        try:
            compiled.step(next(feed))
        except RuntimeError as error:  # which all of its errors are
            row["failed"] = str(error).strip().partition("\n")[0]
            continue
        row["first_step"] = time.perf_counter() - began
        for number in range(-2, rounds):
            sample = next(feed)
            for which, made in (("eager", eager), ("compiled", compiled)):
                began = time.perf_counter()
                made.step(sample)
                if number >= 0:
                    taken[which].append(time.perf_counter() - began)
        row["ratio"] = paired_ratio(taken["compiled"], taken["eager"])
    return rows


def time_dual(name: str, sequence: int, step_seconds: float, repeats: int, bf16: bool) -> list[DualRow]:
    """Seconds of a dual update and of what it logs, and their share of a phase with as many updates as there may be.

    The phase is that of six epochs over rotten tomatoes (7421 sentences), the data set of docs/results.md.
    """
    settings = Settings()
    steps = round(settings.admm_share * settings.epochs * -(-7421 // settings.batch_size))

    def row(mode: str, seconds: Median, updates: int) -> DualRow:
        share = updates * seconds["median"] / (steps * step_seconds)
        return {"model": name, "mode": mode, "seconds": seconds, "updates": updates, "steps": steps, "share": share}

    rows = []
    for mode in ("mask", "joint", "joint-ste"):
        _, admm = arm("admm", name, bf16, mode)
        assert admm is not None
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            admm.dual_update()
            times.append(time.perf_counter() - began)
        rows.append(row(mode, median_of(times), MAX_DUAL_UPDATES))
    rows.append(row("held-out loss", time_watch(name, sequence, 3, bf16), MAX_DUAL_UPDATES // WATCH_EVERY))
    return rows


def time_watch(name: str, sequence: int, repeats: int, bf16: bool) -> Median:
    """Seconds of the held-out loss under the projected weights, which every fourth dual update logs."""
    built, admm = arm("admm", name, bf16)
    assert admm is not None
    sample = next(batches(WATCHED_SAMPLES, sequence))
    features = samples_of(sample)
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        with admm.projected(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            mean_loss(built.student.model, features, 0)
        times.append(time.perf_counter() - began)
    return median_of(times)


def train_in_this_process(kind: str, name: str, batch: int, sequence: int, precision: str) -> Marks:
    """Bytes of this process before anything of the model exists, and at its peak through three steps of training."""
    keep_freed_memory()
    before = resident_bytes()
    built, admm = arm(kind, name, False)
    del built.optimizer, built.averages  # `run_phase` makes its own
    student, average = built.student, Settings().average if kind.startswith("qat") else 0.0
    features = [
        sample for made, _ in zip(batches(batch, sequence), range(3), strict=False) for sample in samples_of(made)
    ]
    with tempfile.TemporaryDirectory() as scratch:
        run_phase(
            student.model,
            Phase("bench", 3, 1e-4, batch, losses=student.losses, save_every=2, average=average),
            PhaseData(features, 0, Path(scratch), seed=0, precision=precision),
            teacher=student._teacher[0] if student._teacher else None,
            admm=admm,
            callbacks=[_Penalty(admm)] if admm else [],
        )
    return {"before": before, "peak": peak_bytes()}


class _Penalty(TrainerCallback):
    """Adds the penalty and updates the duals after every step, more often than any phase does."""

    def __init__(self, admm: Admm) -> None:
        self.admm = admm

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self.admm.add_penalty()

    def on_step_end(self, *_: object, **__: object) -> None:
        self.admm.dual_update()


def measure_memory(name: str, batch: int, sequence: int, precision: str, threads: int) -> MemoryRow:
    """Peak memory of training with every arm."""
    options = ("--model", name, "--shape", f"{batch}x{sequence}", "--precision", precision, "--threads", str(threads))
    marks_of = {kind: in_child(Marks, "tools.benchmarks.training", "--child", kind, *options) for kind in MEMORY}
    plain = marks_of["plain"]
    return {
        "model": name,
        "batch": batch,
        "sequence": sequence,
        "bytes": marks_of,
        "ratios": {
            kind: {
                "process": marks["peak"] / plain["peak"],
                "training": (marks["peak"] - marks["before"]) / (plain["peak"] - plain["before"]),
            }
            for kind, marks in marks_of.items()
        },
    }


def measure(
    rounds: int, precision: str, threads: int, shapes: Sequence[tuple[str, int, int]], compile_too: bool
) -> Record:
    """The record; memory is measured at all shapes but the first, where there are several."""
    keep_freed_memory()
    bf16 = wants_bf16(precision)
    memory = [measure_memory(*shape, precision, threads) for shape in shapes[1:] or shapes]
    steps: list[StepRow] = []
    dual: list[DualRow] = []
    for name, batch, sequence in shapes:
        tokens = batch * sequence
        steps.append(time_steps(name, batch, sequence, max(min(rounds, 6), rounds * 1024 // tokens), bf16))
    compiled = time_compiled(*shapes[0], rounds, bf16) if compile_too else []
    for name in dict.fromkeys(name for name, _, _ in shapes):
        first = next(row for row in steps if row["model"] == name)
        dual += time_dual(name, first["sequence"], first["seconds"]["admm"]["median"], 7, bf16)
    return {
        "schema": "nxm-bench-training/1",
        **circumstances(threads, ("torch", "transformers")),
        "option": OPTION,
        "precision": "bf16 autocast" if bf16 else "fp32",
        "steps": steps,
        "compiled": compiled,
        "dual": dual,
        "memory": memory,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of a batch of 1024 tokens; larger ones get fewer")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--compile", action="store_true", help="try torch.compile, too: needs a C++ compiler and minutes"
    )
    parser.add_argument("--render", action="store_true", help="only write the document again")
    parser.add_argument("--print", action="store_true", help="print the section, write nothing")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model in seconds: whether the bench runs; implies --print"
    )
    parser.add_argument("--child", choices=MEMORY, help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=list(MODELS), help=argparse.SUPPRESS)
    parser.add_argument("--shape", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    if chosen.child:
        batch, sequence = map(int, chosen.shape.split("x"))
        print(json.dumps(train_in_this_process(chosen.child, chosen.model, batch, sequence, chosen.precision)))
        return
    shapes = (("tiny", 4, 16),) if chosen.smoke else SHAPES
    record = (
        load_record(FILE, Record)
        if chosen.render
        else measure(1 if chosen.smoke else chosen.rounds, chosen.precision, chosen.threads, shapes, chosen.compile)
    )
    if chosen.print or chosen.smoke:
        print(section(record))
        return
    save_record(FILE, record)
    write_section(DOCUMENT, TOOL, section(record))


if __name__ == "__main__":
    main()

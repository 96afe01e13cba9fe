"""Train tiny dense models by one phase each, and save what came of them: run by `torchrun`, and in one process to
compare.

torchrun --nproc_per_node 2 -m tests.support.torchrun_phases DESK OUT

Every case is one whose losses are means over something that batches hold unequally much of: tokens, labelled tokens,
labelled samples.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from compressors import distributed
from compressors.models import load_model, load_tokenizer, resolve
from compressors.settings import Losses, Settings
from compressors.training.phases import without_dropout
from compressors.training.task_data import TaskDataRequest, read_task_data
from compressors.training.trainer import Phase, PhaseData, run_phase
from nxm_export.contract.tasks import task_named
from tests.support import tiny

# By name: the task, the losses, the share of samples without a label.
CASES: dict[str, tuple[str, Losses, float]] = {
    "tokens": ("token-classification", Losses(), 0.0),
    "tokens, taught": ("token-classification", Losses(0.0, 1.0, 0.0), 0.0),
    "tokens, all losses": ("token-classification", Losses(0.5, 1.0, 1.0), 0.0),
    "some labels": ("classification", Losses(), 0.7),
    "some labels, all losses": ("classification", Losses(0.5, 1.0, 1.0), 0.7),
    "answers": ("question-answering", Losses(0.5, 1.0, 1.0), 0.0),
}
STEPS, BATCH_SIZE = 6, 8


def write_models(desk: Path) -> None:
    """Write what the cases train on: a student, a teacher and data of every task."""
    for task in {task for task, _, _ in CASES.values()}:
        tiny.write_model("bert", desk / task / "student", head=task)
        tiny.write_model("bert", desk / task / "teacher", head=task, seed=1)
        tiny.write_data(desk / task, task)


def train(desk: Path, out: Path) -> None:
    """Train every case; the first process writes ``NAME.pt`` (the weights by name) into `out`."""
    for name, (task_name, losses, augment) in CASES.items():
        task, home = task_named(task_name), desk / task_name
        source, teacher = resolve(home / "student"), resolve(home / "teacher")
        settings = Settings()
        file = next(home.glob("train.*"))
        data = read_task_data(source, TaskDataRequest(task, str(file)), load_tokenizer(source), settings)
        model = load_model(source, task)
        without_dropout(model)  # as of every student: each process would draw its own
        taught = losses.logits or losses.hidden
        run_phase(
            model,
            Phase("qat", STEPS, 1e-3, BATCH_SIZE, losses=losses),
            PhaseData(data.train, data.pad_id, out / f"{name} work", 0, "fp32", task.output_kind, augment),
            teacher=load_model(teacher, task) if taught else None,
        )
        if not distributed.rank():
            torch.save({key: tensor.cpu() for key, tensor in model.state_dict().items()}, out / f"{name}.pt")
        distributed.wait()


if __name__ == "__main__":
    distributed.start()
    assert torch.distributed.get_world_size() == 2
    torch.set_num_threads(1)
    train(*map(Path, sys.argv[1:]))
    torch.distributed.destroy_process_group()

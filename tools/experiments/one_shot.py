"""What the ablations share: a dense model, its data, and how far another model is from it on dev."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compressors.models import ModelSource, load_model, load_tokenizer, resolve
from compressors.settings import Settings
from compressors.training.output_divergence import divergence
from compressors.training.task_data import TaskData, TaskDataRequest, read_task_data
from compressors.training.trainer import collate, predict
from nxm_export.contract.tasks import Task, task_named
from nxm_export.data.features import group_array, label_array, sorted_batches
from nxm_export.data.metrics import metric_named


@dataclass(frozen=True)
class Dense:
    """A dense model with its training and dev data."""

    source: ModelSource
    task: Task
    data: TaskData

    @classmethod
    def of(cls, arguments: argparse.Namespace, name: str = "classification") -> Dense:
        """From the arguments of `parser`, for a task by its name."""
        source, task = resolve(arguments.dense), task_named(name)
        settings = Settings(max_length=arguments.max_length)
        request = TaskDataRequest(task, arguments.train, arguments.dev)
        data = read_task_data(source, request, load_tokenizer(source), settings)
        return cls(source, task, data)

    def model(self) -> nn.Module:
        """The model, afresh, in evaluation mode."""
        model: nn.Module = load_model(self.source, self.task).eval()
        return model

    def batches(self, samples: int) -> list[dict[str, Tensor]]:
        """Batches of 32 of that many training samples, of like lengths."""
        train = self.data.train
        chosen = [train[i] for i in sorted(np.random.default_rng(0).permutation(len(train))[:samples])]
        return [collate([chosen[i] for i in batch], self.data.pad_id) for batch in sorted_batches(chosen, 32)]

    @cached_property
    def labels(self) -> npt.NDArray[np.int64]:
        """Label of every dev sample: for a classifier its class."""
        return np.asarray(label_array(self.data.dev))

    @cached_property
    def logits(self) -> npt.NDArray[np.float32]:
        """What the dense model says on dev: of a classifier (samples, classes)."""
        return self.predict(self.model())

    def predict(self, model: nn.Module) -> npt.NDArray[np.float32]:
        """What a model says on dev: of a classifier (samples, classes)."""
        return np.asarray(predict(model, self.data.dev, self.data.pad_id))

    def distance(self, outputs: npt.NDArray[np.float32]) -> float:
        """Mean divergence of a dev sample's outputs from the dense model's, by what the task's outputs mean
        (`compressors.training.output_divergence.divergence`)."""
        reference, actual = torch.from_numpy(self.logits), torch.from_numpy(outputs)
        return float(divergence(reference, actual, self.task.output_kind) / len(outputs))

    def metric(self, name: str, outputs: npt.NDArray[np.float32]) -> float:
        """A metric of outputs on dev, by its name."""
        groups = group_array(self.data.dev)
        return metric_named(name, self.data.classes or (), groups)(outputs, self.labels)

    def kl(self, logits: npt.NDArray[np.float32]) -> float:
        """Mean KL(dense || other) over dev, in nats."""
        return float(divergence(torch.from_numpy(self.logits), torch.from_numpy(logits)) / len(logits))

    def agreement(self, logits: npt.NDArray[np.float32]) -> float:
        """Share of dev samples that both put in the same class."""
        return float((logits.argmax(-1) == self.logits.argmax(-1)).mean())


def parser(description: str | None, max_length: int) -> argparse.ArgumentParser:
    """The arguments that every ablation takes."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("dense")
    made.add_argument("--train", required=True)
    made.add_argument("--dev", required=True)
    made.add_argument("--max-length", type=int, default=max_length)
    return made

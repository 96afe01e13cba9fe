"""A machine with several GPUs, where one process was started."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from compressors import distributed
from compressors.process_setup import prepare_process
from compressors.training.trainer import Phase, training_arguments
from nxm_export.errors import Notice

GPUS = 3


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """`GPUS` GPUs, as far as torch and the Trainer's arguments are asked."""

    def set_up(arguments: TrainingArguments) -> torch.device:
        arguments._n_gpu = GPUS
        return torch.device("cpu")

    monkeypatch.setattr(TrainingArguments, "_setup_devices", property(set_up))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: GPUS)


@pytest.mark.usefixtures("gpus")
def test_one_process_trains_on_one_gpu_and_never_by_data_parallel(tmp_path: Path) -> None:
    arguments = training_arguments(Phase("qat", 4, 1e-3, 8), tmp_path, 0, "fp32")
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 8  # the Trainer multiplies it by the number of GPUs


@pytest.mark.usefixtures("gpus")
def test_it_says_how_to_use_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(distributed, "start", lambda: None)
    with pytest.warns(
        Notice, match=f"{GPUS} GPUs are here.*nxm compress and nxm search.*torchrun --nproc-per-node {GPUS}"
    ):
        prepare_process()
    monkeypatch.setenv("WORLD_SIZE", str(GPUS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_process()

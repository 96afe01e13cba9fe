"""Distillation keeps little for the way back, and what it does to save memory and time changes no bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from compressors.settings import Losses
from compressors.training import distillation
from compressors.training.distillation import Student, free_teacher_memory, hidden_loss, real_rows, tokens_of
from compressors.training.phases import freeze_embeddings
from nxm_export.data.token_labels import NO_LABEL

BATCH, SEQUENCE, FEATURES, LAYERS = 4, 9, 8, 3
PADDED = torch.tensor([[1] * length + [0] * (SEQUENCE - length) for length in (9, 2, 5, 8)])
FULL = torch.ones_like(PADDED)


def states(seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BATCH, SEQUENCE, FEATURES, generator=generator).to(dtype) for _ in range(LAYERS)]


def by_definition(student: list[Tensor], teacher: list[Tensor], mask: Tensor) -> Tensor:
    """Everything left to autograd."""
    total = torch.zeros(())
    for ours, theirs in zip(student, teacher, strict=True):
        reference = theirs[mask.bool()].float()
        error = functional.mse_loss(ours[mask.bool()].float(), reference, reduction="sum")
        total = total + error / reference.square().sum()
    return total / len(student)


@pytest.mark.parametrize("mask", [PADDED, FULL], ids=["padded", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_of_hidden_states_is_its_definition_to_the_last_bit(mask: Tensor, dtype: torch.dtype) -> None:
    results = []
    for ours in (False, True):
        student, teacher = [x.requires_grad_() for x in states(1, dtype)], states(2, dtype)
        rows = real_rows(mask)
        taught = [tokens_of(x, rows) for x in teacher]
        loss = hidden_loss(student, taught, rows) if ours else by_definition(student, teacher, mask)
        torch.autograd.backward(loss * 10)
        results.append([loss.detach(), *(x.grad for x in student)])
        assert not ours or not taught, "each is let go when it was compared"
    for expected, actual in zip(*results, strict=True):
        assert expected is not None
        assert actual is not None
        assert torch.equal(actual, expected)
        assert expected.abs().sum() > 0


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """Inside the block, the size of whatever autograd keeps for the way back."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@pytest.mark.parametrize("mask", [PADDED, FULL], ids=["padded", "full"])
def test_of_both_hidden_states_the_difference_alone_is_kept(mask: Tensor) -> None:
    student, rows = [x.requires_grad_() for x in states(1)], real_rows(mask)
    with kept_bytes() as kept:
        hidden_loss(student, [tokens_of(x, rows) for x in states(2)], rows)
    difference = int(mask.sum()) * FEATURES * 4
    indices = 0 if rows is None else int(mask.sum()) * 8
    numbers = 4 + 4  # of each layer: its energy, and its error for the gradient of that
    assert difference * LAYERS <= sum(kept) <= (difference + indices + numbers) * LAYERS


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model.eval()


def answers(model: nn.Module, mask: Tensor, bf16: bool) -> list[Tensor]:
    ids = torch.randint(1, 50, mask.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return [output.logits, *output.hidden_states]


@pytest.mark.parametrize("bf16", [True, False])
def test_a_lightened_teacher_answers_the_same_to_the_last_bit(bf16: bool) -> None:
    teacher = classifier().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_()
    freeze_embeddings(student)
    before = answers(teacher, PADDED, bf16)
    free_teacher_memory(teacher, student, bf16)
    for expected, actual in zip(before, answers(teacher, PADDED, bf16), strict=True):
        assert torch.equal(actual, expected)
    ours, theirs = dict(student.named_parameters()), dict(teacher.named_parameters())
    shared = {name for name, parameter in theirs.items() if parameter.data_ptr() == ours[name].data_ptr()}
    assert {name for name in theirs if "_embeddings" in name} == shared, "the tables, which are not trained"
    rounded = {name for name, parameter in theirs.items() if parameter.dtype == torch.bfloat16}
    assert rounded == ({name for name in theirs if "LayerNorm" not in name and name not in shared} if bf16 else set())


def test_a_teacher_with_other_tables_keeps_its_own() -> None:
    teacher, student = classifier(seed=0).requires_grad_(False), classifier(seed=1)
    freeze_embeddings(student)
    before = answers(teacher, FULL, False)
    free_teacher_memory(teacher, student, False)
    for expected, actual in zip(before, answers(teacher, FULL, False), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("labels", [[NO_LABEL] * 4, [0, NO_LABEL, NO_LABEL, 1]])
def test_a_batch_without_any_label_has_the_teachers_loss_alone(labels: list[int]) -> None:
    """One process's part of a batch may be such, or a batch of one."""
    teacher = classifier().requires_grad_(False)
    student = copy.deepcopy(teacher).requires_grad_()
    batch = {"input_ids": torch.randint(1, 50, PADDED.shape), "attention_mask": PADDED}
    loss = Student(student, Losses(task=0.5, logits=1.0), teacher, None)(**batch, labels=torch.tensor(labels))["loss"]
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert (float(loss.detach()) > 0.1) == (0 in labels)  # it says what its teacher says


def test_a_batch_without_any_label_and_teacher_has_a_gradient_of_zeros() -> None:
    """Under torchrun the other processes wait for it."""
    student = classifier()
    batch = {"input_ids": torch.randint(1, 50, PADDED.shape), "attention_mask": PADDED}
    Student(student, Losses(), None, None)(**batch, labels=torch.tensor([NO_LABEL] * BATCH))["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values()), gradients.keys()


@pytest.mark.parametrize("losses", [Losses(), Losses(0.0, 1.0), Losses(0.5, 1.0, 1.0)], ids=str)
@pytest.mark.parametrize("parts", [(slice(0, 2), slice(2, 4)), (slice(0, 1), slice(1, 4))], ids=["halves", "unequal"])
def test_the_mean_of_what_processes_give_is_the_loss_of_the_whole_batch(
    monkeypatch: pytest.MonkeyPatch, losses: Losses, parts: tuple[slice, slice]
) -> None:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    config.num_labels = 3
    made: list[nn.Module] = [transformers.BertForTokenClassification(config) for _ in range(2)]
    teacher, model = (one.eval() for one in made)
    labels = torch.randint(0, 3, PADDED.shape)
    labels[PADDED == 0] = NO_LABEL
    labels[0, 2:] = NO_LABEL  # long, with two labels
    batch = {"input_ids": torch.randint(1, 50, PADDED.shape), "attention_mask": PADDED, "labels": labels}
    student = Student(model, losses, teacher, None)

    def gradients(rows: slice) -> tuple[float, Tensor]:
        model.zero_grad()
        loss = student(**{name: values[rows] for name, values in batch.items()})["loss"]
        loss.backward()
        return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loss, expected = gradients(slice(0, BATCH))
    own: list[list[Tensor]] = []  # by process, what it adds up with the others

    def noted(x: Tensor) -> Tensor:
        own[-1].append(x.detach().clone())
        return x

    monkeypatch.setattr(distillation, "world_size", lambda: 2)
    monkeypatch.setattr(distillation, "summed", noted)
    for part in parts:
        own.append([])
        gradients(part)
    assert len(own[0]) == len(own[1]) > 0, "every process asks as often"
    totals = [one + other for one, other in zip(*own, strict=True)]
    halves = []
    for part in parts:
        answers = iter(totals)
        monkeypatch.setattr(distillation, "summed", lambda _, answers=answers: next(answers))
        halves.append(gradients(part))
    assert sum(value for value, _ in halves) / 2 == pytest.approx(loss, rel=1e-5)
    averaged = (halves[0][1] + halves[1][1]) / 2
    assert float((averaged - expected).norm()) < 1e-5 * float(expected.norm()), "float32 sums in another order"


def test_training_from_a_lightened_teacher_gives_the_same_weights() -> None:
    trained = []
    for light in (False, True):
        teacher = classifier().requires_grad_(False)
        student = copy.deepcopy(teacher).requires_grad_().train()
        freeze_embeddings(student)
        if light:
            free_teacher_memory(teacher, student, True)
        taught = Student(student, Losses(task=0.5, logits=1.0, hidden=1.0), teacher, None)
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-2)
        for step in range(3):
            torch.manual_seed(step)
            batch = {"input_ids": torch.randint(1, 50, PADDED.shape), "attention_mask": PADDED}
            with torch.autocast("cpu", torch.bfloat16):
                loss = taught(**batch, labels=torch.tensor([0, 1, 0, 1]))["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained.append(dict(student.named_parameters()))
    for name, expected in trained[0].items():
        assert torch.equal(trained[1][name], expected), name

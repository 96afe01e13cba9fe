"""The sensitivity table against a slow one: weights replaced by hand, whole forward passes, one sample at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertIntermediate

from compressors.models import load_model
from compressors.pruning import layer_inputs
from compressors.pruning.layerwise import ADMM, MAGNITUDE, SECOND_ORDER, OutputMetric, Solver
from compressors.search import one_shot, probe, sensitivity
from compressors.search.probe import InputScale
from compressors.search.sensitivity import Sensitivity, measure, read_sensitivities, write_sensitivities
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.contract.tasks import task_named
from nxm_export.errors import ArtifactError, DataError
from tests.support import tiny
from tests.support.memory import PeakOfLiveBytes
from tests.support.probing import Probed, probed
from tests.support.variants import variants

SPECS = [WeightSpec.parse(option) for option in ("2:4+W4", "W4", "2:4")]
Table = dict[tuple[str, str], Sensitivity]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Probed]:
    made: dict[str, Probed] = {}

    def get(family: str) -> Probed:
        if family not in made:
            made[family] = probed(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


def table_of(
    opened: Probed, directory: Path, specs: list[WeightSpec] = SPECS, solver: Solver = SECOND_ORDER, **options: Any
) -> Table:
    batches = opened.batches(0, 24)
    one_shot = opened.one_shot(batches, specs, solver)
    directory.mkdir(exist_ok=True)
    table = measure(opened.probe, batches, one_shot, dict.fromkeys(opened.probe.weights, specs), directory, **options)
    return {(entry.weight, entry.option): entry for entry in table}


class Slow(nn.Module):
    """A linear layer under a replaced weight and a quantized input, written as the definition says."""

    def __init__(self, linear: nn.Linear, weight: Tensor, scale: InputScale) -> None:
        super().__init__()
        self.weight, self.bias, self.scale = weight, linear.bias, scale

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is not None:
            x = torch.clamp(torch.round(x / self.scale), -128, 127) * self.scale
        return x @ self.weight.T + self.bias


@torch.no_grad()
def slow_kl(opened: Probed, weight: str, value: Tensor, scale: InputScale) -> float:
    """sum p log(p/q) per sample, from whole forward passes of a model loaded anew, without any hook."""
    dense, changed = (load_model(opened.source, task_named("classification")).eval() for _ in range(2))
    path, _, child = weight.removesuffix(".weight").rpartition(".")
    linear = changed.get_submodule(f"{path}.{child}")
    assert isinstance(linear, nn.Linear)
    setattr(changed.get_submodule(path), child, Slow(linear, value, scale))
    total, samples = 0.0, 0
    for batch in opened.batches(0, 24):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        p, q = (model(**inputs).logits.double().softmax(-1) for model in (dense, changed))
        total += float((p * (p.log() - q.log())).sum())
        samples += len(p)
    return total / samples


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert"])
def test_kl_is_that_of_whole_forward_passes_with_the_weight_replaced(
    models: Callable[[str], Probed], tmp_path: Path, family: str
) -> None:
    opened = models(family)
    table = table_of(opened, tmp_path)
    one_shot = opened.one_shot(opened.batches(0, 24), SPECS)
    assert len(table) == 6 * (1 if family == "albert" else tiny.LAYERS) * len(SPECS)
    for weight in opened.probe.weights:
        value, scale = one_shot(weight, SPECS[0])
        expected = slow_kl(opened, weight, value, scale)
        # float32 logits agree to 1e-6 or so, and divergences are squares of differences of 1e-3
        assert table[weight, "2:4+W4"].kl == pytest.approx(expected, rel=1e-3)
        assert expected > 0


def slow_statistics(opened: Probed, weight: str) -> tuple[Tensor, Tensor]:
    """(E[x x^T], mean squared gradient per output), one sample after the other, so without any padding."""
    model = load_model(opened.source, task_named("classification")).eval()
    seen: dict[str, Tensor] = {}

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen["x"], seen["y"] = args[0], output

    model.get_submodule(weight.removesuffix(".weight")).register_forward_hook(keep)
    hessian, fisher, tokens = torch.zeros(()).double(), torch.zeros(()).double(), 0
    for batch in opened.batches(0, 24, batch_size=1):
        model(**batch).loss.backward()
        x, g = seen["x"][0].detach().double(), seen["y"].grad[0].double()  # type: ignore[index]
        hessian, fisher, tokens = hessian + x.T @ x, fisher + g.square().sum(0), tokens + len(x)
    return hessian / tokens, fisher / tokens


def test_fisher_is_the_sum_over_outputs_of_errors_weighted_by_squared_gradients(
    models: Callable[[str], Probed], tmp_path: Path
) -> None:
    opened = models("bert")
    table = table_of(opened, tmp_path)
    one_shot = opened.one_shot(opened.batches(0, 24), SPECS)
    for weight in opened.probe.weights[1::5]:  # a key, which shares query's statistics, and one of every other kind
        hessian, fisher = slow_statistics(opened, weight)
        for option in SPECS:
            error = (opened.probe.layer(weight).weight.detach() - one_shot(weight, option)[0]).double()
            expected = sum(float(fisher[o] * (error[o] @ hessian @ error[o])) for o in range(len(error)))
            # float32 sums over some hundred tokens, in another order and without padding
            assert table[weight, str(option)].fisher == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", variants(tiny.FAMILIES, tiny.SHORT))
def test_skipping_the_blocks_before_changes_nothing(
    models: Callable[[str], Probed], tmp_path: Path, family: str
) -> None:
    opened = models(family)
    skipping, repeats = table_of(opened, tmp_path / "skipping"), opened.probe.repeats
    assert repeats == (family == "albert")  # it runs its block more than once, so no prefix may be skipped
    opened.probe.repeats = True
    try:
        assert table_of(opened, tmp_path / "whole") == skipping
    finally:
        opened.probe.repeats = repeats
    assert len({entry.kl for entry in skipping.values()}) > len(skipping) // 2


def test_the_model_is_as_before_after_a_table(models: Callable[[str], Probed], tmp_path: Path) -> None:
    opened = models("bert")
    fresh = load_model(opened.source, task_named("classification"))
    table_of(opened, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(opened.probe.model.parameters(), fresh.parameters(), strict=True))
    assert not any(layer._forward_pre_hooks or "forward" in vars(layer) for layer in opened.probe.model.modules())


@pytest.mark.parametrize("solver", [SECOND_ORDER, MAGNITUDE, ADMM])
def test_one_shot_weights_keep_their_pattern_and_grid(models: Callable[[str], Probed], solver: Solver) -> None:
    opened = models("bert")
    one_shot = opened.one_shot(opened.batches(0, 24), SPECS, solver)
    for option in SPECS:
        value, scale = one_shot(opened.probe.weights[4], option)
        if option.pattern:
            assert ((value.reshape(-1, 4) != 0).sum(-1) <= 2).all()
        if option.weight_bits:
            assert max(len(set(row.tolist())) for row in value) <= 15
        assert (scale is None) == (option.weight_bits is None)
    again = one_shot(opened.probe.weights[4], SPECS[0])[0]
    assert torch.equal(again, one_shot(opened.probe.weights[4], SPECS[0])[0])


def test_memory_does_not_grow_with_the_number_of_samples(models: Callable[[str], Probed], tmp_path: Path) -> None:
    opened = models("bert")

    def peak(samples: int) -> int:
        batches = [opened.batches(0, 8)[0]] * (samples // 8)
        with PeakOfLiveBytes() as measured:
            one_shot = opened.one_shot(batches, SPECS[:1])
            directory = tmp_path / str(samples)
            directory.mkdir()
            measure(opened.probe, batches, one_shot, dict.fromkeys(opened.probe.weights, SPECS[:1]), directory)
        return measured.peak

    few, many = peak(16), peak(80)
    hidden_state = opened.batches(0, 8)[0]["input_ids"].numel() * tiny.HIDDEN * 4
    assert few > hidden_state, "the profiler saw nothing"
    assert many - few < hidden_state, "not one hidden state more for 8 batches more"


def test_what_a_candidate_costs_is_what_its_recipe_makes_of_it(models: Callable[[str], Probed], tmp_path: Path) -> None:
    """The table of `admm` against its solver called by hand, for inputs read one sentence at a time."""
    opened, spec = models("bert"), SPECS[0]
    table = table_of(opened, tmp_path / "admm", SPECS[:1], ADMM)
    other = table_of(opened, tmp_path / "obs", SPECS[:1])
    for weight in opened.probe.weights[:6]:
        hessian, fisher = slow_statistics(opened, weight)
        dense = opened.probe.layer(weight).weight.detach()
        error = (dense - ADMM(dense, OutputMetric(hessian.float()), spec).weight).double()
        expected = sum(float(fisher[o] * (error[o] @ hessian @ error[o])) for o in range(len(error)))
        # A last digit of the moments may move a code; the error is near its least there, and hardly moves.
        assert table[weight, str(spec)].fisher == pytest.approx(expected, rel=0.02)
    assert sum(entry.fisher for entry in table.values()) < 0.95 * sum(entry.fisher for entry in other.values())


@pytest.mark.parametrize("fit", [True, False])
def test_the_weights_of_a_block_are_made_together_and_its_moments_let_go(
    fit: bool, models: Callable[[str], Probed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the moments of both blocks fit into memory, the samples pass once."""
    opened, asked = models("bert"), list[list[str]]()
    plain = layer_inputs.second_moments

    def counting(model: nn.Module, layers: Any, batches: Any) -> dict[str, Tensor]:
        asked.append(list(layers))
        return plain(model, layers, batches)

    monkeypatch.setattr(one_shot, "second_moments", counting)
    if not fit:
        monkeypatch.setattr(one_shot, "MOMENTS_IN_MEMORY", 1)
    made = opened.one_shot(opened.batches(0, 8), SPECS)
    for _ in range(2):
        for option in SPECS:
            for weight in opened.probe.weights:
                made(weight, option)
    weights = opened.probe.weights
    assert asked == ([weights] if fit else [weights[:6], weights[6:]])
    assert not made._moments


def test_a_broken_weight_is_named(tmp_path: Path) -> None:
    opened = probed(tmp_path)
    weight = opened.probe.weights[7]
    with torch.no_grad():
        opened.probe.layer(weight).weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=rf"{weight} holds NaN or infinite values"):
        table_of(opened, tmp_path / "table")


def test_an_overflow_names_the_weight_that_reads_it(tmp_path: Path) -> None:
    opened = probed(tmp_path)
    with torch.no_grad():
        opened.probe.model.get_parameter("bert.encoder.layer.0.output.LayerNorm.bias").fill_(float("inf"))
    with pytest.raises(DataError, match=r"layer\.1\.attention\.self\.query\.weight: calibration saw a NaN or infinite"):
        table_of(opened, tmp_path / "table")


def test_a_layer_that_no_text_reaches_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_its_layer(self: BertIntermediate, x: Tensor) -> Tensor:
        return torch.zeros(*x.shape[:-1], self.dense.out_features)

    monkeypatch.setattr(BertIntermediate, "forward", without_its_layer)
    silent = r"bert\.encoder\.layer\.0\.intermediate\.dense\.weight"
    with pytest.raises(DataError, match=f"{silent} never runs .* --keep-dense"):
        table_of(probed(tmp_path), tmp_path / "table")


def test_a_sensitivity_that_is_no_number_names_weight_and_option(tmp_path: Path) -> None:
    opened = probed(tmp_path)
    weight = opened.probe.weights[8]
    with torch.no_grad():
        opened.probe.layer(weight).weight[0, 0] = 1e6  # more than float16 holds, in which 2:4 alone is stored
    with pytest.raises(DataError, match=rf"{weight} under 2:4: its sensitivity is (nan|inf)"):
        table_of(opened, tmp_path / "table")
    assert [file.name for file in (tmp_path / "table").iterdir()] == ["sensitivity-0.csv"], "block 0 is kept"


def test_an_empty_calibration_set_is_refused(models: Callable[[str], Probed], tmp_path: Path) -> None:
    opened = models("bert")
    with pytest.raises(DataError, match="calibration set is empty"):
        opened.probe.statistics([], 99.99)
    one_shot = opened.one_shot(opened.batches(0, 8), SPECS)
    with pytest.raises(DataError, match="calibration set is empty"):
        measure(opened.probe, [], one_shot, {}, tmp_path)


def test_a_file_that_is_no_table_is_refused(models: Callable[[str], Probed], tmp_path: Path) -> None:
    (tmp_path / "sensitivity-0.csv").write_text("weight,option\na,b\n")
    with pytest.raises(ArtifactError, match="not a sensitivity table"):
        table_of(models("bert"), tmp_path)


def test_measured_blocks_are_not_measured_again(
    models: Callable[[str], Probed], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, measured = models("bert"), list[int]()
    plain = sensitivity._measure_block

    def counting(*arguments: Any) -> list[Sensitivity]:
        measured.append(arguments[-1])
        if len(measured) == 2:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(sensitivity, "_measure_block", counting)
    with pytest.raises(KeyboardInterrupt):
        table_of(opened, tmp_path)
    table = table_of(opened, tmp_path)
    assert measured == [0, 1, 1]
    assert table_of(opened, tmp_path) == table
    assert measured == [0, 1, 1]
    monkeypatch.undo()
    assert table_of(opened, tmp_path / "at-once") == table
    part = read_sensitivities(tmp_path / "sensitivity-0.csv")
    assert [(entry.weight, entry.option) for entry in part] == list(table)


@pytest.mark.slow
def test_bert_large_shapes_need_nothing_else(tmp_path: Path) -> None:
    opened = probed(tmp_path, hidden=1024, intermediate=4096, layers=1)
    batches = opened.batches(0, 8)
    specs = [WeightSpec(NMPattern(2, 4), 4, 8)]
    one_shot = opened.one_shot(batches, specs)
    table = measure(opened.probe, batches, one_shot, dict.fromkeys(opened.probe.weights, specs), tmp_path)
    assert [entry.weight for entry in table] == list(opened.source.family.weights(opened.source.config))
    assert all(entry.kl > 0 and entry.fisher > 0 for entry in table)


def test_inputs_are_quantized_to_the_integers_of_float32_whatever_the_model_computes_in() -> None:
    """Codes from 64 on are closer than twice the step of bfloat16, which would round their quotients first."""
    x, scale = (2 * torch.randn(4000)).bfloat16(), 0.037
    codes = probe._quantized(x, scale) / scale
    expected = torch.fake_quantize_per_tensor_affine(x.float(), scale, 0, -128, 127) / scale
    torch.testing.assert_close(codes.round(), expected.round(), rtol=0, atol=0)


def test_a_table_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "sensitivity.csv"
    file.mkdir()
    with pytest.raises(ArtifactError, match=r"sensitivity.csv: cannot be written .* choose another place"):
        write_sensitivities(file, [Sensitivity("a.weight", "W8", 0.5, 0.25)])
    assert list(tmp_path.iterdir()) == [file]

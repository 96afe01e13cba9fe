"""A compressed checkpoint is read back as written, and everything that was damaged or swapped is refused by name."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nxm_export.contract.checkpoint import (
    open_checkpoint,
    pattern_violations,
    read_config,
    read_tensor,
    require_safetensors,
)
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.contract.pooling import read_pooling
from nxm_export.contract.tasks import TASKS
from nxm_export.errors import ArtifactError, ExportError, NxmError, PlanError
from nxm_export.hf.model_loading import load_task_model
from tests.support import baked, tiny
from tests.support.variants import variants

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
KEY_INPUT = "bert.encoder.layer.0.attention.self.key.input_scale"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return baked.write_checkpoint("bert", tmp_path_factory.mktemp("good") / "checkpoint")


@pytest.fixture
def copy(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "copy")


def edit_weights(path: Path, edit: Callable[[dict[str, Any]], Any], file: str = "model.safetensors") -> None:
    tensors = load_file(path / file)
    edit(tensors)
    save_file(tensors, path / file, {"format": "pt"})


@pytest.mark.parametrize("spec", ["2:4+W8", "1:4+W4", "W2", "4:8+W3", "2:4"])
def test_a_checkpoint_gives_back_pattern_codes_and_scales(tmp_path: Path, spec: str) -> None:
    checkpoint = open_checkpoint(baked.write_checkpoint("bert", tmp_path, spec=spec))
    checkpoint.require_valid()
    planned = WeightSpec.parse(spec)
    for name in checkpoint.plan.weights:
        weight = checkpoint.weight(name)
        assert weight.dtype == np.float32
        if planned.pattern:
            groups = (weight != 0).reshape(-1, planned.pattern.m).sum(axis=1)
            assert groups.max() <= planned.pattern.n
        if planned.qmax:
            codes, scale = checkpoint.codes(name), checkpoint.weight_scale(name)
            assert codes.dtype == np.int8
            assert np.abs(codes).max() == planned.qmax
            np.testing.assert_array_equal(codes.astype(np.float32) * scale[:, None], weight)


def test_plain_transformers_loads_the_compressed_weights(good: Path) -> None:
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(good)
    np.testing.assert_array_equal(model.get_parameter(QUERY).detach().numpy(), open_checkpoint(good).weight(QUERY))


def test_a_sharded_model_is_read_like_a_whole_one(good: Path, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    half = sorted(tensors)[: len(tensors) // 2]
    save_file(
        {k: v for k, v in tensors.items() if k in half}, copy / "model-00001-of-00002.safetensors", {"format": "pt"}
    )
    save_file(
        {k: v for k, v in tensors.items() if k not in half}, copy / "model-00002-of-00002.safetensors", {"format": "pt"}
    )
    (copy / "model.safetensors").unlink()
    index = {
        "metadata": {},
        "weight_map": {k: f"model-0000{1 if k in half else 2}-of-00002.safetensors" for k in tensors},
    }
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    open_checkpoint(copy).require_valid()
    np.testing.assert_array_equal(open_checkpoint(copy).weight(QUERY), open_checkpoint(good).weight(QUERY))
    for spoiled, message in (
        ({"weight_map": {}}, "not in the weight map"),
        ([], "Expected `object`, got `array`"),
        ({"weight_map": {QUERY: 1}}, r"weight_map\.\S+: Expected `str`, got `int`"),
        ({"weight_map": {QUERY: "../../x.safetensors"}}, "points out of the directory"),
    ):
        (copy / "model.safetensors.index.json").write_text(json.dumps(spoiled))
        with pytest.raises(ArtifactError, match=message):
            open_checkpoint(copy).weight(QUERY)


def test_files_of_others_may_hold_numbers_that_json_does_not_have(good: Path, copy: Path) -> None:
    index = {"metadata": {"loss": float("nan")}, "weight_map": {QUERY: "model-00001-of-00001.safetensors"}}
    (copy / "model.safetensors").rename(copy / "model-00001-of-00001.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((copy / "config.json").read_text())
    text = json.dumps({**config, "initial_score": float("-inf")}).replace("-Infinity", '-Infinity, "limit": 1e400')
    (copy / "config.json").write_text(text)
    assert (read_config(copy)["initial_score"], read_config(copy)["limit"]) == (-np.inf, np.inf)
    np.testing.assert_array_equal(read_tensor(copy, QUERY), open_checkpoint(good).weight(QUERY))
    modules = [{"type": f"x.{name}", "path": path} for name, path in (("Transformer", ""), ("Pooling", "Pooling"))]
    (copy / "modules.json").write_text(json.dumps([{**module, "weight": float("nan")} for module in modules]))
    (copy / "Pooling").mkdir()
    (copy / "Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true, "scale": 1e400}')
    (copy / "sentence_bert_config.json").write_text('{"max_seq_length": 16, "scale": Infinity}')
    assert read_pooling(copy).max_length == 16


def remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def write(name: str, content: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        (path / name).write_text(content)

    return edit


def truncate(name: str, keep: int) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        (path / name).write_bytes((path / name).read_bytes()[:keep])

    return edit


def weights(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda path: edit_weights(path, edit)


def scales(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda path: edit_weights(path, edit, "nxm_scales.safetensors")


def scaled(name: str, factor: float) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        tensors[name] = np.asarray(tensors[name] * factor, np.float32)

    return edit


def one_number(name: str, index: Any, value: float) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][index] = value

    return edit


def revive(tensors: dict[str, Any]) -> None:
    """Set one masked weight of output channel 3 to the channel's scale, that is to code 1."""
    weight = tensors[QUERY].copy()
    zero = int(np.argmax(weight[3] == 0))
    weight[3, zero] = np.abs(weight[3]).max() / 127
    tensors[QUERY] = weight


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "has no config.json: not a Hugging Face model directory"),
        (write("config.json", "{"), "config.json: not valid JSON"),
        (write("config.json", "[]"), "config.json: not a JSON object"),
        (write("config.json", '{"model_type": "t5"}'), "supported families: bert"),
        (write("config.json", '{"model_type": "bert"}'), "must be a positive integer, got None; is the file complete?"),
        (remove("nxm_plan.json"), "it is a plain model, not a compressed checkpoint; run `nxm compress` on it first"),
        (write("nxm_plan.json", "{}"), "not a nxm-plan/1 file"),
        (remove("nxm_scales.safetensors"), "the checkpoint has a plan and no scales; compress again"),
        (truncate("nxm_scales.safetensors", 50), "the file is truncated or not safetensors"),
        (write("nxm_scales.safetensors", ""), "the file is truncated or not safetensors"),
        (scales(lambda t: t.pop(f"{QUERY}_scale")), f"the plan needs {QUERY}_scale, and it is not there"),
        (scales(lambda t: t.pop(KEY_INPUT)), f"the plan needs {KEY_INPUT}"),
        (scales(scaled(KEY_INPUT, 1.5)), "read the same tensor with different input scales"),
        (scales(scaled(KEY_INPUT, 0.0)), "input_scale must be one positive number"),
        (scales(scaled(KEY_INPUT, float("nan"))), "input_scale must be one positive number"),
        (scales(scaled(f"{QUERY}_scale", -1.0)), "_scale must be 32 positive numbers"),
        (scales(scaled(f"{QUERY}_scale", 0.5)), "has a code of 254, beyond the planned 127"),
        (scales(scaled(f"{QUERY}_scale", 1.01)), "weights are not code * scale; it was changed after compression"),
        (
            scales(lambda t: t.update({f"{QUERY}_scale": t[f"{QUERY}_scale"][:-1]})),
            "_scale must be 32 positive numbers",
        ),
        (remove("model.safetensors"), "has no model.safetensors: no weights to load"),
        (truncate("model.safetensors", 1000), "the file is truncated or from another model"),
        (truncate("model.safetensors", 0), "the file is truncated or from another model"),
        (weights(lambda t: t.pop(QUERY)), f"{QUERY} cannot be read"),
        (weights(lambda t: t.update({QUERY: t[QUERY][:16]})), "is (16, 32) on disk and (32, 32) in the plan"),
        (weights(one_number(QUERY, (3, 5), np.nan)), "holds NaN or infinite values"),
        (weights(revive), f"{QUERY} is planned 2:4, but output channel 3 keeps more than 2 of inputs"),
    ],
)
def test_damage_is_named(copy: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(copy)
    with pytest.raises(NxmError) as caught:
        open_checkpoint(copy).require_valid()
    assert message in str(caught.value)


def test_weights_off_their_grid_by_one_bit_are_refused(copy: Path) -> None:
    def shift_one_weight(tensors: dict[str, Any]) -> None:
        weight = tensors[QUERY].copy()
        at = np.unravel_index(np.abs(weight).argmax(), weight.shape)
        weight[at] = np.nextafter(weight[at], np.float32(0))
        tensors[QUERY] = weight

    edit_weights(copy, shift_one_weight)
    with pytest.raises(ArtifactError, match=r"1 weights are not code \* scale"):
        open_checkpoint(copy).require_valid()


def test_a_plan_of_another_model_is_refused(copy: Path, tmp_path: Path) -> None:
    other = baked.write_checkpoint("electra", tmp_path / "electra")
    shutil.copy(other / "nxm_plan.json", copy / "nxm_plan.json")
    with pytest.raises(PlanError, match="the plan is for a electra model, this model is bert"):
        open_checkpoint(copy)


def test_violations_are_those_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    weight = rng.integers(-1, 2, (5, 24)).astype(np.float32)
    for pattern in (NMPattern(2, 4), NMPattern(1, 2), NMPattern(3, 8)):
        slow = [
            (o, k)
            for o in range(5)
            for k in range(0, 24, pattern.m)
            if sum(weight[o, k + i] != 0 for i in range(pattern.m)) > pattern.n
        ]
        assert list(pattern_violations(weight, pattern)) == slow


def test_a_pickle_is_refused_with_a_conversion_that_works(tmp_path: Path) -> None:
    """The command of the message is run as it is; a sharded pickle takes the same command."""
    import torch

    path = tiny.write_model("bert", tmp_path / "it's a model", head="classification")
    tensors = {name: torch.from_numpy(array) for name, array in load_file(path / "model.safetensors").items()}
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    torch.save({name: tensors[name] for name in names[:5]}, path / "pytorch_model-00001-of-00002.bin")
    torch.save({name: tensors[name] for name in names[5:]}, path / "pytorch_model-00002-of-00002.bin")
    torch.save({"lr": 1}, path / "training_args.bin")
    with pytest.raises(ArtifactError, match="loading a pickle runs code of whoever wrote it") as caught:
        read_config(path)
    command = str(caught.value).partition("convert it once: ")[2]
    subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
    require_safetensors(path)
    np.testing.assert_array_equal(read_tensor(path, QUERY), tensors[QUERY].numpy())


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    (tmp_path / "config.json").write_text("{}")
    values = torch.tensor([[1.5, -2.25]])
    save_torch({"half": values.half(), "brain": values.bfloat16()}, tmp_path / "model.safetensors")
    for name in ("half", "brain"):
        assert read_tensor(tmp_path, name).dtype == np.float32
        np.testing.assert_array_equal(read_tensor(tmp_path, name), values.numpy())


class TestLoadTaskModel:
    @pytest.mark.parametrize(
        ("family", "task"),
        variants(
            [pair for pair in itertools.product(FAMILIES, TASKS) if pair[1] not in FAMILIES[pair[0]].missing_heads],
            lambda pair: pair[0] in tiny.SHORT,
        ),
    )
    def test_a_whole_model_is_loaded_silently(
        self, family: str, task: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = tiny.write_model(family, tmp_path, head=task, layers=1)
        capfd.readouterr()
        model = load_task_model(path, TASKS[task])
        assert not model.training
        assert capfd.readouterr() == ("", "")

    def test_a_missing_head_is_not_made_up(self, tmp_path: Path) -> None:
        """transformers fills it with random numbers, and a graph of those would be exported."""
        path = tiny.write_model("bert", tmp_path)
        with pytest.raises(ExportError, match="its head is none of a supported kind, not classification; fine-tune it"):
            load_task_model(path, TASKS["classification"])

    def test_a_head_of_another_task_is_refused(self, tmp_path: Path) -> None:
        path = tiny.write_model("bert", tmp_path, head="regression")
        with pytest.raises(ExportError, match="its head is regression, not classification"):
            load_task_model(path, TASKS["classification"])

    @pytest.mark.parametrize("name", ["classifier.weight", QUERY])
    def test_a_missing_weight_is_not_made_up(self, copy: Path, name: str) -> None:
        edit_weights(copy, lambda tensors: tensors.pop(name))
        with pytest.raises(ArtifactError, match=f"1 weights are missing or of another shape, such as {name}"):
            load_task_model(copy, TASKS["classification"])

    def test_a_truncated_file_is_an_error_of_ours(self, copy: Path) -> None:
        truncate("model.safetensors", 5000)(copy)
        with pytest.raises(ArtifactError, match="its weights cannot be read"):
            load_task_model(copy, TASKS["classification"])

"""A model is loaded with all of its weights, and nothing in the file is dropped."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import onnx
import pytest

from compressors.models import load_model, resolve
from nxm_export.contract.checkpoint import read_config
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.tasks import TASKS, labels_of, task_of
from nxm_export.errors import ArtifactError
from nxm_export.graph.exporter import export
from nxm_export.hf.model_loading import load_task_model
from nxm_export.hf.protocols import AutoClass
from tests.support import tiny
from tests.support.variants import variants

if TYPE_CHECKING:
    from torch import Tensor

Weights = Mapping[str, "Tensor"]
CLASSIFICATION = TASKS["classification"]


def changed(path: Path, change: Callable[[Weights], Weights]) -> Path:
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.clone() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(dict(change(weights)), path / "model.safetensors", {"format": "pt"})
    return path


def with_copy(old: str, new: str) -> Callable[[Weights], Weights]:
    """The weights, and those whose name holds `old` again under `new`."""
    return lambda weights: {**weights, **{n.replace(old, new): w.clone() for n, w in weights.items() if old in n}}


@pytest.mark.parametrize(
    ("family", "head"),
    variants(
        [*((family, "classification") for family in tiny.FAMILIES), ("bert", None)],
        (("bert", "classification"), ("albert", "classification"), ("bert", None)),
    ),
)
@pytest.mark.parametrize("what", ["more layers", "relative positions", "embeddings"])
def test_what_the_model_does_not_take_is_an_error(tmp_path: Path, family: str, head: str | None, what: str) -> None:
    kind = FAMILIES[family]
    blocks, query = kind.block.split(".")[-2], kind.linears[0].path.rpartition(".")[2]
    norm = "embeddings.norm" if family == "modernbert" else "embeddings.LayerNorm"
    first = 0 if family == "albert" else 1
    old, new = {
        "more layers": (f"{blocks}.{first}.", f"{blocks}.{first + 1}."),
        "relative positions": (f"{query}.weight", "distance_embedding.weight"),
        "embeddings": (norm, "embeddings.more"),
    }[what]
    path = changed(tiny.write_model(family, tmp_path, head=head), with_copy(old, new))
    with pytest.raises(ArtifactError, match="weights that the model does not take"):
        load_model(resolve(path), CLASSIFICATION, classes=None if head else ["a", "b"])


@pytest.mark.parametrize("family", variants(tiny.FAMILIES, tiny.SHORT))
def test_heads_of_pretraining_may_be_left_out(tmp_path: Path, family: str) -> None:
    import torch
    import transformers

    masked = cast("AutoClass", transformers.AutoModelForMaskedLM).from_config(tiny._config(family, 32, 64, 2))
    masked.save_pretrained(tmp_path)
    tiny.write_tokenizer(family, tmp_path)
    load_model(resolve(tmp_path), CLASSIFICATION, classes=["a", "b", "c"])
    fitted = tiny.write_model(family, tmp_path / "head", head="classification")
    changed(fitted, lambda weights: {**weights, "cls.predictions.bias": torch.zeros(3)})
    load_task_model(fitted, CLASSIFICATION)


def test_another_head_is_left_out_where_the_head_is_new_and_only_there(tmp_path: Path) -> None:
    path = tiny.write_model("bert", tmp_path, head="question-answering")
    load_model(resolve(path), CLASSIFICATION, classes=["a", "b"])
    kept = changed(tiny.write_model("bert", tmp_path / "kept", head="classification"), with_copy("classifier.", "top."))
    with pytest.raises(ArtifactError, match=r"2 weights that the model does not take, such as top\.bias"):
        load_task_model(kept, CLASSIFICATION)


@pytest.mark.parametrize(
    ("prefix", "head"), [("module.", "classification"), ("_orig_mod.", None), ("_orig_mod.module.", "classification")]
)
def test_names_of_a_wrapper_come_with_the_command_that_mends_them(
    tmp_path: Path, prefix: str, head: str | None
) -> None:
    path = tiny.write_model("bert", tmp_path, head=head)
    changed(path, lambda weights: {f"{prefix}{name}": tensor for name, tensor in weights.items()})
    with pytest.raises(ArtifactError, match="saved in a wrapper") as caught:
        load_model(resolve(path), CLASSIFICATION, classes=None if head else ["a", "b"])
    _, _, command = str(caught.value).partition("rename them: ")
    python, flag, script = shlex.split(command)
    assert (python, flag) == ("python", "-c")
    exec(script, {})  # what the command would run, without the seconds that loading torch again takes
    load_model(resolve(path), CLASSIFICATION, classes=None if head else ["a", "b"])


def test_an_adapter_of_peft_is_named_with_the_command_that_merges_it(tmp_path: Path) -> None:
    adapter = {"peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": "some/model"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"is a PEFT adapter .*peft\.AutoPeftModelForSequenceClassification.*merge"):
        read_config(tmp_path)
    with pytest.raises(ArtifactError, match=r"is a PEFT adapter"):
        resolve(tmp_path)
    tiny.write_model("bert", tmp_path, head="classification")
    with pytest.raises(ArtifactError, match="holds a model and a PEFT adapter"):
        read_config(tmp_path)


def test_parts_of_an_adapter_in_the_weights_are_named(tmp_path: Path) -> None:
    path = tiny.write_model("bert", tmp_path, head="classification")
    changed(path, with_copy("query.weight", "query.lora_A.default.weight"))
    with pytest.raises(ArtifactError, match=r"parts of a PEFT adapter .*merge_and_unload"):
        load_task_model(path, CLASSIFICATION)


@pytest.mark.parametrize(("count", "task"), [(1, "regression"), (2, "classification"), (5, "classification")])
def test_a_number_of_labels_without_names_is_as_transformers_reads_it(tmp_path: Path, count: int, task: str) -> None:
    import transformers

    path = tiny.write_model("bert", tmp_path, head="classification", classes=tuple("abcde"[:count]))
    config = read_config(path)
    del config["id2label"], config["label2id"]
    config["num_labels"] = count
    (path / "config.json").write_text(json.dumps(config))
    assert labels_of(config) == tuple(transformers.AutoConfig.from_pretrained(path).id2label.values())
    assert task_of(config) == task
    load_task_model(path, TASKS[task])


@pytest.mark.parametrize("count", [0, -1, "two", 2.5, True])
def test_a_number_of_labels_that_is_none_is_refused(count: object) -> None:
    with pytest.raises(ArtifactError, match="num_labels must be a number of classes"):
        labels_of({"num_labels": count})


@pytest.mark.parametrize("family", variants(["nomic_bert", "gte", "jina_embeddings_v3"], ("nomic_bert",)))
def test_a_model_under_the_names_of_its_hub_is_the_same_model(family: str, tmp_path: Path) -> None:
    """Published files of these families have other names, and one matrix for query, key and value."""
    import transformers
    from safetensors.torch import load_file

    ours, hub = tiny.write_model(family, tmp_path / "ours", head="classification"), tmp_path / "hub"
    model = load_task_model(ours, CLASSIFICATION)
    config = transformers.AutoConfig.from_pretrained(ours)
    made = cast("AutoClass", transformers.AutoModelForSequenceClassification).from_config(config)
    made.load_state_dict(model.state_dict())
    made.save_pretrained(hub)  # a model that no file of ours was loaded into: under the names of the hub
    tiny.write_tokenizer(family, hub)
    assert not set(FAMILIES[family].weights(read_config(hub))) & set(load_file(hub / "model.safetensors"))
    loaded = load_task_model(hub, CLASSIFICATION).state_dict()
    assert {name: value.tolist() for name, value in loaded.items()} == {
        name: value.tolist() for name, value in model.state_dict().items()
    }
    graphs = [export(path, tmp_path / f"{path.name}-graph").path for path in (ours, hub)]
    initializers = [{value.name: value.raw_data for value in onnx.load(graph).graph.initializer} for graph in graphs]
    assert initializers[0] == initializers[1]

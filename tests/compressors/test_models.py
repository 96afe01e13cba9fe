"""Loading a dense model: what its file lacks is never replaced by random numbers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from compressors.models import cut_notice, load_model, load_tokenizer, max_length, resolve
from compressors.settings import Settings
from nxm_export.cli import main
from nxm_export.contract.plan import NMPattern, WeightSpec
from nxm_export.contract.tasks import task_named
from nxm_export.errors import ArtifactError, Notice
from nxm_export.pipeline.request import Request
from nxm_export.pipeline.run import _with_length_of, head_notice
from tests.support import tiny


def without(directory: Path, *starts: str) -> Path:
    """Take the tensors whose names start so out of a model's file."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    remaining = {name: tensor for name, tensor in tensors.items() if not name.startswith(starts)}
    assert len(remaining) < len(tensors)
    save_file(remaining, file, {"format": "pt"})
    return directory


@pytest.mark.parametrize("classes", [None, ["no", "yes", "maybe"]])
def test_a_missing_matrix_of_the_encoder_is_named(tmp_path: Path, classes: list[str] | None) -> None:
    name = "bert.encoder.layer.0.attention.self.query.weight"
    source = resolve(without(tiny.write_model("bert", tmp_path / "model", head="classification"), name))
    with pytest.raises(ArtifactError, match=rf"1 weights are missing or of another shape, such as {name}"):
        load_model(source, task_named("classification"), classes=classes)


def test_a_missing_head_is_named_unless_a_new_one_is_wanted(tmp_path: Path) -> None:
    source = resolve(
        without(tiny.write_model("bert", tmp_path / "model", head="classification"), "classifier.", "bert.pooler.")
    )
    with pytest.raises(ArtifactError, match=r"4 weights are missing or of another shape, such as bert\.pooler"):
        load_model(source, task_named("classification"))
    assert load_model(source, task_named("classification"), classes=["no", "yes"]) is not None


def test_an_embedding_model_needs_its_encoder(tmp_path: Path) -> None:
    directory = tiny.write_model("bert", tmp_path / "model", head="embedding")
    assert load_model(resolve(directory), task_named("embedding")) is not None
    without(directory, "bert.embeddings.word_embeddings")
    with pytest.raises(ArtifactError, match="word_embeddings"):
        load_model(resolve(directory), task_named("embedding"))


@pytest.mark.parametrize("task", ["classification", "embedding"])
def test_a_model_that_was_pruned_elsewhere_is_used_and_said_to_be_pruned(tmp_path: Path, task: str) -> None:
    directory = tiny.write_model("bert", tmp_path / "model", head=task)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        load_model(resolve(directory), task_named(task))
    tensors = load_file(directory / "model.safetensors")
    matrices = [name for name in resolve(directory).family.weights(resolve(directory).config) if "query" in name]
    for name in matrices:
        tensors[name][:, ::2] = 0
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.warns(
        Notice, match=rf"^{len(matrices)} of \d+ matrices of .* are zero in at least 10% of their weights"
    ):
        load_model(resolve(directory), task_named(task))


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("embedding", "its embedding head is dropped (--task embedding keeps it), and a new classification head"),
        (None, "it has no classification head, and a new classification head"),
        ("classification", None),
    ],
)
def test_what_becomes_of_a_head_is_said(tmp_path: Path, head: str | None, said: str | None) -> None:
    model = tiny.write_model("bert", tmp_path / "model", head=head)
    spec = WeightSpec.parse("2:4+W8")
    request = Request(str(model), task="classification", train="t", dev="d", spec=spec, settings=Settings())
    told = head_notice(request)
    assert told == (None if said is None else f"{model}: {said} is trained before it is compressed")


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("compress", ()),
        ("compress", ("--steps", "0")),
        ("search", ("--compression", "0.8")),
        ("run", ()),
        ("run", ("--dry-run",)),
    ],
)
def test_a_compressed_checkpoint_is_not_taken_for_a_dense_model(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, verb: str, more: tuple[str, ...]
) -> None:
    checkpoint = tiny_checkpoint("bert")
    data = [f"--{name}={checkpoint.parent / name}.tsv" for name in ("train", "dev")[: 1 if verb == "search" else 2]]
    result = CliRunner().invoke(main, [verb, str(checkpoint), *data, f"--out={tmp_path / 'out'}", *more])
    assert result.exit_code == 1
    assert f"{checkpoint} is compressed already (nxm_plan.json), and would count as the dense model" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "positions", "tokenizers", "made_for", "requested", "expected"),
    [
        ("classification", 8192, 8192, None, None, 512),
        ("classification", 8192, 8192, None, 8192, 8192),
        ("classification", 8192, 128, None, None, 128),
        ("classification", 64, 10**30, None, None, 64),
        ("embedding", 8192, 8192, 8192, None, 8192),
        ("embedding", 8192, 8192, 256, None, 256),
        ("embedding", 8192, 2048, 8192, None, 2048),
    ],
)
def test_inputs_are_512_tokens_long_unless_somebody_asks_for_more(
    tmp_path: Path,
    task: str,
    positions: int,
    tokenizers: int,
    made_for: int | None,
    requested: int | None,
    expected: int,
) -> None:
    directory = tiny.write_model("bert", tmp_path / "model", head=task)
    for name, key, value in (
        ("config.json", "max_position_embeddings", positions),
        ("sentence_bert_config.json", "max_seq_length", made_for),
    ):
        if value is not None:
            file = directory / name
            file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    source = resolve(directory)
    tokenizer = load_tokenizer(source)
    tokenizer.model_max_length = tokenizers
    assert max_length(source, tokenizer, task_named(task), requested) == expected
    told = cut_notice(source, tokenizer, task_named(task), requested)
    possible = min(positions, tokenizers)
    if requested is None and made_for is None and possible > 512:
        assert told is not None
        assert f"give --max-length {possible} " in told
    else:
        assert told is None, "nothing is lost, or somebody chose it"


@pytest.mark.parametrize(("length", "expected"), [(64, None), (512, None), (2048, 2048)])
def test_a_dense_model_that_was_trained_for_longer_inputs_keeps_them(
    tmp_path: Path, length: int, expected: int | None
) -> None:
    directory = tiny.write_model("bert", tmp_path / "dense", head="classification")
    for name, key, value in (
        ("config.json", "max_position_embeddings", 8192),
        ("tokenizer_config.json", "model_max_length", length),
    ):
        file = directory / name
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    request = Request(
        "dense",
        "classification",
        "train.tsv",
        "dev.tsv",
        WeightSpec(NMPattern(2, 4), 8, 8),
        settings=Settings(max_length=16),
    )
    assert _with_length_of(directory, request).max_length == expected

"""Loading a dense model: what its file lacks is never replaced by random numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from compressors.models import load_model, resolve
from nxm_export.contract.tasks import task_named
from nxm_export.errors import ArtifactError
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

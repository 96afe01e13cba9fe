"""The files of a sentence-transformers directory: what is written is read, and what cannot be computed is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nxm_export.contract.pooling import Pooling, read_pooling, write_pooling
from nxm_export.errors import ArtifactError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A sentence-transformers directory without its weights."""
    write_pooling(tmp_path, Pooling("mean", True), 32, 48, tmp_path)
    return tmp_path


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**(json.loads(file.read_text()) if file.is_file() else {}), **fields}))


class TestFiles:
    @pytest.mark.parametrize("pooling", [Pooling("mean", True, 48), Pooling("cls", False, 7)])
    def test_what_is_written_is_read(self, tmp_path: Path, pooling: Pooling) -> None:
        write_pooling(tmp_path, pooling, 32, pooling.max_length or 0, tmp_path)
        assert read_pooling(tmp_path) == pooling

    def test_newer_versions_name_one_mode(self, directory: Path) -> None:
        (directory / "1_Pooling" / "config.json").write_text('{"embedding_dimension": 32, "pooling_mode": "cls"}')
        assert read_pooling(directory).mode == "cls"

    @pytest.mark.parametrize(
        ("file", "fields", "message"),
        [
            ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling mean with max; .* one of mean, cls"),
            ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, "pooling lasttoken"),
            ("1_Pooling/config.json", {"include_prompt": False}, "leaves the prompt's tokens out"),
            ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "puts the prompt 'query' before"),
            ("sentence_bert_config.json", {"do_lower_case": True}, "lower-cases texts in front"),
        ],
    )
    def test_what_cannot_be_computed_is_refused(
        self, directory: Path, file: str, fields: dict[str, Any], message: str
    ) -> None:
        change(directory / file, **fields)
        with pytest.raises(ArtifactError, match=message):
            read_pooling(directory)

    @pytest.mark.parametrize(
        ("modules", "message"),
        [
            (["Transformer", "Pooling", "Dense"], "modules Transformer, Pooling, Dense; supported are"),
            (["Transformer"], "modules Transformer; supported"),
            ([], "modules none; supported"),
        ],
    )
    def test_unknown_modules_are_refused(self, directory: Path, modules: list[str], message: str) -> None:
        listed = [{"type": f"sentence_transformers.models.{name}", "path": ""} for name in modules]
        (directory / "modules.json").write_text(json.dumps(listed))
        with pytest.raises(ArtifactError, match=message):
            read_pooling(directory)

    @pytest.mark.parametrize("text", ["{}", "[3]", '[{"path": ""}]', "[", ""])
    def test_damaged_ones_too(self, directory: Path, text: str) -> None:
        (directory / "modules.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"modules\.json"):
            read_pooling(directory)

    def test_an_encoder_in_a_directory_of_its_own_is_refused(self, directory: Path) -> None:
        modules = json.loads((directory / "modules.json").read_text())
        modules[0]["path"] = "0_Transformer"
        (directory / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(ArtifactError, match="the encoder lies in '0_Transformer'"):
            read_pooling(directory)

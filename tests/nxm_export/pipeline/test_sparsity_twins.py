"""A directory of twins is one that says so, in full."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nxm_export.errors import ArtifactError, EngineError
from nxm_export.pipeline.inspection import inspect_path
from nxm_export.pipeline.sparsity_twins import SCHEMA, BuiltTwins, TwinHashes, is_twins, twin_directories
from nxm_export.storage.json_files import encode

TWINS = BuiltTwins("trt", {name: TwinHashes("ab", "cd") for name in ("int8-dense", "int8-sparse", "fp16")})


def test_the_dense_twin_comes_first(tmp_path: Path) -> None:
    assert not is_twins(tmp_path)
    (tmp_path / "twins.json").write_text(encode(TWINS, "nxm-twins/1"))
    assert is_twins(tmp_path)
    assert [directory.name for directory in twin_directories(tmp_path)] == ["int8-dense", "int8-sparse", "fp16"]
    assert TWINS.to_dict() == json.loads((tmp_path / "twins.json").read_text())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"twins\.json: not valid JSON .*; build the twins again \(`nxm build --twins`\)"),
        ('{"schema": "nxm-twins/2"}', "schema nxm-twins/2 is not the nxm-twins/1 that this version reads"),
        ('{"schema": "nxm-twins/1", "backend": "trt"}', r"twins\.json: .*required field `twins`"),
        ('{"schema": "nxm-twins/1", "backend": "trt", "twins": {}, "more": 1}', r"twins\.json: unknown field more"),
        ('{"schema": "nxm-twins/1", "backend": "trt", "twins": {"fp16": 5}}', r"twins\.json: twins.*got `int`"),
    ],
)
def test_a_damaged_list_is_refused_by_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "twins.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        twin_directories(tmp_path)


def test_another_twin_than_the_one_beside_it_is_refused(tmp_path: Path) -> None:
    """It would be left out silently: the times would be those of the dense engine in the directory."""
    (tmp_path / "twins.json").write_text(encode(TWINS, SCHEMA))
    with pytest.raises(EngineError, match="leave --twin out"):
        inspect_path(tmp_path, twin=tmp_path / "dense")

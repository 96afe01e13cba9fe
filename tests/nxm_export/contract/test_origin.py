"""Which checkpoint a graph or an engine was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nxm_export.contract.origin import Origin, recorded_checkpoint
from nxm_export.errors import ArtifactError


def test_the_recorded_checkpoint_is_found_as_long_as_it_is_there(tmp_path: Path) -> None:
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    checkpoint.mkdir()
    engine.mkdir()
    with pytest.raises(
        ArtifactError, match="does not record the checkpoint that it was made from; name the checkpoint"
    ):
        recorded_checkpoint(engine)
    Origin(str(checkpoint)).save(engine)
    assert recorded_checkpoint(engine) == checkpoint
    checkpoint.rmdir()
    with pytest.raises(ArtifactError, match=r"was made from .*checkpoint, which is not there .*; name the checkpoint"):
        recorded_checkpoint(engine)
    checkpoint.touch()  # a file is no checkpoint
    with pytest.raises(ArtifactError, match="which is not there"):
        recorded_checkpoint(engine)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        (json.dumps({"schema": "nxm-origin/9", "checkpoint": "/a"}), "schema nxm-origin/9 is not the nxm-origin/1"),
        (json.dumps({"schema": "nxm-origin/1", "checkpoint": 5}), "checkpoint: Expected `str`, got `int`"),
        (json.dumps({"schema": "nxm-origin/1"}), "missing required field `checkpoint`"),
    ],
)
def test_a_damaged_record_is_refused_by_field(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "origin.json").write_text(text)
    with pytest.raises(ArtifactError, match=message):
        recorded_checkpoint(tmp_path)

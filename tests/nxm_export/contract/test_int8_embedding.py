"""The INT8 word-embedding table in a checkpoint and in its packed form."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nxm_export.contract import packed_checkpoint
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.families import FAMILIES
from nxm_export.errors import ArtifactError
from tests.support import baked

TABLE = FAMILIES["bert"].word_embedding


class TestCheckpoint:
    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        return baked.write_checkpoint("bert", tmp_path / "copy", embedding="int8")

    @pytest.mark.parametrize(
        ("file", "key", "edit", "message"),
        [
            ("model", TABLE, lambda table: table * np.float32(1.001), "weights are not code"),
            ("model", TABLE, lambda table: table * np.nan, "holds NaN or infinite values"),
            ("nxm_scales", f"{TABLE}_scale", lambda scale: scale[:-1], "must be 36 positive numbers"),
            (
                "nxm_scales",
                f"{TABLE}_scale",
                lambda scale: scale * np.float32(0.5),
                "has a code of 254, beyond the planned 127",
            ),
            (
                "nxm_scales",
                f"{TABLE}_scale",
                None,
                "the plan needs .*word_embeddings.weight_scale, and it is not there",
            ),
        ],
    )
    def test_a_table_off_its_grid_is_refused(self, copy: Path, file: str, key: str, edit: Any, message: str) -> None:
        tensors = load_file(copy / f"{file}.safetensors")
        value = tensors.pop(key)
        save_file(
            {**tensors, **({} if edit is None else {key: edit(value)})}, copy / f"{file}.safetensors", {"format": "pt"}
        )
        with pytest.raises(ArtifactError, match=message):
            open_checkpoint(copy).require_valid()

    def test_packing_is_lossless_at_the_size_of_the_formula(self, copy: Path, tmp_path: Path) -> None:
        sizes = packed_checkpoint.pack(copy, tmp_path / "packed")
        assert 0 <= sizes.payload_bytes - sizes.formula_bytes <= 2 * 7  # each packed tensor ends on a whole byte
        unpacked = packed_checkpoint.unpack(tmp_path / "packed", tmp_path / "unpacked")
        for name in ("model.safetensors", "nxm_scales.safetensors", "nxm_plan.json"):
            assert (unpacked / name).read_bytes() == (copy / name).read_bytes()
        plan = open_checkpoint(copy).plan
        (copy / "nxm_plan.json").write_text(replace(plan, embedding="float").to_json())
        tokens, features = open_checkpoint(copy).weight(TABLE).shape
        in_float = packed_checkpoint.pack(copy, tmp_path / "float").payload_bytes
        assert in_float - sizes.payload_bytes == 3 * tokens * features  # both hold the scales

    @pytest.mark.parametrize("spoil", ["values", "scale"])
    def test_a_packed_file_without_the_table_is_damaged(self, copy: Path, tmp_path: Path, spoil: str) -> None:
        from safetensors import safe_open

        packed_checkpoint.pack(copy, tmp_path / "packed")
        with safe_open(tmp_path / "packed", framework="numpy") as stream:
            metadata, tensors = stream.metadata(), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        key = f"{TABLE}.values" if spoil == "values" else f"scale/{TABLE}_scale"
        tensors[key] = tensors[key][:-1]
        shapes = json.loads(metadata["scale_shapes"])
        shapes[f"{TABLE}_scale"] = [len(tensors[f"scale/{TABLE}_scale"])]
        whole = {
            "scale_shapes": json.dumps(shapes),
            "sha256": packed_checkpoint._digest(tensors),
        }  # as if it had been packed so
        save_file(tensors, tmp_path / "spoilt", {**metadata, **whole})
        with pytest.raises(ArtifactError, match=r"word_embeddings\.weight"):
            packed_checkpoint.unpack(tmp_path / "spoilt", tmp_path / "out")

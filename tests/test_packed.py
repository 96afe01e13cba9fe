"""Packing is lossless for every pattern and bit width, and the file is as large as the plan says."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nxm_export import packed
from nxm_export.checkpoint import open_checkpoint
from nxm_export.errors import ArtifactError
from nxm_export.plan import NMPattern

PATTERNS = [NMPattern(*nm) for nm in ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 8), (8, 16))]


@given(st.integers(1, 14), st.lists(st.integers(0, 2**14 - 1), min_size=1, max_size=70))
@settings(max_examples=200, deadline=None)
def test_bit_strings_come_back_and_take_no_more_than_they_need(bits: int, values: list[int]) -> None:
    array = np.array(values, np.uint16) % (1 << bits)
    stored = packed.pack_bits(array, bits)
    assert stored.nbytes == -(-len(array) * bits // 8)
    assert np.array_equal(packed.unpack_bits(stored, bits, len(array)), array)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_support_has_its_own_index_that_fits_the_bits(pattern: NMPattern) -> None:
    kept = np.zeros((len(packed.supports(pattern)), pattern.m), bool)
    for row, support in zip(kept, itertools.combinations(range(pattern.m), pattern.n), strict=True):
        row[list(support)] = True
    index = packed.support_index(kept, pattern)
    assert index.tolist() == list(range(len(kept)))
    assert index.max() < 2**pattern.index_bits


@given(st.sampled_from(PATTERNS), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_supports_cover_all_non_zeros_and_have_exactly_n(pattern: NMPattern, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.zeros((20, pattern.m), np.int8)
    for row in groups:
        row[rng.permutation(pattern.m)[: rng.integers(0, pattern.n + 1)]] = rng.integers(1, 8)
    kept = packed.exact_support(groups, pattern)
    assert (kept.sum(axis=1) == pattern.n).all()
    assert not (groups[~kept] != 0).any()


@pytest.mark.parametrize("spec", ["2:4+W4", "2:4+W8", "1:4+W3", "4:8+W2", "1:2+W6", "W4", "W5", "2:4"])
def test_unpacking_gives_the_same_files_and_the_formula_gives_the_size(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, spec: str
) -> None:
    placement = "inputs" if "W" not in spec else "inputs-outputs"
    checkpoint = tiny_checkpoint("bert", spec=spec, steps=3, placement=placement)
    sizes = packed.pack(checkpoint, tmp_path / "packed.safetensors")
    unpacked = packed.unpack(tmp_path / "packed.safetensors", tmp_path / "unpacked")
    for file in checkpoint.iterdir():
        assert (unpacked / file.name).read_bytes() == file.read_bytes(), file.name
    plan = open_checkpoint(checkpoint).plan
    # Each packed tensor is rounded up to a whole byte; everything else is exact.
    assert 0 <= sizes["payload_bytes"] - sizes["formula_bytes"] <= 2 * len(plan.weights)
    header = sizes["file_bytes"] - sizes["payload_bytes"]
    text = sum(file.stat().st_size for file in checkpoint.iterdir() if file.suffix != ".safetensors")
    assert header < 1.5 * text + 50_000  # the header holds the text files, escaped as JSON, and the tensor names


def test_unpacked_directory_loads_with_plain_transformers(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    packed.pack(tiny_checkpoint("bert"), tmp_path / "packed.safetensors")
    packed.unpack(tmp_path / "packed.safetensors", tmp_path / "unpacked")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "unpacked")
    assert model.config.num_labels == 2


def test_a_heterogeneous_plan_packs_too(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "mixed"
    shutil.copytree(tiny_checkpoint("bert"), checkpoint)
    plan_file = checkpoint / "nxm_plan.json"
    plan = json.loads(plan_file.read_text())
    names = list(plan["weights"])
    for field in ("pattern",):  # a 2:4 matrix may also be stored as a dense one
        del plan["weights"][names[0]][field]
    plan_file.write_text(json.dumps(plan))
    sizes = packed.pack(checkpoint, tmp_path / "packed.safetensors")
    assert sizes["payload_bytes"] >= sizes["formula_bytes"]
    assert packed.unpack(tmp_path / "packed.safetensors", tmp_path / "out").is_dir()


def test_damaged_and_foreign_files_are_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "packed.safetensors"
    packed.pack(tiny_checkpoint("bert"), file)
    data = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="truncated or not a packed checkpoint"):
        packed.unpack(cut, tmp_path / "a")
    with pytest.raises(ArtifactError, match="not a nxm-packed/1 file"):
        packed.unpack(tiny_checkpoint("bert") / "model.safetensors", tmp_path / "b")
    with pytest.raises(ArtifactError, match="exists; choose a directory that does not"):
        packed.unpack(file, tmp_path)
    with pytest.raises(ArtifactError, match="no such file"):
        packed.unpack(tmp_path / "missing", tmp_path / "c")
    assert not (tmp_path / "a").exists()

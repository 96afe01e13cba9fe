"""Packing is lossless for every pattern and bit width, and the file is as large as the plan says."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from nxm_export.cli import main
from nxm_export.contract import packed_checkpoint
from nxm_export.contract.checkpoint import SCALES_FILE, WEIGHTS_FILE, open_checkpoint, save_plan
from nxm_export.contract.plan import CompressionPlan, NMPattern, WeightSpec
from nxm_export.contract.pooling import read_pooling
from nxm_export.errors import ArtifactError, PlanError
from tests.support.baked import baked, write_checkpoint
from tests.support.variants import variants

PATTERNS = [NMPattern(*nm) for nm in ((1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (2, 8), (1, 8), (8, 16))]
# Every pattern (or none) with every number of bits (or 16): what one weight can be.
SPECS = [
    WeightSpec(pattern, bits, 8 if bits else None)
    for pattern in (None, *PATTERNS)
    for bits in (None, 2, 3, 4, 5, 6, 7, 8)
]


def model_files(directory: Path) -> list[Path]:
    """What a packed file holds: everything but tensors that are not the model's."""
    tensors = (WEIGHTS_FILE, SCALES_FILE)
    return [file for file in directory.iterdir() if file.suffix != ".safetensors" or file.name in tensors]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint("bert", tmp_path_factory.mktemp("packed") / "template", placement="inputs")


def write_mixed(template: Path, out: Path, specs: list[WeightSpec], seed: int) -> None:
    """A checkpoint of random weights, a spec for each."""
    shutil.copytree(template, out)
    opened, rng = open_checkpoint(template), np.random.default_rng(seed)
    names = list(opened.plan.weights)
    plan = replace(opened.plan, weights=dict(zip(names, specs, strict=True)))
    tensors = load_file(template / WEIGHTS_FILE)
    scales = {key: scale for key, scale in opened.scales.items() if not key.endswith("weight_scale")}
    for name, spec in plan.weights.items():
        weight = rng.standard_normal(plan.shapes[name]).astype(np.float32)
        weight[rng.random(weight.shape) < 0.1] = 0.0  # supports smaller than N, too
        weight[:, 0] = 3.0  # no row without a value, and so without a scale
        weight, scale = baked(weight, spec)
        tensors[name] = weight + np.float32(0.0)  # never -0.0
        if scale is None:
            scales.pop(f"{name.removesuffix('.weight')}.input_scale")
        else:
            scales[f"{name}_scale"] = scale
    save_file(tensors, out / WEIGHTS_FILE, {"format": "pt"})
    save_plan(out, plan, scales)


@given(st.lists(st.sampled_from(SPECS), min_size=6, max_size=6), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_any_mix_of_patterns_and_bits_comes_back_bit_by_bit_at_the_size_of_the_formula(
    template: Path, specs: list[WeightSpec], seed: int
) -> None:
    with TemporaryDirectory() as name:
        directory = Path(name)
        write_mixed(template, directory / "mixed", specs, seed)
        sizes = packed_checkpoint.pack(directory / "mixed", directory / "packed.safetensors")
        unpacked = packed_checkpoint.unpack(directory / "packed.safetensors", directory / "unpacked")
        for file in model_files(directory / "mixed"):
            assert (unpacked / file.name).read_bytes() == file.read_bytes(), file.name
    assert 0 <= sizes.payload_bytes - sizes.formula_bytes <= 2 * len(specs), "each tensor ends on a whole byte"


def test_every_pattern_and_every_number_of_bits_is_packed_at_least_once(template: Path, tmp_path: Path) -> None:
    for number, start in enumerate(range(0, len(SPECS), 6)):
        write_mixed(template, tmp_path / f"{number}", SPECS[start : start + 6], number)
        packed_checkpoint.pack(tmp_path / f"{number}", tmp_path / f"{number}.safetensors")
        unpacked = packed_checkpoint.unpack(tmp_path / f"{number}.safetensors", tmp_path / f"{number}-unpacked")
        assert (unpacked / WEIGHTS_FILE).read_bytes() == (tmp_path / f"{number}" / WEIGHTS_FILE).read_bytes()


def test_files_that_are_no_text_or_have_other_line_ends_come_back_as_they_are(template: Path, tmp_path: Path) -> None:
    shutil.copytree(template, tmp_path / "model")
    contents = {"spiece.model": bytes(range(256)), "vocab.txt": b"a\r\nb\rc\n", "empty.txt": b""}
    for name, content in contents.items():
        (tmp_path / "model" / name).write_bytes(content)
    write_mixed(tmp_path / "model", tmp_path / "again", [WeightSpec()] * 6, 0)
    packed_checkpoint.pack(tmp_path / "again", tmp_path / "packed.safetensors")
    unpacked = packed_checkpoint.unpack(tmp_path / "packed.safetensors", tmp_path / "unpacked")
    assert {name: (unpacked / name).read_bytes() for name in contents} == contents


def test_negative_zeros_are_refused_as_they_would_not_come_back(template: Path, tmp_path: Path) -> None:
    write_mixed(template, tmp_path / "model", [SPECS[20]] * 6, 0)
    tensors = load_file(tmp_path / "model" / WEIGHTS_FILE)
    name = next(iter(open_checkpoint(tmp_path / "model").plan.weights))
    tensors[name][tensors[name] == 0] = -0.0
    save_file(tensors, tmp_path / "model" / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(ArtifactError, match=f"{name} holds negative zeros"):
        packed_checkpoint.pack(tmp_path / "model", tmp_path / "packed.safetensors")
    assert not (tmp_path / "packed.safetensors").exists()


def test_the_commands_pack_and_unpack(template: Path, tmp_path: Path) -> None:
    write_mixed(template, tmp_path / "model", SPECS[:6], 0)
    done = CliRunner().invoke(main, ["pack", str(tmp_path / "model"), "--out", str(tmp_path / "file"), "--json"])
    assert json.loads(done.stdout)["file_bytes"] == (tmp_path / "file").stat().st_size
    done = CliRunner().invoke(main, ["unpack", str(tmp_path / "file"), "--out", str(tmp_path / "back")])
    assert done.exit_code == 0, done.output
    (tmp_path / "anything").touch()
    for file in model_files(tmp_path / "model"):
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
        assert (tmp_path / "back" / file.name).stat().st_mode == (tmp_path / "anything").stat().st_mode
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "anything").stat().st_mode
    for arguments in (["unpack", "missing"], ["pack", str(tmp_path)]):
        done = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "nothing")])
        assert done.exit_code == 1
        assert done.output.startswith("nxm: ")


@given(st.integers(1, 14), st.lists(st.integers(0, 2**14 - 1), min_size=1, max_size=70))
@settings(max_examples=200, deadline=None)
def test_bit_strings_come_back_and_take_no_more_than_they_need(bits: int, values: list[int]) -> None:
    array = np.array(values, np.uint16) % (1 << bits)
    stored = packed_checkpoint.pack_bits(array, bits)
    assert stored.nbytes == -(-len(array) * bits // 8)
    assert np.array_equal(packed_checkpoint.unpack_bits(stored, bits, len(array)), array)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_support_has_its_own_index_that_fits_the_bits(pattern: NMPattern) -> None:
    masks = np.zeros((len(packed_checkpoint.supports(pattern)), pattern.m), bool)
    for row, support in zip(masks, itertools.combinations(range(pattern.m), pattern.n), strict=True):
        row[list(support)] = True
    index = packed_checkpoint.support_index(masks, pattern)
    assert index.tolist() == list(range(len(masks)))
    assert index.max() < 2**pattern.index_bits


@given(st.sampled_from(PATTERNS), st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_supports_cover_all_non_zeros_and_have_exactly_n(pattern: NMPattern, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = np.zeros((20, pattern.m), np.int8)
    for row in groups:
        row[rng.permutation(pattern.m)[: rng.integers(0, pattern.n + 1)]] = rng.integers(1, 8)
    support = packed_checkpoint.exact_support(groups != 0, pattern)
    assert (support.sum(axis=1) == pattern.n).all()
    assert not (groups[~support] != 0).any()


@pytest.mark.parametrize("spec", variants(["2:4+W4", "2:4"], ("2:4+W4",)))
def test_unpacking_gives_the_same_files_and_the_formula_gives_the_size(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, spec: str
) -> None:
    placement = "inputs" if "W" not in spec else "inputs-outputs"
    checkpoint = tiny_checkpoint("bert", spec=spec, steps=3, placement=placement)
    sizes = packed_checkpoint.pack(checkpoint, tmp_path / "packed.safetensors")
    unpacked = packed_checkpoint.unpack(tmp_path / "packed.safetensors", tmp_path / "unpacked")
    for file in model_files(checkpoint):
        assert (unpacked / file.name).read_bytes() == file.read_bytes(), file.name
    plan = open_checkpoint(checkpoint).plan
    # Each packed tensor is rounded up to a whole byte; everything else is exact.
    assert 0 <= sizes.payload_bytes - sizes.formula_bytes <= 2 * len(plan.weights)
    header = sizes.file_bytes - sizes.payload_bytes
    text = sum(file.stat().st_size for file in checkpoint.iterdir() if file.suffix != ".safetensors")
    assert header < 1.5 * text + 50_000  # the header holds the text files, escaped as JSON, and the tensor names


def test_unpacked_directory_loads_with_plain_transformers(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    import transformers

    packed_checkpoint.pack(tiny_checkpoint("bert"), tmp_path / "packed.safetensors")
    packed_checkpoint.unpack(tmp_path / "packed.safetensors", tmp_path / "unpacked")
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
    sizes = packed_checkpoint.pack(checkpoint, tmp_path / "packed.safetensors")
    assert sizes.payload_bytes >= sizes.formula_bytes
    assert packed_checkpoint.unpack(tmp_path / "packed.safetensors", tmp_path / "out").is_dir()


def test_damaged_and_foreign_files_are_refused(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "packed.safetensors"
    packed_checkpoint.pack(tiny_checkpoint("bert"), file)
    data = file.read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="truncated or not a packed checkpoint"):
        packed_checkpoint.unpack(cut, tmp_path / "a")
    with pytest.raises(ArtifactError, match="not a nxm-packed/1 file"):
        packed_checkpoint.unpack(tiny_checkpoint("bert") / "model.safetensors", tmp_path / "b")
    with pytest.raises(ArtifactError, match="exists; choose a directory that does not"):
        packed_checkpoint.unpack(file, tmp_path)
    with pytest.raises(ArtifactError, match="no such file"):
        packed_checkpoint.unpack(tmp_path / "missing", tmp_path / "c")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("scale_shapes", "{", r"\(scale_shapes\): not valid JSON .*; pack it again"),
        ("scale_shapes", '{"x": "3"}', r"\(scale_shapes\): x: Expected `array`, got `str`; pack it again"),
        ("scale_shapes", '{"nowhere_scale": [3]}', "scale_shapes does not fit its scales"),
        (
            "weights_metadata",
            '{"format": 3}',
            r"\(weights_metadata\): format: Expected `str`, got `int`; pack it again",
        ),
        ("file/nxm_plan.json", "{}", r"\(nxm_plan.json\): not a nxm-plan/1 file"),
    ],
)
def test_a_header_that_says_something_else_is_named(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, key: str, text: str, message: str
) -> None:
    packed_checkpoint.pack(tiny_checkpoint("bert"), tmp_path / "packed")
    with safe_open(tmp_path / "packed", framework="numpy") as stream:
        metadata, tensors = stream.metadata(), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "spoilt", {**metadata, key: text})
    with pytest.raises(ArtifactError if "plan" not in key else PlanError, match=message):
        packed_checkpoint.unpack(tmp_path / "spoilt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_changed_byte_is_told_by_its_checksum(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    file = tmp_path / "packed.safetensors"
    packed_checkpoint.pack(tiny_checkpoint("bert"), file)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match="its tensors are not those that were written"):
        packed_checkpoint.unpack(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_a_packed_file_is_ever_replaced(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    other = tmp_path / "train.tsv"
    other.write_text("sentence\tlabel\n")
    with pytest.raises(ArtifactError, match="exists and is no packed checkpoint"):
        packed_checkpoint.pack(tiny_checkpoint("bert"), other)
    with pytest.raises(ArtifactError, match="cannot be made"):
        packed_checkpoint.pack(tiny_checkpoint("bert"), other / "inside")
    assert other.read_text() == "sentence\tlabel\n"
    packed_checkpoint.pack(tiny_checkpoint("bert"), tmp_path / "packed")
    packed_checkpoint.pack(tiny_checkpoint("bert"), tmp_path / "packed")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "train.tsv"]


def everything(directory: Path) -> dict[str, bytes | None]:
    """Every file below a directory with its bytes, and every folder."""
    return {f"{p.relative_to(directory)}": p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


def test_a_sentence_embedding_comes_back_with_its_pooling(tmp_path: Path) -> None:
    """Its settings lie in folders of their own."""
    model = write_checkpoint("bert", tmp_path / "model", task="embedding", placement="inputs")
    write_mixed(model, tmp_path / "again", [WeightSpec()] * 6, 0)
    (tmp_path / "again" / "1_Pooling" / "vocabulary.bin").write_bytes(b"\xff\x00")
    packed_checkpoint.pack(tmp_path / "again", tmp_path / "packed.safetensors")
    unpacked = packed_checkpoint.unpack(tmp_path / "packed.safetensors", tmp_path / "unpacked")
    assert everything(unpacked) == everything(tmp_path / "again")
    assert {"1_Pooling/config.json", "2_Normalize"} <= everything(unpacked).keys()
    assert str(read_pooling(unpacked)) == "mean, normalized"


def test_a_packed_file_without_a_pooling_or_with_paths_that_lead_away_is_refused(tmp_path: Path) -> None:
    packed_checkpoint.pack(
        write_checkpoint("bert", tmp_path / "model", task="embedding", spec="W8", placement="inputs"),
        tmp_path / "packed",
    )
    with safe_open(tmp_path / "packed", framework="numpy") as file:
        metadata = dict(file.metadata())
    tensors, name = load_file(tmp_path / "packed"), "file/1_Pooling/config.json"
    text = metadata.pop(name)
    for extra, message in (({}, "does not say how its tokens"), ({"file/../away.json": text}, "no path below")):
        save_file(tensors, tmp_path / "other", {**metadata, **extra})
        with pytest.raises(ArtifactError, match=message):
            packed_checkpoint.unpack(tmp_path / "other", tmp_path / "unpacked")
        assert not (tmp_path / "unpacked").exists()
    assert not (tmp_path / "away.json").exists()


@pytest.mark.parametrize("pattern", ["1:64", "2:64", "4:32", "8:16"])
def test_every_support_of_a_wide_group_has_a_number_of_its_own(pattern: str) -> None:
    chosen, rng = NMPattern.parse(pattern), np.random.default_rng(0)
    mask = np.array([rng.permutation(np.arange(chosen.m) < chosen.n) for _ in range(200)])
    index = packed_checkpoint.support_index(mask, chosen)
    stored = packed_checkpoint.pack_bits(index, chosen.index_bits)
    back = packed_checkpoint.unpack_bits(stored, chosen.index_bits, len(index))
    assert [list(np.flatnonzero(row)) for row in mask] == packed_checkpoint.supports(chosen)[back].tolist()


@pytest.mark.parametrize("pattern", ["1:128", "6:24", "16:32"])
def test_a_pattern_with_more_supports_than_an_index_holds_is_refused(tmp_path: Path, pattern: str) -> None:
    """It came back with its weights at other places, or took all memory."""
    chosen = NMPattern.parse(pattern)
    plan = CompressionPlan("bert", {"w": WeightSpec(chosen, 8, 8)}, {"w": (4, chosen.m)})
    with pytest.raises(ArtifactError, match=f"model: w is planned {pattern}, and a packed file has groups of at most"):
        packed_checkpoint._require_indexable(plan, "model")

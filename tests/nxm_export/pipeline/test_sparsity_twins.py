"""A directory of twins is one that says so, in full."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engines.base import BuildOptions, backend
from engines.benchmark.latency import BenchReport
from engines.passport import EnginePassport, load_passport
from engines.sparsity.build_evidence import LAYERS_SCHEMA, InspectedEngine, InspectedProfile
from nxm_export.contract.records.speedup import Speedup
from nxm_export.errors import ArtifactError, EngineError, EngineUnavailable
from nxm_export.pipeline.engine_builds import build_twin_engines
from nxm_export.pipeline.engine_sparsity import require_sparse
from nxm_export.pipeline.engine_timing import _verdict, bench_engines
from nxm_export.pipeline.inspection import inspect_path
from nxm_export.pipeline.sparsity_twins import BuiltTwins, TwinHashes, build_twins, is_twins, twin_directories
from nxm_export.storage.json_files import encode
from tests.support.records import PASSPORT
from tests.support.sparsity_evidence import DENSE_GEMM, FACTS, LAYER, SPARSE_GEMM, engine_directory, tie

TWINS = BuiltTwins("trt", {name: TwinHashes("ab", "cd") for name in ("int8-dense", "int8-sparse", "fp16")})


def write_twins(directory: Path) -> None:
    (directory / "twins.json").write_text(encode(TWINS, "nxm-twins/1"))
    for name in TWINS.twins:
        (directory / name).mkdir()
        replace(PASSPORT, backend="trt", engine_sha256="ab", onnx_sha256="cd").save(directory / name)


def test_the_dense_twin_comes_first(tmp_path: Path) -> None:
    assert not is_twins(tmp_path)
    write_twins(tmp_path)
    assert is_twins(tmp_path)
    assert [directory.name for directory in twin_directories(tmp_path).values()] == [
        "int8-dense",
        "int8-sparse",
        "fp16",
    ]
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


@pytest.mark.parametrize("change", [{"engine_sha256": "ef"}, {"onnx_sha256": "ef"}])
def test_a_twin_that_was_exchanged_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """2:4 would be given the credit for what another graph or build saves."""
    write_twins(tmp_path)
    replace(load_passport(tmp_path / "int8-dense"), **change).save(tmp_path / "int8-dense")
    with pytest.raises(
        ArtifactError, match=r"int8-dense is not the engine that twins\.json names there; build the twins"
    ):
        twin_directories(tmp_path)


def test_twins_of_two_directories_get_no_verdict(tmp_path: Path) -> None:
    """Each is the part that it says, of another model."""
    ratio = Speedup("b", "a", 1, 8, 2.0, (1.9, 2.1))
    dense, sparse = tmp_path / "a", tmp_path / "b"
    passports = {
        dense: replace(PASSPORT, options={"sparse": "never"}),
        sparse: replace(PASSPORT, onnx_sha256="2" * 64, options={"sparse": "auto"}),
    }
    twins = {"int8-dense": ("a", dense), "int8-sparse": ("b", sparse)}
    said = _verdict(BenchReport((), (ratio,)), twins, passports)
    assert said is not None
    assert said.startswith(f"no verdict: {dense} is no dense twin of {sparse}: its graph is 1111")


def test_twins_whose_evidence_says_nothing_get_no_verdict(tmp_path: Path) -> None:
    """Twins of before passports had hashes of evidence were said to gain nothing by 2:4, whatever they gained."""
    dense, sparse = tmp_path / "a", tmp_path / "b"
    passports = {}
    for directory, is_sparse in ((dense, False), (sparse, True)):
        directory.mkdir()
        engine_directory(directory)
        passports[directory] = tie(directory, evidence=None, options={"sparse": "auto" if is_sparse else "never"})
    twins = {"int8-dense": ("a", dense), "int8-sparse": ("b", sparse)}
    report = BenchReport((), (Speedup("b", "a", 1, 8, 2.0, (1.9, 2.1)),))
    said = _verdict(report, twins, passports)
    assert said is not None
    assert said.startswith(f"no verdict: which kernels {sparse} runs is not known: nothing ties the evidence to")
    assert said.endswith("build it again; measured 2.00x (1.90 to 2.10) at 1x8")
    passports[sparse] = tie(sparse, options={"sparse": "auto"})
    assert str(_verdict(report, twins, passports)).startswith("2:4 pays from")


@pytest.mark.parametrize(
    ("kernels", "has_gpu", "said"),
    [
        ([], False, "no verdict: which kernels {} runs is not known: built without a GPU"),
        ([], True, "no verdict: which kernels {} runs is not known: the builder does not say which kernel runs it"),
        (["__myl_FcAdd_0xab"], True, "no verdict: which kernels {} runs is not known: inside kgen layer"),
        (["sm80_xmma_sparse_gemm_f16f16_f16f32_f32_tn_n"], True, "no verdict: {} runs sparse kernels, and no matrix"),
        ([SPARSE_GEMM, DENSE_GEMM], True, "no verdict: {} runs sparse kernels, and no matrix on those of INT8 alone: "),
        ([DENSE_GEMM], True, "do not use 2:4 here: no sparse kernel is proven to run on L4, so any difference"),
    ],
)
def test_a_difference_is_called_noise_only_where_dense_kernels_are_known_to_run(
    tmp_path: Path, kernels: Sequence[str], has_gpu: bool, said: str
) -> None:
    """`kernels` are those of the engine's product, one in each profile."""
    dense, sparse = tmp_path / "a", tmp_path / "b"
    for directory in (dense, sparse):
        directory.mkdir()
        engine_directory(directory)
    (sparse / "build.log").write_text("")
    (sparse / "weights.json").write_text(encode(replace(FACTS, has_gpu=has_gpu), "nxm-weights/1"))
    profiles = []
    for number, kernel in enumerate(kernels):
        kind = "kgen" if kernel.startswith("__myl") else "gemm"
        named = {**LAYER, "Name": f"node_myl0_1 [profile {number}]", "TacticName": kernel, "LayerType": kind}
        profiles.append(InspectedProfile(number, (8, 128), {"Layers": [named]}))
    (sparse / "layers.json").write_text(encode(InspectedEngine(tuple(profiles)), LAYERS_SCHEMA))
    passports = {
        directory: tie(directory, options={"sparse": kind}, device={"gpu": "L4"})
        for directory, kind in ((dense, "never"), (sparse, "auto"))
    }
    twins = {"int8-dense": ("a", dense), "int8-sparse": ("b", sparse)}
    report = BenchReport((), (Speedup("b", "a", 1, 8, 1.4, (1.38, 1.42)),))
    verdict = str(_verdict(report, twins, passports))
    assert verdict.startswith(said.format(sparse))
    assert verdict.endswith("; measured 1.40x (1.38 to 1.42) at 1x8") is said.startswith("no verdict")


@pytest.mark.parametrize("damage", [lambda file: file.write_text("{"), Path.unlink], ids=["edited", "removed"])
def test_twins_whose_evidence_cannot_be_read_keep_their_times(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    dense, sparse = tmp_path / "a", tmp_path / "b"
    passports = {}
    for directory, is_sparse in ((dense, False), (sparse, True)):
        directory.mkdir()
        engine_directory(directory)
        passports[directory] = tie(directory, options={"sparse": "auto" if is_sparse else "never"})
    damage(sparse / "weights.json")
    report = BenchReport((), (Speedup("b", "a", 1, 8, 2.0, (1.9, 2.1)),))
    said = _verdict(report, {"int8-dense": ("a", dense), "int8-sparse": ("b", sparse)}, passports)
    assert said is not None
    assert said.startswith(f"no verdict: which kernels {sparse} runs is not known: {sparse}")


def test_another_twin_than_the_one_beside_it_is_refused(tmp_path: Path) -> None:
    """It would be left out silently: the times would be those of the dense engine in the directory."""
    write_twins(tmp_path)
    with pytest.raises(EngineError, match="leave --twin out"):
        inspect_path(tmp_path, twin=tmp_path / "dense")


class Builder:
    """A backend that builds empty engines, but for the twins in `failing`."""

    CAPABILITIES = backend("trt").CAPABILITIES

    def __init__(self, *failing: str) -> None:
        self.failing = failing

    def build(self, onnx: Path, out: Path, options: BuildOptions) -> EnginePassport:
        (out / "build.log").write_text("[E] no scaling factors")
        (out / "half.engine").touch()
        if options.twin in self.failing:
            raise EngineError(f"no kernel for {options.twin}")
        passport = replace(PASSPORT, backend="trt", engine_sha256="ab", onnx_sha256="cd")
        passport.save(out)
        return passport


@pytest.mark.parametrize("lost", ["int8-dense", "int8-sparse", "fp16"])
def test_a_twin_that_cannot_be_built_takes_no_other_along(
    lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engines.base.backend", lambda _: Builder(lost))
    monkeypatch.setattr("nxm_export.graph.exporter.export", lambda *_, **__: None)
    twins = tmp_path / "twins"
    with pytest.raises(EngineError, match=rf"twins has .*; {lost} could not be built: no kernel for {lost}$"):
        build_twin_engines(tmp_path / "checkpoint", twins, "trt")
    kept = [name for name in ("int8-dense", "int8-sparse", "fp16") if name != lost]
    assert [*twin_directories(twins)] == kept
    assert [file.name for file in (twins / lost).iterdir()] == ["build.log"]
    monkeypatch.undo()
    with pytest.raises(EngineUnavailable, match="nothing could be timed here"):
        bench_engines([twins])
    if lost == "int8-sparse":
        for asked in (lambda: inspect_path(twins), lambda: require_sparse(twins, 0.6)):
            with pytest.raises(EngineError, match="its twin int8-sparse could not be built: no kernel for int8-sparse"):
                asked()


def test_where_no_twin_can_be_built_there_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.base.backend", lambda _: Builder("int8-dense", "int8-sparse", "fp16"))
    monkeypatch.setattr("nxm_export.graph.exporter.export", lambda *_, **__: None)
    with pytest.raises(EngineError, match="no kernel for int8-dense"):
        build_twins(tmp_path / "checkpoint", tmp_path / "twins", "trt", BuildOptions())
    assert not (tmp_path / "twins").is_dir() or not is_twins(tmp_path / "twins")

"""A latency table from engines: what ties a time to a weight, what has no time, and that a search says where times are
from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import nxm_export as nxm
from compressors.search.settings import SearchSettings
from engines.base import BuildOptions, Profile
from engines.cusparselt.backend import build_on
from engines.ort.product_times import product_times
from engines.product_times import ProductTime
from nxm_export.cli import main
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.records.latency_table import read_latencies
from nxm_export.errors import EngineError
from nxm_export.pipeline import latency_table as module
from nxm_export.pipeline.latency_table import latency_table
from tests.engines.cusparselt.machines import FASTER, Priced, machine

CANDIDATES = ("2:4+W4", "2:4+W8", "W8", "2:4", "dense")
SHAPE = (8, 32)


@pytest.fixture(scope="module")
def cpu_engines(tiny_engine: Callable[..., Path]) -> list[Path]:
    return [tiny_engine("ort", "bert", "float"), tiny_engine("ort", "bert", "inputs")]


@pytest.fixture(scope="module")
def gpu_engine(tiny_graph: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An engine of a stand-in: microseconds of dense products and of each sparse form, measured at 64 and 256 rows."""

    def make(dense: float, sparse: Mapping[tuple[str, bool], float], **more: tuple[str, ...]) -> Path:
        out = tmp_path_factory.mktemp("cusparselt")
        graph = tiny_graph("bert", "inputs", "trt") / "model.onnx"
        build_on(
            machine(Priced(dense, sparse, **more)),
            graph,
            out,
            BuildOptions(profiles=[Profile((1, 8), (8, 8), (8, 32))]),
        )
        return out

    return make


def test_options_on_a_cpu_have_the_times_of_float_and_of_integer_products(cpu_engines: list[Path]) -> None:
    table = latency_table(cpu_engines, SHAPE, CANDIDATES, rounds=5, threads=1)
    assert list(table.milliseconds) == list(FAMILIES["bert"].roles)
    for row in table.milliseconds.values():
        assert row["2:4+W4"] == row["2:4+W8"] == row["W8"] > 0, "integers cost the same on a CPU, zeros included"
        assert row["2:4"] == row["dense"] > 0
    source = table.source
    assert source is not None
    assert source.measured.startswith("per-node times of ONNX Runtime on the CPU ")
    assert (source.backend, source.threads, source.batch, source.sequence) == ("ort", 1, *SHAPE)
    assert len(set(source.engines)) == 2
    assert "onnxruntime" in source.versions
    assert source.matrices["ffn_up"] == source.matrices["ffn_down"][::-1]


def test_a_search_takes_the_table_of_the_function(cpu_engines: list[Path]) -> None:
    table = nxm.latency(cpu_engines, SHAPE, candidates=CANDIDATES, rounds=2, threads=1)
    search = SearchSettings(latency_ms=1.0, latencies=table.milliseconds, latency_source=table.source)
    assert search.latencies["ffn_up"].keys() == set(CANDIDATES)
    with pytest.raises(EngineError, match="at least one thread"):
        nxm.latency(cpu_engines, SHAPE, threads=0)


def test_each_time_is_of_the_node_that_multiplies_by_the_weight(cpu_engines: list[Path]) -> None:
    """So each takes longer where there are more rows."""
    (few,), (many,) = (product_times(cpu_engines[1:], shape, 10, 1) for shape in ((8, 32), (64, 32)))
    in_blocks = [(a, b) for a, b in zip(few, many, strict=True) if ".layer." in a.weight]
    assert len(in_blocks) == 12
    for less, more in in_blocks:
        assert (less.weight, less.form, less.problem) == (more.weight, "int8", None)
        assert more.milliseconds is not None
        assert less.milliseconds is not None
        assert more.milliseconds > less.milliseconds


def test_without_an_engine_in_float_dense_has_no_time(cpu_engines: list[Path]) -> None:
    table = latency_table(cpu_engines[1:], SHAPE, CANDIDATES, rounds=2)
    assert all(list(row) == ["2:4+W4", "2:4+W8", "W8"] for row in table.milliseconds.values())
    with pytest.raises(EngineError, match="no product was measured for dense of query; add an engine"):
        latency_table(cpu_engines[1:], SHAPE, ["dense"], rounds=2)


def test_parts_of_a_fused_matrix_add_up_and_uses_of_a_shared_one_do_not(tiny_engine: Callable[..., Path]) -> None:
    fused = latency_table([tiny_engine("ort", "modernbert", "inputs")], SHAPE, ["W8"], rounds=2)
    assert fused.source is not None
    out, in_ = fused.source.matrices["qkv"]
    assert out == 3 * in_
    shared = latency_table([tiny_engine("ort", "albert", "inputs")], SHAPE, ["W8"], rounds=2)
    assert list(shared.milliseconds) == list(FAMILIES["albert"].roles)


def made(*changes: tuple[str, dict[str, Any]]) -> list[ProductTime]:
    """The products of one block of BERT, 4 us each, with changes by role."""
    family, changed = FAMILIES["bert"], dict(changes)
    return [
        replace(
            ProductTime(f"bert.encoder.layer.0.{linear.path}.weight", 32, 32, "int8", 0.004),
            **changed.get(linear.role, {}),
        )
        for linear in family.linears
    ]


@pytest.mark.parametrize(
    ("products", "message"),
    [
        (made(("key", {"problem": "it is stored as integers and runs in float (MatMul)"})), "key.weight has no time: "),
        (made(("key", {"weight": "val_7"})), "key.weight has no time: no product that was measured has it"),
        (made(("key", {"weight": "bert.encoder.layer.1.attention.self.key.weight"})), "has no time: no product"),
        ([*made(), replace(made()[0], weight="bert.encoder.layer.1.output.dense.weight")], "has no time: no product"),
        ([], "its products are of 0 blocks of bert"),
        (made(("ffn_up", {"n": 48})) + [replace(each, weight=each.weight.replace("r.0", "r.1")) for each in made()],
         "others of its role are"),
    ],
)  # fmt: skip
def test_a_weight_without_a_time_is_named(products: list[ProductTime], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        module._Roles(FAMILIES["bert"]).add(Path("engine"), products)


def test_a_matrix_of_integers_that_runs_in_float_has_no_time(
    cpu_engines: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a runtime would do that has no kernel for it."""
    monkeypatch.setattr("engines.ort.product_times.INTEGER_PRODUCTS", ())
    monkeypatch.setattr("engines.ort.product_times.FLOAT_PRODUCTS", ("MatMulIntegerToFloat",))
    with pytest.raises(EngineError, match=r"query.weight has no time: it is stored as integers and runs in float"):
        latency_table(cpu_engines[1:], SHAPE, CANDIDATES, rounds=1)
    monkeypatch.setattr("engines.ort.product_times.FLOAT_PRODUCTS", ())
    with pytest.raises(EngineError, match="it runs inside the operator MatMulIntegerToFloat"):
        latency_table(cpu_engines[1:], SHAPE, CANDIDATES, rounds=1)


def test_2_4_on_a_gpu_has_the_time_of_the_faster_form(gpu_engine: Callable[..., Path]) -> None:
    sparse = latency_table([gpu_engine(4.0, FASTER)], (8, 32), CANDIDATES)
    for row in sparse.milliseconds.values():
        assert row == {"2:4+W4": 0.001, "2:4+W8": 0.001, "W8": 0.004}, "and none of float products"
    slower = latency_table([gpu_engine(0.5, FASTER)], (8, 32), CANDIDATES)
    assert {*slower.milliseconds["query"].values()} == {0.0005}, "--sparse auto runs the dense form"
    wrong = latency_table([gpu_engine(4.0, {("int32", True): 1.0}, wrong=("int32",))], (8, 32), ["2:4+W8"])
    assert wrong.milliseconds["query"] == {"2:4+W8": 0.004}, "a sparse form that is wrong never runs"
    assert sparse.source is not None
    assert "stand-in, which are times of no GPU" in sparse.source.measured
    assert sparse.source.versions["cusparselt"] == "0.8.0"


def test_a_gpu_time_of_other_rows_or_of_launches_is_none(gpu_engine: Callable[..., Path]) -> None:
    engine = gpu_engine(4.0, FASTER)
    with pytest.raises(EngineError, match=r"measured at 32, 128, 256 rows, not at 160; build with the shape"):
        latency_table([engine], (5, 32), CANDIDATES)
    with pytest.raises(EngineError, match="leave out the rounds and the number of threads"):
        latency_table([engine], (8, 32), CANDIDATES, threads=1)
    launched = gpu_engine(4.0, FASTER, refused=tuple(name for name, _ in FASTER))
    with pytest.raises(EngineError, match="timed with the host's launches, which no replayed CUDA graph has"):
        latency_table([launched], (8, 32), CANDIDATES)


def test_engines_that_do_not_belong_together_are_refused(
    cpu_engines: list[Path], gpu_engine: Callable[..., Path], tiny_engine: Callable[..., Path]
) -> None:
    with pytest.raises(EngineError, match="the same engine is given twice"):
        latency_table([cpu_engines[0]] * 2, SHAPE, CANDIDATES)
    with pytest.raises(EngineError, match="no times of one table"):
        latency_table([cpu_engines[0], gpu_engine(4.0, FASTER)], SHAPE, CANDIDATES)
    with pytest.raises(EngineError, match="give one model's"):
        latency_table([cpu_engines[0], tiny_engine("ort", "albert", "inputs")], SHAPE, CANDIDATES)
    with pytest.raises(EngineError, match="longer than the model's"):
        latency_table(cpu_engines, (1, 4000), CANDIDATES, rounds=1)


def test_the_command_writes_what_a_search_reads(cpu_engines: list[Path], tmp_path: Path) -> None:
    engines, out = [shutil.copytree(path, tmp_path / path.name) for path in cpu_engines], tmp_path / "ms.json"
    command = ["latency", *map(str, engines), "--shape", "8x32", "--rounds", "2", "--out", str(out)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "per-node times of ONNX Runtime on the CPU" in " ".join(result.output.split())
    assert "--candidates 2:4+W4,W4,2:4+W8,W8,dense" in result.output
    table = read_latencies(out)
    assert table.source is not None
    assert json.loads(out.read_text())["schema"] == "nxm-latency/1"
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 1, again.output
    assert "would be overwritten" in again.output
    shown = CliRunner().invoke(main, [*command, "--force", "--json"])
    assert json.loads(shown.stdout)["source"]["backend"] == "ort"
    refused = CliRunner().invoke(main, [*command, "--force", "--candidates", "W9"])
    assert refused.exit_code == 1, refused.output
    assert "weight_bits must be 2 to 8" in refused.output
    left = {path.name for path in tmp_path.iterdir()} - {path.name for path in engines}
    assert left == {"ms.json"}, "no profile is left behind"

"""Every family through every stage, on tiny models with random weights: docs/families.md's table is made of these tests
(`tools.family_table`)."""

from __future__ import annotations

import itertools
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import nxm_export as nxm
from compressors.search.settings import SearchSettings
from compressors.settings import RECIPES, Settings
from engines.passport import load_passport
from nxm_export.contract.checkpoint import open_checkpoint
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import INT8_ATTENTION
from nxm_export.errors import EngineUnavailable, PlanError
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.pipeline.engine_comparison import bisect_engines
from tests.support import baked, tiny
from tests.support.few_rounds import time_few_rounds_here
from tests.support.variants import placements_of

Graphs = Callable[..., Path]


class Family:
    """One family's trained checkpoint, and what is made of it, each once for all tests."""

    def __init__(self, name: str, checkpoint: Path, graph: Graphs, engine: Graphs) -> None:
        self.name, self.checkpoint = name, checkpoint
        self._graph, self._engine = graph, engine
        self.dev = checkpoint.parent / "dev.tsv"

    def graph(self, target: str) -> Path:
        """The directory of its graph for a target."""
        return self._graph(self.name, "inputs-outputs", target)

    def engine(self, backend: str) -> Path:
        """The directory of its engine; a backend that is not installed skips."""
        try:
            return self._engine(backend, self.name)
        except EngineUnavailable as error:
            pytest.skip(str(error))


def compress(family: Family, scratch: Path) -> None:
    metrics = json.loads((family.checkpoint / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["value"] > 0.75  # it learned something, so that what follows means something


def _compress_with(recipe: str) -> Callable[[Family, Path], None]:
    def stage(family: Family, scratch: Path) -> None:
        root = family.checkpoint.parent
        done = nxm.compress(
            root / "dense",
            train=root / "train.tsv",
            dev=family.dev,
            out=scratch / "checkpoint",
            settings=Settings(recipe=recipe, steps=6, batch_size=16, calibration_samples=32, precision="fp32"),
        )
        assert done.value is not None
        assert done.value > 0.5
        open_checkpoint(scratch / "checkpoint").require_valid()

    return stage


def search(family: Family, scratch: Path) -> None:
    root = family.checkpoint.parent
    settings = SearchSettings(samples=8, held_out=8, halving=(), swaps=1)
    training = Settings(steps=6, batch_size=16, calibration_samples=32, precision="fp32")
    found = nxm.search(
        root / "dense", train=root / "train.tsv", out=scratch / "plan", settings=settings, training=training
    )
    assert found is not None
    assert nxm.CompressionPlan.load(scratch / "plan/plan.json").compression() >= 0.87


def permute(family: Family, scratch: Path) -> None:
    root = family.checkpoint.parent
    settings = Settings(steps=2, batch_size=16, calibration_samples=32, precision="fp32", permute=True)
    nxm.compress(root / "dense", train=root / "train.tsv", dev=family.dev, out=scratch / "c", settings=settings)


def _int8_attention(family: Family, scratch: Path) -> None:
    """Queries, keys, values and probabilities on integers, and PyTorch's numbers."""
    kind = FAMILIES[family.name]
    if not set(INT8_ATTENTION) & set(placements_of(kind)):
        with pytest.raises(PlanError, match="attention int8"):
            kind.uniform_plan(
                json.loads((family.checkpoint / "config.json").read_text(encoding="utf-8")),
                nxm.WeightSpec.parse("2:4+W8"),
                placement="attention",
            )
        pytest.xfail("refused: transformers computes this attention inside its own module")
    path = baked.write_checkpoint(family.name, scratch / "c", attention="int8", placement="attention", layers=2)
    graph = nxm.export(path, scratch / "g", placement="attention").path
    _require_same(family, path, graph, "ort", scratch)


def run(family: Family, scratch: Path) -> None:
    """One command for all of it, with its report."""
    root = family.checkpoint.parent
    settings = Settings(steps=6, batch_size=16, calibration_samples=32, precision="fp32")
    with pytest.MonkeyPatch.context() as patch:
        time_few_rounds_here(patch)
        nxm.run(root / "dense", train=root / "train.tsv", dev=family.dev, out=scratch / "run", settings=settings)
    page = Path(nxm.report(scratch / "run", out=scratch / "report.html")).read_text(encoding="utf-8")
    assert all(linear.role.replace("_", "\n").split("\n")[0] in page for linear in FAMILIES[family.name].linears)


def _export(target: str) -> Callable[[Family, Path], None]:
    def stage(family: Family, scratch: Path) -> None:
        report = nxm.verify(family.graph(target) / "model.onnx")
        report.require()
        planned = [weight for weight in report.weights if weight.planned]
        assert len(planned) == tiny.matrices(family.name, split=True)  # a part has an output quantizer of its own

    return stage


def _build(backend: str) -> Callable[[Family, Path], None]:
    def stage(family: Family, scratch: Path) -> None:
        directory = family.engine(backend)
        if backend == "trt_rtx":  # which runs on a GPU alone
            assert load_passport(directory).options["float_products"] == []
        else:
            nxm.compare(directory, family.dev).require()

    return stage


def bisect(family: Family, scratch: Path) -> None:
    [report] = bisect_engines(family.checkpoint, [family.engine("ort")], str(family.dev))
    report.require()
    assert len(report.blocks) > tiny.LAYERS  # the embeddings, and every run of a block
    assert all(block.passed and block.isolated_max_abs is not None for block in report.blocks)


def serve(family: Family, scratch: Path) -> None:
    from tools.benchmarks.servers import nxm_serve

    with nxm_serve(scratch / "log", f"film={family.engine('ort')}", "--text") as server:
        body = {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["a good film"]}]}
        request = urllib.request.Request(
            f"{server.url}/v2/models/film_text/infer", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            outputs = {output["name"]: output["data"] for output in json.load(response)["outputs"]}
    logits = outputs["logits"]
    assert len(logits) == 2
    assert all(np.isfinite(logits))


def pack(family: Family, scratch: Path) -> None:
    nxm.pack(family.checkpoint, scratch / "packed.nxm")
    back = nxm.unpack(scratch / "packed.nxm", scratch / "back")
    for name in ("model.safetensors", "nxm_scales.safetensors", "nxm_plan.json"):
        assert (back / name).read_bytes() == (family.checkpoint / name).read_bytes()


def _require_same(family: Family, checkpoint: Path, graph: Path, backend: str, scratch: Path) -> None:
    from engines.base import backend as backend_named
    from engines.reference import pytorch

    build_engine(graph, scratch / "engine", backend)
    feeds = baked.feeds(family.name, 4, 9, padding=4)
    with backend_named(backend).load(scratch / "engine") as engine:
        actual = engine.run(feeds)["logits"]
    with pytorch.load(checkpoint, task="classification") as reference:
        expected = reference.run(feeds)["logits"]
    # Float rounding, but where it moves a code by one step: some hundredths of these logits.
    np.testing.assert_allclose(actual, expected, atol=0.02 * max(1.0, float(np.abs(expected).max())))


STAGES: dict[str, Callable[[Family, Path], None]] = {
    "compress": compress,
    "admm": _compress_with("admm"),
    "nxm": _compress_with("nxm"),
    "sr-ste": _compress_with("sr-ste"),
    "permute": permute,
    "search": search,
    "export cpu": _export("cpu"),
    "export trt": _export("trt"),
    "export trt8": _export("trt8"),
    "INT8 attention": _int8_attention,
    "ort": _build("ort"),
    "openvino": _build("openvino"),
    "trt_rtx": _build("trt_rtx"),
    "bisect": bisect,
    "run": run,
    "serve": serve,
    "pack": pack,
}


# `make test-slow` runs the families whose blocks differ most, `tools.family_table` all of them.
SLOW = ("mpnet", "modernbert", "nomic_bert")
CASES = [
    pytest.param(family, stage, marks=[pytest.mark.slow if family in SLOW else pytest.mark.exhaustive])
    for family, stage in itertools.product(tiny.FAMILIES, STAGES)
]


@pytest.mark.parametrize(("family", "stage"), CASES)
def test_a_family_passes_a_stage(
    family: str, stage: str, tmp_path: Path, tiny_checkpoint: Graphs, tiny_graph: Graphs, tiny_engine: Graphs
) -> None:
    STAGES[stage](Family(family, tiny_checkpoint(family), tiny_graph, tiny_engine), tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe not in STAGES])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_family_is_compressed_by_the_other_recipes(
    family: str, recipe: str, tmp_path: Path, tiny_checkpoint: Graphs
) -> None:
    root = tiny_checkpoint(family).parent
    steps = 0 if recipe == "one-shot" else 6
    settings = Settings(recipe=recipe, steps=steps, batch_size=16, calibration_samples=32, precision="fp32")
    train, dev = root / "train.tsv", root / "dev.tsv"
    done = nxm.compress(root / "dense", train=train, dev=dev, out=tmp_path / "checkpoint", settings=settings)
    assert done.recipe == recipe
    open_checkpoint(tmp_path / "checkpoint").require_valid()


def test_every_registered_family_is_tried() -> None:
    assert set(tiny.FAMILIES) == set(FAMILIES)

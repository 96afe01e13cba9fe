"""The INT8 word-embedding table: training on it, its plan, its engine, and what commands say of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from compressors.models import resolve
from compressors.quantization.embedding import row_codes
from compressors.settings import Settings
from compressors.training.compress import compress
from compressors.training.resume import request_hash
from engines.parity.compare import compare
from engines.parity.gates import parse_gate
from nxm_export.cli import main
from nxm_export.contract import packed_checkpoint
from nxm_export.contract.checkpoint import open_checkpoint, read_tensor
from nxm_export.contract.families import FAMILIES
from nxm_export.contract.plan import CompressionPlan, WeightSpec
from nxm_export.contract.quantizer_placement import at_placement
from nxm_export.contract.records.checkpoint_metrics import CompressionMetrics, read_metrics, read_metrics_of
from nxm_export.data.features import Features
from nxm_export.errors import ArtifactError, DataError
from nxm_export.graph.exporter import export
from nxm_export.graph.int8_embedding import embedding_hash
from nxm_export.pipeline.engine_builds import build_engine
from nxm_export.storage.json_files import encode
from tests.support import baked, tiny

TABLE = FAMILIES["bert"].word_embedding


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Callable[..., Path]) -> Path:
    """A tiny compressed checkpoint with an INT8 table, trained; the dense model and the data beside it. Read it
    only."""
    return tiny_checkpoint("bert", embedding="int8")


def run(trained: Path, out: Path, embedding: str = "int8", progress: Any = lambda *_: None, **settings: Any) -> Any:
    source = resolve(trained.parent / "dense")
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"), embedding=embedding)
    options: dict[str, Any] = {
        "recipe": "nxm",
        "steps": 6,
        "batch_size": 16,
        "learning_rate": 1e-3,
        "calibration_samples": 32,
    }
    train, dev = (str(trained.parent / f"{split}.tsv") for split in ("train", "dev"))
    chosen = Settings(**{**options, "precision": "fp32", **settings})
    return compress(
        source.path, task="classification", train=train, dev=dev, plan=plan, out=out, settings=chosen, progress=progress
    )


@pytest.fixture(scope="module")
def retrained(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its table trained, too."""
    out = tmp_path_factory.mktemp("retrained") / "checkpoint"
    run(trained, out, freeze_embeddings=False)
    return out


class TestTraining:
    def test_a_frozen_table_is_the_dense_one_on_its_grid(self, trained: Path) -> None:
        checkpoint = open_checkpoint(trained)
        checkpoint.require_valid()
        assert checkpoint.plan.embedding == "int8"
        codes, scales = row_codes(torch.from_numpy(read_tensor(trained.parent / "dense", TABLE)))
        np.testing.assert_array_equal(checkpoint.codes(TABLE), codes.numpy().astype(np.int8))
        np.testing.assert_array_equal(checkpoint.weight_scale(TABLE), scales[:, 0].numpy())
        np.testing.assert_array_equal(checkpoint.weight(TABLE), (codes * scales).numpy())

    def test_a_trained_table_moves_and_is_on_its_grid(self, trained: Path, retrained: Path) -> None:
        checkpoint = open_checkpoint(retrained)
        checkpoint.require_valid()
        assert (checkpoint.codes(TABLE) != open_checkpoint(trained).codes(TABLE)).mean() > 0.1

    def test_what_the_table_costs_by_itself_is_measured(self, trained: Path) -> None:
        metrics = read_metrics(trained)
        assert isinstance(metrics, CompressionMetrics)
        assert metrics.embedding_table_drop is not None
        assert metrics.embedding_table_drop_interval is not None
        low, high = metrics.embedding_table_drop_interval
        assert low <= metrics.embedding_table_drop <= high
        assert abs(metrics.embedding_table_drop) <= 100 * 2 / tiny.DEV_SAMPLES  # two samples of an easy task

    def test_a_float_plan_measures_nothing_of_the_kind(self, tiny_checkpoint: Callable[..., Path]) -> None:
        metrics = read_metrics(tiny_checkpoint("bert"))
        assert isinstance(metrics, CompressionMetrics)
        assert (metrics.embedding_table_drop, metrics.embedding_table_drop_interval) == (None, None)

    @pytest.mark.slow
    def test_an_interrupted_run_ends_where_one_without_interruption_does(
        self, trained: Path, retrained: Path, tmp_path: Path
    ) -> None:
        def interrupted(phase: str, done: int, steps: int) -> None:
            if phase == "qat":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(trained, tmp_path / "resumed", progress=interrupted, freeze_embeddings=False)
        assert list((tmp_path / ".resumed.work").glob("admm*.safetensors"))  # a finished phase
        run(trained, tmp_path / "resumed", freeze_embeddings=False)
        weights = [(path / "model.safetensors").read_bytes() for path in (tmp_path / "resumed", retrained)]
        assert weights[0] == weights[1]

    def test_the_request_names_the_option(self, trained: Path) -> None:
        source, plan = resolve(trained.parent / "dense"), open_checkpoint(trained).plan
        hashes = {request_hash(source, [], chosen) for chosen in (plan, replace(plan, embedding="float"))}
        assert len(hashes) == 2

    def test_sentence_embeddings_pack_and_unpack_too(
        self, tiny_checkpoint: Callable[..., Path], tmp_path: Path
    ) -> None:
        checkpoint = tiny_checkpoint("bert", task="embedding", embedding="int8", steps=3)
        assert open_checkpoint(checkpoint).plan.embedding == "int8"
        packed_checkpoint.pack(checkpoint, tmp_path / "packed")
        unpacked = packed_checkpoint.unpack(tmp_path / "packed", tmp_path / "unpacked")
        assert (unpacked / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


class TestPlan:
    def test_a_plan_says_embedding_only_where_it_is_int8_and_an_older_one_is_float(self, trained: Path) -> None:
        plan = open_checkpoint(trained).plan
        assert json.loads(plan.to_json())["embedding"] == "int8"
        assert CompressionPlan.from_json(plan.to_json()) == plan
        older = json.loads(plan.to_json())
        del older["embedding"]
        assert CompressionPlan.from_json(json.dumps(older)) == replace(plan, embedding="float")
        assert json.loads(replace(plan, embedding="float").to_json()) == older

    def test_every_placement_keeps_it_but_float(self, trained: Path) -> None:
        plan = open_checkpoint(trained).plan
        placements = {
            placement: at_placement(plan, placement).embedding for placement in ("inputs", "inputs-outputs", "float")
        }
        assert placements == {"inputs": "int8", "inputs-outputs": "int8", "float": "float"}

    def test_compression_of_the_matrices_does_not_count_it(self, trained: Path) -> None:
        plan = open_checkpoint(trained).plan
        assert plan.compression("packed") == replace(plan, embedding="float").compression("packed")


class TestEngine:
    @pytest.fixture(scope="class")
    def engine(self, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        out = tmp_path_factory.mktemp("engine")
        export(trained, out / "graph")
        build_engine(out / "graph" / "model.onnx", out / "ort")
        return out / "ort"

    @pytest.fixture(scope="class")
    def features(self) -> list[Features]:
        return baked.features()

    def test_it_passes_parity_and_its_passport_names_the_table(
        self, trained: Path, engine: Path, features: list[Any]
    ) -> None:
        report = compare(trained, engine, features, gates=[parse_gate("embedding_table<=5")])
        assert report.passed
        passport = json.loads((engine / "passport.json").read_text())
        checkpoint = open_checkpoint(trained)
        assert passport["plan"]["embedding"] == "int8"
        assert passport["graph"]["embedding_sha256"] == embedding_hash(
            checkpoint.codes(TABLE), checkpoint.weight_scale(TABLE)
        )

    @pytest.mark.parametrize(("cost", "passed"), [(0.5, True), (0.6, False)])
    def test_the_gate_holds_what_the_table_cost_against_its_limit(
        self, trained: Path, engine: Path, features: list[Any], tmp_path: Path, cost: float, passed: bool
    ) -> None:
        copy = shutil.copytree(trained, tmp_path / "checkpoint")
        metrics = replace(read_metrics_of(CompressionMetrics, copy), embedding_table_drop=cost)
        (copy / "metrics.json").write_text(encode(metrics.to_dict()), encoding="utf-8")
        report = compare(copy, engine, features, gates=[parse_gate("embedding_table<=0.5")])
        assert (report.passed, report.gates[0].passed) == (passed, passed)

    def test_the_gate_is_refused_where_the_cost_is_not_known(
        self, trained: Path, engine: Path, features: list[Any], tmp_path: Path
    ) -> None:
        copy = shutil.copytree(trained, tmp_path / "checkpoint")
        metrics = json.loads((copy / "metrics.json").read_text())
        for cost, error, message in (
            (None, DataError, "has no embedding_table_drop"),
            (float("nan"), ArtifactError, "NaN is"),
        ):
            (copy / "metrics.json").write_text(json.dumps({**metrics, "embedding_table_drop": cost}))
            with pytest.raises(error, match=message):
                compare(copy, engine, features, gates=[parse_gate("embedding_table<=0.5")])

    def test_the_gate_is_refused_where_no_table_was_rounded(
        self, tiny_checkpoint: Callable[..., Path], tiny_engine: Callable[..., Path], features: list[Any]
    ) -> None:
        with pytest.raises(DataError, match=r"a gate on embedding_table needs a checkpoint that .* --embedding int8"):
            compare(tiny_checkpoint(), tiny_engine(), features, gates=[parse_gate("embedding_table<=0.5")])


class TestCommands:
    def test_a_dry_run_counts_it(self, trained: Path) -> None:
        parent = trained.parent
        arguments = ["run", str(parent / "dense"), "--train", str(parent / "train.tsv")]
        arguments += ["--dev", str(parent / "dev.tsv"), "--out", str(parent / "none"), "--dry-run", "--json"]
        estimates = []
        for embedding in ("float", "int8"):
            done = CliRunner().invoke(main, [*arguments, "--embedding", embedding])
            assert done.exit_code == 0, done.output
            estimates.append(json.loads(done.stdout))
        tokens, features = open_checkpoint(trained).weight(TABLE).shape
        assert estimates[0]["onnx_bytes"] - estimates[1]["onnx_bytes"] == tokens * features * 3 - tokens * 4
        assert [estimate["embedding"] for estimate in estimates] == ["float", "int8"]

    def test_an_unknown_kind_is_wrong_usage(self) -> None:
        for command in ("run", "compress", "search"):
            done = CliRunner().invoke(main, [command, "--embedding", "int4", "x", "--out", "y"])
            assert done.exit_code == 2

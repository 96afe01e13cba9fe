"""Three-way comparison: engines with their checkpoint and each other, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from engines.devices import running_on
from engines.ort.backend import OrtEngine
from engines.parity.bisect import bisect
from engines.parity.compare import compare, compare_all
from engines.parity.parts import Part, open_part
from engines.parity.reports import ParityReport
from engines.passport import load_passport
from engines.reference.pytorch import TorchEngine
from nxm_export.cli import main
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.origin import Origin
from nxm_export.errors import ArtifactError, EngineError, ParityError, ServeError
from tests.support import exact_engine, tiny
from tests.support.broken import write_engine
from tests.support.dev_features import dev_features


def nxm(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_two_engines_and_their_checkpoint(
    tiny_checkpoint: Callable[..., Path], tiny_engine: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("bert")
    engines = [
        shutil.copytree(tiny_engine("ort", "bert", placement), tmp_path / placement)
        for placement in ("inputs", "inputs-outputs")
    ]
    data = checkpoint.parent / "dev.tsv"
    result = nxm(
        "compare", *engines, f"--checkpoint={checkpoint}", f"--data={data}", "--gate=drop<=0", "--gate=flips<=0%"
    )
    assert result.exit_code == 0, result.output
    assert len(result.stdout.splitlines()) <= 25, "a row for each engine; --all has a table for each"
    assert len(re.findall(r"^inputs(-outputs)? +logits +\S+ of .* 9 of 9", result.stdout, re.MULTILINE)) == 2
    for engine, other in (engines, engines[::-1]):
        report = json.loads((engine / "parity.json").read_text())
        assert report["passed"] is True
        assert report["machine"] == running_on(load_passport(engine))
        assert report["runtime"] == f"onnxruntime {version('onnxruntime')}"
        assert [gate["gate"] for gate in report["gates"]] == ["drop<=0", "flips<=0%"]
        assert {probe["passed"] for probe in report["probes"]} == {True}
        outputs = [np.load(directory / "outputs.npz")["logits"].astype(np.float64) for directory in (engine, other)]
        (pair,) = report["pairs"]
        assert pair["other"] == str(other)
        assert pair["max_abs"] == float(np.abs(outputs[0] - outputs[1]).max())
        (logits,) = report["outputs"]
        assert logits["max_steps"] == pytest.approx(logits["max_abs"] / logits["one_step_shift"])
    failed = nxm("compare", engines[0], f"--checkpoint={checkpoint}", f"--data={data}", "--gate=max_abs<=0")
    assert failed.exit_code == 3
    assert "the gate max_abs<=0 failed: largest |difference| of any output: " in failed.stderr
    assert json.loads((engines[0] / "parity.json").read_text())["passed"] is False


def test_without_a_checkpoint_it_is_the_one_that_the_first_engine_records(
    tiny_checkpoint: Callable[..., Path], tiny_engine: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = tiny_checkpoint("bert")
    engine = shutil.copytree(tiny_engine("ort"), tmp_path / "engine")
    data = f"--data={checkpoint.parent / 'dev.tsv'}"
    Origin(str(checkpoint)).save(engine)
    compared = nxm("compare", engine, data, "--json")
    assert compared.exit_code == 0, compared.output
    assert [report["passed"] for report in json.loads(compared.stdout)] == [True]
    assert compared.stderr == f"the checkpoint is {checkpoint}, which {engine} records\n"
    (engine / "origin.json").unlink()
    unknown = nxm("compare", engine, data)
    assert unknown.exit_code == 1
    assert f"{engine} does not record the checkpoint that it was made from; name the checkpoint" in unknown.stderr
    Origin(str(tmp_path / "gone")).save(engine)
    gone = nxm("compare", engine, data)
    assert gone.exit_code == 1
    assert "gone, which is not there (any more); name the checkpoint" in gone.stderr
    alone = nxm("compare", checkpoint, data)
    assert alone.exit_code == 2
    assert "is a model, not an engine directory; name it by --checkpoint" in " ".join(alone.stderr.split())


class TestMemory:
    """A machine that has no room for the usual batch: fewer rows, no maximum length, or a refusal."""

    @pytest.fixture
    def shapes(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
        """Shapes that the reference runs, which takes a thousand bytes a token; engines take none."""
        seen: list[tuple[int, ...]] = []
        run = TorchEngine.run

        def recorded(engine: TorchEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            seen.append(feeds["input_ids"].shape)
            return run(engine, feeds)

        monkeypatch.setattr(TorchEngine, "run", recorded)
        monkeypatch.setattr("engines.parity.compare.reference_memory", lambda _, tokens: 1000 * tokens)
        monkeypatch.setattr("engines.parity.parts.engine_memory", lambda *_: None)
        return seen

    def compared(
        self, checkpoint: Path, engine: Path, out: Path, available: int, monkeypatch: pytest.MonkeyPatch
    ) -> ParityReport:
        monkeypatch.setattr("engines.parity.compare.available_memory", lambda: available)
        monkeypatch.setattr("nxm_export.storage.memory.available_memory", lambda: available)
        directory = shutil.copytree(engine, out)
        return compare(checkpoint, directory, dev_features(checkpoint, directory)[:12])

    def test_batches_are_as_large_as_there_is_room(
        self,
        tiny_checkpoint: Callable[..., Path],
        tiny_engine: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        shapes: list[tuple[int, ...]],
    ) -> None:
        checkpoint, engine = tiny_checkpoint("bert"), tiny_engine("ort")
        longest = max(len(sample["input_ids"]) for sample in dev_features(checkpoint, engine)[:12])
        roomy = self.compared(checkpoint, engine, tmp_path / "a", 10**9, monkeypatch)
        assert max(rows for rows, _ in shapes) == 12
        shapes.clear()
        narrow = self.compared(checkpoint, engine, tmp_path / "b", 1000 * max(3 * longest, 50), monkeypatch)
        assert 1 < max(rows * length for rows, length in shapes) <= max(3 * longest, 50)
        assert [roomy.passed, narrow.passed] == [True, True]
        assert {probe.passed for probe in narrow.probes} == {True}

    def test_a_maximum_length_that_is_beyond_the_machine_is_not_called_passed(
        self,
        tiny_checkpoint: Callable[..., Path],
        tiny_engine: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        shapes: list[tuple[int, ...]],
    ) -> None:
        checkpoint, engine = tiny_checkpoint("bert"), tiny_engine("ort")
        report = self.compared(checkpoint, engine, tmp_path / "a", 1000 * (tiny.POSITIONS - 1), monkeypatch)
        beyond = next(probe for probe in report.probes if probe.name == "maximum length")
        assert beyond.passed is None
        assert "48 tokens need at least 0.0 GB of memory, and 0.0 GB are available here" in beyond.reason
        assert all(length < tiny.POSITIONS for _, length in shapes)

    def test_a_sample_that_does_not_fit_alone_is_refused_and_nothing_is_written(
        self,
        tiny_checkpoint: Callable[..., Path],
        tiny_engine: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        shapes: list[tuple[int, ...]],
    ) -> None:
        with pytest.raises(EngineError, match=r"comparing .* on 1x\d+ .*compare on shorter texts"):
            self.compared(tiny_checkpoint("bert"), tiny_engine("ort"), tmp_path / "a", 999, monkeypatch)
        assert not shapes
        assert not (tmp_path / "a" / "parity.json").exists()


def test_an_engine_that_is_replaced_meanwhile_gets_no_report_of_another(
    tiny_checkpoint: Callable[..., Path], tiny_engine: Callable[..., Path], tmp_path: Path
) -> None:
    engine = shutil.copytree(tiny_engine("ort", "bert", "inputs"), tmp_path / "engine")
    part = open_part(tiny_checkpoint("bert"), engine)
    with part.load():
        pass
    shutil.rmtree(engine)
    shutil.copytree(tiny_engine("ort", "bert", "inputs-outputs"), engine)
    with pytest.raises(ServeError, match="was replaced while it was loaded"):
        part.load()


def test_the_maximum_length_is_that_of_each_engine(
    tiny_checkpoint: Callable[..., Path],
    tiny_engine: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of two engines of one kind, the first of which has a profile for a part of what the model takes."""
    engines = {name: shutil.copytree(tiny_engine("ort"), tmp_path / name) for name in ("short", "whole")}
    passport = json.loads((engines["short"] / "passport.json").read_text())
    passport["profiles"] = [{"minimum": [1, 1], "optimum": [8, 16], "maximum": [16, 24]}]
    (engines["short"] / "passport.json").write_text(json.dumps(passport))
    longest, run = dict.fromkeys(engines, 0), OrtEngine.run

    def recorded(engine: OrtEngine, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        name = engine.directory.name
        longest[name] = max(longest[name], feeds["input_ids"].shape[1])
        return run(engine, feeds)

    monkeypatch.setattr(OrtEngine, "run", recorded)
    checkpoint = tiny_checkpoint("bert")
    features = dev_features(checkpoint, engines["whole"])[:4]
    reports = compare_all(checkpoint, list(engines.values()), features)
    assert longest == {"short": 24, "whole": tiny.POSITIONS}
    said = {
        name: [p for p in report.probes if p.name == "maximum length"]
        for name, report in zip(engines, reports, strict=True)
    }
    assert {name: (p.passed, p.reason.partition(" ")[0]) for name, (p,) in said.items()} == {
        "short": (True, "24"), "whole": (True, str(tiny.POSITIONS)),
    }  # fmt: skip


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("bert")


@pytest.fixture
def engine(tiny_engine: Callable[..., Path], tmp_path: Path) -> Path:
    """An engine of it, to be spoilt."""
    return shutil.copytree(tiny_engine("ort"), tmp_path / "engine")


class TestNotFinite:
    """Engines, and checkpoints, whose outputs are no numbers or hardly any."""

    @pytest.mark.parametrize(("value", "expected"), [(-np.inf, None), (np.nan, None), (3e38, 3e38), (-3e38, 3e38)])
    def test_an_engine_fails_and_its_report_is_written(
        self, checkpoint: Path, engine: Path, value: float, expected: float | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        spoil(monkeypatch, "load", lambda logits: np.where(np.arange(logits.shape[1]) == 0, value, logits))
        report = compare(checkpoint, engine, dev_features(checkpoint, engine)[:4])
        assert json.loads((engine / "parity.json").read_text()) == json.loads(json.dumps(report.to_dict()))
        assert not report.passed
        alone = next(probe for probe in report.probes if probe.name == "one token")
        assert [report.outputs[0].max_abs, alone.actual] == [None if expected is None else pytest.approx(expected)] * 2
        assert alone.passed is False

    def test_values_of_all_of_float32_fail_with_the_gap_between_them(
        self, checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        signs = iter(range(10**6))
        spoil(monkeypatch, "load", lambda logits: np.full_like(logits, 3e38 * (-1) ** next(signs)))
        report = compare(checkpoint, engine, dev_features(checkpoint, engine)[:4])
        alone = next(probe for probe in report.probes if probe.name == "permuted batch")
        assert alone.passed is False
        assert alone.actual == pytest.approx(6e38)

    @pytest.mark.parametrize(
        ("run", "rows"), [(2, 1), (4, 1), (5, 1), (8, 4)], ids=["answer", "change", "probe", "copies"]
    )
    def test_a_checkpoint_is_refused_wherever_it_is_run(
        self, checkpoint: Path, engine: Path, run: int, rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of one sample and two probes: what it gives for all, for each probe, as much again in the engine's
        float type, and with moved codes, of which every copy of a probe's sample has others."""
        given: list[int] = []

        def change(logits: np.ndarray) -> np.ndarray:
            given.append(len(logits))
            return logits * np.nan if len(given) == run else logits

        spoil(monkeypatch, "load_reference", change)
        with pytest.raises(ParityError, match="the checkpoint itself gives NaN or infinity in PyTorch"):
            compare(checkpoint, engine, dev_features(checkpoint, engine)[:1])
        assert given[run - 1] == rows
        assert not (engine / "parity.json").exists()

    def test_a_number_that_cannot_be_written_is_named(
        self, checkpoint: Path, engine: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("nxm_export.data.metrics.ScoredOutputs.value", lambda *_: np.nan)
        with pytest.raises(ParityError, match=r"engine: .*ParityReport\.reference_value is nan"):
            compare(checkpoint, engine, dev_features(checkpoint, engine)[:4])
        assert not (engine / "parity.json").exists()


def spoil(patch: pytest.MonkeyPatch, method: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Let what `Part.<method>` opens give changed logits."""
    opened = getattr(Part, method)

    def changed(part: Part, *arguments: object, **options: object) -> Any:
        engine = opened(part, *arguments, **options)
        run = engine.run
        engine.run = lambda feeds: {name: change(array).astype(np.float32) for name, array in run(feeds).items()}
        return engine

    patch.setattr(Part, method, changed)


class TestRefused:
    """Nothing of this is compared, and nothing is written."""

    def refused(self, message: str, code: int, *arguments: object, engine: Path) -> None:
        result = nxm("compare", *arguments)
        assert result.exit_code == code, result.output
        assert message in result.stderr
        assert not (engine / "parity.json").exists()

    def test_a_label_that_the_engine_does_not_have(self, checkpoint: Path, engine: Path, tmp_path: Path) -> None:
        (tmp_path / "dev.tsv").write_text("sentence\tlabel\na good film\tmaybe\n")
        self.refused(
            "dev.tsv:2: label 'maybe' is none of the model's classes",
            1,
            f"--checkpoint={checkpoint}",
            engine,
            f"--data={tmp_path / 'dev.tsv'}",
            engine=engine,
        )

    def test_an_empty_dev_set(self, checkpoint: Path, engine: Path, tmp_path: Path) -> None:
        (tmp_path / "dev.tsv").write_text("sentence\tlabel\n")
        self.refused(
            "no examples in it",
            1,
            f"--checkpoint={checkpoint}",
            engine,
            f"--data={tmp_path / 'dev.tsv'}",
            engine=engine,
        )

    @pytest.mark.parametrize(
        ("file", "change", "message"),
        [
            ("spec.json", {"labels": ["bad", "good"]}, "has the labels ['bad', 'good']"),
            (
                "spec.json",
                {"outputs": {"scores": ["batch", "classes"]}},
                "gives logits (batch, classes), here are scores",
            ),
            ("spec.json", {"model_type": "electra"}, "is of the electra family"),
            ("passport.json", {"graph": {"weights": "0" * 64}}, "engines of different checkpoints cannot be compared"),
        ],
    )
    def test_an_engine_of_something_else(
        self, checkpoint: Path, engine: Path, file: str, change: dict[str, Any], message: str
    ) -> None:
        data = json.loads((engine / file).read_text())
        for key, value in change.items():
            data[key] = {**data[key], **value} if key == "graph" else value
        (engine / file).write_text(json.dumps(data))
        exact_engine.cover(engine)
        self.refused(
            message, 1, f"--checkpoint={checkpoint}", engine, f"--data={checkpoint.parent / 'dev.tsv'}", engine=engine
        )

    def test_a_gate_on_a_metric_that_the_task_has_not(self, checkpoint: Path, engine: Path) -> None:
        data = checkpoint.parent / "dev.tsv"
        message = "drop(spearman)<=1: classification has the metrics accuracy, f1, mcc"
        self.refused(
            message,
            1,
            f"--checkpoint={checkpoint}",
            engine,
            f"--data={data}",
            "--gate=drop(spearman)<=1",
            engine=engine,
        )

    def test_outputs_of_the_engine_file_under_another_name(
        self, checkpoint: Path, engine: Path, tmp_path: Path
    ) -> None:
        def rename(model: Any) -> None:
            model.graph.outputs[0].name = "scores"

        renamed = write_engine(engine, tmp_path / "renamed", rename)
        with pytest.raises(ArtifactError, match="its spec names the outputs logits, and the engine file has scores"):
            compare_all(checkpoint, [renamed], dev_features(checkpoint, engine))
        with pytest.raises(ArtifactError, match="its spec names the outputs logits, and the engine file has scores"):
            bisect(checkpoint, renamed, dev_features(checkpoint, engine))
        assert not (renamed / "parity.json").exists()

    def test_engines_that_differ_in_what_they_take(self, checkpoint: Path, engine: Path, tmp_path: Path) -> None:
        other = shutil.copytree(engine, tmp_path / "other")
        tiny.write_tokenizer("roberta", other)
        (other / "tokenizer_config.json").unlink()
        exact_engine.cover(other)
        self.refused(
            "reads the data in other tokens",
            1,
            f"--checkpoint={checkpoint}",
            engine,
            other,
            f"--data={checkpoint.parent / 'dev.tsv'}",
            engine=engine,
        )
        assert load_spec(other) == load_spec(engine)

    def test_the_same_engine_twice(self, checkpoint: Path, engine: Path) -> None:
        self.refused("given twice", 2, f"--checkpoint={checkpoint}", engine, engine, "--data=x.tsv", engine=engine)

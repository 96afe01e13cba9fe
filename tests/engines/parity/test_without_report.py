"""Engines of a comparison that have no report: they cannot run here, or fail when they run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from engines.admission import admitted
from engines.ort.backend import OrtEngine
from engines.parity.parts import require_some
from engines.parity.reports import NotCompared, read_parity_report
from nxm_export.cli import main
from nxm_export.errors import EngineError, EngineUnavailable, ParityError
from tests.support import exact_engine


def nxm(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


class TestSkipped:
    """Engines of backends that are not on this machine, made from a healthy one by its passport."""

    @pytest.fixture
    def engines(self, tiny_engine: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
        here, elsewhere = (shutil.copytree(tiny_engine("ort"), tmp_path / name) for name in ("here", "elsewhere"))
        passport = json.loads((elsewhere / "passport.json").read_text())
        (elsewhere / "passport.json").write_text(json.dumps({**passport, "backend": "trt_rtx"}))
        return here, elsewhere

    @pytest.fixture(autouse=True)
    def unavailable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a machine without TensorRT-RTX, whatever this one has."""
        from engines.tensorrt import rtx_backend

        def load(*_: Any, **__: Any) -> Any:
            raise EngineUnavailable("TensorRT-RTX needs an NVIDIA GPU, and there is none here")

        monkeypatch.setattr(rtx_backend, "load", load)

    def test_the_others_are_compared_and_decide(
        self, tiny_checkpoint: Callable[..., Path], engines: tuple[Path, Path]
    ) -> None:
        here, elsewhere = engines
        checkpoint = tiny_checkpoint("bert")
        data = f"--data={checkpoint.parent / 'dev.tsv'}"
        result = nxm("compare", elsewhere, here, f"--checkpoint={checkpoint}", data, "--json")
        assert result.exit_code == 0, result.output
        ours, theirs = json.loads(result.stdout)
        assert (ours["engine"], ours["passed"]) == (str(here), True)
        assert theirs["engine"] == str(elsewhere)
        assert (theirs["passed"], theirs["skipped"]) == (
            None,
            "TensorRT-RTX needs an NVIDIA GPU, and there is none here",
        )
        assert theirs["engine_sha256"] == ours["engine_sha256"]
        assert not (elsewhere / "parity.json").exists()
        shown = nxm("compare", here, elsewhere, f"--checkpoint={checkpoint}", data)
        assert "skipped: not run here" in shown.stdout
        assert "needs an NVIDIA GPU" in shown.stdout

    def test_a_gate_on_an_engine_that_did_not_run_does_not_hold(
        self, tiny_checkpoint: Callable[..., Path], engines: tuple[Path, Path]
    ) -> None:
        checkpoint = tiny_checkpoint("bert")
        result = nxm(
            "compare",
            *engines,
            f"--checkpoint={checkpoint}",
            f"--data={checkpoint.parent / 'dev.tsv'}",
            "--gate=drop<=5",
        )
        assert result.exit_code == 3
        assert "elsewhere: the gate drop<=5 could not be checked" in result.stderr

    def test_nothing_left_to_compare_fails(
        self, tiny_checkpoint: Callable[..., Path], engines: tuple[Path, Path], tmp_path: Path
    ) -> None:
        checkpoint = tiny_checkpoint("bert")
        data = f"--data={checkpoint.parent / 'dev.tsv'}"
        alone = nxm("compare", engines[1], f"--checkpoint={checkpoint}", data)
        assert (alone.exit_code, alone.stderr) == (1, "nxm: TensorRT-RTX needs an NVIDIA GPU, and there is none here\n")
        other = shutil.copytree(engines[1], tmp_path / "other")
        both = nxm("compare", engines[1], other, f"--checkpoint={checkpoint}", data)
        assert both.exit_code == 1
        assert f"nothing could be compared here: {engines[1]}: TensorRT-RTX needs" in both.stderr


class TestFailed:
    """One of two engines fails: the reason is named, the other one has its report, and the command fails."""

    @pytest.fixture(params=["load", "run"])
    def engines(
        self,
        request: pytest.FixtureRequest,
        tiny_engine: Callable[..., Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> tuple[Path, Path]:
        failing, healthy = (shutil.copytree(tiny_engine("ort"), tmp_path / name) for name in ("failing", "healthy"))
        exact_engine.write_parity(failing, passed=True)  # of a comparison before this one
        (failing / "outputs.npz").touch()
        admitted(failing, "passed")
        as_before = getattr(OrtEngine, "__init__" if request.param == "load" else "run")

        def broken(engine: OrtEngine, *arguments: Any) -> Any:
            directory = arguments[0] if request.param == "load" else engine.directory
            if directory == failing:
                raise EngineError("the accelerator has no memory left")
            return as_before(engine, *arguments)

        monkeypatch.setattr(OrtEngine, as_before.__name__, broken)
        return failing, healthy

    def test_the_others_are_compared_and_the_command_fails(
        self, tiny_checkpoint: Callable[..., Path], engines: tuple[Path, Path]
    ) -> None:
        failing, healthy = engines
        checkpoint = tiny_checkpoint("bert")
        options = (f"--checkpoint={checkpoint}", f"--data={checkpoint.parent / 'dev.tsv'}")
        result = nxm("compare", failing, healthy, *options, "--json")
        assert result.exit_code == 1, result.output
        assert f"{failing} failed when it ran, so it was not compared: the accelerator has no memory" in result.stderr
        ours, theirs = json.loads(result.stdout)
        assert (ours["engine"], ours["passed"]) == (str(healthy), True)
        assert (theirs["engine"], theirs["passed"]) == (str(failing), False)
        assert theirs["failed"] == "the accelerator has no memory left"
        assert (healthy / "parity.json").is_file()
        self.require_failed(failing)
        shown = nxm("compare", healthy, failing, *options)
        assert "FAILED when they ran" in shown.stdout
        assert "nxm serve" not in shown.stdout + shown.stderr

    def test_one_that_is_compared_alone_gives_its_own_error(
        self, tiny_checkpoint: Callable[..., Path], engines: tuple[Path, Path]
    ) -> None:
        checkpoint = tiny_checkpoint("bert")
        alone = nxm("compare", engines[0], f"--checkpoint={checkpoint}", f"--data={checkpoint.parent / 'dev.tsv'}")
        assert (alone.exit_code, alone.stderr) == (1, "nxm: the accelerator has no memory left\n")
        self.require_failed(engines[0])

    @staticmethod
    def require_failed(engine: Path) -> None:
        """Whatever the report beside the engine said before, it vouches for it no more."""
        report = read_parity_report(engine / "parity.json")
        assert (report.passed, report.failure) == (False, "the accelerator has no memory left")
        assert report.reference_value is None
        assert not (engine / "outputs.npz").exists()
        with pytest.raises(ParityError, match="failing failed when it ran, so it was not compared: the accelerator"):
            report.require()
        for gate in ("passed", "not-failed"):
            with pytest.raises(ParityError, match=r"parity with its checkpoint failed \(parity.json\)"):
                admitted(engine, gate)

    def test_one_that_is_not_run_here_keeps_what_was_found_elsewhere(
        self,
        tiny_checkpoint: Callable[..., Path],
        engines: tuple[Path, Path],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def absent(*_: Any, **__: Any) -> Any:
            raise EngineUnavailable("there is no accelerator here")

        monkeypatch.setattr(OrtEngine, "__init__", absent)
        monkeypatch.setattr(OrtEngine, "run", absent)
        found = (engines[0] / "parity.json").read_bytes()
        checkpoint = tiny_checkpoint("bert")
        alone = nxm("compare", engines[0], f"--checkpoint={checkpoint}", f"--data={checkpoint.parent / 'dev.tsv'}")
        assert (alone.exit_code, alone.stderr) == (1, "nxm: there is no accelerator here\n")
        assert (engines[0] / "parity.json").read_bytes() == found


def test_nothing_left_is_an_engine_that_is_missing_unless_one_failed() -> None:
    absent, failed = (
        NotCompared(name, "0" * 64, "trt", f"no {name}", failed=name == "memory") for name in ("gpu", "memory")
    )
    require_some(["a report"], [absent, failed])
    with pytest.raises(EngineUnavailable, match=r"nothing could be compared here: gpu: no gpu$"):
        require_some([], [absent])
    with pytest.raises(EngineError, match=r"nothing could be compared here: gpu: no gpu; memory: no memory$") as raised:
        require_some([], [absent, failed])
    assert not isinstance(raised.value, EngineUnavailable)

"""Runs whose engines are timed in this process, a few times: for tests that look at nothing of what is measured."""

from __future__ import annotations

import contextlib
import io

import pytest
from click.testing import CliRunner

from engines.benchmark import fastest_backend
from nxm_export.cli import main
from nxm_export.pipeline import engine_stages


def time_few_rounds_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage of `nxm run` would have timed in a process of its own, until the test ends."""

    def here(module: str, *arguments: str) -> str:
        if module == "nxm_export":
            return CliRunner().invoke(main, arguments).stdout
        with io.StringIO() as told, contextlib.redirect_stdout(told):
            engine_stages.print_fastest(arguments)
            return told.getvalue()

    monkeypatch.setattr(engine_stages, "in_own_process", here)
    monkeypatch.setattr(engine_stages, "ROUNDS", 1)
    monkeypatch.setattr(engine_stages, "_GPU_SHAPES", ((1, 8),))
    monkeypatch.setattr(fastest_backend, "ROUNDS", 1)

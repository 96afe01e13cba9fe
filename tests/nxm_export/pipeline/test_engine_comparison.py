"""An engine is compared with its checkpoint; its graph is made again as its passport says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nxm_export.pipeline import engine_comparison


@pytest.mark.parametrize(("recorded", "asked"), [("float32", None), ("float16", "float16")])
def test_a_new_export_has_the_precision_overrides_of_the_passport(
    tiny_engine: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recorded: str,
    asked: str | None,
) -> None:
    engine = shutil.copytree(tiny_engine("ort"), tmp_path / "engine")
    passport = json.loads((engine / "passport.json").read_text(encoding="utf-8"))
    assert passport["graph"]["precision_overrides"] == passport["graph"]["dtype"] == "float32"
    passport["graph"]["precision_overrides"] = recorded
    (engine / "passport.json").write_text(json.dumps(passport), encoding="utf-8")
    given: dict[str, object] = {}

    def export(*_: object, **options: object) -> None:
        given.update(options)
        raise InterruptedError

    monkeypatch.setattr("nxm_export.graph.exporter.export", export)
    with pytest.raises(InterruptedError):
        engine_comparison._export_again(tmp_path / "checkpoint", engine, tmp_path / "graph")
    assert given["precision_overrides"] == asked

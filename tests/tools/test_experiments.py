"""The ablations run to their end on a tiny model, and say what they compare."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tools.experiments import mask_ablation, output_ablation


@pytest.mark.parametrize(
    ("tool", "more", "lines"),
    [
        (
            mask_ablation,
            ["--patterns", "2:4"],
            ["dense: accuracy ", "2:4: accuracy ", "2:4 activation, permuted: blocks: "],
        ),
        (output_ablation, [], ["dense: MCC ", "all outputs: KL ", "no output: KL ", "on distorted sentences, "]),
    ],
    ids=["masks", "outputs"],
)
def test_an_ablation_runs_to_its_end(
    tool: ModuleType,
    more: list[str],
    lines: list[str],
    tiny_checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = tiny_checkpoint("bert").parent
    data = ["--train", str(made / "train.tsv"), "--dev", str(made / "dev.tsv"), "--max-length", "48"]
    monkeypatch.setattr(sys, "argv", ["ablation", str(made / "dense"), *data, *more])
    tool.main()
    shown = capsys.readouterr().out
    for line in lines:
        assert any(row.startswith(line) for row in shown.splitlines()), shown

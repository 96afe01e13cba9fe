"""``train_log.jsonl``: lines are read back as they were written, also of killed and of former training."""

from __future__ import annotations

from pathlib import Path

import pytest

from nxm_export.contract.records.train_log import TrainLogLine, read_train_log
from nxm_export.errors import ArtifactError

LINES = (TrainLogLine("qat", 1, loss=0.5, learning_rate=1e-3), TrainLogLine("admm", 2, residual=0.25, flips=0.0))


def written(directory: Path, text: str) -> Path:
    (directory / "train_log.jsonl").write_text(text, encoding="utf-8")
    return directory / "train_log.jsonl"


def test_lines_are_read_back_and_have_nothing_that_was_not_measured(tmp_path: Path) -> None:
    text = "".join(line.to_text() for line in LINES)
    assert text.splitlines()[0] == '{"phase": "qat", "step": 1, "loss": 0.5, "learning_rate": 0.001}'
    assert read_train_log(written(tmp_path, text)) == LINES
    assert read_train_log(written(tmp_path, "")) == ()


def test_a_line_that_was_cut_is_left_out(tmp_path: Path) -> None:
    text = "".join(line.to_text() for line in LINES)
    assert read_train_log(written(tmp_path, text[:-5])) == LINES[:1]


def test_a_number_that_could_not_be_computed_is_none(tmp_path: Path) -> None:
    assert TrainLogLine("qat", 1, loss=0.5, grad_norm=float("nan")).to_text() == (
        '{"phase": "qat", "step": 1, "loss": 0.5}\n'
    )
    former = '{"phase": "qat", "step": 1, "loss": 0.5, "grad_norm": Infinity}\n'
    assert read_train_log(written(tmp_path, former)) == (TrainLogLine("qat", 1, loss=0.5),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ('{"phase": "qat"}', "missing required field `step`"),
        ('{"phase": "qat", "step": 1, "loss": "low"}', "loss: Expected `float | null`, got `str`"),
        ('{"phase": "qat", "step": 1, "mood": 1}', "unknown field mood"),
        ("[]", "Expected `object`"),
    ],
)
def test_a_damaged_line_is_refused_by_its_number(line: str, message: str, tmp_path: Path) -> None:
    text = f"{LINES[0].to_text()}{line}\n{LINES[1].to_text()}"
    with pytest.raises(ArtifactError, match=rf"train_log\.jsonl:2: .*{message.replace('|', '.')}.*delete it"):
        read_train_log(written(tmp_path, text))

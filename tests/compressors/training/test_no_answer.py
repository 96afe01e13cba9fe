"""A model that sees questions without an answer may give none afterwards, and its files say so all the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compressors.models import load_tokenizer, resolve
from compressors.settings import Settings
from compressors.training.compress import compress, finetune
from compressors.training.task_data import TaskDataRequest, read_task_data
from engines.parity.compatibility import require_from
from engines.passport import load_passport
from nxm_export.contract.io_spec import load_spec
from nxm_export.contract.no_answer import THRESHOLD_KEY
from nxm_export.contract.plan import WeightSpec
from nxm_export.contract.tasks import TASKS
from nxm_export.data.answer_spans import Window
from nxm_export.data.features import label_array
from nxm_export.errors import ArtifactError
from nxm_export.graph.exporter import export
from nxm_export.pipeline.engine_builds import build_engine
from tests.support import tiny

TASK = TASKS["question-answering"]


def rows(file: Path, unanswered: int) -> str:
    """Eight questions, the first `unanswered` of them without an answer."""
    answers = [{"text": ["film"], "answer_start": [5]}] * 8
    answers[:unanswered] = [{"text": [], "answer_start": []}] * unanswered
    lines = [json.dumps({"question": "which", "context": "good film", "answers": answer}) for answer in answers]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(file)


def state(model: Path, threshold: object) -> None:
    """Write a threshold into a model's ``config.json``."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, THRESHOLD_KEY: threshold}))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write_model("bert", tmp_path / "model", head="question-answering", layers=1)


@pytest.mark.filterwarnings("ignore:.*questions have no answer")
@pytest.mark.parametrize(
    ("stated", "train", "dev", "expected"),
    [
        (None, 0, 0, None),
        (None, 3, 0, 0.0),
        (None, 1, 0, 0.0),
        (None, 0, 1, 0.0),
        (1.5, 0, 0, 1.5),
        (-2, 3, 3, -2.0),
    ],
)
def test_what_the_data_and_the_model_say_decides(
    model: Path, tmp_path: Path, stated: float | None, train: int, dev: int, expected: float | None
) -> None:
    if stated is not None:
        state(model, stated)
    source = resolve(model)
    request = TaskDataRequest(
        TASK, rows(tmp_path / "train.jsonl", train), rows(tmp_path / "dev.jsonl", dev), train_limit=2
    )
    data = read_task_data(source, request, load_tokenizer(source), Settings())
    assert data.no_answer_threshold == expected
    window = Window.unpack(label_array(data.dev)[0])
    assert window.nullable == (expected is not None), "dev is scored as the model will answer"
    assert window.threshold == (expected or 0.0)


@pytest.mark.parametrize("value", ["none", True, [0], float("nan")])
def test_a_threshold_that_is_no_number_is_refused(model: Path, tmp_path: Path, value: object) -> None:
    state(model, value)
    with pytest.raises(ArtifactError, match=r"config\.json: nxm_no_answer_threshold must be a number"):
        export(model, tmp_path / "graph")


@pytest.mark.filterwarnings("ignore:.*questions have no answer")
def test_the_threshold_goes_from_the_data_into_every_file_and_is_compared(model: Path, tmp_path: Path) -> None:
    train, dev = rows(tmp_path / "train.jsonl", 3), rows(tmp_path / "dev.jsonl", 2)
    finetune(model, task=TASK.name, train=train, dev=dev, out=tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())[THRESHOLD_KEY] == 0.0
    answered = rows(tmp_path / "answered.jsonl", 0)
    source = resolve(tmp_path / "dense")
    plan = source.family.uniform_plan(source.config, WeightSpec.parse("2:4+W8"))
    compress(
        tmp_path / "dense", task=TASK.name, train=answered, dev=answered, plan=plan,
        out=tmp_path / "compressed", settings=Settings(steps=1, recipe="obs"),
    )  # fmt: skip
    assert json.loads((tmp_path / "compressed" / "config.json").read_text())[THRESHOLD_KEY] == 0.0
    build_engine(export(tmp_path / "compressed", tmp_path / "graph").path, tmp_path / "engine", "ort")
    spec, passport = load_spec(tmp_path / "engine"), load_passport(tmp_path / "engine")
    assert spec.no_answer_threshold == 0.0
    require_from(tmp_path / "compressed", tmp_path / "engine", passport, spec)
    state(tmp_path / "compressed", 4.0)
    with pytest.raises(ArtifactError, match=r"has the threshold 0\.0 for no answer, and .* has 4\.0"):
        require_from(tmp_path / "compressed", tmp_path / "engine", passport, spec)

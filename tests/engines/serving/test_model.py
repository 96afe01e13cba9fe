"""What is checked before an engine serves: hash, gate, profiles, warm-up."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.base import LoadOptions
from engines.ort import backend as ort
from engines.passport import load_passport
from engines.serving.batching import QueuedRequest
from engines.serving.model import open_model
from engines.serving.protocol import InferRequest, TensorSpec
from engines.serving.repository import EngineSource, Repository
from engines.serving.settings import ModelOptions
from engines.serving.shapes import usual_lengths
from nxm_export.errors import ArtifactError, NxmError, ParityError, RequestRefused, ServeError
from tests.support import exact_engine

ONE = ModelOptions(instances=1)


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "copy"))


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_good_directory_opens_and_describes_itself(engine: Path) -> None:
    model = open_model("m", "1", engine, ModelOptions(instances=2, text=True))
    tokens, text = model.endpoints
    names = ("input_ids", "attention_mask", "token_type_ids")
    assert tokens.inputs == tuple(TensorSpec(name, "INT64", (-1, -1)) for name in names)
    assert tokens.outputs == (TensorSpec("logits", "FP32", (-1, 2)),)
    assert text.name == "m_text"
    assert [spec.name for spec in text.outputs] == ["logits", "label"]
    model.close()


@pytest.mark.parametrize(
    ("state", "gate", "served"),
    [
        (True, "not-failed", True), (True, "passed", True), (True, "off", True),
        (None, "not-failed", True), (None, "passed", False), (None, "off", True),
        (False, "not-failed", False), (False, "passed", False), (False, "off", True),
    ],
)  # fmt: skip
def test_the_parity_gate(copy: Path, state: bool | None, gate: str, served: bool) -> None:
    if state is None:
        (copy / "parity.json").unlink()
    else:
        exact_engine.write_parity(copy, passed=state)
    options = ModelOptions(instances=1, gate=gate)
    if served:
        open_model("m", "1", copy, options).close()
    else:
        with pytest.raises(ParityError, match="--parity off") as refused:
            open_model("m", "1", copy, options)
        assert refused.value.exit_code == 3


def test_a_parity_report_of_another_engine_vouches_for_nothing(copy: Path) -> None:
    edit(copy / "parity.json", engine_sha256="0" * 64)
    with pytest.raises(ParityError, match="never checked for these files"):
        open_model("m", "1", copy, ModelOptions(instances=1, gate="passed"))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "", "null", "[" * 100_000, '{"schema": "nxm-parity/9"}', '{"schema": "nxm-parity/2", "passed": true}'],
    ids=["cut off", "a list", "empty", "null", "deep", "of the future", "without results"],
)
def test_a_parity_report_that_cannot_be_read_lets_no_engine_answer(copy: Path, text: str) -> None:
    (copy / "parity.json").write_text(text)
    with pytest.raises(ParityError, match=r"parity\.json: .*--parity off"):
        open_model("m", "1", copy, ONE)
    open_model("m", "1", copy, ModelOptions(instances=1, gate="off")).close()


def test_a_parity_report_that_contradicts_itself_lets_no_engine_answer(copy: Path) -> None:
    exact_engine.write_parity(copy, passed=False)
    edit(copy / "parity.json", passed=True)
    with pytest.raises(ParityError, match=r"`passed` is not what its outputs, probes and gates say.*--parity off"):
        open_model("m", "1", copy, ONE)


def test_a_changed_engine_file_is_noticed_by_its_hash(copy: Path) -> None:
    data = bytearray((copy / "model.onnx").read_bytes())
    data[-1] ^= 1
    (copy / "model.onnx").write_bytes(data)
    with pytest.raises(ArtifactError, match="is not the engine of its passport"):
        open_model("m", "1", copy, ONE)


def test_a_link_to_another_engine_is_noticed_and_one_out_of_the_directory_refused(copy: Path, tmp_path: Path) -> None:
    other = exact_engine.build(tmp_path / "other", seed=1)
    shutil.copy(other / "model.onnx", copy / "other.onnx")
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").symlink_to("other.onnx")
    with pytest.raises(ArtifactError, match="is not the engine of its passport"):
        open_model("m", "1", copy, ONE)
    (copy / "model.onnx").unlink()
    (copy / "model.onnx").symlink_to(other.with_name("other-graph") / "model.onnx")
    with pytest.raises(ArtifactError, match="leads out of its directory"):
        open_model("m", "1", copy, ONE)


@pytest.mark.parametrize("name", ["../exact/model.onnx", "/etc/passwd", "a/b", ""])
def test_a_passport_cannot_name_a_file_elsewhere(copy: Path, name: str) -> None:
    edit(copy / "passport.json", engine=name)
    with pytest.raises(ArtifactError):
        open_model("m", "1", copy, ONE)


def test_only_expected_hashes_are_served(engine: Path) -> None:
    digest = load_passport(engine).engine_sha256
    open_model("m", "1", engine, ModelOptions(instances=1, expect_sha256=frozenset({digest}))).close()
    with pytest.raises(ServeError, match="neither is among those expected"):
        open_model("m", "1", engine, ModelOptions(instances=1, expect_sha256=frozenset({"0" * 64})))


def test_a_passport_for_another_machine_is_refused_before_loading(copy: Path) -> None:
    edit(copy / "passport.json", backend="trt_rtx", requires={"tensorrt-rtx-cu13": "0.0"})
    with pytest.raises(NxmError, match=r"tensorrt-rtx-cu13 0\.0|tensorrt_rtx"):
        open_model("m", "1", copy, ONE)


@pytest.mark.parametrize(
    "profiles", [[{"minimum": [1, 1]}], [3], [{"minimum": [2, 1], "optimum": [1, 1], "maximum": [1, 1]}]]
)
def test_malformed_profiles_are_refused(copy: Path, profiles: list[object]) -> None:
    edit(copy / "passport.json", profiles=profiles)
    with pytest.raises(NxmError, match="profile"):
        open_model("m", "1", copy, ONE)


def test_profiles_of_the_passport_are_what_is_served(copy: Path) -> None:
    edit(copy / "passport.json", profiles=[{"minimum": [1, 8], "optimum": [2, 16], "maximum": [4, 24]}])
    model = open_model("m", "1", copy, ONE)
    assert (model.buckets.buckets[0].length, model.buckets.longest.length, model.buckets.longest.most) == (8, 24, 4)
    model.close()


def test_rows_of_a_batch_are_limited_by_tokens_and_warm_up_keeps_to_them(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(copy / "spec.json", max_length=8192)
    exact_engine.cover(copy)
    shapes: list[tuple[int, ...]] = []
    run = ort.OrtEngine.run

    def recorded(engine: ort.OrtEngine, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        shapes.append(feeds["input_ids"].shape)
        return run(engine, feeds)

    monkeypatch.setattr(ort.OrtEngine, "run", recorded)
    model = open_model("m", "1", copy, replace(ONE, max_batch_tokens=3 * 8192))
    assert model.buckets.longest.most == 3
    assert set(shapes) == {(1, length) for length in usual_lengths(512)} | {(1, 8192), (3, 8192)}
    model.close()


@pytest.mark.parametrize(("merge", "expected"), [(None, [[0], [1]]), (2, [[0, 1]])])
def test_on_a_cpu_documents_of_different_requests_run_alone_unless_asked_for(
    copy: Path, merge: int | None, expected: list[list[int]]
) -> None:
    edit(copy / "spec.json", max_length=8192)
    exact_engine.cover(copy)
    model = open_model("m", "1", copy, replace(ONE, merge=merge))
    requests = [QueuedRequest(exact_engine.feeds_of([4000], number), float("inf")) for number in range(2)]
    for request in requests:
        model.queue.submit(request)
    taken = [model.queue.take() for _ in expected]
    assert [[requests.index(request) for request in batch[1]] for batch in taken if batch] == expected
    model.close()


def test_a_spec_that_does_not_fit_the_engine_is_refused_at_warm_up(copy: Path) -> None:
    edit(copy / "spec.json", outputs={"logits": ["batch", "sequence", "classes"]})
    exact_engine.cover(copy)
    with pytest.raises(NxmError, match="logits"):
        open_model("m", "1", copy, ONE)


def test_values_without_a_row_or_meaning_are_refused(engine: Path) -> None:
    model = open_model("m", "1", engine, ONE)
    good = exact_engine.feeds_of([4])
    for name, value in (
        ("input_ids", len(exact_engine.VOCABULARY)),
        ("input_ids", -1),
        ("attention_mask", 2),
        ("token_type_ids", 2),
    ):
        feeds = {key: array.copy() for key, array in good.items()}
        feeds[name][0, 1] = value
        with pytest.raises(RequestRefused, match=f"values of {name} must be from 0 to"):
            model.endpoints[0].feeds(InferRequest(None, feeds, [], None))
    with pytest.raises(RequestRefused, match="one shape"):
        model.endpoints[0].feeds(InferRequest(None, {**good, "input_ids": np.zeros((1, 5), np.int64)}, [], None))
    model.close()


@pytest.mark.parametrize(
    ("text", "name", "version", "directory"),
    [
        ("runs/a/engine", "engine", "1", "runs/a/engine"),
        ("m=runs/a", "m", "1", "runs/a"),
        ("m:12=runs/a", "m", "12", "runs/a"),
        ("m:2=a=b", "m", "2", "a=b"),
    ],
)
def test_a_source_is_named_or_takes_the_directorys_name(text: str, name: str, version: str, directory: str) -> None:
    assert EngineSource.parse(text) == EngineSource(name, version, Path(directory))


@pytest.mark.parametrize(
    "text",
    [
        "../x=a", "a/b=c", "-m=a", "m:0=a", "m:x=a", "m:=a", "a b=c", "m:99999999999999999999=a", "é=a",
        "m:01=a", "m:007=a", "m:1_0=a", "m:+1=a", "m: 1=a", "m:\u0661=a", "m:1.0=a", "m=", "m:7=", "=", "",
    ],
)  # fmt: skip
def test_a_name_that_could_be_mistaken_is_refused(text: str) -> None:
    with pytest.raises(ServeError):
        EngineSource.parse(text)


def test_names_that_collide_are_refused(engine: Path) -> None:
    with pytest.raises(ServeError, match="same name and version"):
        Repository([EngineSource("m", "1", engine), EngineSource("m", "1", engine)], ONE)
    for version in ("1", "2"):  # of another version, too: without one, the highest answers
        sources = [EngineSource("m_text", version, engine), EngineSource("m", "1", engine)]
        with pytest.raises(ServeError, match="m and m_text both need the name m_text"):
            Repository(sources, ModelOptions(instances=1, text=True)).open()
    without_text = Repository(sources, ONE)
    without_text.open()
    without_text.close()
    with pytest.raises(ServeError, match="nothing to serve"):
        Repository([], ONE)


def test_versions_are_found_by_number_and_the_highest_is_the_default(engine: Path) -> None:
    repository = Repository([EngineSource("m", version, engine) for version in ("9", "10", "2")], ONE)
    repository.open()
    assert repository.find("m", None).model.version == "10"
    assert repository.find("m", "2").model.version == "2"
    assert [entry["version"] for entry in repository.index()] == ["2", "9", "10"]
    for name, version in (("n", None), ("m", "3"), ("m", "../2"), ("../m", None)):
        with pytest.raises(RequestRefused) as refused:
            repository.find(name, version)
        assert refused.value.status == 404
    repository.close()


def test_a_directory_without_tokenizer_cannot_serve_text(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    exact_engine.cover(copy)
    with pytest.raises(ArtifactError, match=r"tokenizer\.json"):
        open_model("m", "1", copy, ModelOptions(instances=1, text=True))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_engine_that_gives_no_numbers_is_refused_at_the_start(
    engine: Path, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """It was ready, and each of its answers an error."""
    monkeypatch.setattr(
        ort.OrtEngine, "run", lambda self, feeds: {"logits": np.full((len(feeds["input_ids"]), 2), bad, np.float32)}
    )
    with pytest.raises(ServeError, match="the engine gives NaN or infinity in logits at batch 1 and length"):
        open_model("m", "1", engine, ONE)


def test_a_model_whose_thread_ended_is_not_ready(engine: Path) -> None:
    repository = Repository([EngineSource("m", "1", engine)], ONE)
    repository.open()
    (model,) = repository.models
    model.start(lambda batch: None, Unobserved())
    assert repository.ready
    model.queue.close()  # what ends its thread; an engine that takes the thread with it does, too
    for thread in model._threads:
        thread.join()
    assert not repository.ready
    (entry,) = repository.index()
    assert (entry["state"], entry["reason"]) == (
        "UNAVAILABLE",
        "a thread that runs its engine has ended; start the server again",
    )
    repository.close()


def test_a_model_whose_engine_lost_its_device_is_not_ready_until_it_answers_again(
    engine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With one engine of two: the other answers, and this one takes requests from it as fast as it fails."""
    monkeypatch.setattr("engines.serving.health.AGAIN_S", 0.01)
    caplog.set_level("INFO", "nxm.serve")
    repository = Repository([EngineSource("m", "1", engine)], ModelOptions(instances=2))
    repository.open()
    (model,) = repository.models
    lost, run = model._engines[0], ort.OrtEngine.run

    def failing(self: ort.OrtEngine, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self is lost:
            raise RuntimeError("CUDA driver: cuStreamSynchronize failed with 700: an illegal memory access")
        return run(self, feeds)

    answered: list[QueuedRequest] = []
    model.start(answered.extend, Unobserved())

    def ask_until(ready: bool) -> None:
        until = time.monotonic() + 30
        while repository.ready is not ready:
            assert time.monotonic() < until
            time.sleep(0.01)
            if not ready:  # nobody asks one that is not ready
                feeds = {name: np.ones((1, 4), np.int64) for name in lost.inputs}
                model.queue.submit(QueuedRequest(feeds, time.monotonic() + 30))

    with monkeypatch.context() as patch:
        patch.setattr(ort.OrtEngine, "run", failing)
        ask_until(ready=False)
        (entry,) = repository.index()
        assert entry["state"] == "UNAVAILABLE"
        assert entry["reason"].startswith("its engine fails, also at what it answered when it was loaded; ")
        assert not model.has_ended
    ask_until(ready=True)
    assert repository.index()[0] == {"name": "m", "version": "1", "state": "READY", "reason": ""}
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "its engine fails, also at what it answered when it was loaded",
        "goes on",
    ]
    assert all(record.__dict__["facts"]["model"] == "m" for record in caplog.records)
    repository.close()


class Unobserved:
    """Is told of batches, and keeps nothing."""

    def batch(self, rows: int, padding: float, seconds: float, waits: Sequence[float]) -> None:
        pass


def test_a_directory_that_is_replaced_between_two_instances_is_refused(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = exact_engine.build(tmp_path / "newer", seed=1, parity=True)
    load = ort.load

    def load_and_replace(directory: Path, options: LoadOptions) -> ort.OrtEngine:
        loaded = load(directory, options)
        if newer.exists():
            copy.rename(tmp_path / "old")
            newer.rename(copy)
        return loaded

    monkeypatch.setattr(ort, "load", load_and_replace)
    expected = frozenset({load_passport(copy).engine_sha256})
    with pytest.raises(ServeError, match="replaced while it was loaded"):
        open_model("m", "1", copy, ModelOptions(instances=2, expect_sha256=expected))

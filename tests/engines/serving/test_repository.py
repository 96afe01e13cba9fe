"""Directories that change under a server: what is loaded again, what is judged again, what is left alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from engines.passport import load_passport
from engines.serving.repository import Change, EngineSource, Repository
from engines.serving.settings import ModelOptions
from nxm_export.errors import ArtifactError, ParityError, RequestRefused
from nxm_export.storage.json_files import as_objects, entry_at
from nxm_export.storage.unreadable import is_without_room
from tests.engines.serving.test_server import INFER, body_of, eventually, log_lines, metric
from tests.support import exact_engine
from tests.support.exact_engine import feeds_of
from tools.benchmarks.servers import nxm_serve
from tools.raw_http import send

KEY = ("m", "1")


@pytest.fixture
def copy(engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(engine, tmp_path / "served"))


@pytest.fixture(params=["passed"])
def repository(copy: Path, request: pytest.FixtureRequest) -> Iterator[Repository]:
    opened = Repository([EngineSource(*KEY, copy)], ModelOptions(instances=1, gate=request.param))
    opened.open()
    yield opened
    opened.close()


def settled(repository: Repository) -> list[Change]:
    """What two looks say; the first only takes note."""
    assert repository.changed() == []
    return repository.changed()


def swap_labels(directory: Path) -> None:
    file = directory / "spec.json"
    spec = json.loads(file.read_text())
    file.write_text(json.dumps({**spec, "labels": spec["labels"][::-1]}))


def test_nothing_is_found_before_everything_is_loaded(copy: Path) -> None:
    repository = Repository([EngineSource(*KEY, copy)], ModelOptions(instances=1))
    with pytest.raises(RequestRefused, match="are being loaded") as refused:
        repository.find("m", None)
    assert (refused.value.status, refused.value.reason) == (503, "loading")
    assert not repository.ready
    assert [entry["state"] for entry in repository.index()] == ["LOADING"]
    repository.stop_opening()
    repository.open()
    assert not repository.opened


@pytest.mark.parametrize("name", ["spec.json", "tokenizer.json", "model.onnx", "passport.json"])
def test_every_file_that_is_served_is_watched_and_checked_again(repository: Repository, copy: Path, name: str) -> None:
    assert settled(repository) == []
    (copy / name).write_bytes((copy / name).read_bytes().replace(b"{", b"{ ", 1) + b" ")
    changes = settled(repository)
    assert changes == [Change(KEY, reload=True)]
    load = repository.begin_reload(KEY)
    if name == "passport.json":  # other spaces alone
        repository.replace(KEY, load())
    else:
        with pytest.raises(ArtifactError, match=r"of its passport|built with"):
            load()
    assert settled(repository) == []
    assert repository.ready


def test_a_passport_that_cannot_be_read_is_a_reload_that_is_refused_with_its_reason(
    repository: Repository, copy: Path
) -> None:
    (copy / "passport.json").write_text("{")
    assert settled(repository) == [Change(KEY, reload=True)]
    with pytest.raises(ArtifactError, match="not valid JSON"):
        repository.begin_reload(KEY)()


@pytest.mark.parametrize("name", ["passport.json", "model.onnx"])
def test_a_directory_that_is_not_whole_is_left_alone(repository: Repository, copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert settled(repository) == []


def test_a_refused_reload_is_tried_again_when_its_parity_report_arrives(
    repository: Repository, copy: Path, tmp_path: Path
) -> None:
    newer = exact_engine.build(tmp_path / "newer", seed=1)
    copy.rename(tmp_path / "old")
    newer.rename(copy)
    assert settled(repository) == [Change(KEY, reload=True)]
    with pytest.raises(ParityError, match="never checked"):
        repository.begin_reload(KEY)()
    assert settled(repository) == []
    exact_engine.write_parity(copy, passed=True)
    assert settled(repository) == [Change(KEY, reload=True)]
    repository.replace(KEY, repository.begin_reload(KEY)())
    assert settled(repository) == []
    exact_engine.write_parity(copy, passed=False)
    assert settled(repository) == [Change(KEY, reload=False)]


def full(*_: object, **__: object) -> None:
    """What opening a file does when there are no descriptors left."""
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def test_a_directory_that_cannot_be_looked_at_is_no_change_and_is_looked_at_later(
    repository: Repository, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_text", full)
        (change,) = repository.changed()
        assert (change.reload, "ulimit -n" in str(change.trouble)) == (False, True)
        assert repository.changed() == []  # one line of the log, not one a look
    assert settled(repository) == []
    now[0] += 10
    assert settled(repository) == []  # nothing had changed


def test_a_reload_that_had_no_room_is_tried_again(
    repository: Repository, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = exact_engine.build(tmp_path / "newer", seed=1, parity=True)
    copy.rename(tmp_path / "old")
    newer.rename(copy)
    assert settled(repository) == [Change(KEY, reload=True)]
    load = repository.begin_reload(KEY)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", full)
        patch.setattr("pathlib.Path.read_text", full)
        with pytest.raises(ArtifactError, match="too many files are open") as refused:
            load()
    assert is_without_room(refused.value)
    now = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    repository.put_off(KEY)
    assert settled(repository) == []
    now[0] += 10
    assert settled(repository) == [Change(KEY, reload=True)]
    repository.replace(KEY, repository.begin_reload(KEY)())
    assert settled(repository) == []


def test_a_report_that_cannot_be_opened_has_not_failed(
    repository: Repository, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It withdrew the model, for good: nothing changed afterwards."""
    exact_engine.write_parity(copy, passed=True)
    assert settled(repository) == [Change(KEY, reload=False)]
    judge = repository.begin_judging(KEY)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_text", full)
        with pytest.raises(ArtifactError, match="too many files are open"):
            judge()
    assert judge() is None


@pytest.mark.parametrize(
    ("repository", "failed", "gone"),
    [("passed", True, True), ("not-failed", True, False), ("off", False, False)],
    indirect=["repository"],
)
def test_a_parity_that_changes_is_judged_by_the_gate(
    repository: Repository, copy: Path, failed: bool, gone: bool
) -> None:
    exact_engine.write_parity(copy, passed=False)
    assert settled(repository) == [Change(KEY, reload=False)]
    assert (repository.begin_judging(KEY)() is not None) == failed
    (copy / "parity.json").unlink()
    assert settled(repository) == [Change(KEY, reload=False)]
    assert (repository.begin_judging(KEY)() is not None) == gone
    exact_engine.write_parity(copy, passed=True)
    assert settled(repository) == [Change(KEY, reload=False)]
    assert repository.begin_judging(KEY)() is None


def test_a_report_of_an_engine_that_was_refused_is_not_held_against_the_one_that_serves(
    repository: Repository, copy: Path
) -> None:
    swap_labels(copy)
    exact_engine.cover(copy)
    exact_engine.write_parity(copy, passed=False)
    assert settled(repository) == [Change(KEY, reload=True)]
    with pytest.raises(ParityError, match="failed"):
        repository.begin_reload(KEY)()
    assert repository.current(KEY).withdrawn is None
    assert repository.ready


@pytest.mark.parametrize("rebuilt", [False, True])
def test_the_engine_that_serves_put_there_again_with_a_failed_report_is_refused_and_withdrawn(
    copy: Path, tmp_path: Path, rebuilt: bool
) -> None:
    """All its files are new at once, as when a volume is mounted anew: a reload, of the very engine that serves."""
    body = body_of(feeds_of([5]))
    with nxm_serve(tmp_path / "log", f"exact={copy}", "--watch-seconds", "0.1") as server:
        assert send(server.port, "POST", INFER, body).status == 200
        again = Path(shutil.copytree(copy, tmp_path / "again"))
        if rebuilt:
            replace(load_passport(again), created="2030-01-01T00:00:00Z").save(again)
        exact_engine.write_parity(again, passed=False)
        copy.rename(tmp_path / "old")
        again.rename(copy)
        assert eventually(lambda: send(server.port, "GET", "/v2/health/ready").status == 503)
        assert send(server.port, "POST", INFER, body).status == 503
        exact_engine.write_parity(copy, passed=True)
        assert eventually(lambda: send(server.port, "POST", INFER, body).status == 200)


def test_a_server_withdraws_a_model_whose_parity_turns_failed_and_takes_it_back(copy: Path, tmp_path: Path) -> None:
    body = body_of(feeds_of([5]))
    with nxm_serve(tmp_path / "log", f"exact={copy}", "--watch-seconds", "0.1", "--text") as server:
        assert send(server.port, "POST", INFER, body).status == 200
        exact_engine.write_parity(copy, passed=False)
        assert eventually(lambda: send(server.port, "GET", "/v2/health/ready").status == 503)
        assert send(server.port, "GET", "/v2/health/live").status == 200
        assert send(server.port, "GET", "/v2/models/exact/ready").status == 503
        refused = send(server.port, "POST", INFER, body)
        assert (refused.status, "was withdrawn" in str(entry_at(refused.json(), "error"))) == (503, True)
        states = as_objects(send(server.port, "POST", "/v2/repository/index").json())
        assert {entry["state"] for entry in states} == {"UNAVAILABLE"}
        assert states[0]["reason"] == "withdrawn: its parity with its checkpoint is not what --parity asks for"
        assert "parity with its checkpoint failed" in server.log.read_text()
        assert send(server.port, "POST", "/v2/repository/index", b'{"ready": true}').json() == []
        assert send(server.port, "POST", "/v2/repository/index", b'{"ready": null}').json() == states
        assert metric(server, 'nxm_rejected_total{model="exact",reason="withdrawn"') == 1
        assert metric(server, "nxm_ready") == 0
        exact_engine.write_parity(copy, passed=True)
        assert eventually(lambda: send(server.port, "GET", "/v2/health/ready").status == 200)
        assert send(server.port, "POST", INFER, body).status == 200
        swap_labels(copy)
        assert eventually(lambda: metric(server, 'nxm_reloads_total{model="exact",result="refused"') == 1)
        assert send(server.port, "POST", INFER, body).status == 200
        assert metric(server, "nxm_reloads_total") == 1
    events = [line["event"] for line in log_lines(server)]
    assert [event for event in events if "withdrawn" in str(event) or "goes on" in str(event)] == [
        "withdrawn; it answers no more",
        "goes on; its parity is good enough again",
        "reload refused; the old engine goes on",
    ]

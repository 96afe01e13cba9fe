"""Directories that change under a server: what is loaded again, what is judged again, what is left alone."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from engines.passport import load_passport
from engines.serving.live_models import LiveModels
from engines.serving.metrics import Metrics
from engines.serving.model import Model
from engines.serving.repository import Change, EngineSource, Repository, require_distinct_names
from engines.serving.settings import ModelOptions
from nxm_export.errors import ArtifactError, ParityError, RequestRefused, ServeError
from nxm_export.storage.json_files import as_objects, entry_at
from nxm_export.storage.unreadable import is_without_room
from tests.support import exact_engine
from tests.support.exact_engine import feeds_of
from tests.support.serving_calls import INFER, body_of, eventually, log_lines, metric
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
    assert repository.index() == [{"name": "m", "version": "1", "state": "LOADING", "reason": ""}]
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
def test_a_directory_that_is_not_whole_is_left_alone_and_named_once(
    repository: Repository, copy: Path, tmp_path: Path, name: str
) -> None:
    for _ in range(2):
        (copy / name).rename(tmp_path / "away")
        (change,) = settled(repository)
        assert (change.reload, f"{copy} is gone or not whole" in str(change.trouble)) == (False, True)
        assert settled(repository) == []
        (tmp_path / "away").rename(copy / name)
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
    for passed in (False, True):
        exact_engine.write_bisect(copy, passed=passed)
        assert settled(repository) == [Change(KEY, reload=False)]
        assert (repository.begin_judging(KEY)() is not None) == (failed and not passed)


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


def test_the_engine_that_serves_built_again_and_not_yet_compared_stays_as_it_is(
    repository: Repository, copy: Path
) -> None:
    """Its report is still to come, and speaks of it then."""
    replace(load_passport(copy), created="2030-01-01T00:00:00Z").save(copy)
    (copy / "parity.json").unlink()
    judge, model = repository.judging(KEY), repository.current(KEY)
    assert judge() is None
    model.withdrawn = "its parity failed"
    assert judge() == "its parity failed"
    exact_engine.write_parity(copy, passed=True)
    assert judge() is None


def test_a_directory_that_cannot_be_read_is_no_objection(repository: Repository, copy: Path) -> None:
    model = repository.current(KEY)
    for file in ("passport.json", "parity.json"):
        text = (copy / file).read_text()
        (copy / file).write_text("{")
        model.withdrawn = None
        judge = repository.judging(KEY)
        assert (judge() is None) == (file == "passport.json"), "a report that is none is no proof"
        model.withdrawn = "its parity failed"
        assert judge() is not None
        (copy / file).write_text(text)


def test_the_one_that_takes_a_place_is_found_there_and_the_one_before_is_closed_later(
    repository: Repository, copy: Path, tmp_path: Path
) -> None:
    before = repository.current(KEY)
    newer = exact_engine.build(tmp_path / "newer", seed=1, parity=True)
    copy.rename(tmp_path / "old")
    newer.rename(copy)
    assert settled(repository) == [Change(KEY, reload=True)]
    model = repository.begin_reload(KEY)()
    assert repository.find("m", None).model is before
    repository.replace(KEY, model)
    assert repository.find("m", None).model is repository.find("m", "1").model is repository.current(KEY) is model
    assert repository.models == [model]
    assert repository.retired == [before]


@pytest.fixture
def two(copy: Path, tmp_path: Path) -> Iterator[Repository]:
    """Two models, of one directory each: ``first`` and ``m``."""
    first = Path(shutil.copytree(copy, tmp_path / "first"))
    opened = Repository([EngineSource("first", "1", first), EngineSource(*KEY, copy)], ModelOptions(instances=1))
    opened.open()
    yield opened
    opened.close()


def test_one_that_answers_no_more_makes_all_unready_and_is_named(two: Repository) -> None:
    assert two.ready
    assert [(entry["state"], entry["reason"]) for entry in two.index()] == [("READY", "")] * 2
    for name in ("first", "m"):
        model = two.current((name, "1"))
        model.withdrawn = "/srv/secret/path: parity failed"
        assert not two.ready
        unready = [entry for entry in two.index() if entry["state"] != "READY"]
        assert [entry["name"] for entry in unready] == [name]
        assert unready[0]["reason"].startswith("withdrawn: its parity")
        assert "secret" not in unready[0]["reason"]
        model.withdrawn = None
    assert two.ready


def test_one_that_is_put_off_keeps_no_other_from_being_looked_at(
    two: Repository, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, look = tmp_path / "first", Path.read_text

    def full_there(file: Path, *arguments: object, **options: object) -> str:
        if first in file.parents:
            full()
        return look(file, *arguments, **options)  # type: ignore[arg-type]  # as it was called

    exact_engine.write_parity(copy, passed=False)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", full_there)
        (change,) = two.changed()
        assert change.key == ("first", "1")
        assert two.changed() == [Change(KEY, reload=False)]


def test_a_directory_that_was_not_whole_when_it_was_opened_is_loaded_once_it_is(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it is replaced at this moment: nobody knows which of the two was read."""
    opened = Repository([EngineSource(*KEY, copy)], ModelOptions(instances=1))
    with monkeypatch.context() as patch:
        patch.setattr("engines.serving.repository.signature", lambda _: None)
        opened.open()
    try:
        assert settled(opened) == [Change(KEY, reload=True)]
    finally:
        opened.close()


@pytest.mark.parametrize("suffixes", [(), ("_text",), ("_text", "_tokens")])
def test_names_are_distinct_with_every_suffix_and_in_folders_without_case(suffixes: tuple[str, ...]) -> None:
    def refused(*names: str, folded: bool = False) -> bool:
        try:
            require_distinct_names([EngineSource(name, "1", Path("d")) for name in names], suffixes, folded=folded)
        except ServeError as error:
            return "both need the name" in str(error)
        return False

    assert not refused("m", "m")  # two versions of one
    assert not refused("a", "A")
    assert refused("a", "A", folded=True)
    for suffix in ("_text", "_tokens"):
        assert refused("m", f"m{suffix}") is refused(f"m{suffix}", "m") is (suffix in suffixes)
        assert not refused("m", f"M{suffix}")
        assert refused("m", f"M{suffix}", folded=True) is (suffix in suffixes)


def test_names_that_collide_are_refused_before_anything_is_loaded(copy: Path) -> None:
    sources = [EngineSource("m", "1", copy), EngineSource("m_text", "1", copy)]
    for text in (True, False):
        repository = Repository(sources, ModelOptions(instances=1, text=text))
        if not text:
            repository.require_admitted()
            continue
        for ask in (repository.require_admitted, repository.open):
            with pytest.raises(ServeError, match="m and m_text both need the name m_text"):
                ask()
        assert repository.models == []


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


def test_the_watch_goes_on_after_an_error_that_nobody_expected() -> None:
    class Broken:
        models: tuple[Model, ...] = ()
        retired: tuple[Model, ...] = ()
        looks = 0

        def open(self) -> None:
            """Nothing to load."""

        def changed(self) -> list[Change]:
            self.looks += 1
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "engine/passport.json")

    async def watch(repository: Broken) -> None:
        running = asyncio.create_task(LiveModels(cast("Repository", repository), Metrics(), watch=0.01).run())
        while repository.looks < 3:
            await asyncio.sleep(0.01)
        running.cancel()

    asyncio.run(asyncio.wait_for(watch(Broken()), 10))


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
        shutil.rmtree(copy)
        assert eventually(lambda: "is gone or not whole" in server.log.read_text())
        assert send(server.port, "POST", INFER, body).status == 200
    events = [line["event"] for line in log_lines(server)]
    assert [event for event in events if "withdrawn" in str(event) or "goes on" in str(event)] == [
        "withdrawn; it answers no more",
        "goes on; its parity is good enough again",
        "reload refused; the old engine goes on",
        "directory gone; the old engine goes on",
    ]

"""Commands that measure one task at once do not write what another reads, and one alone trains what all start from."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from compressors.settings import Settings
from nxm_export.errors import ArtifactError
from nxm_export.progress import silent
from tools.results import tasks
from tools.results.run import Measure, Protocol, Teacher
from tools.results.store import TaskStore, in_turn

COLA = tasks.task_named("cola")


def glue(directory: Path, text: str) -> Path:
    directory.mkdir()
    for split in tasks.SPLITS:
        (directory / f"{split}.tsv").write_text(f"sentence\tlabel\n{text} one\t0\n{text} two\t1\n")
    return directory


def kept(folder: Path, data: Path) -> tasks.TaskFiles:
    return tasks.kept(folder, lambda out: tasks.prepare(COLA, data, out))


def test_what_a_command_reads_stays_while_others_write(tmp_path: Path) -> None:
    folder, first, other = tmp_path / "data", glue(tmp_path / "a", "good"), glue(tmp_path / "b", "bad")
    meanwhile: list[tasks.TaskFiles] = []

    def write(out: Path) -> tasks.TaskFiles:
        made = tasks.prepare(COLA, first, out)
        meanwhile.extend([kept(folder, first), kept(folder, other)])
        return made

    one = tasks.kept(folder, write)
    same, another = meanwhile
    assert one == same
    assert one.train.parent != another.train.parent
    assert "good one" in one.train.read_text()
    assert "bad one" in another.train.read_text()
    written = one.train.stat().st_ino
    assert kept(folder, first) == one
    assert one.train.stat().st_ino == written, "it is not written again"
    assert sorted(path.name for path in folder.iterdir()) == sorted([one.digest[:16], another.digest[:16]])


@pytest.mark.parametrize("change", [lambda file: file.write_text("else"), Path.unlink], ids=["edited", "removed"])
def test_data_that_someone_changed_is_refused(tmp_path: Path, change: object) -> None:
    folder, data = tmp_path / "data", glue(tmp_path / "a", "good")
    assert callable(change)
    change(kept(folder, data).dev)
    with pytest.raises(ArtifactError, match="remove it"):
        kept(folder, data)


def test_of_two_at_once_the_second_waits_and_says_so(tmp_path: Path) -> None:
    seen: list[str] = []
    waits, inside = threading.Event(), threading.Event()

    def second() -> None:
        inside.wait(10)
        with in_turn(tmp_path, waits.set):
            seen.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with in_turn(tmp_path, lambda: seen.append("the first waits for nobody")):
        inside.set()
        assert waits.wait(10)
        seen.append("first")
    thread.join(10)
    assert seen == ["first", "second"]


def test_one_of_two_commands_trains_the_dense_model_that_both_start_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[Path] = []
    waits, inside = threading.Event(), threading.Event()

    def finetune(model: Path, *, out: Path, **_: object) -> None:
        trained.append(out)
        inside.set()
        assert waits.wait(10), "the other command does not wait"
        out.mkdir()
        for name in ("metrics.json", "model.safetensors"):
            (out / name).write_text(name)

    monkeypatch.setattr("tools.results.run.finetune", finetune)
    monkeypatch.setattr("tools.results.run.say", lambda text: waits.set() if text.startswith("waiting for") else None)
    files = kept(tmp_path / "data", glue(tmp_path / "glue", "good"))
    protocol = Protocol(tmp_path / "model", "tiny", Settings(), [(1e-4, 3.0)])
    started: list[Teacher] = []

    def command() -> None:
        store = TaskStore(tmp_path / "results", COLA)
        started.append(Measure(store, files, protocol, tmp_path / "work", lambda: nullcontext(silent))._teacher(0))

    first, second = (threading.Thread(target=command) for _ in range(2))
    first.start()
    assert inside.wait(10)
    second.start()
    for thread in (first, second):
        thread.join(20)
    assert len(trained) == 1
    assert [teacher.path for teacher in started] == [trained[0], trained[0]]

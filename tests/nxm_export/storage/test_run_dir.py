"""Run directories: what is skipped and what runs again, and that no death of a process leaves anything half-written."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nxm_export.errors import ArtifactError
from nxm_export.storage import run_dir
from nxm_export.storage.atomic import write_atomic
from nxm_export.storage.hashing import file_hash, tree_hash
from nxm_export.storage.run_dir import RunDir

ROOT = Path(__file__).parents[3]


class Work:
    """A stage's work that counts its calls and writes a file."""

    def __init__(self, text: str = "made") -> None:
        self.calls, self.text = 0, text

    def __call__(self, scratch: Path) -> None:
        self.calls += 1
        (scratch / "deep").mkdir()
        (scratch / "deep" / "file.txt").write_text(self.text)
        (scratch / "build.log").write_text(f"call {self.calls}")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.txt").write_text("one")
    return tmp_path / "input"


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def fail(run: RunDir, work: Callable[[], object] = lambda: None) -> None:
    """Do `work` in a locked run that then fails."""
    with run.lock():
        work()
        raise ArtifactError("bad data")


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_fails_before_anything_is_made_leaves_what_was_there(tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "run").mkdir()
    before = [*tmp_path.iterdir()]
    run = RunDir(tmp_path / "run")
    with pytest.raises(ArtifactError, match="bad data"):
        fail(run)
    assert [*tmp_path.rglob("*")] == before
    assert run.stage("make", "out", Work())  # the same object goes on


def test_a_run_that_fails_keeps_finished_stages_and_unfinished_work(tmp_path: Path, source: Path) -> None:
    begun, made = RunDir(tmp_path / "begun"), RunDir(tmp_path / "made")
    with pytest.raises(ArtifactError, match="bad data"):
        fail(begun, lambda: begun.path("work").mkdir())
    with pytest.raises(ArtifactError, match="bad data"):
        fail(made, lambda: made.stage("make", "out", Work(), inputs={"source": source}))
    with pytest.raises(ArtifactError, match="bad data"):
        fail(RunDir(begun.root))
    assert RunDir.open(begun.root).path("work").is_dir()
    assert [*RunDir.open(made.root).manifest.stages] == ["make"]


def test_an_unchanged_stage_is_skipped_also_by_a_later_process(run: RunDir, source: Path) -> None:
    work = Work()
    arguments: dict[str, Any] = {"inputs": {"source": source}, "options": {"x": 1, "path": Path("a")}, "seed": 3}
    assert run.stage("make", "out", work, **arguments)
    assert not run.stage("make", "out", work, **arguments)
    assert not RunDir.open(run.root).stage("make", "out", work, **arguments)
    assert work.calls == 1
    record = json.loads((run.root / "manifest.json").read_text())["stages"]["make"]
    assert record["outputs"] == {
        "out/deep/file.txt": file_hash(run.path("out", "deep", "file.txt"))
    }  # logs are not hashed
    assert record["inputs"] == {"source": tree_hash(source)}
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_other_versions_make_a_measurement_again_and_leave_what_took_long(
    run: RunDir, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, compared = Work(), Work()

    def stages() -> tuple[bool, bool]:
        return (
            run.stage("train", "model", trained, inputs={"source": source}),
            run.stage("compare", "parity", compared, inputs={"source": source}, by_these_versions=True),
        )

    assert (stages(), stages()) == ((True, True), (False, False))
    monkeypatch.setattr(run_dir, "installed_versions", lambda: {"torch": "0.1"})
    assert (stages(), stages()) == ((False, True), (False, False))
    assert {stage: "python" in record.versions for stage, record in run.manifest.stages.items()} == {
        "train": True,
        "compare": False,
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda run, source: (source / "a.txt").write_text("two"),
        lambda run, source: (source / "b.txt").write_text(""),
        lambda run, source: (source / "a.txt").rename(source / "c.txt"),
        lambda run, source: run.path("out", "deep", "file.txt").write_text("spoiled"),
        lambda run, source: run.path("out", "deep", "file.txt").unlink(),
    ],
    ids=["input changed", "input added", "input renamed", "output spoiled", "output removed"],
)
def test_a_change_on_either_side_runs_the_stage_again(
    run: RunDir, source: Path, change: Callable[[RunDir, Path], Any]
) -> None:
    work = Work()
    run.stage("make", "out", work, inputs={"source": source})
    change(run, source)
    assert run.stage("make", "out", work, inputs={"source": source})
    assert run.path("out", "deep", "file.txt").read_text() == "made"
    assert not run.stage("make", "out", work, inputs={"source": source})


@pytest.mark.parametrize("changed", [{"options": {"x": 2}}, {"seed": 1}, {"options": {}}, {"inputs": {}}])
def test_other_options_run_the_stage_again(run: RunDir, source: Path, changed: dict[str, Any]) -> None:
    work = Work()
    first: dict[str, Any] = {"inputs": {"source": source}, "options": {"x": 1}, "seed": 0}
    run.stage("make", "out", work, **first)
    assert run.stage("make", "out", work, **{**first, **changed})


def test_a_log_may_change_without_another_build(run: RunDir) -> None:
    work = Work()
    run.stage("make", "out", work)
    run.path("out", "build.log").write_text("other")
    run.path("out", "parity.json").write_text("beside, not an output")
    assert not run.stage("make", "out", work)


def test_a_stage_that_fails_leaves_the_old_output_and_no_scratch(run: RunDir) -> None:
    run.stage("make", "out", Work())

    def fail(scratch: Path) -> None:
        (scratch / "half").write_text("half")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        run.stage("make", "out", fail, options={"x": 2})
    assert sorted(path.name for path in run.root.iterdir()) == ["manifest.json", "out"]
    assert run.path("out", "deep", "file.txt").read_text() == "made"


class Chain:
    """Three stages, each of what the one before wrote, the second with a file that nobody recorded beside it."""

    def __init__(self, run: RunDir) -> None:
        self.run = run

    def __call__(self, text: str = "made", last: int = 3, **first: object) -> list[bool]:
        stages: tuple[tuple[str, str, dict[str, Path]], ...] = (
            ("a", "a", {}),
            ("b x", "b/x", {"a": self.path("a")}),
            ("c", "c", {"file": self.path("b/x/deep/file.txt")}),
        )
        ran = []
        for name, output, inputs in stages[:last]:
            work = Work(f"{text} {name}")
            ran.append(self.run.stage(name, output, work, inputs=inputs, options=first if name == "a" else {}))
            (self.path("b") / "x" / "beside").write_text("") if name == "b x" else None
        return ran

    def path(self, name: str) -> Path:
        return self.run.path(name)


def test_what_was_made_of_an_output_goes_with_it(run: RunDir) -> None:
    """A run that is killed behind its first stage would show the results of two states as one."""
    chain = Chain(run)
    assert chain() == [True] * 3
    run.stage("other", "other", Work())
    assert chain("new", last=1, x=2) == [True]
    assert sorted(RunDir.open(run.root).manifest.stages) == ["a", "other"]
    assert not chain.path("b/x").exists()
    assert not chain.path("c").exists()
    assert run.path("other", "deep", "file.txt").is_file()
    assert chain("new", x=2) == [False, True, True]


def test_what_was_made_of_an_output_stays_where_that_comes_out_the_same_or_not_at_all(run: RunDir) -> None:
    chain = Chain(run)
    chain()
    chain.path("a/deep/file.txt").write_text("spoiled")
    assert chain() == [True, False, False]

    def fail(_: Path) -> None:
        raise ArtifactError("bad data")

    with pytest.raises(ArtifactError, match="bad data"):
        run.stage("a", "a", fail, options={"x": 2})
    assert chain() == [False] * 3


def test_a_stage_that_is_dropped_takes_along_what_was_made_of_it(run: RunDir) -> None:
    Chain(run)()
    run.drop("b x", "b/x")
    assert [*RunDir.open(run.root).manifest.stages] == ["a"]


@pytest.mark.parametrize("output", ["../precious", ".", "{root}/precious", ""])
def test_a_manifest_that_somebody_wrote_removes_nothing_outside_the_run(
    run: RunDir, tmp_path: Path, output: str
) -> None:
    Chain(run)(last=2)
    (tmp_path / "precious").mkdir()
    manifest = json.loads((run.root / "manifest.json").read_text())
    manifest["stages"]["b x"]["output"] = output.format(root=tmp_path)
    (run.root / "manifest.json").write_text(json.dumps(manifest))
    assert RunDir.open(run.root).stage("a", "a", Work("new"), options={"x": 2})
    assert (tmp_path / "precious").is_dir()
    assert run.path("b", "x", "deep", "file.txt").is_file()


def test_a_manifest_in_which_stages_read_each_other_has_an_end(run: RunDir) -> None:
    Chain(run)(last=2)
    manifest = json.loads((run.root / "manifest.json").read_text())
    manifest["stages"]["a"]["inputs"] = {"b": file_hash(run.path("b", "x", "deep", "file.txt"))}
    (run.root / "manifest.json").write_text(json.dumps(manifest))
    again = RunDir.open(run.root)
    again.drop("b x", "b/x")
    assert not again.manifest.stages


def test_a_missing_input_is_named(run: RunDir, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere: no such file or directory"):
        run.stage("make", "out", Work(), inputs={"source": tmp_path / "nowhere"})


class TestForeign:
    def test_an_existing_directory_that_is_no_run_is_refused_and_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(ArtifactError, match=r"exists and is not a run directory .* choose another --out"):
            RunDir(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_file_is_no_run_directory(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ArtifactError, match="exists and is not a run directory"):
            RunDir(tmp_path / "file")
        with pytest.raises(ArtifactError, match="cannot create the run directory"):
            RunDir(tmp_path / "file" / "below")

    def test_opening_does_not_create(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match=r"is not a run directory .* give the --out of an `nxm run`"):
            RunDir.open(tmp_path / "nowhere")
        assert not (tmp_path / "nowhere").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "not valid JSON"),
            ("[]", "not a nxm-run/1 file"),
            ('{"schema": "nxm-run/2", "stages": {}}', "schema nxm-run/2 is not the nxm-run/1 that this version reads"),
            ('{"schema": "nxm-run/1"}', r"manifest.json: Object missing required field `stages`; restore it, or start"),
            ('{"schema": "nxm-run/1", "stages": {"a": 5}}', r"manifest.json: stages.a: Expected `object`, got `int`"),
            ('{"schema": "nxm-run/1", "stages": {"a": {}}}', r"stages.a: Object missing required field `options`"),
        ],
    )
    def test_a_damaged_manifest_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ArtifactError, match=message):
            RunDir(tmp_path)

    def test_a_record_without_outputs_is_no_reason_to_skip(self, run: RunDir) -> None:
        run.stage("make", "out", Work())
        manifest = json.loads((run.root / "manifest.json").read_text())
        manifest["stages"]["make"]["outputs"] = {}
        (run.root / "manifest.json").write_text(json.dumps(manifest))
        assert RunDir.open(run.root).stage("make", "out", Work())

    def test_an_option_that_is_no_number_is_named_before_the_work(self, run: RunDir) -> None:
        work = Work()
        with pytest.raises(ValueError, match=r"dict\.rates\[1\] is nan"):
            run.stage("make", "out", work, options={"rates": (1.0, float("nan"))})
        assert work.calls == 0


def child(tmp_path: Path, code: str, **options: Any) -> subprocess.Popen[str]:
    """Start a Python process on `code`, in `tmp_path`, with this source tree."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])}
    head = "import os, signal, sys, time\nfrom pathlib import Path\nfrom nxm_export.storage.run_dir import *\n"
    head += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a suite in the background ignores Ctrl-C
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(code)],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the child did not get there in 30 seconds"
        time.sleep(0.01)


class TestDeath:
    SLOW = """
        def work(scratch):
            (scratch / "first").write_text("x" * 1000)
            with (scratch / "half").open("w") as stream:
                stream.write("x" * 1000)
                stream.flush()
                Path("ready").touch()
                time.sleep(60)
        RunDir("run").stage("make", "out", work, options={"x": 2})
        """

    @contextlib.contextmanager
    def in_the_middle(self, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
        process = child(tmp_path, self.SLOW)
        try:
            wait_for((tmp_path / "ready").exists)
            yield process
        finally:
            process.kill()
            process.communicate()

    def test_kill_9_leaves_the_old_output_and_the_next_run_finishes(self, tmp_path: Path) -> None:
        run = RunDir(tmp_path / "run")
        run.stage("make", "out", Work("old"), options={"x": 1})
        with self.in_the_middle(tmp_path) as process:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        assert run.path("out", "deep", "file.txt").read_text() == "old"
        assert not (run.path("out") / "half").exists()
        work = Work("new")
        assert RunDir(run.root).stage("make", "out", work, options={"x": 2})
        assert sorted(path.name for path in run.root.iterdir()) == ["manifest.json", "out"]
        assert not RunDir(run.root).stage("make", "out", work, options={"x": 2})

    def test_kill_9_of_a_first_run_leaves_a_run_that_goes_on(self, tmp_path: Path) -> None:
        with self.in_the_middle(tmp_path) as process:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert not (tmp_path / "run" / "out").exists()
        assert RunDir(tmp_path / "run").stage("make", "out", Work())

    @pytest.mark.parametrize("at", range(1, 4))
    def test_kill_9_between_any_two_renames_loses_no_complete_output(self, tmp_path: Path, at: int) -> None:
        """The renames of a stage, killed before the 1st (old aside), 2nd (new in place) and 3rd (the manifest)."""
        run = RunDir(tmp_path / "run")
        run.stage("make", "out", Work("old"), options={"x": 1})
        code = f"""
            count, rename, replace = 0, Path.rename, Path.replace
            def dying(call):
                def wrapped(self, target):
                    global count
                    count += 1
                    if count == {at}:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return call(self, target)
                return wrapped
            Path.rename, Path.replace = dying(rename), dying(replace)
            RunDir("run").stage("make", "out", lambda scratch: (scratch / "file").write_text("new"), options={{"x": 2}})
            """
        process = child(tmp_path, code)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        whole = {"old": ["build.log", "deep"], "new": ["file"]}
        complete = [path for path in run.root.iterdir() if path.is_dir() and path.name != "manifest.json"]
        assert any(sorted(file.name for file in path.iterdir()) in whole.values() for path in complete)
        assert RunDir(run.root).stage("make", "out", Work("new"), options={"x": 2})
        assert sorted(path.name for path in run.root.iterdir()) == ["manifest.json", "out"]

    def test_ctrl_c_clears_its_scratch(self, tmp_path: Path) -> None:
        with self.in_the_middle(tmp_path) as process:
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=30)
        assert "KeyboardInterrupt" in error
        assert not (tmp_path / "run").exists()  # nothing else was in it
        assert RunDir(tmp_path / "run").stage("make", "out", Work())

    def test_two_processes_do_not_share_a_run_and_a_dead_one_holds_nothing(self, tmp_path: Path) -> None:
        with self.in_the_middle(tmp_path) as process:
            run = RunDir(tmp_path / "run")
            with pytest.raises(
                ArtifactError, match="is in use by another nxm process; wait for it, or choose another --out"
            ):
                run.stage("make", "other", Work())
            with pytest.raises(ArtifactError, match="in use"), run.lock():
                pytest.fail("locked twice")
            assert RunDir.open(run.root).manifest.stages == {}  # reading needs no lock
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert run.stage("make", "other", Work())

    def test_a_stage_of_another_process_is_seen_when_the_lock_is_taken(self, tmp_path: Path) -> None:
        early, work = RunDir(tmp_path / "run"), Work()
        RunDir(tmp_path / "run").stage("make", "out", work)
        with early.lock(), early.lock():
            assert not early.stage("make", "out", work)


class TestDisk:
    BIG = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        from nxm_export.errors import ArtifactError
        def work(scratch):
            {write}
        try:
            RunDir("run").stage("make", "out", work)
        except ArtifactError as error:
            print(error)
        """

    @pytest.mark.parametrize(
        "write",
        [
            "(scratch / 'big').write_bytes(bytes(1_000_000))",
            "import numpy, safetensors.numpy; safetensors.numpy.save_file({'a': numpy.zeros(1_000_000)}, scratch / "
            "'big')",
            "import torch; torch.save(torch.zeros(1_000_000), scratch / 'big')",
        ],
        ids=["plain", "safetensors", "torch"],
    )
    def test_a_file_that_does_not_fit_is_named_whoever_writes_it(self, tmp_path: Path, write: str) -> None:
        """RLIMIT_FSIZE stands for the full disk: the same errors, through the same libraries."""
        output, error = child(tmp_path, self.BIG.format(write=write)).communicate()
        assert "cannot be written" in output, error
        assert "free the space or choose another place" in output
        assert not (tmp_path / "run").exists()  # nothing else was in it

    def test_a_full_disk_leaves_a_run_that_goes_on_when_there_is_space(self, tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True, text=True, check=False
        )
        if mount.returncode:
            pytest.skip(f"no right to mount a small file system here: {mount.stderr.strip()}")
        try:
            run = RunDir(disk / "run")
            run.stage("make", "out", Work("old"))
            with pytest.raises(
                ArtifactError, match=r"big: cannot be written \(No space left on device\); free the space"
            ):
                run.stage("big", "big", lambda scratch: (scratch / "big").write_bytes(bytes(1_000_000)))
            assert sorted(path.name for path in run.root.iterdir()) == ["manifest.json", "out"]
            (disk / "filler").write_bytes(bytes(480_000))
            with pytest.raises(ArtifactError, match="cannot be written"):  # the manifest itself
                write_atomic(run.root / "manifest.json", "x" * 100_000)
            assert not RunDir.open(run.root).stage("make", "out", Work("old"))
        finally:
            subprocess.run(["umount", disk], check=True)

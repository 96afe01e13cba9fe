"""Every command and every line of Python in the README runs, in order, on a tiny model; its links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

import nxm_export as nxm
from nxm_export.cli import main
from nxm_export.storage.json_files import as_objects, entry_at
from tests.conftest import ROOT
from tools.benchmarks.servers import free_port, started
from tools.raw_http import send
from tools.readme_table import BEGIN, END, table

README = (ROOT / "README.md").read_text(encoding="utf-8")


PYTHON = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


def blocks(language: str, document: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A directory with what the README calls ``my-model``, ``train.tsv`` and ``dev.tsv``."""
    made = tiny_checkpoint("bert").parent
    home = tmp_path_factory.mktemp("readme")
    shutil.copytree(made / "dense", home / "my-model")
    for name in ("train.tsv", "dev.tsv"):
        shutil.copyfile(made / name, home / name)
    return home


def serves_until_stopped(arguments: list[str], desk: Path) -> None:
    """Runs a server of the README as a child process, on another port; asks once; SIGTERM must end it well."""
    port = free_port()
    command = [sys.executable, *(argument.replace("8000", str(port)) for argument in arguments)]
    assert command[1:] != arguments, "the README names the port"
    with started(command, dict(os.environ), port, desk / "serve.log", cwd=desk) as server:
        inputs = [
            {"name": entry["name"], "datatype": entry["datatype"], "shape": [1, 4], "data": [1, 1, 1, 1]}
            for entry in as_objects(entry_at(send(port, "GET", "/v2/models/engine").json(), "inputs"))
        ]
        answer = send(port, "POST", "/v2/models/engine/infer", json.dumps({"inputs": inputs}).encode())
        assert answer.status == 200, answer.body
        assert entry_at(answer.json(), "outputs", 0, "shape") == [1, 2]
        assert server.stop() == 0


@pytest.fixture(scope="module")
def commands_have_run(desk: Path) -> Path:
    """Runs the shell blocks: plain commands of `nxm`, in this process, so that torch is imported once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(desk)
        for line in "".join(blocks("sh")).splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "nxm", f"only nxm is expected here: {line}"
            if arguments[0] == "serve":
                serves_until_stopped(["-m", "nxm_export", *arguments], desk)
                continue
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}\n{result.exception!r}"
            assert result.stdout.strip(), f"{line} printed nothing"
    return desk


def test_the_commands_leave_what_they_promise(commands_have_run: Path) -> None:
    made = {str(path.relative_to(commands_have_run)) for path in commands_have_run.rglob("*")}
    assert made >= {
        "runs/mine/summary/summary.json",
        "checkpoint/nxm_plan.json",
        "graph/model.onnx",
        "engine/passport.json",
        "triton-repository/engine_text/config.pbtxt",
    }


@pytest.mark.parametrize(
    ("document", "engine"),
    [("README.md", "small-engine"), pytest.param("docs/python.md", "mixed-engine", marks=pytest.mark.slow)],
)
def test_the_python_of_a_document_runs(
    commands_have_run: Path, monkeypatch: pytest.MonkeyPatch, document: str, engine: str
) -> None:
    """The stages that take minutes with the usual settings train for a few steps here."""
    monkeypatch.chdir(commands_have_run)
    few = partial(nxm.Settings, steps=4, calibration_samples=64)
    monkeypatch.setattr("compressors.settings.Settings", few)
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks("python", (ROOT / document).read_text(encoding="utf-8"))):
        exec(compile(block, f"{document}, Python block {number + 1}", "exec"), namespace)
    assert (commands_have_run / engine / "passport.json").is_file()


@pytest.mark.slow
def test_the_python_of_the_readme_and_of_its_page_passes_strict_mypy(tmp_path: Path) -> None:
    """As in a user's own project: the package is installed, and its types are all that mypy knows of it."""
    for name, texts in (("readme.py", blocks("python")), ("page.py", blocks("python", PYTHON))):
        (tmp_path / name).write_text("\n".join(texts) + "\nreveal_type(engine.predict(['a']))\n", encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--strict", "--config-file", os.devnull, name],
            env={**os.environ, "MYPYPATH": str(ROOT)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        ours = [line for line in done.stdout.splitlines() if line.startswith(name)]
        assert [line for line in ours if "error" in line] == [], done.stdout
        assert "list[nxm_export.data.predictions.Prediction]" in done.stdout


def test_every_command_is_shown(commands_have_run: Path) -> None:
    shown = {shlex.split(line, comments=True)[1] for line in "".join(blocks("sh")).splitlines()}
    assert shown == main.commands.keys() - {"completion"}


def test_the_result_table_has_the_rows_that_its_tool_prints(commands_have_run: Path) -> None:
    def subjects(text: str) -> list[str]:
        return [re.sub(r"\d+|, [^,|]*$", "", row.split("|")[1]).strip() for row in text.strip().splitlines()]

    written = README.partition(BEGIN)[2].partition(END)[0]
    assert subjects(written) == subjects(table(commands_have_run / "runs" / "mine"))


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)$", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert re.findall(r"^    make (\w+)$", README, re.MULTILINE) == ["demo", "test"]


@pytest.mark.parametrize(
    "document", sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    file = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
        if not target.startswith(("https://", "mailto:")):
            assert (file.parent / target).exists(), f"{document} links to {target}"


def test_the_entry_point_is_installed() -> None:
    assert (Path(sys.executable).parent / "nxm").is_file(), "pip install -e . puts nxm beside python"

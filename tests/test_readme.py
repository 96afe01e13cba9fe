"""Every command of the README and of the tutorial runs, in order, on a tiny model, and so does the Python of its page;
links lead somewhere; whatever else looks like a command in a document is one."""

from __future__ import annotations

import json
import os
import re
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
from tools.benchmarks import cpu
from tools.benchmarks.cpu_record import Record
from tools.benchmarks.cpu_section import float_span, summary
from tools.benchmarks.measuring import load_record
from tools.benchmarks.servers import free_port, started
from tools.raw_http import send
from tools.readme_table import BEGIN, END, table
from tools.rendering import read_section
from tools.results.readme import SECTION, results_table
from tools.results.store import RESULTS
from tools.tutorial import PAGE, STEP, commands

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
TUTORIAL = PAGE.read_text(encoding="utf-8")
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def blocks(language: str, document: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)


def shown_commands(*documents: str) -> list[list[str]]:
    """The commands in the shell blocks, as arguments."""
    return [command for document in documents for block in blocks("sh", document) for command in commands(block)]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """A directory with what the README calls ``my-model`` (without a head), ``train.tsv`` and ``dev.tsv``."""
    import transformers

    made = tiny_checkpoint("bert").parent
    home = tmp_path_factory.mktemp("readme")
    shutil.copytree(made / "dense", home / "my-model")
    transformers.AutoModel.from_pretrained(made / "dense").save_pretrained(home / "my-model")
    for name in ("train.tsv", "dev.tsv"):
        shutil.copyfile(made / name, home / name)
    return home


FEWER = {"120": "6", "180": "6"}  # steps of training: what the model learns is nothing that is looked at here


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
        for program, *arguments in shown_commands(TUTORIAL, README):
            assert program == "nxm", f"only nxm is expected here: {program}"
            if arguments[0] == "serve":
                serves_until_stopped(["-m", "nxm_export", *arguments], desk)
                continue
            arguments = [FEWER.get(argument, argument) for argument in arguments]
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 0, f"{arguments}\n{result.output}\n{result.exception!r}"
            assert result.stdout.strip(), f"{arguments} printed nothing"
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


@pytest.mark.slow
def test_the_python_of_its_page_runs(commands_have_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages that take minutes with the usual settings train for a few steps here."""
    monkeypatch.chdir(commands_have_run)
    few = partial(nxm.Settings, steps=4, calibration_samples=64)
    monkeypatch.setattr("compressors.settings.Settings", few)
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks("python", PYTHON)):
        exec(compile(block, f"docs/python.md, Python block {number + 1}", "exec"), namespace)
    assert (commands_have_run / "mixed-engine" / "passport.json").is_file()


# mypy follows no import into these: most of its time, for nothing that a user's file is checked against.
UNREAD = "torch.*,transformers.*,onnx.*,onnx_ir.*,onnxscript.*,matplotlib.*"


def type_checked(files: dict[str, str], desk: Path) -> list[str]:
    """What `mypy --strict` says of files in `desk`."""
    for name, text in files.items():
        (desk / name).write_text(text, encoding="utf-8")
    (desk / "mypy.ini").write_text(f"[mypy]\nstrict = true\n[mypy-{UNREAD}]\nfollow_imports = skip\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", *files],
        env={**os.environ, "MYPYPATH": str(ROOT)},
        cwd=desk,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_python_of_its_page_passes_strict_mypy_and_a_mistyped_name_does_not(tmp_path: Path) -> None:
    """As in a user's own project: the package is installed, and its types are all that mypy knows of it."""
    page = "\n".join([*blocks("python", PYTHON), "reveal_type(engine.predict(['a']))\n"])
    mistyped = "import nxm_export as nxm\nnxm.compress\nnxm.compres\n"
    said = type_checked({"page.py": page, "mistyped.py": mistyped}, tmp_path)
    errors = [line for line in said if " error: " in line]
    assert [line for line in errors if line.startswith("page.py")] == []
    assert [line for line in said if "list[nxm_export.data.predictions.Prediction]" in line]
    (error,) = (line for line in errors if line.startswith("mistyped.py"))
    assert error.startswith("mistyped.py:3: ")
    assert 'has no attribute "compres"' in error


def test_every_command_is_shown(commands_have_run: Path) -> None:
    assert {command[1] for command in shown_commands(TUTORIAL, README)} == main.commands.keys() - {"completion"}


def test_every_output_of_the_tutorial_is_filled_in() -> None:
    steps = list(STEP.finditer(TUTORIAL))
    assert len(steps) >= 8
    assert [step["commands"] for step in steps if not step["shown"].strip()] == []


def documented_commands() -> list[tuple[str, str]]:
    """(document, command) of what reads as `nxm COMMAND ...` in a code block, a code span or an indented line."""
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
        lines = re.findall(r"^(?: {4}|)(?:\$ )?(nxm [a-z].*)$", text, re.MULTILINE) + re.findall(
            r"`(nxm [a-z][^`]*)`", text
        )
        found += [(document, line.partition(" #")[0].strip()) for line in lines]
    return found


@pytest.mark.parametrize(("document", "command"), sorted(set(documented_commands())))
def test_every_command_that_a_document_names_is_one(document: str, command: str) -> None:
    """Its name and its options are there; what they are given is not looked at."""
    name, *arguments = re.split(r"\s+", command)[1:]
    assert name in main.commands, f"{document}: no command {name}"
    known = {
        option for parameter in main.commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    options = {match for argument in arguments for match in re.findall(r"^\[?(--[a-z][a-z0-9-]*)", argument)}
    assert options <= known | {"--help", "--help-all"}, f"{document}: {name} has no {sorted(options - known)}"


# Options of other tools, and former names.
OF_OTHERS = {
    "CHANGELOG.md": {"--menu", "--islands"},
    "docs/gpu/README.md": {"--models", "--budget"},
    "docs/install.md": {"--force-reinstall"},
    "docs/serving.md": {"--disable-auto-complete-config"},
    "docs/tensorrt.md": {"--system-site-packages"},
}


@pytest.mark.parametrize(
    "document", [name for name in DOCUMENTS if name not in ("docs/migration.md", "docs/research-notes.md")]
)
def test_every_option_that_a_document_names_is_one(document: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    parameters = [parameter for command in main.commands.values() for parameter in command.params]
    known = {option for parameter in parameters for option in (*parameter.opts, *parameter.secondary_opts)}
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", prose)) - {"--help", "--help-all", "--version", "--coverage"}
    assert named - known == OF_OTHERS.get(document, set())


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_and_module_of_ours_that_a_document_names_is_there(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    folders = "tests|tools|engines|compressors|nxm_export|docs|results"
    for file in re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]+\.(?:py|json|jsonl|md))\b", text):
        assert (ROOT / file).is_file(), f"{document} names {file}"
    for module in re.findall(r"python -m (tools(?:\.\w+)+)", text):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), f"{document} names {module}"


def test_the_result_table_has_the_rows_that_its_tool_prints(commands_have_run: Path) -> None:
    def subjects(text: str) -> list[str]:
        return [re.sub(r"\d+|, [^,|]*$", "", row.split("|")[1]).strip() for row in text.strip().splitlines()]

    written = README.partition(BEGIN)[2].partition(END)[0]
    assert subjects(written) == subjects(table(commands_have_run / "runs" / "mine"))


def test_the_table_of_results_is_that_of_the_records() -> None:
    assert read_section(ROOT / "README.md", SECTION) == results_table(RESULTS), "python -m tools.results render"


def test_the_speeds_are_those_of_the_record() -> None:
    record = load_record(cpu.FILE, Record)
    assert read_section(ROOT / "README.md", cpu.TOOL) == summary(record), "python -m tools.benchmarks.cpu render"
    page = (ROOT / "docs" / "will-it-pay.md").read_text(encoding="utf-8")
    assert f"{float_span(record)} times as fast in ONNX Runtime" in page


def test_every_measured_number_is_placed_by_a_command() -> None:
    """What stands between a tool's marks is made by it; 100 % and 95 % name the dense model and an interval."""
    typed = re.sub(r"<!-- (.+?)(?:: begin)? -->\n.*?<!-- (?:end of )?\1(?:: end)? -->", "", README, flags=re.DOTALL)
    assert "| encoder |" not in typed
    assert "| TensorRT-RTX engine |" not in typed
    measured = re.findall(r"\d[\d.]*(?: %|%| ms\b| MB\b| GB\b| points\b|x\b| times\b)", typed)
    assert set(measured) <= {"100 %", "95 %"}


def test_every_page_is_in_the_index() -> None:
    linked = set(re.findall(r"\]\(([^)#]+)\)", (ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert linked == pages - {"index.md"}


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make (\w+)$", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert re.findall(r"^    make (\w+)$", README, re.MULTILINE) == ["demo", "test"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    file = ROOT / document
    text = file.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text):
        if not target.startswith(("https://", "mailto:")):
            assert (file.parent / target).exists(), f"{document} links to {target}"


def anchors(document: Path) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_links_to_sections_lead_to_headings() -> None:
    for document in DOCUMENTS:
        file = ROOT / document
        for target, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", file.read_text(encoding="utf-8")):
            page = file.parent / target if target else file
            assert anchor in anchors(page), f"{document} links to {target}#{anchor}"


def test_the_entry_point_is_installed() -> None:
    assert (Path(sys.executable).parent / "nxm").is_file(), "pip install -e . puts nxm beside python"

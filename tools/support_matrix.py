"""The table of docs/families.md that says which family, task and engine the tests run together.

    python -m tools.support_matrix --write

It asks pytest for all test cases, those of every mark, and runs none of them. A cell of the table holds a letter for
each kind of test that has a case for its family and task. Lower case: against stand-ins of the hardware.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from nxm_export.contract.families import FAMILIES
from nxm_export.contract.tasks import TASKS
from tools import ROOT
from tools.rendering import table, write_section

PAGE = ROOT / "docs/families.md"
SECTION = "tools.support_matrix"


@dataclass(frozen=True)
class Evidence:
    """A test, and what a case of it shows of its family and task.

    `family` and `task` are those of all its cases, None where each case names its own; `case` is what the name of a
    case must hold beside them.
    """

    letter: str
    test: str
    engine: str
    shows: str
    family: str | None = None
    task: str | None = None
    case: str = ""


STAGES = "tests/end_to_end/test_family_stages.py::test_a_family_passes_a_stage"
COMPARED = "an engine of a trained model passes `nxm compare`"
EVIDENCE = (
    Evidence(
        "G",
        "tests/nxm_export/graph/test_exporter.py::TestEveryFamilyAndTask::test_onnx_runtime_and_pytorch_agree",
        "ONNX Runtime",
        "the exported graph gives the numbers of PyTorch",
    ),
    Evidence("O", STAGES, "ONNX Runtime", COMPARED, task="classification", case="ort"),
    Evidence(
        "O",
        "tests/end_to_end/test_tasks.py::test_a_task_goes_from_data_to_a_compared_engine",
        "ONNX Runtime",
        COMPARED,
        family="bert",
    ),
    Evidence("V", STAGES, "OpenVINO", COMPARED, task="classification", case="openvino"),
    Evidence(
        "R",
        "tests/engines/tensorrt/test_rtx_backend.py"
        "::test_every_planned_product_runs_on_integers_and_attention_is_fused_as_planned",
        "TensorRT-RTX 1.7",
        "an engine is built without a GPU, with all planned products in INT8; it is not run",
        task="classification",
    ),
    Evidence(
        "t",
        "tests/engines/tensorrt/test_rehearsal.py"
        "::test_an_engine_runs_every_shape_its_profiles_hold_and_refuses_the_rest",
        "TensorRT 8.6, 10, 11",
        "*rehearsed*: our code builds and runs an engine on a fake TensorRT with the real one's interface",
        family="bert",
        task="classification",
    ),
    Evidence(
        "c",
        "tests/engines/cusparselt/test_lowering.py::test_every_family_runs_all_planned_products_on_integers",
        "cuSPARSELt",
        "*rehearsed*: on stand-ins of its kernels for the CPU the engine gives the graph's numbers",
        task="classification",
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Print the table of families, tasks and engines that tests run.")
    parser.add_argument("--write", action="store_true", help=f"put it into {PAGE.name}")
    options = parser.parse_args(arguments)
    text = section(collected())
    print(text)
    if options.write:
        write_section(PAGE, SECTION, text)
    return 0


def collected() -> list[str]:
    """The names of all cases of the tests in `EVIDENCE`, as pytest writes them."""
    tests = list(dict.fromkeys(evidence.test for evidence in EVIDENCE))
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-m", "", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pytest could not list the tests:\n{done.stdout}{done.stderr}")
    return [line for line in done.stdout.splitlines() if "::" in line]


def section(cases: Iterable[str]) -> str:
    """The legend and the table of these cases (``tests/x.py::test_y[bert-ort]``)."""
    letters: dict[tuple[str, str], set[str]] = {}
    for evidence, pair in (found for case in cases for found in _shown(case)):
        letters.setdefault(pair, set()).add(evidence.letter)
    kinds = {evidence.letter: [evidence.letter, evidence.engine, evidence.shows] for evidence in EVIDENCE}
    rows = [
        [
            family,
            *("no head" if task in FAMILIES[family].missing_heads else _cell(letters, family, task) for task in TASKS),
        ]
        for family in FAMILIES
    ]
    legend = table(list(kinds.values()), ["", "engine", "what a test shows"], "lll")
    return f"{legend}\n\n{table(rows, ['family', *TASKS], 'l' * (1 + len(TASKS)))}"


def _cell(letters: dict[tuple[str, str], set[str]], family: str, task: str) -> str:
    held = letters.get((family, task), set())
    return " ".join(dict.fromkeys(e.letter for e in EVIDENCE if e.letter in held)) or "not tested"


def _shown(case: str) -> list[tuple[Evidence, tuple[str, str]]]:
    """What a case shows, with the family and task that it is about."""
    test, _, parameters = case.partition("[")
    name = f"-{parameters.removesuffix(']')}-"
    found = []
    for evidence in EVIDENCE:
        if evidence.test != test or f"-{evidence.case}-".replace("--", "-") not in name:
            continue
        family = evidence.family or _named(FAMILIES, name)
        task = evidence.task or _named(TASKS, name)
        if family is None or task is None:
            raise LookupError(f"{case} names no family or no task")
        found.append((evidence, (family, task)))
    return found


def _named(known: Iterable[str], name: str) -> str | None:
    """The longest of the known words that a case's name holds between hyphens (``roberta`` is in ``xlm-roberta``)."""
    return max((word for word in known if f"-{word}-" in name), key=len, default=None)


if __name__ == "__main__":
    sys.exit(main())

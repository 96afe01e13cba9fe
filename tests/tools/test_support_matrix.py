"""The table of families, tasks and engines holds a letter for what a test runs, and for nothing else."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterable

import pytest

from nxm_export.contract.families import FAMILIES
from nxm_export.contract.tasks import TASKS
from tools.rendering import read_section
from tools.support_matrix import EVIDENCE, PAGE, SECTION, STAGES, section


def cases_of(test: str) -> Iterable[str]:
    """The cases of a test as pytest names them, from the marks of its function and class."""
    path, *names = test.split("::")
    found: object = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    marks: list[pytest.Mark] = []
    for name in names:
        found = getattr(found, name)
        marks = [mark for mark in getattr(found, "pytestmark", []) if mark.name == "parametrize"] + marks
    lists = [[_name(value) for value in mark.args[1]] for mark in dict.fromkeys(map(_Same, marks))]
    return (f"{test}[{'-'.join(names)}]" for names in itertools.product(*lists)) if lists else [test]


class _Same:
    """A mark; a class hands its own down to its functions, so one mark may come twice."""

    def __init__(self, mark: pytest.Mark) -> None:
        self.args = mark.args
        self._key = id(mark.args[1])

    def __hash__(self) -> int:
        return self._key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._key == self._key


def _name(value: object) -> str:
    values = getattr(value, "values", value)
    return "-".join(map(str, values)) if isinstance(values, tuple) else str(values)


def test_the_page_says_what_the_tests_run() -> None:
    tests = dict.fromkeys(evidence.test for evidence in EVIDENCE)
    cases = [case for test in tests for case in cases_of(test)]
    assert read_section(PAGE, SECTION) == section(cases), "python -m tools.support_matrix --write"


def test_a_letter_stands_where_a_case_is_and_nowhere_else() -> None:
    lines = section([f"{STAGES}[xlm-roberta-ort]", f"{STAGES}[mpnet-openvino]", f"{STAGES}[gte-pack]"]).splitlines()
    rows = {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines if line[:2] == "| ")}
    assert rows["family"] == list(TASKS)
    marked = {(family, task): rows[family][i] for family in FAMILIES for i, task in enumerate(TASKS)}
    expected = {("xlm-roberta", "classification"): "O", ("mpnet", "classification"): "V"}
    expected |= {(f, t): "no head" for f in FAMILIES for t in FAMILIES[f].missing_heads}
    assert {pair: cell for pair, cell in marked.items() if cell != "not tested"} == expected


def test_a_case_without_family_is_an_error() -> None:
    with pytest.raises(LookupError, match="names no family"):
        section([f"{STAGES}[albert2-ort]"])

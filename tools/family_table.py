"""The table of docs/families.md: which family passed which stage, made by the tests themselves.

    python -m tools.family_table --write

It runs tests/end_to_end/test_family_stages.py whole (some twenty minutes), and writes what became of every test:
``tested``, ``refused`` (with a reason, as the test requires), ``not here`` (something is not installed) or ``FAILS``.
``--junit FILE`` reads the results of a run that was made before, with ``pytest --junitxml FILE``; given again, those of
a further one.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from nxm_export.contract.families import FAMILIES
from nxm_export.storage.atomic import write_atomic
from tools import ROOT
from tools.rendering import table

PAGE = ROOT / "docs/families.md"
TESTS = "tests/end_to_end/test_family_stages.py"
BEGIN, END = "<!-- table of families -->\n", "<!-- end of table -->\n"
_TEST = re.compile(r"test_a_family_passes_a_stage\[(?P<family>[\w-]+?)-(?P<stage>[^\]]+)\]")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status, 1 where a test failed."""
    parser = argparse.ArgumentParser(description="Print the table of families and stages.")
    parser.add_argument("--junit", type=Path, action="append", help="results of a run that was made before")
    parser.add_argument("--write", action="store_true", help=f"put it into {PAGE.name}")
    options = parser.parse_args(arguments)
    results = run_tests() if options.junit is None else {}
    for file in options.junit or ():
        results |= read_results(file)
    text = render_table(results)
    print(text)
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        before, rest = page.split(BEGIN)
        write_atomic(PAGE, f"{before}{BEGIN}{text}\n{rest[rest.index(END) :]}")
    return int("FAILS" in results.values())


def run_tests() -> dict[tuple[str, str], str]:
    """What became of every test, by (family, stage)."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", TESTS, "-m", "", f"--junitxml={file}"]
        subprocess.run(command, cwd=ROOT, check=False)
        return read_results(file)


def read_results(file: Path) -> dict[tuple[str, str], str]:
    """What became of every test in a JUnit file, by (family, stage)."""
    results = {}
    for case in ElementTree.parse(file).iter("testcase"):
        found = _TEST.fullmatch(case.get("name", ""))
        if found is not None:
            results[_known(found["family"], found["stage"])] = _outcome(case)
    return results


def _known(family: str, stage: str) -> tuple[str, str]:
    """Names of families hold hyphens, as stages do: the family is the longest that is known."""
    whole = f"{family}-{stage}"
    name = max((name for name in FAMILIES if whole.startswith(f"{name}-")), key=len)
    return name, whole.removeprefix(f"{name}-")


def _outcome(case: ElementTree.Element) -> str:
    if case.find("failure") is not None or case.find("error") is not None:
        return "FAILS"
    skipped = case.find("skipped")
    if skipped is None:
        return "tested"
    return "refused" if skipped.get("type") == "pytest.xfail" else "not here"


def stages_in_order() -> list[str]:
    """The names of all stages as the tests list them: several pytest workers report them in another order."""
    for node in ast.parse((ROOT / TESTS).read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.AnnAssign)
            and ast.unparse(node.target) == "STAGES"
            and isinstance(node.value, ast.Dict)
        ):
            return [ast.literal_eval(key) for key in node.value.keys if key is not None]
    raise LookupError(f"{TESTS} has no dictionary STAGES")


def render_table(results: Mapping[tuple[str, str], str]) -> str:
    """The markdown table: a row for every stage, a column for every family, both in the order of the repository."""
    tried = {stage for _, stage in results}
    stages = [stage for stage in stages_in_order() if stage in tried]
    families = [name for name in FAMILIES if any((name, stage) in results for stage in stages)]
    rows = [[stage, *(results.get((name, stage), "not run") for name in families)] for stage in stages]
    return table(rows, ["stage", *families], "l" * (1 + len(families)))


if __name__ == "__main__":
    sys.exit(main())

"""docs/how-it-works.md prints what it shows, names functions that exist, and its drawings are those of today's code."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tools.drawings.__main__ import DENSE, MOMENTS, admm_steps, drawn

PAGE = (ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8")


def test_every_example_prints_what_stands_under_it() -> None:
    examples = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(examples) == PAGE.count("```python")
    namespace: dict[str, object] = {}
    for code, shown in examples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "docs/how-it-works.md", "exec"), namespace)
        assert printed.getvalue() == shown


def test_every_section_ends_at_code_that_is_there() -> None:
    endings = re.findall(r"^→ (.*)$", PAGE, re.MULTILINE)
    assert len(endings) == PAGE.count("\n## ")
    for ending in endings:
        files = re.findall(r"`([\w/]+\.(?:py|json))`", ending)
        text = "".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        names = [name.split(".")[-1] for name in re.findall(r"`([\w.]+)`", ending)]
        for name in names:
            assert re.search(rf"(def|class|^) ?{name}\b", text, re.MULTILINE), f"{name} is not in {files}"


@pytest.mark.parametrize("path", sorted(drawn()), ids=lambda path: path.name)
def test_drawings_are_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == drawn()[path], "python -m tools.drawings"


def test_admm_ends_on_the_axis_that_costs_least() -> None:
    """Against both supports by brute force; the page states these costs and the iteration."""
    costs = []
    for kept in (0, 1):
        other = 1 - kept
        costs.append(DENSE[other] ** 2 * (MOMENTS[other, other] - MOMENTS[0, 1] ** 2 / MOMENTS[kept, kept]))
    assert [f"{cost:.2f}" for cost in costs] == ["1.40", "0.73"]
    kept_by_iteration = [int(np.abs(z).argmax()) for _, z in admm_steps()]
    assert kept_by_iteration[:3] == [0, 0, 1]
    x, z = admm_steps()[-1]
    difference = DENSE - z
    assert kept_by_iteration[-1] == int(np.argmin(costs))
    assert difference @ MOMENTS @ difference == pytest.approx(min(costs), rel=1e-3)
    np.testing.assert_allclose(x, z, atol=2e-3)

"""One tiny model goes through `nxm run` and `nxm search` for all tests of the reports. Its classes are called what an
attacker would call them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nxm_export.contract.plan import WeightSpec
from nxm_export.reporting import report
from tests.support import tiny
from tests.support.html_page import Page

CLASSES = ("<script>alert(1)</script>", "a \"b\" & 'c' | $x$ </style>")


@pytest.fixture(scope="session")
def finished(made_once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    """A finished run of a tiny model, read only."""
    return made_once("finished run", _finish) / "run"


def _finish(home: Path) -> None:
    from compressors.settings import Settings
    from nxm_export.pipeline.request import Request
    from nxm_export.pipeline.run import run

    tiny.write_model("bert", home / "model", head="classification", classes=CLASSES)
    for file in tiny.write_data(home):
        rows = [line.rpartition("\t") for line in file.read_text(encoding="utf-8").splitlines()]
        lines = [f"{text}\t{CLASSES[int(label)] if label.isdecimal() else label}" for text, _, label in rows]
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = Settings(steps=24, batch_size=16, learning_rate=1e-3, calibration_samples=64, precision="fp32")
    request = Request(
        str(home / "model"),
        "classification",
        str(home / "train.tsv"),
        str(home / "dev.tsv"),
        WeightSpec.parse("2:4+W8"),
        settings,
    )
    run(request, home / "run")


@pytest.fixture(scope="session")
def searched(made_once: Callable[[str, Callable[[Path], object]], Path], finished: Path) -> Path:
    """What `nxm search` found on the dense model of the run."""
    from compressors.search.plan_search import search
    from compressors.search.settings import SearchSettings

    settings = SearchSettings(
        candidate_specs=("2:4+W8", "W8", "dense"),
        compression=0.8,
        samples=32,
        held_out=32,
        swaps=1,
        finalists=2,
        pareto=(0.7, 0.75),
    )
    dense, train = finished / "dense", str(finished.parent / "train.tsv")
    return made_once(
        "search of the finished run",
        lambda out: search(dense, task="classification", train=train, out=out, settings=settings),
    )


@pytest.fixture(scope="session")
def page(finished: Path, searched: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    out = tmp_path_factory.mktemp("page") / "page.html"
    return Page(report(finished, out, search=searched).read_text(encoding="utf-8"))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture(scope="session")
def bare(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run for tests that put back what they change."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("bare") / "run"))

"""Few resamples for the tests of results, and a book of records."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.results_book import DRAWS, Book


@pytest.fixture(scope="module", autouse=True)
def _few_resamples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in ("nxm_export.data.bootstrap_intervals", "tools.results.bootstrap", "tools.results.statistics"):
            patch.setattr(f"{module}.RESAMPLES", DRAWS)
        yield


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)

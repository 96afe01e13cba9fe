"""A desk that modules of tests call `nxm run` from."""

from __future__ import annotations

import pytest

from tests.support.run_desk import Desk


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    return Desk(tmp_path_factory.mktemp("desk"))

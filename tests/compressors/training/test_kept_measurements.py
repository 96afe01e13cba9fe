"""What was measured before the first step is not measured again after an interruption."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from compressors.training.kept_measurements import kept
from nxm_export.errors import ArtifactError


def never() -> dict[str, float]:
    raise AssertionError("measured again")


def test_numbers_come_back_to_the_bit_and_in_their_order(tmp_path: Path) -> None:
    file, measured = tmp_path / "work" / "scales.json", {"10": 0.1 + 0.2, "9": 1e-300, "8": 3.0}
    assert kept(file, lambda: measured) == measured
    assert list(kept(file, never).items()) == list(measured.items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none_are_not_kept(tmp_path: Path, value: float) -> None:
    file = tmp_path / "costs.json"
    kept(file, lambda: {"a": value})
    assert not file.exists()
    assert kept(file, lambda: {"a": 1.0}) == {"a": 1.0}


def test_a_file_that_is_damaged_is_named(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text('{"schema": "nxm-measured/1", "values": {"a": "b"}}')
    with pytest.raises(ArtifactError, match=r"costs\.json.*remove it"):
        kept(file, never)

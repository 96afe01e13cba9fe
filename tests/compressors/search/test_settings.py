"""The latency table of a search: read as numbers by role and option, or refused by field."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressors.search.settings import read_latencies
from nxm_export.errors import ArtifactError


def test_milliseconds_are_numbers_by_role_and_option(tmp_path: Path) -> None:
    (tmp_path / "ms.json").write_text('{"query": {"W8": 1, "dense": 2.5}}', encoding="utf-8")
    assert read_latencies(tmp_path / "ms.json") == {"query": {"W8": 1.0, "dense": 2.5}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {"b": "x"}}', r"ms\.json: a\.b: Expected `float`, got `str`"),
        ('{"a": {"b": null}}', r"ms\.json: a\.b: Expected `float`, got `null`"),
        ('{"a": {"b": Infinity}}', "Infinity is not a JSON number"),
        ('{"a": 1}', r"ms\.json: a: Expected `object`, got `int`"),
        ('{"a": {}}', "holds no rows"),
        ("{}", "holds no rows"),
        ("[]", "Expected `object`, got `array`"),
    ],
)
def test_another_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "ms.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"{message}.*a latency table is JSON, \{{role: "):
        read_latencies(tmp_path / "ms.json")

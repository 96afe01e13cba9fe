"""The latency table of a search: read as numbers by role and option, or refused by field."""

from __future__ import annotations

from pathlib import Path

import pytest

from compressors.search.settings import MIN_SAMPLES, SearchSettings, read_latencies
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


def test_what_solving_takes_is_taken_from_the_samples() -> None:
    """CoLA, six epochs, MiniLM-L6: 204 passes for each sample with those that judge, of a tenth of the run."""
    whole = SearchSettings().sized(6, 6, 8551, 51_000)
    assert whole.samples == int(0.11 * 51_000 / 204) == 27
    fewer = SearchSettings().sized(6, 6, 8551, 51_000, solving=204 * 10)
    assert (fewer.samples, fewer.held_out) == (17, 68)
    assert SearchSettings().sized(6, 6, 8551, 51_000, solving=1e6).samples == 2 * MIN_SAMPLES

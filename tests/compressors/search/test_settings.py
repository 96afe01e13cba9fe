"""What a search is asked: its latency table, read as numbers by role and option or refused by field; its placement."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from compressors.models import resolve
from compressors.search.settings import MIN_SAMPLES, SearchSettings
from compressors.search.weight_options import WeightOptions
from nxm_export.contract.plan import PLACEMENTS, WeightSpec
from nxm_export.contract.records.latency_table import LatencySource, LatencyTable, read_latencies
from nxm_export.errors import ArtifactError, PlanError
from tests.support import tiny
from tests.support.tiny import FAMILIES


def test_milliseconds_are_numbers_by_role_and_option(tmp_path: Path) -> None:
    (tmp_path / "ms.json").write_text('{"query": {"W8": 1, "dense": 2.5}}', encoding="utf-8")
    assert read_latencies(tmp_path / "ms.json") == LatencyTable({"query": {"W8": 1.0, "dense": 2.5}})


def test_a_table_that_was_measured_says_where(tmp_path: Path) -> None:
    source = LatencySource(
        "measured products of the GPU x", "cusparselt", "x", None, 1, 32, ("0" * 64,), {}, "bert", {"query": (8, 8)}
    )
    table = LatencyTable({"query": {"W8": 1.0}}, source)
    (tmp_path / "ms.json").write_text(table.to_text(), encoding="utf-8")
    assert read_latencies(tmp_path / "ms.json") == table
    assert str(source) == "measured products of the GPU x, at 1x32 (batch x tokens)"


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
        ('{"schema": "nxm-latency/1", "milliseconds": {}, "source": null}', "holds no rows"),
        ('{"schema": "nxm-latency/1", "milliseconds": {"a": {"b": "x"}}}', r"milliseconds\.a\.b: Expected `float`"),
    ],
)
def test_another_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "ms.json").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=rf"{message}.*a latency table is JSON, \{{role: "):
        read_latencies(tmp_path / "ms.json")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_placement_that_no_plan_of_a_family_can_have_is_refused_before_anything_is_measured(
    family: str, placement: str, tmp_path: Path
) -> None:
    source = resolve(tiny.write_model(family, tmp_path / "model", head="classification", layers=1))
    settings, plan = SearchSettings(placement=placement, compression=0.5), None
    with suppress(PlanError):
        plan = source.family.uniform_plan(source.config, WeightSpec.parse("W8"), placement=placement)
        source.family.require_placement(plan)
        WeightOptions(source.family, source.config, settings)
        return
    with pytest.raises(PlanError):
        WeightOptions(source.family, source.config, settings)
    assert family == "deberta-v2"


def test_what_solving_takes_is_taken_from_the_samples() -> None:
    """CoLA, six epochs, MiniLM-L6: 204 passes for each sample with those that judge, of a tenth of the run."""
    whole = SearchSettings().sized(6, 6, 8551, 51_000)
    assert whole.samples == int(0.11 * 51_000 / 204) == 27
    fewer = SearchSettings().sized(6, 6, 8551, 51_000, solving=204 * 10)
    assert (fewer.samples, fewer.held_out) == (17, 68)
    assert SearchSettings().sized(6, 6, 8551, 51_000, solving=1e6).samples == 2 * MIN_SAMPLES

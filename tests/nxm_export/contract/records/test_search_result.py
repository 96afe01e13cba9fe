"""``search.json``: what is written is read back, and a damaged one is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nxm_export.contract.records.search_result import (
    FullRun,
    HalvingRound,
    ParetoPlan,
    PlanScore,
    SampleCounts,
    SearchBudget,
    SearchCost,
    SearchResult,
    read_search_result,
)
from nxm_export.errors import ArtifactError
from nxm_export.storage.json_files import as_object, encode

PLAN = PlanScore(
    origin="free", predicted=None, joint=0.5, hw=0.875, packed=0.875, values=0.9, options={"W4": 2}, milliseconds=1.5
)
SEARCH = SearchResult(
    method="nxm",
    budget=SearchBudget("hw", 0.875, None, 2.0),
    best=PLAN,
    finalists=(PLAN,),
    rounds=(HalvingRound(3, {"free": 0.25}),),
    plans_evaluated=1,
    samples=SampleCounts(8, 8),
    seed=0,
    cost=SearchCost({"all": 1.0}, FullRun(10, 4.0), False, 0.25),
    pareto=(ParetoPlan(origin="a", predicted=1.0, joint=None, hw=0.9, packed=0.9, values=0.9, options={}, asked=0.9),),
    tied={"by role": PLAN},
)


def test_a_search_result_is_read_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    file.write_text(encode(SEARCH.to_dict()), encoding="utf-8")
    assert read_search_result(file) == SEARCH
    assert SEARCH.to_dict() == json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "nxm-search/9"}, "schema nxm-search/9 is not"),
        ({"best": {**PLAN.__dict__, "hw": None}}, "search.json: best.hw: Expected `float`, got `null`"),
        ({"cost": {**as_object(SEARCH.to_dict()["cost"]), "euros": 3}}, "search.json: unknown field cost.euros"),
        ({"seed": "0"}, "search.json: seed: Expected `int`, got `str`"),
    ],
)
def test_a_damaged_search_result_is_refused_by_file_and_field(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "search.json").write_text(json.dumps({**SEARCH.to_dict(), **change}), encoding="utf-8")
    with pytest.raises(ArtifactError) as error:
        read_search_result(tmp_path / "search.json")
    assert message in str(error.value)

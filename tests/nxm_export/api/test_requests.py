"""What `run`, `estimate`, `compress` and `search` are told: one plan, and nothing that would be dropped."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import nxm_export as nxm
from compressors.settings import Settings
from nxm_export.cli import main
from nxm_export.contract.options import options_of


def test_a_search_takes_as_many_samples_as_it_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[object] = []
    monkeypatch.setattr(
        "compressors.search.plan_search.search", lambda model, **given: asked.append(given["train_limit"])
    )
    nxm.search("dense", train="train.tsv", out=tmp_path, train_limit=7)
    nxm.Model("dense", "classification").search("train.tsv", out=tmp_path, train_limit=8)
    assert asked == [7, 8]


def compressed(tmp_path: Path, **choices: Any) -> None:
    """What `compress` reports about its choices, before it looks for the model."""
    nxm.compress(tmp_path / "none", train="a", dev="b", out=tmp_path / "c", **choices)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (
            {"weight_bits": None, "options": nxm.PlanOptions(residual="int8")},
            "residual int8: activations are quantized",
        ),
        (
            {"weight_bits": None, "options": nxm.PlanOptions(placement="attention", residual="int8")},
            "placement attention and residual int8",
        ),
        ({"plan": "p.json", "pattern": "2:4"}, "so pattern would be dropped"),
        ({"plan": "p.json", "weight_bits": 8}, "so weight_bits would be dropped"),
        (
            {"plan": "p.json", "pattern": None, "options": nxm.PlanOptions(embedding="int8")},
            "so pattern, options would",
        ),
    ],
)
def test_what_was_asked_is_never_dropped(tmp_path: Path, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(nxm.PlanError, match=message):
        compressed(tmp_path, **choices)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"pattern": nxm.NMPattern(1, 4)},
        {"pattern": None},
        {"weight_bits": None},
        {"weight_bits": None, "options": nxm.PlanOptions(placement="inputs")},
        {"plan": "p.json"},
        {"options": nxm.PlanOptions(placement="attention", residual="int8")},
    ],
)
def test_what_goes_together_gets_as_far_as_the_model(tmp_path: Path, choices: dict[str, Any]) -> None:
    with pytest.raises(nxm.ArtifactError, match="none: no such directory"):
        compressed(tmp_path, **choices)


def test_one_glob_without_a_tuple_is_refused() -> None:
    with pytest.raises(nxm.PlanError, match=r"write \('\*x\*',\)"):
        nxm.PlanOptions(keep_dense="*x*")  # type: ignore[arg-type]


def test_nothing_to_compress_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(nxm.PlanError, match="nothing to compress"):
        nxm.compress(tmp_path, train="a", dev="b", out=tmp_path / "c", pattern=None, weight_bits=None)


# What `nxm run` asks for where Python has another place for it, or none.
OF_RUN = {
    **dict.fromkeys(("placement", "residual", "embedding", "keep_dense"), "options"),
    **dict.fromkeys(("text", "text_pair", "label", "label_map"), "columns"),
    **{name: "settings" for name, _ in options_of(Settings)},
    "plan_file": "plan",
    "more_text_share": "more_text",
    "dry_run": None,  # `estimate`, below
    **dict.fromkeys(("demo", "config", "json"), None),  # for a terminal alone
}


@pytest.mark.parametrize("function", [nxm.run, nxm.estimate])
def test_every_option_of_a_run_has_its_parameter_in_python(function: Callable[..., object]) -> None:
    parameters = {str(parameter.name) for parameter in main.commands["run"].params} - {"help_all"}
    assert OF_RUN.keys() <= parameters, "an exception that is none"
    wanted = {OF_RUN.get(name, name) for name in parameters} - {None}
    beside = {"progress"} if function is nxm.run else set()
    without = {"out"} if function is nxm.estimate else set()  # it writes nothing
    assert set(inspect.signature(function).parameters) == {*wanted, *beside} - without


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plan": "p.json", "search": 0.8}, "so plan would be dropped"),
        ({"plan": "p.json", "pattern": "2:4"}, "so pattern would be dropped"),
        ({"search": 0.8, "weight_bits": 4}, "so weight_bits would be dropped"),
        ({"search": 0.8, "options": nxm.PlanOptions(residual="int8")}, "so options would be dropped"),
        ({"search": nxm.SearchSettings(), "options": nxm.PlanOptions(embedding="int8")}, "so options would be dropped"),
        ({"search": 1}, "a share between 0 and 1, as in 0.875; got 1"),
        ({"search": True}, "such as 0.875, or a SearchSettings; got True"),
        ({"search": "0.9"}, "such as 0.875, or a SearchSettings; got '0.9'"),
    ],
    ids=str,
)
def test_a_run_in_python_is_told_one_plan(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(nxm.PlanError, match=message):
        nxm.run("m", train="t", dev="d", out=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_run_in_python_takes_plan_search_and_backends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the pipeline gets is what the command gives it."""
    from nxm_export.pipeline.plan_choice import PlanChoice
    from nxm_export.pipeline.request import Request

    got: list[tuple[Request, PlanChoice]] = []
    monkeypatch.setattr(
        "nxm_export.pipeline.run.run", lambda request, out, choice, progress: got.append((request, choice))
    )
    nxm.run("m", train="t", dev="d", out=tmp_path, plan="p.json", backend="auto")
    options = nxm.PlanOptions(embedding="int8", placement="attention")
    nxm.run("m", train="t", dev="d", out=tmp_path, search=0.9, options=options, backend=["ort", "openvino"])
    common = ["run", "m", "--train=t", "--dev=d", f"--out={tmp_path}"]
    for more in (
        ["--plan=p.json", "--backend=auto"],
        ["--search=0.9", "--embedding=int8", "--placement=attention", "--backend=ort,openvino"],
    ):
        CliRunner().invoke(main, [*common, *more])
    assert [choice.search and choice.search.compression for _, choice in got] == [None, 0.9, None, 0.9]
    for ours, theirs in zip(got[:2], got[2:], strict=True):
        assert str(ours[1].file) == str(theirs[1].file)
        assert ours[1].search == theirs[1].search
        assert replace(ours[0], spec=theirs[0].spec) == theirs[0]

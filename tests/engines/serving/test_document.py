"""docs/serving.md says what the server does: its examples run, and its tables are complete."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from click.testing import CliRunner

from engines.serving.metrics import REASONS
from nxm_export.cli import main
from tests.support.infer_answers import outputs_of
from tools import ROOT
from tools.benchmarks.servers import Running
from tools.raw_http import send

TEXT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return str(block)


def test_the_example_for_curl_is_answered_with_class_names(ours: Running) -> None:
    program, url, option, body = shlex.split(block("sh"))
    assert (program, option) == ("curl", "-d")
    path = url.removeprefix("http://127.0.0.1:8000").replace("engine", "exact")
    # what curl sends with -d, which is no JSON type
    answer = send(ours.port, "POST", path, body.encode(), "Content-Type: application/x-www-form-urlencoded")
    assert len(outputs_of(answer)["label"]) == 2


def test_the_example_for_python_runs(ours: Running) -> None:
    pytest.importorskip("tritonclient.http", reason="tritonclient is not installed; pip install -e '.[dev]'")
    names: dict[str, object] = {}
    code = block("python").replace("127.0.0.1:8000", ours.address).replace('"engine"', '"exact"')
    exec(compile(code, "docs/serving.md", "exec"), names)
    assert names["logits"].shape == (1, 2)  # type: ignore[attr-defined]


def test_every_metric_is_listed_and_no_other(ours: Running) -> None:
    exposed = re.findall(r"^# TYPE (\w+)", send(ours.port, "GET", "/metrics").body.decode(), re.MULTILINE)
    assert set(re.findall(r"`(nxm_\w+)", TEXT)) == {name for name in exposed if not name.endswith("_created")}


def test_every_reason_of_a_rejection_is_listed() -> None:
    assert set(REASONS) <= set(re.findall(r"`(\w+)`", TEXT))


def test_the_options_that_it_names_exist() -> None:
    options = {
        name for each in ("export", "serve", "triton", "bench") for p in main.commands[each].params for name in p.opts
    }
    named = set(re.findall(r"`(--[a-z][a-z0-9-]*)", TEXT))
    assert named - {"--disable-auto-complete-config"} <= options  # which is tritonserver's


def test_the_lines_that_run_nxm_are_understood() -> None:
    lines = re.findall(r"^    nxm (.*?)(?:  #.*)?$", TEXT, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        result = CliRunner().invoke(main, shlex.split(line))
        assert result.exit_code == 1, f"{line}: {result.output}"  # no such engine here; 2 would be wrong usage


def test_the_deployment_of_the_kubernetes_page_is_understood(ours: Running) -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    pod = yaml.safe_load(re.findall(r"^```yaml\n(apiVersion.*?)^```$", text, re.MULTILINE | re.DOTALL)[0])
    spec = pod["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["args"][0] == "nxm"
    result = CliRunner().invoke(main, container["args"][1:])
    assert result.exit_code == 1, result.output  # no such engine here; 2 would be wrong usage
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert send(ours.port, "GET", container[probe]["httpGet"]["path"]).status == 200
    seconds = [
        float(number) for number in re.findall(r"--(?:shutdown-delay-seconds|drain-seconds)=(\d+)", str(container))
    ]
    assert len(seconds) == 2
    assert spec["terminationGracePeriodSeconds"] > sum(seconds)

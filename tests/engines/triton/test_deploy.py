"""Container files beside a repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from engines.serving.repository import EngineSource
from engines.serving.settings import TritonOptions
from engines.triton import export_repository
from engines.triton.deploy import object_name


def test_container_files_are_yaml_and_copy_every_model(plans: list[EngineSource], engine: Path, tmp_path: Path) -> None:
    sources = [*plans, EngineSource("m", "1", engine)]
    export_repository(sources, tmp_path / "repo", TritonOptions(text=True, image="registry.example/triton:1"))
    repository = tmp_path / "repo"
    models = {path.name for path in repository.iterdir() if path.is_dir()}
    docker = (repository / "Dockerfile").read_text()
    assert "\nFROM registry.example/triton:1\n" in docker
    assert {
        line.split()[1] for line in docker.splitlines() if line.startswith("COPY") and "manifest" not in line
    } == models
    assert "tokenizers==" in docker
    service = yaml.safe_load((repository / "compose.yaml").read_text())["services"]["triton"]
    assert service["ports"] == ["127.0.0.1:8000:8000", "127.0.0.1:8001:8001", "127.0.0.1:8002:8002"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    kserve = yaml.safe_load((repository / "kserve.yaml").read_text())
    assert (kserve["apiVersion"], kserve["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    (container,) = kserve["spec"]["predictor"]["containers"]
    assert container["image"] == service["image"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}


@pytest.mark.parametrize("name", ["film", "Film_2", "2-films", "a..b_-c", "v1.", "9" * 128, "a" + "-" * 127, "0_"])
def test_names_are_those_that_kubernetes_and_registries_take(name: str) -> None:
    made = object_name(name)
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", made)  # RFC 1035, of which every name is an image's, too

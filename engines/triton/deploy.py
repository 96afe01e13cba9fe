"""Container files beside a model repository: Dockerfile, compose file, KServe InferenceService.

The image checks the repository against its manifest and the container's TensorRT before Triton starts. JSON is a subset
of YAML, so the Kubernetes file is written without a YAML library, and validated with one in the tests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

_NAME_LENGTH = 40
PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}


def deployment_files(
    name: str, tag: str, models: Sequence[str], image: str, *, text: bool, gpu: bool
) -> dict[str, str]:
    """Files by name for a repository of `models`; `tag` names the image to build."""
    return {
        "Dockerfile": _dockerfile(models, image, text=text),
        ".dockerignore": "compose.yaml\nkserve.yaml\nDockerfile\n",
        "compose.yaml": _yaml(_compose(tag, gpu=gpu)),
        "kserve.yaml": _yaml(_kserve(name, tag, gpu=gpu)),
    }


def object_name(name: str) -> str:
    """A model's name as Kubernetes takes one of a service (RFC 1035, and room for KServe's suffixes), and a registry
    one of an image: lower-case letters, digits and hyphens, with a letter first."""
    word = "".join(c if c.isalnum() else "-" for c in name.lower())
    return (word if word[0].isalpha() else f"model-{word}")[:_NAME_LENGTH].rstrip("-")


def _dockerfile(models: Sequence[str], image: str, *, text: bool) -> str:
    lines = [
        "# Triton with these models. Plans need the TensorRT that built them: manifest.json says which.",
        f"FROM {image}",
    ]
    if text:
        from importlib.metadata import version

        lines.append(f"RUN python3 -m pip install --no-cache-dir tokenizers=={version('tokenizers')}")
    lines.append("COPY manifest.json check_manifest.py /models/")
    lines += [f"COPY {model} /models/{model}" for model in models]
    command = [
        "python3", "/models/check_manifest.py", "/models", "--",
        "tritonserver", "--model-repository=/models", "--disable-auto-complete-config",
    ]  # fmt: skip
    return "\n".join([*lines, f"EXPOSE {' '.join(map(str, PORTS.values()))}", f"CMD {json.dumps(command)}", ""])


def _compose(tag: str, *, gpu: bool) -> dict[str, object]:
    service: dict[str, object] = {
        "build": ".",
        "image": tag,
        "ports": [f"127.0.0.1:{port}:{port}" for port in PORTS.values()],
        "shm_size": "256m",
        "stop_grace_period": "40s",
        "healthcheck": {
            "test": ["CMD", "curl", "-sf", f"http://127.0.0.1:{PORTS['http']}/v2/health/ready"],
            "interval": "10s",
        },
    }
    if gpu:
        device = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    return {"services": {"triton": service}}


def _kserve(name: str, tag: str, *, gpu: bool) -> dict[str, object]:
    container: dict[str, object] = {
        "name": "kserve-container",
        "image": tag,
        "ports": [{"containerPort": PORTS["http"], "protocol": "TCP"}],
        "readinessProbe": {"httpGet": {"path": "/v2/health/ready", "port": PORTS["http"]}},
        "livenessProbe": {"httpGet": {"path": "/v2/health/live", "port": PORTS["http"]}},
    }
    if gpu:
        container["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": object_name(name)},
        "spec": {"predictor": {"containers": [container]}},
    }


def _yaml(value: object, indent: int = 0) -> str:
    """Block YAML of dicts and lists, with scalars as JSON."""
    margin = "  " * indent
    items: list[tuple[str, object]] = []
    if isinstance(value, dict):
        items = [(f"{margin}{key}:", item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(f"{margin}-", item) for item in value]
    text = ""
    for head, item in items:
        if isinstance(item, dict) or (isinstance(item, list) and any(isinstance(i, dict) for i in item)):
            text += f"{head}\n{_yaml(item, indent + 1)}"
        else:
            text += f"{head} {json.dumps(item)}\n"
    return text

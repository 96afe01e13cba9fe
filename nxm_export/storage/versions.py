"""Which versions of which packages made a file."""

from __future__ import annotations

import contextlib
import sys
from importlib.metadata import PackageNotFoundError, version

RECORDED_VERSIONS = (
    "nxm-export",
    "torch",
    "transformers",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "openvino",
)


def installed_versions() -> dict[str, str]:
    """Versions of Python and of those packages, of the ones that matter for a result, that are installed."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in RECORDED_VERSIONS:
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions

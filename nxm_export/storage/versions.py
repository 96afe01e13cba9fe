"""Which versions of which packages made a file."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping
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

# ONNX Runtime comes under more names, of which one is installed.
_OTHER_NAMES = {"onnxruntime": ("onnxruntime-gpu", "onnxruntime-openvino")}

# Of those, the ones that training and export compute with; the others run engines.
MAKERS = ("python", "nxm-export", "torch", "transformers", "onnx")


def installed_versions() -> dict[str, str]:
    """Versions of Python and of those packages, of the ones that matter for a result, that are installed."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in RECORDED_VERSIONS:
        for name in (*_OTHER_NAMES.get(package, ()), package):
            with contextlib.suppress(PackageNotFoundError):
                versions[package] = version(name)
    return versions


def other_versions(made: Mapping[str, str], reference: Mapping[str, str]) -> dict[str, str]:
    """Those of `MAKERS` that made something in another version than `reference` has, with that version."""
    return {
        package: made[package]
        for package in MAKERS
        if package in made and package in reference and made[package] != reference[package]
    }

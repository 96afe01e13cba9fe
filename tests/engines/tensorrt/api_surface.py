"""The API of installed TensorRT bindings as JSON: ``python api_surface.py MODULE OUT [SOURCE]``.

Runs in whatever interpreter has the bindings. They need no GPU for this, and their libraries may be empty stubs:
symbols are looked up when they are called, and nothing is called here. Only classes that we or polygraphy use are
written.
"""

import importlib
import inspect
import json
import os
import re
import sys
from typing import Any

CLASSES = [
    "Builder",
    "BuilderFlag",
    "DataType",
    "DeviceType",
    "Dims",
    "EngineCapability",
    "EngineInspector",
    "ExecutionContextAllocationStrategy",
    "HardwareCompatibilityLevel",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProfiler",
    "IProgressMonitor",
    "ITensor",
    "ITimingCache",
    "LayerInformationFormat",
    "LayerType",
    "Logger",
    "MemoryPoolType",
    "NetworkDefinitionCreationFlag",
    "OnnxParser",
    "OnnxParserFlag",
    "ParserError",
    "PreviewFeature",
    "ProfilingVerbosity",
    "QuantizationFlag",
    "Runtime",
    "RuntimePlatform",
    "TacticSource",
    "TensorIOMode",
    "TilingOptimizationLevel",
    "ComputeCapability",
]


def surface(module: Any) -> dict[str, Any]:
    classes: dict[str, Any] = {}
    for name in CLASSES:
        kind = getattr(module, name, None)
        if kind is None:
            continue
        members = getattr(kind, "__members__", None)
        if members is not None:
            classes[name] = {"enum": {key: int(value) for key, value in members.items()}}
            continue
        methods: dict[str, list[list[str]]] = {}
        properties: list[str] = []
        enums: dict[str, dict[str, int]] = {}
        constants: dict[str, str] = {}
        for attribute in sorted(dir(kind)):
            if attribute.startswith("_") and attribute not in ("__init__", "__getitem__", "__len__", "__iter__"):
                continue
            value: object = inspect.getattr_static(kind, attribute, None)
            if isinstance(value, property):
                properties.append(attribute)
            elif hasattr(value, "__members__") and isinstance(value, type):
                enums[attribute] = {key: int(member) for key, member in getattr(value, "__members__").items()}  # noqa: B009
            elif hasattr(type(value), "__members__"):
                constants[attribute] = type(value).__name__
            elif callable(getattr(kind, attribute)):
                methods[attribute] = signatures(attribute, getattr(kind, attribute).__doc__ or "")
        classes[name] = {"methods": methods, "properties": properties, "enums": enums, "constants": constants}
    return classes


def signatures(name: str, text: str) -> list[list[str]]:
    """Parameters of every overload: names, with a trailing ``=`` where a default exists."""
    overloads = []
    for line in text.splitlines():
        match = re.match(rf"(?:\d+\. )?{re.escape(name)}\((.*)\)(?: ->.*)?$", line.strip())
        if match and match[1] != "*args, **kwargs":
            overloads.append(parameters(match[1]))
    return overloads


def parameters(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text + ","):
        depth += char in "[(<{"
        depth -= char in "])>}"
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    names = [part.split(":")[0].split("=")[0].strip() + ("=" if "=" in part else "") for part in parts if part]
    return [name for name in names if name.rstrip("=") != "self"]


if __name__ == "__main__":
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_GLOBAL)
    bindings = importlib.import_module(sys.argv[1])
    result = {
        "source": sys.argv[3] if len(sys.argv) > 3 else sys.argv[1],
        "version": bindings.__version__,
        "classes": surface(bindings),
    }
    with open(sys.argv[2], "w", encoding="utf-8") as stream:
        json.dump(result, stream, indent=None, separators=(",", ":"), sort_keys=True)
        stream.write("\n")

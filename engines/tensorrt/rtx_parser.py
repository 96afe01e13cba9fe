"""Ask the ONNX parser of the installed TensorRT-RTX about a file: what it refuses, and what it warns of.

In a process of its own, because a file of others may crash it. It builds nothing and needs no GPU. That it takes a file
says nothing of kernels, and little of other versions of TensorRT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from engines.base import module_command
from nxm_export.errors import EngineError, EngineUnavailable
from nxm_export.storage.json_files import convert, parse_json, to_builtins

MODULE = "tensorrt_rtx"
PACKAGE = "tensorrt-rtx-cu13"
_SECONDS = 600  # more than a file of 2 GB takes


@dataclass(frozen=True)
class ParserAnswer:
    """What a `parser` (name and version) reports about a file: it took it, or its errors by node; and its warnings."""

    parser: str
    accepted: bool
    errors: tuple[str, ...]
    warnings: tuple[str, ...]


def ask_parser(onnx: Path) -> ParserAnswer:
    """What the parser reports about a file. Raises `EngineUnavailable` without TensorRT-RTX.

    A parser that crashes, or does not end, has refused the file.
    """
    if find_spec(MODULE) is None:
        raise EngineUnavailable(
            "TensorRT-RTX is not installed, so its parser cannot be asked; pip install 'nxm-export[trt-rtx]', or leave "
            "--parse out"
        )
    name = f"TensorRT-RTX {version(PACKAGE)}"
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as report:
        command = module_command("engines.tensorrt.rtx_parser", str(onnx.resolve()), name, str(writing))
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=(writing,))
        os.close(writing)
        try:
            text = report.read()
            code = child.wait(_SECONDS)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if code or not text:
        return ParserAnswer(name, False, (f"the parser ended with {code} and said nothing",), ())
    source, way_out = "the parser's answer", "leave --parse out"
    value = parse_json(text, source, way_out, EngineError)
    return convert(value, ParserAnswer, source=source, way_out=way_out, error=EngineError)


def _parse(onnx: str, name: str) -> ParserAnswer:
    """In the child."""
    import tensorrt_rtx as trt

    class Log(trt.ILogger):  # type: ignore[misc]  # a class without types
        """Keeps warnings; errors come from the parser."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.warnings: dict[str, None] = {}

        def log(self, severity: object, msg: str) -> None:
            if severity == trt.ILogger.Severity.WARNING:
                self.warnings[msg] = None

    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    accepted = bool(parser.parse_from_file(onnx))
    errors = []
    for error in map(parser.get_error, range(parser.num_errors)):
        where = error.node_name() or error.node_operator() or "the file"
        errors.append(f"{where}: {' '.join(error.desc().split())}")
    if not accepted and not errors:
        errors.append("the file: no reason given")
    return ParserAnswer(name, accepted and not errors, tuple(errors), tuple(log.warnings))


def _main(onnx: str, name: str, descriptor: str) -> int:
    answer = _parse(onnx, name)
    with os.fdopen(int(descriptor), "w", encoding="utf-8") as stream:
        json.dump(to_builtins(answer), stream)
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))

"""Soak `nxm serve` with an engine of yours: load, aborts, garbage, stuck clients and reloads, for minutes.

    python -m tools.benchmarks.soak ENGINE_DIR DATA_FILE [--seconds 600] [--clients 32]

Every answer is compared with what the engine gives for the same sentence alone; a batch may round differently, so
logits may differ by `--tolerance`. Exits with 1 when anything was lost, wrong or grew (see
tools/benchmarks/soak_load.py).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engines.base import backend
from engines.passport import load_passport
from nxm_export.contract.io_spec import load_spec
from nxm_export.data.examples import Examples, encode, load_raw
from nxm_export.data.features import pad
from nxm_export.data.tokenization import load_tokenizer
from tools.benchmarks.servers import nxm_serve
from tools.benchmarks.soak_load import Load, reloads_done, soak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("data")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--reload-every", type=float, default=20.0)
    parser.add_argument("--tolerance", type=float, default=0.5)
    options = parser.parse_args()
    texts = load_raw(options.data, "dev").texts
    expected = reference(options.engine, texts)
    load = Load(
        "/v2/models/m_text/infer",
        [_body(text) for text in texts],
        lambda i, logits: bool(np.abs(logits[0] - expected[i]).max() <= options.tolerance),
        options.clients,
        options.reload_every,
    )
    with tempfile.TemporaryDirectory() as scratch:
        served = Path(shutil.copytree(options.engine, Path(scratch) / "served"))
        arguments = (f"m={served}", "--text", "--watch-seconds", "1", "--read-timeout-ms", "2000")
        with nxm_serve(Path(scratch) / "log", *arguments) as server:
            report = soak(server, served, load, options.seconds)
            reloads = reloads_done(server)
            status = server.stop()
    problems = report.problems(memory_growth=32)
    problems += [f"SIGTERM ended in status {status}"] if status else []
    problems += [f"{reloads['refused']} reloads refused"] if reloads["refused"] else []
    print(json.dumps({**asdict(report), "reloads_done": reloads["done"], "problems": problems}, indent=1))
    sys.exit(1 if problems else 0)


def _body(text: str) -> bytes:
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": [text]}
    return json.dumps({"inputs": [tensor]}).encode()


def reference(engine: Path, texts: list[str]) -> npt.NDArray[np.float32]:
    """The logits of every text, alone."""
    spec = load_spec(engine)
    examples = Examples(texts, None, [0] * len(texts), "reference")
    features = encode(load_tokenizer(engine), examples, spec.max_length, spec.inputs)
    first = next(iter(spec.outputs))
    with backend(load_passport(engine).backend).load(engine) as loaded:
        return np.stack([loaded.run(pad([sample], spec.pad_id))[first][0] for sample in features])


if __name__ == "__main__":
    main()

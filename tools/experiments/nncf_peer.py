"""The strongest CPU peer: OpenVINO's own post-training INT8 model of the dense graph, made by NNCF in its environment.

    NXM_PEERS_PYTHON/bin/python tools/experiments/nncf_peer.py dense/model.onnx batches.npz out/model.xml

`batches.npz` holds calibration inputs, arrays named ``0/input_ids`` and so on. Run by `tools/benchmarks/cpu_engines.py`
in an environment with openvino and nncf; the model that it writes is timed in ours.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import nncf
import numpy as np
import openvino


def main(graph: str, file: str, out: str) -> None:
    """Quantize `graph` with the transformer recipe on the batches of `file`, and write an OpenVINO model to `out`."""
    with np.load(file) as arrays:
        keys = sorted({key.partition("/")[0] for key in arrays}, key=int)
        batches = [{k.partition("/")[2]: arrays[k] for k in arrays if k.partition("/")[0] == key} for key in keys]
    model = openvino.Core().read_model(graph)
    quantized = nncf.quantize(
        model,
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        preset=nncf.QuantizationPreset.PERFORMANCE,
        subset_size=len(batches),
    )
    openvino.save_model(quantized, out, compress_to_fp16=False)
    print(f"nncf {version('nncf')}, openvino {version('openvino')}")


if __name__ == "__main__":
    main(*sys.argv[1:])

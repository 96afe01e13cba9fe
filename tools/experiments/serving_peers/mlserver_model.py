"""An ONNX engine under MLServer, for tools/benchmarks/serving.py; runs in MLServer's own environment."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
from mlserver import MLModel
from mlserver.types import InferenceRequest, InferenceResponse, ResponseOutput


class OrtModel(MLModel):  # type: ignore[misc]  # MLServer is not installed where types are checked
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(os.environ["NXM_MODEL"], options)
        self._pool = ThreadPoolExecutor(int(os.environ["NXM_INSTANCES"]))
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        feeds = {
            item.name: np.array(getattr(item.data, "root", item.data), np.int64).reshape(item.shape)
            for item in payload.inputs
        }
        run = self._session.run
        (logits,) = await asyncio.get_running_loop().run_in_executor(self._pool, run, ["logits"], feeds)
        output = ResponseOutput(name="logits", datatype="FP32", shape=list(logits.shape), data=logits.ravel().tolist())
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=[output])

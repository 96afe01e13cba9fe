"""An ONNX engine under the KServe SDK, for tools/benchmarks/serving.py; runs in the SDK's own environment.

The SDK listens on every address of the machine; there is no option for it.
"""

import asyncio
import os
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse, Model, ModelServer


class OrtModel(Model):  # type: ignore[misc]  # the SDK is not installed where types are checked
    def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(os.environ["NXM_MODEL"], options)
        self._pool = ThreadPoolExecutor(int(os.environ["NXM_INSTANCES"]))
        self.ready = True
        return True

    async def predict(
        self, payload: InferRequest, headers: object = None, response_headers: object = None
    ) -> InferResponse:
        feeds = {item.name: item.as_numpy() for item in payload.inputs}
        run = self._session.run
        (logits,) = await asyncio.get_running_loop().run_in_executor(self._pool, run, ["logits"], feeds)
        output = InferOutput(name="logits", shape=list(logits.shape), datatype="FP32")
        output.set_data_from_numpy(logits, binary_data=False)
        return InferResponse(response_id=payload.id or str(uuid.uuid4()), model_name=self.name, infer_outputs=[output])


if __name__ == "__main__":
    model = OrtModel("m")
    model.load()
    ModelServer(http_port=int(sys.argv[1]), enable_grpc=False, workers=1).start([model])

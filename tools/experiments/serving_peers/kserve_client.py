"""KServe's own client of the Open Inference Protocol against a server; runs in the SDK's own environment.

    python kserve_client.py http://127.0.0.1:8000 MODEL_JSON

Prints what came back as JSON: one entry for each way of asking. ``MODEL_JSON`` has the model's ``name`` and the token
tensors of a request in ``feeds``; with ``texts`` the text model is asked, too.
"""

import asyncio
import json
import sys

import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput


def tensor(name: str, datatype: str, array: np.ndarray, binary: bool) -> InferInput:
    made = InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


async def ask(url: str, name: str, feeds: dict[str, list[list[int]]], texts: list[str]) -> dict[str, object]:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    found: dict[str, object] = {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model ready": await client.is_model_ready(url, name),
        "nobody ready": await client.is_model_ready(url, "nobody"),
    }
    for binary in (False, True):
        tokens = [tensor(key, "INT64", np.array(rows, np.int64), binary) for key, rows in feeds.items()]
        ways: dict[str, dict[str, object]] = {
            "plain": {},
            "outputs": {"request_outputs": [RequestedOutput("logits", {"binary_data": binary})]},
            "parameters": {"parameters": {"binary_data_output": binary}},
        }
        for way, options in ways.items():
            answer = await client.infer(url, InferRequest(name, tokens, **options), model_name=name)
            found[f"{way}, {'binary' if binary else 'json'}"] = answer.outputs[0].as_numpy().tolist()
        words = tensor("text", "BYTES", np.array([[text] for text in texts], object), binary)
        answer = await client.infer(url, InferRequest(f"{name}_text", [words]), model_name=f"{name}_text")
        found[f"labels, {'binary' if binary else 'json'}"] = answer.outputs[0].as_numpy().ravel().tolist()
    try:
        await client.infer(url, InferRequest("nobody", tokens), model_name="nobody")
    except Exception as error:  # httpx's, which is not installed where types are checked
        found["error"] = str(error)
    await client.close()
    return found


if __name__ == "__main__":
    model = json.loads(sys.argv[2])
    print(json.dumps(asyncio.run(ask(sys.argv[1], model["name"], model["feeds"], model["texts"]))))

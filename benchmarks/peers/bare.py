"""The peer that is hard to beat: one starlette endpoint around one ONNX Runtime session, with nothing around it.

No queue, no batch, no deadline, no metrics, no second model, and a crash of the model is a crash of the server.
`/bytes` takes a float32 row as the whole body and gives the output's bytes, with no header to read. Run in a venv of
its own by `python -m uvicorn bare:app`, with MODEL_FILE naming the model. With THREADS = 0 the model runs on the event
loop, which saves two thread switches a request; else on so many threads, which uses more than one core.
"""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime
import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

threads = int(os.environ["THREADS"])
pool = ThreadPoolExecutor(threads) if threads else None
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = options.inter_op_num_threads = 1
session = onnxruntime.InferenceSession(os.environ["MODEL_FILE"], options, providers=["CPUExecutionProvider"])
_, *shape = session.get_inputs()[0].shape


async def infer(x: np.ndarray) -> np.ndarray:
    if pool is None:
        return session.run(None, {"input": x})[0]
    outputs = await asyncio.get_running_loop().run_in_executor(pool, session.run, None, {"input": x})
    return outputs[0]


async def infer_json(request: Request) -> Response:
    tensor = orjson.loads(await request.body())["inputs"][0]
    y = await infer(np.array(tensor["data"], dtype=np.float32).reshape(tensor["shape"]))
    output = {"name": "logits", "datatype": "FP32", "shape": y.shape, "data": y.ravel()}
    answer = orjson.dumps({"model_name": "cnn", "outputs": [output]}, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(answer, media_type="application/json")


async def infer_bytes(request: Request) -> Response:
    y = await infer(np.frombuffer(await request.body(), dtype=np.float32).reshape(-1, *shape))
    return Response(y.tobytes(), media_type="application/octet-stream")


async def ready(request: Request) -> Response:
    return Response()


app = Starlette(
    routes=[
        Route("/v2/models/cnn/infer", infer_json, methods=["POST"]),
        Route("/bytes", infer_bytes, methods=["POST"]),
        Route("/ready", ready),
    ]
)

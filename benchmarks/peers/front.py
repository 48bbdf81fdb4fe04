"""Another HTTP server before millhand's workers, for the ablation: starlette around the same client of the workers.

Any ASGI server runs it, `python -m uvicorn front:app` or `python -m granian --interface asgi front:app`, with
CONTROL_SOCKET naming a running agent's. It knows the two forms that the benchmark sends, and no error.
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from millhand.serving.answer import encode_response
from millhand.serving.inference import read_body
from millhand.serving.routing import Routes

HEADER_LENGTH = "inference-header-content-length"
routes: Routes


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    global routes  # noqa: PLW0603 (it needs the running loop)
    routes = Routes(Path(os.environ["CONTROL_SOCKET"]))
    follower = asyncio.create_task(routes.follow())
    yield
    follower.cancel()
    routes.close()


async def infer(request: Request) -> Response:
    name, body = request.path_params["model"], await request.body()
    length = request.headers.get(HEADER_LENGTH)
    if length is not None:
        return await infer_binary(name, body, int(length))
    wanted = read_body(body)
    answer = await routes.infer(name, "", wanted.tensors, deadline_ms=None, priority=0, wanted=())
    response = encode_response(name, answer.version, wanted, answer.outputs)
    return Response(msgspec.json.encode(response), media_type="application/json")


async def infer_binary(name: str, body: bytes, length: int) -> Response:
    (tensor,) = msgspec.json.decode(memoryview(body)[:length])["inputs"]
    x = np.frombuffer(body, np.float32, offset=length).reshape(tensor["shape"])
    answer = await routes.infer(name, "", {tensor["name"]: x}, deadline_ms=None, priority=0, wanted=())
    outputs = [
        {
            "name": name,
            "datatype": "FP32",
            "shape": list(array.shape),
            "parameters": {"binary_data_size": array.nbytes},
        }
        for name, array in answer.outputs.items()
    ]
    head = msgspec.json.encode({"model_name": name, "model_version": str(answer.version), "outputs": outputs})
    raw = b"".join(array.tobytes() for array in answer.outputs.values())
    return Response(head + raw, headers={HEADER_LENGTH: str(len(head))}, media_type="application/octet-stream")


async def ready(request: Request) -> Response:
    return Response(status_code=200 if routes.ready() else 503)


app = Starlette(
    routes=[Route("/v2/models/{model}/infer", infer, methods=["POST"]), Route("/ready", ready)], lifespan=lifespan
)

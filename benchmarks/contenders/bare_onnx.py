"""The least that a served ONNX model can be: JSON in, onnxruntime, JSON out, over TLS on the HTTP server that ours has.

    python -m contenders.bare_onnx MODEL.onnx CERTIFICATE KEY

Nothing is checked, nobody is asked for a token, nothing is written down or counted; one model, no batches. Prints its
port as one JSON line.
"""

from __future__ import annotations

import json
import socket
import sys

import numpy as np
import onnxruntime
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


def main(graph: str, certificate: str, key: str) -> None:
    """Serve until killed."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]

    async def infer(request: Request) -> Response:
        document = json.loads(await request.body())
        arrays = {
            one["name"]: np.array(one["data"], np.float32).reshape(one["shape"]) for one in document["inputs"]
        }
        found = session.run(names, arrays)
        outputs = [
            {"name": name, "datatype": "FP32", "shape": list(array.shape), "data": array.reshape(-1).tolist()}
            for name, array in zip(names, found, strict=True)
        ]
        answer = {"model_name": "bare", "outputs": outputs}
        return Response(json.dumps(answer).encode(), media_type="application/json")

    app = Starlette(routes=[Route("/v2/models/bare/infer", infer, methods=["POST"])])
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http="httptools", ws="none", lifespan="off", log_config=None, access_log=False, proxy_headers=False,
        server_header=False,
        ssl_certfile=certificate, ssl_keyfile=key,
    )  # fmt: skip
    print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
    uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    main(*sys.argv[1:])

# mypy: ignore-errors
"""Asks a served model through tritonclient, in an environment of its own: its protobuf symbols do not suit ours.

python triton_asks.py REST GRPC ROOT TOKEN MODEL < columns.json > answers.json
"""

import json
import sys

import numpy as np
import tritonclient.grpc as by_grpc
import tritonclient.http as by_http

TYPES = {"FP32": np.float32, "BYTES": np.object_}


def asked(kind, columns):
    found = []
    for name, (datatype, values) in columns.items():
        array = np.array(values, TYPES[datatype]).reshape(-1, 1)
        one = kind.InferInput(name, array.shape, datatype)
        one.set_data_from_numpy(array)
        found.append(one)
    return found


def main(rest, grpc, root, token, model):
    columns = json.load(sys.stdin)
    headers = {"authorization": f"Bearer {token}"}
    found = {}
    with by_http.InferenceServerClient(
        rest, ssl=True, ssl_options={"ca_certs": root}, ssl_context_factory=None, insecure=False
    ) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(model, headers=headers)
        about = client.get_model_metadata(model, headers=headers)
        assert {one["name"] for one in about["inputs"]} == set(columns), about
        assert client.get_model_repository_index(headers=headers)[0]["name"] == model
        for binary in (True, False):
            outputs = [by_http.InferRequestedOutput("probability", binary_data=binary)]
            answer = client.infer(model, asked(by_http, columns), outputs=outputs, headers=headers)
            found[f"http binary={binary}"] = answer.as_numpy("probability").tolist()
            found["version"] = answer.get_response()["model_version"]
    headers = {"authorization": f"Bearer {token}"}  # the HTTP client adds its own to it
    with by_grpc.InferenceServerClient(grpc, ssl=True, root_certificates=root) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(model, headers=headers)
        about = client.get_model_metadata(model, headers=headers)
        assert [(one.name, list(one.shape)) for one in about.outputs] == [("probability", [-1, 2])]
        answer = client.infer(model, asked(by_grpc, columns), headers=headers, request_id="mine")
        assert answer.get_response().id == "mine"
        found["grpc"] = answer.as_numpy("probability").tolist()
        try:
            client.infer(model, asked(by_grpc, columns)[:1], headers=headers)
        except by_grpc.InferenceServerException as error:
            found["refused"] = error.status()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""A model served by the real program over TLS: right answers, clear refusals, promotions that lose nothing."""

import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peers import triton
from served import COMMAND, Serving, serving

from consortium.server import seal
from consortium.server.model import load_model
from consortium.server.serving.registry import Registry
from consortium.server.serving.rpc_messages import MESSAGES, SERVICE

INFER = "/v2/models/toy/infer"


def model_of(path: Path) -> str:
    return str(load_model(path).contract["model"])


def variant(exported: Path, folder: Path, number: int) -> Path:
    """A bundle that differs in its card alone, so that versions can be told apart."""
    import hashlib

    copy = shutil.copytree(exported, folder / f"variant-{number}")
    card = copy / "MODEL_CARD.md"
    card.write_text(f"{card.read_text()}\nVariant {number}.\n")
    files = json.loads((copy / "manifest.json").read_bytes())["files"]
    files["MODEL_CARD.md"] = hashlib.sha256(card.read_bytes()).hexdigest()
    (copy / "manifest.json").write_bytes(seal.manifest(files, None))
    return copy


@pytest.fixture(scope="module")
def registry(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    found = Registry(folder / "models", time.time, "tester")
    for number in (1, 2):
        found.register(variant(exported, folder, number), "toy", model_of)
    found.promote("toy", 1)
    return found


@pytest.fixture(scope="module")
def served(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(registry.folder, tmp_path_factory.mktemp("serving") / "serving", "--unsigned") as one:
        yield one


def columns(frame: Any) -> dict[str, tuple[str, list[Any]]]:
    """Rows within the contract, by input: datatype and JSON values, null where a number is missing."""
    numbers = {
        name: [None if np.isnan(v) else float(v) for v in frame[name].clip(low, high)]
        for name, low, high in (("linear", 0, 200), ("cat", -5, 5))
    }
    codes = [code if code in ("no", "yes", "2") else "" for code in frame["smokes?"]]
    return {name: ("FP32", values) for name, values in numbers.items()} | {"smokes?": ("BYTES", codes)}


def document(frame: Any) -> dict[str, Any]:
    return {
        "inputs": [
            {"name": name, "datatype": datatype, "shape": [len(values), 1], "data": values}
            for name, (datatype, values) in columns(frame).items()
        ]
    }


def probabilities(answer: Any) -> Any:
    (output,) = answer["outputs"]
    return np.array(output["data"]).reshape(output["shape"])


def test_curl_gets_what_torch_says(served: Serving, finished: Any, rows: Any, tmp_path: Path) -> None:
    """The model's answers to 60 raw rows through curl are PyTorch's within 1e-5, with version, digests and an id."""
    frame = rows(60, seed=3)
    (tmp_path / "request.json").write_text(json.dumps(document(frame)))
    done = subprocess.run(
        [
            "curl", "-sS", "--fail-with-body", "--cacert", served.root,
            "-H", f"Authorization: Bearer {served.tokens['caller']}",
            "-d", f"@{tmp_path / 'request.json'}", f"https://{served.rest[0]}:{served.rest[1]}{INFER}",
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    answer = json.loads(done.stdout)
    expected = finished.reference(frame)
    assert expected.std(0).min() > 0.05, "the rows must differ for this to say anything"
    np.testing.assert_allclose(probabilities(answer), expected, rtol=0, atol=1e-5)
    assert (answer["model_name"], answer["model_version"]) == ("toy", "1")
    assert answer["parameters"]["model_digest"] == finished.outcome.digest
    assert len(answer["parameters"]["bundle_digest"]) == 64
    assert answer["parameters"]["prediction_id"].startswith("1-")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tritonclient_gets_what_torch_says(
    served: Serving, finished: Any, rows: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A client that knows nothing of us, over HTTP (binary and JSON) and gRPC, in its own process."""
    frame = rows(40, seed=4)
    given = {
        name: (kind, [float("nan") if value is None else value for value in values])
        for name, (kind, values) in columns(frame).items()
    }
    host, port = served.rest
    done = subprocess.run(
        [
            triton(tmp_path_factory.mktemp("triton") / "venv"),
            Path(__file__).parents[1] / "support" / "triton_asks.py", f"{host}:{port}",
            served.grpc, served.root, served.tokens["caller"], "toy",
        ],
        input=json.dumps(given), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("version") == "1"
    assert found.pop("refused") == "StatusCode.INVALID_ARGUMENT"
    assert set(found) == {"http binary=True", "http binary=False", "grpc"}
    for way, answer in found.items():
        np.testing.assert_allclose(answer, finished.reference(frame), rtol=0, atol=1e-5, err_msg=way)


class Rpc:
    """Plain gRPC calls of bytes."""

    def __init__(self, served: Serving) -> None:
        trusted = grpc.ssl_channel_credentials(served.root.read_bytes())
        self._channel = grpc.secure_channel(served.grpc, trusted)
        self._token = served.tokens["caller"]

    def call(self, method: str, content: bytes, token: str | None = None) -> Any:
        """The answer's bytes, or the status code."""
        token = self._token if token is None else token
        metadata = [("authorization", f"Bearer {token}")] if token else []
        try:
            return self._channel.unary_unary(f"/{SERVICE}/{method}")(content, timeout=20, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()


def rpc_request(frame: Any) -> Any:
    request = MESSAGES["ModelInferRequest"](model_name="toy")
    for name, (datatype, values) in columns(frame).items():
        one = request.inputs.add(name=name, datatype=datatype, shape=[len(values), 1])
        if datatype == "BYTES":
            one.contents.bytes_contents.extend(value.encode() for value in values)
        else:
            one.contents.fp32_contents.extend(float("nan") if value is None else value for value in values)
    return request


def test_grpc_by_fields(served: Serving, finished: Any, rows: Any) -> None:
    """Contents by field give the same, tokens are asked for, and what is no message or model has its status."""
    rpc, frame = Rpc(served), rows(10, seed=5)
    content = rpc_request(frame).SerializeToString()
    answer = MESSAGES["ModelInferResponse"].FromString(rpc.call("ModelInfer", content))
    found = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(answer.outputs[0].shape)
    np.testing.assert_allclose(found, finished.reference(frame), rtol=0, atol=1e-5)
    assert answer.parameters["prediction_id"].string_param.startswith("1-")
    for text in ("", "x" * 43):
        assert rpc.call("ModelInfer", content, text) == grpc.StatusCode.UNAUTHENTICATED
    monitor = served.tokens["monitor"]
    assert rpc.call("ModelInfer", content, monitor) == grpc.StatusCode.PERMISSION_DENIED
    assert rpc.call("ModelInfer", b"\xff\xff") == grpc.StatusCode.INVALID_ARGUMENT
    assert rpc.call("ModelReady", MESSAGES["ModelReadyRequest"](name="x").SerializeToString()) == (
        grpc.StatusCode.NOT_FOUND
    )
    assert rpc.call("Nothing", b"") == grpc.StatusCode.UNIMPLEMENTED


def test_the_images_health_check_is_answered(served: Serving) -> None:
    """Whichever certificate is shown: it reads no file of the program's folder, where there may be none."""
    file = Path(__file__).resolve().parents[2] / "Containerfile"
    if not file.exists():
        pytest.skip("only the installed package is here")
    (text,) = re.findall(r"^HEALTHCHECK .*CMD (.*python.*)$", file.read_text(), re.M)
    _, _, program = json.loads(text)
    for port, code in ((served.rest[1], 0), (1, 1)):
        done = subprocess.run(
            [sys.executable, "-c", program.replace(":8443/", f":{port}/")],
            check=False,
            stderr=subprocess.PIPE,
        )
        assert done.returncode == code, done.stderr


def test_every_right_is_asked_for(served: Serving) -> None:
    """Probes and the page are open; nothing else is without a token, and a role gets its own alone."""
    opened = {"/", "/v2", "/v2/health/live", "/v2/health/ready"}
    toy = "/v2/models/toy"
    rights = {
        ("GET", toy): {"caller", "monitor", "admin"},
        ("GET", toy + "/ready"): {"caller", "monitor", "admin"},
        ("GET", toy + "/contract"): {"caller", "monitor", "admin"},
        ("POST", "/v2/repository/index"): {"caller", "monitor", "admin"},
        ("GET", toy + "/lineage"): {"monitor", "admin"},
        ("GET", "/metrics"): {"monitor", "admin"},
        ("POST", toy + "/infer"): {"caller", "admin"},
        ("POST", toy + "/feedback"): {"caller", "admin"},
    }
    for path in opened:
        assert served.ask("GET", path, role="")[0] == 200
    for (method, path), roles in rights.items():
        body = b"{}" if method == "POST" else None
        assert served.ask(method, path, body, role="")[0] == 401, path
        assert served.ask(method, path, body, {"Authorization": "Bearer nonsense"}, role="")[0] == 401, path
        for role in ("caller", "monitor", "admin"):
            status = served.ask(method, path, body, role=role)[0]
            assert (status == 403) == (role not in roles), (path, role, status)
    page = served.ask("GET", "/", role="")
    assert "script-src 'sha256-" in page[1]["content-security-policy"]
    assert b"A model, served" in page[2]


def test_lineage_and_feedback(served: Serving, rows: Any, finished: Any) -> None:
    """The lineage of what is live; labels for predictions made here, of a known class, and for no others."""
    status, lineage = served.get("/v2/models/toy/lineage")
    assert (status, lineage["version"], lineage["model"]) == (200, "1", finished.outcome.digest)
    answer = served.post(INFER, document(rows(3)))[1]
    label = {"prediction": answer["parameters"]["prediction_id"], "row": 2, "label": "1"}
    assert served.post("/v2/models/toy/feedback", label)[0] == 200
    forged = label["prediction"][:-1] + ("0" if label["prediction"][-1] != "0" else "1")
    for wrong in (
        {"prediction": forged}, {"prediction": "2" + label["prediction"][1:]}, {"label": "ill"}, {"row": -1},
        {"age": 40}, {"prediction": 7}, {"prediction": "\ud800"}, {"label": None},
    ):  # fmt: skip
        assert served.post("/v2/models/toy/feedback", {**label, **wrong})[0] == 400, wrong
    kept = next((served.folder / "records").glob("feedback-*.jsonl")).read_text().splitlines()
    assert len(kept) == 1
    assert json.loads(kept[0])["label"] == "1"


def test_audit_says_who_asked_and_holds_no_feature(served: Serving, rows: Any) -> None:
    """Every prediction and refusal has a line with caller, version and rows; no value of a row is in the records."""
    frame = rows(2).assign(linear=[123.456, 98.7654])
    assert served.post(INFER, document(frame), role="caller")[0] == 200
    bad = document(frame)
    bad["inputs"][0]["data"] = [1234.5, 1.0]
    assert served.post(INFER, bad, role="caller")[0] == 400
    text = next((served.folder / "records").glob("audit-*.jsonl")).read_text()
    first, second = (json.loads(line) for line in text.splitlines()[-2:])
    assert (first["caller"], first["version"], first["rows"], first["status"]) == ("caller", "1", 2, "ok")
    assert (second["caller"], second["status"]) == ("caller", 400)
    assert not any(value in text for value in ("123.4", "98.7", "1234.5", "smokes"))
    metrics = served.ask("GET", "/metrics")[2].decode()
    assert 'consortium_model_requests_total{door="rest",model="toy",status="200",version="1"}' in metrics
    assert 'consortium_model_live{digest="' in metrics


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["inputs"].pop(), "'smokes?': is missing; BYTES [-1, 1] is expected"),
        (lambda d: d["inputs"][0].update(data=[300.0, 1.0]), "'linear': is 300 in row 1; 0 to 200 is the declared"),
        (lambda d: d["inputs"][2].update(data=["often", "no"]), "is 'often' in row 1; one of 'no', 'yes', '2' is"),
        (lambda d: d["inputs"][0].update(shape=[3, 1]), "has 2 values; its shape says 3"),
        (lambda d: d["inputs"][0].update(data=[float("nan"), 1.0]), "the body holds NaN, which JSON has not"),
        (lambda d: d.update(outputs=[{"name": "odds"}]), "output 'odds': the model has none such"),
    ],
)  # fmt: skip
def test_refusals_say_what_is_wrong(served: Serving, rows: Any, change: Any, reason: str) -> None:
    """400, with the input and the row."""
    asked = document(rows(2))
    change(asked)
    status, answer = served.post(INFER, asked)
    assert status == 400
    assert reason in answer["error"]


def test_requests_that_are_no_predictions(served: Serving) -> None:
    """Wrong paths, methods, sizes and encodings get 4xx of their own; a huge body is not read."""
    assert served.get("/v2/models/toi")[0] == 404
    assert served.get("/v2/models/toy/versions/9")[0] == 404
    assert served.ask("GET", INFER)[0] == 405
    assert served.ask("GET", "/v2/../etc/passwd")[0] == 404
    assert served.ask("POST", INFER, b"{}", {"Content-Encoding": "gzip"})[0] == 415
    assert served.ask("POST", INFER, b"{}", {"Content-Length": str(1 << 40)})[0] == 413
    chunked = served.connection()
    chunked.putrequest("POST", INFER)
    chunked.putheader("Authorization", f"Bearer {served.tokens['caller']}")
    chunked.putheader("Transfer-Encoding", "chunked")
    chunked.endheaders()
    try:
        for _ in range(40):
            chunked.send(b"100000\r\n" + b"x" * (1 << 20) + b"\r\n")
        assert chunked.getresponse().status == 413
    except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
        pass  # it answered and closed while we still sent
    chunked.close()
    assert served.get("/v2/health/ready")[0] == 200


def test_slow_heads_are_cut_off(served: Serving) -> None:
    """A connection that never ends its head, or a head without end, is closed; others are answered meanwhile."""
    context = ssl.create_default_context(cafile=str(served.root))
    with (
        socket.create_connection(served.rest) as plain,
        context.wrap_socket(plain, server_hostname=served.rest[0]) as line,
    ):
        line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        line.settimeout(15)
        started = time.monotonic()
        assert served.get("/v2/health/live")[0] == 200
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            assert line.recv(1) == b""
        assert 5 < time.monotonic() - started < 14
    with (
        socket.create_connection(served.rest) as plain,
        context.wrap_socket(plain, server_hostname=served.rest[0]) as line,
    ):
        line.settimeout(15)
        with pytest.raises((ConnectionError, ssl.SSLError)):  # noqa: PT012 - whichever write is the first to fail
            line.sendall(b"GET / HTTP/1.1\r\n")
            for _ in range(1000):
                line.sendall(b"x: " + b"y" * 4000 + b"\r\n")
            if line.recv(1) == b"":
                raise ConnectionError
    assert served.get("/v2/health/live")[0] == 200


MUTATION = st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6))


@settings(
    max_examples=int(os.environ.get("CONSORTIUM_FUZZ", "400")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(MUTATION, max_size=5),
    st.sampled_from(["/infer", "/versions/1/infer", "/versions/\u00e9/infer", "/feedback"]),
    st.none() | st.integers(-1, 900).map(str) | st.text("0123456789 -+.xé", max_size=5),
    st.sampled_from(["application/json", "text/plain", ""]),
)
def test_malformed_requests_get_4xx(
    served: Serving, rows: Any, mutations: list[Any], path: str, length: str | None, kind: str
) -> None:
    """A right request with bytes changed, cut or put in anywhere, under any header: 200 or 4xx, never 5xx."""
    body = bytearray(json.dumps(document(rows(2))).encode())
    for at, new, cut in mutations:
        place = int(at * len(body))
        body[place : place + cut] = new
    headers = {"Content-Type": kind} if kind else {}
    if length is not None:
        headers["Inference-Header-Content-Length"] = length.encode("latin-1", "ignore").decode("latin-1")
    from urllib.parse import quote

    status, _, content = served.ask("POST", quote("/v2/models/toy" + path), bytes(body), headers)
    assert status == 200 or 400 <= status < 500, (status, content)
    assert status == 200 or json.loads(content)["error"]


@settings(
    max_examples=int(os.environ.get("CONSORTIUM_FUZZ", "200")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(MUTATION, min_size=1, max_size=5), st.sampled_from(["ModelInfer", "ModelMetadata", "ServerLive"])
)
def test_malformed_messages_are_the_callers_mistake(
    served: Serving, rows: Any, mutations: list[Any], method: str
) -> None:
    """Over gRPC: OK, INVALID_ARGUMENT or NOT_FOUND, never INTERNAL or UNKNOWN."""
    body = bytearray(rpc_request(rows(2)).SerializeToString())
    for at, new, cut in mutations:
        place = int(at * len(body))
        body[place : place + cut] = new
    found = _rpc(served).call(method, bytes(body))
    assert isinstance(found, bytes) or found in (
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
    ), found


_CALLS: dict[str, Rpc] = {}


def _rpc(served: Serving) -> Rpc:
    return _CALLS.setdefault(served.grpc, Rpc(served))


def test_promotion_and_rollback_lose_no_request(exported: Path, rows: Any, tmp_path: Path) -> None:
    """Under load from several connections: every answer is 200 and of a version that was champion; each change shows
    within a second, and a withdrawal stops the answers."""
    registry = Registry(tmp_path / "models", time.time, "tester")
    for number in (1, 2):
        registry.register(variant(exported, tmp_path, number), "toy", model_of)
    registry.promote("toy", 1)
    body = json.dumps(document(rows(4))).encode()
    seen: list[tuple[float, int, str]] = []
    ended = threading.Event()

    def load(one: Serving) -> None:
        line = one.connection()
        while not ended.is_set():
            line.request("POST", INFER, body, {"Authorization": f"Bearer {one.tokens['caller']}"})
            answer = line.getresponse()
            found = json.loads(answer.read())
            seen.append((time.monotonic(), answer.status, found.get("model_version", "")))
        line.close()

    with serving(registry.folder, tmp_path / "serving", "--unsigned") as one:
        threads = [threading.Thread(target=load, args=(one,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        changes = []
        try:
            for version in ("2", "1", "2", "1"):
                time.sleep(0.7)
                registry.promote("toy", int(version)) if version == "2" else registry.rollback("toy")
                changes.append((time.monotonic(), version))
            time.sleep(1.2)
        finally:
            ended.set()
            for thread in threads:
                thread.join(20)
        assert {status for _, status, _ in seen} == {200}
        assert len(seen) > 200
        for at, version in changes:
            until = next((when for when, _ in changes if when > at), at + 9) - 0.01
            after = [found for when, _, found in sorted(seen) if at + 1 <= when < until]
            late = [when for when, _, found in seen if found == version and at <= when < until]
            assert min(late) - at < 1
            assert set(after) <= {version}
        registry.withdraw("toy", 1, "wrong units")
        time.sleep(1)
        status, answer = one.post(INFER, document(rows(1)))
        assert (status, "no version is served" in answer["error"]) == (404, True)
        assert one.ask("GET", "/v2/health/ready", role="")[0] == 503


_BARE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "flwr", "onnx", "onnxscript", "sklearn", "pandas", "consortium.client"}:
            raise SystemExit(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
from consortium.protocol.cli import main
main()
"""


@pytest.mark.slow
def test_serving_needs_onnxruntime_alone_and_little_memory(exported: Path, rows: Any, tmp_path: Path) -> None:
    """In a process that ends where torch, Flower or pandas are imported: a thousand answers, then under 200 MB."""
    program = (sys.executable, "-c", _BARE)
    with serving(exported, tmp_path / "serving", "--unsigned", program=program) as one:
        for _ in range(500):
            assert one.post(INFER, document(rows(1)))[0] == 200
        before = one.memory()
        for _ in range(500):
            assert one.post(INFER, document(rows(1)))[0] == 200
        assert one.memory() < 200e6
        assert one.memory() - before < 5e6


def test_what_nobody_trusted_signed_is_not_served(exported: Path, tmp_path: Path) -> None:
    """Without --unsigned a simulation's model is refused, as is a changed one: exit 4; without tokens: exit 3."""
    copy = shutil.copytree(exported, tmp_path / "model")

    def exit_of(*options: object) -> tuple[int, str]:
        done = subprocess.run(
            [COMMAND, "model", "serve", copy, "--dir", tmp_path / "s", "--port", "0", *map(str, options)],
            capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr

    code, said = exit_of()
    assert (code, "add --unsigned" in said) == (4, True)
    code, said = exit_of("--unsigned")
    assert (code, "consortium model token NAME" in said) == (3, True)
    (copy / "contract.json").write_bytes((copy / "contract.json").read_bytes() + b" ")
    code, said = exit_of("--unsigned")
    assert (code, "contract.json" in said) == (4, True)


def test_callers_show_certificates_when_asked(exported: Path, rows: Any, tmp_path: Path) -> None:
    """With --client-ca neither door talks to who has no certificate by it; with one, the token still counts."""
    from consortium.protocol import credentials
    from consortium.server import pki

    now = time.time()
    root_key, key = pki.new_key(), pki.new_key()
    root = pki.root(root_key, "callers", now)
    leaf = pki.site_leaf(key.public_key(), pki.Authority(root_key, root), "callers", "ward", now)
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = leaf.chain.encode()
    (tmp_path / "ca.pem").write_bytes(credentials.pem([root]))
    (tmp_path / "caller.pem").write_bytes(private + chain)
    with serving(
        exported, tmp_path / "s" / "serving", "--unsigned", "--client-ca", tmp_path / "ca.pem"
    ) as one:
        with pytest.raises((ssl.SSLError, ConnectionError, OSError)):
            one.get("/v2")
        trusted = one.root.read_bytes()
        live = MESSAGES["ServerLiveRequest"]().SerializeToString()
        for pair, right in (((None, None), False), ((private, chain), True)):
            channel = grpc.secure_channel(one.grpc, grpc.ssl_channel_credentials(trusted, *pair))
            call = channel.unary_unary(f"/{SERVICE}/ServerLive")
            if right:
                assert MESSAGES["ServerLiveResponse"].FromString(call(live, timeout=10)).live
            else:
                with pytest.raises(grpc.RpcError):
                    call(live, timeout=5)
            channel.close()
        context = ssl.create_default_context(cafile=str(one.root))
        context.load_cert_chain(tmp_path / "caller.pem")
        import http.client

        line = http.client.HTTPSConnection(*one.rest, timeout=20, context=context)
        line.request("GET", "/v2")
        answer = line.getresponse()
        assert (answer.status, answer.read()[:1]) == (200, b"{")
        line.request("GET", "/metrics")
        assert line.getresponse().status == 401
        line.close()

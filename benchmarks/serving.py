"""A served model beside bare onnxruntime on the same HTTP server: latency, throughput, memory, promotions under load.

    python benchmarks/serving.py [--quick] [--json] [--seconds N]

One model (ten columns, the demonstration's), JSON over TLS 1.3, load from a process of its own. Ours checks every input
against the contract, asks for a token, writes an audit line, counts, batches and follows a registry; the other
(`contenders/bare_onnx.py`) does none of it. p50 is that of one connection, throughput that of eight; they take turns.
Then, under the load of four connections, the champion is changed again and again: nothing may be lost, and the time is
that from the command's end to the first answer of the new version.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from http.client import HTTPSConnection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from report import Row, Target, emit

from consortium.protocol.study import Study
from consortium.server import seal
from consortium.server.export import export
from consortium.server.model import load_model
from consortium.server.records import Plan
from consortium.server.serving import tokens
from consortium.server.serving.registry import Registry
from consortium.simulations import simulate
from consortium.simulations.hospitals import study_of, write_hospitals
from consortium.simulations.sites import gather
from consortium.strategies.chosen import strategy_of

HERE = Path(__file__).resolve().parent
COMMAND = Path(sys.executable).with_name("consortium")


def exported(folder: Path) -> Path:
    """The bundle of a short simulation."""
    study: Study = study_of(1)
    sites = write_hospitals(folder / "sites", 2)
    result = simulate(study, sites=gather(study, list(sites.values())).sources)
    plan = Plan(study, strategy_of(study), result.layout, result.outcome.model, prepares=True)
    return export(plan, result.outcome, folder / "model").path


def filled(bundle: Path, folder: Path) -> Registry:
    """A registry of two versions that differ in their card alone."""
    registry = Registry(folder / "models", time.time, "benchmark")
    for number in (1, 2):
        copy = shutil.copytree(bundle, folder / f"version-{number}")
        card = copy / "MODEL_CARD.md"
        card.write_text(f"{card.read_text()}\nCopy {number}.\n")
        files = json.loads((copy / "manifest.json").read_bytes())["files"]
        files["MODEL_CARD.md"] = hashlib.sha256(card.read_bytes()).hexdigest()
        (copy / "manifest.json").write_bytes(seal.manifest(files, None))
        registry.register(copy, "demo", lambda path: str(load_model(path).contract["model"]))
    registry.promote("demo", 1)
    return registry


class Served:
    """A program that serves, its port, and the path of its predictions."""

    def __init__(self, name: str, arguments: Sequence[object], path: str, root: Path, token: str) -> None:
        self.name, self.path, self.root, self.token = name, path, root, token
        self.process = subprocess.Popen(
            list(map(str, arguments)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=HERE
        )
        assert self.process.stdout is not None
        about = json.loads(self.process.stdout.readline())
        self.port = int(about.get("port") or about["rest"].rsplit(":", 1)[1])

    def load(self, body: bytes, connections: int, seconds: float) -> dict[str, Any]:
        """What `contenders/http_load.py` found."""
        done = subprocess.run(
            [
                sys.executable, "-m", "contenders.http_load", str(self.port), str(self.root), self.path, self.token,
                str(connections), str(seconds),
            ],
            input=body, capture_output=True, check=True, cwd=HERE,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def memory(self) -> float:
        """Resident memory, MB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000

    def processor(self) -> float:
        """Seconds of processor time that it has had: what a request costs, whatever else the machine does."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)


def requested(bundle: Path, rows: int) -> bytes:
    """A request of so many rows within the contract."""
    rng = np.random.default_rng(0)
    inputs = [
        {
            "name": one["name"],
            "datatype": "FP32",
            "shape": [rows, 1],
            "data": rng.uniform(one["min"], one["max"], rows).tolist(),
        }
        for one in load_model(bundle).contract["inputs"]
    ]
    return json.dumps({"inputs": inputs}).encode()


def switched(
    ours: Served, registry: Registry, body: bytes, changes: int, pause: float
) -> tuple[list[float], Any]:
    """Seconds from each change of champion to the first answer by it, and what the load under it saw."""
    took: list[float] = []
    found: dict[str, Any] = {}
    seconds = changes * pause + 1
    load = threading.Thread(target=lambda: found.update(ours.load(body, 4, seconds)))
    load.start()
    line = HTTPSConnection("127.0.0.1", ours.port, context=ssl.create_default_context(cafile=str(ours.root)))
    for number in range(changes):
        time.sleep(pause)
        version = "2" if number % 2 == 0 else "1"
        registry.promote("demo", 2) if version == "2" else registry.rollback("demo")
        started = time.perf_counter()
        while True:
            line.request("POST", ours.path, body, {"Authorization": f"Bearer {ours.token}"})
            if json.loads(line.getresponse().read())["model_version"] == version:
                break
        took.append(time.perf_counter() - started)
    load.join()
    line.close()
    return took, found["seen"]


def measure(folder: Path, seconds: float, turns: int) -> tuple[list[Row], list[Target]]:
    """Rows and targets."""
    bundle = exported(folder)
    registry = filled(bundle, folder)
    bare, ours = _served(folder, bundle, registry)
    try:
        rows, targets = [], []
        ours.load(requested(bundle, 100), 8, 1)
        before = ours.memory()
        for count in (1, 100):
            found, reached = _beside(bare, ours, requested(bundle, count), count, seconds, turns)
            rows += found
            targets += reached
        grown = ours.memory() - before
        targets.append(Target(f"memory grown in {4 * turns * seconds:g} s of load, MB", grown, "<=", 5.0))
        found, reached = _changing(ours, registry, requested(bundle, 1), seconds)
        return rows + found, targets + reached
    finally:
        ours.end()
        bare.end()


def _served(folder: Path, bundle: Path, registry: Registry) -> tuple[Served, Served]:
    """The two programs, started."""
    own = folder / "serving"
    token = tokens.new(own, "load", "caller")
    ours = Served(
        "ours",
        [
            COMMAND, "model", "serve", registry.folder, "--dir", own, "--port", 0, "--grpc-port", -1, "--unsigned",
            "--json",
        ],
        "/v2/models/demo/infer", own / "root.pem", token,
    )  # fmt: skip
    certificate, key = _pair(folder)
    bare = Served(
        "bare",
        [sys.executable, "-m", "contenders.bare_onnx", bundle / "model.onnx", certificate, key],
        "/v2/models/bare/infer", folder / "bare-root.pem", token,
    )  # fmt: skip
    return bare, ours


def _beside(
    bare: Served, ours: Served, body: bytes, count: int, seconds: float, turns: int
) -> tuple[list[Row], list[Target]]:
    """One request on both: seconds of one connection, requests a second of eight, and of the processor's time."""
    alone: dict[str, list[float]] = {"bare": [], "ours": []}
    rate: dict[str, list[float]] = {"bare": [], "ours": []}
    work: dict[str, list[float]] = {"bare": [], "ours": []}
    for one in (bare, ours):
        one.load(body, 8, 1)  # to warm up
    for _ in range(turns):
        for one in (bare, ours):
            alone[one.name] += _times(one.load(body, 1, seconds))
            before = one.processor()
            done = len(_times(one.load(body, 8, seconds)))
            rate[one.name].append(done / seconds)
            work[one.name].append(done / (one.processor() - before))
    what = f"{count} row{'s' if count > 1 else ''}"
    rows = [Row.of(f"{name}, {what}, one connection", alone[name]) for name in alone]
    for each, unit in ((rate, "req/s"), (work, "req/cpu s")):
        rows += [
            Row(f"{name}, {what}, eight connections", median(some), min(some), max(some), unit)
            for name, some in each.items()
        ]
    targets = [
        Target(f"p50 over bare, {what}", median(alone["ours"]) / median(alone["bare"]), "<=", 1.3),
        Target(f"throughput over bare, {what}", median(rate["ours"]) / median(rate["bare"]), ">=", 0.8),
        Target(
            f"throughput a processor second over bare, {what}",
            median(work["ours"]) / median(work["bare"]), ">=", 0.8,
        ),
    ]  # fmt: skip
    return rows, targets


def _changing(
    ours: Served, registry: Registry, body: bytes, seconds: float
) -> tuple[list[Row], list[Target]]:
    """Promotions and rollbacks under load, and the memory that they, and the load, leave."""
    before = ours.memory()
    took, seen = switched(ours, registry, body, 6, max(seconds / 3, 0.5))
    lost = sum(number for status, number in seen.items() if status not in ("200", "version 1", "version 2"))
    rows = [Row.of("promote or rollback under load", took, peak_mb=ours.memory())]
    return rows, [
        Target("slowest promote or rollback, s", max(took), "<=", 1.0),
        Target("requests lost to it", float(lost), "<=", 0.0),
        Target("memory, MB", ours.memory(), "<=", 200.0),
        Target("memory grown by promotions, MB", ours.memory() - before, "<=", 10.0),
    ]


def _times(found: dict[str, Any]) -> list[float]:
    wrong = {status: number for status, number in found["seen"].items() if status[0] in "45l"}
    assert not wrong, wrong
    return list(found["times"])


def _pair(folder: Path) -> tuple[Path, Path]:
    """A certificate and its key, for the bare server."""
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    from consortium.protocol import credentials
    from consortium.server import pki

    now = time.time()
    root_key, key = pki.new_key(), pki.new_key()
    root = pki.root(root_key, "bare", now)
    leaf = pki.server_leaf(key.public_key(), pki.Authority(root_key, root), "bare", "127.0.0.1", now)
    (folder / "bare-root.pem").write_bytes(credentials.pem([root]))
    (folder / "bare.pem").write_bytes(credentials.pem([leaf]))
    (folder / "bare.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return folder / "bare.pem", folder / "bare.key"


def main() -> None:
    """Like every benchmark here, it reports what was reached and asserts nothing: times are the machine's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a third of a second a measurement; says little")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="consortium-serving-") as name:
        rows, targets = measure(Path(name), 0.3 if given.quick else given.seconds, 1 if given.quick else 3)
    emit(rows, targets, given.json)


if __name__ == "__main__":
    main()

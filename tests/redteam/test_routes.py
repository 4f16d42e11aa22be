"""What the doors of a running federation answer beside their own routes, and where else its processes listen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from attacker import Line, Said, blind
from listening import listening
from realm import Actor, Realm

FLOWER = (
    "/v1/control/start-run", "/v1/control/stream-logs", "/v1/control/list-runs", "/v1/control/stop-run",
    "/v1/control/create-federation", "/v1/control/register-supernode",
    "/v1/fleet/register-node", "/v1/fleet/activate-node", "/v1/fleet/deactivate-node", "/v1/fleet/pull-messages",
    "/v1/fleet/push-messages", "/v1/fleet/send-node-heartbeat", "/v1/fleet/get-run", "/v1/fleet/get-fab",
    "/v1/fleet/push-object", "/v1/fleet/pull-object", "/v1/fleet/confirm-message-received",
    "/v1/runtime/list-apps-to-launch", "/v1/runtime/request-token", "/v1/runtime/pull-app-inputs",
    "/v1/runtime/push-app-outputs", "/v1/runtime/send-app-heartbeat", "/v1/runtime/push-log",
    "/api/v0/fleet/create-node", "/api/v0/fleet/pull-messages", "/api/v0/fleet/push-messages",
    "/flwr.proto.Control/StartRun", "/flwr.proto.Control/GetAuthTokens", "/flwr.proto.Exec/StartRun",
    "/flwr.proto.Fleet/PullMessages", "/flwr.proto.Fleet/PushMessages", "/flwr.proto.Fleet/RegisterNode",
    "/flwr.proto.Runtime/PullAppInputs", "/flwr.proto.ServerAppIo/PushMessages",
    "/flwr.proto.ServerAppIo/PullMessages", "/flwr.proto.ClientAppIo/PullAppInputs",
    "/flwr.proto.SimulationIo/PullAppInputs", "/grpc.health.v1.Health/Check", "/ray.rpc.JobInfoGcsService/GetJobInfo",
)  # fmt: skip
"""Routes of Flower's servers, of now and of earlier versions, by REST and by gRPC."""


def doors(siege: Realm, alba: Actor) -> dict[str, tuple[Line, Mapping[str, str]]]:
    """A line to each door, with all that opens it."""
    config, token = siege.founded.config, {"Authorization": f"Bearer {siege.token}"}
    siege.invited("absent")
    return {
        "site": (alba.line(), {}),
        "admin": (Line(config.admin_port, blind()), token),
        "enrolment": (Line(config.enrol_port, blind()), {}),
    }


def test_no_route_of_flowers_is_served_anywhere(siege: Realm, alba: Actor) -> None:
    """At each door, with a valid certificate or token: 404 for every route of Flower's, whatever the method."""
    grpc = {"Content-Type": "application/grpc", "TE": "trailers"}
    found: dict[tuple[str, str, str], int] = {}
    for door, (line, headers) in doors(siege, alba).items():
        with line:
            for path in FLOWER:
                for method in ("GET", "POST", "PUT"):
                    more = {**headers, **(grpc if "." in path else {})}
                    found[door, method, path] = line.ask(method, path, b"\0\0\0\0\0", more).status
    assert len(found) == 3 * 3 * len(FLOWER)
    assert {one: status for one, status in found.items() if status != 404} == {}
    siege.goes_on()


def test_a_door_answers_only_its_own_routes(siege: Realm, alba: Actor) -> None:
    """What another door serves is a 404 here, also with what opens that other door."""
    token = {"Authorization": f"Bearer {siege.token}"}
    lines = doors(siege, alba)
    site, _ = lines["site"]
    asked: list[Said] = [
        site.ask("GET", "/v1/status", headers=token),
        site.ask("POST", "/v1/sites/x/invite", b"{}", token),
        site.ask("GET", "/v1/root"),
        site.ask("POST", "/v1/join", b"{}"),
    ]
    admin, _ = lines["admin"]
    asked += [
        admin.ask("POST", path, b"{}", token) for path in ("/v1/poll", "/v1/join", "/v1/renew", "/v1/leave")
    ]
    enrolment, _ = lines["enrolment"]
    asked += [enrolment.ask("GET", path, headers=token) for path in ("/v1/status", "/v1/trust", "/v1/poll")]
    assert {said.status for said in asked} == {404}
    for line, _ in lines.values():
        line.close()


@pytest.mark.parametrize("door", ["site", "admin", "enrolment"])
def test_http_2_is_not_spoken(siege: Realm, alba: Actor, door: str) -> None:
    """The preface of HTTP/2, as a gRPC client sends it: 400 or the end, and the door goes on."""
    lines = doors(siege, alba)
    line, _ = lines[door]
    line.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0")
    assert line.reply().status in (0, 400, 405, 505)
    for one, _ in lines.values():
        one.close()
    assert alba.served()
    assert siege.admin("GET", "/v1/status").status == 200


def test_nothing_else_listens(siege: Realm) -> None:
    """Server and run: two ports on loopback, as configured, and a third while an invitation is outstanding; no UDP, no
    IPv6, nothing of a run's process."""
    config = siege.founded.config
    siege.invited("absent")
    processes = siege.processes()
    assert len(processes) >= 2
    found = {pid: listening(pid) for pid in processes}
    assert found.pop(siege.server.pid) == {
        f"tcp 127.0.0.1:{port}" for port in (config.port, config.admin_port, config.enrol_port)
    }
    assert set().union(*found.values()) == set()


def test_what_listens_would_be_seen(tmp_path: Path) -> None:
    """The reader of the kernel's tables sees TCP, UDP and named Unix sockets of a process, in both families."""
    import os
    import socket

    kinds = [(socket.AF_INET, "127.0.0.1", "tcp 127.0.0.1:"), (socket.AF_INET6, "::1", "tcp6 ")]
    sockets = []
    for family, host, _ in kinds:
        try:
            one = socket.create_server((host, 0), family=family)
        except OSError:
            continue  # a machine without IPv6
        sockets.append(one)
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(tmp_path / "s"))
    unix.listen()
    found = listening(os.getpid())
    for one in sockets:
        assert any(text.endswith(f":{one.getsockname()[1]}") for text in found), found
        one.close()
    assert f"udp 127.0.0.1:{udp.getsockname()[1]}" in found
    assert f"unix {tmp_path / 's'}" in found
    udp.close()
    unix.close()


def test_errors_of_the_doors_name_no_software_and_no_place(siege: Realm, alba: Actor) -> None:
    """Neither headers nor bodies of refusals name a version, a library, a file or a line of code."""
    for line, headers in doors(siege, alba).values():
        with line:
            for method, path in (("GET", "/v1/nothing"), ("BREW", "/v1/poll"), ("GET", "/v1/poll/../x")):
                said = line.ask(method, path, b"", headers)
                told = json.dumps([dict(said.headers), said.body.decode()]).lower()
                assert not [
                    word
                    for word in ("python", "h11", "openssl", ".py", "traceback", 'server"')
                    if word in told
                ]
                if said.headers.get("connection") == "close":
                    break

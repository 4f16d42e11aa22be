"""The admin door of a running server: tokens, roles, paths and bodies that are none of its business."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacker import Line, Said, blind, head, once, resident
from breast_cancer import study_text
from realm import Realm, realm

from consortium.protocol.bundle import MAX_STUDY


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Realm]:
    """A federation of its own, since other tests count what its log says."""
    with realm(tmp_path_factory.mktemp("desk")) as one:
        yield one


@pytest.fixture(scope="module")
def tokens(desk: Realm) -> dict[str, str]:
    """A token of each role."""
    found = {}
    for role in ("viewer", "researcher", "admin"):
        said = desk.admin("POST", f"/v1/tokens/{role}-1", {"role": role})
        assert said.status == 200
        found[role] = str(said.document["token"])
    return found


STUDY = {"text": study_text(4, study={"name": "proposed"})}
READS = ["/v1/status", "/v1/sites", "/v1/studies"]
WRITES = ["start", "stop", "pause", "resume"]
ORDERS = [
    ("POST", "/v1/sites/somebody/invite"), ("POST", "/v1/sites/somebody/revoke"), ("POST", "/v1/rotate"),
    ("POST", "/v1/tokens/mine"), *(("POST", f"/v1/studies/proposed/{one}") for one in WRITES),
]  # fmt: skip


def test_without_a_token_nothing_is_said(desk: Realm) -> None:
    """Every route, and one that is not there: the same 401, so that not even what exists is learned."""
    config = desk.founded.config
    routes = [("GET", path) for path in [*READS, "/v1/studies/proposed", "/v1/nothing", "/"]] + ORDERS[:5]
    with Line(config.admin_port, blind()) as line:
        said = [line.ask(method, path, b"{}") for method, path in routes]
    assert {(one.status, one.body) for one in said} == {(401, said[0].body)}


def test_a_token_counts_in_its_header_alone(desk: Realm) -> None:
    """The right token in the URL, in a cookie, as Basic, in another header or in the body: 401."""
    token, port = desk.token, desk.founded.config.admin_port
    tries = [
        ("GET", f"/v1/status?token={token}", {}), ("GET", f"/v1/status?authorization=Bearer%20{token}", {}),
        ("GET", f"/v1/status?access_token={token}", {}), ("GET", "/v1/status", {"Cookie": f"token={token}"}),
        ("GET", "/v1/status", {"Authorization": f"Basic {token}"}), ("GET", "/v1/status", {"X-Token": token}),
        ("GET", "/v1/status", {"Authorization": token}),
    ]  # fmt: skip
    for method, path, headers in tries:
        assert once(port, blind(), method, path, headers=headers).status == 401
    assert token not in desk.log


def test_a_token_is_no_part_of_another(desk: Realm) -> None:
    """A prefix, a longer one, another case, two in one header: 401."""
    token = desk.token
    for wrong in (token[:-1], token + "x", token.swapcase(), f"{token}, {token}", "\xff" * 43):
        assert desk.admin("GET", "/v1/status", token=wrong).status == 401


def test_a_viewer_changes_nothing(desk: Realm, tokens: dict[str, str]) -> None:
    """It sees; every order and every submission is a 403, and has had no effect."""
    for path in READS:
        assert desk.admin("GET", path, token=tokens["viewer"]).status == 200
    assert desk.admin("POST", "/v1/studies", STUDY, token=tokens["viewer"]).status == 403
    for method, path in ORDERS:
        assert desk.admin(method, path, {"role": "admin", "hours": 1}, token=tokens["viewer"]).status == 403
    assert desk.admin("GET", "/v1/studies").document == {"studies": []}
    assert desk.admin("GET", "/v1/sites").document == {"sites": []}


def test_a_researcher_proposes_and_starts_nothing(desk: Realm, tokens: dict[str, str]) -> None:
    """It submits; every order is a 403, also under another method, and nothing runs."""
    assert desk.admin("POST", "/v1/studies", STUDY, token=tokens["researcher"]).status == 200
    for method, path in ORDERS:
        assert desk.admin(method, path, {"role": "admin"}, token=tokens["researcher"]).status == 403
        for other in ("GET", "PUT", "PATCH", "DELETE"):
            assert desk.admin(other, path, {}, token=tokens["researcher"]).status == 404
    assert desk.admin("GET", "/v1/studies/proposed").document["state"] == "proposed"
    assert desk.admin("GET", "/v1/status").document["runs"] == []


def test_a_replaced_token_is_worth_nothing(desk: Realm) -> None:
    """A new token of the same name ends the one before at once."""
    before = str(desk.admin("POST", "/v1/tokens/temp", {"role": "admin"}).document["token"])
    assert desk.admin("GET", "/v1/status", token=before).status == 200
    assert desk.admin("POST", "/v1/tokens/temp", {"role": "viewer"}).status == 200
    assert desk.admin("GET", "/v1/status", token=before).status == 401


PATHS = {
    "//v1/status": 400, "/v1//status": 400, "/v1/../v1/status": 400, "/v1/./status": 400, "/v1/%2e/status": 400,
    "/v1/%2e%2e/v1/status": 400, "/%2e%2e/%2e%2e/etc/passwd": 400, "/v1%2fstatus": 400, "/v1/status%00": 400,
    "/v1/status%0d%0aX: y": 400, "/v1/status/": 404, "/V1/STATUS": 404, "v1/status": 400, "*": 400,
    "https://127.0.0.1/v1/status": 400, "/v1\\status": 400, "/v1/status;x=1": 404, "/v1/stat\xffus": 400,
    "/v1/status#x": 400, "/v1/%73tatus": 200, "/v1/studies/a%2fb": 400, "/v1/studies/..": 400,
    "/v1/studies/" + "x" * 10_000: 400, "/" + "x" * 20_000: 431,
    "/v1/status?" + "&".join("a=1" for _ in range(40)): 400,
    "/v1/status?after=%ff%fe": 200,
}  # fmt: skip


@pytest.mark.parametrize("path", list(PATHS), ids=lambda path: path[:30].encode("unicode_escape").decode())
def test_a_path_is_read_in_one_way_or_not_at_all(desk: Realm, path: str) -> None:
    """With the admin's token: nothing but the routes themselves, whatever else a path could be taken for."""
    with Line(desk.founded.config.admin_port, blind()) as line:
        line.send(head("GET", path, headers={"Authorization": f"Bearer {desk.token}"}))
        said = line.reply("GET")
    assert said.status == PATHS[path]
    assert b"root:" not in said.body
    assert len(said.body) < 2000


@pytest.mark.parametrize(
    "name", ["a/b", "..", "x" * 64, "x" * 10_000, "A", "a.b", "a%20b", "%00", "-a", "é", "a%0Ab"]
)
def test_a_name_that_is_none_makes_no_site(desk: Realm, name: str) -> None:
    """Names with slashes, dots, spaces, line breaks, or 10,000 characters: no invitation, no folder."""
    before = {one.name for one in desk.own.rglob("*")}
    with Line(desk.founded.config.admin_port, blind()) as line:
        path = f"/v1/sites/{name}/invite"
        line.send(head("POST", path, 2, {"Authorization": f"Bearer {desk.token}"}) + b"{}")
        assert line.reply().status in (400, 404)
    assert desk.admin("GET", "/v1/sites").document == {"sites": []}
    assert {one.name for one in desk.own.rglob("*")} == before


@pytest.mark.parametrize("name", ["x" * 10_000, "a%20b", "a%3Cscript%3E", ".."])
def test_a_name_that_is_none_makes_no_token(desk: Realm, name: str) -> None:
    """A token's name stands in the log and in refusals: it is as short and plain as a site's."""
    assert desk.admin("POST", f"/v1/tokens/{name}", {"role": "viewer"}).status == 400


BOMBS: dict[str, bytes] = {
    "nested lists": b"[" * 60_000,
    "nested objects": b'{"a":' * 10_000,
    "closed nesting": b'{"hours":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "a huge integer": b'{"hours": ' + b"9" * 60_000 + b"}",
    "a large integer": b'{"hours": ' + b"9" * 4_000 + b"}",
    "1e999": b'{"hours": 1e999}',
    "-1e999": b'{"hours": -1e999}',
    "NaN": b'{"hours": NaN}',
    "Infinity": b'{"hours": Infinity}',
    "below zero": b'{"hours": -1}',
    "true": b'{"hours": true}',
    "a text": b'{"hours": "1"}',
    "null": b'{"hours": null}',
    "a list": b'{"hours": [1]}',
    "half a surrogate": b'"\\ud800"',
    "UTF-16": '{"hours": "x"}'.encode("utf-16"),
    "broken UTF-8": b'{"hours": "\xff\xfe"}',
    "a byte order mark": b'\xef\xbb\xbf{"hours": "1"}',
    "no JSON": b"hours=1",
}


@pytest.mark.parametrize("what", list(BOMBS))
def test_a_body_that_is_no_order_is_refused(desk: Realm, what: str) -> None:
    """JSON that is nested without end, huge, no number or no JSON: 400 within a second, and nobody is invited."""
    begun = time.monotonic()
    said = desk.admin("POST", "/v1/sites/bomb/invite", body=BOMBS[what])
    assert said.status == 400
    assert time.monotonic() - begun < 1
    assert len(said.body) < 2000
    assert desk.admin("GET", "/v1/sites").document == {"sites": []}


def test_a_million_keys_are_not_read(desk: Realm) -> None:
    """14 MB of keys: 413 by its length, and the server does not grow."""
    before = resident(desk.server.pid)
    body = b"{" + b",".join(b'"k%d": 1' % n for n in range(1_000_000)) + b"}"
    for path in ("/v1/sites/bomb/invite", "/v1/studies", "/v1/rotate"):
        assert desk.admin("POST", path, body=body).status == 413
    assert resident(desk.server.pid) - before < 20 << 20


def _inline(depth: int) -> str:
    return "a = " + "{a = " * depth + "1" + "}" * depth


TOML: dict[str, str] = {
    "nested lists": "a = " + "[" * 200_000,
    "closed lists": "a = " + "[" * 900 + "]" * 900,
    "nested tables": _inline(400),
    "a key of 100,000 parts": ".".join(["a"] * 100_000) + " = 1",
    "a quoted key of 80,000 parts": " . ".join(['"\\""'] * 80_000) + " = 1",
    "a table of 50,000 parts": "[" + ".".join(["a"] * 50_000) + "]",
    "a key behind a string": 'x = {a = """b"""", ' + ".".join(["c"] * 100_000) + " = 1}",
    "a huge integer": STUDY["text"].replace("rounds = 3", "rounds = " + "9" * 6000),
    "quotes": '"' * (MAX_STUDY - 100),
    "escapes": '\\"' * (MAX_STUDY // 4),
    "a name that is a path": STUDY["text"].replace('"proposed"', '"../../x"'),
    "a name that rings": STUDY["text"].replace('"proposed"', '"\\u0007x"'),
    "a billion neurons": STUDY["text"] + "\n[model]\nhidden = [1000000000, 1000000000]\n",
    "own code": STUDY["text"].replace("consortium.client.tasks.tabular:Classifier", "os:system"),
    "own strategy": STUDY["text"] + '\n[strategy]\nname = "evil:Strategy"\n',
}


@pytest.mark.parametrize("what", list(TOML))
def test_a_study_that_is_none_is_refused(desk: Realm, tokens: dict[str, str], what: str) -> None:
    """TOML that would take all memory or an endless stack, and studies with code: 400 within seconds, and the server
    has not grown."""
    before, begun = resident(desk.server.pid), time.monotonic()
    said = desk.admin("POST", "/v1/studies", {"text": TOML[what]}, token=tokens["researcher"])
    assert said.status in ((400, 413) if what in ("quotes", "escapes") else (400,))
    assert time.monotonic() - begun < 5
    assert resident(desk.server.pid) - before < 100 << 20
    assert [one["name"] for one in desk.admin("GET", "/v1/studies").document["studies"]] == ["proposed"]


SMUGGLED: dict[str, bytes] = {
    "two lengths": b"Content-Length: 2\r\nContent-Length: 30\r\n",
    "the same length twice": b"Content-Length: 2\r\nContent-Length: 2\r\n",
    "a length and chunks": b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n",
    "chunks": b"Transfer-Encoding: chunked\r\n",
    "a signed length": b"Content-Length: +2\r\n",
    "a negative length": b"Content-Length: -1\r\n",
    "a length in hex": b"Content-Length: 0x2\r\n",
    "a list of lengths": b"Content-Length: 2, 2\r\n",
    "a length without end": b"Content-Length: " + b"9" * 5000 + b"\r\n",
    "a folded header": b"Content-Length: 2\r\nX: a\r\n b\r\n\tc: d\r\n",
    "a name with a space": b"Content-Length : 2\r\n",
    "an upgrade": b"Content-Length: 2\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n",
}


@pytest.mark.parametrize("what", list(SMUGGLED))
def test_no_second_request_hides_in_a_first(desk: Realm, tokens: dict[str, str], what: str) -> None:
    """Lengths that two programs could read in two ways are refused; what hides behind them is not carried out."""
    port = desk.founded.config.admin_port
    hidden = (
        head("POST", "/v1/sites/hidden/invite", 2, {"Authorization": f"Bearer {tokens['viewer']}"}) + b"{}"
    )
    start = f"POST /v1/rotate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {tokens['viewer']}\r\n".encode()
    with Line(port, blind()) as line:
        line.send(start + SMUGGLED[what] + b"\r\n{}" + hidden)
        said = line.reply()
    assert said.status in (400, 403, 411, 413, 501)
    assert desk.admin("GET", "/v1/sites").document == {"sites": []}


def test_wrong_tokens_are_limited_and_the_door_goes_on(desk: Realm) -> None:
    """100 wrong tokens within a minute: from the 31st on they are told to wait. The right one is served all the
    while, and the site door is open as ever."""
    port = desk.founded.config.admin_port
    said: list[Said] = []
    with Line(port, blind()) as line:
        for number in range(100):
            said.append(line.ask("GET", "/v1/status", headers={"Authorization": f"Bearer guess-{number}"}))
            if number % 10 == 0:
                assert desk.admin("GET", "/v1/status").status == 200
    assert {one.status for one in said[:30]} <= {401, 429}  # earlier tests' wrong tokens count, too
    assert [one.status for one in said[30:]] == [429] * 70
    assert desk.server.poll() is None
    with Line(desk.port, blind()):  # TLS is spoken; without a certificate that is all
        pass
    log = desk.log
    assert "guess-" not in log
    assert len([line for line in log.splitlines() if " 401" in line or " 429" in line]) <= 60
    assert json.dumps(desk.token) not in log


def test_nothing_of_this_stays_on_the_servers_disk(desk: Realm) -> None:
    """After all that: the folders of before, and not one file more."""
    names = {one.name for one in desk.own.iterdir()}
    assert names <= {
        "server.toml", "root.key", "root.pem", "issuing.pem", "server.pem", "instruction.key", "trust.json",
        "admin.token", "data.key", "audit",
        "consortium.db", "consortium.db-wal", "consortium.db-shm", "checkpoints", "spool", "runs", "server.lock",
        ".lock",
        "lock",
    }, names  # fmt: skip
    assert list(Path(desk.own / "spool").iterdir()) == []
    assert list(Path(desk.own / "runs").iterdir()) == []

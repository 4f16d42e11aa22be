"""Where a federation at work keeps its secrets, and that they are nowhere else: a server, a real client with a real
worker over a database with a password, failures of every kind, all looked at from outside."""

from __future__ import annotations

import base64
import os
import secrets
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import clinicdb
import pytest
from attacker import blind, once
from breast_cancer import study_text, table
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from listening import listening
from realm import COMMAND, Realm, realm, wait_for
from seen_by_others import Watcher

from consortium.client import joining
from consortium.client.datasets import Datasets
from consortium.client.home import Home
from consortium.protocol.files import write_private
from consortium.protocol.joincode import JoinCode
from consortium.protocol.keys import Lock, PrivateKey, load_key
from consortium.simulations.programs import descendants

SERVER_KEYS = ("root.key", "issuing.pem", "server.pem", "instruction.key")
CLIENT_KEYS = ("identity.key", "tls.pem")


@dataclass
class Scene:
    """What happened, and what could be seen of it.

    whole: a study was finished, by a real worker. secrets: bytes by what they are. watcher: the processes. told: what
    people were shown, by where. ports: where each process listened.
    """

    whole: bool
    realm: Realm
    home: Home
    agent: subprocess.Popen[bytes]
    watcher: Watcher
    secrets: dict[str, bytes] = field(default_factory=dict)
    told: dict[str, bytes] = field(default_factory=dict)
    ports: dict[int, set[str]] = field(default_factory=dict)


def private(key: PrivateKey) -> dict[str, bytes]:
    """The ways in which a private key may be written."""
    if hasattr(key, "private_numbers"):
        number = key.private_numbers().private_value.to_bytes(32, "big")
    else:
        number = key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).splitlines()
    return {
        "hex": number.hex().encode(),
        "raw": number,
        "base64": base64.b64encode(number)[:42],
        "PEM": pem[1],
    }


def key_secrets(folder: Path, names: tuple[str, ...], lock: Lock, whose: str) -> dict[str, bytes]:
    """Each key of a folder: what it is, in every form, and the encrypted body of its file."""
    found = {}
    for name in names:
        for form, value in private(load_key(folder / name, lock)).items():
            found[f"{whose}: {name}, {form}"] = value
        body = (folder / name).read_bytes().split(b"-----\n")[1]
        found[f"{whose}: {name}, encrypted"] = body.splitlines()[2]
    return found


def commanded(
    told: dict[str, bytes], name: str, *arguments: str | Path, stdin: str = "", **environment: str
) -> None:
    """Run a command that is expected to fail, and note what it says."""
    done = subprocess.run(
        [COMMAND, *arguments], input=stdin.encode(), capture_output=True, env={**os.environ, **environment},
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode in (1, 2, 3, 4), (name, done.stdout, done.stderr)
    told[name] = done.stdout + done.stderr


@pytest.fixture(
    scope="module",
    params=[False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["what went wrong", "a finished study"],
)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A site that joins, a study whose query fails there, everything else that goes wrong; and, where it is whole, a
    study from its start to its model."""
    folder = tmp_path_factory.mktemp("scene")
    passphrase, password = secrets.token_hex(12), secrets.token_hex(12)
    with realm(folder) as one:
        given = one.invited("clinic")
        home = joining.join(
            given, folder / "clients" / "clinic", use_passphrase=True, proxy="",
            environment={"CONSORTIUM_PASSPHRASE": passphrase},
        ).home  # fmt: skip
        _database(folder, home, password)
        environment = {
            **os.environ, "CONSORTIUM_PASSPHRASE": passphrase, "CLINIC_PASSWORD": password,
            "PYTHONPATH": str(clinicdb.install(folder / "drivers")),
        }  # fmt: skip
        with (folder / "agent.log").open("wb") as log:
            agent = subprocess.Popen(
                [COMMAND, "client", "start", "--dir", home.folder], env=environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        watcher = Watcher(lambda: descendants([one.server.pid, agent.pid]))
        scene = Scene(request.param, one, home, agent, watcher)
        try:
            _secrets(scene, given, passphrase, password)
            _study(scene)
            _failures(scene, given, folder)
            yield scene
        finally:
            watcher.stop()
            agent.terminate()
            agent.wait(20)


def _database(folder: Path, home: Home, password: str) -> None:
    with sqlite3.connect(folder / "clinic.db") as db:
        table(4).to_sql("patients", db, index=False)
    (folder / "clinic.db.password").write_text(password)
    for name, column in (("patients", "*"), ("broken", "nonsense")):
        mapping = folder / f"{name}.toml"
        mapping.write_text(
            f'format = 1\n[source]\nsql = "SELECT {column} FROM patients"\n'  # noqa: S608 - a fixed word
            f'url = "clinicdb://reader@clinic/{folder / "clinic.db"}"\npassword = "env:CLINIC_PASSWORD"\n'
        )
        Datasets(home).add(name, "sql", mapping)
    rules = [
        f'[[allow]]\ntask = "consortium.client.tasks.tabular:Classifier"\ndata = "{data}"\nstudies = ["{study}"]\n'
        for data, study in (("broken", "broken"), ("patients", "clinical"))
    ]
    write_private(home.policy_file, "".join(["format = 1\n", *rules]).encode())


def _secrets(scene: Scene, given: str, passphrase: str, password: str) -> None:
    one, home = scene.realm, scene.home
    lock = home.lock({"CONSORTIUM_PASSPHRASE": passphrase})
    code = JoinCode.parse(given)
    found = {
        "the code's secret": code.secret.encode(),
        "the code": given.split(".")[1][-40:].encode(),
        "the admin's token": one.token.encode(),
        "a viewer's token": str(
            one.admin("POST", "/v1/tokens/eve", {"role": "viewer"}).document["token"]
        ).encode(),
        "the server's key file": Path(one.founded.config.key_file).read_bytes().strip(),
        "the client's passphrase": passphrase.encode(),
        "the database's password": password.encode(),
        "the holdout key, raw": (home.data("patients") / "holdout.key").read_bytes(),
        "the holdout key, hex": (home.data("patients") / "holdout.key").read_bytes().hex().encode(),
    }
    found |= key_secrets(one.own, SERVER_KEYS, one.lock, "server")
    found |= key_secrets(home.folder, CLIENT_KEYS, lock, "client")
    scene.secrets = found


def _study(scene: Scene) -> None:
    one, path = scene.realm, "/v1/studies/clinical"
    one.begin("broken", min_sites=1, deadline=60.0)

    def sites() -> str:
        _note_ports(scene)
        return str(one.admin("GET", "/v1/status").document["sites"])

    wait_for(lambda: "declined" in sites(), 60, "not declined")
    _note(scene, "broken")
    assert one.admin("POST", "/v1/studies/broken/stop").status == 200
    if not scene.whole:
        return
    text = study_text(
        4, study={"name": "clinical", "rounds": 1}, cohort={"min_sites": 1, "deadline": "60s"},
        export={"formats": ["safetensors"]},
    )  # fmt: skip
    assert one.admin("POST", "/v1/studies", {"text": text}).status == 200
    assert one.admin("POST", f"{path}/start").status == 200

    def state() -> str:
        _note_ports(scene)
        return str(one.admin("GET", path).document["state"])

    wait_for(lambda: state() in ("finished", "failed"), 100, "not finished")
    assert one.admin("GET", path).document["state"] == "finished", one.admin("GET", path)
    _note(scene, "clinical")


def _note(scene: Scene, study: str) -> None:
    for path in (f"/v1/studies/{study}", f"/v1/studies/{study}/events?after=0", "/v1/status", "/v1/sites"):
        scene.told[f"{study}: {path}"] = scene.realm.admin("GET", path).body


def _note_ports(scene: Scene) -> None:
    for pid in descendants([scene.realm.server.pid, scene.agent.pid]):
        scene.ports[pid] = scene.ports.get(pid, set()) | listening(pid)


def _failures(scene: Scene, given: str, folder: Path) -> None:
    one, told = scene.realm, scene.told
    stranger = one.invited("stranger")
    code = JoinCode.parse(stranger)
    scene.secrets["an open code's secret"] = code.secret.encode()
    scene.secrets["an open code"] = stranger.split(".")[1][-40:].encode()
    config = one.founded.config
    bodies = (
        f'{{"secret": "{code.secret}"}}',
        f'["{code.secret}"',
        f'{{"secret": "{code.secret}", "site": 1}}',
    )
    for number, body in enumerate(bodies):
        said = once(config.enrol_port, blind(), "POST", "/v1/join", body=body.encode())
        told[f"a bad join {number}"] = said.body
    token = one.token
    for number, path in enumerate(
        (f"/v1/status?token={token}", f"/v1/studies/x/events?after=0&token={token}")
    ):
        told[f"a token in a query {number}"] = once(config.admin_port, blind(), "GET", path).body
    commanded(told, "join, used", "client", "join", "--dir", folder / "late", stdin=given)
    commanded(told, "join, mistyped", "client", "join", "--dir", folder / "late", stdin=stranger[:-1] + "!")
    commanded(told, "join, elsewhere", "client", "join", "--dir", scene.home.folder, stdin=stranger)
    commanded(
        told, "client, wrong passphrase", "client", "start", "--dir", _copy(scene.home.folder, folder / "copy"),
        CONSORTIUM_PASSPHRASE="wrong-passphrase-" + scene.secrets["the client's passphrase"].decode()[:4],
    )  # fmt: skip
    commanded(
        told, "server, wrong token", "server", "status", "--server", f"https://127.0.0.1:{config.admin_port}",
        CONSORTIUM_TOKEN=token[:-1] + "_", CONSORTIUM_ROOT=str(one.own / "root.pem"),
    )  # fmt: skip
    commanded(told, "server, started twice", "server", "start", "--dir", one.own)
    commanded(
        told, "client data check", "client", "data", "check", "broken", "--dir", scene.home.folder,
        CLINIC_PASSWORD=scene.secrets["the database's password"].decode(),
        PYTHONPATH=str(folder / "drivers"),
    )  # fmt: skip


def _copy(source: Path, target: Path) -> Path:
    import shutil

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("agent.sock", "spool", "log", "*.lock"))
    return target


def found_in(content: bytes, wanted: Mapping[str, bytes]) -> list[str]:
    """Which of the secrets stand there."""
    return [name for name, secret in wanted.items() if secret in content]


def test_the_secrets_are_secrets(scene: Scene) -> None:
    """Each is long enough that finding it is no accident, and each can be found where it belongs."""
    assert min(len(secret) for secret in scene.secrets.values()) >= 16
    own, home = scene.realm.own, scene.home.folder
    for name in SERVER_KEYS:
        assert f"server: {name}, encrypted" in found_in((own / name).read_bytes(), scene.secrets)
    for name in CLIENT_KEYS:
        assert f"client: {name}, encrypted" in found_in((home / name).read_bytes(), scene.secrets)
    assert found_in((own / "admin.token").read_bytes(), scene.secrets) == ["the admin's token"]
    assert all(scene.told.values())


def test_no_process_shows_a_secret(scene: Scene) -> None:
    """Arguments and environments of the server, the run, its workers, the agent, its worker and the program that reads
    the database: none, but what an operator put into the agent's environment; of that the worker has nothing, and the
    program that reads the database the password alone."""
    shown = list(scene.watcher.shown)
    kinds = ["server start", "server.run_process", "client start", "client.sql_snapshot"]
    for kind in [*kinds, *(["client.worker serve"] if scene.whole else [])]:
        assert [one for one in shown if one.runs(kind)], f"{kind} was never seen"
    for one in shown:
        assert found_in(one.arguments, scene.secrets) == []
        allowed = set()
        if one.pid == scene.agent.pid:
            allowed = {"the client's passphrase", "the database's password"}
        elif one.runs("client.sql_snapshot"):
            allowed = {"the database's password"}
        found = set(found_in(one.environment, scene.secrets))
        # Between fork and exec a child still shows what its parent is.
        if one.arguments == _arguments(scene.agent.pid):
            allowed = {"the client's passphrase", "the database's password"}
        assert found <= allowed, (one.arguments, found)


def _arguments(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_nothing_that_people_are_shown_holds_a_secret(scene: Scene) -> None:
    """Status, sites, studies, events, refusals of all doors, and the errors of every command."""
    assert {
        name: found for name, said in scene.told.items() if (found := found_in(said, scene.secrets))
    } == {}


def test_no_log_holds_a_secret(scene: Scene) -> None:
    """The server's, the run's, the agent's, and whatever else was written as a log."""
    logs = [
        *scene.realm.folder.rglob("*.log"), *scene.realm.own.rglob("log*"), scene.home.log,
        *scene.realm.own.rglob("*.jsonl"),
    ]  # fmt: skip
    assert len(logs) >= 3
    for path in logs:
        assert found_in(path.read_bytes(), scene.secrets) == [], path
    assert b"refused" in scene.home.log.read_bytes()  # the broken query was noticed there


def test_the_database_of_the_server_holds_digests_alone(scene: Scene) -> None:
    """Neither the file nor its log holds a code, a token or a key, in any form."""
    files = list(scene.realm.own.glob("consortium.db*"))
    assert files
    for path in files:
        assert found_in(path.read_bytes(), scene.secrets) == [], path


def test_no_other_file_holds_a_secret(scene: Scene) -> None:
    """Every file of both folders but those whose purpose it is: models, checkpoints, spools, states, configurations."""
    belongs = {
        scene.realm.own: {*SERVER_KEYS, "admin.token"},
        scene.home.folder: {*CLIENT_KEYS, "holdout.key"},
    }
    for folder, names in belongs.items():
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.name not in names:
                assert found_in(path.read_bytes(), scene.secrets) == [], path


def test_folders_are_their_owners_alone(scene: Scene) -> None:
    """No file of either folder, and no key file, can be read by the group or by others."""
    places = [scene.realm.own, scene.home.folder, Path(scene.realm.founded.config.key_file)]
    for place in places:
        assert place.stat().st_mode & 0o077 == 0, place
    for place in places[:2]:
        for path in place.rglob("*"):
            # What lies in a run's folder is behind folders that nobody else may enter.
            if not path.is_symlink() and path.parent == place:
                assert path.stat().st_mode & 0o077 == 0, path


def test_a_site_listens_to_nobody_but_its_operator(scene: Scene) -> None:
    """The agent, its worker, the run and its workers open no port; the agent has one Unix socket, within its folder."""
    others = dict(scene.ports)
    server, config = others.pop(scene.realm.server.pid), scene.realm.founded.config
    known = {f"tcp 127.0.0.1:{port}" for port in (config.port, config.admin_port, config.enrol_port)}
    assert server <= known
    found = list(set().union(*others.values()))
    assert [one.startswith("unix ") and Path(one).name for one in found] == [scene.home.socket.name]


@pytest.mark.slow
def test_a_run_does_not_inherit_the_servers_passphrase(tmp_path: Path) -> None:
    """A server that was given its passphrase in its environment: its run's process has it neither there nor in its
    arguments."""
    passphrase = secrets.token_hex(12)
    with realm(tmp_path / "r", passphrase=passphrase) as one:
        watcher = Watcher(one.processes)
        one.begin(min_sites=1)
        wait_for(lambda: any(shown.runs("server.run_process") for shown in watcher.shown), 20, "no run")
        watcher.stop()
        runs = [shown for shown in watcher.shown if shown.runs("server.run_process")]
        for shown in runs:
            assert passphrase.encode() not in shown.arguments + shown.environment
        assert passphrase not in one.log

"""The commands of a federation as a person types them, right and wrong: exit codes, what is said, and what is printed.

The server and the client are processes of their own; the commands are called in this one, as `consortium` would.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from breast_cancer import study_text
from leftovers import living

from consortium.protocol.cli import main, root
from consortium.protocol.keys import PASSPHRASE
from consortium.simulations.programs import free_ports

COMMAND = str(Path(sys.executable).with_name("consortium"))
HOST = "127.0.0.1"
STUDY = study_text(3)
NAME = "breast-cancer"


@dataclass(frozen=True)
class Said:
    """What a command came to."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Standard output, which is one JSON document and nothing else."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)


Type = Callable[..., Said]


@pytest.fixture
def type_in(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Type:
    """Type a command: gives what it came to; a traceback is never right."""
    monkeypatch.delenv(PASSPHRASE, raising=False)

    def run(*words: object) -> Said:
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        assert "a fault in Consortium" not in err
        code = end.value.code
        assert isinstance(code, int)
        return Said(code, out, err)

    return run


def init(folder: Path, *more: str) -> list[object]:
    """The words of a federation on free ports."""
    site, admin, enrol = free_ports(3)
    ports = ["--port", site, "--admin-port", admin, "--enrol-port", enrol]
    return [
        "server",
        "init",
        "--dir",
        folder,
        "--name",
        "lung",
        "--host",
        HOST,
        "--bind",
        HOST,
        *ports,
        *more,
    ]


@dataclass
class Place:
    """A federation whose server runs, with one site whose client runs."""

    folder: Path
    server: Path
    site: Path
    init: list[object]


def started(folder: Path, name: str, *words: object) -> subprocess.Popen[bytes]:
    """A program that runs."""
    with (folder / f"{name}.log").open("wb") as log:
        return subprocess.Popen([COMMAND, *map(str, words)], stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait until it is so."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def quietly(*words: object) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(
        [COMMAND, *map(str, words)], capture_output=True, text=True, check=False, timeout=60, input=""
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("typed")
    one = Place(folder, folder / "fed", folder / "site", init(folder / "fed"))
    assert quietly(*one.init).returncode == 0
    programs = [started(folder, "server", "server", "start", "--dir", one.server)]
    try:
        until(lambda: quietly("server", "status", "--dir", one.server).returncode == 0, "no server")
        code = quietly("server", "invite", "hospital-1", "--dir", one.server)
        (folder / "code").write_text(code.stdout)
        (folder / "p.csv").write_text("mean_radius,mean_texture,mean_perimeter,malignant\n1,2,3,0\n2,3,4,1\n")
        (folder / "study.toml").write_text(STUDY)
        joined = quietly("client", "join", "--dir", one.site, "--code-file", folder / "code")
        assert joined.returncode == 0, joined.stderr
        programs.append(started(folder, "client", "client", "start", "--dir", one.site))
        until(lambda: quietly("client", "status", "--dir", one.site).returncode == 0, "no client")
        yield one
    finally:
        for program in programs:
            program.terminate()
        assert [program.wait(20) for program in programs] == [0] * len(programs)
    assert living(str(folder)) == []


def refused(said: Said, code: int, *words: str) -> None:
    """Exit code, and what the one message on stderr must name."""
    assert said.code == code, said
    assert said.out == ""
    assert said.err.startswith("consortium: ")
    for word in words:
        assert word in said.err, (word, said.err)


def test_a_server_that_is_not_there_is_told_how_to_be(type_in: Type, tmp_path: Path) -> None:
    """No folder, no founding, no running server: each says which command comes first."""
    refused(type_in("server", "start", "--dir", tmp_path / "no"), 2, "consortium server init")
    refused(type_in("server", "status", "--dir", tmp_path), 2, "is no server's folder", "--dir")
    assert type_in(*init(tmp_path / "fed")).code == 0
    said = type_in("study", "list", "--dir", tmp_path / "fed")
    refused(said, 1, f"consortium server start --dir {tmp_path / 'fed'}")
    assert said.err.count("cannot be reached") == 1
    (tmp_path / "fed" / "server.toml").write_text("port =")
    refused(type_in("study", "list", "--dir", tmp_path / "fed"), 2, "server.toml")


def test_init_twice_keeps_the_root_and_another_name_is_refused(type_in: Type, tmp_path: Path) -> None:
    """The same command again changes nothing and says so; other values are listed, each with both."""
    words = init(tmp_path / "fed", "--json")
    first, again = type_in(*words).json(), type_in(*words).json()
    assert first == again
    assert "made before" in type_in(*words[:-1]).out
    other = ["other" if word == "lung" else word for word in words]
    refused(type_in(*other), 2, "name: 'lung' there, 'other' asked for")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("")
    refused(type_in(*init(tmp_path / "mine")), 2, "is not empty")
    wrong = [
        "http://x" if word == HOST else "Lung Cancer" if word == "lung" else word
        for word in init(tmp_path / "b")
    ]
    refused(type_in(*wrong), 2, "name: got 'Lung Cancer'", "host: got 'http://x'")


def test_a_second_server_and_a_second_client_are_refused(type_in: Type, place: Place) -> None:
    """Exit code 2, and the command that shows the one that runs."""
    said = quietly("server", "start", "--dir", place.server)
    refused(Said(said.returncode, said.stdout, said.stderr), 2, "runs over it already", "server status")
    said = quietly("client", "start", "--dir", place.site)
    refused(Said(said.returncode, said.stdout, said.stderr), 2, "runs here already", "client status")


@pytest.mark.parametrize("door", ["port", "admin-port"])
def test_a_port_that_is_taken_is_named(door: str, tmp_path: Path) -> None:
    """At the start, before anything else is open."""
    words = init(tmp_path / "fed")
    assert quietly(*words).returncode == 0
    port = words[words.index(f"--{door}") + 1]
    with socket.create_server((HOST, int(str(port)))):
        said = quietly("server", "start", "--dir", tmp_path / "fed")
    refused(Said(said.returncode, said.stdout, said.stderr), 2, f"{HOST}:{port}", "in use")


def test_join_with_rubbish_makes_nothing(
    type_in: Type, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rubbish and a typo are exit code 2, a code that was used is 3 or, as enrolment is closed, 1 with the reason."""
    code = (place.folder / "code").read_text()
    for number, (text, words) in enumerate(
        [
            ("rubbish", "starts with consortium-1."),
            ("", "starts with"),
            (code[:30] + "x" + code[31:], "mistyped"),
        ]
    ):
        file = tmp_path / str(number)
        file.write_text(text)
        refused(type_in("client", "join", "--dir", tmp_path / "site", "--code-file", file), 2, words)
    refused(type_in("client", "join", "--dir", tmp_path / "site", "--code-file", tmp_path / "no"), 2, "code")
    assert not (tmp_path / "site").exists()
    # Enrolment closes shortly after the last code was used: until then the server itself refuses, and says why.
    used = type_in("client", "join", "--dir", tmp_path / "other", "--code-file", place.folder / "code")
    if used.code == 3:
        refused(used, 3, "was used")
    else:
        refused(used, 1, "enrolment is open only while a code is outstanding")
    assert type_in("server", "invite", "hospital-7", "--dir", place.server).code == 0
    used = type_in("client", "join", "--dir", tmp_path / "third", "--code-file", place.folder / "code")
    refused(used, 3, "was used")
    assert type_in("server", "revoke", "hospital-7", "--dir", place.server).code == 0


def test_a_site_that_has_not_joined_is_told_to(type_in: Type, tmp_path: Path) -> None:
    """Every command of the client says the same."""
    for words in (["start"], ["status"], ["pause"], ["resume"], ["leave", "--yes"], ["data", "list"]):
        said = type_in("client", *words, "--dir", tmp_path / "site")
        if words != ["data", "list"]:
            refused(said, 2, f"consortium client join --dir {tmp_path / 'site'}")


def test_data_that_are_not_there_are_named(type_in: Type, place: Place) -> None:
    """File, mapping, name, and a data set that is there already."""
    add = ["client", "data", "add", "patients", "--dir", place.site, "--source"]
    refused(type_in(*add, place.folder / "no.csv"), 2, "no.csv")
    refused(type_in(*add, place.folder / "p.csv", "--map", place.folder / "no.toml"), 2, "no.toml", "mapping")
    assert type_in(*add, place.folder / "p.csv").code == 0
    refused(type_in(*add, place.folder / "p.csv"), 2, "data remove patients")
    refused(type_in("client", "data", "check", "others", "--dir", place.site), 2, "data list")
    assert type_in("client", "data", "remove", "patients", "--dir", place.site).code == 0


def test_a_study_is_refused_where_it_is_wrong_unknown_or_brings_code(type_in: Type, place: Place) -> None:
    """Nothing of it is kept."""
    to = ["--dir", place.server]
    own = place.folder / "own.toml"
    own.write_text(STUDY.replace("consortium.client.tasks.tabular:Classifier", "task:Net"))
    refused(type_in("study", "submit", own, *to), 2, "there is no task.py")
    (place.folder / "task.py").write_text("class Net: pass\nimport not_installed_anywhere\n")
    refused(type_in("study", "submit", own, *to), 2, "not_installed_anywhere", "nothing is installed")
    (place.folder / "task.py").write_text("class Net: pass\n")
    own.write_text(STUDY + '[strategy]\nname = "mine:strategy"\n')
    refused(type_in("study", "submit", own, *to), 2, "there is no mine.py")
    own.write_text(STUDY.replace("rounds = 3", "round = 3"))
    refused(type_in("study", "submit", own, *to), 2, "round")
    refused(type_in("study", "submit", place.folder / "no.toml", *to), 2, "no.toml")
    for action in ("start", "watch", "show", "stop", "pause", "resume"):
        refused(type_in("study", action, "unknown", *to), 2, "there is no study")
    assert all(one["name"] != "unknown" for one in type_in("study", "list", *to, "--json").json()["studies"])


def test_a_study_goes_from_submitted_to_stopped(type_in: Type, place: Place) -> None:
    """Submitted twice is once; started twice and stopped twice is refused with what to type; every `--json` is one
    document, `watch --json` a line an event; a next command names the same server."""
    to = ["--dir", place.server]
    first = type_in("study", "submit", place.folder / "study.toml", *to, "--json").json()
    assert first == type_in("study", "submit", place.folder / "study.toml", *to, "--json").json()
    assert [one["name"] for one in type_in("study", "list", *to, "--json").json()["studies"]] == [NAME]
    shown = type_in("study", "show", NAME, *to, "--json").json()
    assert (shown["state"], shown["run"], shown["sites"]) == ("proposed", None, {})
    refused(type_in("study", "stop", NAME, *to), 2, "has no run")
    assert f"consortium study watch {NAME} --dir {place.server}" in type_in("study", "start", NAME, *to).out
    refused(type_in("study", "start", NAME, *to), 3, f"consortium study stop {NAME}")
    assert type_in("study", "pause", NAME, *to, "--json").json()["state"] == "paused"
    assert type_in("study", "pause", NAME, *to).code == 0
    assert type_in("study", "resume", NAME, *to).out == f"run {NAME}.1: running\n"
    (run,) = type_in("server", "status", *to, "--json").json()["runs"]
    assert (run["run"], run["round"], run["rounds"]) == (f"{NAME}.1", 0, 3)
    assert type_in("study", "stop", NAME, *to, "--json").json()["state"] == "stopped"
    for action in ("stop", "pause", "resume"):
        refused(type_in("study", action, NAME, *to), 3, f"consortium study start {NAME}")
    watched = type_in("study", "watch", NAME, *to, "--json")
    events = [json.loads(line) for line in watched.out.splitlines()]
    assert watched.err == ""
    assert [event["state"] for event in events if event["kind"] == "state"][-1] == "stopped"
    assert type_in("study", "watch", NAME, *to).out.count("stopped: by the admin") == 1


def test_watching_a_study_that_is_not_started_says_so(place: Place) -> None:
    """At once, on stderr; then it follows the run when there is one."""
    waiting = place.folder / "waiting.toml"
    waiting.write_text(STUDY.replace(NAME, "waiting"))
    to = ["--dir", str(place.server)]
    assert quietly("study", "submit", waiting, *to).returncode == 0
    with subprocess.Popen(
        [COMMAND, "study", "watch", "waiting", *to, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as watch:
        assert watch.stderr is not None
        assert "consortium study start waiting" in watch.stderr.readline()
        assert quietly("study", "start", "waiting", *to).returncode == 0
        assert quietly("study", "stop", "waiting", *to).returncode == 0
        out, _ = watch.communicate(timeout=30)
        assert watch.returncode == 0
    assert [json.loads(line)["kind"] for line in out.splitlines()]


def test_watching_on_a_terminal_keeps_a_table_of_the_sites(place: Place) -> None:
    """Each site with what it does now, and the run with why it waits; it ends with the run."""
    study = place.folder / "terminal.toml"
    study.write_text(STUDY.replace(NAME, "terminal"))
    to = ["--dir", str(place.server)]
    assert quietly("study", "submit", study, *to).returncode == 0
    assert quietly("study", "start", "terminal", *to).returncode == 0
    master, terminal = os.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    watch = subprocess.Popen(
        [COMMAND, "study", "watch", "terminal", *to], stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    shown = b""

    def read() -> bool:
        nonlocal shown
        try:
            shown += os.read(master, 65536)
        except OSError:  # the other end is closed
            return False
        return True

    while b"waiting for sites: 1 of at least 2 sites are connected (hospital-1)" not in shown:
        assert read(), shown
    while b"hospital-1 " not in shown or b" ready " not in shown:
        assert read(), shown
    assert quietly("study", "stop", "terminal", *to).returncode == 0
    while read():
        pass
    os.close(master)
    assert watch.wait(30) == 0
    assert b"stopped: by the admin" in shown


def test_status_is_one_document(type_in: Type, place: Place) -> None:
    """Of the server with its doors and sites; of the client with its connection."""
    status = type_in("server", "status", "--dir", place.server, "--json").json()
    assert {"federation", "version", "root", "doors", "sites", "runs"} == set(status)
    site = next(one for one in status["sites"] if one["name"] == "hospital-1")
    assert (site["status"], site["connected"]) == ("joined", True)
    assert type_in("server", "sites", "--dir", place.server, "--json").json()["sites"] == status["sites"]
    client = type_in("client", "status", "--dir", place.site, "--json").json()
    assert (client["running"], client["site"], client["connected"]) == (True, "hospital-1", True)
    assert type_in("client", "data", "list", "--dir", place.site, "--json").json() == []


def test_tokens_are_held_to_their_role(type_in: Type, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A viewer sees from elsewhere and submits nothing; a wrong token, no token and no root are told apart."""
    port = place.init[place.init.index("--admin-port") + 1]
    elsewhere = ["--server", f"https://{HOST}:{port}"]
    refused(
        type_in("server", "token", "alice", "--role", "boss", "--dir", place.server), 2, "viewer, researcher"
    )
    token = type_in("server", "token", "alice", "--role", "viewer", "--dir", place.server).out.strip()
    refused(type_in("study", "list", *elsewhere), 2, "CONSORTIUM_TOKEN")
    monkeypatch.setenv("CONSORTIUM_TOKEN", "wrong")
    refused(type_in("study", "list", *elsewhere), 2, "CONSORTIUM_ROOT")
    monkeypatch.setenv("CONSORTIUM_ROOT", str(place.server / "root.pem"))
    refused(type_in("study", "list", *elsewhere), 3, "token")
    monkeypatch.setenv("CONSORTIUM_TOKEN", token)
    assert type_in("study", "list", *elsewhere).code == 0
    refused(type_in("study", "submit", place.folder / "study.toml", *elsewhere), 3, "researcher is needed")
    refused(type_in("server", "invite", "x", *elsewhere), 3, "admin is needed")
    refused(type_in("study", "list", "--server", f"http://{HOST}:1"), 2, "https://HOST:PORT")
    refused(
        type_in("study", "list", "--server", f"https://{HOST}:1"), 1, "cannot be reached", "address and port"
    )


def test_a_root_of_another_federation_is_exit_code_4(
    type_in: Type, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is not the one that is trusted."""
    assert type_in(*init(tmp_path / "fed")).code == 0
    monkeypatch.setenv("CONSORTIUM_ROOT", str(tmp_path / "fed" / "root.pem"))
    monkeypatch.setenv("CONSORTIUM_TOKEN", "any")
    port = place.init[place.init.index("--admin-port") + 1]
    refused(
        type_in("study", "list", "--server", f"https://{HOST}:{port}"), 4, "not the server that is trusted"
    )


def test_names_and_sites_that_are_wrong_are_named(type_in: Type, place: Place) -> None:
    """Inviting, revoking, hours."""
    to = ["--dir", place.server]
    refused(type_in("server", "invite", "Hospital 1", *to), 2, "Hospital 1", "hospital-1")
    refused(type_in("server", "invite", "hospital-1", *to), 3, "consortium server revoke hospital-1")
    refused(type_in("server", "invite", "hospital-8", "--hours", "0", *to), 2, "hours")
    refused(type_in("server", "revoke", "hospital-9", *to), 2, "consortium server sites")
    said = type_in("server", "strat")
    assert said.code == 2
    assert "start" in said.err


def test_a_wrong_lock_is_said_and_not_shown(tmp_path: Path) -> None:
    """A passphrase that is missing, short or wrong, a key file that is gone: exit code 2, and no secret in the text."""
    good = {PASSPHRASE: "correct-horse-battery"}
    words = init(tmp_path / "fed", "--passphrase")

    def with_secret(secret: str, *words: object) -> Said:
        done = subprocess.run(
            [COMMAND, *map(str, words)], input="", capture_output=True, text=True, check=False, timeout=60,
            env={**os.environ, PASSPHRASE: secret},
        )  # fmt: skip
        return Said(done.returncode, done.stdout, done.stderr)

    refused(with_secret("", *words), 2, "a passphrase is needed", PASSPHRASE)
    refused(with_secret("too-short", *words), 2, "at least 12")
    assert with_secret(good[PASSPHRASE], *words).code == 0
    wrong = with_secret("incorrect-horse-battery", "server", "start", "--dir", tmp_path / "fed")
    refused(wrong, 2, "cannot be decrypted")
    assert "horse" not in wrong.err
    assert quietly(*init(tmp_path / "two")).returncode == 0
    (tmp_path / "two.key").unlink()
    refused(with_secret("", "server", "start", "--dir", tmp_path / "two"), 2, "two.key", "put it back")


def test_a_disk_without_room_is_no_fault_of_ours(tmp_path: Path) -> None:
    """Every write fails beyond 700 bytes: the file is named, exit code 1; with room the same command works."""

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))

    words = init(tmp_path / "fed")
    done = subprocess.run(
        [COMMAND, *map(str, words)], preexec_fn=small, capture_output=True, text=True, check=False, timeout=60
    )
    refused(Said(done.returncode, done.stdout, done.stderr), 1, str(tmp_path / "fed"), "File too large")
    assert quietly(*words).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_folder_of_somebody_else_is_no_fault_of_ours(tmp_path: Path) -> None:
    """The server is started by another user than the one who made it: the file is named, exit code 1 or 2."""
    assert quietly(*init(tmp_path / "fed")).returncode == 0
    (tmp_path / "fed").chmod(0o755)
    code = """
import os, sys
from consortium.protocol.cli import main
from consortium.server import serve
as_root = serve.serve
def serve_as_nobody(folder):
    os.setgroups([]), os.setgid(65534), os.setuid(65534)
    as_root(folder)
serve.serve = serve_as_nobody
main(sys.argv[1:])
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "server", "start", "--dir", tmp_path / "fed"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr
    assert "a fault in Consortium" not in done.stderr
    assert str(tmp_path) in done.stderr


def test_a_mistake_in_the_policy_is_said_at_the_start(tmp_path: Path, place: Place) -> None:
    """In the client's log, all mistakes, before any study is declined for it."""
    code = quietly("server", "invite", "hospital-5", "--dir", place.server)
    (tmp_path / "code").write_text(code.stdout)
    site = tmp_path / "site"
    assert quietly("client", "join", "--dir", site, "--code-file", tmp_path / "code").returncode == 0
    (site / "policy.toml").write_text('format = 1\n[[allow]]\ntask = "tabular"\n[[alow]]\n')
    client = started(tmp_path, "client", "client", "start", "--dir", site)
    try:
        log = tmp_path / "client.log"
        until(lambda: "nothing is allowed" in log.read_text(), "it says nothing")
        assert "allow.0.data" in log.read_text()
        assert "alow" in log.read_text()
    finally:
        client.send_signal(signal.SIGINT)
        assert client.wait(20) == 0


def commands(group: click.Command, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command below a group."""
    if isinstance(group, click.Group):
        context = click.Context(group)
        for name in group.list_commands(context):
            found = group.get_command(context, name)
            assert found is not None
            yield from commands(found, (*path, name))
    else:
        yield path, group


def test_every_command_shows_an_example_that_parses() -> None:
    """`--help` of each has a line `Example: consortium ...`, whose words that very command takes."""
    found = dict(commands(root, ()))
    assert len(found) > 30
    for path, command in found.items():
        examples = re.findall(r"^(?:Example: |)consortium (.*)$", command.help or "", re.M)
        assert examples, path
        for words in map(shlex.split, examples):
            assert tuple(words[: len(path)]) == path, words
            command.make_context(path[-1], words[len(path) :])


def test_a_bundle_is_built_simulated_and_submitted(type_in: Type, place: Place) -> None:
    """One file: what is built is what runs here and what the server keeps."""
    to = ["--dir", place.server]
    study = place.folder / "bundled.toml"
    study.write_text(STUDY)
    built = type_in("study", "build", study, "--out", place.folder / "one.fab", "--json").json()
    assert (built["files"], built["imports"]) == ([], [])
    assert (
        type_in("study", "build", study, "--out", place.folder / "two.fab", "--json").json()["bundle"]
        == built["bundle"]
    )
    said = type_in("study", "submit", place.folder / "one.fab", *to, "--json").json()
    assert said["bundle"] == built["bundle"]
    (place.folder / "two.fab").write_bytes((place.folder / "one.fab").read_bytes()[:-1])
    refused(type_in("study", "submit", place.folder / "two.fab", *to), 4, "two.fab", "study build")
    refused(type_in("study", "build", study, "--out", place.folder / "one.zip"), 2, "one.zip", ".fab")
    refused(type_in("study", "build", place.folder / "no.toml"), 2, "no.toml")

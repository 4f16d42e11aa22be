"""The commands of a site's operator that need no running worker."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from site_world import SITE, World

from consortium.client.control import Control, NotRunning, ask
from consortium.client.home import Home
from consortium.client.seen import Place, Seen
from consortium.client.serving_worker import _told
from consortium.client.unit import systemd_unit
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.joincode import JoinCode
from consortium.server.enrolment import Enrolment
from consortium.server.listener import Caps, Listener

CLIENT: list[str] = [str(Path(sys.executable).with_name("consortium")), "client"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    one = World(tmp_path_factory.mktemp("world"))
    yield one
    one.end()


def run(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*CLIENT, *map(str, words)], input=stdin, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("way", ["stdin", "file"])
def test_join_reads_the_code_from_stdin_or_a_file(world: World, tmp_path: Path, way: str) -> None:
    """Never from an argument; afterwards a policy lies there that allows nothing."""
    door = Listener(
        "127.0.0.1",
        0,
        world.federation.open_context,
        Enrolment(world.federation, world.roster).handle,
        Caps(),
    )
    door.start()
    secret, _ = world.roster.invite(f"clinic-{way}", 60)
    root = world.federation.root_fingerprint
    code = JoinCode("lung", f"clinic-{way}", "127.0.0.1", world.port, door.port, root, secret).text()
    (tmp_path / "code.txt").write_text(code + "\n")
    words = ["--code-file", tmp_path / "code.txt"] if way == "file" else []
    done = run(
        "join", "--dir", tmp_path / "site", "--proxy", "", *words, stdin=code if way == "stdin" else ""
    )
    door.stop(0.0)
    assert done.returncode == 0, done.stderr
    assert f"clinic-{way} has joined federation lung" in done.stdout
    assert secret not in done.stdout + done.stderr
    assert Home(tmp_path / "site").joined
    assert "# [[allow]]" in (tmp_path / "site" / "policy.toml").read_text()


def test_a_mistyped_code_is_wrong_input(tmp_path: Path) -> None:
    """Exit code 2, and nothing is made."""
    done = run("join", "--dir", tmp_path / "site", stdin="consortium-1.abc.12345678")
    assert done.returncode == 2
    assert not (tmp_path / "site").exists()


def test_pause_and_status_work_where_no_agent_runs(world: World) -> None:
    """The next agent finds the site paused; `status --json` says that none runs, with exit code 1."""
    folder = world.home.folder
    assert run("pause", "--dir", folder).returncode == 0
    done = run("status", "--json", "--dir", folder)
    assert done.returncode == 1
    assert json.loads(done.stdout) == {"running": False, "site": SITE, "federation": "lung", "paused": True}
    assert run("resume", "--dir", folder).returncode == 0
    assert json.loads(run("status", "--json", "--dir", folder).stdout)["paused"] is False
    assert "client start" in run("status", "--dir", folder).stderr


def test_a_folder_that_is_no_clients_is_wrong_input(tmp_path: Path) -> None:
    """Each command says to join first."""
    for words in (["start"], ["status"], ["pause"], ["data", "add", "x", "--source", "sql"]):
        done = run(*words, "--dir", tmp_path)
        assert done.returncode == 2, (words, done.stderr)
        assert "consortium client join" in done.stderr


def test_the_unit_names_program_and_folder(world: World) -> None:
    """And systemd finds no fault with it, where systemd is here."""
    text = systemd_unit(world.home)
    assert f'client start --dir "{world.home.folder}"' in text
    assert "NoNewPrivileges=yes" in text
    assert run("start", "--print-unit", "--dir", world.home.folder).stdout == text


def test_control_speaks_over_a_private_socket_in_a_deep_folder(tmp_path: Path) -> None:
    """Longer than a socket's address may be; unknown calls and errors come back as errors."""
    folder = tmp_path / ("d" * 120)
    folder.mkdir()
    path = folder / "agent.sock"
    with pytest.raises(NotRunning):
        ask(path, "status")

    def fails() -> dict[str, str]:
        raise ConsortiumError("the disk is full")

    control = Control(path, {"status": lambda: {"running": True}, "pause": fails})
    assert path.stat().st_mode & 0o777 == 0o600
    assert ask(path, "status") == {"running": True}
    with pytest.raises(ConsortiumError, match="does not know"):
        ask(path, "run")
    with pytest.raises(ConsortiumError, match="the disk is full"):
        ask(path, "pause")
    control.close()
    with pytest.raises(NotRunning):
        ask(path, "status")


def test_seen_is_durable_and_damage_is_noticed(tmp_path: Path) -> None:
    """Places only go forward; old runs are forgotten; a damaged file stops the agent rather than forgetting all."""
    path = tmp_path / "seen.json"
    seen = Seen(path)
    assert seen.accept("r", Place(1, 0))
    assert seen.accept("r", Place(1, 0))
    assert not seen.accept("r", Place(0, 9))
    assert seen.accept("r", Place(1, 1))
    assert Seen(path).last("r") == Place(1, 1)
    assert Seen(path, lambda: time.time() + 401 * 86400).last("r") is None
    path.write_text("{")
    with pytest.raises(IntegrityError, match="damaged"):
        Seen(path)


def test_a_workers_reason_holds_no_path_and_no_column_of_the_sites_own() -> None:
    """Its copy's folder goes, other paths go, and a reason that names a column goes as a whole."""
    source = {
        "path": "/var/site/spool/ab/snapshot/data.csv",
        "mapping": {"columns": {"sex": {"column": "geschlecht"}, "age": {"column": "age"}}},
    }
    assert (
        _told("site 'h', /var/site/spool/ab/snapshot/data.csv: 2 mistakes", source)
        == "site 'h', data.csv: 2 mistakes"
    )
    assert _told("cannot read /etc/clinic/dbpass; correct it", source) == "cannot read a file; correct it"
    assert "geschlecht" not in _told("column 'sex' (here 'geschlecht') has no value", source)
    assert _told("the age/sex ratio is 1/2", source) == "the age/sex ratio is 1/2"

"""Where the doors of a running server listen: an admin door elsewhere than on 127.0.0.1, an enrolment port in use."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attacker import HERE, closed
from realm import COMMAND, found, wait_for

from consortium.client import joining
from consortium.protocol import credentials
from consortium.protocol.joincode import JoinCode
from consortium.server import pki
from consortium.server.federation import Federation
from consortium.server.sockets import EVERYWHERE


def type_in(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the admin's."""
    return subprocess.run(
        [COMMAND, *map(str, words)], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, **environment},
    )  # fmt: skip


@contextmanager
def running(folder: Path, address: str = HERE) -> Iterator[Path]:
    """The server of a folder, while the block lasts; gives its log."""
    log = folder.with_name("log")
    with log.open("ab") as file:
        server = subprocess.Popen([COMMAND, "server", "start", "--dir", folder], stdout=file, stderr=file)
    try:
        wait_for(
            lambda: type_in("server", "status", "--dir", folder).returncode == 0,
            20,
            "the server does not answer",
        )
        yield log
    finally:
        server.terminate()
        server.wait(20)


def set_address(founded: Federation, address: str) -> None:
    file = founded.folder / "server.toml"
    file.write_text(re.sub(r"^admin_bind = .*$", f'admin_bind = "{address}"', file.read_text(), flags=re.M))


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.7", *EVERYWHERE])
def test_commands_dial_where_the_admin_door_listens(tmp_path: Path, address: str) -> None:
    """`--dir` finds it by the configuration, which was changed after the federation was made; the door's certificate is
    for that address, so that `--server` trusts it there, too."""
    founded = found(tmp_path / "fed")
    set_address(founded, address)
    with running(founded.folder):
        assert type_in("server", "sites", "--dir", founded.folder).returncode == 0
        port = founded.config.admin_port
        assert closed(port) == (address == "127.0.0.7")
        dialled = address if address == "127.0.0.7" else HERE
        done = type_in(
            "server", "sites", "--server", f"https://{dialled}:{port}",
            CONSORTIUM_TOKEN=(founded.folder / "admin.token").read_text().strip(),
            CONSORTIUM_ROOT=str(founded.folder / "root.pem"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    names = pki.names(credentials.chain_in(founded.folder / "server.pem")[0])
    assert (pki.general_name(address) in names) == (address == "127.0.0.7")


@pytest.mark.slow
def test_an_enrolment_port_that_is_taken_costs_nothing(tmp_path: Path) -> None:
    """`invite` says which port, and what to type next, and exits with 2; the code that the site was given before stays
    good, also over a restart of the server, which does not wait for the port; when it is free all is well."""
    founded = found(tmp_path / "fed")
    folder, port = founded.folder, founded.config.enrol_port
    with running(folder):
        done = type_in("server", "invite", "alba", "--dir", folder)
        code = done.stdout.splitlines()[0]
        assert JoinCode.parse(code).enrol_port == port
    with socket.create_server((HERE, port)) as other, running(folder) as log:
        done = type_in("server", "invite", "alba", "--dir", folder)
        assert done.returncode == 2
        for part in (
            f"{HERE}:{port}",
            "in use",
            "enrol_port in server.toml",
            "consortium server invite alba",
        ):
            assert part in done.stderr
        assert done.stdout == ""
        assert log.read_text().count("enrolment door: ") == 2  # opened, of the first start; and this
        done = type_in("server", "invite", "bern", "--dir", folder)
        assert done.returncode == 2
        assert "bern" not in type_in("server", "sites", "--dir", folder).stdout
        other.close()
        wait_for(lambda: not closed(port), 10, "the door is not opened when it can be")
        assert joining.join(code, tmp_path / "alba", proxy="").problem == ""
        assert type_in("server", "invite", "bern", "--dir", folder).returncode == 0

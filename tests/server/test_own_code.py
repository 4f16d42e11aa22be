"""How a confined program tells the run's process that it is over."""

from __future__ import annotations

import errno
import socket
import threading

import pytest

from consortium.protocol import local
from consortium.server.link import Link
from consortium.server.own_code import reason, run_inside


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the server's disk: No space left on device"),
        (ZeroDivisionError("division by zero"), "study code: ZeroDivisionError: division by zero; correct"),
    ],
)
def test_a_full_disk_is_not_laid_on_the_studys_code(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the code raises is the code's; what the disk refuses is the disk's."""
    monkeypatch.setattr("consortium.server.own_code.end_with", lambda parent: None)  # this is no child
    ours, theirs = socket.socketpair()
    heard: list[str] = []

    def hear() -> None:
        heard.append(reason(local.receive(ours)[0]))
        local.send(ours, {})

    def work(link: Link) -> None:
        raise error

    thread = threading.Thread(target=hear)
    thread.start()
    with ours:
        code = run_inside([str(theirs.detach()), "1"], lambda: None, work)
        thread.join()
    assert code == 0
    assert heard[0].startswith(said)

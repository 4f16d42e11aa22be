"""How a site leaves a federation, and what it is told where the federation has shut it out before."""

from __future__ import annotations

import time

from consortium.client.audit import site_audit
from consortium.client.home import Home
from consortium.client.joining import at_site_door
from consortium.protocol import wire
from consortium.protocol.connection import Connection, ShutOutError, UnreachableError
from consortium.protocol.errors import RefusedError
from consortium.protocol.exclusive import alone
from consortium.protocol.files import sync_folder
from consortium.protocol.keys import Lock

TRIES, PAUSE = 3, 0.5
"""How often a server that shuts a site out is asked, and seconds between two times."""


def leave(home: Home, lock: Lock, connection: Connection | None = None) -> None:
    """Leave the federation: the server ends the site's certificates, then the one here is removed. Identity,
    configuration and data stay, so that the site may come back by a new code.

    Raises:
        UnreachableError: the server was not told, so the site still belongs to the federation.
        RefusedError: the server does not let the site in any more, so that there is nothing to leave.
    """
    home.config  # noqa: B018 - where nobody has joined, say so
    if not home.tls_file.exists():
        return
    try:
        _say_goodbye(home, lock, connection)
    except ShutOutError as error:
        raise _no_member(home) from error
    except UnreachableError as error:
        raise UnreachableError(
            f"{error}; the server was not told that site '{home.config.site}' leaves. Try again later, or ask its "
            f"admin to type: consortium server revoke {home.config.site}"
        ) from error
    site_audit(home, home.identity(lock)).note("left", {})
    with alone(home.folder):
        home.tls_file.unlink(missing_ok=True)
        sync_folder(home.folder)


def _say_goodbye(home: Home, lock: Lock, connection: Connection | None) -> None:
    """Tell the server. One that ends the connection unanswered may be starting just now: it is asked again."""
    for again in range(TRIES, 0, -1):
        try:
            at_site_door(home, lock, connection, wire.LEAVE, {"format": wire.FORMAT})
            return
        except ShutOutError:
            if again == 1:
                raise
            time.sleep(PAUSE)


def _no_member(home: Home) -> RefusedError:
    """Why a site that the server does not let in cannot leave, and what its operator can do."""
    config, ends = home.config, home.certificate.not_valid_after_utc
    where = f"{config.host}:{config.port}: does not let site '{config.site}' in"
    if ends.timestamp() < time.time():
        return RefusedError(
            f"{where}, because its certificate has ended ({ends.date()}), so it takes no part any more; {home.folder} "
            f"can be removed. Ask the admin to take it off the roster: consortium server revoke {config.site}"
        )
    return RefusedError(
        f"{where}: federation {config.federation} has revoked this site's certificate, or the site left before, so "
        f"there is nothing to leave (where the server is only full, the same works later). {home.folder} can be "
        f"removed; to come back, ask the admin for a code (consortium server invite {config.site}), then type: "
        f"consortium client join --dir {home.folder}"
    )

"""`consortium client start`: the agent as a program, from its folder's lock to its last line."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from typing import Any

from consortium.client import models, policy
from consortium.client.agent import Agent
from consortium.client.approvals import Approvals
from consortium.client.audit import site_audit
from consortium.client.charges import Charges
from consortium.client.control import Control
from consortium.client.datasets import Datasets
from consortium.client.heads import Decisions
from consortium.client.home import Home
from consortium.client.joining import renew
from consortium.client.proposals import follow
from consortium.client.work import SiteWork
from consortium.protocol.errors import ConsortiumError, InputError
from consortium.protocol.heads import APPROVALS, LEDGER
from consortium.protocol.keys import PASSPHRASE
from consortium.protocol.memory import one_heap

ENDING = 4.0
"""Seconds that threads have to end."""
LOG_BYTES = 5 << 20

_log = logging.getLogger("consortium.agent")


def run(home: Home) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Raises:
        InputError: the site has not joined, its folder is not in order, or an agent runs over it already.
    """
    os.umask(0o077)
    one_heap()
    config = home.config
    with held(home):
        lock = home.lock()
        os.environ.pop(PASSPHRASE, None)
        _log_to(home)
        policy.write_template(home.policy_file)
        _warn_of_policy(home)
        ended = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: ended.set())
        key, approvals = home.identity(lock), Approvals(home)
        approvals.entries(key.public_key())
        log = site_audit(home, key)
        charges = Charges(home, lock, lambda: home.connection(lock))
        agent = Agent(
            home,
            lock,
            SiteWork(home, home.data_key(lock), approvals, key.public_key(), charges.charge, log.note),
            renew=renew,
            others={LEDGER: charges.ledger, APPROVALS: Decisions(approvals, key)},
            studies=lambda connection: follow(connection, home, key, approvals, time.time()),
            models=lambda connection: models.check(home, connection, log.note),
        )
        control = Control(home.socket, _calls(agent, home))
        _log.info(
            "site %s of federation %s: the agent runs (process %d)",
            config.site,
            config.federation,
            os.getpid(),
        )
        if agent.paused:
            _log.warning(
                "the site is paused; to take part again: consortium client resume --dir %s", home.folder
            )
        agent.start()
        try:
            while not ended.wait(3600):
                pass
        finally:
            control.close()
            agent.stop(ENDING)
            _log.info("the agent has ended")


def _warn_of_policy(home: Home) -> None:
    """A mistake in the policy is better known now than when a study is declined for it."""
    try:
        if not policy.load(home.policy_file).rules:
            _log.warning("%s: allows nothing yet; edit it, it counts at once", home.policy_file)
    except InputError as error:
        _log.error("%s", error)


def _calls(agent: Agent, home: Home) -> dict[str, Any]:
    def status() -> dict[str, Any]:
        try:
            data = [one.name for one in Datasets(home).all()]
        except ConsortiumError:
            data = []
        return agent.status() | {"data": data}

    def pause() -> dict[str, Any]:
        agent.pause()
        return {"paused": True}

    def resume() -> dict[str, Any]:
        agent.resume()
        return {"paused": False}

    return {"status": status, "pause": pause, "resume": resume}


@contextlib.contextmanager
def held(home: Home) -> Iterator[None]:
    """Hold the folder: two agents would do the same work twice, and spoil each other's files."""
    try:
        lock = (home.folder / "agent.lock").open("w")
    except OSError as error:
        raise ConsortiumError(
            f"{home.folder}: cannot be written ({error.strerror}); is the disk full or read-only?"
        ) from error
    with lock as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(
                f"{home.folder}: an agent runs here already; see: consortium client status --dir {home.folder}"
            ) from error
        yield


def _log_to(home: Home) -> None:
    """Plain lines to stderr and to the folder's log, which is cut where it grows."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    form = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    for handler in (
        logging.StreamHandler(sys.stderr),
        RotatingFileHandler(home.log, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8"),
    ):
        handler.setFormatter(form)
        root.addHandler(handler)

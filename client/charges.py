"""The site's charges: its ledger, and the heads of it that the server has seen.

Before a round is computed its charge is in the ledger, and the server has countersigned the ledger's head. The server
keeps the highest head that it was shown and gives it back, so a site whose ledger is an older copy, or another history,
finds that out before it spends anything. What was countersigned last is kept beside the ledger.
"""

from __future__ import annotations

import json
import logging
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from typing import Any

from consortium.client.home import Home
from consortium.client.work import Release
from consortium.privacy.ledger import Budget, Charge, Ledger, Question, charge_of, ledger_name
from consortium.privacy.mechanisms import mechanism_of
from consortium.protocol import wire
from consortium.protocol.chain import Head, Witness, check_witness
from consortium.protocol.connection import Connection
from consortium.protocol.errors import ConsortiumError, IntegrityError
from consortium.protocol.files import write_private
from consortium.protocol.keys import Lock
from consortium.protocol.messages import Instruction, parse
from consortium.protocol.study import Study
from consortium.protocol.trust import Trust

NO_DELTA = 1e-5
"""Of a limit where neither the data set nor the study has a delta; such a study is refused by any limit."""

_log = logging.getLogger("consortium.agent")


def ledger_in(home: Home, lock: Lock) -> Ledger:
    """The site's ledger.

    Raises:
        IntegrityError: it is damaged.
    """
    key, config = home.identity(lock), home.config
    return Ledger(home.ledger_file, ledger_name(config.federation, config.site, key.public_key()), key)


class Charges:
    """Charges what the site computes; for one thread. connect: a new connection to the site door."""

    def __init__(
        self,
        home: Home,
        lock: Lock,
        connect: Callable[[], Connection],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._home, self._connect, self._clock = home, connect, clock
        self.ledger = self._ledger = ledger_in(home, lock)
        self._shown: Head | None = None
        self._copied: int | None = None

    def charge(
        self, about: Instruction, study: Study, data: str, most: float | None = None, epoch: int = 0
    ) -> Release:
        """Charge what an instruction asks to compute over a data set, unless it was charged before; gives what is to be
        called before the answer leaves, as that may be another than what was charged.

        most: the epsilon that the study may spend of the data set; None: no limit but the data set's own. epoch: of the
            server that asks.

        Raises:
            RefusedError: a budget would be passed.
            IntegrityError: the ledger is damaged, or not what the server has seen.
            ConsortiumError: the server cannot be asked for its countersignature.
        """
        mechanism = mechanism_of(study)
        if about.kind != "train" and mechanism is not None:
            return lambda _: None  # counts of held-out rows: declared, not covered (docs/privacy.md)
        if self._shown is None:
            self._show()
        question = Question(about.run, about.round, about.attempt, about.model)
        limit = None
        if most is not None:
            limit = Budget(most, study.privacy.delta or NO_DELTA, study.privacy.unit)
        one = charge_of(data, question, about.study, mechanism, epoch)
        charged = self._ledger.charge(one, study.rounds, self._clock(), limit)
        if charged or self._shown != self._ledger.head:
            self._show()
        return lambda header: self._release(one, header, study.rounds, limit)

    def _release(self, charge: Charge, header: bytes, rounds: int, most: Budget | None) -> None:
        """Note an answer before it leaves; one that is not what left before for the same step is charged.

        Raises:
            RefusedError: a budget would be passed.
            IntegrityError, ConsortiumError: as `charge`.
        """
        answer = parse(header)
        if charge.release is None or answer.fields["status"] != "done":
            return
        before = self._ledger.head
        if self._ledger.release(charge, answer.sha256, rounds, self._clock(), most):
            self._show()
        elif self._ledger.head != before:
            self._copy()

    def _copy(self) -> None:
        """Show an entry that charges nothing, so that the server has a copy of it before a poll tells of it. Where that
        fails the next charge does it: no answer is held up."""
        try:
            self._show()
        except IntegrityError:
            raise
        except ConsortiumError as error:
            _log.warning("the server has no copy yet of the ledger's last entry: %s", error)

    def _show(self) -> None:
        connection = self._connect()
        try:
            self._shown, self._copied = show(self._home, self._ledger, connection, self._copied)
        finally:
            connection.close()


def show(home: Home, ledger: Ledger, connection: Connection, copied: int | None = None) -> tuple[Head, int]:
    """Show the server the ledger's head, with the lines that it has no copy of (`privacy/ledger_copy.py`); its
    countersignature is kept, and the head returned, with the number of the last line that it has a copy of.

    copied: that number as it was last; a head and the lines up to it are then kept at once. None: it is asked first.

    Raises:
        IntegrityError: the server has seen entries that are not in this ledger, or its answer is not signed.
        ConsortiumError: it cannot be reached.
    """
    head = ledger.head
    copied = head.sequence if copied is None else copied
    for _ in range(head.sequence + 2):  # a server that says nonsense is not asked for ever
        lines = ledger.copies(copied)
        before, copied = copied, _shown(home, ledger, connection, head, lines)
        if copied >= head.sequence or (copied == before and lines):
            break
    return head, min(copied, head.sequence)


def _shown(home: Home, ledger: Ledger, connection: Connection, head: Head, lines: Mapping[int, bytes]) -> int:
    """Show one head with some sealed lines; the number of the last line that the server has a copy of now."""
    given = [[number, b64encode(line).decode()] for number, line in lines.items()]
    said = connection.request(
        "POST", wire.LEDGER, {"format": wire.FORMAT, "head": head.text, "copies": given}
    )
    document = said.document()
    witness = Witness(Head.parse(wire.field(document, "head", str)), wire.field(document, "signature", str))
    _signed(home.trust(), ledger.name, witness)
    if not ledger.contains(witness.head):
        raise IntegrityError(
            f"{home.ledger_file}: the server has seen entry {witness.head.sequence}, which is not in this ledger: an "
            "older copy was put back, or it was rewritten. Nothing is spent until the newest copy is back in its "
            f"place; where that is lost, end the agent and type: consortium client restore --dir {home.folder}"
        )
    write_private(
        home.witness_file, json.dumps({"head": witness.head.text, "signature": witness.signature}).encode()
    )
    has = document.get("copied")
    return has if type(has) is int and has >= 0 else head.sequence  # a server of a version before keeps none


def checked(home: Home, ledger: Ledger) -> Head:
    """The head of the ledger, once all of it was checked, against what was last countersigned too.

    Raises:
        IntegrityError: naming the entry that is not as it was written, or is missing.
    """
    held = witness_in(home, ledger.name)
    return ledger.verify([held.head] if held else [])


def witness_in(home: Home, name: str) -> Witness | None:
    """What the server countersigned last; None where nothing was yet.

    Raises:
        IntegrityError: it is damaged, or not signed by the server.
    """
    try:
        document: Mapping[str, Any] = json.loads(home.witness_file.read_bytes())
        witness = Witness(Head.parse(document["head"]), str(document["signature"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{home.witness_file}: is damaged; restore it from a backup") from error
    _signed(home.trust(), name, witness)
    return witness


def _signed(trust: Trust, name: str, witness: Witness) -> None:
    for key in trust.keys:
        try:
            check_witness(key, name, witness)
        except IntegrityError:
            continue
        return
    raise IntegrityError("ledger: its head is not countersigned by a key of the trust statement")

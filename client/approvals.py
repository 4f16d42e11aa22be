"""What this site decided about studies: a log that the site's key signs (`protocol/chain.py`), and how it is applied.

    approvals.log    "approved" and "rejected", each over a bundle's SHA-256, the study's settings, this site and
                     federation, and the limits under which it may run
    bundles/SHA.fab  what was approved, to show what is new in the next one

The last entry that names a bundle counts. Every entry goes to the server too, which takes none that does not follow the
one before it: so a log that was cut, or put back from an older copy, is found at the other side, and, because the
server says what it saw last, here, before anything runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from consortium.client import clock
from consortium.client.audit import site_audit
from consortium.client.home import Home
from consortium.client.policy import beyond
from consortium.protocol import bundle as bundles
from consortium.protocol import chain
from consortium.protocol.bundle import Bundle
from consortium.protocol.chain import Entry, Head
from consortium.protocol.chain_writer import Chain
from consortium.protocol.errors import InputError, IntegrityError, RefusedError
from consortium.protocol.files import private_folder, write_private
from consortium.protocol.messages import Instruction

APPROVED, REJECTED = "approved", "rejected"
DAYS = 30.0
"""How long an approval holds where its operator says nothing."""
LONGEST_REASON = 500


@dataclass(frozen=True)
class Approval:
    """One decision. bundle: SHA-256 (hex) of the bundle; study, settings: its name and digest. data: the data set.

    rounds: the most of one run. expires: seconds since the epoch. unconfined: its code may run without a sandbox.
    epsilon: the most that this study may spend of the data set, all its runs together; None: no limit of its own.
    by: "operator", or "policy" where policy.toml allowed it.
    clock: times up to this one, at which the site acted, were ahead, as the operator said; 0: none was.
    """

    federation: str
    site: str
    study: str
    settings: str
    bundle: str
    data: str
    rounds: int
    expires: float
    unconfined: bool = False
    by: str = "operator"
    epsilon: float | None = None
    clock: float = 0.0


def name_of(federation: str, site: str) -> str:
    """The name of a site's log of approvals, which is part of every hash in it."""
    return f"approvals {federation} {site}"


class Approvals:
    """The decisions of one site. For any number of threads; every question reads the log anew where it has changed."""

    def __init__(self, home: Home) -> None:
        self.path = home.folder / "approvals.log"
        self._bundles = home.folder / "bundles"
        self._home, self._lock = home, threading.Lock()
        self._read: tuple[object, list[Entry]] = (None, [])
        self.witnessed: tuple[Head, ...] = ()
        """The decisions that the server has seen, the last one last."""

    @property
    def name(self) -> str:
        """The log's name."""
        return name_of(self._home.config.federation, self._home.config.site)

    # Deciding

    def approve(self, key: Ed25519PrivateKey, bundle: Bundle, approval: Approval, now: float) -> Head:
        """Write an approval down, and keep the bundle.

        Raises:
            IntegrityError: the log is damaged, or behind what the server has seen.
        """
        write_private(private_folder(self._bundles) / f"{bundle.digest}{bundles.SUFFIX}", bundle.content)
        body = asdict(approval)
        if not approval.clock:
            del body["clock"]  # which versions before do not know
        return self._decided(key, APPROVED, body, now)

    def reject(self, key: Ed25519PrivateKey, bundle: Bundle, reason: str, now: float) -> Head:
        """Write a rejection down: of what was never approved, or of what was and is no more."""
        config = self._home.config
        about = {"federation": config.federation, "site": config.site, "study": bundle.study.name}
        return self._decided(
            key, REJECTED, {**about, "bundle": bundle.digest, "reason": reason[:LONGEST_REASON]}, now
        )

    def _decided(self, key: Ed25519PrivateKey, kind: str, body: Mapping[str, Any], now: float) -> Head:
        self.entries(key.public_key())
        head = Chain(self.path, self.name, key).append(kind, body, now)
        about = {"decision": kind, "study": body["study"], "bundle": body["bundle"], "entry": head.text}
        site_audit(self._home, key).note("decided", about)
        return head

    # Asking

    def entries(self, key: Ed25519PublicKey) -> list[Entry]:
        """All decisions, verified.

        Raises:
            IntegrityError: naming the entry that is not as it was written, or missing.
        """
        with self._lock:
            state = (_state(self.path), self.witnessed)
            if self._read[0] != state or self._read[0] is None:
                chain.verify(self.path, self.name, [key], self.witnessed)
                self._read = (state, list(chain.entries(self.path, self.name)))
            return self._read[1]

    def last(self, key: Ed25519PublicKey, bundle: str) -> Entry | None:
        """The decision that counts for a bundle; None where there is none. Raises as `entries`."""
        found = [entry for entry in self.entries(key) if entry.body.get("bundle") == bundle]
        return found[-1] if found else None

    def allowed(
        self, key: Ed25519PublicKey, bundle: Bundle, about: Instruction, now: float, latest: float = 0.0
    ) -> Approval | None:
        """The operator's approval of just this bundle for just this instruction; None where the operator has decided
        nothing, so that the policy may. latest: when the site last acted, seconds since the epoch.

        Raises:
            RefusedError: it was rejected, has expired, or goes beyond its limits; or the clock was set back, so that
                nobody can tell whether it has expired.
            IntegrityError: the log is not what it was, or its approval is not of this site, federation and study.
        """
        entry = self.last(key, bundle.digest)
        what = f"study '{bundle.study.name}'"
        if entry is None or (entry.kind == APPROVED and entry.body.get("by") == "policy"):
            return None
        if entry.kind == REJECTED:
            raise RefusedError(f"approval: {what} was rejected by the site's operator")
        approval = _approval(entry)
        config = self._home.config
        expected = (config.federation, config.site, bundle.study.digest, bundle.digest)
        found = (approval.federation, approval.site, approval.settings, approval.bundle)
        if found != expected or (about.federation, about.site, about.study) != expected[:3]:
            raise IntegrityError(
                f"approval: entry {entry.sequence} is not of this site, federation and study"
            )
        latest = max(latest, *(one.at for one in self.entries(key)))
        if approval.clock < latest and (why := clock.why_not(now, latest)):
            raise RefusedError(
                f"approval: {why}, so that of {what} does not hold; the site's operator is to look"
            )
        if now >= approval.expires:
            raise RefusedError(f"approval: that of {what} has expired")
        if about.round > approval.rounds:
            raise RefusedError(
                f"approval: that of {what} is for {approval.rounds} rounds, this is {about.round}"
            )
        return approval

    def bundle(self, digest: str) -> Bundle | None:
        """A bundle that was approved here."""
        path = self._bundles / f"{digest}{bundles.SUFFIX}"
        return bundles.read(path.read_bytes(), digest) if path.is_file() else None

    def before(self, key: Ed25519PublicKey, bundle: Bundle) -> Bundle | None:
        """The bundle of the same study's name that was approved last, other than this one."""
        for entry in reversed(self.entries(key)):
            named = entry.body.get("study") == bundle.study.name and entry.body.get("bundle") != bundle.digest
            if entry.kind == APPROVED and named and (found := self.bundle(str(entry.body["bundle"]))):
                return found
        return None


def made(
    home: Home,
    bundle: Bundle,
    data: str,
    *,
    rounds: int,
    days: float,
    now: float,
    epsilon: float | None = None,
    **more: Any,
) -> Approval:
    """An approval of a bundle at this site.

    Raises:
        InputError: a limit is none.
    """
    if not 1 <= rounds <= 1_000_000:
        raise InputError(f"--rounds: got {rounds}; a number from 1 to 1000000 would be right")
    if rounds < bundle.study.rounds:
        raise InputError(
            f"--rounds: got {rounds}, and study '{bundle.study.name}' has {bundle.study.rounds}; approve as "
            "many, or ask its admin for a shorter one"
        )
    if not 0 < days <= 400:
        raise InputError(f"--days: got {days:g}; a number above 0 and at most 400 would be right")
    config, study = home.config, bundle.study
    if epsilon is not None and (why := beyond(study, epsilon)):
        raise InputError(
            f"--epsilon: got {epsilon:g}, and study '{study.name}' {why}; ask its admin for another"
        )
    return Approval(
        config.federation,
        config.site,
        study.name,
        study.digest,
        bundle.digest,
        data,
        rounds,
        now + days * 86400,
        epsilon=epsilon,
        **more,
    )


def _approval(entry: Entry) -> Approval:
    try:
        return Approval(**entry.body)
    except TypeError as error:
        raise IntegrityError(
            f"approval: entry {entry.sequence} has a form that this version does not know"
        ) from error


def _state(path: Path) -> object:
    try:
        about = path.stat()
    except FileNotFoundError:
        return ("none",)
    return about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def decided(entry: Entry | None) -> str:
    """A decision in words, for the operator."""
    if entry is None:
        return "not decided"
    if entry.kind == REJECTED:
        return f"rejected: {entry.body.get('reason', '')}"
    until = time.strftime("%Y-%m-%d", time.localtime(float(entry.body["expires"])))
    by = " by policy.toml" if entry.body.get("by") == "policy" else ""
    most = f", epsilon {entry.body['epsilon']:g}" if entry.body.get("epsilon") is not None else ""
    return f"approved{by} for {entry.body['rounds']} rounds{most} until {until}"

"""What a site does with an instruction that the agent took: the policy, the data, and the worker of the run.

`Work` is the seam: the agent verifies, fetches, signs and sends, and knows nothing of what is computed.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from consortium.client import policy
from consortium.client.approvals import Approvals
from consortium.client.audit import LONGEST, asked
from consortium.client.datasets import Dataset, Datasets
from consortium.client.home import Home
from consortium.client.snapshot import Snapshots, erase, place_of
from consortium.client.worker_process import WorkerDied, WorkerLate, WorkerProcess
from consortium.protocol import sandbox
from consortium.protocol.bundle import Bundle
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.protocol.files import private_folder
from consortium.protocol.messages import Instruction
from consortium.protocol.sealed import DataKey, Sealed
from consortium.protocol.study import Study

DEATHS = 3
"""How often a worker may die at one instruction before the site declines it."""
MOST_WARM = 4
"""Workers that are kept at once; each holds a model and a run's data in memory."""
IDLE = 1800.0
"""Seconds after which a worker that is asked nothing is ended."""

_log = logging.getLogger("consortium.agent")


@dataclass(frozen=True)
class Given:
    """An instruction whose signature, place and content were checked.

    header: as it was signed. about: the same, without its content. content: a file, None where it has none.
    model: SHA-256 of the model in the content, as it was found while the content was hashed; "" where it has none.
    epoch: of the server that asks. latest: when this site last acted, by its own clock, seconds since the epoch.
    """

    header: bytes
    about: Instruction
    content: BinaryIO | None
    study: Study
    model: str = ""
    epoch: int = 0
    bundle: Bundle | None = None
    latest: float = 0.0


@dataclass(frozen=True)
class Answered:
    """An answer, not signed yet: the header of `messages.encode`, and a file that begins with the content. key: what
    the file is encrypted under, None where it is not. freed: whether nobody has the instruction's content open any more
    but who gave it."""

    header: bytes
    content: BinaryIO | None = None
    key: DataKey | None = None
    freed: bool = False

    @property
    def size(self) -> int:
        """Bytes that the file holds. Raises IntegrityError where it is not encrypted as it should be."""
        if self.content is None:
            return 0
        if self.key is not None:
            return Sealed(self.content.fileno(), self.key, "what the worker gave").size
        return os.fstat(self.content.fileno()).st_size


Release = Callable[[bytes], None]
"""Called with the header of an answer before it leaves; raises RefusedError where it must not."""
Charge = Callable[[Instruction, Study, str, float | None, int], Release]


class Interrupted(ConsortiumError):  # noqa: N818 - it is what happened, not a mistake
    """The work was ended by `Work.interrupt`, `Work.end` or `Work.stop`."""


class Work(Protocol):
    """Turns instructions into answers, one at a time; the same question again must get the same answer."""

    def begin(self, runs: set[str], over: set[str]) -> None:
        """The agent starts. runs: may go on; what any other left but its answers can be removed. over: have ended for
        good; everything of them can."""

    def answer(self, given: Given) -> Answered:
        """Do what is asked.

        Raises:
            RefusedError: the site does not; the text is sent to the server.
            Interrupted: by `interrupt`, `end` or `stop`.
            ConsortiumError: it cannot; the text is for the site's log alone.
        """

    def end(self, run: str) -> None:
        """Nobody waits for what is under way for a run: end it, from any thread; `answer` raises then."""

    def finished(self, run: str, for_good: bool) -> None:
        """The run asks nothing more of this site; for_good: nor may it go on later, so its answers can go, too."""

    def tidy(self, recent: Callable[[str], bool]) -> None:
        """End and remove what is not needed now; `recent` says whether a run asked something lately."""

    def interrupt(self) -> None:
        """End what is under way, from any thread; `answer` raises then."""

    def stop(self) -> None:
        """As `interrupt`, for good: leave no process behind."""


@dataclass
class _Warm:
    process: WorkerProcess
    data: str
    epoch: int
    used: float


class SiteWork:
    """The real work of a site.

    key: what it keeps is encrypted under. charge: charges what an instruction asks to compute over a data set, of which
    its study may spend so much epsilon, for a server of that epoch, before it is computed; raises RefusedError where
    the site does not. note: writes to the audit log.
    """

    def __init__(
        self,
        home: Home,
        key: DataKey,
        approvals: Approvals,
        public: Ed25519PublicKey,
        charge: Charge,
        note: Callable[[str, Mapping[str, Any]], object] = lambda kind, body: None,
    ) -> None:
        self._note = note
        self._home, self._key, self._data = home, key, Datasets(home)
        self._approvals, self._public, self._charge = approvals, public, charge
        self._snapshots = Snapshots(home.config.site, home.spool, key)
        self._lock = threading.Lock()
        self._warm: OrderedDict[str, _Warm] = OrderedDict()
        self._runs: set[str] = set()
        self._halts, self._ends, self._doing = 0, Counter[str](), ""
        self._stopped = False

    def answer(self, given: Given) -> Answered:
        """As `Work.answer`. A worker that dies is replaced, and the instruction is done again."""
        run = given.about.run
        with self._lock:
            self._doing, halts = run, self._halted(run)
        data, unconfined, epsilon = self._allowed(given)
        release = self._charge(given.about, given.study, data.name, epsilon, given.epoch)
        for death in range(1, DEATHS + 1):
            process = self._worker(given, data, unconfined, halts)
            try:
                seconds = given.about.expires - time.time()
                header, content = process.ask(run, given.header, given.content, given.model, seconds)
                _released(release, header, content)
                freed = (
                    given.study.built_in and process.freed
                )  # other code may keep hold of what it was given
                return Answered(header, content, self._key.of(f"run {run}"), freed)
            except WorkerDied as error:
                self._drop(run)
                if self._halted(run) != halts:
                    raise Interrupted("the work was interrupted") from error
                _log.warning("run %s, round %d: %s", run, given.about.round, error)
                self._note(
                    "fault", asked(given.about) | {"error": "WorkerDied", "text": str(error)[:LONGEST]}
                )
                if death == DEATHS:
                    raise RefusedError(f"{error}, {DEATHS} times; the site's log says more") from error
            except WorkerLate:
                if process.up:
                    self._drop(run)
                raise
        raise AssertionError

    def _halted(self, run: str) -> tuple[int, int]:
        """How often what was under way for a run has been ended."""
        return self._halts, self._ends[run]

    def _allowed(self, given: Given) -> tuple[Dataset, bool, float | None]:
        """The data that the operator's approval, else the policy, gives to a study; whether its code needs no sandbox;
        and what epsilon it may spend."""
        study = given.study
        if given.about.kind == "judge" and not self._rules().gates:
            raise RefusedError("policy: gates = false: this site judges no model that is to be promoted")
        if given.bundle is not None:
            approval = self._approvals.allowed(
                self._public, given.bundle, given.about, time.time(), given.latest
            )
            if approval is not None:
                return self._registered(approval.data), approval.unconfined, approval.epsilon
        try:
            rule = self._rules().rule_for(study)
        except RefusedError as error:
            _log.warning("%s; to allow it, edit %s", error, self._home.policy_file)
            raise
        return self._registered(rule.data), False, rule.epsilon

    def _rules(self) -> policy.Policy:
        try:
            return policy.load(self._home.policy_file)
        except InputError as error:
            _log.error("%s", error)
            raise RefusedError(
                "policy: it cannot be read, so nothing is allowed; the site's log says more"
            ) from error

    def _registered(self, name: str) -> Dataset:
        try:
            return self._data.get(name)
        except InputError as error:
            _log.error("%s", error)
            raise RefusedError("the site's policy names data that the site has not registered") from error

    def _code(
        self, given: Given, unconfined: bool, read: str
    ) -> tuple[dict[str, str], dict[str, list[str]] | None]:
        """What a worker is told of the study's own code and where it keeps its state, and what it may reach. A model
        that the server sends is foreign, too: it is judged behind the same sandbox."""
        judges = {"judges": "yes"} if given.about.kind == "judge" else {}
        if given.study.built_in and not judges:
            return {"state": str(self._home.state)}, None
        why = sandbox.missing()
        if given.bundle is None or (why and not unconfined):
            _log.warning("run %s: what it brings is refused: %s", given.about.run, why)
            raise RefusedError("this site has no sandbox for code or models that come from elsewhere")
        place = place_of(self._home.spool, given.about.run)
        erase(place / "code")
        given.bundle.unpack(place / "code")
        state = private_folder(place_of(private_folder(self._home.state), given.about.run))
        told = {"code": str(place / "code"), "state": str(state), **judges}
        if given.study.app is not None:
            told["app"] = "flower"
        if why:
            _log.warning("run %s: its code runs without a sandbox, as the operator allowed", given.about.run)
            return told, None
        places = {
            "read": [told["code"], read],
            "write": [str(private_folder(place / "work")), str(state)],
            "apart": [str(self._home.folder)],
        }
        return told, places

    def _worker(self, given: Given, data: Dataset, unconfined: bool, halts: tuple[int, int]) -> WorkerProcess:
        """The run's worker, which is started where there is none, over a snapshot that is laid where there is none."""
        run = given.about.run
        with self._lock:
            warm = self._warm.get(run)
            if warm is not None and (warm.data, warm.epoch) == (data.name, given.epoch):
                warm.used = time.monotonic()
                self._warm.move_to_end(run)
                return warm.process
        self._drop(run)
        self._runs.add(run)
        try:
            source = self._snapshots.lay(run, data)
        except (InputError, IntegrityError) as error:
            if self._halted(run) == halts:
                _log.error("run %s: %s", run, error)
                raise RefusedError("the site's data could not be read; its log says more") from error
            raise Interrupted("the work was interrupted") from error
        about = {
            "study": given.study.text,
            "site": given.about.site,
            "source": source.document(),
            "epoch": given.epoch,
            "key": self._key.of(f"run {run}").secret.hex(),
        }
        told, places = self._code(given, unconfined, str(source.path.parent))
        folder = place_of(self._home.spool, run) / "work"
        with self._lock:
            if self._stopped or self._halted(run) != halts:
                raise Interrupted("the work was interrupted")
            wrote = "worker" if given.study.built_in else "worker, perhaps the study's own words"
            process = WorkerProcess(
                about | told, folder, lambda line: _log.warning("%s: %s", wrote, line), places
            )
            self._warm[run] = _Warm(process, data.name, given.epoch, time.monotonic())
            _log.info("run %s: worker %d is started", run, process.pid)
            spare = list(self._warm)[:-MOST_WARM]
        for one in spare:
            self._drop(one)
        return process

    def _drop(self, run: str) -> None:
        with self._lock:
            warm = self._warm.pop(run, None)
        if warm is not None:
            warm.process.close()

    def end(self, run: str) -> None:
        """As `Work.end`; the run's worker ends with it."""
        with self._lock:
            self._ends[run] += 1
            copying, warm = self._doing == run, self._warm.get(run)
        if copying:
            self._snapshots.interrupt()
        if warm is not None:
            warm.process.kill()

    def finished(self, run: str, for_good: bool) -> None:
        """End the run's worker, remove its copy of the data and, for good, its state."""
        self._drop(run)
        self._snapshots.remove(run)
        self._runs.discard(run)
        if for_good:
            self._forget(run)

    def _forget(self, run: str) -> None:
        """Remove what `client/store.py` keeps of a run."""
        name = place_of(self._home.state, run).name
        for pattern in (f"{name}*", f".{name}*"):  # the second: what a killed worker had only begun to write
            for path in self._home.state.glob(pattern):
                erase(path)

    def tidy(self, recent: Callable[[str], bool]) -> None:
        """End idle workers, remove copies of runs that ask nothing any more."""
        with self._lock:
            idle = [run for run, one in self._warm.items() if time.monotonic() - one.used > IDLE]
        for run in idle:
            self._drop(run)
        for run in [run for run in self._runs if not recent(run)]:
            self.finished(run, for_good=False)

    def begin(self, runs: set[str], over: set[str]) -> None:
        """Remove the copies that earlier starts left of any run but these, and the states of those that are over."""
        self._runs |= runs
        self._snapshots.keep_only(runs)
        for run in over:
            self._forget(run)

    def interrupt(self) -> None:
        """End every worker; a run's next instruction starts another."""
        with self._lock:
            self._halts += 1
            processes = [one.process for one in self._warm.values()]
        self._snapshots.interrupt()
        for process in processes:
            process.kill()

    def stop(self) -> None:
        """As `interrupt`, and nothing is started any more."""
        with self._lock:
            self._stopped = True
        self._snapshots.stop()
        self.interrupt()


def _released(release: Release, header: bytes, content: BinaryIO | None) -> None:
    try:
        release(header)
    except BaseException:
        if content is not None:
            content.close()
        raise

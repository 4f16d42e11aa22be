"""The worker of one run at a site: a warm process with data and model, without keys, that answers instructions.

It speaks over the socket that it was started with (`protocol/local.py`). First it is told what it works on:

    {"study": text, "app": "flower" or nothing, "code": folder or "", "site": name, "source": {"path", "mapping",
     "key": hex, "gaps", "sealed": how many files of it are encrypted}, "state": folder, "key": hex, "epoch": int,
     "judges": whether models are judged that the server sends}

A study that brings code is worked on only by a process that was confined (`protocol/confined.py`), or whose operator
approved it without.

When it has loaded these data, it says {"up": true}. Then, for each instruction, {"run", "header": text, "model":
digest} and a file with the content comes in, and {"header": text, "freed": whether nothing of the content is mapped
here any more} and perhaps a file goes out, or {"error": text} that
holds no path, no column of the site's own and no record. An answer is durable in `state` before it goes out (it is that
very file, encrypted under "key"), and the same question gets the same answer without anything being computed.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import re
import resource
import signal
import socket
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from consortium.client.judging import check_graph
from consortium.client.sealed_copy import most_open, open_all
from consortium.client.site import Site, check_model, open_site, start
from consortium.client.snapshot import of_run
from consortium.client.store import Kept, Store, asked_for
from consortium.client.task import Source, task_of
from consortium.client.trainer import Resident
from consortium.protocol import local
from consortium.protocol.errors import ConsortiumError, IntegrityError, RefusedError
from consortium.protocol.memory import keep_freed_memory
from consortium.protocol.messages import Instruction, assemble, encode, parse
from consortium.protocol.sealed import DataKey
from consortium.protocol.study import Study
from consortium.strategies.chosen import strategy_of

if TYPE_CHECKING:
    from consortium.client.flower_app import AppWorker

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
"""What a disk says that is full, read-only or broken; other errors come of what is read, a study's code among it."""
LONGEST_REASON = 2000
_PARENT_ENDED = 1  # PR_SET_PDEATHSIG

_log = logging.getLogger("worker")


def serve(descriptor: int, confine: Callable[[], None]) -> int:
    """Answer instructions until the other end closes the socket; returns the exit code. confine: as in `worker.py`."""
    _confine()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    connection = socket.socket(fileno=descriptor)
    worker: Worker | AppWorker | None = None
    try:
        about, _ = local.receive(connection)
        if about.get("app"):
            import consortium.client.flower_app  # noqa: F401 - likewise
        if about.get("judges"):
            import onnxruntime  # noqa: F401 - before it is confined
        trouble = _opened(about)
        confine()
        worker = _warm(about, trouble)
        local.send(connection, {"up": True})
        while True:
            question, files = local.receive(connection)
            content: list[int] = []
            try:
                worker = worker or _worker(about, trouble)
                run, asked, model = (str(question[name]) for name in ("run", "header", "model"))
                header, content = worker.reply(run, asked.encode(), model, files)
                reply = {"header": header.decode(), "freed": isinstance(worker, Worker) and worker.freed}
            except ConsortiumError as error:
                _log.error("%s", "\n".join([str(error), *getattr(error, "__notes__", ())]))
                reply = {"error": _told(str(error).partition("\n")[0], about["source"])}
            except OSError as error:
                _log.error("%s: cannot be written or read (%s)", error.filename or "a file", error.strerror)
                reply = {"error": _failure(error)}
                if error.errno in DISK:
                    reply = {"error": f"the site's disk could not keep the answer ({error.strerror})"}
            except Exception as error:  # noqa: BLE001 - it costs this instruction only
                _log.exception("failed")
                reply = {"error": _failure(error)}
            finally:
                local.close(files)
            local.send(connection, reply, content)
            local.close(content)
            keep_freed_memory()  # the data are loaded: from here on the same large arrays come and go
    except local.ClosedError:
        return 0


def _opened(about: Mapping[str, Any]) -> Exception | None:
    """Have the data of a run in memory, as far as they lie encrypted, and bound how many files are open; what is wrong
    with them."""
    source = about["source"]
    sealed = int(source.get("sealed", 0))
    most = most_open(sealed)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if not sealed:
        return None
    try:
        open_all(Path(source["path"]).parent, sealed, of_run(DataKey(bytes.fromhex(about["key"]))))
    except (ConsortiumError, OSError) as error:
        return error
    return None


def _worker(about: Mapping[str, Any], trouble: Exception | None) -> Worker | AppWorker:
    if not about.get("app"):
        return Worker(about, trouble)
    if trouble is not None:
        raise trouble
    from consortium.client.flower_app import AppWorker

    return AppWorker(about)


def _warm(about: Mapping[str, Any], trouble: Exception | None) -> Worker | AppWorker | None:
    """A worker with its data loaded; None where that cannot be: the first instruction will say why."""
    try:
        worker = _worker(about, trouble)
        worker.warm()
    except ConsortiumError:
        return None
    except Exception:  # noqa: BLE001 - of the study's own code; the first instruction will meet it again
        _log.exception("not ready; the first instruction tries again")
        return None
    return worker


def _confine() -> None:
    """Die with the agent, and leave no core file."""
    ctypes.CDLL(None).prctl(_PARENT_ENDED, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


class Worker:
    """One site of one run. trouble: why its data are not in memory; what was answered before is answered all the same.

    Raises:
        InputError: the study does not fit this version.
    """

    def __init__(self, about: Mapping[str, Any], trouble: Exception | None = None) -> None:
        self._trouble = trouble
        torch.set_num_threads(1)  # more would change the bits
        code = about.get("code", "")
        self._study = Study.parse(about["study"], folder=Path(code) if code else None)
        if not (self._study.built_in or code):
            raise RefusedError("the code of the study is not here")
        self._given: Mapping[str, Any] = about["source"]
        self._state, self._key = Path(about["state"]), DataKey(bytes.fromhex(about["key"]))
        self._epoch = int(about["epoch"])
        given = self._given
        source = Source(
            about["site"],
            Path(given["path"]),
            mapping=given["mapping"],
            key=bytes.fromhex(given["key"]),
            gaps=tuple(given["gaps"]),
        )
        task, strategy = task_of(self._study), strategy_of(self._study)
        self._net: Resident = start(self._study, task, strategy.local)
        self._net.lends = True  # an update is stored before anything else is computed
        self._site: Site = open_site(self._study, task, strategy.local, self._net, source)
        self._run, self._kept = "", Kept()
        self._content: weakref.ref[Any] | None = None

    @property
    def freed(self) -> bool:
        """Whether nothing refers to the content of the last instruction any more, so that its file may be written
        over: the study's statistics, for one, are kept as they came with the first."""
        return self._content is None or self._content() is None

    def warm(self) -> None:
        """Load the site's data. Raises as the task's `data`."""
        if self._trouble is not None:
            raise self._trouble
        self._site.warm()

    def reply(self, run: str, header: bytes, model: str, files: list[int]) -> tuple[bytes, list[int]]:
        """Header of the answer to an instruction whose content was hashed on its way here, and the file that was kept.

        model: the digest of the model in the content, as it was found then.
        """
        parsed = parse(header)
        content = _mapped(files)
        self._content = weakref.ref(content.obj) if len(content) else None
        instruction = assemble(parsed, content)
        if not isinstance(instruction, Instruction) or instruction.run != run:
            raise IntegrityError("the worker was given something else than an instruction of its run")
        store = Store(self._state, run, self._key, self._epoch)
        # Noise makes each answer that is computed another release; without it, it comes to the same.
        private = self._study.privacy.mechanism != "none"
        sent = self._answer(
            store, instruction, model, asked_for(instruction, parsed.sha256) if private else ""
        )
        return sent, [store.open()] if parse(sent).length else []

    def _answer(self, store: Store, instruction: Instruction, model: str, asked: str) -> bytes:
        """The answer given before to the same instruction, or a new one, kept before it is returned: its header."""
        if instruction.study != self._study.digest or instruction.site != self._site.name:
            raise IntegrityError("the instruction is for another study or site than this worker")
        if self._run != instruction.run:
            if self._run:
                raise IntegrityError("the instruction is for another run than this worker")
            self._kept = store.load().without_content()
            self._run, self._site.memory = instruction.run, self._kept.memory
        before = self._kept.header_to(instruction, asked)
        if before is not None:
            return before
        if self._trouble is not None:
            raise self._trouble
        if instruction.kind == "judge":
            check_graph(instruction)
        else:
            check_model(instruction, self._net, model)
        try:
            answer = self._site.answer(instruction)
            if answer.status == "declined":
                return encode(replace(answer, reason=_told(answer.reason, self._given)))[0]
            self._kept = store.save(self._kept.after(self._site.memory, answer, asked))
            return self._kept.header
        finally:
            self._site.memory = self._kept.memory  # what was not kept did not happen


def _failure(error: Exception) -> str:
    """What the server is told of a fault that nobody foresaw."""
    mapped = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if (
        mapped or isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    ):  # torch's is a RuntimeError
        return "the site's worker ran out of memory"
    return f"the worker failed ({type(error).__name__}); the site's log says more"


def _mapped(files: list[int]) -> memoryview:
    """The content of the first file, read-only and without a copy; empty where there is none."""
    if not files or not os.fstat(files[0]).st_size:
        return memoryview(b"")
    return memoryview(mmap.mmap(files[0], 0, access=mmap.ACCESS_READ))


def _told(reason: str, source: Mapping[str, Any]) -> str:
    """A reason as the server may read it: without paths, and not at all where it names a column of the site's own."""
    own = {
        str(column["column"])
        for name, column in source["mapping"].get("columns", {}).items()
        if "column" in column and column["column"] != name
    }
    if any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", reason) for word in own):
        return "the site's data do not fit the study; the site's log says more"
    folder = str(Path(source["path"]).parent) + os.sep
    return re.sub(r"(?<![\w.])/[\w.@~+-][^\s,;:'\")]*", "a file", reason.replace(folder, ""))[:LONGEST_REASON]

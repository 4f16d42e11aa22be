"""Gates under way: the exported bytes of a version, and those of the champion, are judged at the sites.

Each of the two models is asked for by an instruction of the kind `judge`, signed like any other, in a run of its own
that ends with it. What the answers give stands in `server/gate.py`; it is signed and kept beside the version
(`server/serving/gate_file.py`). A gate lives in the server's memory: after a restart it is begun again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from consortium.protocol import bundle as bundles
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, RefusedError
from consortium.protocol.messages import (
    Answer,
    Instruction,
    Payload,
    assemble,
    contents,
    header_of,
    parse,
)
from consortium.protocol.metrics import judged_by
from consortium.protocol.study import Study
from consortium.server import admission, gate, seal, tally
from consortium.server.archive import Archive
from consortium.server.exchange import Exchange
from consortium.server.federation import Federation
from consortium.server.model import ONNX, verified
from consortium.server.offers import Received
from consortium.server.serving import gate_file
from consortium.server.serving.acts import Note
from consortium.server.serving.registry import Registry

RUN = "gate/"
"""How the names of runs that judge begin; no study's do."""
LARGEST = 4 << 20
"""Bytes of an answer."""
MARGIN = 0.01
CLOCKS = 60.0
"""Seconds that an instruction is valid beyond the deadline."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Version:
    """A registered bundle that was verified. graph: its ONNX file; model: the SHA-256 (hex) of that."""

    number: int
    bundle: str
    graph: bytes
    model: str
    study: Study


@dataclass(frozen=True)
class Stand:
    """How a gate stands. result: the document that is kept, once it is over; error: why there is none."""

    name: str
    version: int
    state: str
    result: Mapping[str, Any] | None = None
    error: str = ""


class Gates:
    """For any number of threads; one gate at a time. note: writes to the server's audit log."""

    def __init__(
        self,
        federation: Federation,
        archive: Archive,
        exchange: Exchange,
        clock: Callable[[], float] = time.time,
        note: Note | None = None,
    ) -> None:
        self._federation, self._archive, self._exchange, self._clock = federation, archive, exchange, clock
        self._registry = Registry(federation.folder / gate_file.MODELS, clock, note=note)
        self._lock = threading.Lock()
        self._stands: dict[str, Stand] = {}

    def begin(self, name: str, number: int | None, margin: float, minimum: float | None) -> Stand:
        """Begin the gate of a version, the candidate where none is named.

        Raises:
            InputError, IntegrityError: there is no such version, or it cannot be judged.
            RefusedError: another gate is under way.
        """
        if not 0 <= margin < math.inf or (minimum is not None and not math.isfinite(minimum)):
            raise InputError("margin: a number from 0 would be right; minimum: a number")
        shelf = self._registry.state().models.get(name)
        number = shelf.candidate if shelf is not None and number is None else number
        found = shelf.version(number) if shelf is not None and number is not None else None
        if shelf is None or found is None or number is None:
            raise InputError(
                f"{self._registry.folder}: there is no such version of '{name}', or no candidate; see: "
                f"consortium model list {self._registry.folder}"
            )
        if number == shelf.champion:
            raise InputError(f"{name}@{number}: is the champion already")
        candidate = self._version(name, number)
        champion = None if shelf.champion is None else self._version(name, shelf.champion)
        if champion is not None:
            _refuse_others(candidate.study, champion.study)
        terms = gate.Terms(judged_by(candidate.study.metric), margin, minimum)
        with self._lock:
            if any(one.state == "running" for one in self._stands.values()):
                raise RefusedError("a gate is under way; wait until it is over")
            stand = self._stands[name] = Stand(name, number, "running")
        work = threading.Thread(
            target=self._main, args=(name, terms, candidate, champion), name=f"gate {name}", daemon=True
        )
        work.start()
        return stand

    def stand(self, name: str) -> Stand:
        """How the last gate of a model stands. Raises InputError where there is none since the server was started."""
        with self._lock:
            if name not in self._stands:
                raise InputError(f"no gate of '{name}' is known; begin one: consortium model gate {name}")
            return self._stands[name]

    def _version(self, name: str, number: int) -> _Version:
        shelf = self._registry.state().models[name]
        place = self._registry.bundle(name, shelf, number)
        files = verified(place, self._federation.root_fingerprint)
        if ONNX not in files:
            raise InputError(f"{place}: has no {ONNX}, so it cannot be judged as it would be served")
        digest = str(json.loads(files[seal.CONTRACT])["study"]["digest"])
        content = self._archive.bundle_of(digest)
        if content is None:
            raise InputError(f"{name}@{number}: its study {digest[:12]} is not known to this server")
        version = shelf.version(number)
        assert version is not None
        graph = files[ONNX]
        study = bundles.read(content).study
        return _Version(number, version.bundle, graph, hashlib.sha256(graph).hexdigest(), study)

    # Its thread

    def _main(self, name: str, terms: gate.Terms, candidate: _Version, champion: _Version | None) -> None:
        stand = Stand(
            name, candidate.number, "failed", error="a fault in Consortium; the server's log says more"
        )
        try:
            stand = self._gated(name, terms, candidate, champion)
        except ConsortiumError as error:
            stand = Stand(name, candidate.number, "failed", error=str(error))
        except OSError as error:
            why = f"{error.filename or 'a file'}: cannot be written ({error.strerror}); gate it again"
            stand = Stand(name, candidate.number, "failed", error=why)
        except Exception:  # noqa: BLE001 - it costs this gate alone
            _log.exception("gate of %s@%d: a fault in Consortium", name, candidate.number)
        finally:
            with self._lock:
                self._stands[name] = stand
        _log.info("gate of %s@%d: %s", name, candidate.number, stand.error or stand.state)

    def _gated(self, name: str, terms: gate.Terms, candidate: _Version, champion: _Version | None) -> Stand:
        sites = self._exchange.connected()
        new, left = self._judged(name, candidate, sites, terms.metric)
        old: dict[str, gate.Groups] | None = None
        if champion is not None:
            old, also = self._judged(name, champion, sorted(new), terms.metric)
            left |= also
            new = {site: counts for site, counts in new.items() if site in old}
        need = candidate.study.cohort.min_sites
        left |= {site: how for site, how in self._exchange.away().items() if site not in left}
        said = gate.verdict(terms, new, old)
        why = list(said.why)
        if len(new) < need:
            why.insert(0, f"{len(new)} of at least {need} sites judged it")
        result: dict[str, Any] = {
            "federation": self._federation.config.name,
            "model": name,
            "version": candidate.number,
            "bundle": candidate.bundle,
            "graph": candidate.model,
            "against": None if champion is None else _about(champion),
            **asdict(terms),
            "sites": sorted(new),
            "left_out": dict(sorted(left.items())),
            "cells": list(said.cells),
            "passed": not why,
            "why": why,
            "at": self._clock(),
        }
        self._registry.gated(name, candidate.number, result, self._federation.seal)
        return Stand(name, candidate.number, "passed" if not why else "refused", result)

    def _judged(
        self, name: str, version: _Version, sites: list[str], metric: str
    ) -> tuple[dict[str, gate.Groups], dict[str, str]]:
        """Counts of the sites that judged a version, by group, and why others did not."""
        run = f"{RUN}{name}@{version.number}/{secrets.token_hex(8)}"
        seconds = version.study.cohort.deadline
        asked = Instruction(
            self._federation.config.name, run, 1, 0, "judge", version.study.digest, version.model, "",
            secrets.token_hex(32), self._clock() + seconds + CLOCKS, Payload(opaque=version.graph),
        )  # fmt: skip
        parts = contents(asked)
        described, sha256 = [part for part, _ in parts], version.model  # the content is the file itself
        headers = {site: header_of(asked.to(site), described, sha256) for site in sites}
        found: dict[str, gate.Groups] = {}
        with _file(version.graph) as content:
            left = self._exchange.ask(run, headers, content, LARGEST)
        try:
            end = time.monotonic() + seconds
            while (received := self._exchange.answers(run, max(0.0, end - time.monotonic()))) is not None:
                counts = _counts(received, asked, version.study, metric)
                if isinstance(counts, str):
                    left[received.site] = counts
                else:
                    found[received.site] = counts
        finally:
            self._exchange.withdraw(run)
            self._exchange.rouse()  # so that the sites are told that it is over
        left |= {site: "did not answer in time" for site in sites if site not in found and site not in left}
        kept = _alike(found)
        left |= {site: "sends counts of another shape than most sites" for site in found if site not in kept}
        return kept, left


def _alike(found: dict[str, gate.Groups]) -> dict[str, gate.Groups]:
    """Those of the shape that most sites sent: one that sends another loses its own place, and spoils no gate."""
    alike = tally.agreeing({site: groups[gate.ALL] for site, groups in found.items()})
    return {site: groups for site, groups in found.items() if site in alike}


def _counts(received: Received, asked: Instruction, study: Study, metric: str) -> gate.Groups | str:
    """What a site counted, by group, or why it does not count."""
    if received.reason:
        return received.reason
    try:
        header = parse(received.header)
        content = b"".join(map(bytes, received.content.pieces(header.length))) if received.content else b""
        answer = assemble(header, content)
    except IntegrityError as error:
        return str(error)
    if not isinstance(answer, Answer):
        return "is no answer"
    if answer.status == "declined":
        return f"declined: {admission.clip(answer.reason) or 'no reason given'}"
    groups = gate.groups(study)
    wrong = gate.problem(answer.metrics, metric, groups, study.cohort.max_weight)
    return admission.misaddressed(asked, answer) or wrong or gate.named(answer.metrics, groups)


def _about(version: _Version) -> dict[str, Any]:
    return {"version": version.number, "bundle": version.bundle, "graph": version.model}


def _refuse_others(one: Study, other: Study) -> None:
    """Both must be judged on the same held-out rows, by the same metric."""
    if judged_by(one.metric) != judged_by(other.metric):
        raise InputError(
            f"evaluation.metric: the version's study has '{judged_by(one.metric)}' and the champion's "
            f"'{judged_by(other.metric)}', so they cannot be compared; promote it --ungated, with a reason"
        )
    for key in ("holdout", "split", "person", "target"):
        if getattr(one.data, key, None) != getattr(other.data, key, None):
            raise InputError(
                f"data.{key}: differs between the studies of the version and the champion, so they cannot be judged on "
                "the same rows; promote it --ungated, with a reason"
            )


@contextmanager
def _file(content: bytes) -> Iterator[int]:
    """The descriptor of a file in memory that holds these bytes."""
    descriptor = os.memfd_create("gate", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        yield descriptor
    finally:
        os.close(descriptor)

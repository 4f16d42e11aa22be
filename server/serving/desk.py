"""What is written down of predictions: who asked for what and when, and labels that come later. Never a feature.

    audit-2026-11-24.jsonl     a line a request: caller, model, version, digest, rows, status, ms, prediction id
    feedback-2026-11-24.jsonl  a line a label: caller, prediction id, row, label

A prediction id names its model and version under a key of this desk, so that feedback on predictions that were never
made is refused. Where a line cannot be written the request fails: an answer without a trace is none.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from consortium.protocol.errors import ConsortiumError
from consortium.protocol.files import private_folder, write_private
from consortium.server.serving.tensors import RequestError
from consortium.server.serving.wire import compact

KEY = "predictions.key"
MAX_LABEL = 200
_ID = re.compile(r"([\w.]{1,20})-([0-9a-f]{24})-([0-9a-f]{16})", re.ASCII)


class Desk:
    """The records in a folder. For one thread. clock: seconds since the epoch."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self.folder, self._clock = private_folder(folder), clock
        path = self.folder / KEY
        if not path.exists():
            write_private(path, secrets.token_bytes(32))
        self._key = path.read_bytes()
        self._files: dict[str, tuple[int, int]] = {}

    def new_id(self, name: str, version: str) -> str:
        """The id of a prediction that is made now by this version."""
        nonce = secrets.token_hex(12)
        return f"{version}-{nonce}-{self._mac(name, version, nonce)}"

    def version_of(self, name: str, prediction: object) -> str:
        """The version that made a prediction of the model `name`.

        Raises:
            RequestError: no prediction of it was made here under that id.
        """
        parts = _ID.fullmatch(prediction) if isinstance(prediction, str) else None
        if parts is None or not hmac.compare_digest(self._mac(name, parts[1], parts[2]), parts[3]):
            raise RequestError(f"'prediction': no prediction of '{name}' has this id here")
        return parts[1]

    def _mac(self, name: str, version: str, nonce: str) -> str:
        content = f"{name}/{version}/{nonce}".encode()
        return hashlib.blake2b(content, key=self._key, digest_size=8).hexdigest()

    def note(self, line: Mapping[str, Any]) -> None:
        """Write down that somebody asked.

        Raises:
            ConsortiumError: it cannot be written.
        """
        self._write("audit", line)

    def feedback(
        self, caller: str, name: str, document: Mapping[str, Any], contract: Mapping[str, Any]
    ) -> None:
        """Keep the true label of one row of a prediction: a class of the model, or a number.

        Raises:
            RequestError: it is not one, or of no prediction made here.
        """
        version = self.version_of(name, document.get("prediction"))
        row, label = document.get("row", 0), document.get("label")
        if type(row) is not int or not 0 <= row < 1 << 16:
            raise RequestError("'row': the number of a row of the prediction, from 0, is expected")
        classes = next((one["classes"] for one in contract["outputs"] if one.get("classes")), None)
        if classes is not None and str(label) not in map(str, classes):
            raise RequestError(f"'label': one of the classes {', '.join(map(str, classes))} is expected")
        if type(label) not in (int, float, str) or len(str(label)) > MAX_LABEL:
            raise RequestError("'label': a number or a short text is expected")
        if set(document) - {"prediction", "row", "label"}:
            raise RequestError("only 'prediction', 'row' and 'label' are kept; leave the rest out")
        about = {"caller": caller, "model": name, "version": version, "prediction": document["prediction"]}
        self._write("feedback", {**about, "row": row, "label": label})

    def _write(self, kind: str, line: Mapping[str, Any]) -> None:
        now = self._clock()
        day = int(now // 86400)
        try:
            if self._files.get(kind, (0, 0))[0] != day:
                if kind in self._files:
                    os.close(self._files.pop(kind)[1])
                path = self.folder / f"{kind}-{datetime.fromtimestamp(now, UTC):%Y-%m-%d}.jsonl"
                flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
                self._files[kind] = day, os.open(path, flags, 0o600)
            content = compact({"at": round(now, 3), **line}) + b"\n"
            if os.write(self._files[kind][1], content) != len(content):
                raise OSError("the disk is full")
        except OSError as error:
            raise ConsortiumError(f"{self.folder}: the {kind} cannot be written ({error})") from error

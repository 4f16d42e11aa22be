"""A Flower ClientApp at a site: the worker of a study that brings one (`client/serving_worker.py`).

An instruction carries a Flower message (`protocol/records.py`) as opaque bytes, and so does the answer. The app gets a
`Context`: `node_config` with `site`, the site's name, and `data`, the path of the read-only copy of the data set that
was approved; `run_config` from the study; and `state`, which is kept with the answer, so that both survive together.
"""

from __future__ import annotations

import hashlib
import hmac
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import flwr.app
import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity

from consortium.client.site import Memory
from consortium.client.store import Kept, Store
from consortium.protocol import code
from consortium.protocol.errors import InputError, IntegrityError, RefusedError
from consortium.protocol.messages import Answer, Instruction, Payload, assemble, parse
from consortium.protocol.records import Packed, from_flower, pack, to_flower, unpack
from consortium.protocol.sealed import DataKey
from consortium.protocol.study import Study

STATE = "context"
NODE = 1
"""A site's node id, as its app sees it: ids of the run are the server's business."""


class AppWorker:
    """One site of one run.

    Raises:
        InputError: the study's code has no such app, or fails.
    """

    def __init__(self, about: Mapping[str, Any]) -> None:
        self._study = Study.parse(about["study"], folder=Path(about["code"]))
        assert self._study.app is not None
        for name in ("_task_id", "_run_id", "_node_id"):  # without them Flower makes no message
            setattr(TaskIdentity, name, NODE)
        found = code.load(self._study.app.clientapp, self._study.folder)
        if not isinstance(found, ClientApp):
            raise InputError(
                f"{self._study.app.clientapp}: is a {type(found).__name__}, not a flwr ClientApp"
            )
        self._app, self._site = found, str(about["site"])
        self._node = {"site": self._site, "data": str(about["source"]["path"])}
        self._state, self._key = Path(about["state"]), DataKey(bytes.fromhex(about["key"]))
        self._epoch, self._run, self._kept = int(about["epoch"]), "", Kept()

    def warm(self) -> None:
        """Nothing is loaded before the app's first message."""

    def reply(self, run: str, header: bytes, model: str, files: list[int]) -> tuple[bytes, list[int]]:
        """Header of the answer to an instruction, and the file that it was kept in before. As `serving_worker.Worker`.

        Raises:
            IntegrityError: the instruction is not for this worker.
            RefusedError, InputError: the app gave an error, or what cannot travel.
        """
        content = memoryview(b"")
        if files and os.fstat(files[0]).st_size:
            content = memoryview(mmap.mmap(files[0], 0, access=mmap.ACCESS_READ))
        instruction = assemble(parse(header), content)
        if not isinstance(instruction, Instruction) or instruction.run != run:
            raise IntegrityError("the worker was given something else than an instruction of its run")
        if instruction.study != self._study.digest or instruction.site != self._site:
            raise IntegrityError("the instruction is for another study or site than this worker")
        store = Store(self._state, run, self._key, self._epoch)
        if not self._run:
            self._kept, self._run = store.load().without_content(), run
        if self._run != run:
            raise IntegrityError("the instruction is for another run than this worker")
        before = self._kept.header_to(instruction)
        if before is not None:
            return before, [store.open()]
        if instruction.kind not in ("train", "evaluate", "query"):
            raise RefusedError("a Flower app has no model that could be judged")
        found = hashlib.sha256(instruction.payload.opaque).hexdigest()
        if not hmac.compare_digest(found, instruction.model):
            raise IntegrityError("the instruction's content is not what it says")
        given, state = self._asked(unpack(instruction.payload.opaque))
        answer = Answer.to_instruction(instruction, payload=Payload(opaque=given))
        memory = Memory({STATE: np.frombuffer(state, np.uint8)})
        self._kept = store.save(self._kept.after(memory, answer))
        return self._kept.header, [store.open()]

    def _asked(self, packed: Packed) -> tuple[bytes, bytes]:
        """What the app replies to a message, and its state after."""
        kept = self._kept.memory.committed.get(STATE)
        state = to_flower(unpack(kept.tobytes()).records, flwr.app) if kept is not None else RecordDict()
        assert self._study.app is not None
        context = Context(NODE, NODE, dict(self._node), state, dict(self._study.app.config))
        content = to_flower(packed.records, flwr.app)
        message = Message(content, dst_node_id=NODE, message_type=packed.type, group_id=packed.group)
        reply = self._app(message, context)
        if reply.has_error():
            raise RefusedError(f"the app gave error {reply.error.code}; the site's log says more")
        answered = pack(Packed(from_flower(reply.content), packed.type, packed.group))
        return answered, pack(Packed(from_flower(context.state)))

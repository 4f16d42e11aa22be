"""What a site keeps on disk for one run: its memory, and its last answer.

Both are one file, replaced whole: after a crash at any moment the site has either done an instruction, and gives the
same answer again without computing it, or it has not. The file is safetensors, encrypted under the run's own key;
nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from consortium.client.site import Memory
from consortium.protocol.errors import IntegrityError, RefusedError
from consortium.protocol.files import private_folder, write_all, write_pieces
from consortium.protocol.layout import Vector
from consortium.protocol.messages import Answer, Instruction, decode, encode
from consortium.protocol.sealed import DataKey, Sealed, sealed_file, sealing

FORMAT = "1"
MOST_GIVEN = 256
"""What came before is older than what the site accepts (`client/seen.py`)."""


@dataclass(frozen=True)
class Kept:
    """A site's memory in one run, and the last answer that it gave there.

    given: what it answered so far, the latest last, at most `MOST_GIVEN`: question and the answer's `fingerprint`.
    """

    memory: Memory = field(default_factory=Memory)
    last: Answer | None = None
    given: tuple[tuple[Question, str], ...] = ()

    def answer_to(self, instruction: Instruction) -> Answer | None:
        """The answer that was given to this very question before, with the nonce of now; None if it is new.

        Raises:
            RefusedError: it was given before the last one, and is not there any more.
        """
        one, asked = self.last, question(instruction)
        if one is not None and one.run == instruction.run and question(one) == asked:
            return replace(one, nonce=instruction.nonce)
        if any(asked == before for before, _ in self.given):
            raise RefusedError(
                "this was answered before, and something else since; nothing is computed twice"
            )
        return None

    def after(self, memory: Memory, answer: Answer) -> Kept:
        """What is kept once `answer` was made, which left the site with `memory`."""
        return Kept(memory, answer, (*self.given, (question(answer), fingerprint(answer)))[-MOST_GIVEN:])


Question = tuple[int, int, str, str]
"""Round, attempt, kind, and the digest of the model: what of one run is answered once."""


def question(message: Answer | Instruction) -> Question:
    """What a message of a run asks or answers."""
    return (message.round, message.attempt, message.kind, message.model)


def fingerprint(answer: Answer) -> str:
    """SHA-256 (hex) of an answer, whatever the nonce that it carries."""
    return hashlib.sha256(encode(replace(answer, nonce=""))[0]).hexdigest()


class Store:
    """The file of one site and one run in `folder`, which is made where it is missing.

    key: what it is encrypted under; without one it is not.
    """

    def __init__(self, folder: Path, run: str, key: DataKey | None = None) -> None:
        self._key = key
        # A run's name comes from the server, so it is no part of a path.
        self._path = folder / f"{hashlib.sha256(run.encode()).hexdigest()[:32]}.safetensors"

    def load(self) -> Kept:
        """What was kept; nothing where the run is new here.

        Raises:
            IntegrityError: the file is damaged.
        """
        if not self._path.exists():
            return Kept()
        try:
            with self._plain() as path, safe_open(path, framework="np") as file:
                about = dict(file.metadata() or {})
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            if about["format"] != FORMAT:
                raise IntegrityError(f"{self._path}: format {about['format']} is not known to this version")
            parts: dict[str, dict[str, Vector]] = {"committed": {}, "pending": {}, "answer": {}}
            for name, array in arrays.items():
                version, kind = name.split(".", 1)
                parts[version][kind] = array
            memory = Memory(parts["committed"], parts["pending"], int(about["pending_round"]))
            content = parts["answer"].get("content", np.empty(0, np.uint8)).tobytes()
            last = decode(about["answer"].encode(), content)
            given = tuple(((r, a, k, m), sha) for r, a, k, m, sha in json.loads(about.get("given", "[]")))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise IntegrityError(
                f"{self._path}: is damaged ({type(error).__name__}); move it away to take part without this state"
            ) from error
        assert isinstance(last, Answer)
        return Kept(memory, last, given)

    def save(self, kept: Kept) -> None:
        """Keep `kept`, which has an answer, in place of what was there; returns when it would survive."""
        assert kept.last is not None
        header, views = encode(kept.last)
        arrays = {f"committed.{kind}": vector for kind, vector in kept.memory.committed.items()}
        arrays |= {f"pending.{kind}": vector for kind, vector in kept.memory.pending.items()}
        if views:
            whole = views[0] if len(views) == 1 else b"".join(views)  # a lone vector is not copied
            arrays["answer.content"] = np.frombuffer(whole, np.uint8)
        about = {"format": FORMAT, "pending_round": str(kept.memory.pending_round), "answer": header.decode()}
        about["given"] = json.dumps([[*asked, sha] for asked, sha in kept.given])
        private_folder(self._path.parent)
        content = [save(arrays, about)]
        write_pieces(self._path, sealing(content, self._key) if self._key is not None else content)

    @contextmanager
    def _plain(self) -> Iterator[Path]:
        """The file as it was before it was encrypted, in memory; or itself, as earlier versions left it."""
        if self._key is None or not sealed_file(self._path):
            yield self._path
            return
        with (
            self._path.open("rb") as file,
            os.fdopen(os.memfd_create("kept", os.MFD_CLOEXEC), "wb", 0) as plain,
        ):
            for piece in Sealed(file.fileno(), self._key, str(self._path)).pieces():
                write_all(plain.fileno(), piece)
            yield Path(f"/proc/self/fd/{plain.fileno()}")

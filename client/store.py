"""What a site keeps on disk for one run: its memory, and its last answer.

Both are one file, replaced whole: after a crash at any moment the site has either done an instruction, and gives the
same answer again without computing it, or it has not. The file is safetensors; nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from consortium.client.site import Memory
from consortium.protocol.errors import IntegrityError
from consortium.protocol.files import private_folder, write_private
from consortium.protocol.layout import Vector
from consortium.protocol.messages import Answer, Instruction, decode, encode

FORMAT = "1"


@dataclass(frozen=True)
class Kept:
    """A site's memory in one run, and the last answer that it gave there."""

    memory: Memory = field(default_factory=Memory)
    last: Answer | None = None

    def answer_to(self, instruction: Instruction) -> Answer | None:
        """The answer that was given to this very question before, with the nonce of now; None if it is new."""
        one = self.last
        if one is None or _question(one) != _question(instruction):
            return None
        return replace(one, nonce=instruction.nonce)


def _question(message: Answer | Instruction) -> tuple[object, ...]:
    return (message.run, message.round, message.attempt, message.kind, message.model)


class Store:
    """The file of one site and one run in `folder`, which is made where it is missing."""

    def __init__(self, folder: Path, run: str) -> None:
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
            with safe_open(self._path, framework="np") as file:
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
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise IntegrityError(
                f"{self._path}: is damaged ({type(error).__name__}); move it away to take part without this state"
            ) from error
        assert isinstance(last, Answer)
        return Kept(memory, last)

    def save(self, kept: Kept) -> None:
        """Keep `kept`, which has an answer, in place of what was there; returns when it would survive."""
        assert kept.last is not None
        header, views = encode(kept.last)
        arrays = {f"committed.{kind}": vector for kind, vector in kept.memory.committed.items()}
        arrays |= {f"pending.{kind}": vector for kind, vector in kept.memory.pending.items()}
        if views:
            content = views[0] if len(views) == 1 else b"".join(views)  # a lone vector is not copied
            arrays["answer.content"] = np.frombuffer(content, np.uint8)
        about = {"format": FORMAT, "pending_round": str(kept.memory.pending_round), "answer": header.decode()}
        private_folder(self._path.parent)
        write_private(self._path, save(arrays, about))

"""The site's end of a run over Flower: a ClientApp around `client.site.Site`.

A SuperNode is started with `site` and `folder` in its node config: the site's name, and its own folder with the data,
`mapping.toml` and `holdout.key`. The study and its code come with the app, whose hash the SuperNode has checked.
What a site keeps of a run (SCAFFOLD's variate, a personal head, its last answer) lies in `state/` of its folder.

Nothing that happens here reaches the server but a valid answer or a reason that holds no record.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from consortium.client.folder import source_in
from consortium.client.site import check_model, open_site, start
from consortium.client.store import Store
from consortium.client.task import task_of
from consortium.protocol.errors import ConsortiumError, IntegrityError, RefusedError
from consortium.protocol.messages import Answer, Instruction, decode, encode
from consortium.protocol.study import Study
from consortium.strategies.chosen import strategy_of

LONGEST_REASON = 2000
UNREADABLE = 2
"""The code by which Flower says that a ClientApp could not do what a message asks."""

_log = logging.getLogger(__name__)

app = ClientApp()


@app.train()
@app.evaluate()
@app.query()
def handle(message: Message, context: Context) -> Message:
    """Answer one message. The instruction says what is asked; Flower's message type is not looked at."""
    try:
        instruction = _instruction(message.content)
    except IntegrityError as error:
        return Message(Error(UNREADABLE, str(error)), reply_to=message)
    site, folder = str(context.node_config["site"]), Path(str(context.node_config["folder"]))
    try:
        study = Study.load(Path(sys.path[0]) / "study.toml")  # Flower puts the app's folder first
        answer = answer_to(instruction, study, site, folder)
    except ConsortiumError as error:
        _log.error("%s, round %d: %s", instruction.kind, instruction.round, error)
        answer = _declined(instruction, str(error).partition("\n")[0])
    except Exception as error:  # noqa: BLE001 - the study's own code may raise anything, and its text may hold a record
        _log.error("%s, round %d: failed", instruction.kind, instruction.round, exc_info=error)
        answer = _declined(
            instruction, f"the study's code failed ({type(error).__name__}); the site's log says more"
        )
    if answer.reason:  # where its files lie is the site's own business
        answer = replace(answer, reason=answer.reason.replace(f"{folder}{os.sep}", ""))
    return Message(_record(answer), reply_to=message)


def answer_to(instruction: Instruction, study: Study, site: str, folder: Path) -> Answer:
    """The site's answer: the one given before to the same instruction, or a new one, kept before it is returned.

    Raises:
        ConsortiumError: the instruction is not for this site or study, or the site's folder is not in order.
    """
    torch.set_num_threads(1)  # more would change the bits
    if instruction.site != site:
        raise RefusedError(f"the instruction is for another site, this is '{site}'")
    if instruction.study != study.digest:
        raise RefusedError(
            f"the instruction is for another study than '{study.name}', which came with the app"
        )
    if time.time() > instruction.expires:
        raise RefusedError("the instruction has expired; if the clocks agree, the site was too slow")
    store = Store(folder / "state", instruction.run)
    kept = store.load()
    before = kept.answer_to(instruction)
    if before is not None:
        return before
    task, strategy = task_of(study), strategy_of(study)
    net = start(study, task, strategy.local)
    check_model(instruction, net)
    one = open_site(study, task, strategy.local, net, source_in(folder, site))
    one.memory = kept.memory
    answer = one.answer(instruction)
    if answer.status == "done":
        store.save(kept.after(one.memory, answer))
    return answer


def _declined(instruction: Instruction, reason: str) -> Answer:
    return Answer.to_instruction(instruction, status="declined", reason=reason[:LONGEST_REASON])


def _instruction(record: RecordDict) -> Instruction:
    """The instruction in a Flower message (`server/grid.py` writes it)."""
    config, arrays = record.config_records.get("header"), record.array_records.get("content")
    header = config.get("bytes") if config is not None else None
    content = arrays.get("bytes") if arrays is not None else None
    if not isinstance(header, bytes):
        raise IntegrityError("message: is not one of Consortium's")
    message = decode(header, content.data if content is not None else b"")
    if not isinstance(message, Instruction):
        raise IntegrityError("message: an instruction was expected")
    return message


def _record(answer: Answer) -> RecordDict:
    """An answer as a Flower message carries it (`server/grid.py` reads it)."""
    header, views = encode(answer)
    record = RecordDict({"header": ConfigRecord({"bytes": header})})
    if views:
        content = b"".join(views)
        record["content"] = ArrayRecord({"bytes": Array("uint8", (len(content),), "raw", content)})
    return record

"""A folder of evidence: what either side hands an auditor of one run, and how it is written.

evidence.json      which run, study and bundle, whose log, its head, the sites' keys, and every file's SHA-256
evidence.sig       over it: by the server's instruction key, or the site's identity key
root.pem, trust.json, certificates.pem    the root, its words on the keys, and the author's certificate chain
audit/*.jsonl      the files of the audit log from the run's first entry to the end
statements.json    the newest head of the other side's log, and what it has seen of this one, as it signed it
messages.json, commits.json    what the log has of the run's instructions and answers, and of its rounds
approvals.jsonl, study.fab     decisions about the bundle, as sites signed them; the bundle
ledger.jsonl       the site's privacy charges for the run (of a server: empty)
software.json      versions, SHA-256 of installed packages' RECORD files, and of every file of Consortium
model/             lineage.json, manifest.json and signature.json, where a model was exported
verify.py          checks all of it, without Consortium (`evidence_verify.py`)
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from consortium.protocol import evidence_verify
from consortium.protocol.audit import segments
from consortium.protocol.chain import Entry
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError, nearest
from consortium.protocol.messages import canonical
from consortium.protocol.signing import EVIDENCE, sign

FORMAT = 1
MESSAGES = ("asked", "instruction", "answered")
PACKAGES = ("client", "privacy", "protocol", "server", "simulations", "strategies")


@dataclass(frozen=True)
class About:
    """What a folder of evidence is about. side: "server" or "site". identity: the site's key (hex), "" of a server.

    log: the audit log's name. study: digest of the settings. bundle: SHA-256 (hex), "" where it is not kept here.
    waits: whether every site that trains must have approved first. sites: by name, the keys (hex) that it has had.
    """

    side: str
    federation: str
    identity: str
    log: str
    run: str
    study: str
    bundle: str
    waits: bool
    sites: Mapping[str, Sequence[str]]


def free(out: Path) -> None:
    """Returns where `out` is a new or an empty folder.

    Raises:
        InputError: it is not.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out: {out} is not empty; give a new folder")


def run_of(name: str, runs: Sequence[str]) -> str:
    """The run of that name, or the latest of the study of that name. runs: all, the oldest first.

    Raises:
        InputError: there is none.
    """
    found = [one for one in runs if one == name or one.rpartition(".")[0] == name]
    if not found:
        known = sorted({*runs, *(one.rpartition(".")[0] for one in runs)})
        near = nearest(name, known) or (
            f"; there are: {', '.join(known[:8])}" if known else "; there are none yet"
        )
        raise InputError(f"there is no run '{name[:80]}', nor a run of such a study{near}")
    return found[-1]


def log_files(folder: Path, first: int) -> dict[str, bytes]:
    """The files of an audit log that hold the entries from `first` on, each up to its last whole line."""
    paths = segments(folder)
    wanted = [path for path, after in zip(paths, [*paths[1:], None], strict=True)
              if after is None or int(after.stem) > first]  # fmt: skip
    return {f"audit/{path.name}": _whole(path.read_bytes()) for path in wanted}


def lines(entries: Iterable[bytes]) -> bytes:
    """Lines of a log, as they are signed."""
    return b"".join(line + b"\n" for line in entries)


def documents(entries: Sequence[Entry], run: str) -> dict[str, bytes]:
    """What a log has of a run: its messages, each as it was signed, and its rounds."""
    messages = []
    for one in entries:
        if one.kind not in MESSAGES or one.body.get("run") != run:
            continue
        made = [(one.body["header"], one.body["signature"])] if "header" in one.body else []
        for site, (nonce, admitted, signature) in one.body.get("sites", {}).items():
            common = one.body["instruction"]
            fields = common["fields"] | {"site": site, "nonce": nonce, "admitted": admitted}
            made.append((canonical(common | {"fields": fields}).decode(), signature))
        messages += [[one.sequence, one.kind, header, signature] for header, signature in made]
    rounds = [dict(one.body) for one in entries if one.kind == "round" and one.body["run"] == run]
    return {"messages.json": plain(messages), "commits.json": plain(rounds)}


def plain(document: object) -> bytes:
    """A document as people read it, too."""
    return (json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def software() -> bytes:
    """Which programs are in force here and now: versions, and hashes of what is installed."""
    records: dict[str, str] = {}
    for place in dict.fromkeys(sys.path):
        for path in sorted(Path(place or ".").glob("*.dist-info/RECORD")):
            records.setdefault(path.parent.name, hashlib.sha256(path.read_bytes()).hexdigest())
    versions = {one.metadata["Name"]: one.version for one in metadata.distributions()}
    code = {}
    for name in PACKAGES:
        found = util.find_spec(f"consortium.{name}")
        for folder in (found.submodule_search_locations or []) if found is not None else []:
            for path in sorted(Path(folder).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    where = f"{name}/{path.relative_to(folder).as_posix()}"
                    code[where] = hashlib.sha256(path.read_bytes()).hexdigest()
    about = {"python": platform.python_version(), "platform": platform.platform()}
    return plain({**about, "versions": versions, "records": records, "consortium": code})


def write(
    out: Path, about: About, files: Mapping[str, bytes], key: Ed25519PrivateKey, entries: Sequence[Entry]
) -> None:
    """Write the folder. files: by name; entries: of the whole audit log, as far as the files have it.

    Raises:
        InputError: the folder is not empty, or cannot be written.
    """
    free(out)
    script = Path(evidence_verify.__file__).read_bytes()
    every = {**files, **documents(entries, about.run), "software.json": software(), "verify.py": script}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in sorted(every.items())}
    signed = plain({"format": FORMAT, **asdict(about), "head": entries[-1].head.text, "files": hashes})
    every |= {"evidence.json": signed, "evidence.sig": sign(key, EVIDENCE, signed).hex().encode()}
    try:
        for name, content in every.items():
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    except OSError as error:
        raise InputError(
            f"--out: {out} cannot be written ({error.strerror}); give a folder with room"
        ) from error


def in_files(files: Mapping[str, bytes], entries: Iterable[Entry]) -> list[Entry]:
    """The entries up to the last that the files of the log hold.

    Raises:
        IntegrityError: the log does not have it.
    """
    newest = [content for name, content in sorted(files.items()) if name.startswith("audit/") and content]
    last = int(json.loads(newest[-1].splitlines()[-1])["sequence"]) if newest else 0
    found = [one for one in entries if one.sequence <= last]
    if not found or found[-1].sequence != last:
        raise IntegrityError("the audit log has changed meanwhile; try again")
    return found


def first_of(entries: Iterable[Entry], run: str) -> int:
    """The number of the first entry that is about a run.

    Raises:
        ConsortiumError: there is none: the run is from before there was an audit log.
    """
    for one in entries:
        if one.body.get("run") == run:
            return one.sequence
    raise ConsortiumError(f"run '{run}': the audit log has nothing of it; it was made before there was a log")


def _whole(content: bytes) -> bytes:
    return content[: content.rfind(b"\n") + 1]

"""Evidence of a run, from both sides: the script that goes with it verifies it, and names what was changed."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from breast_cancer import study_text
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from founded import open_doors
from pair import SITE, Pair
from typer.testing import CliRunner

from consortium.client.approvals import Approval, Approvals
from consortium.client.cli import client as client_commands
from consortium.privacy.ledger import Charge, Question
from consortium.protocol import bundle, chain, evidence_verify
from consortium.protocol.audit import segments
from consortium.protocol.evidence_verify import Evidence, Wrong
from consortium.protocol.messages import Answer, Instruction, encode
from consortium.protocol.signing import ANSWER, EVIDENCE, INSTRUCTION, MODEL, sign
from consortium.protocol.study import Study
from consortium.server.approvals import Approvals as AtServer
from consortium.server.archive import Archive
from consortium.server.audit import instructions
from consortium.server.cli import server as server_commands
from consortium.server.offers import Offer

RUN = "one.1"
SCRIPT = Path(evidence_verify.__file__)


@dataclass
class Handed:
    """A run of two rounds with its evidence from both sides."""

    pair: Pair
    sides: dict[str, Path]
    root: str
    keys: dict[str, Ed25519PrivateKey]


def _worked(pair: Pair) -> None:
    """What a run leaves at both sides, signed as the programs do."""
    doors, federation = pair.doors, pair.doors.federation
    text = study_text(2, study={"name": "one"}, cohort={"approvals": 2, "min_sites": 2})
    made = bundle.of(Study.parse(text))
    archive = Archive(doors.store, federation.folder / "checkpoints")
    archive.submit(made)
    assert archive.propose("one").name == RUN
    home, key = pair.home, pair.home.identity(pair.home.lock())
    approval = Approval("lung", SITE, "one", made.study.digest, made.digest, "d", 9, time.time() + 9e5)
    approvals = Approvals(home)
    approvals.approve(key, made, approval, time.time())
    at_server = AtServer(doors.store, doors.roster, "lung", note=pair.server.note)
    at_server.take(SITE, [one.decode() for one in chain.lines(approvals.path)])
    assert pair.say() == ""
    rounds = []
    for number in (1, 2):
        asked = Instruction(
            "lung", RUN, number, 0, "train", made.study.digest, "", "l" * 64, f"{number:064}", 2e9
        ).to(SITE)  # fmt: skip
        header, _ = encode(asked)
        signature = sign(federation.instruction_key, INSTRUCTION, header)
        offer = Offer(RUN, SITE, asked.nonce, header, signature, None, 0, 10)
        pair.server.note("asked", instructions(RUN, [offer]))
        about = {"run": RUN, "round": number, "attempt": 0, "asked": "train"}
        pair.site.note("instruction", {**about, "header": header.decode(), "signature": signature.hex()})
        charge = Charge("d", Question(RUN, number, 0, "m"), made.study.digest, "record", "none", None)
        pair.ledger.charge(charge, 2, time.time())
        answer, _ = encode(Answer.to_instruction(asked, status="declined", reason="of a test"))
        body = {**about, "header": answer.decode(), "signature": sign(key, ANSWER, answer).hex(), "bytes": 0}
        pair.site.note("answered", body)
        one = {
            "round": number, "attempt": 0, "asked": [SITE], "admitted": {SITE: 3.0}, "left_out": {},
            "model": f"{number:064x}", "updates": {SITE: "a" * 64}, "void": "",
        }  # fmt: skip
        rounds.append(one)
        pair.server.note("round", {"run": RUN, "event": number, **one})
        assert pair.say() == ""
    lineage = {
        "run": RUN, "study": {"digest": made.study.digest},
        "rounds": [{**one, "sites": one["admitted"]} for one in rounds],
    }  # fmt: skip
    model = federation.folder / "runs" / RUN / "model"
    model.mkdir(parents=True)
    content = json.dumps(lineage).encode()
    manifest = json.dumps({"files": {"lineage.json": hashlib.sha256(content).hexdigest()}}).encode()
    (model / "lineage.json").write_bytes(content)
    (model / "manifest.json").write_bytes(manifest)
    (model / "signature.json").write_text(json.dumps(federation.seal(manifest, MODEL)))


@pytest.fixture(scope="module")
def handed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Handed]:
    place = tmp_path_factory.mktemp("evidence")
    with open_doors(place / "fed") as doors:
        pair = Pair(doors, place / "site")
        _worked(pair)
        sides = {"server": place / "of-server", "site": place / "of-site"}
        for commands, folder, out in (
            (server_commands, doors.federation.folder, sides["server"]),
            (client_commands, pair.folder, sides["site"]),
        ):
            said = CliRunner().invoke(commands, ["evidence", "one", "--out", str(out), "--dir", str(folder)])
            assert said.exit_code == 0, (said.output, said.exception)
        keys = {"server": doors.federation.instruction_key, "site": pair.home.identity(pair.home.lock())}
        yield Handed(pair, sides, doors.federation.root_fingerprint, keys)


def wrong(folder: Path, root: str) -> str:
    """What the script finds, as it says it; "" for nothing."""
    one = Evidence(folder)
    try:
        one.check(root)
    except Wrong as error:
        return str(error)
    except evidence_verify.DAMAGED:
        return f"{one.reading}: is damaged"
    return ""


def resigned(folder: Path, key: Ed25519PrivateKey, change: Callable[[dict[str, Any]], None]) -> None:
    """The holder of the key writes another folder, and signs it."""
    about = json.loads((folder / "evidence.json").read_bytes())
    change(about)
    for name in about["files"]:
        about["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    content = json.dumps(about).encode()
    (folder / "evidence.json").write_bytes(content)
    (folder / "evidence.sig").write_text(sign(key, EVIDENCE, content).hex())


@pytest.fixture(params=["server", "site"])
def side(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def copy(handed: Handed, side: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(handed.sides[side], tmp_path / "copy"))


def test_the_script_verifies_in_a_process_of_its_own(handed: Handed, side: str) -> None:
    """Alone, isolated, with nothing of Consortium; another root, or a byte more, is exit code 4."""
    folder = handed.sides[side]
    assert len((folder / "verify.py").read_text().splitlines()) <= 200
    assert not any("consortium" in one for one in SCRIPT.read_text().splitlines() if "import " in one)
    script = [sys.executable, "-I", str(folder / "verify.py"), "--root"]
    done = subprocess.run([*script, handed.root], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"holds: run {RUN}, as its {side} has it")
    assert "countersigned by nobody" not in done.stdout
    assert "1 approvals" in done.stdout
    assert ("2 rounds" if side == "server" else "1 entries of the privacy ledger") in done.stdout
    other = subprocess.run([*script, "0" * 64], capture_output=True, text=True, timeout=60, check=False)
    assert (other.returncode, other.stdout) == (4, "")
    assert "root.pem: is not the root that you named" in other.stderr


def test_a_changed_byte_anywhere_is_found_and_named(copy: Path, handed: Handed) -> None:
    """Of every file some random bytes, one at a time; a changed entry of a log is named by its number."""
    rng = random.Random(5)
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    for path in files:
        name, content = path.relative_to(copy).as_posix(), path.read_bytes()
        for _ in range(4 if content else 0):
            at = rng.randrange(len(content))
            changed = bytearray(content)
            changed[at] ^= 1 << rng.randrange(8)
            path.write_bytes(changed)
            found = wrong(copy, handed.root)
            assert name in found, (name, at, found)
            ends = b"\n" in (content[at : at + 1], changed[at : at + 1])
            if name.endswith(".jsonl") and not ends:
                assert f"{name}: entry {content[:at].count(10) + 1}:" in found, (name, at, found)
        path.write_bytes(content)
    assert wrong(copy, handed.root) == ""


def test_a_file_that_is_missing_or_new_is_named(copy: Path, handed: Handed) -> None:
    (copy / "more").write_text("")
    assert wrong(copy, handed.root).startswith("more: ")
    (copy / "more").unlink()
    (copy / "commits.json").unlink()
    assert wrong(copy, handed.root).startswith("commits.json: ")


def test_a_log_that_was_cut_is_found_also_when_its_owner_cut_it(
    copy: Path, handed: Handed, side: str
) -> None:
    """By the manifest; and, where its owner signed it anew, by what the other side has countersigned."""
    (path,) = segments(copy / "audit")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-4]))
    assert f"audit/{path.name}: is not as it was handed over" in wrong(copy, handed.root)
    last = json.loads(lines[-5])
    head = f"{last['sequence']}:{hashlib.sha256(lines[-5][:-1]).hexdigest()}"
    resigned(copy, handed.keys[side], lambda about: about.update(head=head))
    assert f"entry {last['sequence'] + 1} is missing" in wrong(copy, handed.root)


def test_another_bundle_lineage_or_signature_is_found_also_when_its_owner_signed_it(
    copy: Path, handed: Handed, side: str
) -> None:
    """The decision names the bundle, the log the rounds; neither is changed by a manifest that agrees."""
    bundle_file = (copy / "study.fab").read_bytes()
    (copy / "study.fab").write_bytes(bundle_file + b"x")
    resigned(copy, handed.keys[side], lambda about: None)
    assert "study.fab: is not what was approved" in wrong(copy, handed.root)
    digest = hashlib.sha256(bundle_file + b"x").hexdigest()
    resigned(copy, handed.keys[side], lambda about: about.update(bundle=digest))
    assert "approvals.jsonl: entry 1: is not about study.fab" in wrong(copy, handed.root)
    (copy / "study.fab").write_bytes(bundle_file)
    (copy / "approvals.jsonl").write_bytes(b"")
    sha = hashlib.sha256(bundle_file).hexdigest()
    resigned(copy, handed.keys[side], lambda about: about.update(bundle=sha))
    assert f"site {SITE} was asked to train and has not approved" in wrong(copy, handed.root)


def test_a_lineage_that_differs_from_the_commits_is_found(handed: Handed, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(handed.sides["server"], tmp_path / "copy"))
    lineage = json.loads((copy / "model" / "lineage.json").read_bytes())
    lineage["rounds"][1]["updates"][SITE] = "b" * 64
    content = json.dumps(lineage).encode()
    manifest = json.dumps({"files": {"lineage.json": hashlib.sha256(content).hexdigest()}}).encode()
    (copy / "model" / "lineage.json").write_bytes(content)
    (copy / "model" / "manifest.json").write_bytes(manifest)
    seal = {"signature": sign(handed.keys["server"], MODEL, manifest).hex()}
    (copy / "model" / "signature.json").write_text(json.dumps(seal))
    resigned(copy, handed.keys["server"], lambda about: None)
    assert "round 2 is not as commits.json has it" in wrong(copy, handed.root)


def test_an_unknown_run_and_a_folder_in_use_are_told(handed: Handed, side: str, tmp_path: Path) -> None:
    """Exit code 2, with the nearest name, and nothing is written."""
    commands = server_commands if side == "server" else client_commands
    folder = handed.pair.doors.federation.folder if side == "server" else handed.pair.folder
    for arguments, why in (
        (["ome.1", "--out", str(tmp_path / "new")], "did you mean 'one.1'?"),
        ([RUN, "--out", str(handed.sides[side])], "is not empty; give a new folder"),
    ):
        said = CliRunner().invoke(commands, ["evidence", *arguments, "--dir", str(folder)])
        assert getattr(said.exception, "exit_code", said.exit_code) == 2, said.output
        assert why in str(said.exception) + said.output
    assert not (tmp_path / "new").exists()

"""Check a folder of evidence, offline: python verify.py --root FINGERPRINT [FOLDER]

FINGERPRINT: SHA-256 (hex) of the federation's root certificate, as you know it from somebody you trust.
FOLDER: else the one that this script is in. Needs Python 3.11 and the package `cryptography`; nothing of Consortium.
Exit code 0: all holds; 4: something does not, and which file and entry.
"""
# fmt: off

import argparse
import hashlib
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Entry = dict[str, Any]
DAMAGED = (AttributeError, InvalidSignature, LookupError, OSError, RecursionError, TypeError, ValueError)

class Wrong(Exception):  # noqa: N818 - what was found
    """Something does not hold."""

def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

def canonical(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

def need(holds: object, what: str) -> None:
    if not holds:
        raise Wrong(what)

def signed(keys: list[str], purpose: str, content: bytes, signature: str, what: str) -> None:
    """By one of the Ed25519 keys (hex)."""
    for key in keys:
        try:
            public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))
            public.verify(bytes.fromhex(signature), f"consortium/1 {purpose}\0".encode() + content)
            return
        except (InvalidSignature, ValueError, TypeError):
            continue
    raise Wrong(f"{what}: is not signed by whom it should be")

class Evidence:
    def __init__(self, folder: Path) -> None:
        self.folder, self.reading = folder, "evidence.json"

    def read(self, name: str) -> bytes:
        self.reading = name
        return (self.folder / name).read_bytes()

    def check(self, root: str) -> str:
        about = self.about = json.loads(manifest := self.read("evidence.json"))
        self.root = x509.load_pem_x509_certificate(self.read("root.pem"))
        named = self.root.fingerprint(hashes.SHA256()).hex() == root.lower().replace(":", "")
        need(named, "root.pem: is not the root that you named")
        trusted = [self.statement(one) for one in json.loads(self.read("trust.json"))]
        self.server = [key for one in trusted for key in one["instruction_keys"]]
        self.author = self.server if about.get("side") == "server" else [str(about.get("identity"))]
        signature = self.read("evidence.sig").decode()
        need(signature == signature.lower().strip(), "evidence.sig: is not as it was written")
        signed(self.author, "evidence", manifest, signature, "evidence.json or evidence.sig")
        need({one["federation"] for one in trusted} == {about["federation"]}, "trust.json: is another federation's")
        self.files, self.run, self.study = (about[key] for key in ("files", "run", "study"))
        self.by = "site" if about["side"] == "server" else "server"
        self.manifest()
        said, (count, trained) = self.witnesses(log := self.log()), self.messages(log)
        approved, rounds, ledger = self.approvals(trained), self.rounds(log), self.entries("ledger.jsonl")
        need({one["body"]["run"] for one in ledger} <= {self.run}, "ledger.jsonl: has another run's entries")
        return (f"holds: run {self.run}, as its {about['side']} has it: {len(log)} entries, countersigned by "
                f"{', '.join(said) or 'nobody'}; {count} signed messages, {approved} approvals, {rounds} rounds, "
                f"{len(ledger)} entries of the privacy ledger")

    def statement(self, one: Entry) -> Entry:
        """The root's word on which keys sign for the server."""
        content, key = b"consortium/1 trust\0" + one["statement"].encode(), cast(Any, self.root.public_key())
        key.verify(bytes.fromhex(one["signature"]), content, ec.ECDSA(hashes.SHA256()))
        return dict(json.loads(one["statement"]))

    def manifest(self) -> None:
        """Every file is as it was handed over, no other is there, and the certificates lead to the root."""
        found = {one.relative_to(self.folder).as_posix() for one in self.folder.rglob("*") if not one.is_dir()}
        for name in sorted(found ^ {*self.files, "evidence.json", "evidence.sig"}):
            raise Wrong(f"{name}: is missing, or is no part of the evidence")
        for name, digest in self.files.items():
            if sha(self.read(name)) != digest:
                count = f", {len(self.entries(name))} entries" if name.endswith(".jsonl") else ""  # names a bad one
                raise Wrong(f"{name}: is not as it was handed over{count}")
        for one, issuer in pairwise([*x509.load_pem_x509_certificates(self.read("certificates.pem")), self.root]):
            one.verify_directly_issued_by(issuer)

    def entries(self, name: str) -> list[Entry]:
        """The lines of a file, each as its owner signed it."""
        found, first = [], int(Path(name).stem) if name.startswith("audit/") else 1
        for number, line in enumerate(self.read(name).split(b"\n")[:-1], first):
            self.reading = what = f"{name}: entry {number}"
            need(canonical(fields := json.loads(line)) == line, f"{what}: is not as it was written")
            content = canonical({key: value for key, value in fields.items() if key != "signature"})
            keys = self.about["sites"].get(fields["body"]["site"], []) if name == "approvals.jsonl" else self.author
            signed(keys, "chain", content, fields["signature"], what)
            found.append({**fields, "hash": sha(line), "where": what})
        return found

    def log(self) -> list[Entry]:
        """The audit log's files: one chain."""
        log = [one for name in sorted(self.files) if name.startswith("audit/") for one in self.entries(name)]
        start = {"sequence": 0, "hash": sha(b"consortium/1 chain " + self.about["log"].encode())}
        for last, one in pairwise([start, *log] if log[0]["sequence"] == 1 else log):
            right = [one["sequence"] - 1, one["previous"]] == [last["sequence"], last["hash"]]
            need(right, f"{one['where']}: does not follow entry {last['sequence']}")
        need(f"{log[-1]['sequence']}:{log[-1]['hash']}" == self.about["head"], f"{log[-1]['where']}: is not the last")
        return log

    def witnesses(self, log: list[Entry]) -> list[str]:
        """What the other side has countersigned of this log."""
        heads, said, end = {one["sequence"]: one for one in log}, [], log[-1]["sequence"]
        for who, document in json.loads(self.read("statements.json")).items():
            keys, what = (self.about["sites"][who] if self.by == "site" else self.server, f"statements.json: {who}")
            signed(keys, "heads", document["statement"].encode(), document["signature"], what)
            fields = json.loads(document["statement"])
            need([fields["by"], fields["federation"]] == [self.by, self.about["federation"]], f"{what}: is another's")
            number, _, digest = fields["seen"].get("audit", "0:").partition(":")
            need(int(number) <= end, f"audit: entry {end + 1} is missing; {who} has seen up to entry {number}")
            if one := heads.get(int(number)):
                need(one["hash"] == digest, f"{one['where']}: is not the one that {who} has seen")
                said.append(f"{who} up to entry {number}")
        return said

    def messages(self, log: list[Entry]) -> tuple[int, set[str]]:
        """How many instructions and answers of the run are signed, and which sites were to train."""
        made, trained = list[list[Any]](), set()
        for body, kind, entry in ((one["body"], one["kind"], one) for one in log):
            if kind not in ("asked", "instruction", "answered") or body["run"] != self.run:
                continue
            need("cut" not in body, f"{entry['where']}: lacks what was asked, which was too long")
            here = [(body["header"].encode(), body["signature"])] if "header" in body else []
            for site, (nonce, admitted, signature) in body.get("sites", {}).items():
                fields = body["instruction"]["fields"] | {"site": site, "nonce": nonce, "admitted": admitted}
                here.append((canonical(body["instruction"] | {"fields": fields}), signature))
            for header, signature in here:
                keys, purpose = (self.author, "answer") if kind == "answered" else (self.server, "instruction")
                signed(keys, purpose, header, signature, entry["where"])
                right = [(fields := json.loads(header)["fields"])["run"], fields.get("study", self.study)]
                need(right == [self.run, self.study] or "refused" in body, f"{entry['where']}: is of another run")
                trained |= {fields["site"]} if fields["kind"] == "train" and "refused" not in body else set()
                made.append([entry["sequence"], kind, header.decode(), signature])
        need(json.loads(self.read("messages.json")) == made, "messages.json: is not what the audit log has")
        return len(made), trained

    def approvals(self, trained: set[str]) -> int:
        """How many sites have approved the bundle as it is; all that train, where that had to come first."""
        bundle, sites = self.about["bundle"], set()
        need(not bundle or sha(self.read("study.fab")) == bundle, "study.fab: is not what was approved")
        for one in self.entries("approvals.jsonl"):
            right = [(body := one["body"])["federation"], body["bundle"], body.get("settings", self.study)]
            need(right == [self.about["federation"], bundle, self.study], f"{one['where']}: is not about study.fab")
            sites |= {body["site"]} if one["kind"] == "approved" else set()
        for site in sorted(trained - sites) if self.about["waits"] else ():
            raise Wrong(f"approvals.jsonl: site {site} was asked to train and has not approved the bundle")
        return len(sites)

    def rounds(self, log: list[Entry]) -> int:
        """How many rounds were committed; the model's lineage, where there is one, agrees on each."""
        mine = [one["body"] for one in log if one["kind"] == "round" and one["body"]["run"] == self.run]
        need(json.loads(self.read("commits.json")) == mine, "commits.json: is not what the audit log has")
        known = {(one["round"], one["attempt"]): one for one in mine}
        if "model/lineage.json" not in self.files:
            return len(mine)
        lineage, manifest = json.loads(content := self.read("model/lineage.json")), self.read("model/manifest.json")
        signed(self.server, "model", manifest, json.loads(self.read("model/signature.json"))["signature"], self.reading)
        found = [json.loads(manifest)["files"]["lineage.json"], lineage["run"], lineage["study"]["digest"]]
        need(found == [sha(content), self.run, self.study], "model/lineage.json: is not what was signed for this run")
        for one in lineage["rounds"]:
            here = known.get((one["round"], one["attempt"]), {})
            there = [one["model"], one["sites"] or here.get("admitted"), one["updates"] or here.get("updates")]
            same = there == [here.get(key) for key in ("model", "admitted", "updates")] or "cut" in here
            need(same, f"model/lineage.json: round {one['round']} is not as commits.json has it")
        return len(mine)

def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    options.add_argument("--root", required=True, help="SHA-256 (hex) of the root certificate")
    options.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    evidence = Evidence((given := options.parse_args()).folder)
    try:
        sys.stdout.write(evidence.check(given.root) + "\n")
    except (Wrong, *DAMAGED) as error:
        why = error if isinstance(error, Wrong) else f"{evidence.reading}: is missing, damaged or not as it was signed"
        sys.stderr.write(f"does NOT hold: {why}\n")
        return 4
    return 0

if __name__ == "__main__":
    sys.exit(main())

"""A model bundle is whole: signed, the same for the same run, and telling of no small cell."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typer.testing import CliRunner

from consortium.protocol import cli
from consortium.protocol.delivery import approval
from consortium.protocol.errors import ConsortiumError, InputError, IntegrityError
from consortium.protocol.metrics import reliability, score_histogram
from consortium.protocol.signing import APPROVAL, MEMBER, raw
from consortium.protocol.signing import sign as signing_of
from consortium.server import delivery, lineage, load_model, model_cli, seal, vouching
from consortium.server.federation import Federation
from consortium.server.records import Evaluation, Round
from consortium.server.serving import engine
from consortium.server.serving.host import Settings, Watcher
from consortium.server.serving.registry import Registry

NOW = 1_800_000_000.0


def founded(folder: Path, name: str = "north") -> Federation:
    """A federation of its own, as `server init` makes it."""
    return Federation.init(folder / name, name=name, host="localhost", now=NOW)


def sign(folder: Path, federation: Federation, approvals: int = 0) -> None:
    """Sign the bundle in a folder as a live run's export does."""
    files = json.loads((folder / "manifest.json").read_bytes())["files"]
    manifest = seal.manifest(files, federation.config.name, approvals)
    (folder / "manifest.json").write_bytes(manifest)
    (folder / "signature.json").write_bytes(seal.signature(federation.seal(manifest)))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    return founded(tmp_path_factory.mktemp("federation"))


@pytest.fixture
def signed(exported: Path, federation: Federation, tmp_path: Path) -> Path:
    """A signed copy that a test may spoil."""
    copy = shutil.copytree(exported, tmp_path / "model")
    sign(copy, federation)
    return copy


def test_bundle_holds_all_that_serving_asks_for(exported: Path) -> None:
    """Every document is there; the run's plain facts stand in each of them."""
    assert {path.name for path in exported.iterdir()} == {
        "model.onnx", "model.safetensors", "contract.json", "lineage.json", "privacy.json", "evaluation.json",
        "reference.json", "MODEL_CARD.md", "bom.cdx.json", "manifest.json",
    }  # fmt: skip
    read = {path.stem: json.loads(path.read_text()) for path in exported.glob("*.json")}
    assert read["contract"]["decisions"]["probability"] == {"class": "1", "threshold": 0.5, "tuned": False}
    assert read["privacy"]["mechanism"] == "none"
    assert read["lineage"]["study"]["digest"] == read["contract"]["study"]["digest"]
    assert read["manifest"]["signed_by"] is None
    linear = read["reference"]["features"]["linear"]
    assert (linear["edges"][0], linear["edges"][-1]) == (0.0, 200.0)
    assert sum(linear["shares"]) == pytest.approx(1)
    card = (exported / "MODEL_CARD.md").read_text()
    assert "3 rounds of fedavg" in card
    assert "Nobody has stated the intended use" in card
    model = read["bom.cdx"]["metadata"]["component"]
    assert (model["type"], model["version"]) == ("machine-learning-model", read["contract"]["model"])


def approve(folder: Path, federation: Federation, site: str, key: Ed25519PrivateKey | None = None) -> None:
    """Put a site's approval in, as the site door does."""
    key = key or Ed25519PrivateKey.generate()
    identity = raw(key.public_key()).hex()
    name = federation.config.name
    text = approval(name, site, seal.read(folder).digest)
    member = federation.seal(vouching.member_text(name, site, identity), MEMBER)
    path = folder / "signature.json"
    signature = signing_of(key, APPROVAL, text).hex()
    path.write_bytes(seal.with_approval(path.read_bytes(), site, identity, signature, member))


def test_a_bundle_is_used_only_with_as_many_approvals_as_it_asks_for(
    signed: Path, federation: Federation, tmp_path: Path
) -> None:
    """Below it verify, serve and promote refuse, exit code 4, and say who is missing; any sites' approvals will do."""
    root = federation.root_fingerprint
    sign(signed, federation, approvals=2)
    registry = Registry(tmp_path / "models", lambda: NOW)
    registry.register(signed, "toy", lambda copy: str(load_model(copy, root=root).contract["model"]))
    kept = tmp_path / "models" / "toy" / "1"
    for site in ("site-2", "site-1"):
        for refused in (
            lambda: engine.load(kept, "toy", "1", (root,), False),
            lambda: registry.promote("toy", None),
        ):
            with pytest.raises(IntegrityError, match=r"signature\.json.* of 2 sites have approved"):
                refused()
        done = CliRunner().invoke(model_cli.model, ["verify", str(kept), "--root", root])
        assert isinstance(done.exception, IntegrityError)
        assert done.exception.exit_code == 4
        approve(kept, federation, site)
    assert seal.read(kept).approved == ("site-1", "site-2")
    engine.load(kept, "toy", "1", (root,), False)
    assert registry.promote("toy", None).champion == 1


def test_the_door_keeps_an_approval_once_and_only_one_that_holds(
    exported: Path, signed: Path, tmp_path: Path
) -> None:
    """Again: nothing is written. Of another bundle, or of one that nobody signed: refused, and nothing has changed."""
    federation = founded(tmp_path / "own")
    sign(signed, federation, approvals=1)
    folder, root = federation.folder / "models", federation.root_fingerprint
    registry, door = Registry(folder, lambda: NOW), delivery.Deliveries(federation, lambda: NOW)
    for bundle in (signed, exported):
        registry.register(bundle, "toy", lambda copy: str(load_model(copy).contract["model"]))
    key = Ed25519PrivateKey.generate()
    identity = raw(key.public_key()).hex()

    def given(bundle: Path) -> str:
        text = approval("north", "site-1", seal.read(bundle).digest)
        return signing_of(key, APPROVAL, text).hex()

    path = folder / "toy" / "1" / "signature.json"
    before = path.read_bytes(), (folder / "registry.json").read_bytes()
    with pytest.raises(IntegrityError, match="an approval does not hold"):
        door.approve("toy", 1, "site-1", identity, given(exported))
    with pytest.raises(InputError, match="toy@2: is signed by nobody"):
        door.approve("toy", 2, "site-1", identity, given(exported))
    assert (path.read_bytes(), (folder / "registry.json").read_bytes()) == before
    for _ in range(3):
        assert door.approve("toy", 1, "site-1", identity, given(signed)) == ("site-1",)
    assert [one.act for one in registry.state().history] == ["register", "register", "approve"]
    assert seal.read(path.parent, root).approved == ("site-1",)


def test_a_bundle_can_be_opened_at_every_moment_of_an_approval(
    signed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever the server ends in it: no file in the folder is one that the manifest does not know."""
    federation = founded(tmp_path / "own")
    sign(signed, federation, approvals=1)
    registry, door = Registry(federation.folder / "models", lambda: NOW), delivery.Deliveries(federation)
    registry.register(signed, "toy", lambda copy: str(load_model(copy).contract["model"]))
    place, real, looks = federation.folder / "models" / "toy" / "1", os.fsync, []

    def looking(descriptor: int) -> None:
        looks.append(len(seal.read(place).approved))
        real(descriptor)

    key = Ed25519PrivateKey.generate()
    signature = signing_of(key, APPROVAL, approval("north", "site-1", seal.read(place).digest)).hex()
    monkeypatch.setattr(os, "fsync", looking)
    door.approve("toy", 1, "site-1", raw(key.public_key()).hex(), signature)
    assert looks[0] == 0
    assert looks[-1] == 1


def test_a_candidate_that_is_damaged_keeps_no_withdrawal_from_counting(
    exported: Path, signed: Path, federation: Federation, tmp_path: Path
) -> None:
    """The champion that is withdrawn is served no more, whatever the candidate beside it."""
    registry = Registry(tmp_path / "models", lambda: NOW)
    for bundle in (signed, exported):
        registry.register(bundle, "toy", lambda copy: str(load_model(copy).contract["model"]))
    registry.promote("toy", 1)
    roots = (federation.root_fingerprint,)
    settings = Settings(
        registry.folder, tmp_path / "serving", "127.0.0.1", 0, None, roots=roots, unsigned=True
    )
    watcher = Watcher(settings)
    assert watcher.first()["toy"].default is not None
    (registry.folder / "toy" / "2" / "manifest.json").write_text("damaged")
    registry.withdraw("toy", 1, "wrong units")
    found = watcher.again()
    assert found is not None
    assert found["toy"].default is None


def test_an_approval_counts_only_as_the_site_made_it(
    signed: Path, federation: Federation, tmp_path: Path
) -> None:
    """Another bundle's, a key that the federation does not know, another federation's word, or a changed byte."""
    sign(signed, federation, approvals=1)
    path = signed / "signature.json"
    bare = path.read_bytes()
    approve(signed, founded(tmp_path / "other", federation.config.name), "site-1")
    with pytest.raises(IntegrityError, match=r"signature\.json"):
        seal.read(signed)
    path.write_bytes(bare)
    approve(signed, federation, "site-1")
    whole = path.read_bytes()
    begin = whole.index(b'"approvals"')
    for place in range(begin, whole.index(b'"federation": "north",\n  "format"'), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(IntegrityError, match=r"signature\.json"):
            seal.read(signed)
    given = json.loads(whole)["approvals"][0]
    sign(signed, federation, approvals=2)  # another manifest
    document = {**json.loads(path.read_bytes()), "approvals": [given]}
    path.write_bytes(seal.plain_json(document))
    with pytest.raises(IntegrityError, match="an approval does not hold"):
        seal.read(signed)
    path.write_bytes(bare)
    imposter = given | {"site": "site-9"}
    sign(signed, federation, approvals=1)
    document = {**json.loads(path.read_bytes()), "approvals": [imposter]}
    path.write_bytes(seal.plain_json(document))
    with pytest.raises(IntegrityError, match="an approval does not hold"):
        seal.read(signed)


def test_one_changed_byte_anywhere_is_found(signed: Path, federation: Federation) -> None:
    """Whichever byte of whichever file is another, the model is refused and the file named: exit code 4.

    Every byte of the two files that vouch for the rest is tried, and some of each other one.
    """
    load_model(signed, root=federation.root_fingerprint)
    rng = np.random.default_rng(0)
    for path in sorted(signed.iterdir()):
        right = path.read_bytes()
        small = path.name in ("manifest.json", "signature.json")
        places = range(len(right)) if small else rng.integers(0, len(right), 5)
        for place in places:
            # The lowest bit, and that between capital and small letters, which hex and Base64 read alike.
            for bit in (1, 32) if small else (1,):
                wrong = bytearray(right)
                wrong[place] ^= bit
                path.write_bytes(wrong)
                with pytest.raises(ConsortiumError) as caught:
                    seal.read(signed, federation.root_fingerprint) if small else load_model(signed)
                assert caught.value.exit_code == 4
                assert path.name in str(caught.value)
        path.write_bytes(right)
    load_model(signed, root=federation.root_fingerprint)


def test_missing_and_extra_files_are_named(signed: Path) -> None:
    """Each file that is gone, the signature too, and a file that was not exported, are found and named."""
    for path in sorted(signed.iterdir()):
        if path.name == "manifest.json":
            continue
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(IntegrityError, match=path.name):
            load_model(signed)
        path.write_bytes(content)
    (signed / "notes.txt").write_text("x")
    with pytest.raises(IntegrityError, match=r"notes\.txt: is not part of the model"):
        load_model(signed)


def test_unknown_signer_is_refused(
    signed: Path, exported: Path, tmp_path: Path, federation: Federation, capsys: Any
) -> None:
    """Only the expected root vouches: not another federation of the same name, nor nobody; rotation changes nothing."""
    other = founded(tmp_path / "other")
    assert other.config.name == federation.config.name
    for folder, root, code in (
        (signed, federation.root_fingerprint, 0),
        (signed, other.root_fingerprint, 4),
        (exported, federation.root_fingerprint, 4),
        (signed, "north", 2),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(["model", "verify", str(folder), "--root", root])
        assert (end.value.code or 0) == code, capsys.readouterr()
    federation.rotate(NOW + 1)
    federation.rotate(NOW + 2)
    load_model(signed, root=federation.root_fingerprint)
    sign(signed, other)
    with pytest.raises(IntegrityError, match=r"signature\.json: is signed by federation 'north' of root"):
        load_model(signed, root=federation.root_fingerprint)


def test_signature_over_another_model_vouches_for_nothing(signed: Path, federation: Federation) -> None:
    """A signature of this federation for another manifest, or another purpose, is refused."""
    for signature in (
        federation.seal(b"{}"),
        federation.seal((signed / "manifest.json").read_bytes())
        | {"signature": federation.trust()["signature"]},
    ):
        (signed / "signature.json").write_bytes(seal.signature(signature))
        with pytest.raises(IntegrityError, match=r"signature\.json: does not vouch for manifest\.json"):
            load_model(signed)


@pytest.mark.slow
def test_same_run_gives_the_same_bytes(
    exported: Path, finished: Any, tmp_path: Path, federation: Federation
) -> None:
    """Exported once more, signed this time, every file but manifest and signature has the bytes of before."""
    from consortium.server.export import export

    again = export(
        replace(finished.plan, federation="north"), finished.outcome, tmp_path / "again",
        sign=lambda manifest, _: federation.seal(manifest),
    ).path  # fmt: skip
    assert load_model(again, root=federation.root_fingerprint).contract["rounds"] == 3
    named = {"lineage.json", "MODEL_CARD.md", "bom.cdx.json"}  # these say which federation it was
    for path in exported.iterdir():
        if path.name not in named | {"manifest.json"}:
            assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    once = lineage.lineage(finished.plan, finished.outcome)
    assert seal.plain_json(once) == (exported / "lineage.json").read_bytes()


def test_small_cells_are_suppressed(finished: Any) -> None:
    """No site under ten examples is shown; one hidden site takes the next smallest with it, two hide each other."""
    digest = finished.outcome.digest

    def shown(**sizes: float) -> set[str]:
        sites = {site: {"accuracy": 0.5, "n": n} for site, n in sizes.items()}
        judged = Evaluation(3, digest, {"accuracy": 0.5, "n": sum(sizes.values())}, sites)
        found = lineage.evaluation(finished.plan, replace(finished.outcome, evaluation=judged))
        assert set(found["sites"]) == set(sizes)
        return {site for site, values in found["sites"].items() if "accuracy" in values}

    assert shown(a=10, b=11, c=12) == {"a", "b", "c"}
    assert shown(a=9, b=30, c=20, d=40) == {"b", "d"}
    assert shown(a=9, b=9, c=20) == {"c"}
    judged = Evaluation(3, digest, {"accuracy": 0.5, "n": 9}, {})
    found = lineage.evaluation(finished.plan, replace(finished.outcome, evaluation=judged))
    assert found["pooled"] == {"suppressed": "fewer than 10 examples"}


def test_many_rows_of_few_persons_are_few(finished: Any) -> None:
    """A cell of nine persons is hidden however many rows they have, and bins of rows are not told at all."""
    digest = finished.outcome.digest
    persons = {"a": 9.0, "b": 50.0, "c": 40.0}
    sites = {site: {"accuracy": 0.5, "n": 200.0, "persons": count} for site, count in persons.items()}
    pooled = {"accuracy": 0.5, "n": 600.0, "persons": 99.0}
    cells = ((100.0, 10.0, 10.0), (500.0, 400.0, 400.0))
    judged = Evaluation(3, digest, pooled, sites, cells)
    found = lineage.evaluation(finished.plan, replace(finished.outcome, evaluation=judged))
    assert {site for site, values in found["sites"].items() if "accuracy" in values} == {"b"}
    assert found["sites"]["a"] == {"suppressed": "fewer than 10 persons"}
    assert found["calibration"] is None
    of_persons = replace(finished.outcome, evaluation=judged)
    assert lineage.reference(finished.plan, of_persons)["features"] == {}
    assert lineage.reference(finished.plan, finished.outcome)["features"]
    once = replace(judged, pooled={**pooled, "persons": 600.0})
    found = lineage.evaluation(finished.plan, replace(finished.outcome, evaluation=once))
    assert found["calibration"] is not None


def test_calibration_is_that_of_the_examples() -> None:
    """From pooled histograms: joined bins of ten examples or more, with nearly the exact error."""
    rng = np.random.default_rng(2)
    logits = rng.normal(0, 2, 4000)
    p = 1 / (1 + np.exp(-logits))
    positive = rng.random(4000) < p**1.5
    counts = reliability({"auroc": score_histogram(logits, positive)})
    exact = reliability({"auroc_exact": np.stack([logits, positive.astype(float)], axis=1)})
    found, right = lineage.calibration(counts), lineage.calibration(exact)
    assert found is not None
    assert right is not None
    assert found["expected_error"] == pytest.approx(right["expected_error"], abs=0.01)
    assert 0.05 < right["expected_error"] < 0.2
    assert sum(cell["n"] for cell in found["bins"]) == 4000
    few = lineage.calibration([(3.0, 1.0, 0.2), (8.0, 2.0, 1.0), (0.0, 0.0, 0.0), (2.0, 1.0, 1.5)])
    assert few is not None
    assert [cell["n"] for cell in few["bins"]] == [13]
    assert lineage.calibration([(9.0, 1.0, 0.2)]) is None
    assert lineage.calibration([]) is None


def test_lineage_stops_at_the_chosen_round(finished: Any) -> None:
    """Where an earlier model was chosen, sites that came later are not in its lineage."""

    def one(number: int, site: str) -> Round:
        return Round(number, 0, (site,), {site: 1.0}, {}, f"m{number}", 1.0)

    state = replace(finished.outcome.state, round=2, rounds=(one(1, "a"), one(2, "b")), digest="m2")
    judged = Evaluation(1, "m1", {}, {})
    early = replace(finished.outcome, state=state, digest="m1", evaluation=judged)
    assert lineage.sites(early) == ["a"]
    assert [r["round"] for r in lineage.lineage(finished.plan, early)["rounds"]] == [1]
    late = replace(early, digest="m2", evaluation=None)
    assert lineage.sites(late) == ["a", "b"]

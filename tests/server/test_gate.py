"""The gate: a version is judged at the sites, on their held-out rows, before it may be the champion."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import pandas as pd
import pytest
import wards
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from founded import found
from live import COMMAND, Live, live

from consortium.protocol.delivery import Delivery, File, state
from consortium.protocol.errors import InputError, IntegrityError, RefusedError
from consortium.protocol.messages import Statistics
from consortium.server import gate, gating
from consortium.server.federation import Federation
from consortium.server.gate import Terms
from consortium.server.model import load_model
from consortium.server.serving import gate_file
from consortium.simulations.deployment import environment

GROUPS = {"0.0": "sex = F", "0.1": "sex = M"}


def counts(all_: float, women: float, men: float, n: float = 100.0) -> Statistics:
    """How many of a site's rows a model is right about, of n, and of n / 2 of either sex."""
    return {
        "accuracy": np.array([all_, n]),
        "accuracy@0.0": np.array([women, n / 2]),
        "accuracy@0.1": np.array([men, n / 2]),
    }


CHAMPION = {"a": counts(90, 45, 45), "b": counts(90, 45, 45)}


def verdict(
    terms: Terms, candidate: Mapping[str, Statistics], champion: Mapping[str, Statistics] | None
) -> gate.Verdict:
    """Of counts of studies that number the groups alike."""
    new, old = (
        {site: gate.named(table, GROUPS) for site, table in tables.items()}
        for tables in (candidate, champion or {})
    )
    return gate.verdict(terms, new, None if champion is None else old)


def test_a_version_that_is_no_worse_passes() -> None:
    """Within the margin nothing is said, at any site and for any group."""
    said = verdict(Terms("accuracy", 0.01), {**CHAMPION, "b": counts(89, 44.5, 44.5)}, CHAMPION)
    assert said.why == []
    assert {(cell["site"], cell["group"]) for cell in said.cells} == {
        (site, group) for site in ("all", "a", "b") for group in ("all", "sex = F", "sex = M")
    }


def test_a_version_that_is_worse_for_one_group_at_one_site_does_not_pass() -> None:
    """Better for all together, and worse for the women of one site: that is enough."""
    worse = {"a": counts(99, 49, 50), "b": counts(92, 42, 50)}
    said = verdict(Terms("accuracy", 0.05), worse, CHAMPION)
    assert [one.partition(":")[0] for one in said.why] == ["site b, group sex = F"]
    assert verdict(Terms("accuracy", 0.07), worse, CHAMPION).why == []


def test_for_an_error_more_is_worse() -> None:
    """A log-loss that rises is a fall, and one that sinks is none."""
    low, high = ({"a": {"log_loss": np.array([total, 100.0])}} for total in (20.0, 30.0))
    terms = Terms("log_loss", 0.05)
    assert verdict(terms, high, low).why
    assert verdict(terms, low, high).why == []
    assert verdict(replace(terms, minimum=0.25), high, None).why
    assert verdict(replace(terms, minimum=0.25), low, None).why == []


def test_what_is_not_known_any_more_does_not_pass() -> None:
    """A group of which the champion has a figure and the version has none; one that neither has is no hindrance."""
    one_class = {"a": {"auroc": np.array([[0.0, 0.0], [3.0, 7.0]])}}
    both = {"a": {"auroc": np.array([[9.0, 1.0], [3.0, 7.0]])}}
    terms = Terms("auroc", 0.01)
    assert verdict(terms, one_class, both).why
    assert verdict(terms, one_class, one_class).why == []
    least = replace(terms, minimum=0.5)
    assert verdict(least, one_class, None).why == [
        "site all, group all: auroc is not known, and 0.5 is asked for"
    ]
    assert verdict(least, {"a": one_class["a"], "b": both["a"]}, None).why == []


def test_groups_are_compared_by_name_however_a_study_numbers_them() -> None:
    """A study that lists another group first is held against the champion's figures of the same groups."""
    before = gate.groups(wards.study())
    now = gate.groups(wards.study(wards.STUDY.replace('groups = ["sex"]', 'groups = ["ward", "sex"]')))
    old = {"a": gate.named(counts(80, 30, 50), before)}
    for women, right in ((30, []), (20, ["site a, group sex = F", "site all, group sex = F"])):
        table = {
            "accuracy": np.array([80.0, 100.0]),
            "accuracy@0.0": np.array([10.0, 50.0]),
            "accuracy@0.1": np.array([50.0, 50.0]),
            "accuracy@1.0": np.array([float(women), 50.0]),
            "accuracy@1.1": np.array([50.0, 50.0]),
        }
        said = gate.verdict(Terms("accuracy", 0.01), {"a": gate.named(table, now)}, old)
        assert sorted(one.partition(":")[0] for one in said.why) == right


def test_a_site_of_another_shape_loses_its_own_place_alone() -> None:
    """Counts that cannot be added to those of the others would end the gate for all."""
    odd = {"auroc": np.ones((2, 3))}
    found = {site: gate.named({"auroc": np.ones((2, 512))}, {}) for site in ("b", "c")}
    assert list(gating._alike({"a": gate.named(odd, {}), **found})) == ["b", "c"]


def test_models_of_another_metric_are_not_compared() -> None:
    """Sites count what the model's own study asks for, so there would be nothing to hold beside it."""
    other = wards.STUDY.replace('metric = "accuracy"', 'metric = "auroc"')
    with pytest.raises(InputError, match=r"evaluation\.metric.*'auroc'.*'accuracy'.*--ungated"):
        gating._refuse_others(wards.study(other), wards.study())
    gating._refuse_others(wards.study(), wards.study())


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"accuracy": np.array([101.0, 100.0])}, "has the sum"),
        ({"accuracy": np.array([np.nan, 100.0])}, "not finite"),
        ({"accuracy": np.array([5.0, 1e9])}, "more examples"),
        ({"accuracy@0.0": np.array([5.0, 10.0])}, "no counts of all"),
        ({"accuracy": np.array([5.0, 10.0]), "accuracy@7.7": np.array([5.0, 10.0])}, "does not name"),
        ({"loss": np.array([5.0, 10.0])}, "nothing of which"),
        (
            {"accuracy": np.array([5.0, 10.0]), "other": np.array([1.0]), "other@0.0": np.array([1.0, 2.0])},
            "another shape for a group",
        ),
    ],
)
def test_counts_of_no_honest_site_are_told(table: Statistics, said: str) -> None:
    """Such a site is left out with a reason; honest counts are taken."""
    assert said in gate.problem(table, "accuracy", GROUPS, 1e4)
    assert gate.problem(counts(90, 45, 45), "accuracy", GROUPS, 1e4) == ""


def test_the_result_is_signed_and_counts_for_its_version_against_its_champion_alone(tmp_path: Path) -> None:
    """Any changed byte, another bundle, another champion or another root: refused."""
    federation = found(tmp_path / "fed")
    registry, root = tmp_path / "fed" / "models", federation.root_fingerprint
    (registry / "m").mkdir(parents=True)
    path = gate_file.place(registry, "m", 2)
    held = {"federation": "lung", "bundle": "b2", "against": {"bundle": "b1"}, "passed": True, "why": []}
    gate_file.write(path, held, federation.seal)
    gate_file.check(registry, "m", 2, "b2", "b1", root)
    with pytest.raises(RefusedError, match="against another champion"):
        gate_file.check(registry, "m", 2, "b2", "b0", root)
    with pytest.raises(RefusedError, match="has not been gated"):
        gate_file.check(registry, "m", 3, "b2", "b1", root)
    for bundle, signer in (("b3", root), ("b2", "0" * 64)):
        with pytest.raises(IntegrityError, match=r"2\.gate\.json"):
            gate_file.check(registry, "m", 2, bundle, "b1", signer)
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(IntegrityError, match=r"2\.gate\.json"):
            gate_file.check(registry, "m", 2, "b2", "b1", root)
    gate_file.write(path, {**held, "passed": False, "why": ["site a fell"]}, federation.seal)
    with pytest.raises(RefusedError, match="site a fell"):
        gate_file.check(registry, "m", 2, "b2", "b1", root)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A federation of three sites that allow the study, and its registry with a champion to be."""
    folder = tmp_path_factory.mktemp("gate")
    with ExitStack() as stack:
        started = stack.enter_context(live(folder))
        for site, place in wards.write(folder / "tables").items():
            started.join(site, place)
        started.gather()
        started.admin.post("/v1/studies", text=wards.study().text)
        yield started


def command(one: Live, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `consortium ...`."""
    done = subprocess.run(
        [*map(str, COMMAND), *map(str, words)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def champion(one: Live, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The federation's registry; its first version was gated at the sites, and is the champion."""
    server, registry = one.folder / "server", one.folder / "server" / "models"
    wards.register(one, wards.bundle(one, tmp_path_factory.mktemp("first") / "model", 1))
    code, _, said = command(one, "model", "promote", "wards", "--registry", registry)
    assert code == 4, said
    assert "0 of 1 sites have approved" in said
    site = ("--dir", one.home("site-2").folder)
    code, out, said = command(one, "client", "model", "review", "wards", *site)
    assert code == 0, said
    assert "site-1, site-2, site-3" in out
    code, out, said = command(one, "client", "model", "approve", "wards", *site, "--json")
    assert code == 0, said
    assert json.loads(out)["approved"] == ["site-2"]
    code, _, said = command(one, "model", "promote", "wards", "--registry", registry)
    assert code == 3, said
    assert "has not been gated" in said
    code, out, said = command(one, "model", "gate", "wards", "--dir", server, "--minimum", "0.9", "--json")
    assert code == 0, said
    result = json.loads(out)
    assert result["passed"]
    assert result["sites"] == list(wards.SITES)
    shown = {(cell["site"], cell["group"]) for cell in result["cells"]}
    assert {("all", "all"), ("site-3", "all"), ("site-1", "sex = F"), ("all", "sex = M")} <= shown
    assert command(one, "model", "promote", "wards", "--registry", registry)[0] == 0
    return registry


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_version_that_is_worse_at_one_site_is_not_promoted(
    one: Live, champion: Path, tmp_path: Path
) -> None:
    """The gate is refused, says where, and so does the promotion; past it only with a reason, which is kept."""
    server, registry = one.folder / "server", champion
    wards.register(one, wards.bundle(one, tmp_path / "ward", 2, {"ward": "ward-3"}))
    code, out, said = command(one, "model", "gate", "wards", "--dir", server, "--margin", "0.2")
    assert code == 3, (out, said)
    failing = {line.partition(":")[0] for line in out.splitlines() if "more than the margin" in line}
    assert "site site-3, group all" in failing
    assert "site site-3, group sex = F" in failing
    assert not any(site in line for line in failing for site in ("site-1", "site-2"))
    assert command(one, "client", "model", "approve", "wards", "--dir", one.home("site-3").folder)[0] == 0
    code, _, said = command(one, "model", "promote", "wards", "--registry", registry)
    assert code == 3
    assert "did not pass its gate" in said

    past = ("--registry", registry, "--ungated")
    assert command(one, "model", "promote", "wards", *past)[0] == 2
    code, _, said = command(one, "model", "promote", "wards", *past, "--why", "for a test")
    assert code == 0, said
    code, out, _ = command(one, "model", "list", registry, "--json")
    assert [act["act"] for act in json.loads(out)["history"]][-1] == "promote ungated"
    assert command(one, "model", "rollback", "wards", "--registry", registry)[0] == 0


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_site_pulls_the_champion_and_uses_it_while_that_is_right(
    one: Live, champion: Path, tmp_path: Path
) -> None:
    """Verified, predicted with, served without the server; what is altered, stale or withdrawn is refused."""
    homes = {site: one.home(site).folder for site in wards.SITES}
    own = ("client", "model")
    assert command(one, *own, "verify", "wards", "--dir", homes["site-1"])[0] == 2  # not here yet
    code, out, said = command(one, *own, "pull", "wards", "--dir", homes["site-1"], "--json")
    assert code == 0, said
    pulled = Path(json.loads(out)["path"])
    assert {path.name: path.read_bytes() for path in pulled.iterdir()} == {
        path.name: path.read_bytes() for path in (champion / "wards" / "1").iterdir()
    }
    code, out, said = command(one, *own, "verify", "wards", "--dir", homes["site-1"])
    assert (code, "root as expected" in out) == (0, True), said
    rows, made = tmp_path / "rows.csv", tmp_path / "made.csv"
    wards.table("site-1", 50).to_csv(rows, index=False)
    code, _, said = command(
        one, *own, "predict", "wards", "--dir", homes["site-1"], "--in", rows, "--out", made
    )
    assert code == 0, said
    right = load_model(pulled).predict(pd.read_csv(rows))
    assert np.allclose(pd.read_csv(made)["probability_1"], right["probability_1"])

    # what an interrupted pull left of a file is used, and fetched anew where it is no part of it
    whole = (pulled / "model.onnx").read_bytes()
    second = homes["site-2"] / "models" / "wards" / "1"
    shutil.rmtree(second)  # which it fetched to approve it
    part = homes["site-2"] / "models" / "wards" / ".1.part"
    part.mkdir(parents=True, mode=0o700)
    (part / "model.onnx").write_bytes(b"x" * 100)
    assert command(one, *own, "pull", "wards", "--dir", homes["site-2"])[0] == 0
    assert (second / "model.onnx").read_bytes() == whole
    shutil.rmtree(second)
    part.mkdir(mode=0o700)
    (part / "model.onnx").write_bytes(whole[: len(whole) // 2])
    begun = (part / "model.onnx").stat().st_ino
    assert command(one, *own, "pull", "wards", "--dir", homes["site-2"])[0] == 0
    assert (second / "model.onnx").read_bytes() == whole
    assert (second / "model.onnx").stat().st_ino == begun

    # one changed byte, a stale word, another's word
    (second / "model.onnx").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    code, _, said = command(one, *own, "verify", "wards", "--dir", homes["site-2"])
    assert code == 4
    assert "model.onnx" in said
    assert command(one, *own, "pull", "wards", "--dir", homes["site-2"])[0] == 0  # which puts it right
    key = Federation.open(one.folder / "server").instruction_key
    stale = Delivery("wards", 1, "b", 1.0, 2.0, {"manifest.json": File(1, "0" * 64)})
    for signer, right_code, word in (
        (key, 3, "was not reached"),
        (Ed25519PrivateKey.generate(), 4, "standing.json"),
    ):
        document = state(signer, "lung", "site-2", "0" * 64, stale)
        (second.parent / "standing.json").write_text(json.dumps(document))
        code, _, said = command(one, *own, "verify", "wards", "--dir", homes["site-2"])
        assert code == right_code, said
        assert word in said

    # served while the server is away, and ended when it is back and has withdrawn the version
    serving = homes["site-1"] / "serving"
    token = command(one, "model", "token", "ward", "--dir", serving)[1].strip()
    words = [*map(str, COMMAND), *own, "serve", "wards", "--dir", str(homes["site-1"]), "--port", "0"]
    with subprocess.Popen(
        [*words, "--grpc-port", "-1", "--json"], stdout=subprocess.PIPE, env=environment(), text=True
    ) as program:
        try:
            assert program.stdout is not None
            about = json.loads(program.stdout.readline())
            one.end("server")
            row = {"x": 2.0, "sex": "F", "ward": "ward-1"}
            answer = infer(about["rest"], serving / "root.pem", token, row)
            assert answer["model_version"] == "1"
            expected = load_model(pulled).predict(pd.DataFrame([row]))["probability_1"][0]
            assert answer["outputs"][0]["data"][1] == pytest.approx(float(expected), abs=1e-6)
            one.start_server()
            code, _, said = command(
                one, "model", "withdraw", "wards@1", "--registry", champion, "--why", "wrong units"
            )
            assert code == 0, said
            assert program.wait(90) == 4
        finally:
            program.terminate()
    code, _, said = command(one, *own, "verify", "wards", "--dir", homes["site-1"])
    assert code == 4
    assert "wrong units" in said
    code, _, said = command(one, "model", "verify", pulled)
    assert code == 4
    assert "withdrawn.json" in said


def infer(rest: str, root: Path, token: str, row: dict[str, object]) -> dict[str, Any]:
    """One prediction of a served model."""
    kinds = {float: "FP32", str: "BYTES"}
    inputs = [
        {"name": name, "datatype": kinds[type(value)], "shape": [1, 1], "data": [value]}
        for name, value in row.items()
    ]
    request = Request(  # noqa: S310 - https alone
        f"{rest}/v2/models/wards/infer",
        json.dumps({"inputs": inputs}).encode(),
        {"Authorization": f"Bearer {token}"},
    )
    context = ssl.create_default_context(cafile=str(root))
    with urlopen(request, timeout=30, context=context) as answer:  # noqa: S310 - likewise
        found: dict[str, Any] = json.loads(answer.read())
    return found

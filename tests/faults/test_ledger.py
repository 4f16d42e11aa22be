"""The ledger of a live site: private rounds through real programs, killed, rolled back, and out of budget."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ledger_kills import SITES, book_of, campaign, client, private
from live import Live, hospitals

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Live]:
    with hospitals(tmp_path, SITES) as one:
        yield one


def charged(federation: Live, site: str, run: str) -> int:
    accounts = book_of(federation, site).accounts().values()
    return sum(one.question.run == run for account in accounts for one in account.charges)


def test_a_private_study_charges_every_round_and_ends_on_its_budget(federation: Live) -> None:
    """Each site's ledger holds each round before it leaves; a site whose budget is spent declines with its reason, the
    run keeps, evaluates and exports its last model, and the model says why it ended."""
    federation.start(private("first", 4))
    assert federation.over("first", 300)["state"] == "finished", federation.logs()
    sites = sorted(federation.places)
    for site in sites:
        assert charged(federation, site, "first.1") == 4
        shown = client(federation, site, "ledger", "show", "--json")
        (account,) = json.loads(shown.stdout)["data"]
        assert 2.9 < account["spent"]["record"]["epsilon"] <= 3.0
        assert account["spent"]["record"]["delta"] == 1e-5
        assert account["spent"]["person"]["epsilon"] is None
        assert client(federation, site, "ledger", "verify").returncode == 0
        done = client(federation, site, "ledger", "budget", account["data"], "--epsilon", "3.4")
        assert done.returncode == 0, done.stderr
    federation.start(private("second", 8))
    ended = federation.over("second", 300)
    assert ended["state"] == "finished early", ended
    assert "privacy budget" in ended["why"]
    assert all(site in ended["why"] for site in sites)
    assert 0 < ended["round"] < 8
    folder = Path(ended["model"])
    said = json.loads((folder / "privacy.json").read_text())
    assert set(said["sites"]) == set(sites)
    assert said["ledger"]["entries"] == len([one for one in federation.events("second") if one["round"]])
    reasons = [why for event in federation.events("second") for why in event["left_out"].values()]
    assert any("privacy budget" in why and "per record" in why for why in reasons)


def test_an_older_ledger_spends_nothing(federation: Live) -> None:
    """Put back while the agent is down, it verifies by itself and with an old countersignature, yet the server has seen
    more: verify exits with 4, and the site declines until the newest copy is back, or does not even connect where the
    server was told of the newest entries. Where the newest folder is lost, `client restore` brings back what was spent,
    and the site goes on."""
    site, other = sorted(federation.places)
    home = federation.home(site)
    federation.start(private("first", 2))
    federation.over("first", 300)
    kept = [home.ledger_file, home.witness_file]
    old = [path.read_bytes() for path in kept]
    federation.start(private("second", 2))
    federation.over("second", 300)
    new = [path.read_bytes() for path in kept]
    federation.end(site)
    for path, content in zip(kept, old, strict=True):
        path.write_bytes(content)
    found = client(federation, site, "ledger", "verify")
    assert found.returncode == 4, found.stdout
    assert "older copy" in found.stderr
    federation.start_client(site)
    federation.start(private("third", 1))
    federation.until(lambda: "older copy" in federation.logs(), 150, "the site spends from an older ledger")
    assert charged(federation, site, "third.1") == 0
    federation.end(site)
    for path, content in zip(kept, new, strict=True):
        path.write_bytes(content)
    federation.start_client(site)
    federation.over("third", 300)
    assert client(federation, site, "ledger", "verify").returncode == 0
    shutil.copytree(home.folder, federation.folder / "old", ignore=shutil.ignore_patterns("*.sock"))
    federation.start(private("fourth", 1))
    federation.over("fourth", 300)
    federation.end(site)
    spent = home.ledger_file.read_bytes()
    shutil.rmtree(home.folder)
    (federation.folder / "old").rename(home.folder)
    federation.start_client(site)
    federation.until(lambda: "client restore --dir" in federation.logs(), 150, "the site goes on")
    federation.end(site)
    done = client(federation, site, "restore", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ledger"] > 0
    assert home.ledger_file.read_bytes() == spent
    federation.start_client(site)
    federation.start(private("fifth", 1))
    assert federation.over("fifth", 300)["state"] == "finished", federation.logs()
    assert charged(federation, site, "fourth.1") == charged(federation, site, "fifth.1") == 1
    for log in ("ledger", "audit"):
        assert client(federation, site, log, "verify").returncode == 0
    home.ledger_file.write_bytes(home.ledger_file.read_bytes().replace(b'"count":', b'"cuont":', 1))
    damaged = client(federation, site, "ledger", "show")
    assert damaged.returncode == 4
    assert "entry 1" in damaged.stderr
    assert other


def test_a_site_killed_at_random_moments_never_shows_less_than_what_left(tmp_path: Path) -> None:
    """kill -9 fifteen times within private rounds, the short form of `tests/support/ledger_kills.py`: the ledger
    verifies each time, and holds the charge and the very bytes of every answer that the server admitted."""
    tally = campaign(tmp_path, kills=15, seed=3)
    assert tally.kills.total() == 15
    assert tally.admitted
    assert tally.charges >= tally.answers >= tally.admitted

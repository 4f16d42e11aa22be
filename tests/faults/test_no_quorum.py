"""A run that cannot have what it needs: it waits for whom it names, or fails with reasons, and is never finished."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from live import COMMAND, Live, counted, hospitals, study

ONE, TWO, THREE = "hospital-1", "hospital-2", "hospital-3"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with hospitals(tmp_path_factory.mktemp("live"), 3) as one:
        yield one


def watched(federation: Live, name: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the events of `study watch --json`."""
    done = subprocess.run(
        [*COMMAND, "study", "watch", name, "--json", "--dir", federation.folder / "server"],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_where_every_site_declines_the_run_fails_and_names_them(federation: Live) -> None:
    """No policy anywhere: three attempts, each with every site's reason, then failed; `watch` ends with exit code 1."""
    name = "declined"
    policies = {site: federation.home(site).policy_file for site in federation.places}
    before = {site: path.read_text() for site, path in policies.items()}
    for path in policies.values():
        path.write_text("format = 1\n")
    federation.start(study(name, 3, rounds=2, epochs=1))
    code, events = watched(federation, name)
    shown = federation.show(name)
    for site, path in policies.items():
        path.write_text(before[site])
    assert (code, shown["state"], shown["round"], shown["model"]) == (1, "failed", 0, None)
    assert all(f"{site}: declined: policy" in shown["why"] for site in policies), shown
    assert all("policy" in str(error) for _, error in counted(shown).values())
    attempts = [one for one in events if one["kind"] == "round"]
    assert [one["attempt"] for one in attempts] == [0, 1, 2]
    assert all(set(one["left_out"]) == set(policies) and one["void"] for one in attempts)
    states = [one["state"] for one in events if one["kind"] == "state"]
    assert states[-2:] == ["round voided", "failed"]
    assert "finished" not in states
    federation.quiet()


def test_where_there_are_too_few_sites_the_run_waits_for_the_names_and_goes_on(federation: Live) -> None:
    """Three are needed and one's client is down: it is waited for by name, before round 1; when it comes the run ends
    by itself."""
    name = "too-few"
    federation.end(THREE)
    federation.until(lambda: THREE not in federation.connected(), 30, "it is still connected")
    federation.start(study(name, 3, rounds=2, epochs=1))
    federation.until(lambda: federation.show(name)["state"] == "waiting for sites", 60, "it does not wait")
    shown = federation.show(name)
    assert f"2 of at least 3 sites are connected ({ONE}, {TWO})" in shown["why"], shown
    assert f"{THREE} (not connected since " in shown["why"], shown
    assert {site: about["state"] for site, about in shown["sites"].items()} == {
        ONE: "ready", TWO: "ready", THREE: "not connected",
    }  # fmt: skip
    federation.start_client(THREE)
    shown = federation.over(name)
    assert (shown["state"], shown["why"]) == ("finished", "")
    assert counted(shown) == dict.fromkeys((ONE, TWO, THREE), (2, None))
    federation.quiet()

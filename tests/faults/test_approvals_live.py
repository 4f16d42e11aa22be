"""Approvals of sites in a running federation: by policy, and what becomes of a log that is taken back."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from live import COMMAND, Live, hospitals, study

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with hospitals(tmp_path_factory.mktemp("live"), 2) as one:
        yield one


def test_sites_whose_policy_allows_a_study_approve_it_and_a_log_put_back_is_found(federation: Live) -> None:
    """A study of two approvals waits for the second site's policy. A site's log of decisions that loses its end is
    refused there with exit code 4, for the server has seen it."""
    one = study("two-approvals", 2).with_(cohort={"approvals": 2})
    policy = federation.home("hospital-2").policy_file
    allowed = policy.read_text()
    policy.write_text("format = 1\n")
    federation.start(one)
    federation.until(
        lambda: (
            "1 of at least 2 sites have approved it (hospital-1)" in federation.show("two-approvals")["why"]
        ),
        60,
        "the first site does not approve",
    )
    assert federation.show("two-approvals")["state"] == "waiting for approvals"
    policy.write_text(allowed)
    federation.end("hospital-2")
    federation.start_client("hospital-2")
    assert federation.over("two-approvals")["state"] == "finished"
    assert len(federation.events("two-approvals")) >= 2
    home = federation.home("hospital-1")
    log = home.folder / "approvals.log"
    assert log.read_text().count("\n") == 1
    log.write_text("")
    words = [*COMMAND, "client", "review", "two-approvals", "--dir", home.folder]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 4, done
    assert "entry 1 is missing" in done.stderr

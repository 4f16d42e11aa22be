"""One federation for all attacks of a file that leave it whole: a server, two honest sites, one run without end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from realm import Actor, Honest, Realm, realm


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Realm]:
    """A federation with a run that two honest sites work at."""
    with realm(tmp_path_factory.mktemp("siege")) as one:
        honest = [Honest(one.join(name)) for name in ("alba", "bern")]
        one.begin()
        one.goes_on(30)
        yield one
        for site in honest:
            site.stop()
        assert [problem for site in honest for problem in site.problems] == []


@pytest.fixture(scope="module")
def mallory(siege: Realm) -> Actor:
    """A site that has joined, and lies."""
    return siege.join("mallory")


@pytest.fixture
def alba(siege: Realm) -> Actor:
    """An honest site, as the server sees it; its keys are at hand to see what it is served."""
    return siege.actor("alba")

"""The page at `/`, by its own text: only its own script runs, all that the script looks for is there."""

import base64
import hashlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from consortium.server.serving import page


class Parsed(HTMLParser):
    """Ids, and the text within script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.inside: dict[str, str] = {}
        self.references: list[str] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name in ("src", "href", "action", "style") or name.startswith("on"):
                self.references.append(f"{tag} {name}")

    def handle_data(self, data: str) -> None:
        if self._tag in ("script", "style"):
            self.inside[self._tag] = self.inside.get(self._tag, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""


def test_only_these_bytes_run() -> None:
    """The policy names the very script and style of the page; nothing is loaded from anywhere, nothing is inline."""
    found = Parsed(page.html(None))
    policy = page.HEADERS["Content-Security-Policy"]
    for tag in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(found.inside[tag].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert found.references == []


def test_what_the_script_looks_for_is_there() -> None:
    """Each id once; and no other way into the page than text, so that a name in a contract is never markup."""
    found = Parsed(page.html(None))
    script = found.inside["script"]
    asked = set(re.findall(r'\$\("([\w-]+)"\)', script))
    assert len(asked) > 8
    assert asked <= set(found.ids)
    assert len(found.ids) == len(set(found.ids))
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|localStorage|cookie", script
    )


def test_it_says_what_is_kept() -> None:
    """Nothing, or what was asked for and how long; the script and the policy stay the same."""
    assert "nothing of it is kept" in page.html(None)
    for days, said in ((1, "for 1 day,"), (30, "for 30 days,")):
        text = page.html(days)
        assert f"it is kept, encrypted, {said}" in text
        assert "nothing of it is kept" not in text
        assert Parsed(text).inside == Parsed(page.html(None)).inside


def test_the_script_is_javascript() -> None:
    """A JavaScript engine parses it."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not here to read JavaScript")
    script = Parsed(page.html(None)).inside["script"]
    done = subprocess.run(
        [node, "--check", "-"], input=script, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr

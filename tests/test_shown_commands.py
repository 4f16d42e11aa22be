"""Every command that README.md and the page about federations show is there under that name, with those options."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from consortium.protocol.cli import root

REPOSITORY = Path(__file__).resolve().parents[1]
README, PAGE = REPOSITORY / "README.md", REPOSITORY / "docs" / "federation.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the docs are not here, only the installed package")


def commands(page: Path) -> list[list[str]]:
    """The words of each; a line with `one | two | three` is three commands."""
    text = page.read_text(encoding="utf-8")
    lines = re.findall(r"^(?:    |\$ )(consortium [^#\n]*?) *(?:#.*)?$", text, re.M)
    lines += re.findall(r"`(consortium [a-z]+ [a-z][^`]*)`", text)
    found = []
    for line in lines:
        first, *others = line.split(" | ")
        *start, last = first.split()
        found += [[*start, last], *([*start, other] for other in others)] if others else [line.split()]
    return found


@pytest.mark.parametrize(("page", "least"), [(README, 12), (PAGE, 25)], ids=["README", "federation"])
def test_every_command_that_is_shown_can_be_typed(page: Path, least: int) -> None:
    """Typer takes the words; a study's name is added where the page leaves it out."""
    found = commands(page)
    assert len(found) >= least
    for _, *words in found:
        command: click.Command = root
        rest = [word.partition("|")[0] for word in words]  # viewer|researcher|admin
        while isinstance(command, click.Group):
            following = command.get_command(click.Context(command), rest[0])
            assert following is not None, words
            command, rest = following, rest[1:]
        names = [one for one in command.params if isinstance(one, click.Argument) and one.required]
        command.make_context(words[-1], rest or ["name"] * len(names))

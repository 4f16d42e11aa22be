"""The container file: what it promises, read from it, as no container runs in the tests."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import pytest

from consortium.protocol.cli import root

REPOSITORY = Path(__file__).resolve().parents[1]
FILE = REPOSITORY / "Containerfile"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason="only the installed package is here")
IMAGES = ("server", "client", "serving")


def stages() -> dict[str, list[tuple[str, str]]]:
    """By stage its instructions, and what stands after each."""
    text = re.sub(r"\\\n", " ", FILE.read_text(encoding="utf-8"))
    found: dict[str, list[tuple[str, str]]] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ")
        assert re.fullmatch(r"[A-Z]+", word), line
        if word == "FROM":
            base, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr] # None fails
            found[name] = list(found.get(base, [("FROM", base)]))
        else:
            list(found.values())[-1].append((word, rest))
    return found


def last(stage: list[tuple[str, str]], word: str) -> str:
    return [rest for found, rest in stage if found == word][-1]


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_pinned_not_root_and_looks_after_itself(image: str) -> None:
    """A base of a fixed version, packages within the constraints, a user by number, a health check, signals to the
    program itself, and no secret or whole folder copied in."""
    all_stages = stages()
    stage = all_stages[image]
    assert re.fullmatch(r"python:3\.11-\S+", last(stage, "FROM"))
    assert "-c constraints.txt" in last(all_stages["installed"], "RUN")
    user = last(stage, "USER")
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert stage.index(("USER", user)) > max(i for i, (word, _) in enumerate(stage) if word == "RUN")
    assert json.loads(last(stage, "VOLUME")) == ["/data"]
    assert json.loads(last(stage, "ENTRYPOINT")) == ["consortium"]
    check = json.loads(last(stage, "HEALTHCHECK").partition("CMD ")[2])
    assert check[0] in ("consortium", "python")
    everything = [one for some in all_stages.values() for one in some]
    assert not [
        rest for word, rest in everything if word == "ADD" or (word == "COPY" and rest.startswith(". "))
    ]


@pytest.mark.parametrize("image", IMAGES)
def test_what_an_image_runs_is_a_command(image: str) -> None:
    """The start, and the health check where it is one of ours, can be typed; the other is Python."""
    stage = stages()[image]
    words = [json.loads(last(stage, "CMD"))]
    check = json.loads(last(stage, "HEALTHCHECK").partition("CMD ")[2])
    if check[0] == "consortium":
        words.append(check[1:])
    else:
        compile(check[2], "HEALTHCHECK", "exec")
    for some in words:
        command: click.Command = root
        while isinstance(command, click.Group):
            following = command.get_command(click.Context(command), some[0])
            assert following is not None, some
            command, some = following, some[1:]
        command.make_context(some[0], list(some))


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    """Neither .git nor anybody's data: everything is left out but what a COPY names."""
    lines = (REPOSITORY / ".dockerignore").read_text().split()
    named = {line[1:] for line in lines if line.startswith("!")}
    copied = [rest for word, rest in stages()["installed"] if word == "COPY"]
    wanted = {one.rstrip("/") for rest in copied for one in rest.split()[:-1]}
    assert lines[0] == "*"
    assert named == wanted
    packages = re.findall(r'^"consortium\.([a-z]+)" = ', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    assert set(packages) <= wanted

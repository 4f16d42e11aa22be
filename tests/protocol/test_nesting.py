"""How deep a TOML text goes is found before it is parsed, in linear time."""

import time

import pytest
from breast_cancer import study_text

from consortium.protocol.errors import InputError
from consortium.protocol.nesting import deepest
from consortium.protocol.study import Study


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("", 0),
        ("a = 1", 1),
        ("a.b.c = 1.5", 3),
        ("[a . b\t.'c.d'.\"e.f\"]", 4),
        (r'a."\".".b = 1', 3),
        ('a = "x.y.z.w" # a.b.c.d', 1),
        ('a = """\nb.c.d.e\n"""', 1),
        ("a = '''\nb.c.d.e\n'''", 1),
        ('x = {a = """b"""", c.d.e = 1}', 3),
        ("x = {a = '''b'''', c.d.e = 1}", 3),
        ('a = """b\\"""c.d.e""" \nf.g = 1', 2),
    ],
)
def test_strings_and_comments_count_for_nothing(text: str, depth: int) -> None:
    """Bare and quoted parts count, whatever stands around the dots; what lies within strings does not."""
    assert deepest(text) == depth


def test_a_real_study_is_shallow() -> None:
    """Names of sections, and numbers."""
    assert deepest(study_text()) <= 4


@pytest.mark.parametrize(
    "text", ['"' * 300_000, '\\"' * 150_000, "'''" * 100_001, '"""' + '"x' * 150_000, "a." * 150_000]
)
def test_no_text_takes_long(text: str) -> None:
    """Open quotes, escapes and dots without end: 300 KB in under 2 seconds."""
    begun = time.monotonic()
    deepest(text)
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize("text", [".".join("a" * 17) + " = 1", "a = " + "[" * 5000, "a = " + "9" * 5000])
def test_a_study_too_deep_or_too_long_to_parse_is_bad_input(text: str) -> None:
    """Neither an endless stack nor a number of thousands of digits is an error of ours."""
    with pytest.raises(InputError):
        Study.parse(text)

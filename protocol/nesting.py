"""How deep the keys of a TOML text go, found before the text is parsed.

Python's parser takes memory in n^2 for a dotted key of n parts, so that 200 KB of text can take all that a machine has.
The scan here takes time in n. It cuts a text into strings, names and dots as the parser does, so that dots within a
string count for nothing.
"""

from __future__ import annotations

import re

_TOKEN = re.compile(
    r'''
    (?P<other> """(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5})? | \'{3}.*?(?:'{3,5}|\Z) | \#[^\n]*+ )
    | (?P<part> "(?:[^"\\\n]|\\.)*+"? | '[^'\n]*+'? | [\w-]++ )
    | (?P<dot> \. )
    | (?P<space> [ \t]++ )
    | .
    ''',
    re.VERBOSE | re.DOTALL,
)


def deepest(text: str) -> int:
    """Parts of the longest dotted key or number; also in a text that is no TOML."""
    found, depth, joined = 0, 0, False
    for token in _TOKEN.finditer(text):
        if token.lastgroup == "part":
            depth = depth + 1 if joined else 1
            found, joined = max(found, depth), False
        elif token.lastgroup == "dot":
            joined = True
        elif token.lastgroup != "space":
            depth, joined = 0, False
    return found

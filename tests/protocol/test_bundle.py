"""Bundles: one archive of a study and its code, the same bytes wherever it is built, and nothing else is read."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from consortium.protocol import bundle
from consortium.protocol.code import load
from consortium.protocol.errors import InputError, IntegrityError
from consortium.protocol.study import Study

STUDY = """format = 1
# a study of our own
[study]
name = "own"
task = "task:Own"
rounds = 2
"""
CODE = {
    "task.py": "import math, numpy\nfrom .layers.heads import Head\nfrom . import extra\nclass Own(Head):\n    pass\n",
    "layers/heads.py": "from ..extra import WIDTH\n\nclass Head:\n    width = WIDTH\n",
    "layers/__init__.py": "",
    "extra.py": "WIDTH = 7\n",
    "unused.py": "import nothing_at_all\n",
}


def lay(folder: Path, files: dict[str, str] = CODE, study: str = STUDY) -> Path:
    for path, text in {"study.toml": study, **files}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder / "study.toml"


def test_a_bundle_holds_the_study_and_what_its_code_imports_beside_it(tmp_path: Path) -> None:
    made = bundle.build(lay(tmp_path))
    assert list(made.files) == ["extra.py", "layers/__init__.py", "layers/heads.py", "task.py"]
    assert made.imports == ("math", "numpy")
    read = bundle.read(made.content, made.digest)
    assert read == made
    study = read.unpack(tmp_path / "out")
    assert load(study.task, study.folder).width == 7
    assert study.digest == made.study.digest == Study.load(tmp_path / "study.toml").digest


BUILD = """
import os, sys
from pathlib import Path
from consortium.protocol import bundle
if int(sys.argv[2]):
    os.setgroups([]), os.setgid(int(sys.argv[2])), os.setuid(int(sys.argv[2]))
print(bundle.build(Path(sys.argv[1])).digest)
"""


def test_the_same_study_gives_the_same_bytes_everywhere(tmp_path: Path) -> None:
    """Three checkouts, times, umasks, users (where we may be another), locales and time zones, files made in
    two orders, another name of the study file."""
    digests = set[str]()
    zones, places = ["UTC", "Asia/Tokyo", "America/Lima"], ["C", "C.UTF-8", "POSIX"]
    with tempfile.TemporaryDirectory() as temporary:
        Path(temporary).chmod(0o755)
        for number, umask in enumerate((0o000, 0o022, 0o007)):
            before = os.umask(umask)
            try:
                folder = Path(temporary) / f"checkout {number}" / ("deep" * number)
                path = lay(folder, dict(reversed(CODE.items())) if number else CODE)
            finally:
                os.umask(before)
            if number == 2:
                path = path.rename(path.with_name("another-name.toml"))
            for file in folder.rglob("*"):
                os.utime(file, (time.time() - 10**8 * number, time.time() - 10**8 * number))
            user = "65534" if number == 1 and os.geteuid() == 0 else "0"
            environment = {**os.environ, "TZ": zones[number], "LC_ALL": places[number]}
            command = [sys.executable, "-B", "-c", BUILD, str(path), user]
            digests.add(subprocess.check_output(command, env=environment, cwd="/", text=True).strip())
    assert digests == {bundle.build(lay(tmp_path)).digest}


def test_the_bytes_of_a_bundle_do_not_change_from_version_to_version() -> None:
    """Sites have approved this number; a change of the form needs another format."""
    study = Study.parse(STUDY, code={})
    made = bundle.of(study, {"task.py": b"from consortium.client import Task\n"})
    assert made.digest == "aaa6be2866d8f9e8fb847b8f6cee07a618399b6a419abf4a83a2d935af4835b9"


def test_a_bundle_is_a_flower_app(tmp_path: Path) -> None:
    from flwr.cli.config_utils import get_fab_metadata  # type: ignore[import-not-found, unused-ignore]

    made = bundle.build(lay(tmp_path))
    assert get_fab_metadata(made.content)
    with zipfile.ZipFile(io.BytesIO(made.content)) as archive:
        for line in archive.read(".info/CONTENT").decode().splitlines():
            path, digest, bits = line.split(",")
            content = archive.read(path)
            assert (digest, int(bits)) == (hashlib.sha256(content).hexdigest(), 8 * len(content))


def test_a_setting_a_comment_and_a_byte_of_code_make_another_bundle(tmp_path: Path) -> None:
    first = bundle.build(lay(tmp_path))
    comment = bundle.build(lay(tmp_path, study=STUDY + "# more\n"))
    assert comment.digest != first.digest
    assert comment.study.digest == first.study.digest
    code = bundle.build(lay(tmp_path, CODE | {"extra.py": "WIDTH = 8\n"}))
    assert code.digest != first.digest
    assert code.study.digest != first.study.digest


def test_every_byte_off_is_refused(tmp_path: Path) -> None:
    content = bundle.build(lay(tmp_path, {"task.py": "class Own: pass\n"})).content
    original = bundle.read(content).digest
    for place in range(len(content)):
        wrong = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        with pytest.raises(IntegrityError, match="is not the one with SHA-256"):
            bundle.read(wrong, original)
        try:
            other = bundle.read(
                wrong
            )  # without a digest, what is read is another bundle in its one form, or none
        except (IntegrityError, InputError):
            continue
        assert other.content == wrong
        assert other.digest != original


def archive(*members: tuple[zipfile.ZipInfo | str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as file:
        for name, content in members:
            file.writestr(name, content)
    return stream.getvalue()


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


def lying(content: bytes) -> bytes:
    """Its first member says that it is a gigabyte."""
    place = content.index(b"PK\x01\x02")
    return content[: place + 24] + struct.pack("<I", 1 << 30) + content[place + 28 :]


GOOD = ("study.toml", STUDY.encode())
WRONG: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "no archive": lambda: b"PK" + b"x" * 100,
    "a bomb": lambda: archive(GOOD, ("task.py", b"0" * (1 << 26)), compression=zipfile.ZIP_DEFLATED),
    "a lying size": lambda: lying(archive(GOOD)),
    "too many files": lambda: archive(GOOD, *((f"m{n}.py", b"") for n in range(1000))),
    "too large": lambda: archive(GOOD, ("task.py", b"#" * (bundle.MAX_BUNDLE + 1))),
    "a path that leads out": lambda: archive(GOOD, ("../task.py", b"")),
    "an absolute path": lambda: archive(GOOD, ("/tmp/task.py", b"")),
    "a path with a drive": lambda: archive(GOOD, ("C:\\task.py", b"")),
    "a link": lambda: archive(GOOD, (link("task.py"), b"/etc/passwd")),
    "a folder": lambda: archive(GOOD, ("layers/", b"")),
    "data": lambda: archive(GOOD, ("weights.pkl", b"")),
    "no study": lambda: archive(("task.py", b"")),
    "an empty archive": lambda: archive(),
    "something before it": lambda: b"#!/bin/sh\n" + archive(GOOD),
    "a nul in a name": lambda: archive(GOOD, ("task\0.py", b"")),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_what_is_no_bundle_is_refused_before_anything_of_it_is_used(what: str, tmp_path: Path) -> None:
    content = WRONG[what]()
    begun = time.monotonic()
    with pytest.raises((IntegrityError, InputError)):
        bundle.read(content)
    assert time.monotonic() - begun < 1
    (tmp_path / "x.fab").write_bytes(content)
    with pytest.raises((IntegrityError, InputError), match=r"x\.fab"):
        bundle.load(tmp_path / "x.fab")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_files_of_one_name_and_what_is_packed_otherwise_are_refused(tmp_path: Path) -> None:
    made = bundle.build(lay(tmp_path, {"task.py": "class Own: pass\n"}))
    with zipfile.ZipFile(io.BytesIO(made.content)) as file:
        members = [(name, file.read(name)) for name in file.namelist()]
    for wrong in (
        archive(*members),  # the time of now
        archive(*members, ("task.py", b"class Own: evil\n")),
        archive(*reversed(members)),
        made.content + b"\n",
        b"\n" + made.content,
        made.content[:-2] + b"\x01\0!",  # a comment
    ):
        with pytest.raises(IntegrityError):
            bundle.read(wrong)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "there is no task.py"),
        ({"task.py": "def\n"}, "task.py, line 1: is not Python"),
        (
            {"task.py": "x = 1\nimport extra\n", "extra.py": ""},
            "task.py, line 2: .*write: from . import extra",
        ),
        ({"task.py": "from .layers import Head\n"}, "task.py, line 1: there is no layers.py"),
        ({"task.py": "from ... import x\n"}, "imports from above"),
        (
            {"task.py": "import not_installed_anywhere\n"},
            "imports not_installed_anywhere, which is not installed here",
        ),
        ({"task.py": "#" * (1 << 21)}, "at most"),
    ],
)
def test_code_that_cannot_be_bundled_is_named(tmp_path: Path, files: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        bundle.build(lay(tmp_path, files))


def test_code_through_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.py").write_text("KEY = 1\n")
    path = lay(tmp_path / "study", {})
    (tmp_path / "study" / "task.py").symlink_to(tmp_path / "secret.py")
    with pytest.raises(InputError, match="leads out"):
        bundle.build(path)


def test_a_study_without_code_makes_a_bundle_too(tmp_path: Path) -> None:
    text = (
        STUDY.replace("task:Own", "consortium.client.tasks.image:Classifier")
        + "[data]\nshape = [8, 8, 1]\nclasses = 2\n"
    )
    made = bundle.build(lay(tmp_path, {}, text))
    assert not made.files
    assert bundle.read(made.content) == made == bundle.of(Study.parse(text))
    assert made.study.digest == Study.parse(text).digest

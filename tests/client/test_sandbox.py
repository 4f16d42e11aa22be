"""What a study's own code can do where it runs, tried from inside it: at a site's worker and at the server's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from consortium.client.site import start
from consortium.client.task import task_of
from consortium.client.worker_process import WorkerDied, WorkerLate, WorkerProcess
from consortium.protocol import sandbox
from consortium.protocol.errors import ConsortiumError, InputError, RefusedError
from consortium.protocol.layout import digest_of
from consortium.protocol.messages import Instruction, Payload, encode, parse
from consortium.protocol.study import Study
from consortium.protocol.watching import LONGEST_LINE, MOST_LINES
from consortium.server import worker_process
from consortium.strategies.base import Local

pytestmark = pytest.mark.skipif(bool(sandbox.missing()), reason=f"no sandbox here: {sandbox.missing()}")

STUDY = """format = 1
[study]
name = "own"
task = "task:Own"
rounds = 2
[data]
holdout = 0.2
"""
TASK = """
import ctypes, os, socket, sys, time
import numpy as np, torch
from torch import nn
from consortium.client import Examples, Task

LIBC = ctypes.CDLL(None, use_errno=True)

def escape(where):
    pass

class Own(Task):
    def model(self):
        escape("model")
        return nn.Linear(3, 2)

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def data(self, source):
        escape("data")
        table = torch.from_numpy(np.load(source.path))
        return Examples(table[:, :3], table[:, 3].long())
"""


class Site:
    """A folder as a site's, with a study whose code tries `escape`, and the worker that runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, list[str]()
        for name in ("code", "snapshot", "state", "work", "home"):
            (folder / name).mkdir()
        rows = np.random.default_rng(0).normal(size=(50, 3))
        np.save(folder / "snapshot/data.npy", np.column_stack([rows, rows.sum(1) > 0]).astype(np.float32))
        (folder / "home/identity.key").write_text("THE KEY")
        (folder / "other.npy").write_text("THE DATA OF ANOTHER STUDY")
        self.worker: WorkerProcess | None = None

    def with_code(self, escape: str) -> Site:
        """escape: the body of a function that the study's code calls where it makes the model and reads the data."""
        body = textwrap.indent(textwrap.dedent(escape).strip(), "    ")
        code = TASK.replace("    pass\n", body.replace("FOLDER", str(self.folder)) + "\n")
        (self.folder / "code/task.py").write_text(code)
        return self

    @property
    def study(self) -> Study:
        return Study.parse(STUDY, folder=self.folder / "code")

    def started(self) -> WorkerProcess:
        source = {"path": str(self.folder / "snapshot/data.npy"), "mapping": {}, "key": "00" * 16, "gaps": []}
        about: dict[str, object] = {
            "study": STUDY,
            "code": str(self.folder / "code"),
            "site": "north",
            "source": source,
            "state": str(self.folder / "state"),
            "key": "11" * 32,
            "epoch": 0,
        }
        places: dict[str, object] = {
            "memory": 1 << 30,
            "read": [str(self.folder / "code"), str(source["path"])],
            "write": [str(self.folder / "work"), str(self.folder / "state")],
            "apart": [str(self.folder / "home")],
        }  # fmt: skip
        self.worker = WorkerProcess(about, self.folder / "work", self.lines.append, places)
        return self.worker

    def train(self, seconds: float = 60) -> tuple[bytes, object]:
        """Ask for round 1."""
        instruction = asked(self.study)
        header, views = encode(instruction)
        with (self.folder / "content").open("wb+", buffering=0) as content:
            for view in views:
                content.write(view)
            content.seek(0)
            worker = self.worker or self.started()
            return worker.ask("own.1", header, content, instruction.model, seconds)

    def end(self) -> None:
        if self.worker is not None:
            self.worker.close()


def asked(study: Study) -> Instruction:
    """An instruction with a first model of the right form."""
    clean = Path(os.environ["CLEAN"])
    net = start(study, task_of(Study.parse(STUDY, folder=clean)), Local())
    vector = np.array(net.vector("shared"))
    return Instruction(
        federation="f", run="own.1", round=1, attempt=0, kind="train", study=study.digest, model=digest_of([vector]),
        layout=net.layout.digest, nonce="ab" * 16, expires=time.time() + 600, payload=Payload({"shared": vector}),
        site="north",
    )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    clean = tmp_path / "clean"
    clean.mkdir()
    (clean / "task.py").write_text(TASK)
    monkeypatch.setenv("CLEAN", str(clean))
    one = Site(tmp_path)
    yield one
    one.end()


def test_honest_code_works_confined_and_gives_what_it_gives_free(site: Site) -> None:
    site.with_code("pass")
    header, content = site.train()
    about = parse(header)
    assert (about.fields["status"], about.parts[0].shape, content is None) == ("done", [8], False)
    made = worker_process.initial(site.study, Local())
    free = worker_process.initial(site.study, Local(), trusted=True)
    assert made.vector.tobytes() == free.vector.tobytes()


FORBIDDEN: dict[str, str] = {
    "a socket": "socket.create_connection(('127.0.0.1', 9))",
    "a socket through ctypes": "LIBC.socket(2, 1, 0)",
    "a socket through a bare system call": "LIBC.syscall(41 if os.uname().machine == 'x86_64' else 198, 2, 1, 0)",
    "a fork": "os.fork()",
    "a fork bomb": "while True: os.fork()",
    "a fork through ctypes": "LIBC.fork()",
    "a program": "os.execv('/bin/sh', ['sh', '-c', 'id'])",
    "a program beside": "import subprocess; subprocess.run(['id'])",
    "tracing the agent": "LIBC.ptrace(16, os.getppid(), 0, 0)",
    "ending the agent": "os.kill(os.getppid(), 9)",
    "signalling everybody": "os.kill(-1, 15)",
    "reading the agent's memory": "LIBC.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0)",
    "limits of the agent": "import resource; resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))",
    "outliving its parent": "LIBC.prctl(1, 0)",
    "a namespace": "LIBC.unshare(0x10000000)",
    "io_uring": "LIBC.syscall(425, 8, 0)",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", list(FORBIDDEN))
def test_what_no_computation_needs_ends_the_process_at_a_site_and_is_logged(site: Site, what: str) -> None:
    """Also where the code catches every exception, as it does here."""
    site.with_code(
        f"if where == 'data':\n    try:\n        {FORBIDDEN[what]}\n    except BaseException:\n        pass"
    )
    with pytest.raises(RefusedError, match="asked the kernel for what the sandbox forbids"):
        site.train()


@pytest.mark.parametrize(
    "what", ["a socket through ctypes", "a fork", "a program beside", "ending the agent"]
)
def test_and_at_the_server(site: Site, what: str, caplog: pytest.LogCaptureFixture) -> None:
    site.with_code(FORBIDDEN[what])
    with pytest.raises(RefusedError, match="asked the kernel for what the sandbox forbids"):
        worker_process.initial(site.study, Local())
    assert "study 'own': its code asked the kernel for what the sandbox forbids" in caplog.text


DENIED: dict[str, str] = {
    "a unix socket": "socket.socket(socket.AF_UNIX)",
    "keys": "open('FOLDER/home/identity.key').read()",
    "another study's data": "open('FOLDER/other.npy').read()",
    "the home directory": "os.listdir(os.path.expanduser('~root'))",
    "the folder of all": "os.listdir('FOLDER')",
    "passwords": "open('/etc/passwd').read()",
    "the agent's environment": "open(f'/proc/{os.getppid()}/environ').read()",
    "the agent's memory": "open(f'/proc/{os.getppid()}/mem', 'rb').read(1)",
    "keys by way of a descriptor": "os.open('identity.key', os.O_RDONLY, dir_fd=os.open('FOLDER/home', os.O_PATH))",
    "keys by way of a link": "os.symlink('FOLDER/home/identity.key', 'link'); open('link').read()",
    "keys by way of another name": "os.link('FOLDER/home/identity.key', 'name'); open('name').read()",
    "keys by way of a rename": "os.rename('FOLDER/home/identity.key', 'mine')",
    "its code": "open('FOLDER/code/task.py', 'a').write('x')",
    "its data": "open('FOLDER/snapshot/data.npy', 'r+b').write(b'x')",
    "a new file elsewhere": "open('FOLDER/new', 'w')",
    "a file in /tmp": "open('/tmp/consortium-escape', 'w')",
    "shared memory": "open('/dev/shm/consortium-escape', 'w')",
}


@pytest.mark.slow
def test_a_file_that_is_not_its_own_is_closed_to_it_at_a_site(site: Site) -> None:
    """The attempt fails in the code, which then cannot answer; the site's log says what was tried, and where."""
    site.with_code(f"if where == 'data': {DENIED['keys']}")
    with pytest.raises(RefusedError, match=r"PermissionError"):
        site.train()
    assert any("home/identity.key" in line for line in until(site, "sandbox: the study's code asked for"))


@pytest.mark.slow
def test_so_are_all_others(site: Site) -> None:
    """One process tries them all, for each is refused by itself. The kernel says so in one of four ways."""
    site.with_code(f"""
        if where == "data":
            for what, attempt in {DENIED!r}.items():
                try:
                    exec(attempt)
                    print(f"{{what}}: it is open", file=sys.stderr)
                except OSError as error:
                    print(f"{{what}}: {{type(error).__name__}} {{error.strerror}}", file=sys.stderr)
            raise ValueError("all tried")
    """)
    with pytest.raises(RefusedError, match="ValueError"):
        site.train()
    said = [line.partition(": ") for line in until(site, "all tried")]
    found = {what: why for what, _, why in said if what in DENIED}
    refused = (
        r"PermissionError|FileNotFoundError|OSError Operation not permitted|OSError Invalid cross-device link"
    )
    assert found.keys() == DENIED.keys()
    assert {what: why for what, why in found.items() if not re.match(refused, why)} == {}
    asked = [why for what, _, why in said if what == "sandbox"]
    for path in ("home/identity.key", "/etc/passwd", "/tmp/consortium-escape"):
        assert any(path in why for why in asked)
    assert (site.folder / "home/identity.key").read_text() == "THE KEY"
    assert not Path("/tmp/consortium-escape").exists()
    assert not Path("/dev/shm/consortium-escape").exists()
    assert not (site.folder / "new").exists()


@pytest.mark.parametrize("what", ["keys", "passwords", "a new file elsewhere", "the agent's environment"])
def test_and_to_it_at_the_server(site: Site, what: str) -> None:
    site.with_code(DENIED[what])
    with pytest.raises(InputError, match=r"task.py, line \d+: PermissionError"):
        worker_process.initial(site.study, Local())


def test_keys_through_ctypes_are_closed_too(site: Site) -> None:
    site.with_code("""
        if where == "data":
            got = LIBC.open(b"FOLDER/home/identity.key", 0)
            raise ValueError(f"descriptor {got}, error {ctypes.get_errno()}")
    """)
    with pytest.raises(RefusedError):
        site.train()
    assert any("descriptor -1, error 13" in line for line in until(site, "descriptor"))


def test_memory_is_bounded(site: Site) -> None:
    site.with_code("if where == 'data': hoard = [bytearray(1 << 28) for _ in range(100_000)]")
    with pytest.raises((RefusedError, WorkerDied), match=r"[Mm]emory|SIG|exit code"):
        site.train()


def test_files_are_bounded_also_those_without_a_name(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("consortium.client.worker_process.MAX_DISK", 1 << 28)
    site.with_code("""
        if where == "data":
            kept = []
            while True:
                kept.append(os.memfd_create("x"))
                os.write(kept[-1], bytes(1 << 24))
                time.sleep(0.02)
    """)
    with pytest.raises(RefusedError, match="wrote more than"):
        site.train()


def test_threads_are_bounded(site: Site) -> None:
    site.with_code("""
        if where == "data":
            import threading
            threading.stack_size(1 << 16)
            while True:
                threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    """)
    # Whichever comes first: the watch that counts them, or the kernel, which has no more memory for one.
    with pytest.raises(RefusedError, match=r"started more than 256 threads|the worker failed \(RuntimeError"):
        site.train()


def test_time_is_bounded_also_where_it_drips_an_answer(site: Site) -> None:
    """A byte now and then does not keep the agent waiting beyond the instruction's end."""
    site.with_code("""
        if where == "data":
            for number in range(3, 100):
                try:
                    other = socket.socket(fileno=os.dup(number)) if False else None
                except OSError:
                    pass
            for number in range(3, 50):
                try:
                    import stat
                    if stat.S_ISSOCK(os.fstat(number).st_mode):
                        while True:
                            os.write(number, b"\\0")
                            time.sleep(0.1)
                except OSError:
                    pass
    """)
    site.started()
    begun = time.monotonic()
    with pytest.raises((WorkerLate, WorkerDied, RefusedError)):
        site.train(seconds=8)
    assert time.monotonic() - begun < 12


def test_it_does_not_outlive_its_run_nor_the_agent(site: Site) -> None:
    """Nor where it takes every signal that can be taken."""
    site.with_code("""
        if where == "data":
            import signal
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN)
            while True:
                time.sleep(1)
    """)
    worker = site.started()
    said: list[Exception] = []

    def train() -> None:
        try:
            site.train()
        except ConsortiumError as error:
            said.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    time.sleep(3)
    worker.kill()
    thread.join(10)
    assert not Path(f"/proc/{worker.pid}").exists()
    assert len(said) == 1


IS_SOCKET = """
import stat
def stat_is_socket(n):
    try:
        return stat.S_ISSOCK(os.fstat(n).st_mode)
    except OSError:
        return False
def large(size):
    from consortium.protocol.messages import canonical
    part = {"place": "opaque", "name": "", "dtype": "|u1", "shape": [size]}
    fields = {"run": "own.1", "round": 1, "attempt": 0, "kind": "train", "site": "north", "nonce": "ab" * 16}
    fields |= {"model": "", "status": "done", "reason": "", "weight": 1.0}
    return canonical({"format": 1, "type": "answer", "fields": fields, "parts": [part], "sha256": "0" * 64}).decode()
"""


def test_it_dies_with_the_program_that_started_it(site: Site) -> None:
    site.with_code("print('it sleeps', flush=True); time.sleep(120)")
    (site.folder / "work/study.toml").write_text(STUDY)
    places = {"read": [str(site.folder / "code")], "write": [str(site.folder / "work")], "apart": []}
    command = [sys.executable, "-P", "-B", "-m", "consortium.protocol.confined", json.dumps(places)]
    command += ["consortium.client.worker", "initial"]
    command += [str(site.folder / "work"), "--code", str(site.folder / "code"), "--parent"]
    parent = (
        "import os, subprocess; one = subprocess.Popen([*COMMAND, str(os.getpid())], text=True, stdout=-1)\n"
        "print(one.pid, one.stdout.readline(), flush=True); one.wait()"
    )
    program = [sys.executable, "-c", parent.replace("COMMAND", repr(command))]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as between:
        assert between.stdout is not None
        pid, _, said = between.stdout.readline().partition(" ")
        assert said == "it sleeps\n"
        assert Path(f"/proc/{pid}").exists()
        between.kill()
    end = time.monotonic() + 10
    while Path(f"/proc/{pid}/exe").is_symlink() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}/fd/1").exists()


ANSWERS: dict[str, tuple[str, str]] = {
    "ten gigabytes": (
        "ten = os.open('ten', os.O_RDWR | os.O_CREAT); os.ftruncate(ten, 3 << 30); "
        "say({'header': large(10 << 30)}, [ten])",
        "gave more than an answer can have",
    ),
    "a pipe": ("say({'header': large(8)}, [os.pipe()[0]])", "gave more than an answer can have"),
    "a pickle": ("import pickle; raw(pickle.dumps(print))", "gave what is no answer"),
    "a pickle in JSON": ("say({'pickle': 'gASVHgAAAAAAAACMCGJ1aWx0aW5z'})", "the worker gave no answer"),
    "a long document": ("raw((1 << 30).to_bytes(4, 'big'))", "gave what is no answer"),
    "deep JSON": ("raw(len(b'[' * 100000).to_bytes(4, 'big') + b'[' * 100000)", "gave what is no answer"),
    "an error that rings": ("say({'error': chr(27) + '[2J' + 'x' * 100000})", r"^ \[2Jx{1000,}$"),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", list(ANSWERS))
def test_what_it_says_in_the_workers_place_is_bounded_and_never_unpickled(site: Site, what: str) -> None:
    """The code speaks over the worker's own socket."""
    code, says = ANSWERS[what]
    site.with_code(f"""
        if where == "data":
            import json, stat
            link = next(n for n in range(3, 50) if stat_is_socket(n))
            line = socket.socket(fileno=link)
            raw = line.sendall
            def say(document, files=()):
                text = json.dumps(document).encode()
                socket.send_fds(line, [len(text).to_bytes(4, "big")], list(files))
                raw(text)
            for _ in range(2):  # what is said first is taken for the word that it has started
                {code}
            time.sleep(60)
    """)
    code_file = site.folder / "code/task.py"
    code_file.write_text(code_file.read_text().replace("LIBC =", IS_SOCKET + "LIBC ="))
    with pytest.raises(RefusedError, match=says) as error:
        site.train(seconds=50)
    assert len(str(error.value)) <= LONGEST_LINE + 100
    assert str(error.value).isprintable()


def test_log_lines_are_bounded_in_length_and_number_and_hold_no_controls(site: Site) -> None:
    site.with_code("""
        if where == "data":
            sys.stderr.write("\\x1b[2J" + "x" * 1_000_000 + "\\n")
            for number in range(20_000):
                sys.stderr.write(f"line {number}\\n")
    """)
    site.train()
    until(site, "no more of them are shown")
    assert len(site.lines) <= MOST_LINES + 1
    assert all(len(line) <= LONGEST_LINE and line.isprintable() for line in site.lines)


def test_where_keys_lie_among_what_the_interpreter_needs_nothing_is_started(site: Site) -> None:
    with pytest.raises(InputError, match=r"lies in .*move it out of there"):
        sandbox.check_apart(Path(sys.prefix) / "site")
    sandbox.check_apart(site.folder)


def test_a_process_with_two_threads_is_not_confined() -> None:
    program = (
        "import threading, time; threading.Thread(target=time.sleep, args=(5,), daemon=True).start()\n"
        "from consortium.protocol import sandbox; sandbox.enter([], [])"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "before any thread is started" in said.stderr


def until(site: Site, word: str, seconds: float = 10) -> list[str]:
    """The log, once a line of it holds the word."""
    end = time.monotonic() + seconds
    while not any(word in line for line in site.lines):
        assert time.monotonic() < end, site.lines[-5:]
        time.sleep(0.05)
    return site.lines

"""What code that a study brings is confined by: Landlock and seccomp, means of the Linux kernel that need no rights.

`enter` is for a process with one thread, before it loads what it does not trust; it cannot be undone. From then on:

- files: what the interpreter and its libraries need, and `read`, can be read; below `write` alone can be written;
- no new socket of any kind, no other process: not started, signalled, traced, nor its memory read;
- no capability, no file handle, keyring, io_uring, namespace or shared memory that others see; the signal by which
  the process dies with its parent stays set.

`limit` follows when the libraries are loaded: memory, size of a file, and now the kernel ends the process at the first
call that code which computes has no use for. Both are rules of the kernel, so `ctypes` and machine code get no further
than Python does.

Landlock: https://docs.kernel.org/userspace-api/landlock.html; seccomp: https://docs.kernel.org/userspace-api/seccomp_filter.html
"""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import mmap
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from consortium.protocol.errors import InputError, RefusedError

MAX_THREADS = 256
"""Threads of a confined process; who watches it ends it beyond."""
MAX_DISK = 4 << 30
"""Bytes that it may have in files, on disk and in memory; likewise, and of one file at once."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

# System calls by name: on x86-64, on arm64 (None: it has none).
_CALLS: dict[str, tuple[int, int | None]] = {
    "connect": (42, 203), "accept": (43, 202), "accept4": (288, 242), "bind": (49, 200),
    "listen": (50, 201), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "process_madvise": (440, 440), "process_mrelease": (448, 448), "kcmp": (312, 272), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "pidfd_send_signal": (424, 424), "fork": (57, None), "vfork": (58, None),
    "execve": (59, 221), "execveat": (322, 281), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40),
    "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "reboot": (169, 142), "swapon": (167, 224),
    "swapoff": (168, 225), "sethostname": (170, 161), "setdomainname": (171, 162), "settimeofday": (164, 170),
    "clock_settime": (227, 112), "clock_adjtime": (305, 266), "adjtimex": (159, 171), "iopl": (172, None),
    "ioperm": (173, None), "quotactl": (179, 60), "acct": (163, 89), "syslog": (103, 116),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "shmget": (29, 194), "shmat": (30, 196), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "migrate_pages": (256, 238), "move_pages": (279, 239), "setpriority": (141, 140), "ioprio_set": (251, 30),
    "sched_setscheduler": (144, 119), "sched_setparam": (142, 118), "sched_setattr": (314, 274),
    "tkill": (200, 130), "memfd_secret": (447, 447), "rt_tgsigqueueinfo": (297, 240), "personality": (135, 92),
}  # fmt: skip
_KILL, _TGKILL, _QUEUE = (62, 129), (234, 131), (129, 138)
_SOCKET = (41, 198)
_PRLIMIT, _AFFINITY = (302, 261), (203, 122)
_CLONE, _CLONE3, _PRCTL, _FCNTL = (56, 220), (435, 435), (157, 167), (72, 25)
_ARCH = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_SELF = 444, 445, 446
_SECCOMP = (317, 277)
_CLONE_THREAD = 0x10000

# BPF (linux/bpf_common.h): load a word, and, jump where equal or not below, return; seccomp's returns.
_LD, _AND, _JEQ, _JGE, _RET = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _ERRNO, _KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH_AT, _ARG0, _ARG1 = 0, 4, 16, 24

# Landlock's rights (linux/landlock.h).
_WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 1, 1 << 2, 1 << 3
_REMOVE_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG, _REFER, _TRUNCATE = (
    1 << 4,
    1 << 5,
    1 << 7,
    1 << 8,
    1 << 13,
    1 << 14,
)
_READ = _READ_FILE | _READ_DIR
_CHANGE = _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REG | _REFER | _TRUNCATE

_FILES = (
    "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero", "/proc/cpuinfo",
    "/proc/meminfo", "/proc/stat", "/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/osrelease",
)  # fmt: skip
_FOLDERS = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/usr/share/zoneinfo",
    "/sys/devices/system",
)
_NAMESPACE = ("protocol", "strategies", "privacy", "client", "server")


def landlock_version() -> int:
    """The version of Landlock that this kernel has; 0 for none."""
    version = _libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint(1))
    return max(0, int(version))


def missing() -> str:
    """Why this machine cannot confine code; empty where it can."""
    if sys.platform != "linux" or platform.machine() not in _ARCH:
        return f"{sys.platform} on {platform.machine()} has none that this version knows"
    if not landlock_version():
        return "the kernel has no Landlock (Linux 5.13 and later have it, where it is not turned off)"
    if not Path("/proc/self/status").exists() or "Seccomp:" not in Path("/proc/self/status").read_text():
        return "the kernel has no seccomp"
    return ""


def describe() -> str:
    """What is in force for code that studies bring."""
    why = missing()
    if why:
        return f"none: {why}; code that studies bring is refused"
    return f"Landlock (version {landlock_version()}) and seccomp confine code that studies bring"


def needed() -> list[str]:
    """Files and folders that the interpreter, its libraries and Consortium are read from."""
    ours = [importlib.util.find_spec(f"consortium.{name}") for name in _NAMESPACE]
    packages = [str(Path(spec.origin).parent) for spec in ours if spec is not None and spec.origin]
    paths = [sys.prefix, sys.base_prefix, *(path for path in sys.path if path), *packages, *_FOLDERS, *_FILES]
    return list(dict.fromkeys(path for path in paths if Path(path).exists()))


def check_apart(folder: Path) -> None:
    """Returns where confined code does not read `folder` because of what it needs.

    Raises:
        InputError: the folder lies where the interpreter or its libraries are.
    """
    for path in needed():
        if folder.resolve().is_relative_to(Path(path).resolve()):
            raise InputError(
                f"{folder}: lies in {path}, which code that a study brings can read; move it out of there"
            )


def enter(read: Iterable[str], write: Iterable[str]) -> int:
    """Confine this process, which must have one thread; gives a descriptor that `limit` needs.

    Raises:
        RefusedError: the kernel cannot, or a thread runs already; nothing may be loaded then.
    """
    if why := missing():
        raise RefusedError(f"there is no sandbox here: {why}")
    if len(list(Path("/proc/self/task").iterdir())) != 1:
        raise RefusedError("the sandbox must be entered before any thread is started")
    size = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    _drop_capabilities()
    _check(_libc.prctl(38, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    _landlock([*needed(), *read], list(write))
    _seccomp(_ERRNO | errno.EPERM)
    return size


def limit(size: int, memory: int) -> None:
    """Bound what the process may take from now on, and end it at the first call that the sandbox forbids.

    size: what `enter` gave. memory: bytes of address space beside those of now.
    """
    space = int(os.pread(size, 100, 0).split()[0]) * mmap.PAGESIZE + memory
    os.close(size)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_DISK, MAX_DISK))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _seccomp(_KILL_PROCESS)


def memory() -> int:
    """Bytes that a confined process may take: half of the machine's, at least 1 GiB."""
    return max(1 << 30, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)


def _drop_capabilities() -> None:
    header = struct.pack("Ii", 0x20080522, 0)
    _check(_libc.syscall(*_numbered((126, 91)), header, bytes(24)), "capset")


def _landlock(read: Sequence[str], write: Sequence[str]) -> None:
    version = landlock_version()
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    rules = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    length = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, rules, ctypes.c_size_t(length), 0), "landlock")
    try:
        for path, rights in [
            *((one, _READ) for one in read),
            *((one, _CHANGE) for one in write),
            ("/dev/null", 6),
        ]:
            _rule(ruleset, path, rights & files)
        _check(_libc.syscall(_LANDLOCK_SELF, ruleset, 0), "landlock")
    finally:
        os.close(ruleset)


def _rule(ruleset: int, path: str, rights: int) -> None:
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not Path(path).is_dir():
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        beneath = struct.pack("=Qi", rights, descriptor)
        _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, beneath, 0), f"landlock: {path}")
    finally:
        os.close(descriptor)


def _numbered(pair: tuple[int, int | None]) -> tuple[int, ...]:
    number = pair[_ARCH[platform.machine()][0]]
    return () if number is None else (number,)


def _seccomp(action: int) -> None:
    """Add a filter to every thread: `action` at what is forbidden."""
    program = b"".join(struct.pack("HBBI", *one) for one in _filter(action))
    buffer = ctypes.create_string_buffer(program, len(program))
    about = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _check(_libc.syscall(*_numbered(_SECCOMP), 1, 1, about), "seccomp")


def _filter(action: int) -> list[tuple[int, int, int, int]]:
    """The filter as BPF instructions: code, jump where true, jump where false, operand."""
    machine, own = platform.machine(), os.getpid()
    deny = (_RET, 0, 0, action)
    out = [
        (_LD, 0, 0, _ARCH_AT),
        (_JEQ, 1, 0, _ARCH[machine][1]),
        (_RET, 0, 0, _KILL_PROCESS),
        (_LD, 0, 0, _NR),
    ]
    if machine == "x86_64":  # calls of the x32 kind
        out += [(_JGE, 0, 1, 0x40000000), deny]

    def at(pair: tuple[int, int | None], *then: tuple[int, int, int, int]) -> None:
        for number in _numbered(pair):
            out.extend([(_JEQ, 0, len(then), number), *then])

    for pair in _CALLS.values():
        at(pair, deny)
    refuse = (
        _RET,
        0,
        0,
        _ERRNO | errno.EPERM,
    )  # the C library asks a daemon for names of users, and does without
    at(_SOCKET, (_LD, 0, 0, _ARG0), (_JEQ, 0, 1, 1), refuse, deny)
    at(
        _CLONE3, (_RET, 0, 0, _ERRNO | errno.ENOSYS)
    )  # the C library then calls clone, whose flags can be seen
    allow = (_RET, 0, 0, _ALLOW)
    at(_CLONE, (_LD, 0, 0, _ARG0), (_AND, 0, 0, _CLONE_THREAD), (_JEQ, 0, 1, _CLONE_THREAD), allow, deny)
    for pair in (_KILL, _TGKILL, _QUEUE):
        at(pair, (_LD, 0, 0, _ARG0), (_JEQ, 0, 1, own), allow, deny)
    for pair in (_PRLIMIT, _AFFINITY):
        at(pair, (_LD, 0, 0, _ARG0), (_JEQ, 0, 1, 0), allow, (_JEQ, 0, 1, own), allow, deny)
    # PR_SET_PDEATHSIG: the process dies with its parent, by SIGKILL, and by nothing less.
    death = ((_LD, 0, 0, _ARG1), (_JEQ, 0, 1, signal.SIGKILL), allow, deny)
    at(_PRCTL, (_LD, 0, 0, _ARG0), (_JEQ, 1, 0, 1), allow, *death)
    setters = [instruction for command in (8, 10, 15) for instruction in ((_JEQ, 0, 1, command), deny)]
    at(_FCNTL, (_LD, 0, 0, _ARG1), *setters, allow)  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others
    return [*out, allow]


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise RefusedError(f"there is no sandbox here: {what}: {os.strerror(number)}")
    return int(result)

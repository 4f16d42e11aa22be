"""What an operator is shown of a study before deciding: pure, from the bundle, the one approved before, and the data.

Nothing of the study runs. Code is read as a syntax tree; what it does to files, processes and the interpreter is
listed with its line, but a tree shows what is written, not all that can happen: the sandbox is what holds.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from consortium.protocol import code
from consortium.protocol.bundle import Bundle
from consortium.protocol.study import Study

_NOTED = {
    "open", "exec", "eval", "compile", "__import__", "globals", "getattr", "setattr", "breakpoint", "input",
    "load", "loads", "read_csv", "read_parquet", "fromfile", "memmap", "import_module",
}  # fmt: skip
_MODULES = {
    "os", "sys", "subprocess", "socket", "ctypes", "shutil", "pathlib", "tempfile", "pickle", "multiprocessing",
    "threading", "signal", "importlib", "http", "urllib", "requests", "asyncio", "mmap", "resource", "builtins",
}  # fmt: skip
LONGEST = 160


def document(
    bundle: Bundle, before: Bundle | None, data: str, mapping: Mapping[str, Any], sandbox: str
) -> dict[str, Any]:
    """The review as one document. before: the last approved bundle of the same name. data: the data set's name."""
    study = bundle.study
    return {
        "study": study.name,
        "bundle": bundle.digest,
        "settings": study.digest,
        "task": study.task,
        "built_in": study.built_in,
        "runs": _runs(study),
        "leaves": leaves(study),
        "privacy": privacy(study),
        "data": {"set": data, "columns": columns(study, mapping)},
        "code": {path: text.decode(errors="replace") for path, text in bundle.files.items()},
        "diff": diff(before, bundle) if before is not None else None,
        "before": before.digest if before is not None else None,
        "imports": [f"{path}, line {line}: {name}" for path, line, name in _imports(bundle)],
        "not_installed": bundle.missing(),
        "touches": [f"{path}, line {line}: {what}" for path, line, what in touched(bundle)],
        "sandbox": "not needed, no code comes with it" if study.built_in else sandbox,
    }


def page(said: Mapping[str, Any], standing: str) -> str:
    """The review on a terminal. All that comes from the study is shown without control characters."""
    lines = [
        f"study        {said['study']}: {standing}",
        f"bundle       {said['bundle']}",
        f"task         {said['task']}" + ("" if said["built_in"] else ", code that the study brings"),
        f"runs         {said['runs']}",
        *(f"leaves       {one}" for one in said["leaves"]),
        f"privacy      {said['privacy']}",
        f"data         {said['data']['set'] or 'none chosen; choose with --data NAME'}",
        *(f"  column     {one}" for one in said["data"]["columns"]),
    ]
    if not said["built_in"]:
        lines += [f"sandbox      {said['sandbox']}"]
        lines += [f"imports      {one}" for one in said["imports"]]
        lines += [f"not here     {one} is not installed" for one in said["not_installed"]]
        lines += [f"look at      {one}" for one in said["touches"]]
        if said["diff"] is not None:
            lines += [
                "",
                f"What is new since bundle {said['before'][:16]}, approved before:",
                said["diff"] or "nothing",
            ]
        else:
            for path, text in said["code"].items():
                numbered = [f"{n:5} {line}" for n, line in enumerate(text.splitlines(), 1)]
                lines += ["", f"{path}, {len(numbered)} lines:", *numbered]
    return "\n".join(_plain(line) for line in "\n".join(lines).split("\n"))


def leaves(study: Study) -> list[str]:
    """What this study lets leave the site: kinds and releases."""
    control = " and control variates of the same size" if study.strategy.name == "scaffold" else ""
    counts = f"counts for the metrics of each round's model{f' ({study.metric})' if study.metric else ''}"
    if study.app is not None:
        return [
            "each message: whatever the app's ClientApp puts into its reply, arrays, metrics and settings, of about as "
            "many bytes as it was sent; nothing clips, noises or checks them",
            "the app controls what leaves: read its ClientApp, the sandbox does not keep records in",
            "its ServerApp decides how many messages there are: of training, at most one a round",
        ]
    found = [f"each round: an update of the model's shared weights{control}, and its weight, at most "
             f"{study.cohort.max_weight:g}", f"each round: {counts}"]  # fmt: skip
    if study.built_in:
        found.append("once: sums over the declared ranges, for preprocessing")
    else:
        found.append(
            "once, if the code asks for it: named sums for preprocessing, which its `statistics` gives"
        )
        found.append("the code can hide records in updates and sums: read it, the sandbox does not keep that")
    return found


def privacy(study: Study) -> str:
    """The study's privacy in words."""
    one = study.privacy
    if study.app is not None:
        return "none: a Flower app's replies are not noised; no differential privacy, no secure aggregation"
    if one.mechanism == "none":
        return "none: updates and counts are not noised and may reveal records"
    return (
        f"{one.mechanism} for each {one.unit}: epsilon {one.epsilon}, delta {one.delta}, clip {one.clip_norm}"
    )


def columns(study: Study, mapping: Mapping[str, Any]) -> list[str]:
    """The columns that the study uses, and where the site's own are called otherwise."""
    names = [*getattr(study.data, "features", {}), *filter(None, [getattr(study.data, "target", None)])]
    own = mapping.get("columns", {})
    found = [
        f"{name} from {own[name]['column']}" if name in own and "column" in own.get(name, {}) else name
        for name in names
    ]
    return found or ["whatever its code reads of the copy of the data set"]


def diff(before: Bundle, after: Bundle) -> str:
    """A unified diff of study file and code."""
    old = {"study.toml": before.study.text.encode(), **before.files}
    new = {"study.toml": after.study.text.encode(), **after.files}
    out: list[str] = []
    for path in sorted({*old, *new}):
        was, now = (one.get(path, b"").decode(errors="replace").splitlines() for one in (old, new))
        out += difflib.unified_diff(was, now, f"approved/{path}", f"new/{path}", lineterm="")
    return "\n".join(out)


def touched(bundle: Bundle) -> Iterator[tuple[str, int, str]]:
    """Calls and modules that reach beyond computing, or into files: path, line, source."""
    for path, text in bundle.files.items():
        nodes = [
            node for node in ast.walk(code.parse(path, text)) if isinstance(node, ast.Call | ast.Attribute)
        ]
        for node in sorted(nodes, key=lambda one: one.lineno):
            named = isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in _NOTED
            module = (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in _MODULES
            )
            hidden = (
                isinstance(node, ast.Attribute) and node.attr.startswith("__") and node.attr != "__init__"
            )
            if named or module or hidden:
                yield path, node.lineno, ast.unparse(node)[:LONGEST]


def _imports(bundle: Bundle) -> Iterator[tuple[str, int, str]]:
    for path, text in bundle.files.items():
        for line, name, dots in sorted(code.imports(path, text)):
            if not dots:
                yield path, line, name


def _runs(study: Study) -> str:
    longest = study.rounds * study.cohort.deadline
    strategy = study.strategy.name if study.app is None else f"that of its ServerApp {study.app.serverapp}"
    return (
        f"{study.rounds} rounds with at least {study.cohort.min_sites} sites, {longest / 3600:.1f} hours at the longest"
        f"; strategy {strategy}, from {study.cohort.approvals} approvals on"
    )


def _plain(line: str) -> str:
    return "".join(c if c.isprintable() or c == "\t" else "\N{REPLACEMENT CHARACTER}" for c in line)

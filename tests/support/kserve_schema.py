"""KServe's published types, read out of the wheels of its Python client without running any of it.

The client is generated from KServe's OpenAPI document: each model lists its fields, their names in JSON and their
types, and refuses None where a field is required. What is of Kubernetes stands in Kubernetes' own client.
"""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

WHEELS = ("kserve==0.21.0", "kubernetes==37.0.2")
"""Eight megabytes together, without what they need to run."""
_PLAIN = {"str": str, "int": int, "bool": bool}
_OF = re.compile(r"(list|dict)[\[(](?:str, )?(.*)[\])]", re.IGNORECASE)
_REQUIRED = re.compile(r"Invalid value for `(\w+)`, must not be `None`")


def fetched(folder: Path) -> list[Path]:
    """The wheels; none where they cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "-d", folder, *WHEELS], capture_output=True, check=False)
    return sorted(folder.glob("*.whl")) if done.returncode == 0 else []


class Schema:
    """wheels: of both clients."""

    def __init__(self, wheels: Sequence[Path]) -> None:
        self._files = [zipfile.ZipFile(one) for one in wheels]
        self._places = {
            Path(name).stem: (file, name)
            for file in self._files
            for name in file.namelist()
            if re.fullmatch(r"(kserve|kubernetes/client)/models/\w+\.py", name)
        }

    @cache  # noqa: B019 - a schema lives as long as its test
    def _model(self, name: str) -> tuple[dict[str, str], set[str]]:
        """Types by name in JSON, and the names that are required."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
        stem = re.sub(r"(?<=[A-Z])(?=[A-Z][a-z])", "_", words).lower()
        file, place = self._places[stem]
        text = file.read(place).decode()
        found: dict[str, dict[str, str]] = {}
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                target = node.targets[0] if isinstance(node, ast.Assign) else node.target
                if isinstance(target, ast.Name) and target.id in ("openapi_types", "attribute_map"):
                    found[target.id] = ast.literal_eval(node.value)
        names = found["attribute_map"]
        return (
            {names[key]: kind for key, kind in found["openapi_types"].items()},
            {names[key] for key in _REQUIRED.findall(text)},
        )

    def mistakes(self, document: Any, kind: str, where: str = "") -> list[str]:
        """What in a document is not as the type says: unknown and missing fields, values of other types."""
        if kind in _PLAIN:
            return [] if type(document) is _PLAIN[kind] else [f"{where}: {kind} is expected"]
        if (of := _OF.fullmatch(kind)) is not None:
            if not isinstance(document, list if of[1].lower() == "list" else dict):
                return [f"{where}: {kind} is expected"]
            pairs = document.items() if isinstance(document, dict) else enumerate(document)
            return [said for key, one in pairs for said in self.mistakes(one, of[2], f"{where}.{key}")]
        if type(document) is not dict:
            return [f"{where}: {kind} is expected"]
        types, required = self._model(kind)
        found = [f"{where}.{key}: is missing" for key in sorted(required - document.keys())]
        for key, one in document.items():
            known = key in types
            found += (
                self.mistakes(one, types[key], f"{where}.{key}") if known else [f"{where}.{key}: is unknown"]
            )
        return found

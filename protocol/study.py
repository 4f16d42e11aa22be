"""The study file: one training task, as the researcher writes it and as every site reads and approves it.

`Study.load("study.toml")` reads format 1 of the file. All mistakes are reported at once, each with its key, the value
got and what would be right. A study is frozen; nothing here runs anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import BaseModel, ConfigDict, PrivateAttr

from consortium.protocol import code as own_code
from consortium.protocol.checking import check
from consortium.protocol.errors import InputError, StudyError
from consortium.protocol.messages import canonical
from consortium.protocol.nesting import deepest
from consortium.protocol.sections import (
    FORMAT,
    TASKS,
    App,
    Cohort,
    Evaluation,
    Export,
    ImageData,
    ImageModel,
    OwnData,
    OwnModel,
    Privacy,
    StrategyTable,
    TabularData,
    TabularModel,
    Training,
    allowed_metrics,
)

DEEPEST = 16
"""Parts of a dotted key; a study needs four."""


class Study(BaseModel):
    """A study file, checked. Make one with `Study.load` or `Study.parse`.

    `folder` is where the study's own code lies; it is not part of the study's identity.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    task: str
    rounds: int
    seed: int
    data: TabularData | ImageData | OwnData
    model: TabularModel | ImageModel | OwnModel
    training: Training
    strategy: StrategyTable
    cohort: Cohort
    evaluation: Evaluation
    privacy: Privacy
    export: Export
    app: App | None = None
    _text: str = PrivateAttr(default="")
    _folder: Path | None = PrivateAttr(default=None)
    _code: dict[str, str] = PrivateAttr(default_factory=dict)  # SHA-256 by path of the study's own files

    @staticmethod
    def load(path: str | Path) -> Study:
        """The study in a TOML file.

        Raises:
            InputError: the file is missing, unreadable or not TOML.
            StudyError: every mistake in it.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read ({error.strerror}); give the path of a study file"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is not UTF-8 text; give the path of a study file (TOML)") from error
        return Study.parse(text, source=str(path), folder=path.parent)

    @staticmethod
    def parse(
        text: str,
        source: str = "study",
        folder: Path | None = None,
        code: Mapping[str, bytes] | None = None,
    ) -> Study:
        """The study in a TOML text; `source` names it in errors, `folder` is where its code lies, and `code` are the
        files of that by path, where they are known already.

        Raises:
            InputError: it is not TOML, or nested too deeply.
            StudyError: every mistake in it.
        """
        too_deep = f"{source}: is nested too deeply; no key of a study has more than four parts"
        if deepest(text) > DEEPEST:
            raise InputError(too_deep)
        try:
            document = tomllib.loads(text)
        except RecursionError as error:
            raise InputError(too_deep) from error
        except ValueError as error:  # also of a number with thousands of digits
            raise InputError(f"{source}: is not valid TOML: {error}; correct that line") from error
        return _study(document, source, text, folder, code)

    @property
    def text(self) -> str:
        """The file as it was written."""
        return self._text

    @property
    def folder(self) -> Path:
        """Where the study's own code lies."""
        return self._folder or Path()

    @property
    def built_in(self) -> bool:
        """Whether task and strategy are Consortium's own, so that no code comes with the study."""
        return self.task in TASKS and not own_code.is_own(self.strategy.name)

    @property
    def references(self) -> tuple[str, ...]:
        """What the study names of code, its own or Consortium's."""
        app = (self.app.serverapp,) if self.app is not None else ()
        return (self.task, self.strategy.name, *app)

    @property
    def code(self) -> Mapping[str, str]:
        """SHA-256 (hex) of the study's own files by path; empty where it has none, or where they are not at hand."""
        return self._code

    @property
    def metric(self) -> str:
        """The metric that the run is judged by; a built-in task has a default, an own task may have none ("")."""
        if self.evaluation.metric or self.task not in TASKS:
            return self.evaluation.metric
        return allowed_metrics(self.task, self.data)[0]

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of every setting, defaults included, and of the study's own code; comments and order of keys
        in the study file do not matter."""
        about = {"format": FORMAT, **self.model_dump(mode="json", exclude=None if self.app else {"app"})}
        if not self.evaluation.groups:
            del about["evaluation"]["groups"]  # studies of before there were groups keep their digest
        if self.cohort.sampling_rate is None:
            del about["cohort"]["sampling_rate"]  # the same
        if not self.export.approvals:
            del about["export"]["approvals"]  # the same
        return hashlib.sha256(canonical(about | ({"code": self._code} if self._code else {}))).hexdigest()

    def with_(self, **sections: Mapping[str, Any]) -> Study:
        """A copy with other values, by section: `study.with_(strategy={"name": "fedprox", "mu": 0.1})`.

        [strategy] is replaced, other sections are updated; `study` holds name, task, rounds, seed.

        Raises:
            StudyError: if the result is not a valid study.
        """
        document = tomllib.loads(self._text)
        for section, values in sections.items():
            old = {} if section == "strategy" else document.get(section, {})
            document[section] = {k: v for k, v in {**old, **values}.items() if v is not None}
        return _study(document, self.name, tomli_w.dumps(document), self._folder)


def _study(
    document: Mapping[str, Any],
    source: str,
    text: str,
    folder: Path | None,
    code: Mapping[str, bytes] | None = None,
) -> Study:
    problems, sections = check(document)
    if problems:
        raise StudyError(source, problems)
    about = sections.pop("study").model_dump()
    study = Study.model_validate({**about, **sections})
    study._text, study._folder = text, folder
    if code is None and folder is not None:
        with contextlib.suppress(
            InputError
        ):  # whoever loads, checks or bundles it says what is wrong with it
            code = own_code.files(study.references, folder)
    study._code = {path: hashlib.sha256(content).hexdigest() for path, content in (code or {}).items()}
    return study

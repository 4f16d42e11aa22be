"""The sites of a simulation, from files: one file or folder each, or one table that is split.

A site's data are read here, once, in the process that all others are forked from; so what is wrong with them is
found before anything runs, at all sites at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from consortium.client import mapping, tables
from consortium.client.columns import Column
from consortium.client.site import Rows, rows
from consortium.client.task import Examples, Source, Task, task_of
from consortium.protocol.errors import InputError, nearest
from consortium.protocol.sections import IMAGES, REGRESSOR, TASKS
from consortium.protocol.study import Study
from consortium.simulations import own_code, partition
from consortium.simulations.partition import Partition

T = TypeVar("T")
U = TypeVar("U")
DEFAULT_SITES = 4
MOST_CLASSES = 20
_TABLES = (*tables.CSV, *tables.PARQUET)


@dataclass(frozen=True)
class Sites:
    """The sites of a simulation, their data read.

    sources: in name order; each `table` is the site's `Examples`.
    partition: how one table was split; None where each site has data of its own. seed: of the split.
    counts: by site: rows to train on, and held out.
    classes: by site, rows of each class by its code; empty where there are no classes, or more than 20.
    """

    sources: Sequence[Source]
    partition: Partition | None
    seed: int
    counts: Mapping[str, tuple[int, int]]
    classes: Mapping[str, Mapping[int, int]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [source.site for source in self.sources]

    @property
    def origin(self) -> str:
        """Where the sites come from, in words."""
        if self.partition is None:
            return "each site has data of its own"
        if self.partition.kind == "column":
            return f"one table, split by its column '{self.partition.column}'"
        return f"one table, split artificially: {self.partition} over {len(self.sources)} sites, seed {self.seed}"


def gather(
    study: Study,
    data: Sequence[Path],
    number: int | None = None,
    spec: str | None = None,
    *,
    seed: int = 0,
    without: Collection[str] = (),
) -> Sites:
    """Sites over files or folders.

    data: several are one site each, named by the file (without its ending) or the folder. One is a table to split.
        A folder holds one data file and perhaps `mapping.toml` and `holdout.key`. None at all suits a study whose own
        task makes its data.
    number: sites to split one table into (4), or to ask the study's own task for.
    spec: how to split it, as `partition.parse` reads it ("iid").
    seed: of the split.
    without: sites that are left out once the data are read and split, so that the others keep their rows.

    A row of a split table is held out or not whatever the split, so that all splits are judged by the same rows.

    Raises:
        InputError: files, columns, rows or the partition are wrong, the study's own code fails, or fewer sites than
            the study's quorum have rows to train on.
    """
    task = task_of(study)
    split = partition.parse(spec) if spec is not None else None
    if len(data) > 1 and (number is not None or split is not None):
        raise InputError(
            f"--data: {len(data)} files are as many sites already; leave out --sites and --partition, "
            "or give one table to split"
        )
    if number is not None and number < 1:
        raise InputError(f"--sites: {number} given; 1 or more would be right")
    if not data and study.task in TASKS:
        raise InputError(
            f"study '{study.name}' needs data: --data a.csv b.csv ... (a site each), "
            "or --data all.csv --sites 4 --partition dirichlet:0.5"
        )
    if len(data) == 1 or (not data and split is not None):
        split = split or Partition("iid")
        whole = source_of(study, data[0]) if data else Source("all")
        sources = _split(task, whole, split, number, seed)
    else:
        found = _each(data, lambda path: source_of(study, path))
        found = found or [Source(name) for name in partition.names(number or DEFAULT_SITES)]
        sources = _read(task, sorted(found, key=lambda source: source.site))
    names = [source.site for source in sources]
    for site in without:
        if site not in names:
            raise InputError(
                f"--without: there is no site '{site}'{nearest(site, names) or ';'} {_known(names)}"
            )
    sources = [source for source in sources if source.site not in without]
    if len(sources) < study.cohort.min_sites:
        raise InputError(
            f"study '{study.name}' asks for at least {study.cohort.min_sites} sites, and there are {len(sources)}; "
            "give more data or --sites, or lower [cohort] min_sites"
        )
    return _counted(study, task, Sites(sources, split, seed, {}))


def _known(names: Sequence[str]) -> str:
    return f"sites here: {', '.join(names[:10])}" + (" ..." if len(names) > 10 else "")


def source_of(study: Study, path: Path) -> Source:
    """The source that a file or folder is, named by it.

    Raises:
        InputError: it is not there, or the folder holds no data file, or several.
    """
    if not path.exists():
        right = "correct the path"
        if "," in str(path):
            right = f"files are separated by blanks: --data {str(path).replace(',', ' ')}"
        raise InputError(f"--data: there is no file or folder {path}; {right}")
    name = path.resolve().name
    if path.is_file():
        ending = next(
            (end for end in sorted(_TABLES, key=len, reverse=True) if name.lower().endswith(end)), None
        )
        return Source(name[: -len(ending)] if ending else path.stem, path=path)
    own = mapping.load(path / "mapping.toml") if (path / "mapping.toml").is_file() else {}
    query = "sql" in own.get("source", {})
    source = Source(name, path=None if query else _data_file(study, path), mapping=own)
    key = path / "holdout.key"
    try:
        return replace(source, key=key.read_bytes())
    except FileNotFoundError:
        return source
    except OSError as error:
        raise InputError(
            f"{key}: cannot be read ({error.strerror}); correct it or its permissions"
        ) from error


def _data_file(study: Study, folder: Path) -> Path:
    """The folder's one data file; for images and a study's own task without one, the folder itself."""
    endings = (".npz",) if study.task == IMAGES else _TABLES if study.task in TASKS else (*_TABLES, ".npz")
    files = sorted(
        file for file in folder.iterdir() if file.is_file() and file.name.lower().endswith(endings)
    )
    if len(files) == 1:
        return files[0]
    if not files and (study.task == IMAGES or study.task not in TASKS):
        return folder
    found = (
        f"holds {len(files)} data files ({', '.join(file.name for file in files[:3])})"
        if files
        else "holds none"
    )
    raise InputError(f"--data: the folder {folder} {found}; put exactly one of {', '.join(endings)} there")


def _read(task: Task, sources: Sequence[Source]) -> list[Source]:
    """The sources with their examples read; mistakes of all sites are reported at once."""
    names = [source.site for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            f"--data: several are called {', '.join(twice)}; a site is named by its file: rename one"
        )
    return _each(sources, lambda source: replace(source, table=_examples(task, source)))


def _each(items: Iterable[T], action: Callable[[T], U]) -> list[U]:
    """What `action` gives for each; mistakes of all are reported at once, with their notes, as a simulation has one
    operator."""
    problems, done = [], []
    for item in items:
        try:
            done.append(action(item))
        except InputError as error:
            problems += [str(error), *getattr(error, "__notes__", ())]
    if problems:
        raise InputError("\n".join(problems))
    return done


def _examples(task: Task, source: Source) -> Examples:
    """The site's examples, from code that may be the study's own, and so may give anything."""
    where = f"site '{source.site}'" + (f", {source.path}" if source.path else "")
    with own_code.named(f"{where}: ", InputError):
        found: object = task.data(source)
    wrong = _wrong(found)
    if wrong:
        raise InputError(f"{where}: {task.study.task}: 'data' gave {wrong}; correct the code")
    assert isinstance(found, Examples)
    return found


def _wrong(found: object) -> str:
    """Why these are no examples, or nothing."""
    if not isinstance(found, Examples):
        return f"{type(found).__name__}, and not consortium.client.Examples"
    for name in ("inputs", "targets"):
        if not isinstance(getattr(found, name), torch.Tensor):
            return f"Examples whose {name} are {type(getattr(found, name)).__name__}, and no tensor"
    n = len(found.inputs)
    for name in ("targets", "ids", "test"):
        given = getattr(found, name)
        if given is not None and len(given) != n:
            return f"{n} inputs and {len(given)} {name}, where each input has one"
    return ""


def _split(task: Task, whole: Source, split: Partition, number: int | None, seed: int) -> list[Source]:
    examples = _each([whole], lambda source: _examples(task, source))[0]
    n = len(examples.inputs)
    ids = np.arange(n) if examples.ids is None else examples.ids
    if split.kind == "column":
        parts = partition.by_value(_column(task, whole, split.column))
        if number not in (None, len(parts)):
            raise InputError(
                f"--sites: {number} given, but '{split.column}' has {len(parts)} values, a site each; leave it out"
            )
    else:
        number = number or max(DEFAULT_SITES, task.study.cohort.min_sites)
        labels = _labels(task.study, split, examples)
        parts = dict(zip(partition.names(number), partition.split(split, labels, number, seed), strict=True))
    return [
        replace(whole, site=name, path=None, mapping={}, table=_some(examples, ids, own))
        for name, own in sorted(parts.items())
    ]


def _some(examples: Examples, ids: NDArray[np.generic], own: partition.Rows) -> Examples:
    index = torch.from_numpy(own)
    test = None if examples.test is None else examples.test[own]
    return Examples(examples.inputs[index], examples.targets[index], ids[own], test)


def _labels(study: Study, split: Partition, examples: Examples) -> NDArray[np.generic]:
    n = len(examples.inputs)
    if split.kind in ("iid", "quantity"):
        return np.zeros(n)
    labels = examples.targets.reshape(n, -1).numpy()
    if labels.shape[1] != 1 or (split.kind == "dirichlet" and study.task == REGRESSOR):
        raise InputError(
            f"partition: {split} splits by class, and this study's targets are no classes; "
            "quantity:0.5, iid or column:NAME would be right"
        )
    one: NDArray[np.generic] = labels[:, 0]
    return one


def _column(task: Task, whole: Source, name: str) -> NDArray[np.generic]:
    """A column's values as text, in the study's terms where the mapping has them."""
    if task.study.task in TASKS and task.study.task != IMAGES:
        values: NDArray[np.generic] = tables.read(whole, [Column(name, text=True, needed=True)])[
            name
        ].to_numpy()
        return values
    raise InputError(
        "partition: column splits a table; for this study iid, dirichlet:0.5 or shards:2 would be right"
    )


def _counted(study: Study, task: Task, sites: Sites) -> Sites:
    """The sites with their counts, refused where nothing can be learnt from them."""
    cut: dict[str, Rows] = {}
    for source in sites.sources:
        with own_code.named(f"site '{source.site}': ", InputError):
            cut[source.site] = rows(task, source)
    counts = {name: (len(one.inputs), len(one.test_inputs)) for name, one in cut.items()}
    idle = [name for name, (n, _) in counts.items() if not n]
    if len(counts) - len(idle) < study.cohort.min_sites:
        some = ", ".join(f"'{name}'" for name in idle[:5]) + (" ..." if len(idle) > 5 else "")
        raise InputError(
            f"study '{study.name}' asks for at least {study.cohort.min_sites} sites, and {len(counts) - len(idle)} of "
            f"{len(counts)} sites have training rows (none: {some}); hold out fewer rows, give more data, or lower "
            "[cohort] min_sites"
        )
    with own_code.named("", InputError):
        task.check({name: one.targets for name, one in cut.items()})
    number = getattr(study.data, "classes", 0)
    classes: dict[str, dict[int, int]] = {}
    if isinstance(number, int) and 2 <= number <= MOST_CLASSES:
        for name, one in cut.items():
            codes = torch.cat([one.targets, one.test_targets]).reshape(-1).long()
            classes[name] = dict(enumerate(torch.bincount(codes, minlength=number).tolist()))
    return replace(sites, counts=counts, classes=classes)

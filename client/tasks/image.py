"""Image classification with a small convolutional network, over an `.npz` file or a folder of PNG and JPEG files.

A model's input is (n, channels, height, width) in [0, 1]. Nothing is resized or reshaped: an image that is not of the
study's shape is refused, and so is a file whose images and labels are not equal in number.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from consortium.client.mapping import count
from consortium.client.skipping import NO_IMAGE, Fault, Skipped, skippable
from consortium.client.task import Examples, Source, Task
from consortium.client.tasks import classification
from consortium.protocol.errors import InputError
from consortium.protocol.messages import Statistics
from consortium.protocol.sections import ImageData, ImageModel

IMAGES = (".png", ".jpg", ".jpeg")
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_TORCH = {"float32": torch.float32, "float64": torch.float64}


class Classifier(Task):
    """Convolutions of 3 by 3, each with ReLU and a pooling of 2 by 2, one hidden layer, and the classes."""

    @property
    def images(self) -> ImageData:
        """[data] of the study."""
        return cast(ImageData, self.study.data)

    def model(self) -> nn.Module:
        """Channels and hidden width as in [model]; pooling stops where a side would be less than 1."""
        settings = cast(ImageModel, self.study.model)
        height, width, channels = self.images.shape
        layers: list[nn.Module] = []
        for wider in settings.channels:
            layers += [nn.Conv2d(channels, wider, 3, padding=1), nn.ReLU()]
            channels = wider
            if min(height, width) >= 2:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        layers += [nn.Flatten(), nn.Linear(channels * height * width, settings.hidden), nn.ReLU()]
        return nn.Sequential(
            *layers, nn.Linear(settings.hidden, classification.outputs_for(self.images.classes))
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy."""
        return classification.loss(outputs, targets)

    def metrics(self, outputs: Tensor, targets: Tensor) -> Statistics:
        """See `classification.counts`."""
        return classification.counts(outputs, targets, self.study.evaluation.auroc == "exact")

    def served_metrics(self, served: tuple[Tensor, ...], targets: Tensor) -> Statistics:
        """As `metrics`, from probabilities (n, classes)."""
        return self.metrics(classification.scores(served[0]), targets)

    def check(self, targets: Mapping[str, Tensor]) -> None:
        """Refuse a federation of one class."""
        classification.refuse_one_class(f"study '{self.study.name}'", targets)

    def data(self, source: Source) -> Examples:
        """Images and labels.

        From an `.npz`, or a dict in memory: x (n, height, width, channels), uint8 or numbers in [0, 1]; y (n,) whole
        numbers from 0 to classes - 1; and where the study has a split, an array of that name, "train" or "test".
        From a folder: one sub-folder a class, its name the code, or as many sub-folders as classes, coded in the
        sorted order of their names; a row's identity is its path in the folder.

        Raises:
            InputError: the file or folder, what is wrong with it, and how many images it concerns.
        """
        where = f"site '{source.site}'"
        if source.table is not None:
            return self._examples(f"{where}, data in memory", source.table)
        if source.path is None:
            raise InputError(
                f"{where}: has no data; give an .npz file, or a folder with one sub-folder a class"
            )
        where = f"{where}, {source.path}"
        if source.path.is_dir():
            return self._folder(where, source.path)
        return self._examples(where, _arrays(where, source.path))

    def signature(self) -> dict[str, Any]:
        """One tensor (n, channels, height, width) in [0, 1], and probabilities."""
        height, width, channels = self.images.shape
        image = {"name": "image", "kind": "tensor", "shape": [channels, height, width]}
        return {"inputs": [image], "outputs": classification.served(self.images.classes)}

    def output(self) -> nn.Module:
        """Probabilities (n, classes)."""
        return classification.Probabilities(self.images.classes)

    def _folder(self, where: str, folder: Path) -> Examples:
        if self.images.split is not None:
            raise InputError(f"{where}: a folder cannot say which images are for testing; give an .npz file")
        codes = _class_folders(where, folder, self.images.classes)
        files = [(path, code) for name, code in codes for path in _files(where, folder / name)]
        if not files:
            raise InputError(f"{where}: holds no images; put {', '.join(IMAGES)} files into its sub-folders")
        paths = [path for path, _ in files]
        x, bad = _decode(where, folder, paths, self.images.shape, self.images.tolerance)
        y = np.array([code for _, code in files])
        ids = np.array([path.relative_to(folder).as_posix() for path, _ in files])
        skipped = Skipped(len(files), {NO_IMAGE: int(bad.sum())} if bad.any() else {})
        return replace(self._examples(where, {"x": x[~bad], "y": y[~bad]}, ids[~bad]), skipped=skipped)

    def _examples(self, where: str, arrays: Mapping[str, Any], ids: NDArray[Any] | None = None) -> Examples:
        split = self.images.split
        absent = [name for name in ("x", "y", *([split] if split else [])) if name not in arrays]
        if absent:
            raise InputError(
                f"{where}: has no array {' nor '.join(absent)}; it has {', '.join(arrays) or 'none'}"
            )
        x, y = np.asarray(arrays["x"]), np.asarray(arrays["y"])
        problems = _wrong_images(x, self.images.shape) + _wrong_labels(
            y, len(x) if x.ndim else 0, self.images.classes
        )
        test = None
        if split is not None:
            test = np.asarray(arrays[split]) == "test"
            if test.shape != (len(x),) or not (test | (np.asarray(arrays[split]) == "train")).all():
                problems.append(f'{split}: must hold "train" or "test" for each image, and nothing else')
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise InputError(
                f"{where}: {count(len(problems), 'mistake')}\n{lines}\nCorrect the data and try again"
            )
        tensor = torch.from_numpy(x).to(_TORCH[self.study.model.dtype])
        if x.dtype == np.uint8:
            tensor /= 255
        inputs = tensor.permute(0, 3, 1, 2).contiguous()
        return Examples(inputs, classification.targets_for(y, self.images.classes, inputs.dtype), ids, test)


def _arrays(where: str, path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"{where}: there is no such file or folder; give an .npz file or a folder of images")
    if path.suffix.lower() != ".npz":
        raise InputError(f"{where}: this kind of file is not known; give an .npz file or a folder of images")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        right = "write it again with numpy.savez(path, x=..., y=...), without arrays of objects"
        raise InputError(f"{where}: is damaged, empty or no .npz file; {right}") from error


def _wrong_images(x: NDArray[Any], shape: list[int]) -> list[str]:
    wanted = f"(n, {', '.join(map(str, shape))})"
    if x.ndim != 4 or list(x.shape[1:]) != shape:
        return [f"x: has shape {x.shape}; {wanted} would be right, as the study's data.shape says"]
    if not len(x):
        return ["x: holds no images"]
    if x.dtype == np.uint8:
        return []
    if not np.issubdtype(x.dtype, np.floating):
        return [f"x: is {x.dtype}; uint8, or floats in [0, 1], would be right"]
    wrong = int((~((x >= 0) & (x <= 1)).reshape(len(x), -1).all(axis=1)).sum())
    if wrong:
        return [
            f"x: {wrong} of {count(len(x), 'image')} hold numbers outside [0, 1]; scale them, or give uint8"
        ]
    return []


def _wrong_labels(y: NDArray[Any], images: int, classes: int) -> list[str]:
    if y.shape != (images,):
        return [f"y: has shape {y.shape}; ({images},) would be right, one label for each of the images"]
    if not np.issubdtype(y.dtype, np.integer):
        return [f"y: is {y.dtype}; whole numbers from 0 to {classes - 1} would be right"]
    wrong = int(((y < 0) | (y >= classes)).sum())
    if wrong:
        return [
            f"y: {wrong} of {count(images, 'label')} are not between 0 and {classes - 1}, the study's classes"
        ]
    return []


def _class_folders(where: str, folder: Path, classes: int) -> list[tuple[str, int]]:
    """Sub-folders and their class codes: the name itself where all names are codes, else by sorted order."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if names and all(name.isdecimal() and int(name) < classes for name in names):
        return [(name, int(name)) for name in names]
    if len(names) != classes:
        right = f"one a class, also for a class without images, or name them 0 to {classes - 1}"
        raise InputError(
            f"{where}: has {count(len(names), 'sub-folder')}, the study {classes} classes; make {right}"
        )
    return [(name, code) for code, name in enumerate(names)]


def _files(where: str, folder: Path) -> list[Path]:
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    strange = [path for path in found if not path.is_file() or path.suffix.lower() not in IMAGES]
    if strange:
        raise _about_files(
            f"{where}: {len(strange)} of {len(found)} entries of '{folder.name}' are no {', '.join(IMAGES)} files; "
            "convert them or take them out",
            strange,
        )
    return found


def _decode(
    where: str, folder: Path, files: list[Path], shape: list[int], tolerance: float
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Images (n, height, width, channels) in the order of `files`, and which of them (n,) are none, at most the share
    `tolerance`.

    Raises:
        InputError: how many cannot be decoded, have another size, or more than 8 bits a channel.
    """
    from PIL import Image, UnidentifiedImageError

    height, width, channels = shape
    if channels not in _MODES:
        raise InputError(
            f"{where}: image files have 1, 3 or 4 channels, the study {channels}; give an .npz file"
        )
    x = np.empty((len(files), *shape), np.uint8)
    wrong: dict[str, list[Path]] = {}
    bad = np.zeros(len(files), np.bool_)
    for i, path in enumerate(files):
        try:
            with Image.open(path) as image:
                if image.size != (width, height):
                    wrong.setdefault(f"are not {height} high and {width} wide", []).append(path)
                elif image.mode.startswith(("I", "F")):
                    wrong.setdefault("have more than 8 bits a channel", []).append(path)
                else:
                    x[i] = np.asarray(image.convert(_MODES[channels])).reshape(shape)
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
            wrong.setdefault("cannot be decoded", []).append(path)
    for paths in wrong.values():
        bad |= np.isin([str(path) for path in files], [str(path) for path in paths])
    if skippable([Fault("", bad)], len(files), tolerance) is None:
        what = "; ".join(f"{len(paths)} {why}" for why, paths in wrong.items())
        which = [path.relative_to(folder) for paths in wrong.values() for path in paths]
        raise _about_files(
            f"{where}: of {count(len(files), 'image')}, {what}; correct them or take them out", which
        )
    return x, bad


def _about_files(message: str, files: list[Path]) -> InputError:
    """An error whose note names the first files: names may identify people, and a note does not leave the site."""
    error = InputError(message)
    some = ", ".join(str(path) for path in files[:5]) + (" ..." if len(files) > 5 else "")
    error.add_note(f"Files: {some}")
    return error

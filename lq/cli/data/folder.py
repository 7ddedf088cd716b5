"""Images in folders, one folder a class."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from typing_extensions import override

from lq.cli.data.base import HELD_OUT, WORKERS, ImageData, transforms
from lq.cli.usage import one_line, require, suggestion
from lq.errors import DataError
from lq.files import read_text

# Names of folders and of splits, by what they are for.
_PARTS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test",)}


class ImageFolderData(ImageData):
    """Images in folders, one folder a class: ``photos/cat/1.jpg``, or ``photos/train/cat/1.jpg``, ``photos/val/...``.

    Without folders ``train`` and ``val`` every fifth image of each class is held out for validation.

    Args:
        folder: the folder.
        classes: names of the class folders in the order of the model's outputs, or the path of a text file with one a
            line; by default in alphabetical order. A model of 1000 classes can so be measured on some of them only if
            all 1000 are listed; folders may be missing.
        batch_size: images in a batch.
        workers: processes that load images.
        image_size: height and width of images; None: the model's.
        augment: vary training images; None: if the Trainer trains.
        data_config: timm's description of images; None: the model's.
    """

    def __init__(
        self,
        folder: str | Path,
        classes: Sequence[str] | str | Path | None = None,
        batch_size: int = 64,
        workers: int = WORKERS,
        image_size: int | None = None,
        augment: bool | None = None,
        data_config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(batch_size, workers, image_size, augment, data_config)
        self.folder = Path(folder)
        self._names = classes

    @override
    def _read(self, config: dict[str, Any], augment: bool) -> None:
        root = self.folder
        if not root.is_dir():
            beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
            raise DataError(f"there is no folder {root}{suggestion(root.name, beside)}")
        names = {part: next((root / n for n in known if (root / n).is_dir()), None) for part, known in _PARTS.items()}
        folders = {part: path for part, path in names.items() if path is not None}
        if "train" not in folders:
            folders = {"train": root} if not folders.keys() & {"val", "test"} else folders
        order = self._order() or sorted({p.name for path in folders.values() for p in path.iterdir() if p.is_dir()})
        if not order:
            raise DataError(f"{root} has no folders of images: expected {root}/CLASS/IMAGE or {root}/train/CLASS/IMAGE")
        self.classes = order
        plain, varied = transforms(config, False), transforms(config, augment)
        self.parts = {
            part: _folder(path, order, varied if part == "train" else plain) for part, path in folders.items()
        }
        if "val" not in folders and "train" in folders:
            everything = _folder(folders["train"], order, plain)
            held, kept = _split([label for _, label in everything.samples])
            if not held:
                raise DataError(f"{root} has too few images to hold some out; make {root}/train and {root}/val")
            self.parts["train"], self.parts["val"] = Subset(self.parts["train"], kept), Subset(everything, held)

    @override
    def _described(self) -> str:
        return str(self.folder)

    @override
    def _advice(self, count: int, expected: int) -> str:
        return f", or list its {expected} classes in order (--data.classes FILE)" if self._names is None else ""

    def _order(self) -> list[str]:
        if self._names is None:
            return []
        if not isinstance(self._names, (str, Path)):
            return list(self._names)
        return [line.strip() for line in read_text(self._names).splitlines() if line.strip()]


def _folder(path: Path, order: Sequence[str], transform: Any) -> Any:
    """The images of a folder, labelled by the place of their class in a list."""
    require("torchvision", "timm")
    from torchvision.datasets import ImageFolder

    present = {entry.name for entry in path.iterdir() if entry.is_dir()}
    unknown = sorted(present - set(order))
    if unknown:
        near = suggestion(unknown[0], order)
        raise DataError(f"{path} has a folder {unknown[0]!r}, which is none of the {len(order)} classes{near}")
    index = {name: place for place, name in enumerate(order)}

    class Listed(ImageFolder):  # type: ignore[misc]
        def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
            return list(order), index

    try:
        found = Listed(str(path), transform=transform, allow_empty=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"{path}: {one_line(error)}") from error
    if not found.samples:
        raise DataError(f"{path} has no images: expected {path}/CLASS/IMAGE, with names ending in .jpg, .png, ...")
    return found


def _split(labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Every fifth image of each class, and the others."""
    seen: dict[int, int] = {}
    held: list[int] = []
    kept: list[int] = []
    for place, label in enumerate(labels):
        seen[label] = seen.get(label, -1) + 1
        (held if seen[label] % HELD_OUT == HELD_OUT - 1 else kept).append(place)
    return held, kept

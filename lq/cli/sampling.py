"""Data for commands that look at a model: the arguments that say which, and batches of it."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from lq.cli.usage import UsageError, plain, require, suggestion

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
require("jsonargparse", "cli")

import lightning.pytorch as pl  # noqa: E402
import torch  # noqa: E402
from jsonargparse import ArgumentParser  # noqa: E402
from torch import nn  # noqa: E402
from typing_extensions import override  # noqa: E402

from lq.cli import data as data_modules  # noqa: E402
from lq.cli.timm_module import data_config_of  # noqa: E402
from lq.errors import DataError  # noqa: E402

_DATA = sorted(name for name in vars(data_modules) if name.endswith("Data") and name != "ImageData")


class TypedParser(ArgumentParser):
    """A parser of typed arguments whose errors are one line."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise what is wrong.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{plain(message)}; see {self.prog} --help") from ex


def add_data(parser: TypedParser, purpose: str, samples: int) -> None:
    """Add the arguments that say which data, how many of them and where.

    Args:
        parser: gets them.
        purpose: what the images are for, such as "to measure on".
        samples: how many are taken by default.
    """
    parser.add_subclass_arguments(pl.LightningDataModule, "data", required=True, help=f"one of {', '.join(_DATA)}")
    parser.add_argument("--samples", type=int, default=samples, help=f"training images {purpose}")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of images")
    parser.add_argument("--device", type=str, default="cpu", help="such as cuda")


def parsed(parser: TypedParser, arguments: Sequence[str]) -> Any:
    """The options, with the data module built.

    Raises:
        UsageError: for arguments that there are not.
    """
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        option, equals, value = argument.partition("=")
        chosen = value if equals else after
        if option == "--data" and "." not in chosen and chosen not in _DATA:
            raise UsageError(f"--data {chosen}: there is no such data module{suggestion(chosen, _DATA)}")
    options = parser.instantiate_classes(parser.parse_args(list(arguments)))
    if options.samples < 1:
        raise UsageError(f"--samples {options.samples}: expected 1 or more")
    return options


def batches(options: Any, model: nn.Module) -> Iterator[Any]:
    """Training batches with as many images as were asked for, on the device.

    Raises:
        DataError: if there are none, or the model has other classes.
    """
    data: Any = options.data
    if isinstance(data, data_modules.ImageData):
        data.data_config = {**data_config_of(model), **(data.data_config or {})}
    data.prepare_data()
    data.setup("fit")
    if isinstance(data, data_modules.ImageData):
        data.require_classes(getattr(model, "num_classes", None), "--model-args num_classes={count}")
    left = options.samples
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        for batch in data.train_dataloader():
            moved = pl.utilities.move_data_to_device(batch, torch.device(options.device))
            parts = moved if isinstance(moved, (tuple, list)) else (moved,)
            yield tuple(part[:left] for part in parts)
            left -= len(parts[0])
            if left <= 0:
                return
    if left == options.samples:
        raise DataError("--data: there are no training images")

"""Running the command in this process, and what its runs are told to keep them short."""

import lightning.pytorch as pl
import pytest

from lq.cli import main
from tests.helpers import QUIET, loader

#: Warnings of Lightning and jsonargparse that are not about lq.
SILENT = [
    pytest.mark.filterwarnings(text)
    for text in (
        *QUIET,
        "ignore:.*tensorboardX.*",
        "ignore:.*log_every_n_steps.*",
        "ignore:.*num_workers.*",
        "ignore:constrained_layout not applied",
    )
]

#: A small network of timm on small digits, on the CPU, three batches an epoch.
SHORT = (
    *("--seed_everything", "7", "--model.name", "test_resnet", "--model.num_classes", "10", "--data", "DigitsData"),
    *("--data.image_size", "16", "--data.batch_size", "16", "--trainer.accelerator", "cpu"),
    *("--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2", "--trainer.limit_test_batches", "2"),
    *("--trainer.limit_predict_batches", "2", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false"),
)


def call(*arguments):
    return main([str(argument) for argument in arguments])


def succeeds(capsys, *arguments):
    """What it prints."""
    capsys.readouterr()
    code = call(*arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def complains(capsys, *arguments, code=2):
    """The one line that it prints on stderr, of lines that are not Lightning's own words."""
    capsys.readouterr()
    assert call(*arguments) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lq")]
    assert len(lines) == 1
    return lines[0]


class TinyData(pl.LightningDataModule):
    """The data of `tests.helpers`."""

    def train_dataloader(self):
        return loader(shuffle=True)

    def val_dataloader(self):
        return loader(16)


#: The tiny module and its data.
TINY = (
    *("--seed_everything", "7", "--model", "tests.helpers.Tiny", "--data", "tests.cli.running.TinyData"),
    *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
    *("--trainer.enable_model_summary", "false", "--trainer.logger", "false"),
)


def without_model(arguments):
    """Arguments without the model: what a checkpoint says has to do."""
    pairs = list(zip(arguments[::2], arguments[1::2], strict=True))
    return [word for pair in pairs if not pair[0].startswith("--model") for word in pair]

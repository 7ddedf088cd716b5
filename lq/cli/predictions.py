"""Write what a classifier predicts: for each image its class and how probable that is."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq.errors import DataError
from lq.files import whole_file


def write_predictions(path: Path, predictions: Any, data: Any) -> None:
    """Write a CSV file with the columns image, class, name and probability, in the order of the images.

    Args:
        path: the file.
        predictions: what ``predict`` returned: batches of probabilities ``(N, classes)``.
        data: the data module; its ``classes``, if it has any, are the names.

    Raises:
        DataError: if the module predicts something else.
        WriteError: if it cannot be written.
    """
    batches = list(predictions or [])
    if not batches or not all(isinstance(batch, Tensor) and batch.ndim == 2 for batch in batches):
        raise DataError(
            "--predictions needs a predict_step that returns probabilities (N, classes), such as TimmClassifier's"
        )
    probabilities, classes = torch.cat(batches).float().max(1)
    names: Sequence[str] | int = getattr(data, "classes", 0)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("image", "class", "name", "probability"))
    for index, (found, probability) in enumerate(zip(classes.tolist(), probabilities.tolist(), strict=True)):
        name = names[found] if not isinstance(names, int) and found < len(names) else found
        writer.writerow((index, found, name, f"{probability:.6f}"))
    with whole_file(path) as unfinished:
        unfinished.write_text(text.getvalue(), encoding="utf-8", newline="")

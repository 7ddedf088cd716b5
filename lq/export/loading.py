"""`load`: a quantized model from any file that lq writes, by the file's kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lq.attachment.checkpoint import load_state, read_state_dict
from lq.errors import DataError
from lq.export.packed import load as load_packed
from lq.quantizer.final_widths import warn_if_unfinished

M = TypeVar("M", bound=nn.Module)


def load(source: str | Path | Mapping[str, Any], model: M, *, part: str | None = None) -> M:
    """Load a quantized checkpoint into a float or quantized model; quantizers are built from the checkpoint.

    Args:
        source: a state dict, a checkpoint with one under "state_dict" (Lightning's), or the path of a file of either
            kind, or of a packed one (`lq.save`, ".safetensors").
        model: the model it was saved from, as the float code builds it. BatchNorms that were folded are folded here
            too. It may be a part of what was saved, such as the network that a LightningModule holds.
        part: name of that part in the checkpoint, such as "net" where keys are "net.conv1..."; "" for all of it. By
            default the only one that fits. Packed files are of one model as a whole.

    Returns:
        The model, quantized, in place.

    Raises:
        DataError: if there is no quantizer in the checkpoint, or one for a layer the model does not have; if a file is
            damaged, of a newer lq, or of another model; if several parts of a checkpoint fit. The model is not touched
            then.

    >>> import lq, torch
    >>> saved = lq.attach(nn.Sequential(nn.Linear(4, 4)), weights=2)
    >>> loaded = load(saved.state_dict(), nn.Sequential(nn.Linear(4, 4)))
    >>> torch.equal(loaded[0].weight, saved[0].weight)
    True
    """
    if isinstance(source, (str, Path)) and Path(source).suffix == ".safetensors":
        if part:
            raise DataError(f"part={part!r}: {source} is a packed file, which holds one model as a whole; leave it out")
        load_packed(source, model)
    else:
        load_state(read_state_dict(source), source, model, part)
    warn_if_unfinished(model, f"{type(model).__name__}, loaded from a checkpoint,")
    return model

"""What a model gives: its output as one tensor, a loss of it, and how far two outputs are from each other."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lq.errors import DataError
from lq.structure.forward import describe, named_parts


def require_output(output: Any) -> Tensor:
    """The output as a tensor; of several, the one called "logits", or else the first that is no single number.

    Raises:
        DataError: if there is none.
    """
    if isinstance(output, Tensor):
        return output
    parts: Mapping[Any, Any] = named_parts(output) or {}
    if not parts and isinstance(output, (tuple, list)):
        parts = dict(enumerate(output))
    for part in (parts.get("logits"), getattr(output, "logits", None), *parts.values()):
        if isinstance(part, Tensor) and part.ndim:  # a number is a loss
            return part
    raise DataError(
        f"the forward returned {describe(output)}; it must return the model's output (logits), as a tensor or first in "
        "a tuple or mapping"
    )


def require_loss(loss: Any) -> Tensor:
    """The loss as a scalar tensor.

    Raises:
        DataError: if it is none.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(())
    raise DataError(f"loss= returned {describe(loss)}; it must return the mean loss of the batch, one value")


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean over samples of ``KL(teacher || student)``, times temperature squared.

    Args:
        student: logits, shape (N, ..., C).
        teacher: logits, same shape.
        temperature: divides both logits.

    >>> import torch
    >>> bool(kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0)
    True
    """
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1), target, log_target=True, reduction="none"
    )
    return divergence.sum(-1).mean() * temperature**2


def symmetric_kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``KL(teacher || student) + KL(student || teacher)``; arguments as in `kl_divergence`."""
    return kl_divergence(student, teacher, temperature) + kl_divergence(teacher, student, temperature)


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared difference, relative to the mean square of the teacher's.

    >>> import torch
    >>> feature_distance(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]))
    tensor(0.4000)
    """
    teacher = teacher.float()
    return F.mse_loss(student.float(), teacher) / teacher.square().mean().clamp(min=1e-12)

r"""Distillation from the float copy: ``T^2 * KL(softmax(t / T) || softmax(s / T))``, the mean over samples.

The loss enters training as a gradient added to the student's output during the user's own backward. The training step
is not touched, no graph is kept and nothing is run backward twice.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq.attach import detach
from lq.errors import StateError
from lq.sites import is_attached


def float_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` without quantizers, in eval mode, without gradients."""
    teacher = copy.deepcopy(model)
    if is_attached(teacher):
        detach(teacher)
    return teacher.eval().requires_grad_(False)


def kl_divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The mean over samples of ``KL(teacher || student)``, times temperature squared.

    Args:
        student: logits, shape (N, ..., C).
        teacher: logits, same shape.
        temperature: divides both logits.

    >>> bool(kl_divergence(torch.zeros(2, 3), torch.zeros(2, 3)) == 0)
    True
    """
    target = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = F.kl_div(
        F.log_softmax(student.float() / temperature, dim=-1), target, log_target=True, reduction="none"
    )
    return divergence.sum(-1).mean() * temperature**2


class Distiller:
    """Adds the distillation gradient to the output of a module.

    Args:
        module: the student, a module whose output is a tensor of logits.
        teacher: its float copy.
        weight: factor on the loss.
        temperature: divides the logits.
        gradient_scale: factor on gradients at the time of the forward: loss scale over accumulated batches.
    """

    def __init__(
        self,
        module: nn.Module,
        teacher: nn.Module,
        *,
        weight: float,
        temperature: float,
        gradient_scale: Callable[[], float] = lambda: 1.0,
    ) -> None:
        self.teacher = teacher
        self.weight = weight
        self.temperature = temperature
        self.gradient_scale = gradient_scale
        self.loss: Tensor | None = None
        self._handle = module.register_forward_hook(self._hook, with_kwargs=True)

    def remove(self) -> None:
        """Leave the student alone again."""
        self._handle.remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if not isinstance(output, Tensor):
            raise StateError(
                f"distillation needs a tensor of logits, {type(module).__name__} gives a {type(output).__name__}; "
                "name the module that gives logits with distill_from="
            )
        if not output.requires_grad:
            return
        with torch.no_grad():
            target = self.teacher(*args, **kwargs)
        with torch.enable_grad():
            logits = output.detach().float().requires_grad_()
            loss = kl_divergence(logits, target, self.temperature)
            (gradient,) = torch.autograd.grad(loss * self.weight, logits)
        self.loss = loss.detach()
        gradient = (gradient * self.gradient_scale()).to(output.dtype)
        output.register_hook(lambda grad: grad + gradient)

r"""Distillation from the float copy, of outputs or of features.

- ``kl``: ``T^2 * KL(softmax(t / T) || softmax(s / T))``, the mean over samples (Hinton et al., Distilling the Knowledge
  in a Neural Network, 2015);
- ``symmetric_kl``: that, plus the same with teacher and student exchanged (GDNSQ's loss);
- ``features``: ``sum mean((s - t)^2) / mean(t^2)`` over the outputs of several modules.

The loss enters training as a gradient added to the student's tensors during the user's own backward. The training step
is not touched, no graph is kept and nothing is run backward twice.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lq.errors import PatternError, SpecError, StateError
from lq.structure.outputs import feature_distance, kl_divergence, symmetric_kl_divergence

Loss = Literal["kl", "symmetric_kl", "features"]


def stages(network: nn.Module) -> list[str]:
    """The modules whose features are compared if none are named: the parts of a network that hold layers of theirs.

    >>> stages(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU())))
    ['1']
    """
    parts = [name for name, part in network.named_children() if any(True for _ in part.children())]
    deep = [name for name in parts if any(p.ndim > 1 for p in network.get_submodule(name).parameters())]
    return deep or [name for name, _ in network.named_children()]


class Distiller:
    """Adds the distillation gradient to the output of a module, or to those of modules in it.

    Args:
        module: the student; its output is a tensor of logits, unless features are compared.
        teacher: its float copy.
        weight: factor on the loss.
        task: factor on the gradient that the user's own loss sends to those outputs; 0: distillation alone.
        loss: "kl", "symmetric_kl" or "features".
        temperature: divides the logits.
        features: names of the modules below the student whose outputs are compared; by default its `stages`.
        gradient_scale: factor on gradients at the time of the forward: loss scale over accumulated batches.

    Raises:
        SpecError: for an unknown loss.
        PatternError: for a module the student does not have.
    """

    def __init__(
        self,
        module: nn.Module,
        teacher: nn.Module,
        *,
        weight: float,
        task: float = 1.0,
        loss: Loss = "kl",
        temperature: float = 1.0,
        features: Sequence[str] | None = None,
        gradient_scale: Callable[[], float | Tensor] = lambda: 1.0,
    ) -> None:
        if loss not in get_args(Loss):
            raise SpecError(f"distill_loss={loss!r} is unknown; use one of {get_args(Loss)}")
        self.teacher = teacher
        self.weight = weight
        self.task = task
        self.kind = loss
        self.temperature = temperature
        self.gradient_scale = gradient_scale
        self.loss: Tensor | None = None
        self._targets: dict[str, Tensor] = {}
        names = (stages(module) if features is None else list(features)) if loss == "features" else [""]
        known = dict(module.named_modules())
        missing = [name for name in names if name not in known]
        if missing or not names:
            raise PatternError(
                f"features {missing} are no modules of {type(module).__name__}; "
                f"it has {', '.join(name for name, _ in module.named_children())}"
            )
        self._handles = [module.register_forward_pre_hook(self._ask_teacher, with_kwargs=True, prepend=True)]
        for name in names:
            self._handles.append(teacher.get_submodule(name).register_forward_hook(self._keep(name)))
            self._handles.append(known[name].register_forward_hook(self._compare(name)))

    def remove(self) -> None:
        """Leave the student alone again."""
        for handle in self._handles:
            handle.remove()

    def _ask_teacher(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the teacher on what the student is given, and keep its outputs."""
        self._targets.clear()
        if module.training and torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            self.loss = None
            with torch.no_grad():
                self.teacher(*args, **kwargs)

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # what comes after a feature may change it in place
            self._targets[name] = output.clone() if name and isinstance(output, Tensor) else output

        return hook

    def _compare(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            target = self._targets.get(name)
            if target is None:
                return
            if not isinstance(output, Tensor):
                raise StateError(
                    f"distillation needs a tensor of {'features' if self.kind == 'features' else 'logits'}, "
                    f"{type(module).__name__} gives a {type(output).__name__}; "
                    "name the module that gives logits with distill_from="
                )
            if output.requires_grad:  # else it may be computed again, with gradients, in backward
                del self._targets[name]
                self._add_gradient(output, target)

        return hook

    def _add_gradient(self, output: Tensor, target: Tensor) -> None:
        # Of its own tensors, not of those that activation checkpointing counts.
        own = torch.autograd.graph.saved_tensors_hooks(_same, _same)
        with torch.enable_grad(), torch.autocast(output.device.type, enabled=False), own:
            student = output.detach().float().requires_grad_()
            if self.kind == "features":
                loss = feature_distance(student, target)
            else:
                divergence = kl_divergence if self.kind == "kl" else symmetric_kl_divergence
                loss = divergence(student, target, self.temperature)
            (gradient,) = torch.autograd.grad(loss * self.weight, student)
        self.loss = loss.detach() if self.loss is None else self.loss + loss.detach()
        gradient = (gradient * self.gradient_scale()).to(output.dtype)
        task = self.task
        output.register_hook(lambda grad: (grad if task == 1 else grad * task) + gradient)


def _same(tensor: Tensor) -> Tensor:
    return tensor

"""One forward and one backward per batch: the term of every width of every channel of every weight and activation.

A `TorchFunctionMode` sees each call of a layer's function, whichever code makes it: layers that are called twice,
weights that are shared and ``F.linear(x, layer.weight)`` in a user's forward all count, with their signs, towards the
weight they use. A hook on the result receives its gradient and contracts it at once (`lq.sensitivity.contraction`);
parameters need no gradient, so that the backward carries nothing else.

Batches are split into single samples where one backward for all would be wrong: where a weight is used by code other
than a layer's function (its terms then come from its gradient), and where the samples of a batch do not lie apart along
the first dimension, nor in turns (time-major sequences). All this is found out on the first two samples, not assumed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lq.attachment.float_models import float_model
from lq.errors import LqError, StateError
from lq.sensitivity.contraction import operands_of, terms
from lq.sensitivity.tensors import MeasuredTensor
from lq.structure.batch_layout import FIRST, Layout
from lq.structure.calls import FUNCTIONS, MULTI_HEAD, Call, multi_head_attention
from lq.structure.recomputation import recomputed

#: The scalar whose gradient is taken: a sum over the samples of a batch, of a model run on it.
Objective = Callable[[nn.Module, Any], Tensor]


class OnePass:
    """Measures tensors batch by batch.

    Args:
        model: a model with quantizers.
        tensors: what to measure.
        objective: sum over samples of what is differentiated; called with the model and a batch.
        layout: where the samples of batches lie.
    """

    def __init__(
        self, model: nn.Module, tensors: Sequence[MeasuredTensor], objective: Objective, layout: Layout = FIRST
    ) -> None:
        self.layout = layout
        self.model = model
        self.tensors = tensors
        self.objective = objective
        self.single: str = ""  # why samples go one at a time; empty: they do not
        self._by_gradient: list[MeasuredTensor] = []  # tensors that code other than a layer's function uses
        self._checked = False

    def measure(self, batch: Any) -> list[Tensor]:
        """The terms of each tensor for each sample of the batch, (samples, C, W)."""
        samples = self.layout.size(batch)
        if not self._checked:
            self._check(batch, samples)
            self._checked = True
        parts = [batch]
        if self.single and samples > 1:
            parts = [self.layout.take(batch, i, i + 1) for i in range(samples)]
        size = samples if len(parts) == 1 else 1
        found = [self._run(part, size, self._by_gradient) for part in parts]
        return found[0] if len(parts) == 1 else [torch.cat(found_of_item) for found_of_item in zip(*found, strict=True)]

    def _check(self, batch: Any, samples: int) -> None:
        """Find out whether a batch can be measured as a whole."""
        state = torch.random.get_rng_state()
        take = self.layout.take
        first = take(batch, 0, 1) if samples > 1 else batch
        weights = [tensor for tensor in self.tensors if tensor.is_weight]
        alone = self._run(first, 1, weights, probe=True)
        if self._by_gradient:
            names = ", ".join(tensor.name for tensor in self._by_gradient[:3])
            self.single = f"weights are used by other code than a layer's function ({names})"
        elif samples > 1:
            second = self._run(take(batch, 1, 2), 1)
            apart = [torch.cat(pair) for pair in zip(alone, second, strict=True)]
            torch.random.set_rng_state(state)
            differing = self._differing(apart, self._together(take(batch, 0, 2)))
            if differing:
                for tensor in differing:
                    tensor.samples_last = True
                torch.random.set_rng_state(state)
                differing = self._differing(apart, self._together(take(batch, 0, 2)))
                if differing:
                    self.single = f"samples are not apart along a dimension at {differing[0].name}"
        torch.random.set_rng_state(state)

    def _together(self, batch: Any) -> list[Tensor] | None:
        """The terms for two samples; None: a layer was given other rows than a number for each sample."""
        try:
            return self._run(batch, 2)
        except LqError:
            raise
        except RuntimeError:  # shapes that do not go together; an error of the model would have come for one sample
            return None

    def _differing(self, apart: list[Tensor], together: list[Tensor] | None) -> list[MeasuredTensor]:
        """Items whose terms depend on whether samples come in a batch."""
        if together is None:
            return list(self.tensors)
        return [
            tensor
            for tensor, one, both in zip(self.tensors, apart, together, strict=True)
            if (one - both).abs().max() > 0.1 * one.abs().max()  # rounding is far below, another sample far above
        ]

    def _run(
        self, batch: Any, samples: int, by_gradient: Sequence[MeasuredTensor] = (), probe: bool = False
    ) -> list[Tensor]:
        """The terms of each tensor, (samples, C, W)."""
        for tensor in self.tensors:
            tensor.terms = None
        with float_model(self.model), torch.enable_grad():
            watch = _Watch(self.tensors, samples, {id(tensor) for tensor in by_gradient})
            with watch, torch.compiler.set_stance("force_eager"):
                value = self.objective(self.model, batch)
            watch.forward_ended = True
            if not value.requires_grad:
                raise StateError("the output does not depend on a quantized layer; nothing can be measured")
            leaves = [(tensor, alias) for tensor, alias in watch.aliases if alias.requires_grad]
            anchors = list(watch.anchors.values())
            inputs = [*anchors, *(alias for _, alias in leaves)]
            found = torch.autograd.grad(value, inputs, allow_unused=True)[len(anchors) :] if inputs else ()
        direct = [(*leaf, gradient) for leaf, gradient in zip(leaves, found, strict=True) if gradient is not None]
        if probe:
            self._by_gradient = list({id(tensor): tensor for tensor, _, _ in direct}.values())
        for tensor, alias, gradient in direct:
            layout = tensor.layout
            rows = [layout.rows(change * gradient).sum(1) for change in tensor.changes(alias)]
            tensor.add(torch.stack(rows, -1).unsqueeze(0))
        return [
            tensor.terms
            if tensor.terms is not None
            else torch.zeros(samples, tensor.channels, len(tensor.widths), device=value.device)
            for tensor in self.tensors
        ]


class _Watch(TorchFunctionMode):
    """Taps every quantizer, and every layer's function that is called with a tapped weight.

    Args:
        tensors: what to tap.
        samples: number of samples in the batch.
        by_gradient: ids of tensors whose weight gets a gradient where no layer's function uses it.
    """

    def __init__(self, tensors: Sequence[MeasuredTensor], samples: int, by_gradient: set[int]) -> None:
        super().__init__()
        self.samples = samples
        self.by_gradient = by_gradient
        self.aliases: list[tuple[MeasuredTensor, Tensor]] = []  # what stands for each weight
        self._owners: dict[int, MeasuredTensor] = {}  # by id of that
        self.anchors: dict[torch.device, Tensor] = {}  # made where they are used: nothing is copied between devices
        self.forward_ended = False
        for tensor in tensors:
            tensor.quantizer.tap = self._weight(tensor) if tensor.is_weight else self._activation(tensor)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == MULTI_HEAD:
            with self:
                return multi_head_attention(*args, **kwargs)
        if name not in FUNCTIONS or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        call = Call.of(name, args, kwargs)
        operands = operands_of(call)
        if operands is None:
            return func(*args, **kwargs)
        source, weight, slot = operands
        tensor = self._owners.get(id(weight))
        if tensor is None or weight.ndim < 2 or (call.kind == "matmul" and weight.ndim != 2):
            return func(*args, **kwargs)
        plain = weight.detach()
        call.replace(slot, plain)
        result = self._anchored(func(*call.args, **call.kwargs))
        version = _version(source)

        def contract(delta: Tensor) -> None:
            _check_unchanged(source, version, tensor)
            with torch.no_grad():
                found = terms(call, plain, delta, tensor.changes(plain), self.samples, tensor.samples_last)
                tensor.add(found)

        result.register_hook(contract)
        return result

    def _weight(self, tensor: MeasuredTensor) -> Callable[[Tensor], Tensor]:
        def tap(weight: Tensor) -> Tensor:
            self._check_forward(tensor)
            tensor.seen, tensor.numel = True, weight.numel()
            alias = weight.detach().requires_grad_(id(tensor) in self.by_gradient)
            self.aliases.append((tensor, alias))
            self._owners[id(alias)] = tensor
            return alias

        return tap

    def _activation(self, tensor: MeasuredTensor) -> Callable[[Tensor], Tensor]:
        copies = tensor.name.endswith(
            "output"
        )  # what a sum or an activation gives may be changed in place by its reader

        def tap(x: Tensor) -> Tensor:
            self._check_forward(tensor)
            if not torch.is_grad_enabled() or not x.is_floating_point():
                return x
            tensor.seen, tensor.numel = True, x.numel() // self.samples
            y = self._anchored(x.clone() if copies else x.view_as(x))
            version = _version(x)

            def contract(delta: Tensor) -> None:
                _check_unchanged(x, version, tensor)
                with torch.no_grad():
                    tensor.add(tensor.activation_terms(x, delta, self.samples))

            y.register_hook(contract)
            return y

        return tap

    def _check_forward(self, tensor: MeasuredTensor) -> None:
        if self.forward_ended:
            raise recomputed(tensor.name)

    def _anchored(self, x: Tensor) -> Tensor:
        """`x`, made to depend on something that has a gradient."""
        if x.requires_grad:
            return x
        if x.device not in self.anchors:
            self.anchors[x.device] = torch.zeros((), device=x.device, requires_grad=True)
        return x + self.anchors[x.device].to(x.dtype)


def _version(x: Tensor) -> int:
    """Changes when `x` is changed in place."""
    return 0 if x.is_inference() else x._version


def _check_unchanged(x: Tensor, version: int, tensor: MeasuredTensor) -> None:
    if _version(x) != version:
        raise StateError(
            f"the tensor at {tensor.name} is changed in place after it was used; write the model's forward without that"
        )

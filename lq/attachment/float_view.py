"""Show a quantized model as the float one it was, for code that looks for weights by attribute, class or name.

A quantized layer computes its ``weight``; the Parameter behind it is ``parametrizations.weight.original``. What looks
for ``isinstance(layer.weight, nn.Parameter)``, for names that end in "weight", or for ``type(layer) is nn.Conv2d``
finds nothing there. Within `as_float` the layers have their own class and their float weight, the same Parameter object
as always, under its own name and in its own place among the others; and what is learned of quantizers is no Parameter.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lq.attachment.sites import weight_quantizer
from lq.quantizer.quantizer import Quantizer


@contextmanager
def as_float(model: nn.Module) -> Iterator[None]:
    """Within it, quantized layers show their float weight as ``weight``; copies that are made of them are quantized.

    It is for code that reads names and collects parameters, such as one that builds an optimizer. What runs the model
    within it runs it without the quantizers of weights.

    >>> import lq
    >>> model = lq.attach(nn.Sequential(nn.Linear(4, 4)), 4)
    >>> isinstance(model[0].weight, nn.Parameter)
    False
    >>> with as_float(model):
    ...     [name for name, _ in model.named_parameters()]
    ['0.weight', '0.bias']
    """
    with ExitStack() as layers:
        for module in list(model.modules()):
            if isinstance(module, Quantizer):
                layers.enter_context(_shown(module, _hide_learned))
            elif _made_by_us(module):
                layers.enter_context(_shown(module, _show_weight))
        yield


def _made_by_us(module: nn.Module) -> bool:
    """Whether the weight is quantized, and nothing else is done to it."""
    return float_parameter(module) is not None and len(module.parametrizations["weight"]) == 1  # type: ignore[index]


def float_parameter(module: nn.Module) -> nn.Parameter | None:
    """The Parameter behind a quantized weight, also where a mask of `torch.nn.utils.prune` is on it; else None."""
    if weight_quantizer(module) is None:
        return None
    held: dict[str, nn.Parameter | None] = module.parametrizations["weight"]._parameters  # type: ignore[index, union-attr]
    return held.get("original", held.get("original_orig"))


@contextmanager
def _shown(module: nn.Module, show: Callable[[nn.Module], None]) -> Iterator[None]:
    """Have one module look as `show` makes it."""
    quantized = _look(module)
    show(module)
    shown = _look(module)

    def deepcopy(memo: dict[int, Any]) -> Any:
        """Copy the module as it is, with its quantizer."""
        del module.__dict__["__deepcopy__"]
        _restore(module, quantized)
        try:
            return copy.deepcopy(module, memo)
        finally:
            _restore(module, shown)
            module.__dict__["__deepcopy__"] = deepcopy

    module.__dict__["__deepcopy__"] = deepcopy
    try:
        yield
    finally:
        module.__dict__.pop("__deepcopy__", None)
        _restore(module, quantized)


def _look(module: nn.Module) -> tuple[Any, ...]:
    return module.__class__, module._parameters, module._buffers, module._modules


def _restore(module: nn.Module, look: tuple[Any, ...]) -> None:
    module.__class__, module._parameters, module._buffers, module._modules = look


def _hide_learned(module: nn.Module) -> None:
    """Have a quantizer show no Parameter: what it learns is stepped by an optimizer of its own."""
    module._buffers = {**module._buffers, **module._parameters}
    module._parameters = {}


def _show_weight(module: nn.Module) -> None:
    """Give a layer its own class, and its weight in its place among the parameters."""
    parametrized: Any = module._modules["parametrizations"]
    weight = float_parameter(module)
    others = nn.ModuleDict({name: part for name, part in parametrized.items() if name != "weight"})
    cls = module.__class__
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__", "weight")}
    module.__class__ = type(cls.__name__, cls.__bases__, body) if others else cls.__bases__[0]
    order = getattr(parametrized, "parameter_order", [*module._parameters, "weight"])
    held = {**module._parameters, "weight": weight}
    module._parameters = {name: held[name] for name in [*order, *(n for n in held if n not in order)]}
    module._modules = {name: part for name, part in module._modules.items() if name != "parametrizations"}
    if others:
        module._modules["parametrizations"] = others

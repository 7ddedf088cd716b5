"""Runs of a model in which some units return what is known of them, and which end where another one begins."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lq.reconstruction.units import Unit


class Reached(Exception):  # noqa: N818 - not an error: it ends a forward that has come far enough
    """The unit whose input was asked for is about to run."""


@contextmanager
def replaced(modules: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Have modules return what a function returns instead of running; what is put around them stays."""
    before = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module, function in modules.items():
            module.forward = function
        yield
    finally:
        for module, own in before.items():
            del module.forward
            if own is not None:
                module.forward = own


@contextmanager
def stop_at(module: nn.Module, taken: list[Any]) -> Iterator[None]:
    """Put the arguments of `module` into `taken` and end the forward there."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        taken.append((args, kwargs))
        raise Reached

    handle = module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    except Reached:
        pass
    finally:
        handle.remove()


def returning(
    model: nn.Module, units: Sequence[Unit], outputs: Mapping[int, Tensor]
) -> dict[nn.Module, Callable[..., Tensor]]:
    """For `replaced`: units that return these outputs without computing."""

    def give(output: Tensor) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: output

    functions = {}
    for k, output in outputs.items():
        *inner, last = units[k].bind(model)
        functions.update(dict.fromkeys(inner, _first_argument))
        functions[last] = give(output)
    return functions


def _first_argument(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else next(iter(kwargs.values()))

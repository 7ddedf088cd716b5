"""Ways through the forward of one module, its children taken as they are: which calls read what.

torch.fx runs the forward on proxies, with every child a leaf. Nothing of the module is changed by it. A forward with
control flow on tensors is followed up to there.
"""

import warnings
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy

#: End of the reason why the reader of a result is not its only one, if code keeps the result without reading it.
KEPT = " is kept"


@dataclass
class ForwardPath:
    """One way through a forward: the calls it makes, until it ends or cannot be followed.

    Args:
        graph: the calls, in order.
        complete: whether it was followed to its end.
        kept: calls whose result somebody holds after the end.
        argument: name of the argument that has another value than its default on this way, if there is one.
        attribute: name of the attribute that has another value than it has now.
    """

    graph: fx.Graph
    complete: bool
    kept: set[fx.Node]
    argument: str = ""
    attribute: str = ""

    def against(self, first: str, second: str) -> str:
        """What speaks against `second` being the only reader of `first`; names are below the module."""
        calls = [node for node in self.graph.nodes if node.op == "call_module"]
        firsts = [node for node in calls if _covers(node, first) and not _covers(node, second)]
        seconds = [node for node in calls if _covers(node, second) and not _covers(node, first)]
        read = {str(node.target).rpartition(".")[0] for node in self.graph.nodes if node.op == "get_attr"}
        if {first, second} & read:
            return f"a parameter of {first if first in read else second} is also read"
        if len(firsts) > 1 or len(seconds) > 1:
            return f"{first if len(firsts) > 1 else second} is called more than once"
        if any(user not in seconds for node in firsts for user in node.users):
            return f"what {first} gives is read by others"
        if self.complete and len(firsts) != len(seconds):
            return f"{first if firsts else second} is called without the other"
        if self.complete and firsts and seconds[0].args != (firsts[0],):
            return f"{second} reads something else"
        return f"what {first} gives{KEPT}" if self.complete and any(node in self.kept for node in firsts) else ""


class _ChildrenAreLeaves(fx.Tracer):
    """Follows one forward; remembers who holds the results of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[weakref.ref[fx.Proxy], fx.Node]] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        made = super().proxy(node)
        if node.op == "call_module":
            self.results.append((weakref.ref(made), node))
        return made


def follow(
    module: nn.Module, concrete: dict[str, Any], attributes: Mapping[str, Any] | None = None
) -> tuple[ForwardPath, str]:
    """One way through the forward of a module, and why it could not be followed to its end.

    Args:
        module: the module.
        concrete: values of arguments.
        attributes: values that the module's attributes have on this way.
    """
    tracer, error = _ChildrenAreLeaves(), ""
    with _as_it_was(module):
        module.__dict__.update(attributes or {})
        try:
            tracer.trace(module, concrete_args=concrete)
        except Exception as raised:  # noqa: BLE001 - whatever a forward raises on proxies, it cannot be traced
            error = str(raised).partition("\n")[0] or type(raised).__name__
        kept = {node for result, node in tracer.results if result() is not None}
    graph = getattr(tracer, "graph", None) or fx.Graph()
    return ForwardPath(graph, not error, kept), error


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Undo what a forward does to the attributes of its module, to its buffers and to random states."""
    attributes = dict(module.__dict__)
    containers = [v for v in attributes.values() if isinstance(v, (list, dict, set, deque))]
    contents = [list(v.items()) if isinstance(v, dict) else list(v) for v in containers]
    buffers = [(b, b.clone()) for b in module._buffers.values() if b is not None and not (is_lazy(b) or b.is_meta)]
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for key in module.__dict__.keys() - attributes.keys():
            del module.__dict__[key]
        module.__dict__.update(attributes)
        for container, content in zip(containers, contents, strict=True):
            now = list(container.items()) if isinstance(container, dict) else list(container)
            if len(now) != len(content) or any(a is not b for a, b in zip(_flat(now), _flat(content), strict=True)):
                _refill(container, content)
        for buffer, value in buffers:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _flat(content: list[Any]) -> list[Any]:
    """Keys and values of a dictionary's items, or the items themselves."""
    return [part for item in content for part in (item if isinstance(item, tuple) else (item,))]


def _refill(container: Any, content: list[Any]) -> None:
    container.clear()
    if isinstance(container, dict):
        for key, value in content:
            container[key] = value
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)


def _covers(node: fx.Node, name: str) -> bool:
    """Whether the call runs the module of that name."""
    target = str(node.target)
    return name == target or name.startswith(f"{target}.")

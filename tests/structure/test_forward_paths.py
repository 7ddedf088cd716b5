"""Following a forward changes nothing of its module."""

import torch
from torch import nn

from lq.structure.forward_paths import follow


class Writes(nn.Module):
    """A forward that writes wherever a forward can."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.register_buffer("steps", torch.zeros(()))
        self.items, self.names, self.count = [1], {"a": 1}, 0

    def forward(self, x):
        self.steps += 1
        self.count += 1
        self.new = self.layer(x)
        self.items.append(x)
        self.names["b"] = x
        torch.rand(3)
        return self.norm(self.new)


def test_nothing_is_left_behind():
    module = Writes()
    before, random = set(vars(module)), torch.get_rng_state()
    path, error = follow(module, {})
    assert (path.complete, error) == (True, "")
    assert [str(node.target) for node in path.graph.nodes if node.op == "call_module"] == ["layer", "norm"]
    assert set(vars(module)) == before
    assert (module.items, module.names, module.count, float(module.steps)) == ([1], {"a": 1}, 0, 0.0)
    assert torch.equal(torch.get_rng_state(), random)


def test_results_that_are_kept():
    path, _ = follow(Writes(), {})
    assert [str(node.target) for node in path.kept] == ["layer"]
    assert path.against("layer", "norm") == "what layer gives is kept"


def test_a_path_ends_at_control_flow():
    class Stops(Writes):
        def forward(self, x):
            y = self.layer(x)
            return self.norm(y) if y.sum() > 0 else y

    path, error = follow(Stops(), {})
    assert not path.complete
    assert "control flow" in error
    assert path.against("layer", "norm") == "what layer gives is read by others"  # by the sum

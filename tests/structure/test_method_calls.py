"""What methods call is read from their source, and nothing is run."""

from torch import nn

from lq.structure.method_calls import outside_calls, read_by_forward, replaces_parameters


class Net(nn.Module):
    """Methods in many forms."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.inner = nn.Module()

    def forward(self, x):
        return self.b(self.helper(x)) * self.a.weight.sum()

    def helper(self, x):
        return self.a(x)

    def both(self, x):
        return self.b(self.a(x)) + self.net(x) + self.net[:2](x)


class Whole(Net):
    def start(self, x):
        raise RuntimeError(self.net[:1](x))


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = Net()

    def training_step(self, batch):
        return self.part.helper(batch)


class Other(Net):
    def loss(self, x):
        return nn.utils.stateless.functional_call(self.net, {}, x)


def test_calls():
    assert outside_calls(Net(), "a", "b", forward=False) == ""  # helper is a part of forward
    assert outside_calls(Net(), "net.0", "net.1", forward=False) == ""
    assert outside_calls(Whole(), "net.0", "net.1", forward=False) == "start"
    assert outside_calls(Whole(), "net.1", "net.2", forward=False) == "both"  # by its slice
    assert outside_calls(Net(), "a", "b", forward=True) == "forward"
    assert outside_calls(Inner(), "part.a", "part.b", forward=False) == "training_step by helper"


def test_reads_and_replacements():
    assert read_by_forward(Net(), "a")
    assert not read_by_forward(Net(), "b")
    assert replaces_parameters(Other()) == "loss"
    assert replaces_parameters(Net()) == ""


def test_a_class_without_source():
    space = {"nn": nn}
    exec("class Made(nn.Module):\n    def run(self, x):\n        return self.a(x)", space)
    assert outside_calls(space["Made"](), "a", "b", forward=True) == ""

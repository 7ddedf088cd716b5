"""Hashes and descriptions: equal for equal things, in every process, and different for different ones."""

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lq.reconstruction.identity import Digest, describe_object, digest, digest_of_module, named_state

SCRIPT = """
from tests.reconstruction.test_identity import things
from lq.reconstruction.identity import describe_object
print("\\n".join(map(describe_object, things())))
"""


@dataclass
class Settings:
    power: float = 2.0
    name: str = "mine"


class Plain:
    """No description, nothing to call."""


def loss(output, target, kinds=frozenset({"one", "two", "three"})):
    return output if "one" in {"one", "two", "three"} else target


def things():
    return [
        loss,
        lambda x: x + 1,
        partial(loss, None, target=3),
        Settings(),
        Plain(),
        nn.Linear(2, 2).to("meta").__class__,
        {"a": [1, 2.5, {3}], "b": (torch.ones(2), np.arange(3))},
        Plain,
        torch.float16,
        Path("there"),
        print,
        Settings().__eq__,
    ]


def digest_of(*tensors):
    return digest((str(i), tensor) for i, tensor in enumerate(tensors))


def test_digests_of_tensors():
    a, b = torch.arange(6.0).view(2, 3), torch.tensor([True, False])
    assert digest_of(a, b) == digest_of(a.clone(), b)
    assert digest_of(a) == digest_of(a.t().contiguous().t())
    others = ([a], [a, b], [b, a], [a + 1e-6], [a.bfloat16()], [], [a.view(3, 2)], [a.view(6)], [a[:0]], [a[:, :0]])
    assert len({digest_of(*tensors) for tensors in others}) == len(others)
    assert digest_of(torch.tensor(1.0)) != digest_of(torch.tensor(2.0))
    assert digest([("a", a)]) != digest([("b", a)])
    assert digest([("a", a), ("b", b)]) == digest([("b", b), ("a", a)])


def test_a_digest_grows_with_what_is_added():
    one, other = Digest(), Digest()
    for part in ("ab", "c", torch.ones(2)):
        one.add(part)
    for part in ("a", "bc", torch.ones(2)):
        other.add(part)
    assert one.value != other.value


def test_descriptions_are_the_same_in_another_process():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "77"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert done.stdout.strip().splitlines() == [describe_object(thing) for thing in things()]


def test_descriptions_tell_different_things_apart():
    def closing(value):
        return lambda x: x + value

    pairs = [
        (closing(1), closing(2)),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x: x + 1, lambda x: x * 1),
        (lambda x, y=1: x, lambda x, y=2: x),
        (partial(loss, 1), partial(loss, 2)),
        (Settings(2.0), Settings(2.1)),
        (torch.ones(2), torch.zeros(2)),
        (nn.Linear(2, 2), nn.Linear(2, 2)),
        ([1, 2], (1, 2)),
        ("1", 1),
    ]
    for one, other in pairs:
        assert describe_object(one) != describe_object(other)
        assert describe_object(one) == describe_object(one)
    assert describe_object(closing(1)) == describe_object(closing(1))


def test_things_that_hold_themselves_have_an_end():
    thing = []
    thing.append(thing)
    assert describe_object(thing) == "list(<builtins.list>)"


def test_the_state_of_a_model_has_every_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    assert list(named_state(model)) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "2.weight",
        "2.bias",
        "2.running_mean",
        "2.running_var",
        "2.num_batches_tracked",
    ]


POWER = 2.0


def helper(output):
    return output**POWER


class Custom:
    POWER = 2.0

    def __call__(self, output):
        return self.inside(output)

    def inside(self, output):
        return output**self.POWER


class Weighted(nn.Module):
    def __init__(self, power):
        super().__init__()
        self.power = power


def test_what_functions_look_up_counts(monkeypatch):
    functions = (helper, lambda x: helper(x) + 1, lambda x: [helper(y) for y in x])
    before = [describe_object(function) for function in functions]
    assert before == [describe_object(function) for function in functions]
    monkeypatch.setitem(globals(), "POWER", 3.0)
    assert all(old != describe_object(function) for old, function in zip(before, functions, strict=True))


def test_methods_and_constants_of_classes_count(monkeypatch):
    before = describe_object(Custom())
    assert before == describe_object(Custom())
    with monkeypatch.context() as patch:
        patch.setattr(Custom, "POWER", 3.0)
        assert describe_object(Custom()) != before
    monkeypatch.setattr(Custom, "inside", lambda self, output: abs(output))
    assert describe_object(Custom()) != before


def test_modules_that_differ_in_what_is_no_tensor():
    assert describe_object(Weighted(2.0)) == describe_object(Weighted(2.0)) != describe_object(Weighted(3.0))
    networks = [nn.ReLU(), nn.Tanh(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.3), nn.Sequential(nn.ReLU())]
    found = [digest_of_module(nn.Sequential(network)) for network in networks]
    assert len(set(found)) == len(found)
    assert digest_of_module(nn.Sequential(nn.LeakyReLU(0.3)).train()) == digest_of_module(
        nn.Sequential(nn.LeakyReLU(0.3)).eval()
    )

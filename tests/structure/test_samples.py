"""Batches of every shape that users give: how many samples there are, and some of them."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from lq.structure.samples import batch_size, dimension_of, join, take

Z = torch.zeros
Pair = namedtuple("Pair", ["x", "y"])


@dataclass(frozen=True)
class Record:
    x: torch.Tensor
    weight: float = 1.0


BATCHES = {
    "tensor": (Z(8, 3), 8),
    "classes": ((Z(8, 3), Z(8)), 8),
    "time first": ((Z(20, 16, 8), Z(16)), 16),
    "as many channels": ((Z(3, 3, 4, 4), Z(3)), 3),
    "graph": ({"edge_index": Z(2, 30), "x": Z(9, 4), "y": Z(9)}, 9),
    "images of several sizes": (
        (tuple(Z(3, 5 + i, 7) for i in range(4)), tuple({"boxes": Z(1, 4)} for _ in "1234")),
        4,
    ),
    "images of one size": (([Z(3, 9, 9)] * 4, [{"boxes": Z(2, 4)}] * 4), 4),
    "several inputs": (([Z(8, 3), Z(8, 5)], Z(8)), 8),
    "several targets": ((Z(6, 2), (Z(6), Z(6, 2))), 6),
    "scalar first": ((torch.tensor(0.5), Z(8, 3)), 8),
    "mapping": (UserDict(a=Z(5, 3), b=Z(5)), 5),
    "named tuple": (Pair(Z(5, 3), Z(5)), 5),
    "record": ([Record(Z(7, 3))], 7),
    "packed": ((pack_sequence([Z(4, 2), Z(3, 2)]), Z(2)), 2),
    "names": ({"x": Z(3, 2), "mask": Z(2), "names": ["a", "b"]}, 3),
    "two loaders": ({"a": [Z(8, 3), Z(8)], "b": [Z(4, 3), Z(4)]}, 8),
    "number": (3.0, 1),
    "nothing": ([], 1),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_number_of_samples(kind):
    batch, expected = BATCHES[kind]
    assert batch_size(batch) == expected


def test_samples_of_nested_batches():
    batch = {"x": Z(5, 2), "pair": [Z(5), 3], "table": Z(4), "scalar": torch.tensor(1.0)}
    found = take(batch, 0, 2, 5)
    assert found["x"].shape == (2, 2) and found["pair"][0].shape == (2,) and found["pair"][1] == 3
    assert found["table"].shape == (4,) and found["scalar"].shape == ()


@pytest.mark.parametrize(
    "make",
    [lambda x: {"x": x}, lambda x: UserDict(x=x), lambda x: OrderedDict(x=x), lambda x: Pair(x, x), Record],
    ids=["dict", "mapping", "ordered", "named tuple", "record"],
)
def test_containers_stay_what_they_are(make):
    batch = make(torch.arange(6.0).view(3, 2))
    found = take(batch, 1, 3)
    assert type(found) is type(batch)
    x = found["x"] if hasattr(found, "keys") else found.x
    assert x.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    whole = batch["x"] if hasattr(batch, "keys") else batch.x
    assert whole.shape == (3, 2)


def test_samples_along_another_dimension():
    x, y = torch.arange(24).view(3, 4, 2), torch.arange(4)
    found = take((x, y), 1, 3, 4, 1)
    assert torch.equal(found[0], x[:, 1:3]) and torch.equal(found[1], y[1:3])
    square = torch.arange(9).view(3, 3)
    assert torch.equal(take(square, 0, 1, 3, 1), square[:, :1])
    assert dimension_of(Z(2, 3, 4), 4) is None  # positions and channels are no samples


def test_lists_of_samples():
    images, targets = [torch.full((3, 4, 4 + i), float(i)) for i in range(4)], [{"boxes": Z(i, 4)} for i in range(4)]
    found = take((images, targets), 1, 3)
    assert [float(image[0, 0, 0]) for image in found[0]] == [1.0, 2.0]
    assert [len(target["boxes"]) for target in found[1]] == [1, 2]
    three = ([Z(3, 4, 4)] * 3, None)
    assert [t.shape for t in take(three, 0, 1, 3)[0]] == [(1, 4, 4)] * 3
    assert [t.shape for t in take(three, 0, 1, 3, lists=True)[0]] == [(3, 4, 4)]


def test_packed_sequences():
    sequences = [torch.full((n, 2), float(n)) for n in (3, 5, 2)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    found = unpack_sequence(take((packed, Z(3)), 1, 3)[0])
    assert [len(s) for s in found] == [5, 2]
    both = unpack_sequence(join(packed, packed, 3, 3))
    assert [len(s) for s in both] == [3, 5, 2, 3, 5, 2]


def test_joined_batches():
    one, other = (Z(3, 1, 2), Z(1), ["a"], 7), (torch.ones(3, 2, 2), torch.ones(2), ["b", "c"], 8)
    x, y, names, number = join(one, other, 1, 2, 1)
    assert x.shape == (3, 3, 2) and y.tolist() == [0.0, 1.0, 1.0] and names == ["a", "b", "c"] and number == 7

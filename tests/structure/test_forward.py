"""The default forward: what a model is called with, for every kind of batch; and what failures say."""

from collections import UserDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from lq.errors import DataError
from lq.structure.forward import arguments, describe, run

X, Y = torch.ones(2, 3), torch.zeros(2)


class Recorder(nn.Module):
    """Returns what it was called with."""

    def forward(self, x):
        return {"x": x}


class Named(Recorder):
    def forward(self, input_ids, attention_mask=None, labels=None):
        return {k: v for k, v in locals().items() if k not in ("self", "__class__")}


class Optional(Recorder):
    def forward(self, input_ids=None, pixels=None):
        return {"input_ids": input_ids, "pixels": pixels}


class Whole(Recorder):
    def forward(self, batch):
        return {"batch": batch["image"]}


class Anything(Recorder):
    def forward(self, **inputs):
        return inputs


class Pair(Recorder):
    def forward(self, left, right, scale=1.0):
        return {"left": left, "right": right}


class KeywordOnly(Recorder):
    def forward(self, *, image, flip=False):
        return {"image": image}


Sample = namedtuple("Sample", ["image", "label"])


@dataclass
class Fields:
    image: torch.Tensor
    label: torch.Tensor


@pytest.mark.parametrize(
    ("model", "batch", "expected"),
    [
        (Recorder, X, {"x": X}),
        (Recorder, (X, Y), {"x": X}),
        (Recorder, [X, Y, Y], {"x": X}),
        (Recorder, {"x": X, "y": Y}, {"x": X}),
        (Recorder, ({"x": X}, Y), {"x": X}),
        (Recorder, ([X, Y], Y), {"x": [X, Y]}),
        (Recorder, Sample(X, Y), {"x": X}),
        (Named, {"input_ids": X, "labels": Y, "name": "a"}, {"input_ids": X, "attention_mask": None, "labels": Y}),
        (Named, UserDict(input_ids=X), {"input_ids": X, "attention_mask": None, "labels": None}),
        (Optional, {"pixels": X}, {"input_ids": None, "pixels": X}),
        (Whole, {"image": X, "label": Y}, {"batch": X}),
        (Anything, {"image": X, "label": Y}, {"image": X, "label": Y}),
        (Pair, {"right": Y, "left": X}, {"left": X, "right": Y}),
        (Pair, ((X, Y), 1), {"left": X, "right": Y}),
        (KeywordOnly, {"image": X}, {"image": X}),
        (KeywordOnly, Sample(X, Y), {"image": X}),
        (KeywordOnly, Fields(X, Y), {"image": X}),
    ],
)
def test_what_the_model_is_called_with(model, batch, expected):
    assert describe(run(model(), batch)) == describe(expected)
    found = run(model(), batch)
    assert all(found[key] is expected[key] or found[key] == expected[key] for key in expected)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (Optional, {"image": X}),  # no name is known, and nothing is asked for
        (Pair, {"left": X}),
        (Pair, {"a": X, "b": Y}),
        (Pair, ((X, Y, Y), 1)),
        (Recorder, "text"),
        (Recorder, []),
        (KeywordOnly, (X, Y)),
        (Pair, (X, Y)),  # the second may be a label
    ],
)
def test_what_cannot_be_told_is_asked_for(model, batch):
    with pytest.raises(DataError, match=r"did not take a batch of .*; pass forward=, a callable"):
        run(model(), batch)


def test_parts_are_moved_to_the_model():
    model = nn.Linear(3, 1, device="meta")
    (x,), _ = arguments(model, (X, Y))
    assert x.device.type == "meta"


def test_compiled_models_have_the_signature_of_what_was_compiled():
    assert run(torch.compile(Pair(), backend="eager"), {"left": X, "right": Y, "more": 1})["right"] is Y


def test_errors_of_the_users_code_are_shown():
    def wrong(model, batch):
        return batch["image"]

    with pytest.raises(
        DataError, match=r"forward= failed on Recorder and a batch of dict\(x: Tensor.*KeyError: 'image'"
    ):
        run(Recorder(), {"x": X}, wrong)

    class Broken(Recorder):
        def forward(self, x):
            raise ZeroDivisionError("my own")

    with pytest.raises(ZeroDivisionError, match="my own"):
        run(Broken(), X)
    with pytest.raises(DataError, match=r"Whole did not take a batch of dict\(z: int\): KeyError: 'image'"):
        run(Whole(), {"z": 1})


def test_describe():
    assert describe(Fields(X, 1)) == "Fields(image: Tensor(2, 3), label: int)"
    assert describe(Sample(X, 1)) == "Sample(image: Tensor(2, 3), label: int)"
    assert describe([1] * 11) == f"list({', '.join(['int'] * 8)}, and 3 more)"


def test_a_packed_sequence_is_the_argument():
    packed = pack_sequence([torch.randn(n, 3) for n in (4, 2, 1)])
    for batch in (packed, (packed, Y), {"x": packed, "label": Y}):
        args, kwargs = arguments(_Weighted(), batch)
        (found,) = (*args, *kwargs.values())
        assert isinstance(found, PackedSequence) and torch.equal(found.data, packed.data)


class _Weighted(Recorder):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

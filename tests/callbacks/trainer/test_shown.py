"""The repr of callbacks: what they were made with, and that Python reads it back."""

import inspect
from pathlib import Path

import numpy as np
import pytest

import lq.callbacks
from lq import QuantSpec
from lq.allocation.budget import Latency
from lq.callbacks import AllocateBits, ExportModel, FineTune, LearnNoiseScale, Quantize, Reconstruct, SynthesizeData
from lq.callbacks.trainer.shown import call_of
from lq.reconstruction.losses import LpLoss
from tests.callbacks.test_contract import CALLBACKS

NAMES = {**vars(lq.callbacks), "QuantSpec": QuantSpec, "Latency": Latency, "LpLoss": LpLoss}


@pytest.mark.parametrize("cls", CALLBACKS, ids=lambda cls: cls.__name__)
def test_defaults_are_not_said(cls):
    assert repr(cls()) == f"{cls.__name__}()"


@pytest.mark.parametrize(
    ("callback", "text"),
    [
        (Quantize(4, 4), "Quantize(weights=4, activations=4)"),
        (Quantize(exclude=["net.0"], overrides={"a": {"weights": 2}}), None),
        (Quantize(weights=QuantSpec(bits=3)), None),
        (FineTune("lsq", lr=0.01), None),
        (LearnNoiseScale(2, 2), None),
        (AllocateBits(["8x", 3.0], bits=(2, 4), pins={"fc": [4, 8]}), None),
        (Reconstruct(units=["a", ["b", "c"]], iterations=20, when="end"), None),
        (Reconstruct(loss=LpLoss(2.4)), None),
        (ExportModel(Path("a") / "m.onnx"), "ExportModel(path='a/m.onnx')"),
        (SynthesizeData((3, 8, 8), seed=3), "SynthesizeData(shape=(3, 8, 8), seed=3)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_python_reads_it_back(callback, text):
    assert text is None or repr(callback) == text
    again = eval(repr(callback), dict(NAMES))
    assert repr(again) == repr(callback)
    for name in inspect.signature(type(callback)).parameters:
        value, other = getattr(callback, name), getattr(again, name)
        assert value == other or str(value) == other, name


def test_an_option_that_was_set_later():
    callback = Quantize()
    callback.weights = 3
    assert repr(callback) == "Quantize(weights=3)"


def forward(module, batch):
    return module(batch)


def test_what_cannot_be_read_back_is_named():
    class Thing:
        def __init__(self, table=None, one=None, call=None, **more):
            self.table, self.one, self.call = table, one, call

    class Long:
        def __repr__(self):
            return "x" * 500

    assert call_of(Thing(np.zeros(1000), Long(), forward)) == "Thing(table=ndarray, one=Long, call=forward)"
    assert call_of(Thing(object())) == "Thing(table=object)"
    assert call_of(Thing(("one",))) == "Thing(table=('one',))"


def test_subclasses_with_arguments_of_their_own():
    class Mine(Quantize):
        def __init__(self, level: int = 3) -> None:
            super().__init__(level)

    assert repr(Mine()) == "Mine()"

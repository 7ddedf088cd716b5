"""The map of a model as a value: saved, shown, and refused where it does not fit."""

import json

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import quantizers
from lq.errors import DataError, PatternError, StateError
from lq.structure.structure import Structure
from tests.models import (
    every_model,
    example,
)


@every_model
def test_a_saved_structure_gives_the_same_sites(kind):
    model, x = example(kind)
    structure = lq.inspect(model, x)
    again = Structure.from_json(json.dumps(json.loads(structure.to_json())))
    assert again == structure
    assert [q.name for q in quantizers(lq.attach(model, 4, 4, structure=again))]


def test_the_table_says_what_and_why():
    text = str(lq.inspect(*example("odd weights")))
    assert "einsum_0" in text and "stays in float, added, not multiplied: 1 (position)" in text
    assert "100.00 % with every operand quantizable" in text


def test_errors():
    model, x = example("block")
    structure = lq.inspect(model, x)
    with pytest.raises(StateError, match="skip=True needs to know how the tensors flow"):
        lq.attach(model, 8, 8, skip=True)
    with pytest.raises(PatternError, match="exclude pattern 'atn' matches none"):
        lq.attach(model, 8, 8, structure=structure, exclude="atn")
    with pytest.raises(StateError, match="the structure has a module 'attn.q' that Linear does not have"):
        lq.attach(nn.Linear(2, 2), 8, 8, structure=structure)
    with pytest.raises(DataError, match="not a saved structure"):
        Structure.from_dict({"sites": []})
    with pytest.raises(DataError, match=r"not a saved structure: .*; write structure.to_json\(\) to the file"):
        Structure.from_json("{")
    with pytest.raises(DataError, match="did not take a batch of Tensor"):
        lq.inspect(model, torch.randn(2, 3))
    lq.attach(model, 8, structure=structure)
    with pytest.raises(StateError, match=r"lq.inspect looks at models without quantizers"):
        lq.inspect(model, x)

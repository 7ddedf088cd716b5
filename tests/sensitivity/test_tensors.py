"""The tensors whose widths are measured: when their grids are found."""

import torch
from torch import nn

import lq
from lq.quantizer.weight_quantizer import WeightQuantizer
from lq.sensitivity.tensors import find_tensors


def test_weight_grids_are_found_once_and_anew_for_another_weight(monkeypatch):
    torch.manual_seed(0)
    model = lq.attach(nn.Sequential(nn.Linear(70, 4)), 4, None, first_last=None)
    tensor = find_tensors(model, [2, 3])[0]
    tensor._keep = False  # as it is for large models
    find, seen = WeightQuantizer.grid_at, []

    def counted(self, weight, bits):
        seen.append(bits)
        return find(self, weight, bits)

    monkeypatch.setattr(WeightQuantizer, "grid_at", counted)
    weight = torch.randn(4, 70)
    first, again = tensor.changes(weight), tensor.changes(weight.clone())
    assert seen == [2, 3]
    assert torch.equal(first, again)
    other = tensor.changes(weight * 4)
    assert seen == [2, 3, 2, 3]
    torch.testing.assert_close(other, 4 * first)

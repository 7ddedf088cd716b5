"""Encoders of torch that drop padded tokens on a path of their own."""

import pytest
import torch
from torch import nn

import lq

MASK = torch.arange(6) >= torch.tensor([[6], [4], [2], [3]])


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x, mask):
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Padded().eval()


@pytest.mark.filterwarnings("ignore:.*prototype stage", "ignore:.*activations were never seen")
@pytest.mark.parametrize("by_structure", [False, True])
@pytest.mark.parametrize("activations", [None, 8])
def test_padded_tokens_without_gradients(model, by_structure, activations):
    batch = {"x": torch.randn(4, 6, 8), "mask": MASK}
    with torch.no_grad():
        before = model(**batch)
    structure = lq.inspect(model, batch) if by_structure else None
    lq.attach(model, 8, activations, structure=structure, first_last=None)
    lq.calibrate(model, [batch])
    expected = model(**batch)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch), expected, rtol=0, atol=1e-5)
    assert torch.equal(expected, model(**batch))
    assert not torch.equal(expected, before) and (expected - before).abs().max() < 0.1
    lq.detach(model)
    assert model.encoder.use_nested_tensor
    with torch.no_grad():
        assert torch.equal(model(**batch), before)


@pytest.mark.filterwarnings("ignore:.*prototype stage")
@pytest.mark.parametrize("units", ["layer", "block"])
def test_units_of_padded_tokens(model, units):
    batches = [{"x": torch.randn(4, 6, 8), "mask": MASK}]
    lq.attach(model, 4, None, first_last=None)  # weights alone: torch's fused layers run
    lq.calibrate(model, batches)
    found = lq.reconstruct(model, batches, units=units, iterations=3)
    assert all(unit.after <= unit.before for unit in found.units)
    assert model.encoder.use_nested_tensor

"""Attention as it is taken apart: torch's numbers, fused or not; the matrices of recurrent layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import lq
from tests.models import Attention, tokens


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"norm": True}])
def test_fused_and_unfused_attention_give_the_same_numbers(options):
    x, outputs, sites = tokens(), [], []
    for fused in (True, False):
        torch.manual_seed(0)
        model = Attention(fused=fused, **options).eval()
        structure = lq.inspect(model, x)
        sites.append([site.name for site in structure.sites])
        lq.calibrate(lq.attach(model, 4, 4, structure=structure), [x])
        outputs.append(model(x))
        model.fused = not fused
        torch.testing.assert_close(model(x), outputs[-1])  # ranges found for one path serve the other
    assert sites[0] == sites[1]
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "float"}, {}])
def test_decomposed_attention_is_torchs(options):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, generator=generator) for _ in range(3))
    mask = torch.rand(2, 1, 6, 6, generator=generator) > 0.3
    mask[0, 0, 2] = False  # a token that may look at nothing
    options = dict(options)
    kind = options.pop("mask", None)
    if kind:
        options["attn_mask"] = mask if kind == "bool" else torch.randn(6, 6, generator=generator)

    class Call(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, k, v, **options)

    model = Call()
    structure = lq.inspect(model, q)
    expected = model(q)
    lq.attach(model, None, 16, structure=structure, overrides={"matmul_0": {"activations": 16}})
    lq.calibrate(model, [q])
    torch.testing.assert_close(model(q), expected, atol=2e-3, rtol=1e-3)


def test_grouped_queries():
    q, kv = torch.randn(2, 4, 6, 4), torch.randn(2, 2, 6, 4)

    class Call(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q * 1.0, kv, kv, enable_gqa=True)

    model = Call()
    expected = model(q)
    lq.calibrate(lq.attach(model, 8, 16, structure=lq.inspect(model, q)), [q])
    torch.testing.assert_close(model(q), expected, atol=5e-2, rtol=1e-2)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_rows_that_may_attend_to_nothing(kind):
    """Zeros, and gradients that are numbers, as torch has them."""
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(4, 6, 8)
    visible = torch.rand(4, 6, 6) > 0.3
    visible[1] = False
    visible[2, 3] = False
    mask = visible if kind == "bool" else torch.zeros(4, 6, 6).masked_fill(~visible, -torch.inf)
    run = lambda model, batch: model(*batch)  # noqa: E731
    expected = model(x, mask)
    structure = lq.inspect(model, (x, mask), forward=run)
    lq.calibrate(lq.attach(model, 8, 8, structure=structure), [(x, mask)], forward=run)
    found = model.train()(x, mask)
    found.square().sum().backward()
    assert (found - expected).norm() < 0.03 * expected.norm()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x, mask):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("packed", [False, True])
def test_matrices_of_recurrent_layers_without_biases(kind, packed):
    torch.manual_seed(0)
    layer = kind(4, 3, bias=False)
    x = pack_sequence([torch.randn(n, 4) for n in (3, 2)]) if packed else torch.randn(5, 2, 4)
    expected = copy.deepcopy(layer)
    lq.attach(layer, 4, None, structure=lq.inspect(layer, (x,)), first_last=None)
    found = lq.integer_weights(layer)
    with torch.no_grad():
        for key, name in (("rnn_0_weight_0", "weight_ih_l0"), ("rnn_0_weight_1", "weight_hh_l0")):
            getattr(expected, name).copy_(found[key].dequantize())
    y, z = layer(x)[0], expected(x)[0]
    assert torch.equal(y.data, z.data)

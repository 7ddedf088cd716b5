"""Attention as it is taken apart: torch's numbers, fused or not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from tests.models import (
    Attention,
    tokens,
)


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

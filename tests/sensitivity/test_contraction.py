"""Terms against per-sample gradients by autograd, in float64, for every kind of layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lq.sensitivity import contraction
from lq.structure.calls import Call
from lq.structure.channels import ChannelLayout

LAYERS = {
    "linear, one row": (nn.Linear(12, 3), (4, 12)),
    "linear, tokens": (nn.Linear(5, 7), (4, 9, 5)),
    "linear, grid of tokens": (nn.Linear(5, 3), (4, 3, 3, 5)),
    "conv1d": (nn.Conv1d(3, 5, 3, stride=2, padding=1), (4, 3, 11)),
    "conv2d, few positions": (nn.Conv2d(3, 40, 3, stride=2), (4, 3, 7, 7)),
    "conv2d, many positions": (nn.Conv2d(3, 5, (3, 1), padding=(1, 0), dilation=(2, 1)), (4, 3, 12, 12)),
    "conv2d, pointwise": (nn.Conv2d(6, 5, 1, stride=2), (4, 6, 9, 9)),
    "conv2d, same": (nn.Conv2d(3, 30, (3, 5), padding="same"), (4, 3, 5, 5)),
    "conv2d, same, many positions": (nn.Conv2d(3, 4, 4, padding="same", dilation=2), (4, 3, 9, 9)),
    "conv2d, valid": (nn.Conv2d(3, 4, 3, padding="valid"), (4, 3, 6, 6)),
    "conv2d, reflected": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (4, 3, 6, 6)),
    "conv2d, grouped": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (4, 6, 6, 6)),
    "conv2d, depthwise": (nn.Conv2d(6, 12, 3, groups=6, stride=2), (4, 6, 9, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2, padding=1), (4, 2, 4, 4, 4)),
    "conv3d, few positions": (nn.Conv3d(2, 30, 2), (4, 2, 3, 3, 3)),
    "transposed conv1d": (nn.ConvTranspose1d(3, 4, 3, stride=2), (4, 3, 7)),
    "transposed conv2d": (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (4, 4, 5, 5)),
    "transposed conv2d, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (4, 4, 5, 5)),
    "transposed conv3d": (nn.ConvTranspose3d(2, 3, 2), (4, 2, 3, 3, 3)),
    "embedding": (nn.Embedding(6, 4), None),
    "embedding, padded": (nn.Embedding(6, 4, padding_idx=2), None),
}


def called(layer, x):
    """The call that the layer makes."""
    calls = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func.__name__ in ("linear", "embedding") or func.__name__.startswith("conv"):
                calls.append(Call.of(func.__name__, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Watch():
        output = layer(x)
    return calls[0], output


@pytest.mark.parametrize("kind", LAYERS)
def test_terms_are_per_sample_gradients_times_changes(kind):
    layer, shape = LAYERS[kind]
    layer = layer.double()
    torch.manual_seed(0)
    x = torch.randint(6, (4, 9)) if shape is None else torch.randn(*shape, dtype=torch.double)
    call, output = called(layer, x)
    delta = torch.randn_like(output)
    changes = torch.randn(3, *layer.weight.shape, dtype=torch.double)
    found = contraction.terms(call, layer.weight.detach(), delta, changes, 4)
    layout = ChannelLayout.of(layer, layer.weight)
    for n in range(4):
        (gradient,) = torch.autograd.grad((layer(x[n : n + 1]) * delta[n : n + 1]).sum(), layer.weight)
        expected = torch.stack([layout.rows(gradient * change).sum(1) for change in changes], -1)
        assert (found[n] - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_rows_of_a_sample_are_added_up():
    weight, changes = torch.randn(5, 3, 3, 3).double(), torch.randn(2, 5, 3, 3, 3).double()
    frames = torch.randn(6, 3, 8, 8).double()  # three of each of two samples
    call = Call.of("conv2d", (frames, weight), {})
    delta = torch.randn_like(F.conv2d(frames, weight))
    apart = contraction.terms(call, weight, delta, changes, 6)
    torch.testing.assert_close(contraction.terms(call, weight, delta, changes, 2), apart.view(2, 3, 5, 2).sum(1))


def test_an_image_without_a_batch_dimension_is_one_sample():
    weight, changes = torch.randn(5, 3, 3, 3), torch.randn(2, 5, 3, 3, 3)
    image = torch.randn(3, 8, 8)
    delta = torch.randn(5, 6, 6)
    alone = contraction.terms(Call.of("conv2d", (image, weight), {}), weight, delta, changes, 1)
    batched = contraction.terms(Call.of("conv2d", (image[None], weight), {}), weight, delta[None], changes, 1)
    torch.testing.assert_close(alone, batched)


def test_a_matrix_product_is_a_linear_layer_with_its_weight_transposed():
    x, weight, changes = torch.randn(4, 6, 5).double(), torch.randn(5, 7).double(), torch.randn(3, 5, 7).double()
    delta = torch.randn(4, 6, 7).double()
    found = contraction.terms(Call.of("matmul", (x, weight), {}), weight, delta, changes, 4)
    expected = contraction.terms(
        Call.of("linear", (x, weight.T), {}), weight.T, delta, changes.transpose(1, 2).contiguous(), 4
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("positions", "inner"), [(1, 64), (2, 5), (50, 7), (3, 400_000)])
def test_both_orders_of_summation_agree(positions, inner):
    generator = torch.Generator().manual_seed(0)
    rows, delta, changes = (
        torch.randn(*shape, generator=generator).double()
        for shape in ((2, positions, inner), (2, positions, 3), (4, 3, inner))
    )
    expected = torch.einsum("bpk,bpc,wck->bcw", rows, delta, changes)
    torch.testing.assert_close(contraction.contract(rows, delta, changes), expected, rtol=1e-10, atol=1e-8)

"""inspect: what would be quantized where, what stays in float and why; attach by its map."""

import copy
from contextlib import nullcontext

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import lq
from lq.attachment.sites import quantizers
from lq.errors import SpecError
from tests.models import (
    Attention,
    every_model,
    example,
    images,
    made,
    names,
    state,
    tokens,
)


def traces(model):
    """What attach leaves on modules, to be gone after detach."""
    return {
        name: (type(m), sorted(set(m.__dict__)), len(m._forward_hooks), len(m._forward_pre_hooks),
               len(m._load_state_dict_pre_hooks), len(m._forward_hooks_always_called))
        for name, m in model.named_modules()
    }  # fmt: skip


@every_model
@pytest.mark.parametrize("skip", [False, True])
def test_attach_calibrate_train_save_load_detach(kind, skip):
    model, x = example(kind)
    expected, before, left = model(x), state(model), traces(model)
    structure = lq.inspect(model, x)
    lq.attach(model, 8, 8, structure=structure, skip=skip, estimator="lsq")
    other_path = ["negative.input"] if kind == "control flow" else []  # quantized by class, and not seen here
    with pytest.warns(lq.NoEffectWarning, match=r"\(negative.input\)") if other_path else nullcontext():
        lq.calibrate(model, [x])
    output = model(x)
    error = (output - expected).norm() / expected.norm()
    assert 1e-6 < error < 0.1
    assert [quantizer.name for quantizer in quantizers(model) if not quantizer.calibrated] == other_path

    loaded = lq.load(state(model), example(kind)[0])
    assert torch.equal(loaded(x), output)
    assert {q.name for q in quantizers(loaded)} == {q.name for q in quantizers(model)}
    assert torch.equal(copy.deepcopy(model)(x), output)

    model.train()
    model(x).square().mean().backward()
    moved = [q for q in quantizers(model) if q.log2_step.grad is not None and q.log2_step.grad.abs().sum() > 0]
    assert len(moved) > len(list(quantizers(model))) // 2
    model.zero_grad()

    lq.detach(model.eval())
    assert traces(model) == left
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(x), expected)


class Products(TorchDispatchMode):
    """Counts multiply-accumulates of products and convolutions by the shapes of their operands."""

    def __init__(self):
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("mm", "bmm"):
            self.macs += result.numel() * args[0].shape[-1]
        elif name in ("addmm", "baddbmm"):
            self.macs += result.numel() * args[1].shape[-1]
        elif name == "convolution":
            positions = args[0] if args[6] else result  # transposed
            self.macs += positions.numel() * args[1][0].numel()
        return result


@every_model
def test_macs_are_those_of_products_and_convolutions(kind):
    model, x = example(kind)
    # With gradients and plain attention: fused kernels have no products to see.
    with sdpa_kernel(SDPBackend.MATH), Products() as counter:
        model(x)
    structure = lq.inspect(model, x)
    if kind == "text":  # the LSTM is one function: two layers of two matrices (32, 8) on 5 tokens
        assert structure.macs == 5 * (4 * 32 * 8 + 11 * 8)
        return
    assert structure.macs * len(x) == counter.macs


def test_attention_probabilities_are_unsigned_and_shared_inputs_have_one_quantizer():
    model, x = made(Attention), tokens()
    structure = lq.inspect(model, x)
    assert names(structure, "activation") == [
        "q.input", "k.input", "v.input",
        "matmul_0_left", "matmul_0_right", "matmul_1_left", "matmul_1_right", "proj.input",
    ]  # fmt: skip
    shared = {site.name: site.shares for site in structure.sites if site.shares}
    assert shared == {"k.input": "q.input", "v.input": "q.input"}
    lq.calibrate(lq.attach(model, 8, 8, structure=structure, overrides={"q": {"activations": 8}}), [x])
    found = {q.name: q for q in quantizers(model)}
    assert float(found["matmul_1_left"].zero_point) == 0
    assert float(found["matmul_0_left"].zero_point) > 0
    assert "k.input" not in found


@pytest.mark.parametrize("fused", [True, False])
def test_timm_attention(fused):
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    x = torch.randn(2, 3, 160, 160)
    structure = lq.inspect(model, x)
    assert structure.share == 1.0
    found = [o.name for o in structure.operations if o.kind == "matmul"]
    assert found[:2] == ["blocks.0.attn.matmul_0", "blocks.0.attn.matmul_1"]


def test_multi_head_attention_with_its_own_in_projection():
    model, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), tokens()
    structure = lq.inspect(model, x, forward=lambda m, x: m(x, x, x))
    expected = model(x, x, x)[0]
    assert {o.name: o.kind for o in structure.operations} == {
        "linear_0": "linear", "matmul_0": "matmul", "matmul_1": "matmul", "linear_1": "linear",
    }  # fmt: skip
    assert "in_proj_weight" not in [tensor.name for tensor in structure.floats]
    lq.attach(model, 2, 8, structure=structure, first_last=None)
    lq.calibrate(model, [x], forward=lambda m, x: m(x, x, x))
    quantizer = next(q for q in quantizers(model) if q.name == "linear_0_weight")
    assert quantizer.bits.shape == (24,)
    assert not torch.allclose(model(x, x, x)[0], expected, rtol=1e-2)


def test_weights_that_are_no_layers_are_quantized_or_listed():
    model, x = example("odd weights")
    structure = lq.inspect(model, x)
    assert names(structure, "weight") == [
        "conv.conv2d_0_weight", "conv2d_0_weight", "matmul_0_right_weight",
        "einsum_0_right_weight", "never_called.weight",
    ]  # fmt: skip
    reasons = {tensor.name: tensor.reason for tensor in structure.floats}
    assert reasons["position"] == "added, not multiplied"
    assert reasons["gain"] == "scales elementwise"
    assert reasons["unused"] == "not used by the example"
    assert reasons["never_called.bias"] == "bias"
    assert structure.share == 1.0


def test_set_bits_of_a_weight_at_a_call():
    model, x = example("odd weights")
    lq.calibrate(lq.attach(model, 4, structure=lq.inspect(model, x)), [x])
    lq.set_bits(model, {"matmul_0": 1})
    quantizer = next(q for q in quantizers(model) if q.name == "matmul_0_right_weight")
    model(x)
    assert quantizer.calibrated and set(quantizer.bits.tolist()) == {1.0}


def test_tied_weights_share_their_quantizer():
    model, x = example("text")
    lq.attach(model, 4, structure=lq.inspect(model, x), first_last=None)
    assert model.embed.parametrizations.weight[0] is model.decode.parametrizations.weight[0]
    lq.detach(model)
    assert model.decode.weight is model.embed.weight


def test_skip_paths():
    model, x = example("residual")
    structure = lq.inspect(model, x)
    assert names(structure, "skip") == ["relu_0_output"]  # the sum goes through a ReLU that serves two places


def test_torchvision_blocks_are_quantized_at_their_output():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    skips = names(lq.inspect(model, images(64)), "skip")
    assert skips == ["maxpool.output", *(f"layer{stage}.{block}.output" for stage in (1, 2, 3, 4) for block in (0, 1))]


def test_skip_replaces_the_inputs_it_covers():
    model, x = example("block")
    both = nn.Sequential(model, copy.deepcopy(model)).eval()
    structure = lq.inspect(both, x)
    lq.attach(both, 8, 8, structure=structure, skip=True)
    found = {q.name for q in quantizers(both)}
    assert {"0.output", "0.add_0_output", "1.add_0_output"} <= found


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_auto_leaves_streams_that_a_layer_norm_reads(name):
    """Of the pre-norm transformer all of its stream; of the ResNet, whose batch norms are not folded, nothing."""
    options = {"img_size": 32, "depth": 2} if "vit" in name else {}
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    structure = lq.inspect(model, torch.randn(1, 3, 32, 32))
    stream = {site.name for site in structure.sites if site.role == "skip"}
    placed = {}
    for skip in (True, "auto", False):
        placed[skip] = {
            q.name for q in quantizers(lq.attach(copy.deepcopy(model), 8, 8, structure=structure, skip=skip))
        }
    assert stream and stream <= placed[True] and not stream & placed[False]
    assert placed["auto"] == placed["vit" not in name]


def test_skip_is_a_choice_of_three():
    model, x = example("block")
    with pytest.raises(SpecError, match="skip='yes' is unknown; use True, False or 'auto'"):
        lq.attach(model, 8, 8, structure=lq.inspect(model, x), skip="yes")


def test_resnet_skip_sites_follow_the_activation():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t").eval()
    x = torch.randn(1, 3, 64, 64)
    structure = lq.inspect(model, x)
    skips = names(structure, "skip")
    assert skips == ["maxpool.output", *(f"layer{n}.0.act2.output" for n in (1, 2, 3, 4))]
    plan = {q.name for q in quantizers(lq.attach(model, 4, 4, structure=structure, skip=True))}
    assert "layer2.0.conv1.input" not in plan and "layer1.0.conv2.input" in plan


def test_concatenations_share_a_range_on_request():
    model, x = example("u-net")
    structure = lq.inspect(model, x)
    lq.calibrate(lq.attach(copy.deepcopy(model), 8, 8, structure=structure), [x])
    apart = {q.name for q in quantizers(lq.attach(copy.deepcopy(model), 8, 8, structure=structure, first_last=None))}
    joined = lq.attach(model, 8, 8, structure=structure, share_concats=True, first_last=None)
    together = {q.name for q in quantizers(joined)}
    assert apart - together == {"out.input"}
    lq.calibrate(joined, [x])
    assert torch.isfinite(joined(x)).all()


def test_a_layer_called_twice_has_one_quantizer():
    model, x = example("control flow")
    structure = lq.inspect(model, x)
    assert names(structure, "activation").count("again.input") == 1
    operation = next(o for o in structure.operations if o.name == "again")
    assert operation.macs == 3 * 36


def test_patterns_choose_calls():
    model, x = example("block")
    structure = lq.inspect(model, x)
    lq.attach(model, 8, 8, structure=structure, exclude="attn.matmul_*", overrides={"mlp": {"activations": 4}})
    found = {q.name: int(q.bits.flatten()[0]) for q in quantizers(model)}
    assert not any("matmul" in name for name in found)
    assert found["mlp.0.input"] == 4


def test_summary_counts_the_products():
    model, x = example("block")
    structure = lq.inspect(model, x)
    lq.calibrate(lq.attach(model, 4, 8, structure=structure, first_last=None), [x])
    rows = {layer.name: layer for layer in lq.summary(model).layers}
    found = {operation.name: operation.macs for operation in structure.operations}
    assert {name: rows[name].macs for name in found} == found
    assert rows["attn.matmul_0"].bitops == found["attn.matmul_0"] * 8 * 8
    assert rows["mlp.0"].bitops == found["mlp.0"] * 4 * 8
    again = {layer.name: layer.macs for layer in lq.summary(model, x).layers}
    assert {name: again[name] for name in found} == found


def test_compiled_parts_are_looked_into():
    model, x = example("block")
    whole = nn.Sequential(torch.compile(model, backend="eager"))
    found = [operation.name.replace("0._orig_mod.", "") for operation in lq.inspect(whole, x).operations]
    assert found == [operation.name for operation in lq.inspect(model, x).operations]


class Spectral(nn.Module):
    """A product of complex numbers between two convolutions."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.modes = nn.Parameter(torch.randn(8, 8, 6, 6, dtype=torch.cfloat) / 5)
        self.mixing = nn.Parameter(torch.randn(6, 6, dtype=torch.cfloat) / 3)

    def forward(self, x):
        found = torch.fft.rfft2(self.stem(x))
        mixed = torch.einsum("bixy,ioxy->boxy", found[:, :, :6, :6], self.modes) @ self.mixing
        out = torch.zeros_like(found)
        out[:, :, :6, :6] = mixed
        return self.head(torch.fft.irfft2(out, s=x.shape[-2:]))


@pytest.mark.parametrize("estimator", ["ste", "lsq"])
def test_complex_numbers_stay_as_they_are(estimator):
    torch.manual_seed(0)
    model, x = Spectral().eval(), torch.randn(4, 3, 16, 16)
    expected = model(x)
    structure = lq.inspect(model, x)
    assert {site.layer for site in structure.sites} == {"stem", "head"}
    reasons = {o.name: o.reason for o in structure.operations if o.reason}
    assert list(reasons) == ["einsum_0", "matmul_0"]
    assert all("holds complex numbers" in reason for reason in reasons.values())
    lq.calibrate(lq.attach(model, 8, 8, structure=structure, estimator=estimator), [x])
    assert (model(x) - expected).norm() < 0.05 * expected.norm()
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layers_with_complex_weights_are_left_by_class_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.randn(4, 4, dtype=torch.cfloat))
    lq.attach(model, 4, None, first_last=None)
    assert [q.name for q in quantizers(model)] == ["0.weight"]

"""Preparation of timm's networks with random weights: exact, at least as good at W4A4, the same in onnxruntime."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lq
from tests.attachment.preparation.nets import uneven

timm = pytest.importorskip("timm")

# Network, options, size of its images, norms that are rescaled, and how many are left and why.
NETWORKS = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3}, 32, 7, {}),
    ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}, 32, 5, {}),
    ("swin_tiny_patch4_window7_224", {"img_size": 32, "window_size": 4, "depths": (2, 2), "num_heads": (3, 6)}, 32, 10,
     {"layer_norm in layers.0.blocks.0.norm1 reads it": 1}),
    ("convnext_atto", {"depths": (1, 1, 1, 1)}, 32, 8, {"add in stages.0.blocks.0 reads it": 1}),
    ("maxvit_rmlp_nano_rw_256", {"img_size": 64, "depths": (1, 1), "embed_dim": (32, 64)}, 64, 9, {}),
    ("poolformer_s12", {}, 32, 13, {"sub in stages.": 12}),
]  # fmt: skip


def built(name: str, options: dict, size: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = uneven(timm.create_model(name, num_classes=10, **options))
    for name, parameter in model.named_parameters():  # at random weights the branches would do nothing
        if name.endswith((".gamma", ".scale")):
            nn.init.constant_(parameter, 0.5)
    return model, torch.randn(8, 3, size, size)


@torch.no_grad()
def sqnr(model: nn.Module, expected: Tensor, x: Tensor) -> float:
    """Decibels of the outputs at W4A4."""
    quantized = lq.attach(copy.deepcopy(model), 4, 4, structure=lq.inspect(model, x[:1]))
    error = lq.calibrate(quantized, [x])(x) - expected
    return float(10 * torch.log10(expected.square().sum() / error.square().sum()))


@pytest.mark.parametrize(("name", "options", "size", "rescaled", "left"), NETWORKS, ids=[n[0] for n in NETWORKS])
@torch.no_grad()
def test_exact(name, options, size, rescaled, left):
    model, x = built(name, options, size)
    other = torch.randn(2, 3, size, size)
    before = model(other).double()
    report = lq.prepare(model, [x])
    assert (model(other) - before).norm() < 1e-5 * before.norm()
    assert len(report.pairs) == rescaled
    for reason, count in left.items():
        assert sum(one.reason.startswith(reason) for one in report.left) == count
    assert len(report.left) == sum(left.values())


_LONG = ("swin", "maxvit", "poolformer")  # seconds each: ranges of many channels are searched


@pytest.mark.parametrize(
    "network",
    [pytest.param(n, marks=[pytest.mark.slow] if n[0].startswith(_LONG) else []) for n in NETWORKS],
    ids=[n[0] for n in NETWORKS],
)
@torch.no_grad()
def test_better(network):
    model, x = built(*network[:3])
    expected, before = model(x), sqnr(model, model(x), x)
    lq.prepare(model, [x])
    after = sqnr(model, expected, x)
    print(f"{network[0]}: W4A4 {before:.2f} -> {after:.2f} dB")
    assert after >= before


@pytest.mark.parametrize(("activations", "limit"), [(None, 1e-4), (8, 0.05)])  # kernels may round to another level
@torch.no_grad()
def test_onnx(tmp_path, activations, limit):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model, x = built(*NETWORKS[0][:3])
    lq.prepare(model, [x])
    lq.calibrate(lq.attach(model, 8, activations, structure=lq.inspect(model, x[:1])), [x])
    lq.export_onnx(model, x[:2], tmp_path / "vit.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # else it rounds floats
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", options, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x[:2].numpy()})[0])
    expected = model(x[:2])
    assert (found - expected).norm() < limit * expected.norm()

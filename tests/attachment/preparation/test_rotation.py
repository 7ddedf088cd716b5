"""Rotation of residual streams: exact, spread over channels, and refused where it is not of one width."""

import copy

import pytest
import torch
from torch import Tensor, nn

import lq
from lq.attachment.preparation.rotation import rotation
from tests.attachment.preparation.nets import Block, Sequence, uneven

timm = pytest.importorskip("timm")


def vit(**options) -> nn.Module:
    torch.manual_seed(0)
    return uneven(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, **options))


@pytest.fixture
def x():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() < 1e-5 * other.norm())


@pytest.mark.parametrize("width", [2, 5, 192])
def test_the_matrix(width):
    turn = rotation(width)
    assert torch.allclose(turn @ turn.T, torch.eye(width).double(), atol=1e-12)
    assert torch.allclose(turn.sum(1), torch.ones(width).double(), atol=1e-12)
    assert torch.equal(turn, rotation(width))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@torch.no_grad()
def test_blocks(norm):
    """The stream inside is R times what it was; a layer without bias gets one for the bias of the norm."""
    torch.manual_seed(0)
    model = uneven(
        Sequence(embed=nn.Linear(6, 16), one=Block(norm), two=Block(norm), norm=norm(16), head=nn.Linear(16, 3))
    )
    batch, old = torch.randn(4, 5, 6), copy.deepcopy(model)
    report = lq.prepare(model, [batch], norms=False, rotate=True)
    assert not report.left
    assert same(model(batch), old(batch))
    assert same(model.one(model.embed(batch)), old.one(old.embed(batch)) @ rotation(16).float().T)
    assert bool((model.norm.weight == 1).all())
    assert (model.one.kv.bias is not None) == (norm is nn.LayerNorm)


@torch.no_grad()
def test_vision_transformers(x):
    model, old = vit(class_token=True), vit(class_token=True)
    nn.init.normal_(model.cls_token)
    old.load_state_dict(model.state_dict())
    report = lq.prepare(model, [x], rotate=True)
    assert same(model(x), old(x))
    assert not report.left
    assert len(report.pairs) == 5
    assert same(model.cls_token, old.cls_token @ rotation(192).float().T)


def test_checkpoints(x, tmp_path):
    model, old = vit(), vit()
    lq.prepare(model, [x], rotate=True)
    with pytest.raises(lq.StateError, match="is of a model whose residual stream was not rotated, and this one's is"):
        model.load_state_dict(old.state_dict())
    with torch.no_grad():
        assert same(model(x), old(x))
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x)), [x])
    lq.save(model, tmp_path / "model.safetensors")
    for source in (model.state_dict(), tmp_path / "model.safetensors"):
        loaded = lq.load(source, vit())
        assert torch.equal(loaded(x), model(x))
        with pytest.raises(lq.StateError, match="whose residual stream was not rotated"):
            loaded.load_state_dict(old.state_dict())
    lq.calibrate(lq.attach(old, 4, 8, structure=lq.inspect(old, x)), [x])
    assert torch.equal(lq.load(old.state_dict(), model)(x), old(x))


def test_made_biases_come_back(tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        return uneven(Sequence(embed=nn.Linear(6, 16), block=Block(), norm=nn.LayerNorm(16), head=nn.Linear(16, 3)))

    model, batch = build(), torch.randn(4, 5, 6)
    lq.prepare(model, [batch], norms=False, rotate=True)
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, batch)), [batch])
    lq.save(model, tmp_path / "model.safetensors")
    for source in (model.state_dict(), tmp_path / "model.safetensors"):
        assert torch.equal(lq.load(source, build())(batch), model(batch))


def left(model: nn.Module, x: Tensor) -> str:
    before = copy.deepcopy(model.state_dict())
    report = lq.prepare(model, [x], norms=False, rotate=True)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    return str(report.left[0])


def test_streams_that_cannot_be_rotated(x):
    class Buffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 2)
            self.register_buffer("positions", torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.embed(x) + self.positions))

    text = "residual stream: positions, which is added to the stream, is a buffer"
    assert left(Buffer().eval(), torch.randn(2, 5, 6)) == text
    scaled = vit(init_values=0.1)
    assert left(scaled, x).startswith("residual stream: mul in blocks.")
    own = Sequence(norm=nn.LayerNorm(8), head=nn.Linear(8, 2))
    assert left(own, torch.randn(4, 8)) == "residual stream: the stream is an input of the model"
    none = Sequence(a=nn.Linear(8, 8), b=nn.ReLU())
    text = "residual stream: no norm is followed by layers that could take its weight and its bias"
    assert left(none, torch.randn(4, 8)) == text
    frozen = vit()
    frozen.pos_embed.requires_grad_(False)
    assert left(frozen, x) == "residual stream: pos_embed is frozen (requires_grad=False)"
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, depths=(1, 1), num_heads=(3, 6), num_classes=5
    ).eval()
    assert left(swin, x) == "residual stream: layer_norm in patch_embed.norm reads or writes the stream"
    depthwise = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), num_classes=5).eval()
    assert left(depthwise, x).endswith("writes to the stream in groups of channels")


def test_rotation_comes_first(x):
    model = vit()
    lq.prepare(model, [x])
    with pytest.raises(lq.StateError, match="rotate=True has to come first, and this model was prepared already"):
        lq.prepare(model, [x], rotate=True)

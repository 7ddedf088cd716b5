"""State dicts in all directions, BatchNorm folding on the way, and what is told when they do not fit."""

import copy

import pytest
import timm
import torch
from torch import nn

import lq


def resnet(name: str = "test_resnet") -> nn.Module:
    """A small timm network whose BatchNorms have seen data."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in (
                (module.running_mean, -1),
                (module.bias, -1),
                (module.running_var, 0.5),
                (module.weight, 0.5),
            ):
                tensor.data.uniform_(low, 2)
    return model.eval()


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "resnet10t"])
def test_folding_is_exact(name) -> None:
    model = resnet(name)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    with torch.no_grad():
        before = model(IMAGES)
        assert len(lq.fold_batchnorm(model)) == norms > 5
        assert float((model(IMAGES) - before).abs().max() / before.abs().max()) <= 1e-5


def test_folding_leaves_what_it_cannot_fold() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.other, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.last(self.other(self.norm(y) + y))

    assert lq.fold_batchnorm(Shared()) == [lq.folding.FoldablePair("other", "last")]
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)).eval()
    transposed[1].running_var.uniform_(0.5, 2)
    x = torch.randn(1, 4, 5, 5)
    with torch.no_grad():
        before = transposed(x)
        assert len(lq.fold_batchnorm(transposed)) == 1
        torch.testing.assert_close(transposed(x), before)


def test_folding_after_attach_is_refused() -> None:
    with pytest.raises(lq.StateError, match=r"cannot be folded .* lq.detach\(model\), lq.fold_batchnorm\(model\)"):
        lq.fold_batchnorm(lq.attach(resnet()))


def quantized(fold: bool) -> nn.Module:
    model = resnet()
    if fold:
        lq.fold_batchnorm(model)
    return lq.calibrate(lq.attach(model, 4, 8), [IMAGES])


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("form", ["mapping", "file", "lightning"])
def test_a_quantized_checkpoint_loads_by_itself(fold, form, tmp_path) -> None:
    model = quantized(fold)
    lq.set_bits(model, {"layer1.0.conv1": [i % 5 for i in range(32)]})
    source = {"state_dict": model.state_dict()} if form == "lightning" else model.state_dict()
    if form == "file":
        torch.save(source, tmp_path / "model.pt")
        source = tmp_path / "model.pt"
    loaded = lq.load(source, timm.create_model("test_resnet", num_classes=5)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert loaded.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("fold", [False, True])
def test_a_float_checkpoint_loads_into_a_quantized_model(fold) -> None:
    model = quantized(fold)
    with torch.no_grad():
        expected = model(IMAGES)
    other = timm.create_model("test_resnet", num_classes=5).eval()
    if fold:
        lq.fold_batchnorm(other)
    lq.calibrate(lq.attach(other, 4, 8), [IMAGES])
    with pytest.warns(UserWarning, match="ranges were kept; run lq.calibrate"):
        other.load_state_dict(resnet().state_dict())
    lq.calibrate(other, [IMAGES])
    with torch.no_grad():
        assert torch.equal(other(IMAGES), expected)


def test_a_quantized_checkpoint_loads_into_other_widths() -> None:
    model = quantized(fold=False)
    other = lq.attach(timm.create_model("test_resnet", num_classes=5), 2, 4).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(IMAGES), model(IMAGES))
    assert lq.summary(other).average_bits == lq.summary(model).average_bits


def test_checkpoints_that_do_not_fit() -> None:
    with pytest.raises(lq.DataError, match="the checkpoint has no quantizers"):
        lq.load(resnet().state_dict(), resnet())
    with pytest.raises(lq.DataError, match=r"quantizes a layer 'conv1.0' that Sequential does not have"):
        lq.load(quantized(fold=False).state_dict(), nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(lq.DataError, match="expected a state dict"):
        lq.load({"state_dict": 3}, resnet())


def test_state_dict_of_a_copy_is_the_same() -> None:
    model = quantized(fold=True)
    twin = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))

"""Comparisons of layers against numbers computed by hand; the planted culprit; any model; nothing left behind."""

import copy
import math
import os

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import quantizers
from lq.errors import DataError, NoEffectWarning, SpecError, StateError
from lq.report.comparison import float_reference
from tests.helpers import hooks
from tests.models import EXAMPLES, Loop, every_model, example, images, state


def decibels(x, y):
    """By sample, in a loop."""
    errors = []
    for a, b in zip(x.detach().double(), y.detach().double(), strict=True):
        errors.append(float((b - a).square().sum() / a.square().sum()))
    return -10 * math.log10(sum(errors) / len(errors))


def of_tensor(x, y):
    return decibels(x.reshape(1, -1), y.reshape(1, -1))


def mlp(bits=4, **overrides):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(32, 8)
    lq.attach(model, bits, 8, first_last=None, **overrides)
    return lq.calibrate(model, [x]), x


def quantized(kind, weights=4, activations=8, **options):
    model, x = example(kind)
    lq.attach(model, weights, activations, structure=lq.inspect(model, x), **options)
    return lq.calibrate(model, [x]), x


def test_alone_and_together_by_hand():
    model, x = mlp()
    float_net = lq.detach(copy.deepcopy(model))
    found = lq.compare(model, [x[:20], x[20:]])
    with torch.no_grad():
        for index in (0, 2, 4):
            before, layer = float_net[:index](x), model[index]
            want, alone, together = float_net[index](before), layer(before), model[: index + 1](x)
            got = found[str(index)]
            assert got.alone.sqnr == pytest.approx(decibels(want, alone), abs=1e-3)
            assert got.together.sqnr == pytest.approx(decibels(want, together), abs=1e-3)
            cosine = float(nn.functional.cosine_similarity(want, together, 1).mean())
            assert got.together.cosine == pytest.approx(cosine, abs=1e-5)
            weight = {part.is_weight: part for part in got.parts}[True]
            assert weight.sqnr == pytest.approx(of_tensor(float_net[index].weight, layer.weight), abs=1e-3)
        assert found.network.sqnr == pytest.approx(decibels(float_net(x), model(x)), abs=1e-3)
    assert found.samples == 32
    assert found["0"].together == found["0"].alone  # nothing comes before


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_the_planted_culprit_is_first(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 32} if "vit" in name else {}
    model = timm.create_model(name, num_classes=10, **options).eval()
    x = torch.randn(4, 3, 32, 32)
    structure = lq.inspect(model, x)
    layers = [site.module for site in structure.sites if site.place == "weight"]
    planted = layers[len(layers) // 2]
    lq.attach(model, 8, 8, structure=structure, overrides={planted: {"weights": 2}})
    found = lq.compare(lq.calibrate(model, [x]), [x])
    assert found.layers[0].name == planted
    assert found.layers[0].alone.sqnr < found.layers[1].alone.sqnr - 6
    assert f"{planted}.weight: " in found.layers[0].advice and "bits" in found.layers[0].advice
    before = layers[: layers.index(planted)]
    assert all(found[name].alone.sqnr > 30 and not found[name].advice for name in before)


@pytest.mark.skipif("LQ_DATA" not in os.environ, reason="needs real weights: set LQ_DATA")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["cifar10_resnet20", "vit_tiny_patch16_224"])
def test_the_planted_culprit_is_first_with_real_weights(name):
    from tests.test_real_weights import load

    model, batches, _ = load(name)
    x = batches[0][:8]
    structure = lq.inspect(model, x[:2])
    layers = [site.module for site in structure.sites if site.place == "weight"]
    planted = layers[len(layers) // 2]
    lq.attach(model, 8, 8, structure=structure, overrides={planted: {"weights": 2}})
    assert lq.compare(lq.calibrate(model, [x]), [x]).layers[0].name == planted


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights")  # of any LSTM
@every_model
def test_any_model(kind):
    model, x = quantized(kind)
    found = lq.compare(model, [x, x])
    names = {part.name for layer in found.layers for part in layer.parts}
    own = {q.name for q in quantizers(model) if q.calibrated and not q.name.startswith("negative")}  # the other path
    assert own <= names, own - names
    reached = [layer for layer in found.layers if layer.together is not None]
    assert reached and all(-20 < layer.alone.sqnr <= 200 for layer in reached)
    assert all(layer.calls % 2 == 0 for layer in reached)
    with torch.no_grad():
        want, got = (one(x).flatten(0, -2) for one in (lq.detach(copy.deepcopy(model)), model))
        if kind not in ("residual", "u-net"):  # rows are tokens there
            assert found.network.sqnr == pytest.approx(decibels(want, got), abs=0.3)


@pytest.mark.parametrize("kind", ["residual", "block"])
def test_rounded_results(kind):
    model, x = quantized(kind, skip=True)
    found = lq.compare(model, [x])
    results = [layer for layer in found.layers if layer.kind == "result"]
    assert results and all(layer.alone.sqnr >= layer.together.sqnr - 1 for layer in results)
    assert all(layer.alone.sqnr > 25 for layer in results)  # 8 bits


def test_one_forward_each_way():
    model, x = quantized("block")
    ran = []
    handle = model.register_forward_hook(lambda *_: ran.append(1))
    lq.compare(model, [x, x, x])
    handle.remove()
    assert len(ran) == 2 * 3


@pytest.mark.filterwarnings("ignore:1 of 2 activations were never seen")
def test_layers_that_are_called_several_times():
    model, x = quantized("control flow")
    again = lq.compare(model, [x])["again"]
    assert again.calls == 3
    float_net = lq.detach(copy.deepcopy(model))
    with torch.no_grad():
        y, want, alone = x, [], []
        for _ in range(3):
            want.append(float_net.again(y))
            alone.append(model.again(y))
            y = want[-1].relu()
    assert again.alone.sqnr == pytest.approx(decibels(torch.cat(want), torch.cat(alone)), abs=1e-3)


def test_the_quantized_network_takes_another_path():
    torch.manual_seed(0)
    model = lq.attach(Loop().eval(), 8, first_last=None)
    ways = iter(["positive", "negative"])  # the float network's, the quantized one's
    found = lq.compare(model, [torch.randn(3, 6)], forward=lambda m, x: m.get_submodule(next(ways))(x))
    assert found.notes == (
        "not reached by these batches: again, negative",
        "the quantized network takes another path than the float one, not all is compared: positive, negative",
    )
    assert found["positive"].together is None and found["positive"].alone is not None


def test_batches_of_any_kind():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, pixels, scale=1.0):
            return {"a": self.a(pixels), "b": (self.b(pixels), scale)}

    torch.manual_seed(0)
    model = lq.attach(Named(), 4, 4, first_last=None)
    batch = {"pixels": torch.randn(16, 8), "label": torch.zeros(16)}
    found = lq.compare(lq.calibrate(model, [batch]), [batch])
    assert {layer.name for layer in found.layers} == {"a", "b"} and found.samples == 16
    assert found.network.sqnr < 30


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_precisions(dtype):
    model, x = mlp()
    want = lq.compare(model, [x])
    found = lq.compare(model.to(dtype), [x.to(dtype)])
    assert [layer.name for layer in found.layers] == [layer.name for layer in want.layers]
    for layer in found.layers:
        assert layer.alone.sqnr == pytest.approx(want[layer.name].alone.sqnr, abs=1.0)


def test_layers_whose_weight_is_used_without_them():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(x, self.fc.weight)

    torch.manual_seed(0)
    model = lq.attach(Odd(), 3, first_last=None)
    found = lq.compare(model, [torch.randn(4, 8)])["fc"]
    weight = model.fc.parametrizations.weight.original
    assert found.alone.sqnr == pytest.approx(of_tensor(weight, model.fc.weight), abs=1e-3)
    assert found.together is None and found.calls == 0


def test_code_that_changes_tensors_in_place():
    class Scales(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x.mul_(2.0), self.weight, self.bias)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Scales(8, 8))
    x = torch.randn(16, 8)
    lq.attach(model, 8, include="1")
    kept = x.clone()
    found = lq.compare(model, [x])
    with torch.no_grad():
        weight = model[1].parametrizations.weight.original
        inner = 2 * model[0](kept)
        want = nn.functional.linear(inner, weight, model[1].bias)
        assert found["1"].alone.sqnr == pytest.approx(
            decibels(want, nn.functional.linear(inner, model[1].weight, model[1].bias)), abs=1e-3
        )


def test_memory_is_bounded():
    model, x = quantized("u-net")
    want, found = lq.compare(model, [x]), lq.compare(model, [x], memory=5 * 2 * 200 * 4)
    for layer in want.layers:
        assert found[layer.name].alone.sqnr == pytest.approx(layer.alone.sqnr, abs=2.5)
    assert found != want
    for bad in (0, "8x", -1.0):
        with pytest.raises(SpecError, match="give a number of bytes or a size"):
            lq.compare(model, [x], memory=bad)


def test_the_float_network_before_a_reconstruction():
    model, x = mlp(3)
    before = lq.detach(copy.deepcopy(model))
    with torch.no_grad():
        for layer in model[::2]:
            layer.parametrizations.weight.original.copy_(layer.weight.clone())  # levels already
    weights = [part for layer in lq.compare(model, [x]).layers for part in layer.parts if part.is_weight]
    assert all(part.sqnr > 100 for part in weights)
    found = lq.compare(model, [x], reference=before)
    with torch.no_grad():
        assert found.network.sqnr == pytest.approx(decibels(before(x), model(x)), abs=1e-3)
        inner = before[:2](x)
        alone = model[2](inner)
        assert found["2"].alone.sqnr == pytest.approx(decibels(before[2](inner), alone), abs=1e-3)
    reference = float_reference(model, before.state_dict())
    assert lq.compare(model, [x], reference=reference) == found
    assert not any(q.tap for q in quantizers(reference))


def test_references_of_other_networks():
    model, x = mlp()
    other = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
    with pytest.raises(
        DataError, match=r"another network: 4.weight has the shape \(4, 16\), the reference has \(5, 16\)"
    ):
        lq.compare(model, [x], reference=other)
    with pytest.raises(DataError, match="0.weight has the shape .16, 8., the reference lacks it"):
        lq.compare(model, [x], reference=nn.Linear(2, 2))
    with pytest.raises(DataError, match="other quantizers than the model"):
        lq.compare(model, [x], reference=lq.attach(nn.Sequential(nn.Linear(8, 16)), 4))


def test_ranks_add_up():
    model, x = mlp()
    whole = lq.compare(model, [x])
    packed = []
    for part in (x[:16], x[16:]):
        with pytest.raises(InterruptedError):
            lq.compare(model, [part], reduce=lambda tensor, operation: stop(packed, tensor, operation))
    both = lq.compare(model, [x[:16]], reduce=lambda tensor, operation: packed[0] + packed[1])
    assert both.samples == 32
    for layer in whole.layers:
        assert both[layer.name].alone.sqnr == pytest.approx(layer.alone.sqnr, abs=1e-4)
        assert both[layer.name].together.cosine == pytest.approx(layer.together.cosine, abs=1e-6)


def stop(packed, tensor, operation):
    assert operation == "sum" and tensor.dtype == torch.float64
    packed.append(tensor)
    raise InterruptedError


def test_nothing_is_left_behind():
    model, x = quantized("block")
    model.train()
    model.mlp[0].eval()
    model.mlp[0].bias.requires_grad_(False)
    before, hooked, saved = [m.training for m in model.modules()], hooks(model), state(model)
    lq.compare(model, [x])
    assert [m.training for m in model.modules()] == before and hooks(model) == hooked
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    assert not any(q.tap for q in quantizers(model))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["mlp.0.bias"]
    with pytest.raises(DataError, match="did not take a batch"):
        lq.compare(model, [torch.randn(2, 3)])
    assert hooks(model) == hooked and not any(q.tap for q in quantizers(model))


def test_values_that_are_not_finite():
    class Masks(nn.Linear):
        def forward(self, x):
            return super().forward(x).masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf)

    torch.manual_seed(0)
    model = lq.attach(nn.Sequential(Masks(8, 8)), 4, first_last=None)
    found = lq.compare(model, [torch.randn(8, 8)])
    assert 10 < found.layers[0].alone.sqnr < 40
    assert "NaN or Inf do not count, some of 0 are" in found.notes[0]


def test_what_it_needs():
    model, x = mlp()
    with pytest.raises(DataError, match="lq.compare got no batches: the loader is empty"):
        lq.compare(model, [])
    with pytest.raises(StateError, match="lq.compare needs a model with quantizers"):
        lq.compare(nn.Linear(2, 2), [x])
    bare = lq.attach(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 4, 4, first_last=None)
    with pytest.raises(StateError, match="needs calibrated quantizers"):
        lq.compare(bare, [x])


def test_layers_that_calibration_did_not_reach():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    x = torch.randn(4, 8)
    lq.attach(model, 4, 4, first_last=None)
    with pytest.warns(NoEffectWarning, match="never seen"):
        lq.calibrate(model, [x], forward=lambda m, x: m["a"](x))
    found = lq.compare(model, [x], forward=lambda m, x: m["a"](x))
    assert [layer.name for layer in found.layers] == ["a"]
    assert found.notes == ("not reached by these batches: b",)


def test_the_model_may_be_one_layer():
    torch.manual_seed(0)
    model = lq.attach(nn.Linear(8, 8), 4, first_last=None)
    found = lq.compare(model, [torch.randn(4, 8)])
    assert found.layers[0].name == "" and "(model)" in str(found)
    assert found.layers[0].together == found.network


def test_attention_by_name():
    model, x = quantized("block", 8, 8, overrides={"attn.matmul_1": {"activations": 2}})
    fused = lq.compare(model, [x])
    assert fused.layers[0].name == "attn.matmul_1" and fused.layers[0].kind == "attention"
    assert len(fused.layers[0].parts) == 4
    model, x = quantized("unfused block", 8, 8, overrides={"attn.matmul_1": {"activations": 2}})
    unfused = lq.compare(model, [x])
    assert unfused.layers[0].name == "attn.matmul_1" and unfused.layers[0].kind == "matmul"
    assert len(unfused["attn.matmul_0"].parts) == 2
    assert set(EXAMPLES)  # both are among the models of `test_any_model`


def test_images_of_one_sample():
    model, _ = quantized("residual")
    assert lq.compare(model, [images()[:1]]).samples == 1

"""What a unit is fitted to beside its outputs: inner outputs that are held, and weights of the loss."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.float_models import float_copy
from lq.attachment.sites import weight_quantizer
from lq.reconstruction import FisherLoss
from lq.reconstruction.engine import _order, fit_unit
from lq.reconstruction.problem import InnerOutputs, Problem
from lq.reconstruction.rounding import AdaRound, AnnealingSoftmax, Nearest, Rounding
from tests.reconstruction.fitting import Unit, method, unit_quantizers
from tests.reconstruction.networks import ResNet, Work, quantized, samples


def test_regularization_adds_the_differences_of_blocks():
    """The loss and the gradient of the whole network with its blocks held, by hand, on float activations."""
    torch.manual_seed(0)
    model, data = ResNet(2).eval(), [samples((3, 8, 8), 6)]
    quantized(model, data, 3, None).requires_grad_(False)
    work = Work(model, data, "network")
    names = ["blocks.0", "blocks.1"]
    pairs = [(model.get_submodule(name), work.twin.get_submodule(name)) for name in names]
    inputs, float_inputs = work.quantized.inputs(0), work.whole.inputs(0)
    targets = work.whole.finish(0, float_inputs)
    modules = work.units[0].bind(model)
    inner = InnerOutputs(work.units[0].bind(work.twin), pairs)
    taken = {}

    class Watched(Rounding):
        """AdaRound whose gradient is kept."""

        lr = 0.01

        def begin(self, grid):
            taken["learned"] = AdaRound(penalty=0).begin(grid)
            taken["v"] = taken["learned"].v.detach().clone() + 0.3
            with torch.no_grad():
                taken["learned"].v.copy_(taken["v"])
            return taken["learned"]

    quantizers = unit_quantizers(model, modules)
    fit_unit(
        Problem("", modules, quantizers, inputs, float_inputs, targets, inner=inner),
        method(rounding=Watched(), regularization=0.7, iterations=1, batch_size=6),
        seed=0,
    )
    found = taken["learned"].v.grad
    v = taken["v"].clone().requires_grad_()
    fresh = ResNet(2).eval()
    fresh.load_state_dict(work.twin.state_dict())
    fresh.requires_grad_(False)
    start, soft = 0, {}
    for name, layer in fresh.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)):
            continue
        quantizer = weight_quantizer(model.get_submodule(name))
        weight = layer.weight
        part = v[start : start + weight.numel()].view(weight.shape)
        start += weight.numel()
        step = quantizer.step.view(-1, *[1] * (weight.ndim - 1))
        h = (1.2 * part.sigmoid() - 0.1).clamp(0, 1)
        soft[f"{name}.weight"] = ((weight / step).floor() + h).clamp(-4, 3) * step
    x = data[0]

    def run(weights):
        return torch.func.functional_call(fresh, weights, (x,))

    outputs = []
    handles = [
        fresh.get_submodule(name).register_forward_hook(lambda m, a, out: outputs.append(out.clone())) for name in names
    ]
    with torch.no_grad():
        target = run({})
    floats, outputs[:] = list(outputs), []
    loss = (run(soft) - target).square().sum(1).mean()
    for a, b in zip(outputs, floats, strict=True):
        loss = loss + 0.7 * (a - b).square().sum(1).mean()
    for handle in handles:
        handle.remove()
    (expected,) = torch.autograd.grad(loss, v)
    assert start == found.numel() and expected.abs().sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_regularization_compares_blocks_of_the_network():
    """Through `lq.reconstruct`: the curve is the larger for it, and what is held comes nearer."""
    distances, curves = [], []
    for regularization in (0.0, 3.0):
        torch.manual_seed(3)
        model, data = ResNet(2).eval(), [samples((3, 8, 8), 16)]
        quantized(model, data, 2, None)
        twin = float_copy(model)
        found = lq.reconstruct(
            model,
            data,
            units="network",
            rounding=AnnealingSoftmax(lr=0.02),
            drop=0.0,
            iterations=200,
            batch_size=16,
            regularization=regularization,
        )
        curves.append(found.units[0].curve)
        with torch.no_grad():
            x = model.act(model.stem(data[0])), twin.act(twin.stem(data[0]))
            distances.append((model.blocks[0](x[0]) - twin.blocks[0](x[1])).square().mean().item())
    assert distances[1] < 0.8 * distances[0]
    assert min(curves[1]) > min(curves[0])


def test_fisher_weights_reach_the_loss():
    unit = Unit()
    weights = torch.rand(24, 3)
    unit.problem.loss_weights = type(unit.targets)(
        unit.work.storage.keep(weights), unit.targets.layout, torch.device("cpu"), torch.float32
    )
    seen = []

    def loss(output, target, given):
        seen.append(given.clone())
        return FisherLoss()(output, target, given)

    found = unit.fit(method(loss=loss, iterations=2, rounding=Nearest(), activation_mode="quantized", bias_lr=1e-9))
    assert torch.equal(torch.cat(seen[:3]), weights)
    order = _order(24, 2, 8, 0)
    assert torch.equal(seen[3], weights[order[0]]) and torch.equal(seen[4], weights[order[1]])
    with torch.no_grad():
        errors = (unit.model(unit.x) - unit.work.twin(unit.x)).square() * weights
    assert found.before == pytest.approx(errors.sum(1).mean().item(), rel=1e-4)

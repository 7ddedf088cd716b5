"""A unit with its data, ready to be fitted, and what is looked at afterwards."""

import torch
from torch import nn

from lq.attachment.sites import activation_quantizers, float_weight, weight_quantizer
from lq.reconstruction import Constant, LpLoss
from lq.reconstruction.engine import fit_unit
from lq.reconstruction.options import RunOptions
from lq.reconstruction.problem import Problem
from lq.reconstruction.quantized_model import QuantizedModel
from lq.reconstruction.quantizers import UnitQuantizers
from lq.reconstruction.rounding import AdaRound
from tests.reconstruction.networks import Work, quantized, samples

FAST = AdaRound(lr=0.05)


def method(**options):
    given = {"rounding": FAST, "loss": LpLoss(), "drop": Constant(0.0), "iterations": 20, "batch_size": 8}
    return RunOptions(**{**given, **options})


def unit_quantizers(model, modules, settled=frozenset()):
    return UnitQuantizers(QuantizedModel(model), modules, set(settled))


class Unit:
    """A unit with its data, ready to be fitted."""

    def __init__(self, model=None, shape=(8,), weights=2, activations=4, count=24, inputs=None, **options):
        torch.manual_seed(0)
        if model is None:
            model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
        data = list(samples(shape, count).split(8))
        self.model = quantized(model.eval(), data, weights, activations, **options).requires_grad_(False)
        self.work = Work(self.model, data, "network")
        self.modules = self.work.units[0].bind(self.model)
        self.quantizers = unit_quantizers(self.model, self.modules)
        ours, floats = self.work.quantized.inputs(0), self.work.whole.inputs(0)
        self.targets = self.work.whole.finish(0, floats)
        if inputs is not None:
            ours.leaves = [inputs(leaf, self.work.storage) if hasattr(leaf, "rows") else leaf for leaf in ours.leaves]
        self.problem = Problem("unit", self.modules, self.quantizers, ours, floats, self.targets)
        self.x = torch.cat(data)

    def fit(self, method, seed=0):
        return fit_unit(self.problem, method, seed=seed)

    def loss(self):
        """The squared error of the model as it is now, over all samples."""
        with torch.no_grad():
            errors = (self.model(self.x) - self.work.twin(self.x)).double().square()
        return errors.mean().item() * errors.shape[1 if errors.ndim == 4 else -1]

    def weights(self):
        return {n: p.clone() for n, p in self.model.named_parameters() if n.endswith("original")}

    def steps(self):
        return {name: (part.step.item(), part.zero_point.item()) for name, part in activations_of(self.model).items()}


def activations_of(model):
    return activation_quantizers(model)


def check_written(model):
    """Every weight is a level that rounding to the nearest leaves as it is."""
    for layer in model.modules():
        quantizer = weight_quantizer(layer)
        if quantizer is not None:
            weight = float_weight(layer)
            with torch.no_grad():
                assert torch.equal(quantizer(weight), weight)

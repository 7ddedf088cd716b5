"""Ranges of a unit's activations: those of the float network, unless what was there is better."""

import pytest

import lq
from lq.reconstruction.options import RunOptions
from lq.reconstruction.ranges import refit_ranges
from tests.reconstruction.fitting import Unit, activations_of, unit_quantizers


def test_ranges_are_refitted_to_those_of_the_float_network():
    unit = Unit(activations=4)
    for part in activations_of(unit.model).values():
        part.log2_step.fill_(5.0)
    refit_ranges(unit.problem, RunOptions(batch_size=8))
    fresh = Unit(activations=4)  # calibrated on the same samples, with float weights as calibration has them
    lq.calibrate(fresh.model, [fresh.x])
    same_weights = Unit(weights=16, activations=4)
    lq.calibrate(same_weights.model, [same_weights.x])
    for name, found in unit.steps().items():
        assert found == pytest.approx(same_weights.steps()[name], rel=2e-2)
    assert all(part.tap is None for part in unit.model.modules() if hasattr(part, "tap"))


def test_settled_quantizers_are_not_refitted():
    unit = Unit(activations=4)
    first = next(iter(activations_of(unit.model).values()))
    first.log2_step.fill_(5.0)
    unit.problem.quantizers = unit_quantizers(unit.model, unit.modules, {id(first)})
    refit_ranges(unit.problem, RunOptions(batch_size=8))
    assert first.log2_step.item() == 5.0

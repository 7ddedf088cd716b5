"""Ranges for other widths: fitted anew, or learned ones scaled as fitted ones are."""

import torch

from lq.attachment.sites import quantizers
from lq.calibration.refitting import change_widths, fit_ranges, fitted_steps
from tests.training.test_noise_scale import NAMES, network


def test_ranges_begin_at_those_of_the_target_with_two_bits_more():
    model, at_target = network(), network(3, first_last=None)
    fit_ranges(model, dict.fromkeys(NAMES, 3.0), 2.0)
    for mine, theirs in zip(quantizers(model), quantizers(at_target), strict=True):
        assert (mine.bits == 5).all()
        if mine.is_weight:
            levels, fewer = 2**5 - 1, 2**3 - 1
            torch.testing.assert_close(mine.step * levels, theirs.step * fewer)


def test_a_learned_step_keeps_its_ratio_to_the_fitted_one():
    module, lower = network(4), network(3)
    found = {q.name: q for q in quantizers(module)}
    fitted = fitted_steps(module, 4)
    with torch.no_grad():
        for quantizer in found.values():
            quantizer.log2_step.add_(0.3)
    widths = {q.name: q.bits.detach().clone() for q in quantizers(lower)}
    change_widths(module, widths, fitted)
    for theirs in quantizers(lower):
        site = found[theirs.name]
        if site.is_weight or site.bits < 8:  # what is seen of an activation depends on the weights before it
            fit_to = theirs.log2_step if site.is_weight else fitted[site.name][2]
            torch.testing.assert_close(site.log2_step, fit_to + 0.3)
        assert torch.equal(found[theirs.name].bits, theirs.bits)

"""Zero points that are learned: whole levels in the end, moved by shares of their range."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from lq.attachment.sites import quantizers
from lq.callbacks import FineTune
from tests.callbacks.training import quantize
from tests.helpers import QUIET, Tiny, fit, loader

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class Signed(Tiny):
    """Its activations have both signs."""

    def __init__(self):
        super().__init__()
        self.net[2] = self.net[5] = nn.GELU()


@pytest.mark.parametrize("rate", [1e-3, 10.0])
def test_zero_points_are_levels_and_whole_in_the_end(rate):
    torch.manual_seed(0)
    module = Signed()
    fit(module, [quantize(), FineTune("lsq_plus", quantizer_lr=rate)], max_epochs=2)
    sites = [q for q in quantizers(module) if not q.is_weight]
    assert len(sites) == 2
    for quantizer in sites:
        zero_point = quantizer.zero_point.detach()
        assert torch.equal(zero_point, zero_point.round()) and 1 <= zero_point <= 2 ** quantizer.bits.detach() - 1


def test_zero_points_move_by_shares_of_their_range():
    class Moves(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.begin = {q.name: q.zero_point.detach().clone() for q in quantizers(pl_module)}

        def on_train_batch_end(self, trainer, pl_module, *_):
            self.moved = {q.name: (q.zero_point.detach() - self.begin[q.name]).abs() for q in quantizers(pl_module)}

    torch.manual_seed(0)
    module, moves = Signed(), Moves()
    overrides = {"net.8": {"activations": 8}}
    fit(module, [quantize(overrides=overrides), FineTune("lsq_plus", quantizer_lr=1e-3), moves], loader(8))
    moved = [float(moves.moved[f"net.{i}.input"]) for i in (3, 8)]
    assert moved == pytest.approx([1e-3 * 2**4, 1e-3 * 2**8], rel=0.1)  # Adam's first update
    assert not any(moves.moved[q.name].any() for q in quantizers(module) if q.is_weight)

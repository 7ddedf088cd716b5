"""ReduceBits: widths come down one by one, learned steps with them, and resumed runs go on where they were."""

import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import lq
from lq.attachment.sites import quantizers
from lq.callbacks import FineTune, Quantize, ReduceBits
from tests.helpers import QUIET, assert_same, fit, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class Widths(pl.Callback):
    """The width of every quantizer after each step."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self.seen.append(self.of(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(self.of(pl_module))

    def of(self, module):
        return {q.name: sorted({*q.bits.detach().reshape(-1).tolist()}) for q in quantizers(module)}


def chain(*more, asked=2, start=4, until=0.5, estimator="lsq"):
    return [Quantize(asked, asked, fold_bn=False), ReduceBits(start, until), FineTune(estimator), *more]


@pytest.mark.parametrize(("start", "until"), [(4, 0.5), (3, 1.0), (8, 0.25)])
def test_widths_come_down_one_by_one(start, until):
    widths = Widths()
    fit(tiny(), chain(widths, start=start, until=until), max_epochs=4)
    inner = [seen["net.3.weight"] for seen in widths.seen]
    asked = [max(2, 2 + math.ceil((start - 2) * (1 - min(k / (until * 16), 1)) - 1e-6)) for k in range(17)]
    assert inner == [[float(b)] for b in asked]
    assert inner[0] == [start] and inner[-1] == [2] and inner == sorted(inner, reverse=True)
    assert [seen["net.3.input"] for seen in widths.seen] == inner
    assert all(seen["net.8.weight"] == [8.0] for seen in widths.seen)  # no less than the start: kept


def test_first_widths_are_those_of_a_calibration_at_them():
    ours, plain = tiny(), tiny()
    with pytest.warns(UserWarning, match="ReduceBits: the run ended before the widths asked for were reached"):
        fit(ours, chain(start=4)[:2], max_epochs=0)
    fit(plain, [Quantize(4, 4, fold_bn=False)], max_epochs=0)
    for mine, theirs in zip(quantizers(ours), quantizers(plain), strict=True):
        if mine.is_weight:  # activations were seen behind weights of two bits
            torch.testing.assert_close(mine.log2_step, theirs.log2_step)
        assert torch.equal(mine.bits, theirs.bits)


def test_pruned_channels_stay_pruned():
    spec, widths = lq.QuantSpec((0, 2, 4, 1), signed=True), Widths()
    overrides = {"net.3": {"weights": spec}}
    quantize = Quantize(2, 2, fold_bn=False, overrides=overrides)
    module = tiny()
    fit(module, [quantize, ReduceBits(3), FineTune(), widths], max_epochs=2)
    assert widths.seen[0]["net.3.weight"] == [0.0, 3.0, 4.0]
    last = {q.name: q.bits.tolist() for q in quantizers(module)}
    assert last["net.3.weight"] == [0.0, 2.0, 4.0, 1.0]


def test_averages_have_the_widths_of_the_module():
    module = tiny()
    fit(module, chain(EMAWeightAveraging(decay=0.9)), max_epochs=2)
    assert {b for q in quantizers(module) for b in q.bits.detach().reshape(-1).tolist()} == {2.0, 8.0}


@pytest.mark.parametrize("step", [2, 5, 11])
def test_resumed_run_equals_a_straight_one(tmp_path, step):
    def run(folder, seed, ckpt_path=None):
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        fit(tiny(seed), chain(saver), max_epochs=4, enable_checkpointing=True, ckpt_path=ckpt_path)
        return torch.load(tmp_path / folder / "step=16.ckpt", weights_only=True)

    straight = run("straight", 0)
    if step % 4:  # within an epoch only loaders with a state go on where they were
        half = torch.load(tmp_path / "straight" / f"step={step}.ckpt", weights_only=True)
        assert half["callbacks"]["ReduceBits"]["asked"]
    epoch = tmp_path / "straight" / f"step={4 * (step // 4 + 1)}.ckpt"
    resumed = run("resumed", 3, epoch)
    assert_same(resumed["state_dict"], straight["state_dict"])


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [({"start": 9}, "bits=9 is not a width"), ({"until": 0.0}, "until=0.0 is no share"), ({"until": 2.0}, "until=2.0")],
)
def test_wrong_arguments(kwargs, text):
    with pytest.raises(lq.SpecError, match=text):
        ReduceBits(**kwargs)


def test_without_an_end():
    with pytest.raises(lq.SpecError, match="ReduceBits needs the number of steps; set max_epochs or max_steps"):
        fit(tiny(), chain(), max_epochs=-1)


def test_without_quantize():
    with pytest.raises(lq.StateError, match="put the Quantize callback before this one"):
        fit(tiny(), [ReduceBits()])

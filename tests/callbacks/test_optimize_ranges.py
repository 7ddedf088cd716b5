import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import lq
from lq.attachment.sites import quantizers
from lq.calibration.loss_aware import OptimizedRanges, optimize_ranges
from lq.callbacks import AllocateBits, FineTune, Quantize
from lq.callbacks.optimize_ranges import OptimizeRanges
from lq.errors import DataError, SpecError, StateError
from tests.helpers import QUIET, Tiny, assert_same, fit, loader, run_on_ranks, steps, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def stages(evaluations=60, **kwargs):
    return [Quantize(3, 3, first_last=None), OptimizeRanges(evaluations=evaluations, **kwargs)]


def test_it_is_what_the_function_finds():
    module, callbacks = tiny(), stages(samples=16)
    fit(module, callbacks, max_epochs=0)
    again = tiny()
    fit(again, [Quantize(3, 3, first_last=None)], max_epochs=0)
    before = steps(again)
    found = optimize_ranges(again, list(loader())[:2], evaluations=60)
    assert callbacks[1].optimized == found
    assert found.after < found.before
    assert_same(steps(module), steps(again))
    assert any(not torch.equal(a, b) for a, b in zip(before, steps(again), strict=True))


def test_two_runs_are_the_same_and_random_states_are_left_alone():
    found = []
    for _ in range(2):
        module, callbacks = tiny(), stages()
        pl.seed_everything(3, verbose=False)
        fit(module, callbacks, loader(shuffle=True), max_epochs=1)
        found.append((callbacks[1].optimized, dict(module.state_dict())))
    assert found[0][0] == found[1][0]
    assert_same(found[0][1], found[1][1])
    plain = tiny()
    pl.seed_everything(3, verbose=False)
    fit(plain, [Quantize(3, 3, first_last=None)], loader(shuffle=True), max_epochs=1)
    assert_same(plain.seen, module.seen)


def test_after_allocation_and_before_training():
    module, callback = tiny(), OptimizeRanges(evaluations=40)
    fit(module, [Quantize(8, 4), AllocateBits(3.0, granularity="channel"), callback, FineTune()], max_epochs=2)
    assert callback.optimized.after <= callback.optimized.before
    assert lq.summary(module).average_bits <= 3.0
    assert all(step.isfinite().all() for step in steps(module))


def test_a_resumed_run_does_nothing(tmp_path, monkeypatch):
    first, saving = tiny(), ModelCheckpoint(tmp_path, save_last=True)
    fit(first, [*stages(), saving], root=tmp_path, max_epochs=1, enable_checkpointing=True)
    found = steps(first)
    monkeypatch.setattr("lq.callbacks.optimize_ranges.optimize_ranges", None)
    again, callbacks = tiny(seed=5), stages()
    fit(again, callbacks, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert isinstance(callbacks[1].optimized, OptimizedRanges)
    assert_same(steps(again), found)
    fit(again, callbacks, max_epochs=0)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert_same(steps(lq.load(checkpoint, tiny(seed=7))), found)


def test_once_for_each_module():
    callbacks = stages()
    first, second = tiny(), tiny(seed=3)
    fit(first, callbacks, max_epochs=0)
    found, known = callbacks[1].optimized, steps(first)
    fit(first, callbacks, max_epochs=0)
    assert callbacks[1].optimized is found
    assert_same(steps(first), known)
    fit(second, callbacks, max_epochs=0)
    assert callbacks[1].optimized is not found


def test_ranges_of_a_checkpoint_without_a_search(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_last=True)
    fit(tiny(), [stages()[0], saving], root=tmp_path, enable_checkpointing=True)
    module, callbacks = tiny(seed=5), stages()
    fit(module, callbacks, max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert callbacks[1].optimized.after < callbacks[1].optimized.before


def test_averages_get_the_ranges():
    module, average = tiny(), EMAWeightAveraging(decay=0.5)
    copies = []

    class Look(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            copies.append((steps(average._average_model.module), steps(pl_module)))

    fit(module, [*stages(), average, Look()], max_epochs=1)
    assert_same(*copies[0])


def test_loggers_get_the_losses(tmp_path):
    logger = CSVLogger(tmp_path, name="run", version=0)
    fit(tiny(), stages(), max_epochs=1, logger=logger)
    text = (tmp_path / "run" / "version_0" / "metrics.csv").read_text()
    assert "ranges/loss_before" in text and "ranges/loss_after" in text


@pytest.mark.parametrize("loss", ["task", lambda output, batch: F.cross_entropy(output, batch[1])], ids=["task", "own"])
def test_other_losses(loss):
    module, callbacks = tiny(), stages(loss=loss)
    fit(module, callbacks, max_epochs=0)
    with torch.no_grad():
        x, y = loader().dataset.tensors
        assert callbacks[1].optimized.after == pytest.approx(float(F.cross_entropy(module.eval()(x), y)), rel=1e-3)


def test_batches_of_another_kind():
    class Named(Tiny):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return {"image": batch[0], "y": batch[1]}

        def training_step(self, batch, batch_idx):
            return super().training_step((batch["image"], batch["y"]), batch_idx)

    torch.manual_seed(0)
    module, named = Named(), lambda module, batch: module(batch["image"])
    callback = OptimizeRanges(evaluations=20, forward=named)
    fit(module, [Quantize(3, 3, first_last=None, forward=named), callback], max_epochs=0)
    plain, callbacks = tiny(), stages(20)
    fit(plain, callbacks, max_epochs=0)
    assert callback.optimized == callbacks[1].optimized


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision(precision):
    module, callbacks = tiny(), stages()
    fit(module, callbacks, max_epochs=1, precision=precision)
    assert callbacks[1].optimized.after <= callbacks[1].optimized.before
    assert all(q.log2_step.dtype == torch.float32 for q in quantizers(module))


def test_errors():
    with pytest.raises(SpecError, match="loss='mse' is unknown"):
        OptimizeRanges(loss="mse")
    with pytest.raises(SpecError, match="samples=0; the loss needs at least 1"):
        OptimizeRanges(samples=0)
    with pytest.raises(SpecError, match="evaluations=-2; give 0"):
        OptimizeRanges(evaluations=-2)
    with pytest.raises(StateError, match="OptimizeRanges needs a model with quantizers"):
        fit(tiny(), [OptimizeRanges()], max_epochs=0)
    with pytest.raises(StateError, match="OptimizeRanges needs calibrated quantizers; list Quantize before it"):
        fit(tiny(), [OptimizeRanges(), Quantize()], max_epochs=0)
    module = tiny()
    lq.calibrate(lq.attach(module, 3, 3), loader())
    with pytest.raises(DataError, match="loss='task' got a batch of"):
        fit(module, [OptimizeRanges(loss="task")], DataLoader(torch.randn(8, 1, 6, 6), 4), max_epochs=0)


SCRIPT = """
import sys

sys.path.insert(0, sys.argv[3])
import torch
from lq.callbacks import Quantize
from lq.callbacks.optimize_ranges import OptimizeRanges
from tests.helpers import dataset, fit, tiny
from torch.utils.data import DataLoader

torch.set_num_threads(1)
ranks, out = int(sys.argv[1]), sys.argv[2]
options = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
module, callback = tiny(), OptimizeRanges(samples=32, evaluations=30)
callbacks = [Quantize(3, 3, first_last=None, calibration_samples=32), callback]
made = fit(module, callbacks, DataLoader(dataset(32), batch_size=16 // ranks), max_epochs=0, **options)
saved = {"state": module.state_dict(), "found": callback.state_dict()["optimized"]}
torch.save(saved, f"{out}/{ranks}-{made.global_rank}.pt")
if ranks > 1:
    made.strategy.barrier()
    torch.distributed.destroy_process_group()  # its threads must end before the interpreter does
"""


def test_two_ranks_find_the_same_ranges_and_the_loss_of_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_on_ranks(script, 1, tmp_path)
    run_on_ranks(script, 2, tmp_path)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert_same(first, second)
    assert first["found"]["before"] == pytest.approx(one["found"]["before"], rel=1e-4)
    assert first["found"]["losses"] == pytest.approx(one["found"]["losses"], rel=1e-3)

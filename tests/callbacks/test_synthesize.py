"""SynthesizeData: Quantize calibrates without data, on any number of ranks, and a resumed run makes no images."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import is_attached, quantizers
from lq.calibration.synthesis import synthesize
from lq.callbacks import AllocateBits, Quantize
from lq.callbacks.synthesize import SynthesizeData
from lq.callbacks.trainer.data import BatchSource, first_batch, training_batches
from tests.helpers import QUIET, Tiny, assert_same, dataset, fit, hooks, loader, run_on_ranks, steps, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

SHAPE = (1, 6, 6)
FEW = {"samples": 16, "iterations": 3, "batch_size": 8}


class Untouchable:
    """A loader that nothing may ask for anything."""

    def __len__(self):
        raise RuntimeError("the loader was asked for its length")

    def __iter__(self):
        raise RuntimeError("the loader was read")


class Reader(pl.Callback):
    """Reads batches when fitting starts."""

    def __init__(self, samples):
        self.samples = samples

    def on_fit_start(self, trainer, pl_module):
        self.batches = list(training_batches(trainer, self.samples, "Reading"))


def trained(module=None):
    """A module whose BatchNorms have seen data."""
    module = module or tiny()
    for _ in range(30):
        module(dataset(64).tensors[0])
    return module


def synthetic(**options):
    return SynthesizeData(SHAPE, **{**FEW, **options})


@pytest.mark.filterwarnings("ignore:.*BatchNorms of Tiny were folded")  # by the first of two fits
@pytest.mark.parametrize("given", [(), ([],), (Untouchable(),)], ids=["no data", "empty", "any loader"])
def test_quantizes_without_touching_a_loader(given):
    module, made = trained(), trainer([synthetic(), Quantize(4, 4)], max_epochs=0)
    made.fit(module, *given)
    assert all(q.calibrated for q in quantizers(module))
    made.fit_loop.max_epochs = 1
    made.fit(module, loader())  # the stand-in for the loader is gone
    assert made.global_step == 4


@pytest.mark.parametrize(
    "options", [{}, {"overfit_batches": 1}, {"limit_train_batches": 0}, {"val_check_interval": 99}]
)
def test_options_of_the_trainer_that_look_at_the_loader(options):
    module = trained(tiny(scheduler=None if "limit_train_batches" in options else "onecycle"))
    made = trainer([synthetic(), Quantize(4, 4)], max_epochs=0, **options)
    made.fit(module, Untouchable(), loader())
    assert all(q.calibrated for q in quantizers(module))


def test_ranges_are_those_of_calibrate_on_the_same_images():
    module, source = trained(), synthetic()
    by_hand = copy.deepcopy(module)
    fit(module, [source, Quantize(4, 4, calibration_samples=16)], max_epochs=0)
    images = synthesize(by_hand, SHAPE, **FEW)
    assert torch.equal(source.images, images)
    lq.fold_batchnorm(by_hand)
    lq.attach(by_hand, 4, 4, structure=lq.inspect(by_hand, images[:2]))
    lq.calibrate(by_hand, images.split(8))
    assert_same(dict(module.state_dict()), dict(by_hand.state_dict()))


@pytest.mark.parametrize(("samples", "batches"), [(1, 1), (8, 1), (9, 2), (1000, 2)])
def test_stages_get_as_many_as_they_ask_for_and_there_are(samples, batches):
    reader, source = Reader(samples), synthetic()
    fit(trained(), [source, reader], max_epochs=0)
    assert_same(reader.batches, [[images] for images in source.images.split(8)][:batches])


def test_training_goes_on_with_the_users_data():
    module, reference = trained(), trained()
    pl.seed_everything(3, verbose=False)
    fit(module, [synthetic(), Quantize(8, 8)], loader(shuffle=True))
    pl.seed_everything(3, verbose=False)
    fit(reference, [], loader(shuffle=True))
    assert_same(module.seen, reference.seen)


@pytest.mark.parametrize("sensitivity", ["output_distortion", "model_fisher", "kl"])
def test_sensitivity_is_measured_on_the_same_images(sensitivity):
    module, source = trained(), synthetic(samples=24)
    allocate = AllocateBits("8x", sensitivity, samples=24)
    made = trainer([source, Quantize(8, 8), allocate], max_epochs=0)
    made.fit(module, Untouchable())
    assert allocate.allocated is not None


def test_two_samples_to_look_at_the_module_with():
    made, source = trainer([synthetic()]), synthetic()
    assert isinstance(source, BatchSource)
    (images,) = first_batch(made, tiny())
    assert images.shape == (2, *SHAPE)
    assert not torch.equal(images[0], images[1])


def test_shape_of_the_modules_example():
    module = trained()
    module.example_input_array = torch.zeros(1, *SHAPE)
    source = SynthesizeData(**FEW)
    fit(module, [source, Quantize()], max_epochs=0)
    assert source.images.shape == (16, *SHAPE)


def test_shape_that_nobody_tells():
    with pytest.raises(lq.SpecError, match=r"Tiny has no example_input_array that tells it; give it as in Synth"):
        fit(trained(), [SynthesizeData(**FEW), Quantize()], max_epochs=0)


def test_quantize_before_it():
    made = trainer([Quantize(), synthetic()], max_epochs=0)
    with pytest.raises(lq.StateError, match=r"list SynthesizeData before it in Trainer\(callbacks="):
        made.fit(trained(), loader())


def test_no_batchnorms():
    made = trainer([synthetic(), Quantize()], max_epochs=0)
    with pytest.raises(lq.StateError, match=r"SynthesizeData needs BatchNorms with running statistics, Tiny has none"):
        made.fit(tiny(norm=False), [])


def test_a_module_that_came_with_quantizers():
    module = lq.attach(trained(), 4, 4)
    with pytest.raises(lq.StateError, match=r"no float network to make images from: Tiny had quantizers already"):
        fit(module, [synthetic(), Reader(8)], max_epochs=0)


@pytest.mark.parametrize("name", ["samples", "iterations", "batch_size"])
def test_wrong_numbers(name):
    with pytest.raises(lq.SpecError, match=f"{name}=0; synthesis needs at least"):
        synthetic(**{name: 0})


class Late(Tiny):
    """Builds its layers in configure_model."""

    def __init__(self):
        super().__init__()
        self.made, self.net = self.net, None

    def configure_model(self):
        if self.net is None:
            self.net, self.made = self.made, None


class NoForward(Tiny):
    forward = pl.LightningModule.forward


@pytest.mark.parametrize("kind", [Late, NoForward])
def test_kinds_of_modules(kind):
    torch.manual_seed(0)
    module, source = kind(), synthetic()
    fit(module, [source, Quantize(4, 4)], max_epochs=0)
    assert source.images.shape == (16, *SHAPE)
    assert "configure_model" not in vars(module)
    reference = synthetic()
    fit(tiny(), [reference, Quantize(4, 4)], max_epochs=0)
    assert torch.equal(source.images, reference.images)


def test_no_trace():
    module, reference, source = trained(), trained(), synthetic()
    fit(module, [source, Quantize()], max_epochs=0)
    fit(reference, [Quantize()], max_epochs=0)
    assert hooks(module) == hooks(reference)
    assert list(module.state_dict()) == list(reference.state_dict())
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in reference.parameters()]
    assert not set(vars(module)) ^ set(vars(reference))
    assert source._copy is None


def test_random_state_is_left_alone():
    states = []
    for callbacks in ([], [synthetic(), Reader(16)]):
        torch.manual_seed(4)
        fit(trained(), callbacks, max_epochs=0, limit_train_batches=0)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


def test_second_fit_makes_no_others():
    module, source = trained(), synthetic()
    fit(module, [source, Quantize(4, 4)], max_epochs=0)
    images, ranges = source.images, steps(module)
    fit(module, [source, Quantize(4, 4)], max_epochs=0)
    assert source.images is images
    assert_same(steps(module), ranges)


def test_fast_dev_run():
    source = synthetic(iterations=10**9)
    fit(trained(), [source, Quantize(4, 4)], fast_dev_run=True)
    assert len(source.images) == 8


def saved(tmp_path, callbacks):
    module = trained()
    made = fit(module, [*callbacks, Quantize(4, 4)], max_epochs=0)
    made.save_checkpoint(tmp_path / "saved.ckpt")
    return module, str(tmp_path / "saved.ckpt")


def test_resumed_run_makes_none(tmp_path):
    module, path = saved(tmp_path, [synthetic()])
    resumed, source = tiny(seed=5), synthetic()
    fit(resumed, [source, Quantize(4, 4)], max_epochs=0, ckpt_path=path)
    assert source.images is None
    assert_same(dict(resumed.state_dict()), dict(module.state_dict()))


def test_resumed_run_makes_the_same_from_the_same_weights(tmp_path):
    first, again, reader = synthetic(), synthetic(), Reader(16)
    path = saved(tmp_path, [first])[1]
    fit(trained(), [again, Quantize(4, 4), reader], max_epochs=0, ckpt_path=path)
    assert torch.equal(again.images, first.images)


@pytest.mark.parametrize("callbacks", [[synthetic()], []], ids=["with", "without"])
def test_resumed_run_refuses_to_make_others_from_other_weights(tmp_path, callbacks):
    path = saved(tmp_path, callbacks)[1]
    with pytest.raises(lq.StateError, match=r"the checkpoint began with other weights than the module was built with"):
        fit(tiny(seed=5), [synthetic(), Quantize(4, 4), Reader(16)], max_epochs=0, ckpt_path=path)


def test_evaluating_needs_no_images():
    module, made = trained(), trainer([synthetic(), Quantize(4, 4)], max_epochs=0)
    made.fit(module)
    assert "test_loss" in made.test(module, loader(), verbose=False)[0]
    assert is_attached(module)
    assert not [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


SCRIPT = """
import sys

sys.path.insert(0, sys.argv[3])
import torch
from tests.callbacks.test_synthesize import quantized

torch.set_num_threads(1)
ranks, out = int(sys.argv[1]), sys.argv[2]
made, *found = quantized(devices=ranks, strategy="ddp")
torch.save(found, f"{out}/{made.global_rank}.pt")
made.strategy.barrier()
torch.distributed.destroy_process_group()  # its threads must end before the interpreter does
"""


def quantized(**options):
    """The Trainer, its rank's images and the module's state."""
    module, source = tiny(), synthetic(samples=24)
    made = trainer([source, Quantize(4, 4)], max_epochs=0, **options)
    made.fit(module)
    return made, source.images, dict(module.state_dict())


def test_two_ranks_make_and_calibrate_on_what_one_does(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    _, images, state = quantized()
    run_on_ranks(script, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert [len(images), len(first[0]), len(second[0])] == [24, 16, 8]
    assert torch.equal(torch.cat([first[0][:8], second[0], first[0][8:]]), images)
    assert_same(first[1], state)
    assert_same(second[1], state)

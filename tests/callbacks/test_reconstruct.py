"""Reconstruct in a Trainer: recipes, two in a row, with other callbacks, resumed, reported."""

import json

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

import lq
from lq.attachment.sites import activation_quantizers, float_weight, quantizers, weight_quantizer
from lq.callbacks import AllocateBits, FineTune, Quantize, Reconstruct
from lq.errors import SpecError, StateError
from lq.reconstruction import Reconstruction
from lq.reconstruction.rounding import AdaRound
from tests.helpers import QUIET, Tiny, assert_same, dataset, fit, hooks, loader, most_values_over_limit, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

FAST = AdaRound(lr=0.05)


def small(**options):
    return Reconstruct(**{"iterations": 20, "batch_size": 8, "samples": 32, "rounding": FAST, **options})


def quantize(**options):
    return Quantize(**{"weights": 2, "activations": 4, "first_last": None, "skip": True, "symmetric": False, **options})


def losses(callback):
    return [(unit.name, unit.before, unit.after) for unit in callback.reconstruction.units]


def check_levels(module):
    """Rounding the float weights changes nothing."""
    found = 0
    for layer in module.modules():
        quantizer = weight_quantizer(layer)
        if quantizer is not None:
            with torch.no_grad():
                assert torch.equal(quantizer(float_weight(layer)), float_weight(layer))
            found += 1
    assert found == 3


RECIPES = ["qdrop", "adaround", "brecq", "mrecg_modcap", "mrecg_loss", "nwq"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_without_training(name):
    module = tiny()
    callbacks = lq.recipe(name, iterations=20)
    for callback in callbacks:
        if isinstance(callback, Reconstruct):
            callback.search_iterations = 5
            callback.rounding = FAST if callback.rounding == "adaround" else callback.rounding
    fit(module, callbacks, max_epochs=0)
    ours = [callback for callback in callbacks if isinstance(callback, Reconstruct)]
    assert len(ours) == (2 if name == "brecq" else 1)
    for callback in ours:
        assert callback.reconstruction is not None and callback._teacher is None
        assert all(after <= before for _, before, after in losses(callback))
        assert (callback.reconstruction.merges is not None) == name.startswith("mrecg")
    check_levels(module)
    assert most_values_over_limit(module.eval()) <= 1


def test_it_is_what_the_function_does():
    module, callback = tiny(), small(units="layer", seed=3)
    fit(module, [quantize(), callback], max_epochs=0)
    again = tiny()
    fit(again, [quantize()], max_epochs=0)
    report = lq.reconstruct(
        again, loader(), units="layer", rounding=FAST, iterations=20, batch_size=8, seed=3, drop=0.5
    )
    assert [(u.name, u.before, u.after) for u in report.units] == losses(callback)
    assert_same(dict(module.state_dict()), dict(again.state_dict()))


def test_it_needs_no_more_samples_than_asked():
    seen = []

    class Watched(torch.utils.data.TensorDataset):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    data = DataLoader(Watched(*dataset(64).tensors), batch_size=8)
    fit(tiny(), [quantize(calibration_samples=8), small(samples=20, iterations=1)], data, max_epochs=0)
    assert max(seen) == 23


class Teachers(Reconstruct):
    """Notes what its float network gives."""

    def _reconstruct(self, trainer, module):
        super()._reconstruct(trainer, module)
        with torch.no_grad():
            self.given = self._teacher(dataset().tensors[0])


def test_two_in_a_row_aim_at_the_same_float_network():
    module = tiny().eval()
    lq.fold_batchnorm(module)
    x = dataset().tensors[0]
    with torch.no_grad():
        expected = module(x)
    first, second = (
        Teachers(rounding=r, activation_mode=a, drop=0.0, iterations=10, batch_size=8, samples=32)
        for r, a in ((FAST, "float"), ("nearest", "learned"))
    )
    fit(module, [quantize(), first, second], max_epochs=0)
    torch.testing.assert_close(first.given, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(first.given, second.given)
    assert first._teacher is None and second._teacher is None
    check_levels(module)


def test_the_second_keeps_what_the_first_has_rounded():
    states = []
    for callbacks in ([small(drop=0.0, activation_mode="float")], [small(drop=0.0, activation_mode="float"), None]):
        module = tiny()
        made = [c or small(rounding="nearest", drop=0.0, step_lr=0.05) for c in callbacks]
        fit(module, [quantize(), *made], max_epochs=0)
        states.append({k: v for k, v in module.state_dict().items() if k.endswith("original")})
        steps = {n: q.step.item() for n, q in activation_quantizers(module).items()}
    assert_same(*states)
    assert steps


def test_training_goes_on_from_it():
    module, callback = tiny(), small()
    fit(module, [quantize(), callback, FineTune()], max_epochs=2)
    assert callback.reconstruction is not None and callback._teacher is None
    assert len(module.seen) == 8
    assert most_values_over_limit(module.eval()) <= 1


def test_at_the_end_of_training():
    module, callback, without = tiny(), small(when="end"), tiny()
    fit(without, [quantize(), FineTune()], max_epochs=1)
    fit(module, [quantize(), FineTune(), callback], max_epochs=1)
    assert_same(module.seen, without.seen)
    check_levels(module)
    changed = [
        name
        for name, value in without.state_dict().items()
        if name.endswith("original") and not torch.equal(value, module.state_dict()[name])
    ]
    assert len(changed) == 3
    assert all(after <= before for _, before, after in losses(callback))
    assert all(p.requires_grad for n, p in module.named_parameters() if n.endswith("original"))


def test_a_resumed_run_reconstructs_nothing(tmp_path):
    first, saving = tiny(), ModelCheckpoint(tmp_path, save_last=True)
    callback = small()
    fit(first, [quantize(), callback, saving], root=tmp_path, max_epochs=1, enable_checkpointing=True)
    again, other = tiny(seed=5), small()
    made = trainer([quantize(), other], max_epochs=1)
    made.fit(again, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert losses(other) == losses(callback)
    assert_same(dict(again.state_dict()), dict(first.state_dict()))
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    saved = Reconstruction.from_json(checkpoint["callbacks"][callback.state_key]["reconstruction"])
    assert [u.name for u in saved.units] == [name for name, _, _ in losses(callback)]


def test_another_module_is_reconstructed_too():
    callback, first, second = small(), tiny(), tiny(seed=3)
    fit(first, [quantize(), callback], max_epochs=0)
    report = callback.reconstruction
    fit(first, [quantize(), callback], max_epochs=0)
    assert callback.reconstruction is report
    fit(second, [quantize(), callback], max_epochs=0)
    assert callback.reconstruction is not report
    check_levels(second)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_allocated_widths_are_kept(granularity):
    module, allocate = tiny(), AllocateBits("8x", granularity=granularity)
    callbacks = [Quantize(8, 8, first_last=None), allocate, small(rounding=AdaRound(lr=0.05))]
    fit(module, callbacks, max_epochs=0)
    for layer, bits in allocate.allocated.weights.items():
        part = module.get_submodule(layer)
        weight = float_weight(part).detach()
        widths = torch.as_tensor(bits).expand(len(weight)).tolist()
        assert weight_quantizer(part).bits.expand(len(weight)).tolist() == widths
        for row, width in zip(weight, widths, strict=True):
            assert row.unique().numel() <= 2 ** int(width)
            assert width > 0 or not row.any()
    check_levels(module)
    if granularity == "channel":
        assert (
            len({int(b) for bits in allocate.allocated.weights.values() for b in torch.as_tensor(bits).flatten()}) > 1
        )


def test_fast_dev_run(tmp_path):
    module, callback = tiny(), small(iterations=10**9, search_iterations=10**9, units="mixed", metric="loss", merges=1)
    callback.resume = tmp_path / "progress.pt"
    fit(module, [quantize(), callback], fast_dev_run=True, root=tmp_path)
    assert {unit.iterations for unit in callback.reconstruction.units} == {1}
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    path = tmp_path / "progress.pt"
    whole = tiny()
    fit(whole, brecq(), max_epochs=0)
    import lq.callbacks.reconstruct as source

    shown = []

    def dying(trainer, steps, name):
        shown.append(name)
        if len(shown) == dies:
            raise InterruptedError
        return steps

    monkeypatch.setattr(source, "_shown", dying)
    for dies in (2, 5, 99):  # in the second unit, in the third of the second callback, never
        shown.clear()
        module = tiny()
        callbacks = brecq(resume=str(path))
        if dies < 99:
            with pytest.raises(InterruptedError):
                fit(module, callbacks, max_epochs=0)
        else:
            fit(module, callbacks, max_epochs=0)
            assert len(shown) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["progress-2.pt", "progress.pt"]
    assert_same(dict(module.state_dict()), dict(whole.state_dict()))


def brecq(**options):
    return [
        quantize(),
        small(units="layer", drop=0.0, activation_mode="float", iterations=5, **options),
        small(units="layer", drop=0.0, rounding="nearest", iterations=5, **options),
    ]


# --- reports -----------------------------------------------------------------------------------------------------


def test_the_log_folder_gets_a_report_and_a_plot_and_loggers_the_losses(tmp_path):
    pytest.importorskip("matplotlib")
    logger = CSVLogger(tmp_path, name="run", version=0)
    callback = small()
    fit(tiny(), [quantize(), callback], max_epochs=1, logger=logger)
    folder = tmp_path / "run" / "version_0"
    saved = Reconstruction.from_json((folder / "reconstruction.json").read_text())
    assert [(u.name, u.before, u.after) for u in saved.units] == losses(callback)
    assert (folder / "reconstruction.png").read_bytes()[:4] == b"\x89PNG"
    text = (folder / "metrics.csv").read_text()
    assert "reconstruction/loss_before" in text and "reconstruction/loss_after" in text
    assert not list(folder.glob("*unfinished*"))


def test_a_path_of_its_own_and_no_plot_without_matplotlib(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("no module named matplotlib")

    monkeypatch.setattr(Reconstruction, "plot", missing)
    path = tmp_path / "deep" / "found.json"
    fit(tiny(), [quantize(), small(save_to=path)], max_epochs=0)
    assert [p.name for p in path.parent.iterdir()] == ["found.json"]
    assert json.loads(path.read_text())["merges"] is None


def test_nothing_is_written_where_the_trainer_keeps_nothing(tmp_path):
    fit(tiny(), [quantize(), small()], max_epochs=0, root=tmp_path)
    assert not list(tmp_path.iterdir())


# --- traces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_callers_random_state_and_batches_are_left_alone(name):
    found = []
    for with_it in (False, True):
        module = tiny()
        callbacks = lq.recipe(name, iterations=2)
        for callback in callbacks:
            callback.search_iterations = 2
        pl.seed_everything(7, verbose=False)
        fit(module, callbacks if with_it else callbacks[:1], loader(shuffle=True), max_epochs=1)
        found.append((module.seen, torch.get_rng_state()))
    assert_same(*found)


def test_by_seed():
    states = []
    for seed, around in ((0, 1), (0, 2), (4, 1)):
        pl.seed_everything(around, verbose=False)
        module, callback = tiny(), small(seed=seed, iterations=5)
        fit(module, [quantize(), callback], max_epochs=0)
        states.append((dict(module.state_dict()), [list(u.curve) for u in callback.reconstruction.units]))
    assert_same(states[0], states[1])
    assert states[0][1] != states[2][1]


def test_no_trace_on_the_module():
    module, reference = tiny(), tiny()
    fit(module, [quantize(), small(units="network", regularization=1.0)], max_epochs=0)
    fit(reference, [quantize()], max_epochs=0)
    assert hooks(module) == hooks(reference)
    assert set(vars(module)) == set(vars(reference))
    assert [n for n, m in module.named_modules() if "forward" in vars(m)] == [
        n for n, m in reference.named_modules() if "forward" in vars(m)
    ]
    grads = [{n: (p.requires_grad, p.grad is None) for n, p in m.named_parameters()} for m in (module, reference)]
    assert grads[0] == grads[1]
    assert all(q.tap is None for q in quantizers(module))


# --- averages ----------------------------------------------------------------------------------------------------


def test_averages_start_from_what_was_reconstructed():
    class Kept(EMAWeightAveraging):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self.start = {k: v.clone() for k, v in self._average_model.module.state_dict().items()}
            self.model = {k: v.clone() for k, v in pl_module.state_dict().items()}

    module, averages = tiny(), Kept(decay=0.9)
    fit(module, [quantize(), small(), averages], max_epochs=1)
    assert_same(averages.start, averages.model)


class Wrapped(Tiny):
    """A module that calls its network "module"."""

    def __init__(self):
        super().__init__()
        self.module = self.net
        del self.net

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("make", [tiny, Wrapped], ids=["net", "module"])
def test_stochastic_weight_averaging(make):
    module = make()
    callbacks = [quantize(fold_bn=False), small(), StochasticWeightAveraging(0.01, swa_epoch_start=1)]
    fit(module, callbacks, max_epochs=3)
    assert most_values_over_limit(module.eval()) <= 1


# --- options and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision(precision):
    module, callback = tiny(), small()
    fit(module, [quantize(), callback], max_epochs=1, precision=precision)
    assert any(after < before for _, before, after in losses(callback))
    assert most_values_over_limit(module.eval()) <= 1


def test_batches_that_only_the_module_understands():
    class Odd(Tiny):
        def calibration_step(self, batch):
            return self(batch["image"])

        def training_step(self, batch, batch_idx):
            return self(batch["image"]).square().mean()

    torch.manual_seed(0)
    data = DataLoader([{"image": x} for x in dataset().tensors[0]], batch_size=8)
    module, callback = Odd(), small(iterations=3)
    fit(module, [quantize(), callback], data, max_epochs=0)
    check_levels(module)


def test_a_module_without_a_forward():
    class Bare(Tiny):
        forward = pl.LightningModule.forward

        def training_step(self, batch, batch_idx):
            return self.net(batch[0]).square().mean()

    torch.manual_seed(0)
    for units in ("block", "network"):
        module, callback = Bare(), small(iterations=3, units=units)
        fit(module, [quantize(), callback], max_epochs=0)
        check_levels(module)


@pytest.mark.filterwarnings("ignore:1 of 3 activations were never seen")  # of a layer that is not used
def test_a_frozen_backbone():
    """As in examples of transfer learning: features without gradients."""

    class Transfer(Tiny):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            with torch.no_grad():
                x = self.net[:6](x).mean((2, 3))
            return self.head(x)

    torch.manual_seed(0)
    module, callback = Transfer(), small(iterations=20, drop=0.0)
    fit(module, [quantize(), callback], max_epochs=0)
    assert callback.reconstruction.units[-1].name == "head"
    assert callback.reconstruction.units[-1].after > 0
    torch.manual_seed(0)
    twin = Transfer().eval()
    with torch.no_grad():
        error = (module.eval()(dataset().tensors[0]) - twin(dataset().tensors[0])).square().sum(1).mean().item()
    assert callback.reconstruction.units[-1].after == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, "rounding='up' is unknown; use 'nearest', 'adaround', 'softmax'"),
        ({"loss": "l2"}, "loss='l2' is unknown; use 'relative', 'mse', 'fisher', 'kl'"),
        ({"drop": 1.5}, "drop=1.5 is no probability"),
        ({"memory": "8x"}, "memory='8x'; give a number of bytes or a size such as '4GB'"),
        ({"dtype": "int8"}, "dtype='int8' is unknown"),
        ({"when": "middle"}, r"when='middle' is unknown; use one of \('start', 'end'\)"),
        ({"iterations": 0}, "iterations=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"samples": 0}, "samples=0 must be at least 1"),
        ({"activation_mode": "fixed"}, "activation_mode='fixed' is unknown"),
        ({"units": "blocks"}, "units='blocks' is unknown"),
        ({"metric": "size"}, "metric='size' is unknown"),
        ({"merges": 0}, "merges=0 must be at least 1"),
        ({"search_iterations": 0}, "search_iterations=0 must be at least 1"),
        ({"step_lr": -1.0}, "step_lr=-1.0 must be positive"),
    ],
)
def test_wrong_arguments_fail_at_once(options, message):
    with pytest.raises(SpecError, match=message):
        Reconstruct(**options)


def test_wrong_orders():
    with pytest.raises(StateError, match="Reconstruct needs a model with quantizers"):
        fit(tiny(), [small()], max_epochs=0)
    with pytest.raises(StateError, match="Reconstruct needs calibrated quantizers; list Quantize before it in Trainer"):
        fit(tiny(), [small(), quantize()], max_epochs=0)


def test_names_in_a_checkpoint_tell_two_of_them_apart():
    keys = {
        small(**options).state_key for options in ({}, {"activation_mode": "float"}, {"when": "end"}, {"units": ["a"]})
    }
    assert len(keys) == 4

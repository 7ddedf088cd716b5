"""ExportModel in a Trainer: the file holds what fit left, in all three formats, and training is what it is without."""

import json

import lightning.pytorch as pl
import onnx
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
from torch import nn

import lq
from lq.attachment.sites import quantizers
from lq.callbacks import ExportModel, FineTune, LearnNoiseScale, Quantize, Reconstruct
from lq.callbacks.export import network
from lq.errors import DataError, SpecError, StateError
from tests.callbacks.exporting import check, of, outputs, x
from tests.export.exported import assert_close, dynamic, run
from tests.helpers import QUIET, Tiny, assert_same, fit, hooks, loader, tiny, trainer
from tests.models import Residual

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


CHAINS = {
    "post-training": (lambda: [Quantize(4, 8)], 0),
    "no epoch of training": (lambda: [Quantize(4, 8), FineTune("lsq")], 0),
    "fine-tuned": (lambda: [Quantize(4, 4, fold_bn=False), FineTune("lsq")], 1),
    "reconstructed": (lambda: [Quantize(4, 8), Reconstruct(iterations=3, batch_size=8, samples=16)], 0),
}


@pytest.mark.parametrize(
    ("chain", "suffix"),
    [*((c, s) for c in CHAINS for s in (".pt2", ".safetensors")), ("post-training", ".onnx"), ("fine-tuned", ".onnx")],
)
def test_the_file_holds_what_fit_left(chain, suffix, tmp_path):
    callbacks, epochs = CHAINS[chain]
    module, path = tiny(), tmp_path / "folder" / "of files" / f"model{suffix}"
    export = ExportModel(path)
    fit(module, [*callbacks(), export], max_epochs=epochs)
    check(path, module)
    names = [path.name, *(["model.report.json"] if suffix == ".onnx" else [])]
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(names)
    if suffix == ".onnx":
        assert export.report.samples == 32 and export.report.path == str(path)
        assert json.loads(path.with_name("model.report.json").read_text())["samples"] == 32
        assert dynamic(path)
    else:
        assert export.report is None


def test_a_packed_file_has_the_widths_that_were_learned(tmp_path):
    module, path = tiny(), tmp_path / "m.safetensors"
    learn = LearnNoiseScale(3, 3, until=0.5, quantizer_lr=1e-3, distill=0)
    fit(module, [Quantize(8, 8, fold_bn=False), learn, ExportModel(str(path))], max_epochs=2)
    check(path, module)
    loaded = lq.load(path, tiny(5).net)
    assert [q.bits.tolist() for q in quantizers(loaded)] == [q.bits.tolist() for q in quantizers(module)]


def test_it_may_stand_before_quantize(tmp_path):
    module = tiny()
    fit(module, [ExportModel(tmp_path / "m.pt2"), Quantize(4, 8)], max_epochs=0)
    check(tmp_path / "m.pt2", module)


def test_two_of_them_and_samples(tmp_path):
    module = tiny()
    few, packed = ExportModel(tmp_path / "m.onnx", samples=9), ExportModel(tmp_path / "m.safetensors")
    fit(module, [Quantize(4, 8), few, packed], max_epochs=0)
    assert few.report.samples == 16  # whole batches
    check(tmp_path / "m.onnx", module), check(tmp_path / "m.safetensors", module)


def test_opset(tmp_path):
    module, export = tiny(), ExportModel(tmp_path / "m.onnx", opset=22)
    fit(module, [Quantize(2, 8, first_last=None), export], max_epochs=0)
    assert export.report.opset == onnx.load(tmp_path / "m.onnx").opset_import[0].version == 22
    assert export.report.weights == {"int4": 228}


class Summing(Tiny):
    """Residual sums in the network's own forward."""

    def __init__(self):
        super().__init__()
        self.net = Residual()

    def forward(self, x):
        return self.net(x.expand(-1, 3, -1, -1)).mean((2, 3)).repeat(1, 2)


def test_networks_for_integer_kernels(tmp_path):
    module, export = of(Summing), ExportModel(tmp_path / "m.onnx")
    fit(module, [Quantize(8, 8, integer=True), FineTune("lsq"), export], max_epochs=1)
    assert export.report.samples == 32
    given = x().expand(-1, 3, -1, -1)
    with torch.no_grad():
        assert_close(run(tmp_path / "m.onnx", given)[0], module.net.eval()(given), 1e-3)


# --- averages, compiled networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: EMAWeightAveraging(decay=0.9), WeightAveraging], ids=["ema", "average"])
@pytest.mark.parametrize(("suffix", "last"), [(".safetensors", True), (".safetensors", False), (".pt2", True)])
def test_averaged_weights_are_exported(make, suffix, last, tmp_path):
    module, path, plain = tiny(norm=False), tmp_path / f"m{suffix}", tiny(norm=False)
    chain = [Quantize(4, 4), FineTune("lsq")]
    extra = [make(), ExportModel(path)]
    fit(module, [*chain, *(extra if last else reversed(extra))], max_epochs=2)
    check(path, module, lambda: tiny(5, norm=False).net)
    fit(plain, [Quantize(4, 4), FineTune("lsq")], max_epochs=2)
    with torch.no_grad():
        found = outputs(path, x(), tiny(5, norm=False).net)
        assert not torch.allclose(found, plain.net.eval()(x()), rtol=1e-4)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
def test_trainers_of_other_types(precision, suffix, tmp_path):
    """ONNX files compute in float32, and say so; the others are the module to the bit."""
    module, path = tiny(), tmp_path / f"m{suffix}"
    export = ExportModel(path)
    fit(module, [Quantize(4, 8), export], max_epochs=1, precision=precision)
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float64
    given = next(iter(loader()))[0]
    assert module.net[0].bias.dtype == dtype
    with torch.no_grad():
        expected = module.net.eval()(given.to(dtype))
        if suffix == ".onnx":
            found = torch.from_numpy(run(path, given)[0])
            assert any("the file computes in float32" in note for note in export.report.notes)
            assert (found - expected).abs().max() < 0.05 * expected.abs().max()
        elif suffix == ".pt2":
            assert torch.equal(torch.export.load(path).module()(given.to(dtype)), expected)
        else:
            assert torch.equal(lq.load(path, tiny(5).net.to(dtype)).eval()(given.to(dtype)), expected)


def compiled(**options):
    module = tiny()
    module.net = torch.compile(module.net, backend="eager")
    return module


def test_the_network_behind_torch_compile(tmp_path):
    module, path = compiled(), tmp_path / "m.pt2"
    assert network(module, None) is module.net._orig_mod
    packed = tmp_path / "m.safetensors"
    fit(module, [Quantize(4, 8), FineTune("lsq"), ExportModel(path), ExportModel(packed)], max_epochs=1)
    with torch.no_grad():
        expected = module.net._orig_mod.eval()(x())
        assert torch.equal(torch.export.load(path).module()(x()), expected)
        assert torch.equal(lq.load(packed, tiny(5).net).eval()(x()), expected)


def test_a_named_network_behind_torch_compile(tmp_path):
    module, path = compiled(), tmp_path / "m.safetensors"
    fit(module, [Quantize(4, 8), ExportModel(path, part="net")], max_epochs=0)
    with torch.no_grad():
        assert torch.equal(lq.load(path, tiny(5).net).eval()(x()), module.net._orig_mod.eval()(x()))


# --- what it does not touch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".onnx", ".pt2", ".safetensors"])
def test_training_is_what_it_is_without(suffix, tmp_path):
    """To the bit: weights, checkpoints and random states. The ONNX export rounds biases, when all is over."""

    def train(folder, *extra):
        torch.manual_seed(3)
        module = tiny()
        module.net.insert(6, nn.Dropout(0.2))
        torch.manual_seed(4)
        saver = ModelCheckpoint(tmp_path / folder, save_last=True)
        callbacks = [Quantize(4, 4, fold_bn=False), FineTune("lsq"), saver, *extra]
        fit(module, callbacks, loader(shuffle=True), max_epochs=2, enable_checkpointing=True)
        saved = torch.load(tmp_path / folder / "last.ckpt", weights_only=False)
        return module, saved["state_dict"], torch.get_rng_state(), [x.clone() for x in module.seen]

    plain, states, rng, seen = train("without")
    module, states_with, rng_with, seen_with = train("with", ExportModel(tmp_path / f"m{suffix}"))
    assert_same(states_with, states)
    assert_same(seen_with, seen)
    assert torch.equal(rng_with, rng)
    moved = {k for k, v in module.state_dict().items() if not torch.equal(v, plain.state_dict()[k])}
    assert all(suffix == ".onnx" and name.endswith("bias") for name in moved)
    assert hooks(module) == hooks(plain)
    assert module.training == plain.training


def test_checkpoints_know_nothing_of_it(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    callbacks = [Quantize(4, 8), FineTune("lsq"), saver]
    fit(tiny(), [*callbacks, ExportModel(tmp_path / "m.pt2")], max_epochs=1, enable_checkpointing=True)
    module = tiny(3)
    fit(
        module,
        [Quantize(4, 8), FineTune("lsq"), ExportModel(tmp_path / "n.pt2")],
        max_epochs=1,
        ckpt_path=tmp_path / "last.ckpt",
    )
    check(tmp_path / "n.pt2", module)
    with torch.no_grad():
        left, right = (outputs(tmp_path / name, x()) for name in ("m.pt2", "n.pt2"))
    assert torch.equal(left, right)


def test_a_trial_run_writes_nothing(tmp_path):
    for suffix in (".onnx", ".pt2", ".safetensors"):
        export = ExportModel(tmp_path / "folder" / f"m{suffix}")
        fit(tiny(), [Quantize(4, 8), FineTune("lsq"), export], fast_dev_run=True)
        assert export.report is None
    assert not list(tmp_path.iterdir())


def test_other_stages_write_nothing(tmp_path):
    module = tiny()
    made = trainer([Quantize(4, 8), ExportModel(tmp_path / "m.pt2")], max_epochs=0)
    made.fit(module, loader())
    (tmp_path / "m.pt2").unlink()
    made.validate(module, loader(), verbose=False)
    made.test(module, loader(), verbose=False)
    assert not list(tmp_path.iterdir())


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "model.pt", "model.ONNX", "model.onnx.gz", "onnx"])
def test_other_endings(name):
    message = rf"^ExportModel\('{name}'\): the name should end in one of .onnx, .pt2, .safetensors"
    with pytest.raises(SpecError, match=message):
        ExportModel(name)


def test_no_samples():
    with pytest.raises(SpecError, match="samples=0; an example needs at least 1"):
        ExportModel("m.onnx", samples=0)


def test_without_quantize(tmp_path):
    module = tiny()
    message = "^ExportModel needs a model with quantizers, Tiny has none; .*put the Quantize callback before this one"
    with pytest.raises(StateError, match=message):
        fit(module, [ExportModel(tmp_path / "m.onnx")])
    assert not module.seen and not list(tmp_path.iterdir())


def test_a_module_that_was_quantized_by_hand(tmp_path):
    module = tiny()
    lq.calibrate(lq.attach(module, 4, 8), [x()])
    fit(module, [ExportModel(tmp_path / "m.pt2")], max_epochs=1)
    check(tmp_path / "m.pt2", module)


def test_a_network_that_cannot_be_exported(tmp_path):
    class Choosing(Tiny):
        def forward(self, x):
            return self.net(x) if x.sum() > 0 else -self.net(x)

    with pytest.raises(DataError, match="^torch.export cannot export Choosing: "):
        fit(of(Choosing), [Quantize(4, 8), ExportModel(tmp_path / "m.pt2", part="")], max_epochs=0)
    assert not list(tmp_path.iterdir())


def test_it_is_one_of_the_callbacks():
    assert lq.callbacks.ExportModel is ExportModel and issubclass(ExportModel, pl.Callback)

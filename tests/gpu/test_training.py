"""The contract of the callbacks on a GPU: mixed precision, one rank of DDP, compiled networks, runs that go on."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import quantizers
from lq.callbacks import Quantize, Reconstruct
from tests.callbacks.training import DISTILLED, FULL, STAGES, Begin, over
from tests.gpu.device import ACCELERATOR, DEVICE, needs_gpu
from tests.helpers import QUIET, dataset, fit, loader, tiny, trainer

PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]
LIGHTNING = "ignore:.*(AMP with fp16 is not supported on CPU|TensorFloat32|TF32|lr_scheduler.step).*"
pytestmark = [needs_gpu, *(pytest.mark.filterwarnings(text) for text in (*QUIET, LIGHTNING))]


def accuracy(module):
    x, y = dataset(64, seed=5).tensors
    module.eval()
    with torch.no_grad():
        return float((module(x.to(module.device)).argmax(1).cpu() == y).float().mean())


@over({**STAGES, **DISTILLED, **FULL})
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_in_mixed_precision(stages, precision):
    """With float16 the Trainer scales gradients: steps of quantizers are scaled back, and skipped if they overflow."""
    module, begin = tiny(), Begin()
    made = fit(module, [*stages(), begin], loader(64), max_epochs=6, precision=precision, **ACCELERATOR)
    module.to(DEVICE)
    assert made.global_step == 48
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(q.log2_step.dtype == torch.float32 for q in quantizers(module))
    moved = [
        not torch.equal(begin.steps[q.name], q.log2_step.detach().to(begin.steps[q.name])) for q in quantizers(module)
    ]
    assert any(moved)
    if precision != "bf16-true":  # whose small steps are lost
        assert accuracy(module) > 0.6  # of three kinds


@pytest.mark.skipif(DEVICE.type == "cpu", reason="float16 is scaled on GPUs alone")
def test_an_overflow_skips_the_step():
    module = tiny()

    class Overflow(Begin):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step == 3 and not getattr(self, "done", False):
                self.done = True
                for parameter in pl_module.parameters():
                    if parameter.grad is not None:
                        parameter.grad.fill_(float("inf"))

        def on_train_batch_end(self, trainer, pl_module, *args):
            assert all(p.isfinite().all() for p in pl_module.parameters())

    fit(module, [*STAGES["lsq"](), Overflow()], loader(64), precision="16-mixed", **ACCELERATOR)


@over({**STAGES, **DISTILLED})
def test_one_rank_of_ddp_trains_as_none(stages):
    found = []
    for strategy in ("auto", "ddp"):
        module = tiny()
        fit(module, stages(), loader(), max_epochs=2, strategy=strategy, use_distributed_sampler=False, **ACCELERATOR)
        found.append({name: value.cpu() for name, value in module.state_dict().items()})
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-2, atol=1e-3, msg=name)


@over({**STAGES, **FULL})
def test_a_run_that_is_resumed_goes_on(stages, tmp_path):
    whole = tiny()
    fit(whole, stages(), loader(), max_epochs=2, **ACCELERATOR)
    half = tiny()
    made = trainer(stages(), max_epochs=1, **ACCELERATOR)
    made.fit(half, loader())
    made.save_checkpoint(tmp_path / "half.ckpt")
    rest = tiny(seed=3)
    fit(rest, stages(), loader(), max_epochs=2, ckpt_path=tmp_path / "half.ckpt", **ACCELERATOR)
    assert rest.trainer.global_step == 8
    assert {q.name for q in quantizers(rest)} == {q.name for q in quantizers(whole)}
    assert all(p.isfinite().all() for p in rest.parameters())


@over(STAGES)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_networks_train(stages):
    torch.compiler.reset()
    module = tiny()
    module.net = torch.compile(module.net)
    fit(module, stages(), loader(64), max_epochs=4, **ACCELERATOR)
    module.to(DEVICE)
    assert accuracy(module) > 0.6


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_reconstruction_without_training(precision):
    module = tiny()
    chain = [Quantize(4, 4), Reconstruct(iterations=50)]
    fit(module, chain, loader(64), max_epochs=0, precision=precision, **ACCELERATOR)
    assert all(q.calibrated for q in quantizers(module))
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_sensitivities_and_files_are_those_of_the_cpu(tmp_path):
    found = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
        batches = [tuple(part.to(device) for part in dataset(16, seed=s).tensors) for s in (1, 2)]
        lq.attach(net, 4, 4)
        lq.calibrate(net.to(device), batches)
        table = lq.measure_sensitivity(net, batches, widths=(2, 4))
        lq.save(net, tmp_path / f"{torch.device(device).type}-net.safetensors")
        found.append((table, net))
    (one, _), (other, net) = found
    for mine, theirs in zip(one.tensors, other.tensors, strict=True):
        expected = torch.tensor(mine.loss)
        torch.testing.assert_close(torch.tensor(theirs.loss), expected, rtol=0.1, atol=float(expected.max()) / 100)
    x = dataset(8, seed=9).tensors[0]
    lq.export_onnx(net, x.to(DEVICE), tmp_path / "net.onnx")
    runner = pytest.importorskip("onnxruntime").InferenceSession(str(tmp_path / "net.onnx"))
    with torch.no_grad():
        expected = net.eval()(x.to(DEVICE)).cpu()
    (given,) = runner.run(None, {runner.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(given), expected, rtol=1e-2, atol=5e-2)

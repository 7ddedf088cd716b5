"""Quantizers inside a forward: what multiplications get; export, ONNX and compilation; errors on the way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lq
from lq.sites import quantizers
from tests.models import (
    EXAMPLES,
    Block,
    every_model,
    example,
    tokens,
)


class Spy(TorchDispatchMode):
    """Records the operands of multiplications, below everything that lq does."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        places = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "convolution": (0, 1)}.get(name, ())
        self.seen.extend((name, place, args[place].detach().clone()) for place in places)
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights")  # of any LSTM
@pytest.mark.parametrize(
    "kind", sorted(EXAMPLES.keys() - {"control flow"})
)  # torch.export takes no control flow on data
def test_exported_program_gives_the_same_numbers(kind):
    model, x = example(kind)
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x)), [x])
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), rtol=1e-4, atol=1e-5)


@every_model
def test_quantized_operands_have_few_values(kind):
    """Independent of lq's own bookkeeping: record what multiplications get, by torch's own dispatcher."""
    model, x = example(kind)
    structure = lq.inspect(model, x)
    lq.calibrate(lq.attach(model, 3, 3, structure=structure, first_last=None), [x])
    with torch.no_grad(), Spy() as spy:
        model(x)
    assert spy.seen
    for name, place, tensor in spy.seen:
        if tensor.numel() == x.numel() and torch.equal(tensor.flatten().sort()[0], x.flatten().sort()[0]):
            continue  # the network's own input
        assert fewest_values(tensor) <= 8, (name, place)


def fewest_values(tensor):
    """Largest number of distinct values in a channel, for the dimension of channels where it is smallest."""
    along = [max(row.unique().numel() for row in tensor.movedim(dim, 0)) for dim in range(tensor.ndim)]
    return min(along)


def test_the_standardized_weight_is_on_the_grid_not_the_one_before():
    model, x = example("odd weights")
    lq.calibrate(lq.attach(model, 2, structure=lq.inspect(model, x), first_last=None), [x])
    with torch.no_grad(), Spy() as spy:
        model(x)
    standardized = next(tensor for name, place, tensor in spy.seen if (name, place) == ("convolution", 1))
    assert all(channel.unique().numel() <= 4 for channel in standardized)
    quantizer = next(q for q in quantizers(model) if q.name == "conv.conv2d_0_weight")
    assert quantizer.calibrated and quantizer.bits.shape == (4,)
    assert model.conv.weight.detach()[0].unique().numel() > 4  # the parameter itself stays float


@pytest.mark.filterwarnings("ignore")  # of the exporter about itself
@pytest.mark.parametrize("fused", [True, False])
def test_onnx_gives_the_same_numbers(fused, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = Block(fused=fused).eval(), tokens()
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x)), [x])
    torch.onnx.export(model, (x,), tmp_path / "block.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "block.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    assert (torch.from_numpy(got) - expected).norm() / expected.norm() < 1e-2  # a tie may be rounded otherwise


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler's own look
def test_compiled_model_gives_the_same_numbers():
    model, x = example("block")
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x)), [x])
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_an_error_inside_a_forward_leaves_nothing_behind():
    model, x = example("block")
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x)), [x])
    expected = model(x)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 3))
    assert torch.equal(model(x), expected)
    assert torch.overrides._get_current_function_mode_stack() == []

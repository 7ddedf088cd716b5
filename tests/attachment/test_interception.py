"""Quantizers inside a forward: what multiplications get; export, ONNX and compilation; errors on the way."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import lq
from lq.attachment.shared import SharedQuantizer
from lq.attachment.sites import quantizers
from tests.models import EXAMPLES, Block, every_model, example, tokens


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


# --- several threads, several devices, code that works in place -------------------------------------------------------


@every_model
def test_threads_run_a_model_each_by_itself(kind):
    model, x = example(kind)
    lq.calibrate(lq.attach(model, 4, 3, structure=lq.inspect(model, x), first_last=None), [x])
    inputs = [x, x.flip(0), x[:1]] * 8
    with torch.no_grad():
        expected = [model(given) for given in inputs]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(in_no_grad(model), inputs))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))


def in_no_grad(model):
    def run(x):
        with torch.no_grad():
            return model(x)

    return run


def test_two_models_at_once():
    """One is calibrated while the other runs, and counts no work of it."""
    (one, x), (other, _) = example("block"), example("block")
    structure = lq.inspect(one, x)
    lq.calibrate(lq.attach(one, 4, 3, structure=structure), [x])
    expected = one(x)
    alone = lq.calibrate(lq.attach(copy.deepcopy(other), 4, 3, structure=structure), [x] * 10)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(one, x) for _ in range(20)]
        lq.calibrate(lq.attach(other, 4, 3, structure=structure), [x] * 10)
        assert all(torch.allclose(run.result(), expected, atol=1e-6) for run in runs)
    assert str(lq.summary(other)) == str(lq.summary(alone))


def replica(model):
    """A copy of a model as `nn.DataParallel` makes one for each device, here for the same."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, copied in copies.items():
        for name, child in module._modules.items():
            setattr(copied, name, copies[child])
        for name, parameter in module._parameters.items():
            setattr(copied, name, None if parameter is None else parameter * 1)
        for name, buffer in module._buffers.items():
            copied._buffers[name] = None if buffer is None else buffer * 1
    return copies[model]


@pytest.mark.parametrize("kind", ["block", "unfused block", "residual", "encoder"])
def test_replicas_of_data_parallel_use_their_own_quantizers(kind):
    model, x = example(kind)
    lq.calibrate(lq.attach(model, 4, 3, structure=lq.inspect(model, x), first_last=None, estimator="lsq"), [x])
    copied = replica(model.train(kind == "block"))
    torch.testing.assert_close(copied(x), model(x))
    for part in (
        part for part in copied.modules() if isinstance(part, lq.quantizer.activation_quantizer.ActivationQuantizer)
    ):
        part.tap = torch.zeros_like  # not those of the original
    assert not torch.equal(copied(x), model(x))
    model.zero_grad()
    replica(model)(x).sum().backward()
    steps = [q.log2_step for q in quantizers(model)]
    assert all(step.grad is not None for step in steps)


def test_a_shared_quantizer_works_on_another_device():
    model, x = example("block")
    lq.calibrate(lq.attach(nn.Sequential(model), 4, 3, structure=lq.inspect(nn.Sequential(model), x)), [x])
    shared = [part for part in model.modules() if isinstance(part, SharedQuantizer)]
    for part in shared:
        assert part(torch.zeros(2, 8, device="meta")).device.type == "meta"
        assert part.owner.log2_step.device.type == "cpu"


class Statements(nn.Module):
    """A residual block that adds and rectifies in place, by functions or modules, with or without assigning results."""

    def __init__(self, how):
        super().__init__()
        self.a, self.b, self.c, self.head = (nn.Conv2d(4, n, 3, padding=1) for n in (4, 4, 4, 2))
        self.relu = nn.ReLU(inplace=how == "module")
        self.how = how

    def forward(self, x):
        x = self.a(x)
        y = self.b(x)
        if self.how == "module assigned":
            y = self.relu(y + x)
        elif self.how == "function assigned":
            y = torch.relu(y + x)
        elif self.how == "methods":
            y.add_(x)
            y.relu_()
        elif self.how == "operator":
            y += x
            torch.relu_(y)
        elif self.how == "function":
            z = y
            y += x
            nn.functional.relu(z, inplace=True)
        elif self.how == "out":
            z = torch.empty_like(y)
            torch.add(x, y, out=z)
            y = torch.relu(z)
        else:
            y.add_(x)
            self.relu(y)
        return self.head(self.c(y) + y)


@pytest.mark.parametrize("options", [{}, {"skip": True}, {"integer": True}], ids=str)
@pytest.mark.parametrize("how", ["methods", "operator", "function", "module"])
def test_results_that_nobody_assigns(how, options):
    outputs, gradients = [], []
    for now in ("module assigned" if how == "module" else "function assigned", how):
        torch.manual_seed(0)
        model, x = Statements(now).eval(), torch.randn(3, 4, 6, 6)
        lq.attach(model, 8, 3, structure=lq.inspect(model, x), first_last=None, estimator="lsq", **options)
        lq.calibrate(model, [x])
        with torch.no_grad():
            outputs.append(model(x))
        model.train()(x).square().sum().backward()
        gradients.append([p.grad for n, p in sorted(model.named_parameters()) if "quantizer" not in n])
    assert torch.equal(*outputs)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"skip": True}, {"integer": True}], ids=str)
def test_results_in_a_given_tensor(options):
    """``out=``, which has no gradient."""
    outputs = []
    for how in ("function assigned", "out"):
        torch.manual_seed(0)
        model, x = Statements(how).eval(), torch.randn(3, 4, 6, 6)
        lq.attach(model, 8, 3, structure=lq.inspect(model, x), first_last=None, **options)
        outputs.append(lq.calibrate(model, [x])(x))
    assert torch.equal(*outputs)

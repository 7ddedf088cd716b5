"""torch.export: programs of standard operators, for any batch, that run where lq is not installed."""

import operator
import subprocess
import sys

import pytest
import torch
from torch import nn

import lq
from lq.attachment.stored import call_weights
from lq.errors import DataError, StateError
from lq.export import export_program
from lq.export.standard import standard_form
from tests.attachment.networks import images, quantized, small
from tests.attachment.test_folding import convnet
from tests.export.exported import Pairs, activations, calibrated, depthwise, pictures, weights
from tests.helpers import assert_same, hooks
from tests.models import EXAMPLES, example, state

#: torch says so of every recurrent layer that it exports.
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self.*_flat_weights")

#: All examples but the one that torch cannot export.
KINDS = [kind for kind in EXAMPLES if kind != "control flow"]


def batch(kind, samples, seed=2):
    """Another batch of an example's input."""
    x = EXAMPLES[kind][1]
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, *x.shape[1:])
    return torch.randn(shape, generator=generator) if x.is_floating_point() else torch.randint(0, 11, shape)


def made(kind, **options):
    """An example, quantized as a part of a larger model."""
    model, x = example(kind)
    model = nn.Sequential(model)
    options = {"weights": weights(4), "activations": activations(6), "skip": "auto", "integer": True, **options}
    return calibrated(model, x, **options), x


@pytest.fixture(scope="module")
def programs():
    """The examples and their programs."""
    found = {}
    with torch.no_grad():
        for kind in KINDS:
            model, x = made(kind)
            found[kind] = model, export_program(model, x)
    return found


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_outputs_are_the_models_for_any_batch(kind, programs):
    model, program = programs[kind]
    run = program.module()
    for samples in (1, 2, 3, 5):
        x = batch(kind, samples)
        found = run(x)
        assert torch.equal(found, model(x)) and bool(found.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_all_operators_are_standard_ones(kind, programs):
    called = [node.target for node in programs[kind][1].graph.nodes if node.op == "call_function"]
    for target in called:
        if isinstance(target, torch._ops.OpOverload):
            assert target.namespace in ("aten", "quantized_decomposed"), target
        else:
            assert getattr(operator, target.__name__) is target, target
    assert any(t.namespace == "quantized_decomposed" for t in called if isinstance(t, torch._ops.OpOverload))
    assert {node.op for node in programs[kind][1].graph.nodes} <= {"placeholder", "call_function", "output"}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_integers(kind, programs):
    model, program = programs[kind]
    floats = {name for name, value in program.state_dict.items() if value.is_floating_point() and value.ndim > 1}
    levels = {name for name, value in program.state_dict.items() if value.dtype == torch.int8}
    functions = {call.name: f"{call.module}.call_quantizers.{call.place}.levels" for call in call_weights(model)}
    weights = lq.integer_weights(model)
    keys = {n: functions.get(n, f"{n}.parametrizations.weight.original").lstrip(".") for n in weights}
    assert levels == set(keys.values())
    for name, weight in weights.items():
        stored = program.state_dict[keys[name]]
        assert torch.equal(stored + 2 ** (weight.layout.spread(weight.bits, stored) - 1), weight.codes)
    assert not floats or kind in {"odd weights", "unfused block"}  # weights that are computed, a bias on scores


WITHOUT_LQ = """
import sys
try:
    import lq
except ImportError:
    pass
else:
    raise SystemExit(f"lq can be imported from {lq.__file__}")
import torch, torch.ao.quantization.fx._decomposed
inputs, outputs = torch.load("inputs.pt"), {}
for name, x in inputs.items():
    outputs[name] = torch.export.load(f"{name}.pt2").module()(x)
assert not any(name == "lq" or name.startswith("lq.") for name in sys.modules)
torch.save(outputs, "outputs.pt")
"""


def test_saved_programs_run_where_lq_is_not_installed(tmp_path):
    """With torch alone, and the two imports that the docstring names."""
    fake = tmp_path / "fake" / "lq"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text("raise ImportError('there is no lq')")
    expected, inputs = {}, {}
    for kind in ("residual", "encoder", "u-net"):
        model, x = made(kind)
        export_program(model, x, tmp_path / f"{kind}.pt2")
        inputs[kind] = batch(kind, 5)
        expected[kind] = model(inputs[kind]).detach()
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "run.py").write_text(WITHOUT_LQ)
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "fake"), "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(torch.load(tmp_path / "outputs.pt"), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"weights": weights(2, symmetric=False), "activations": activations(2)},
        {"weights": weights(3, per_channel=False), "activations": activations(5)},
        {"weights": weights(8), "activations": None},
        {"weights": None, "activations": activations(8)},
        {"weights": weights(16), "activations": activations(16)},
        {"weights": weights(1), "activations": activations(1)},
    ],
    ids=str,
)
def test_other_grids(options, tmp_path):
    model, x = calibrated(small(), images(16), structure=False, first_last=None, **options), images(5)
    export_program(model, images(3), tmp_path / "m.pt2")
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(x), model(x))


def test_pruned_channels_transposed_groups_and_batchnorms():
    torch.manual_seed(0)
    model = convnet()
    model.insert(3, nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2))
    model.insert(4, nn.Dropout(0.5))
    calibrated(model, images(8), weights=weights(4), activations=activations(6))
    lq.set_bits(model, {"5": [0, 1, 2, 8], "3": [3, 0, 0, 4]})
    run = export_program(model.train(), images(2)).module()
    with torch.no_grad():
        assert model.training
        assert torch.equal(run(images(5)), model.eval()(images(5)))


def test_the_model_and_the_example_stay_as_they_are():
    model, x = quantized(), images(1)
    before, left, given = state(model), hooks(model), x.clone()
    program = export_program(model, x)
    assert_same(state(model), before)
    assert hooks(model) == left and torch.equal(x, given)
    with torch.no_grad():
        expected = model(x)
        for value in model.state_dict().values():
            value.zero_()
        assert torch.equal(program.module()(x), expected)


def test_half_precision():
    model, x = depthwise().to(torch.bfloat16), pictures().to(torch.bfloat16)
    calibrated(model, x, weights=weights(4), activations=activations(8))
    with torch.no_grad():
        assert torch.equal(export_program(model, x[:2]).module()(x), model(x))


# --- examples ---------------------------------------------------------------------------------------------------------


class Masked(nn.Module):
    """Two tensors, and an option."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, mask=None, negate=False):
        x = self.fc(x if mask is None else x * mask)
        return -x if negate else x


def masked():
    torch.manual_seed(0)
    model = Masked().eval()
    return lq.calibrate(lq.attach(model, 4, 8, first_last=None), [torch.randn(8, 4)]).eval()


def rows(samples, seed=1):
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, mask: ((x,), {}),
        lambda x, mask: ((x, mask), {}),
        lambda x, mask: ((x, mask, True), {}),
        lambda x, mask: ((x, None, True), {}),
        lambda x, mask: ((), {"x": x, "mask": mask}),
        lambda x, mask: ((), {"mask": mask, "x": x, "negate": True}),
    ],
    ids=["x", "two", "an option", "nothing", "names", "names in another order"],
)
@pytest.mark.parametrize("samples", [1, 3])
@torch.no_grad()
def test_examples_are_arguments(call, samples):
    model = masked()
    args, kwargs = call(rows(samples), rows(samples, 2))
    run = export_program(model, kwargs or args).module()
    for other in (1, 3, 5):
        args, kwargs = call(rows(other, 3), rows(other, 4))
        assert torch.equal(run(*args, **kwargs), model(*args, **kwargs))


def test_a_list_is_arguments_too():
    model, args = masked(), (rows(5), rows(5, 2))
    assert torch.equal(export_program(model, [rows(2), rows(2, 2)]).module()(*args), model(*args))


def test_a_batch_size_that_the_code_fixes():
    torch.manual_seed(0)
    model = lq.calibrate(lq.attach(Pairs(), 4, 8, first_last=None), [rows(2)]).eval()
    run = export_program(model, rows(2)).module()
    assert torch.equal(run(rows(2, 3)), model(rows(2, 3)))
    with pytest.raises(Exception, match="(?i)size"):
        run(rows(4))


class Scaled(nn.Module):
    """A tensor of one number that all samples share."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, factor):
        return self.fc(x * factor)


def scaled():
    torch.manual_seed(0)
    batch = (rows(3), torch.ones(1))
    return lq.calibrate(lq.attach(Scaled(), 4, 8, first_last=None), [batch], forward=lambda m, b: m(*b)).eval()


def test_a_number_beside_the_batch():
    run = export_program(scaled(), (rows(3), torch.tensor(2.0))).module()
    assert torch.equal(run(rows(5), torch.tensor(3.0)), scaled()(rows(5), torch.tensor(3.0)))


def test_a_vector_of_one_number_beside_the_batch():
    """It stays a vector of one number; the batch is free."""
    run, factor = export_program(scaled(), (rows(3), torch.ones(1))).module(), torch.tensor([2.0])
    for samples in (1, 3, 5):
        assert torch.equal(run(rows(samples, 3), factor), scaled()(rows(samples, 3), factor))


class Single(Pairs):
    """Its code says that a batch has one sample."""

    def forward(self, x):
        return self.fc(x.view(1, 4))


def test_a_batch_of_one_that_the_code_fixes():
    torch.manual_seed(0)
    model = lq.calibrate(lq.attach(Single(), 4, 8, first_last=None), [rows(1)]).eval()
    assert torch.equal(export_program(model, rows(1)).module()(rows(1)), model(rows(1)))


@pytest.mark.parametrize("kind", ["residual", "odd weights"])
@pytest.mark.parametrize("samples", [1, 3])
@torch.no_grad()
def test_any_batch_with_quantizers_at_calls_of_the_outermost_module(kind, samples):
    """Which stand before its forward, whose arguments torch.export looks at."""
    model, x = example(kind)
    calibrated(model, x, weights=weights(4), activations=activations(6), integer=True)
    for given, call in ((x[:samples], lambda run, x: run(x)), ({"x": x[:samples]}, lambda run, x: run(x=x))):
        run = export_program(model, given).module()
        for other in (samples, 1, 5):
            assert torch.equal(call(run, batch(kind, other)), model(batch(kind, other)))


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:1 of 2 activations were never seen")
def test_a_model_that_cannot_be_exported_is_named(tmp_path):
    model, x = example("control flow")
    calibrated(model, x, weights=weights(4), activations=activations(8))
    with pytest.raises(DataError, match=r"^torch.export cannot export Loop: \w+: .*data-dependent"):
        export_program(model, x, tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_an_example_that_the_model_does_not_take():
    with pytest.raises(DataError, match="^torch.export cannot export Sequential: "):
        export_program(quantized(), torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small, "^export needs a model with quantizers, Sequential has none"),
        (lambda: lq.attach(small(), 4, 8), "has no range yet: run lq.calibrate"),
    ],
    ids=["float", "not calibrated"],
)
def test_models_that_are_not_ready(model, message, tmp_path):
    with pytest.raises(StateError, match=message):
        export_program(model(), images(), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"old")

    def fail(program, file):
        file.write(b"half of it")
        file.flush()
        assert sorted(p.name for p in tmp_path.iterdir()) != ["m.pt2"]
        raise OSError("the disk is full")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="the disk is full"):
        export_program(quantized(), images(), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_an_old_file_is_replaced(tmp_path):
    path = tmp_path / "m.pt2"
    path.write_bytes(b"old")
    export_program(quantized(), images(), str(path))
    assert torch.equal(torch.export.load(path).module()(images()), quantized()(images()))
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_it_is_the_standard_form_that_is_exported():
    model, x = quantized(), images()
    with torch.no_grad():
        assert torch.equal(export_program(model, x).module()(x), standard_form(model)(x))

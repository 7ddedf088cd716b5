"""What is known of the tensors between units, on networks with everything between them."""

import pytest
import torch
from torch import nn

from lq.errors import DataError
from lq.reconstruction.flow import SampleLayout, find_flow
from lq.reconstruction.partial_runs import replaced, returning, stop_at
from lq.reconstruction.units import Unit
from tests.reconstruction.networks import BY_NAME, NETWORKS, InPlace, Work, call, network, quantized, samples

# For each unit: the unit whose output is its only input, and those whose outputs its input is computed from.
EXPECTED = {
    "resnet": [(None, set()), (0, {0}), (1, {1}), (None, {2})],
    "pooling and flatten": [(None, set()), (None, {0}), (None, {1})],
    "in place": [(None, set()), (None, {0}), (None, {0, 1})],
    "branches": [(None, set()), (None, {0}), (None, {0}), (None, {0, 1, 2})],
    "tokens": [(None, set()), (None, {0}), (1, {1}), (None, {2})],
    "windows": [(None, set()), (None, {0}), (None, {1})],
    "samples second": [(None, set()), (0, {0}), (None, {1})],
    "no gradients": [(None, set()), (None, {0}), (None, {1})],
    "a comparison": [(None, set()), (None, {0})],
}


def flow_of(kind, units="block"):
    model, x = network(kind)
    return Work(quantized(model, [x]), [x], BY_NAME.get(kind, units)).flow


@pytest.mark.parametrize("kind", EXPECTED)
def test_what_comes_from_where(kind):
    flow = flow_of(kind)
    assert flow.direct == tuple(direct for direct, _ in EXPECTED[kind])
    for needed, (_, expected) in zip(flow.needs, EXPECTED[kind], strict=True):
        # what cannot be seen is kept to be safe
        assert needed >= expected
        assert needed == expected or kind in ("no gradients", "a comparison")


def test_an_output_changed_in_place_is_not_the_input_of_the_next():
    flow = flow_of("in place", "layer")
    assert flow.direct == (None, None, None)


def test_last_use():
    flow = flow_of("branches")
    assert [flow.last_use(k) for k in range(4)] == [3, 3, 3, -1]


def test_layers_inside_of_a_residual_block():
    model, x = network("resnet")
    work = Work(quantized(model, [x]), [x], "layer")
    index = {name: k for k, name in enumerate(work.names)}
    first, second = index["blocks.1.conv1+blocks.1.act1"], index["blocks.1.conv2"]
    assert work.flow.direct[second] == first
    # the block's input is computed from the sum before, which is computed from two layers
    before = {index["blocks.0.conv2"], index["blocks.0.shortcut.0"]}
    assert work.flow.direct[first] is None and work.flow.needs[first] == before
    assert work.flow.needs[index["head"]] == before | {second}


@pytest.mark.parametrize(
    ("kind", "unit", "inputs", "output"),
    [
        ("windows", 1, (SampleLayout(0, 4),), SampleLayout(0, 4)),
        ("windows", 2, (SampleLayout(0, 1),), SampleLayout(0, 1)),
        ("samples second", 1, (SampleLayout(1, 1), None, None), SampleLayout(1, 1)),
        ("tokens", 1, (SampleLayout(0, 1),), SampleLayout(0, 1)),
    ],
)
def test_how_samples_lie(kind, unit, inputs, output):
    flow = flow_of(kind)
    assert flow.inputs[unit] == inputs
    assert flow.outputs[unit] == output


@pytest.mark.parametrize("kind", NETWORKS)
def test_shapes_are_those_of_one_sample(kind):
    model, x = network(kind)
    work = Work(quantized(model, [x]), [x], "block")
    for unit, lies, (shape, dtype) in zip(work.units, work.flow.outputs, work.flow.shapes, strict=True):
        taken = []
        handle = work.twin.get_submodule(unit.modules[-1]).register_forward_hook(
            lambda m, a, out, taken=taken: taken.append(out)
        )
        with torch.no_grad():
            work.twin(x[:3])
        handle.remove()
        rows = lies.rows(taken[0])
        assert rows.shape == (3, *shape) and taken[0].dtype == dtype
        assert torch.equal(lies.tensor(rows), taken[0])


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("each", [1, 3])
def test_rows_and_tensors_are_inverses(dim, each):
    tensor = torch.arange(4 * each * 5 * 7.0).view(4 * each, 5, 7).movedim(0, dim)
    lies = SampleLayout(dim, each)
    rows = lies.rows(tensor)
    assert rows.shape[0] == 4
    for sample in range(4):
        expected = tensor.narrow(dim, sample * each, each)
        assert torch.equal(lies.tensor(rows[sample : sample + 1]), expected)
    assert torch.equal(lies.tensor(rows), tensor)


class Averaged(nn.Module):
    """A unit that reads an average over the batch."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.a(x) + self.b(x.mean(0, keepdim=True)).sum()


def test_samples_that_cannot_be_told_apart():
    x = samples((8,))
    with pytest.raises(DataError, match=r"unit b: its tensors, such as \(1, 2\), do not grow with the number of samp"):
        Work(quantized(Averaged().eval(), [x]), [x])


def test_replaced_modules_get_their_forward_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    own = model[1].forward
    model[1].forward = own
    given = {model[0]: lambda x: x + 1, model[1]: lambda x: x * 2}
    with replaced(given):
        assert torch.equal(model(torch.ones(1, 2)), torch.full((1, 2), 4.0))
    with pytest.raises(TypeError), replaced(given):
        model(None)
    assert "forward" not in vars(model[0]) and vars(model[1])["forward"] is own


def test_returning_chains_give_their_last_output():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    output = torch.tensor([[1.0, 2.0]])
    units = [Unit(("0", "1")), Unit(("2",))]
    with replaced(returning(model, units, {0: output})):
        assert torch.equal(model(torch.zeros(1, 2)), model[2](output))


def test_stopping_ends_the_forward_and_leaves_no_hook():
    model, taken = InPlace(), []
    reached = []
    model.c.register_forward_pre_hook(lambda *_: reached.append(1))
    with stop_at(model.b, taken):
        model(samples((8,)))
    assert len(taken) == 1 and not reached
    assert not model.b._forward_pre_hooks
    with pytest.raises(ValueError, match="other"), stop_at(model.b, taken):
        raise ValueError("other")
    assert not model.b._forward_pre_hooks


def test_looking_changes_nothing():
    model, x = network("branches")
    work = Work(quantized(model, [x]), [x])
    before = {key: value.clone() for key, value in work.twin.state_dict().items()}
    find_flow(work.twin, work.units, call, x[:2], 2)
    assert all(torch.equal(value, before[key]) for key, value in work.twin.state_dict().items())
    for part in work.twin.modules():
        assert not part._forward_hooks and not part._forward_pre_hooks and "forward" not in vars(part)

"""Captured tensors against what plain hooks see in plain runs, and how often anything is computed."""

import gc
import weakref

import pytest
import torch
from torch import nn

import lq
from lq.attachment.float_models import float_copy
from lq.errors import StateError
from lq.reconstruction.capture import Batches, Inputs
from lq.reconstruction.storage import Storage
from tests.reconstruction.networks import BY_NAME, NETWORKS, Work, network, quantized, samples, seen


def batches(x):
    """Four, four and two samples: the last batch is a partial one."""
    return list(x.split(4))


def tensors(inputs, rows):
    return [leaf for leaf in inputs.batch(rows) if isinstance(leaf, torch.Tensor)]


def same(ours, theirs, kind):
    """Bit for bit, but where tensors are kept in another order of dimensions."""
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6) if kind in BY_NAME else torch.equal(ours, theirs)


def check(inputs, expected, sizes, kind):
    start = 0
    for size, theirs in zip(sizes, expected, strict=True):
        ours = tensors(inputs, slice(start, start + size))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert same(a, b, kind)
        start += size


@pytest.mark.parametrize("skip", [False, True], ids=["layers", "skips"])
@pytest.mark.parametrize("granularity", ["layer", "block"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_inputs_and_outputs_are_those_of_plain_runs(kind, granularity, skip):
    model, x = network(kind)
    data = batches(x)
    named = BY_NAME.get(kind) if granularity == "block" else None
    work = Work(quantized(model, data, skip=skip), data, named or granularity)
    generator = torch.Generator().manual_seed(5)
    sizes = [len(batch) for batch in data]
    for k, unit in enumerate(work.units):
        expected = seen(model, unit.modules[0], data)
        inputs = work.quantized.inputs(k)
        check(inputs, expected, sizes, kind)
        whole = work.whole.inputs(k)
        check(whole, seen(work.twin, unit.modules[0], data), sizes, kind)
        targets = work.whole.finish(k, whole)
        start = 0
        for size, output in zip(sizes, seen(work.twin, unit.modules[-1], data, output=True), strict=True):
            assert same(targets.batch(slice(start, start + size)), output, kind)
            start += size
        for name, weight in model.named_parameters():  # as if the unit had been fitted
            if name.endswith("original") and any(name.startswith(f"{m}.") for m in unit.modules):
                weight.data += 0.3 * torch.randn(weight.shape, generator=generator) * weight.std()
        work.quantized.pass_on(k, inputs)
    with torch.no_grad():
        differs = (model(x) - work.twin(x)).abs().max()
    assert differs > 1e-3  # or the test would not tell the two networks apart


def test_arbitrary_samples_of_a_unit():
    model, x = network("windows")
    data = batches(x)
    work = Work(quantized(model, data), data)
    work.whole.finish(0, work.whole.inputs(0))
    inputs = work.whole.inputs(1)
    index = torch.tensor([7, 0, 9])
    (expected,) = seen(work.twin, "b", [x[index]])
    torch.testing.assert_close(tensors(inputs, index), expected, rtol=1e-5, atol=1e-6)
    outputs = work.whole.finish(1, inputs)
    (expected,) = seen(work.twin, "b", [x[index]], output=True)
    torch.testing.assert_close(outputs.batch(index), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunks_do_not_matter(chunk):
    model, x = network("tokens")
    data = batches(x)
    work = Work(quantized(model, data), data, "block", chunk=chunk)
    for k, unit in enumerate(work.units):
        outputs = work.whole.finish(k, work.whole.inputs(k))
        expected = torch.cat(seen(work.twin, unit.modules[-1], data, output=True))
        torch.testing.assert_close(outputs.batch(slice(0, 10)), expected, rtol=1e-4, atol=1e-5)


def test_half_precision():
    model, x = network("resnet")
    data = batches(x)
    work = Work(quantized(model, data), data, "block", dtype=torch.float16)
    for k, unit in enumerate(work.units):
        inputs = work.whole.inputs(k)
        outputs = work.whole.finish(k, inputs)
        assert outputs.stored.data.dtype == torch.float16
        found = outputs.batch(slice(0, 10))
        assert found.dtype == torch.float32
        expected = torch.cat(seen(work.twin, unit.modules[-1], data, output=True))
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-3)
        assert all(t.dtype == torch.float32 for t in tensors(inputs, slice(0, 3)))


def test_outputs_are_let_go_when_no_later_unit_needs_them():
    model, x = network("branches")
    data = batches(x)
    work = Work(quantized(model, data), data)
    outputs = []
    alive = []
    for k in range(4):
        outputs.append(weakref.ref(work.whole.finish(k, work.whole.inputs(k)).stored))
        gc.collect()
        alive.append([ref() is not None for ref in outputs])
    assert alive == [[True], [True] * 2, [True] * 3, [False] * 4]
    model, x = network("pooling and flatten")
    work = Work(quantized(model, [x]), [x])
    first = weakref.ref(work.whole.finish(0, work.whole.inputs(0)).stored)
    assert first() is not None
    work.whole.finish(1, work.whole.inputs(1))
    gc.collect()
    assert first() is None


def test_what_no_later_unit_needs_is_not_computed():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.aside, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.aside(x), self.b(x)

    x = samples((8,))
    work = Work(quantized(Two().eval(), [x]), [x])
    inputs = work.quantized.inputs(0)
    work.model.aside.forward = None  # it would fail
    work.quantized.pass_on(0, inputs)
    del work.model.aside.forward


class Counted(nn.Linear):
    """Counts how often it computes."""

    def forward(self, x):
        self.__dict__["calls"] = self.__dict__.get("calls", 0) + 1
        return super().forward(x)


def counted(depth, between):
    layers = [Counted(8, 8) for _ in range(depth)]
    parts = [part for layer in layers for part in ((layer, nn.Softmax(-1)) if between else (layer,))]
    return nn.Sequential(*parts).eval()


@pytest.mark.parametrize("between", [False, True], ids=["chained", "with gaps"])
def test_the_work_is_linear_in_depth(between):
    found = []
    for depth in (3, 9):
        torch.manual_seed(0)
        x = samples((8,), 12)
        model = quantized(counted(depth, between), [x])
        for part in model.modules():
            part.__dict__.pop("calls", None)
        twin = float_copy(model)
        lq.reconstruct(model, list(x.split(4)), units="layer", iterations=3, batch_size=4, teacher=twin)
        layers, floats = ([m for m in n.modules() if isinstance(m, Counted)] for n in (model, twin))
        found.append([[m.__dict__.get("calls", 0) for m in part] for part in (layers, floats)])
    (few, few_float), (many, many_float) = found
    assert few[:2] + few[-1:] == many[:2] + many[-1:]
    assert few_float[:2] + few_float[-1:] == many_float[:2] + many_float[-1:]
    assert len(set(many[:-1])) == 1 and len(set(many_float)) == 1
    # a dry run, two for the flow, ranges, losses before and after these, the fit and its loss, the output
    assert max(many) <= 3 + 6 * 3 and max(many_float) <= 10


def test_nested_batches_come_back_as_they_were():
    storage = Storage(torch.device("cpu"), 10**6)
    given = [{"x": torch.randn(4, 3), "name": "a", "pair": (torch.arange(4), None)} for _ in range(2)]
    given.append({"x": torch.randn(1, 3), "name": "b", "pair": (torch.arange(1), None)})
    kept = Batches(iter(given), storage)
    assert kept.sizes == [4, 4, 1] and kept.samples == 9
    starts = []
    for (start, size, batch), expected in zip(kept, given, strict=True):
        starts.append((start, size))
        assert torch.equal(batch["x"], expected["x"]) and batch["x"] is not expected["x"]
        assert batch["name"] == expected["name"] and torch.equal(batch["pair"][0], expected["pair"][0])
        assert batch["pair"][1] is None and isinstance(batch["pair"], tuple)
    assert starts == [(0, 4), (4, 4), (8, 1)]


def test_a_unit_that_is_not_reached():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.both = True

        def forward(self, x):
            return self.b(self.a(x).sin()) if self.both else self.a(x)

    x = samples((8,))
    work = Work(quantized(Late().eval(), [x]), [x])
    work.model.both = False
    inputs = work.quantized.inputs(0)
    work.quantized.pass_on(0, inputs)
    with pytest.raises(StateError, match="unit b was not reached in a run of Late"):
        work.quantized.inputs(1)
    for part in work.model.modules():
        assert "forward" not in vars(part) or hasattr(part, "call_quantizers")


def test_no_batches():
    model, x = network("branches")
    work = Work(quantized(model, [x]), [x])
    work.quantized.batches = Batches([], work.storage)
    with pytest.raises(StateError, match="there are no batches to reconstruct with"):
        work.quantized.inputs(0)


def test_leaves_that_are_the_same_for_all_samples_stay():
    model, x = network("samples second")
    work = Work(quantized(model, [x]), [x], ["a", "b", "c"])
    work.whole.finish(0, work.whole.inputs(0))
    inputs = work.whole.inputs(1)
    assert isinstance(inputs, Inputs)
    tokens, scale, shift = (leaf for leaf in inputs.batch(slice(2, 5)) if leaf is not None)
    assert tokens.shape == (5, 3, 8) and torch.equal(scale, work.twin.scale) and shift == 0.5

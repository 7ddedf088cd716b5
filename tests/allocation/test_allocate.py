import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.allocation.budget import _KINDS, parse_budget
from lq.allocation.counting import Counting
from lq.attachment.sites import activation_quantizers, float_weight, layers, quantizers
from lq.errors import BudgetError, DataError, NoEffectWarning, PatternError, SpecError
from lq.sensitivity import Sensitivity, TensorSensitivity
from tests.models import example

X = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
SIZES = {"0": 12 * 16, "2": 16 * 8, "4": 8 * 4}


def network(weights=4, activations=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    lq.attach(model, weights, activations, first_last=None)
    return lq.calibrate(model, [X])


def table(model=None, seed=0):
    """Losses that fall by about four per bit."""
    rng = np.random.default_rng(seed)
    tensors = []
    for name, layer in layers(model or network()):
        channels = float_weight(layer).shape[0]
        falling = 4.0 ** -np.arange(9)
        groups = rng.lognormal(0, 2, (channels, 1)) * falling * rng.uniform(0.8, 1.2, (channels, 9))
        count = float_weight(layer).numel()
        tensors.append(
            TensorSensitivity(f"{name}.weight", "weight", count, channels, groups.sum(0), groups.sum(0), groups, groups)
        )
        if name != "0":
            loss = rng.lognormal(0, 2) * falling
            inputs = float_weight(layer).shape[1]
            tensors.append(
                TensorSensitivity(f"{name}.input", "activation", inputs, 1, loss, loss, loss[None], loss[None])
            )
    return Sensitivity("Fisher", tuple(range(9)), 10, 1, tuple(tensors))


def enumerate_layers(sensitivity, feasible, widths=range(1, 9)):
    """The least loss over all widths of the three weights that `feasible` accepts."""
    names = list(SIZES)
    return min(
        sum(sensitivity[f"{name}.weight"].loss[b] for name, b in zip(names, choice, strict=True))
        for choice in itertools.product(widths, repeat=3)
        if feasible(dict(zip(names, choice, strict=True)))
    )


@pytest.mark.parametrize("solver", ["greedy", "lagrangian", "exact"])
@pytest.mark.parametrize("average", [1.0, 2.3, 3.0, 4.7, 8.0])
def test_layers_within_a_mean_width(solver, average):
    model, sensitivity = network(), table()
    found = lq.allocate(model, sensitivity, average, solver=solver)
    total = sum(SIZES.values())

    def feasible(widths):
        return sum(SIZES[name] * b for name, b in widths.items()) <= average * total

    assert feasible(found.weights)
    best = enumerate_layers(sensitivity, feasible)
    assert found.loss <= best * 1.005
    assert found.bound <= best * (1 + 1e-9)
    assert found.loss == pytest.approx(sum(sensitivity[f"{name}.weight"].loss[b] for name, b in found.weights.items()))
    lq.set_bits(model, found.weights)
    assert lq.summary(model).average_bits <= average + 1e-6


def test_compression_is_of_the_weights():
    assert lq.allocate(network(), table(), "8x").weights == lq.allocate(network(), table(), 4.0).weights


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("size", [400, 450, 500])
def test_stored_bytes_are_kept(granularity, size):
    model = network()
    found = lq.allocate(model, table(), f"{size}B", granularity=granularity)
    lq.set_bits(model, found.weights)
    assert size - 30 <= lq.summary(model).bytes <= size


def test_channels_lose_less_than_layers():
    model, sensitivity = network(), table()
    by_layer, by_channel = (lq.allocate(model, sensitivity, 3.0, granularity=g) for g in ("layer", "channel"))
    assert by_channel.loss < by_layer.loss
    assert [len(widths) for widths in by_channel.weights.values()] == [16, 8, 4]
    lq.set_bits(model, by_channel.weights)
    assert lq.summary(model).average_bits <= 3.0 + 1e-6


def test_groups_of_channels_share_a_width():
    model = network()
    found = lq.allocate(
        model, lq.measure_sensitivity(model, [X], "output_distortion", group=3), 3.0, granularity="channel"
    )
    widths = found.weights["2"]
    assert len(widths) == 8
    assert all(len(set(widths[i : i + 3])) == 1 for i in (0, 3, 6))


def test_bit_operations():
    model, sensitivity = network(activations=4), table()
    limit = 0.6 * lq.summary(model).bitops
    found = lq.allocate(model, sensitivity, f"{limit}BitOps", solver="exact")
    lq.set_bits(model, found.weights)
    assert lq.summary(model).bitops <= limit
    inputs = {"0": 32, "2": 4, "4": 4}  # the network's input stays float

    def feasible(widths):
        return sum(SIZES[name] * b * inputs[name] for name, b in widths.items()) <= limit

    assert found.loss == pytest.approx(enumerate_layers(sensitivity, feasible))


def test_latency_tables(tmp_path):
    path = tmp_path / "latency.csv"
    rows = [("0", b, 10 * b) for b in (4, 8)] + [("2", b, b) for b in range(2, 9)]
    path.write_text("layer,bits,latency\n" + "\n".join(",".join(map(str, row)) for row in rows))
    sensitivity = table()
    with pytest.warns(NoEffectWarning, match=r"has no rows for 1 of 3 layers, which cost nothing \(4\)"):
        found = lq.allocate(network(), sensitivity, lq.Latency(path, 45.0), solver="exact")
    assert found.weights == {"0": 4, "2": 5, "4": 8}  # nothing is said of layer 4
    path.write_text(path.read_text() + "\n" + "\n".join(f"4,{b},0" for b in range(1, 9)))
    with pytest.raises(SpecError, match="a latency table has one width per layer"):
        lq.allocate(network(), sensitivity, lq.Latency(path, 45.0), granularity="channel")
    with pytest.raises(SpecError, match="no width is left for 0.weight"):
        lq.allocate(network(), sensitivity, lq.Latency(path, 45.0), bits=[2, 3])
    path.write_text("layer,bits,latency\nfc,4,1\n")
    with pytest.raises(PatternError, match="latency table pattern 'fc' matches none"):
        lq.allocate(network(), sensitivity, lq.Latency(path, 45.0))


def test_latencies_at_the_width_of_the_input(tmp_path):
    path = tmp_path / "latency.csv"
    path.write_text(
        "layer,bits,input_bits,latency\n" + "".join(f"2,{b},{a},{b * a}\n" for b in (2, 4, 8) for a in (4, 8))
    )
    with path.open("a") as file:
        file.write("0,2,,0\n0,8,,0\n4,2,,0\n4,8,,0\n")
    limit = lq.Latency(path, 16.0)
    assert lq.allocate(network(activations=4), table(), limit).weights["2"] == 4
    assert lq.allocate(network(activations=8), table(), limit).weights["2"] == 2


def test_several_budgets_hold_together():
    model, sensitivity = network(), table()
    operations = 0.7 * lq.summary(model).bitops
    found = lq.allocate(model, sensitivity, [3.5, f"{operations}BitOps", "850B"], solver="exact")
    lq.set_bits(model, found.weights)
    summary = lq.summary(model)
    assert summary.average_bits <= 3.5 and summary.bitops <= operations and summary.bytes <= 850
    assert len(found.costs) == 3


def test_activations_have_a_budget_of_their_own():
    model, sensitivity = network(), table()
    found = lq.allocate(model, sensitivity, 3.0, activations=4.5)
    assert found.weights == lq.allocate(model, sensitivity, 3.0).weights
    assert 16 * found.activations["2.input"] + 8 * found.activations["4.input"] <= 4.5 * 24
    lq.set_bits(model, found.weights, found.activations)
    assert {name: int(q.bits) for name, q in activation_quantizers(model).items()} == found.activations
    model(X)


def test_activations_jointly_with_weights():
    model, sensitivity = network(), table()
    found = lq.allocate(model, sensitivity, 3.0, activations="joint", activation_bits=range(2, 9), solver="exact")
    total = sum(SIZES.values()) + 24
    spent = sum(SIZES[name] * b for name, b in found.weights.items())
    spent += 16 * found.activations["2.input"] + 8 * found.activations["4.input"]
    assert spent <= 3.0 * total
    assert min(found.activations.values()) >= 2


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("solver", ["greedy", "lagrangian", "exact"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_bit_operations_of_weights_and_activations_together(granularity, solver, share):
    model, sensitivity, widths = network(weights=8, activations=8), table(), (1, 2, 4, 8)
    limit = share * lq.summary(model).bitops
    options = {"bits": widths, "activation_bits": widths, "activations": "joint", "granularity": granularity}
    found = lq.allocate(model, sensitivity, f"{limit}BitOps", solver=solver, **options)
    lq.set_bits(model, found.weights, found.activations)
    assert lq.summary(model).bitops <= limit * (1 + 1e-9)
    best = np.inf
    for a, b, c, d, e in itertools.product(widths, repeat=5):
        if SIZES["0"] * a * 32 + SIZES["2"] * b * d + SIZES["4"] * c * e <= limit:
            weights = sum(sensitivity[f"{name}.weight"].loss[w] for name, w in zip(SIZES, (a, b, c), strict=True))
            best = min(best, weights + sensitivity["2.input"].loss[d] + sensitivity["4.input"].loss[e])
    assert found.loss <= best * (1.0 + 1e-9 if granularity == "layer" else 0.95)


def test_bit_operations_with_several_budgets():
    model, sensitivity = network(weights=8, activations=8), table()
    limit = 0.5 * lq.summary(model).bitops
    found = lq.allocate(model, sensitivity, [f"{limit}BitOps", 4.0], activations=5.0)
    lq.set_bits(model, found.weights, found.activations)
    assert lq.summary(model).bitops <= limit
    assert lq.summary(model).average_bits <= 4.0
    assert 16 * found.activations["2.input"] + 8 * found.activations["4.input"] <= 5.0 * 24


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["first", "last"])
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_new_kind_of_budget_that_counts_products(monkeypatch, order, share):
    """Like bit operations, and each weight costs 9 for each of its bits."""
    table_of, pairs_of, count = Counting.table, Counting.pairs, np.array([SIZES["0"], SIZES["2"], SIZES["4"]])
    operations = parse_budget("1BitOps")

    def costs(self, budget):
        if budget.kind != "made up":
            return table_of(self, budget)
        own = np.array([9.0 * item.tensor.numel * (item.tensor.role == "weight") for item in self.items])
        return table_of(self, operations) + own[:, None] * self.widths

    def pairs(self, budget):
        return pairs_of(self, operations if budget.kind == "made up" else budget)

    monkeypatch.setattr(Counting, "table", costs)
    monkeypatch.setattr(Counting, "pairs", pairs)
    monkeypatch.setitem(_KINDS, "made up", ("{:.4g} points", {"points": 1.0}))
    model, sensitivity, widths = network(weights=8, activations=8), table(), (1, 2, 4, 8)

    def spent(a, b, c, d, e):
        return float((9 * count * [a, b, c]).sum()) + SIZES["0"] * a * 32 + SIZES["2"] * b * d + SIZES["4"] * c * e

    limit, mean = share * spent(8, 8, 8, 8, 8), 6.0
    budgets = [f"{limit} points", mean][order]
    options = {"bits": widths, "activation_bits": widths, "activations": "joint", "solver": "exact"}
    found = lq.allocate(model, sensitivity, budgets, **options)
    chosen = (*found.weights.values(), *found.activations.values())
    assert spent(*chosen) <= limit * (1 + 1e-9)
    assert found.costs[f"{limit:.4g} points"] == f"{spent(*chosen):.4g} points"
    best, sizes = np.inf, np.array([*count, 16, 8])
    for tried in itertools.product(widths, repeat=5):
        if spent(*tried) <= limit and sizes @ tried <= mean * sizes.sum():
            names = [*(f"{name}.weight" for name in SIZES), "2.input", "4.input"]
            best = min(best, sum(sensitivity[name].loss[b] for name, b in zip(names, tried, strict=True)))
    assert found.loss == pytest.approx(best)


def test_several_budgets_of_operations_without_products():
    """Activations keep their widths, so that operations add up: both limits hold."""
    model, sensitivity = network(), table()
    limits = [0.8 * lq.summary(model).bitops, 0.6 * lq.summary(model).bitops]
    found = lq.allocate(model, sensitivity, [f"{limit}BitOps" for limit in limits], solver="exact")
    assert found.weights == lq.allocate(model, sensitivity, f"{limits[1]}BitOps", solver="exact").weights


def test_bit_operations_of_attention():
    model, x = example("block")
    lq.attach(model, 8, 8, structure=lq.inspect(model, x), first_last=None)
    lq.calibrate(model, [x])
    sensitivity = lq.measure_sensitivity(model, [x], "output_distortion")
    limit = 0.4 * lq.summary(model).bitops
    found = lq.allocate(model, sensitivity, f"{limit}BitOps", activations="joint")
    lq.set_bits(model, found.weights, found.activations)
    assert 0.9 * limit <= lq.summary(model).bitops <= limit
    assert {"attn.matmul_0_left", "attn.matmul_1_right"} <= set(found.activations)


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("kind", ["text", "odd weights", "block", "encoder", "u-net", "residual"])
def test_every_kind_of_model_takes_its_allocation(kind, granularity):
    model, x = example(kind)
    lq.attach(model, 8, 8, structure=lq.inspect(model, x), first_last=None)
    lq.calibrate(model, [x])
    sensitivity = lq.measure_sensitivity(model, [x], "output_distortion")
    found = lq.allocate(model, sensitivity, 4.0, granularity=granularity, activations=5.0, pins={"*": range(2, 8)})
    lq.set_bits(model, found.weights, found.activations)
    wanted = {**{f"{name}.weight": bits for name, bits in found.weights.items()}, **found.weights, **found.activations}
    for quantizer in quantizers(model):
        bits = torch.as_tensor(wanted[quantizer.name], dtype=torch.float)
        assert torch.equal(quantizer.bits, bits.expand_as(quantizer.bits))
    assert model(x).isfinite().all()


def test_a_model_that_is_a_layer():
    model = lq.attach(nn.Linear(12, 4), 8, first_last=None)
    found = lq.allocate(model, lq.measure_sensitivity(model, [X], "output_distortion"), 3.0)
    lq.set_bits(model, found.weights)
    assert lq.summary(model).average_bits == 3


def test_pins():
    found = lq.allocate(network(), table(), 4.0, pins={"4": 8, "0": [2, 4]})
    assert found.weights["4"] == 8
    assert found.weights["0"] in (2, 4)
    channels = lq.allocate(network(), table(), 4.0, granularity="channel", pins={"4.weight": 0})
    assert set(channels.weights["4"]) == {0}
    with pytest.raises(PatternError, match="pins pattern 'fc' matches none"):
        lq.allocate(network(), table(), 4.0, pins={"fc": 8})
    with pytest.raises(SpecError, match=r"pins\['4'\]=16; use widths that were measured"):
        lq.allocate(network(), table(), 4.0, pins={"4": 16})


def test_memory_of_one_layer():
    sensitivity = table()
    assert lq.allocate(network(), sensitivity, 8.0, layer_memory="100B").weights == {"0": 4, "2": 6, "4": 8}
    channels = lq.allocate(network(), sensitivity, 8.0, layer_memory=100, granularity="channel").weights
    assert 90 <= sum(channels["0"]) * 12 / 8 <= 100
    assert sum(channels["2"]) * 16 / 8 <= 100
    with pytest.raises(BudgetError, match="layer_memory='10B' cannot hold 0.weight: .* it takes 24 to 192 bytes"):
        lq.allocate(network(), sensitivity, 8.0, layer_memory="10B")
    with pytest.raises(SpecError, match="layer_memory='8x' is no size"):
        lq.allocate(network(), sensitivity, 8.0, layer_memory="8x")


def test_budgets_that_cannot_be_met_say_what_can():
    with pytest.raises(BudgetError, match="the budget of 40x cannot be met: .* feasible are 32x to 4x"):
        lq.allocate(network(), table(), "40x")
    with pytest.raises(BudgetError, match="the budget of 1.5 bits cannot be met: .* feasible are 2 bits to 4 bits"):
        lq.allocate(network(), table(), 1.5, bits=[2, 4])
    least = lq.summary(network(weights=1)).bytes
    with pytest.raises(
        BudgetError, match=rf"the budget of 100 bytes cannot be met: .* feasible are {least + 3} bytes to"
    ):
        lq.allocate(network(), table(), "100B")
    with pytest.raises(BudgetError, match="of 1 bits of activations cannot be met: .* feasible are 2 bits to 8 bits"):
        lq.allocate(network(), table(), 3.0, activations=1.0)


def test_errors():
    model, sensitivity = network(), table()
    with pytest.raises(SpecError, match="solver='magic' is unknown; use 'greedy', 'lagrangian', 'exact'"):
        lq.allocate(model, sensitivity, 3.0, solver="magic")
    message = (
        "1e[+]06 BitOps and 2e[+]06 BitOps both count products of widths .*; one budget can: give the stricter alone"
    )
    with pytest.raises(SpecError, match=message):
        lq.allocate(model, sensitivity, ["1MBitOps", "2MBitOps"], activations="joint")
    with pytest.raises(SpecError, match="granularity='row' is unknown"):
        lq.allocate(model, sensitivity, 3.0, granularity="row")
    with pytest.raises(SpecError, match="activations=-1; use None, 'joint' or a mean width"):
        lq.allocate(model, sensitivity, 3.0, activations=-1)
    with pytest.raises(SpecError, match="activations='all'; use None, 'joint' or a mean width"):
        lq.allocate(model, sensitivity, 3.0, activations="all")
    with pytest.raises(SpecError, match=r"bits=\[16\]: choose from the widths that were measured"):
        lq.allocate(model, sensitivity, 3.0, bits=[16])
    with pytest.raises(DataError, match="the sensitivity has '0.weight', the model has not"):
        lq.allocate(lq.attach(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), 4), sensitivity, 3.0)
    with pytest.raises(SpecError, match="was measured by layer only; use granularity='layer'"):
        lq.allocate(model, lq.measure_sensitivity(model, [X], "kl"), 3.0, granularity="channel")
    with pytest.raises(SpecError, match="no tensor was measured that could be allocated"):
        lq.allocate(model, lq.measure_sensitivity(model, [X], "kl", weights=False), 3.0)


def test_json_there_and_back(tmp_path):
    found = lq.allocate(network(), table(), 3.0, granularity="channel", activations=4.0)
    path = tmp_path / "allocation.json"
    path.write_text(found.to_json())
    assert lq.Allocation.load(path) == found
    assert "lagrangian" in str(found)
    for text in ("{}", "[", found.to_json().replace(f'"2.input": {found.activations["2.input"]}', '"2.input": 9')):
        with pytest.raises(DataError, match="not a saved allocation"):
            lq.Allocation.from_json(text)


def test_it_is_deterministic():
    texts = {lq.allocate(network(), table(), 3.0, granularity="channel").to_json() for _ in range(3)}
    assert len(texts) == 1


def changed(sensitivity, name, **values):
    tensors = tuple(replace(t, **values) if t.name == name else t for t in sensitivity.tensors)
    return replace(sensitivity, tensors=tensors)


def test_a_table_that_says_nothing():
    zero = replace(table(), tensors=tuple(replace(t, loss=t.loss * 0) for t in table().tensors))
    for options in ({}, {"granularity": "channel"}, {"activations": "joint"}, {"solver": "exact"}):
        with pytest.raises(DataError, match="the sensitivity is zero for all of 5 tensors at every width.*look at the"):
            lq.allocate(network(), zero, "8x", **options)
    for value in (np.nan, np.inf):
        with pytest.raises(DataError, match=r"the sensitivity of 2.weight has NaN or Inf"):
            lq.allocate(network(), changed(table(), "2.weight", loss=np.full(9, value)), "8x")
    one = changed(zero, "2.weight", loss=4.0 ** -np.arange(9))
    # the others cost nothing, as was measured: (3 * 352 - 1 * 224) / 128 bits are left
    assert lq.allocate(network(), one, 3.0, solver="exact").weights["2"] == 6


def test_a_table_of_another_model():
    with pytest.raises(DataError, match=r"the sensitivity of 2.weight is of 127 values, the model has 128"):
        lq.allocate(network(), changed(table(), "2.weight", numel=127), "8x")
    with pytest.raises(DataError, match=r"the sensitivity of 2.weight is of 9 channels, the model has 8"):
        lq.allocate(network(), changed(table(), "2.weight", channels=9), "8x")


def test_weights_that_were_not_measured_keep_their_widths():
    sensitivity = table()
    part = replace(sensitivity, tensors=tuple(t for t in sensitivity.tensors if t.name != "0.weight"))
    message = r"1 of 3 weights are not in the sensitivity: they keep their widths and do not count .* \(0.weight\)"
    with pytest.warns(NoEffectWarning, match=message):
        found = lq.allocate(network(), part, 3.5)
    assert set(found.weights) == {"2", "4"}


def test_no_budget_at_all():
    with pytest.raises(SpecError, match="limits nothing"):
        lq.allocate(network(), table(), [])

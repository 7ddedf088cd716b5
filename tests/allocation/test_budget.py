from typing import get_args

import pytest
import torch
from torch import nn

import lq
from lq.allocation.budget import _KINDS, Budget, Costs, Kind, Latency, parse_budget, read_latencies
from lq.errors import DataError, SpecError
from tests.models import example


@pytest.mark.parametrize(
    ("value", "kind", "limit"),
    [
        (3, "bits", 3),
        (2.5, "bits", 2.5),
        ("2.5", "bits", 2.5),
        ("8x", "compression", 8),
        ("10.66 X", "compression", 10.66),
        ("1000B", "bytes", 1000),
        ("1.5MB", "bytes", 1.5e6),
        ("64 KiB", "bytes", 65536),
        ("2.5GBitOps", "bitops", 2.5e9),
        ("300 MBOPs", "bitops", 3e8),
    ],
)
def test_parse_budget(value, kind, limit):
    assert parse_budget(value) == Budget(kind, limit)


@pytest.mark.parametrize("value", ["", "x", "8 y", "-3MB", "1..2x", "0x", None, True, [3], {"limit": 3}])
def test_what_is_no_budget(value):
    with pytest.raises(SpecError, match="is not understood; use a mean width such as 3.0"):
        parse_budget(value)


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_budgets_are_positive(value):
    with pytest.raises(SpecError, match="is not positive; give a limit above 0"):
        parse_budget(value)


def test_every_kind_is_known_by_its_name():
    assert tuple(_KINDS) == get_args(Kind)


def test_costs_are_shown_in_the_budgets_unit():
    assert parse_budget("8x").cost_limit == 4
    assert parse_budget("8x").show(2.0) == "16x"
    assert parse_budget("1kB").show(1234.4) == "1234 bytes"
    assert parse_budget(3).show(2.5) == "2.5 bits"
    assert parse_budget("1MBitOps").show(1.25e6) == "1.25e+06 BitOps"
    assert Budget("latency", 4.0).show(2.0) == "2 latency"


def test_latency_tables(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("layer,bits,latency,input_bits\nfc,4,1.5,\nfc,8,2.5,8\n")
    assert read_latencies(path) == {"fc": {(4, None): 1.5, (8, 8): 2.5}}
    assert parse_budget({"table": str(path), "limit": 3}) == parse_budget(Latency(path, 3))
    for content, message in (
        ("", "has no rows"),
        ("fc,4,0,\nfc,8,0,\n", "has no latency above 0"),
        ("fc,4,nan,\n", "line 2: latency 'nan' is no finite number of 0 or more"),
        ("fc,4,1,\nfc,8,inf,\n", "line 3: latency 'inf' is no finite"),
        ("fc,4,-1,\n", "line 2: latency '-1' is no finite"),
        ("fc,4,1,8\nfc,4,2,8\n", "line 3: 'fc' at these widths is there twice"),
    ):
        path.write_text(f"layer,bits,latency,input_bits\n{content}")
        with pytest.raises(DataError, match=message):
            parse_budget(Latency(path, 3))
    path.write_text("layer,latency\nfc,4\n")
    with pytest.raises(DataError, match="lacks the column bits; a latency table has the columns layer, bits, latency"):
        read_latencies(path)
    path.write_text("layer,bits,latency\nfc,4,1\nfc,many,2\n")
    with pytest.raises(DataError, match="line 3: invalid literal"):
        read_latencies(path)


@pytest.mark.parametrize("kind", ["residual", "block", "odd weights", "text"])
def test_overhead_and_codes_are_the_stored_bytes(kind):
    model, x = example(kind)
    lq.attach(model, 8, 8, structure=lq.inspect(model, x), first_last=None)
    lq.calibrate(model, [x])
    costs = Costs.of(model)
    weights = [tensor for tensor in costs.tensors.values() if tensor.role == "weight"]
    for width in (8, 4, 2):  # multiples of a byte per layer: nothing is rounded up
        for tensor in weights:
            lq.set_bits(model, {tensor.layer: width})
        codes = sum(tensor.numel * width / 8 for tensor in weights)
        assert lq.summary(model).bytes == pytest.approx(costs.overhead + codes, abs=len(weights))


@pytest.mark.parametrize("kind", ["residual", "block", "u-net"])
def test_products_are_the_summarys_bit_operations(kind):
    model, x = example(kind)
    lq.attach(model, 4, 6, structure=lq.inspect(model, x), first_last=8)
    lq.calibrate(model, [x])
    costs = Costs.of(model)
    found = sum(p.macs * costs.bits(p.left) * costs.bits(p.right) for p in costs.products)
    assert found == pytest.approx(lq.summary(model).bitops)


def test_a_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    lq.attach(model, 4, first_last=None)
    assert {name: tensor.numel for name, tensor in Costs.of(model).tensors.items()} == {"0.weight": 16}


def test_weights_of_functions_count_what_they_take():
    """An LSTM, one of whose rows of eight bits takes twice the codes."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LSTM(16, 16, batch_first=True)), torch.randn(3, 4, 16)
    structure = lq.inspect(model, x, forward=lambda m, x: m[0](x))
    lq.calibrate(lq.attach(model, 4, structure=structure, first_last=None), [x], forward=lambda m, x: m[0](x))
    costs = Costs.of(model)
    weights = {name: t.numel for name, t in costs.tensors.items() if t.role == "weight"}
    assert weights == {"0.rnn_0_weight_0": 1024, "0.rnn_0_weight_1": 1024}
    assert costs.overhead == 2 * 64 * 4 + 2 * 64 * 4  # steps, biases
    assert lq.summary(model).bytes == costs.overhead + 1024


def test_allocated_bytes_are_those_of_the_file(tmp_path):
    torch.manual_seed(0)
    model, x = nn.TransformerEncoderLayer(96, 4, 192, batch_first=True).eval(), torch.randn(6, 5, 96)
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x), first_last=None), [x])
    sensitivity = lq.measure_sensitivity(model, [x], "output_distortion", widths=(2, 4, 8), activations=False)
    found = lq.allocate(model, sensitivity, "45kB", granularity="layer")
    lq.set_bits(model, found.weights)
    size = lq.save(model, tmp_path / "m.safetensors")
    assert 44_000 < size < 45_000 * 1.02
    assert abs(lq.summary(model).bytes - size) < 0.015 * size


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "t.csv has no rows"),
        ("0,4,1\n0,4,2\n", "t.csv, line 3: '0' at these widths is there twice"),
        ("0,9,1\n", "t.csv, line 2: bits=9 is not a width"),
        ("0,4,nan\n", "t.csv, line 2: latency 'nan' is no finite number of 0 or more"),
        ("0,4,-1\n", "t.csv, line 2: latency '-1' is no finite number of 0 or more"),
        ("0,4\n", "t.csv, line 2: it has no latency"),
        ("0,4,1,8\n", "t.csv, line 2: it has more cells than columns"),
    ],
)
def test_rows_that_say_no_latency(rows, message, tmp_path):
    (tmp_path / "t.csv").write_text(f"layer,bits,latency\n{rows}")
    with pytest.raises(DataError, match=message):
        read_latencies(tmp_path / "t.csv")


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="there is no file .*none.csv"):
        read_latencies(tmp_path / "none.csv")


@pytest.mark.parametrize("latency", [Latency(None, 3), Latency({}, 3), Latency("t.csv", "3"), Latency("t.csv", None)])
def test_latencies_of_other_kinds(latency):
    with pytest.raises(SpecError, match="should have the path of a CSV and a number, such as Latency"):
        parse_budget(latency)

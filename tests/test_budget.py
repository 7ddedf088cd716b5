import pytest
from torch import nn

import lq
from lq.budget import Budget, Costs, Latency, parse_budget, read_latencies
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


def test_costs_are_shown_in_the_budgets_unit():
    assert parse_budget("8x").cost_limit == 4
    assert parse_budget("8x").show(2.0) == "16x"
    assert parse_budget("1kB").show(1234.4) == "1234 bytes"
    assert parse_budget(3).show(2.5) == "2.5 bits"


def test_latency_tables(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("layer,bits,latency,input_bits\nfc,4,1.5,\nfc,8,2.5,8\n")
    assert read_latencies(path) == {"fc": {(4, None): 1.5, (8, 8): 2.5}}
    assert parse_budget({"table": str(path), "limit": 3}) == parse_budget(Latency(path, 3))
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

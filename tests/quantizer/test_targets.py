"""The table of engines: which grids each refuses or computes in float."""

import itertools
import re
from pathlib import Path

import pytest

from lq import QuantSpec
from lq.errors import SpecError
from lq.quantizer.spec import WIDTHS
from lq.quantizer.targets import TARGETS, Grid, listed, target_of

INT8 = {"per_channel": False, "symmetric": True, "signed": True}


def activation(bits, **options):
    return Grid.of(QuantSpec(bits, **{"per_channel": False, "symmetric": False, **options}), is_weight=False)


def weight(bits, **options):
    return Grid.of(QuantSpec(bits, **{"signed": True, **options}), is_weight=True)


@pytest.mark.parametrize(
    ("symmetric", "signed", "zeros"),
    [
        (True, True, {"middle"}),
        (True, False, {"lowest"}),
        (True, None, {"middle", "lowest"}),
        (False, True, {"anywhere"}),
        (False, False, {"lowest"}),
        (False, None, {"anywhere", "lowest"}),
    ],
)
def test_where_the_zero_of_a_spec_may_lie(symmetric, signed, zeros):
    grid = Grid.of(QuantSpec((4, 8), symmetric=symmetric, signed=signed), is_weight=True)
    assert grid.zeros == zeros and grid.widths == (4, 8) and grid.is_weight


def runs(target, **grids):
    try:
        TARGETS[target].refuse(grids)
    except SpecError:
        return False
    return True


def test_what_tensorrt_runs():
    """Written out once more: INT8 with zero in the middle; weights of any width that INT8 holds."""
    for bits, symmetric, signed in itertools.product(WIDTHS, [True, False], [True, False, None]):
        middle = symmetric and signed is True
        assert runs("tensorrt", a=activation(bits, symmetric=symmetric, signed=signed)) == (middle and bits == 8)
        assert runs("tensorrt", w=weight(bits, symmetric=symmetric, signed=signed)) == (middle and bits <= 8)
    assert not runs("tensorrt", w=weight((4, 16))) and runs("tensorrt", w=weight((0, 4, 8)))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_what_the_others_run(target):
    for bits, symmetric, signed in itertools.product(WIDTHS, [True, False], [True, False, None]):
        assert runs(target, a=activation(bits, symmetric=symmetric, signed=signed))
        assert runs(target, w=weight(bits, symmetric=symmetric, signed=signed))


@pytest.mark.parametrize(
    ("target", "grid", "said"),
    [
        ("onnxruntime", weight(16), "1 weight has 16 bits (x): use weights=8 or fewer"),
        ("onnxruntime", activation(16), "1 activation has 16 bits (x): use activations=8 or fewer"),
        ("onnxruntime", activation(8, **INT8), "1 activation has room for both signs even where no value is negative"),
        ("onnxruntime", activation(8), ""),
        ("onnxruntime", activation(8, symmetric=True), ""),
        ("onnxruntime", weight(8, symmetric=False), ""),
        ("openvino", weight(16), "1 weight has 16 bits (x): use weights=8 or fewer"),
        ("openvino", activation(16), "1 activation has 16 bits (x): use activations=8 or fewer"),
        (
            "openvino",
            weight(8, symmetric=False),
            "1 weight has 8 bits with zero points of their own (x): use symmetric",
        ),
        ("openvino", weight((4, 8), symmetric=False), "1 weight has 8 bits with zero points of their own (x): use sym"),
        ("openvino", weight(7, symmetric=False), ""),
        ("openvino", activation(8, **INT8), ""),
        ("tensorrt", activation(8, **INT8), ""),
        *(
            (name, activation(4, levels="log2"), "1 activation has logarithmic levels (x): use levels=")
            for name in TARGETS
        ),
    ],
)
def test_what_is_computed_in_float(target, grid, said):
    found = TARGETS[target].in_float({"x": grid})
    assert "".join(found).startswith(said) and bool(found) == bool(said)


def test_one_error_says_all_that_is_wrong():
    grids = {f"{name}.input": activation(4) for name in "abcde"} | {"f.weight": weight(8, symmetric=False)}
    message = (
        "target='tensorrt' does not run this network: 1 weight has zero points of their own (f.weight): use "
        "symmetric=True, or QuantSpec(..., symmetric=True, signed=True); 5 activations have other widths than 8 bits "
        "(a.input, b.input, c.input and 2 more): use activations=8; 5 activations have their zero elsewhere than in "
        "the middle (a.input, b.input, c.input and 2 more): use "
    )
    with pytest.raises(SpecError, match=f"^{re.escape(message)}"):
        TARGETS["tensorrt"].refuse(grids)


def test_names():
    assert target_of(None) is None and target_of("openvino") is TARGETS["openvino"]
    with pytest.raises(SpecError, match=r"^target='onnx' is unknown; use onnxruntime, openvino or tensorrt$"):
        target_of("onnx")
    with pytest.raises(SpecError, match=r"^target=8 is unknown; use onnxruntime"):
        target_of(8)
    assert all(name == target.name for name, target in TARGETS.items())


def test_a_table_of_opsets_and_types():
    for target in TARGETS.values():
        oldest, newest = target.opsets
        assert oldest == 13 and newest >= 25 and oldest <= (target.opset or oldest) <= newest
        assert target.least_stored in (2, 4, 8)


def test_long_lists_are_cut():
    assert listed("abc") == "a, b, c" and listed("abcde") == "a, b, c and 2 more"


def test_the_page_has_the_table():
    """Each engine is a column of docs/targets.md."""
    page = (Path(__file__).parents[2] / "docs" / "targets.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    table = {row[0]: dict(zip(rows[0][1:], row[1:], strict=True)) for row in rows}
    for name, target in TARGETS.items():
        column = {title: cells[f'`"{name}"`'] for title, cells in table.items()}
        assert column["tried"].startswith(target.tried or "no")
        assert "{} to {}".format(*target.opsets) in column["opsets, and the one by default"]
        assert column["opsets, and the one by default"].endswith(str(target.opset or "21, or 25 for 2 bits"))
        assert column["smallest type of a stored weight"] == f"{target.least_stored} bits"
        for of_weights, tensors in ((True, "weights"), (False, "activations")):
            for refused, verdict in ((True, "refused"), (False, "in float")):
                rules = [r for r in target.rules if (r.of_weights, r.refused) == (of_weights, refused)]
                said = column[f"{tensors} {verdict}"]
                assert len(said.split(";")) == len(rules) if rules else said == "-"

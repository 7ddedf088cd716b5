"""Specs: which widths exist, and what each error says."""

import pytest

from lq.errors import LqError, SpecError
from lq.quantizer.spec import WIDTHS, QuantSpec, activation_spec, check_bits, weight_spec


def test_widths():
    assert (*range(9), 16) == WIDTHS
    assert [check_bits(bits) for bits in WIDTHS] == list(WIDTHS)


@pytest.mark.parametrize("bits", [-1, 9, 15, 17, 32, 4.0, "4", None, True, (4, 9), (2, 3.0)])
def test_other_widths_are_errors(bits):
    with pytest.raises(SpecError, match="is not a width; use an integer from 0 to 8, or 16"):
        QuantSpec(bits)


def test_errors_are_value_errors_too():
    assert issubclass(SpecError, ValueError)
    assert issubclass(SpecError, LqError)


def test_several_widths_need_channels():
    with pytest.raises(SpecError, match="3 widths were given for one tensor; set per_channel=True"):
        QuantSpec((2, 4, 8), per_channel=False)


def test_unknown_range_rule():
    with pytest.raises(SpecError, match="range='mse' is unknown"):
        QuantSpec(4, range="mse")


def test_specs_are_values():
    assert QuantSpec([2, 4]) == QuantSpec((2, 4))
    assert hash(QuantSpec([2, 4])) == hash(QuantSpec((2, 4)))
    assert (QuantSpec(4).widths, QuantSpec([2, 0]).widths) == ((4,), (2, 0))


@pytest.mark.parametrize(
    ("bits", "least", "expected"), [(4, 8, 8), (16, 8, 16), (0, 8, 0), ((2, 0, 16), 8, (8, 0, 16))]
)
def test_at_least(bits, least, expected):
    assert QuantSpec(bits, range="lp").at_least(least) == QuantSpec(expected, range="lp")


def test_defaults_of_weights_and_activations():
    assert weight_spec(4) == QuantSpec(4, per_channel=True, symmetric=True, signed=True)
    assert activation_spec(8) == QuantSpec(8, per_channel=False, symmetric=False, signed=None)
    given = QuantSpec(3, per_channel=False)
    assert weight_spec(given) is given
    assert activation_spec(given) is given


def test_activations_have_no_channels():
    with pytest.raises(SpecError, match=r"activations are quantized per tensor; use QuantSpec\(..., per_channel=False"):
        activation_spec(QuantSpec(8))

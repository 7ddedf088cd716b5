"""Widths that are not final are in the state of a model, and only those."""

import warnings

import pytest
import torch
from torch import nn

import lq
from lq.quantizer.final_widths import set_final_widths, unfinished_widths, warn_if_unfinished


def make(bits=4):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    return lq.calibrate(lq.attach(model, weights=bits, first_last=None))


def unfinished():
    model = make()
    set_final_widths(model, {"0.weight": torch.tensor(2.0), "2.weight": torch.tensor([1.0, 2.0, 3.0, 2.0])})
    return model


def test_it_is_part_of_the_state_until_it_is_reached():
    model, plain = unfinished(), make()
    found = {"0.weight": (4.0, 2.0), "2.weight": (4.0, 2.0)}
    assert unfinished_widths(model) == found
    extra = {"0.parametrizations.weight.0.final_bits", "2.parametrizations.weight.0.final_bits"}
    assert model.state_dict().keys() - plain.state_dict().keys() == extra
    other = make()
    assert other.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}).missing_keys == []
    assert unfinished_widths(other) == found
    other.load_state_dict(plain.state_dict())  # strictly: without them it is finished
    assert not unfinished_widths(other) and other.state_dict().keys() == plain.state_dict().keys()


def test_widths_that_are_there_already_are_final():
    model = make()
    set_final_widths(model, {"0.weight": torch.tensor(4.0)})
    assert model.state_dict().keys() == make().state_dict().keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_unfinished(model, "it")


def test_a_state_of_another_shape_is_refused():
    state = unfinished().state_dict()
    state["0.parametrizations.weight.0.final_bits"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"final_bits has shape \(3,\), expected \(4,\)"):
        make().load_state_dict(state)


def test_the_warning_names_three():
    model = make()
    set_final_widths(model, {f"{i}.weight": torch.tensor(2.0) for i in (0, 2, 3, 4)})
    text = r"^It has more bits .* \(0.weight: 4 bits instead of 2, 2.weight: .*, 3.weight: [^,]*, and 1 more\); use a "
    with pytest.warns(UserWarning, match=text):
        warn_if_unfinished(model, "It")


def test_in_half_precision_and_after_a_copy_it_is_known():
    import copy

    assert unfinished_widths(copy.deepcopy(unfinished()).half()) == unfinished_widths(unfinished())

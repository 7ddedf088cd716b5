"""The options of `lq.attach` and `Quantize`: defaults, checks, and a structure that comes from a file."""

import pytest
import torch
from torch import nn

import lq
from lq.attachment.options import AttachOptions, QuantizeOptions, SiteOptions
from lq.callbacks import Quantize


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": 9}, "bits=9 is not a width"),
        ({"activations": 17}, "bits=17 is not a width"),
        ({"activations": lq.QuantSpec(4)}, "activations are quantized per tensor"),
        ({"first_last": -1}, "bits=-1 is not a width"),
        ({"skip": "yes"}, "skip='yes' is unknown; use True, False or 'auto'"),
        ({"overrides": {"0": {}}}, r"overrides\['0'\]=\{\}; expected a mapping with 'weights' and/or 'activations'"),
        ({"overrides": {"0": {"bits": 2}}}, r"overrides\['0'\]=\{'bits': 2\}; expected a mapping"),
        ({"overrides": {"0": {"weights": 9}}}, "bits=9 is not a width"),
    ],
)
@pytest.mark.parametrize("take", [SiteOptions, Quantize, lambda **options: lq.attach(nn.Linear(2, 2), **options)])
def test_wrong_options_fail_at_once(take, options, message):
    with pytest.raises(lq.SpecError, match=message):
        take(**options)


def test_options_of_their_own():
    with pytest.raises(lq.SpecError, match="fold_bn='no' is unknown; use True, False or 'auto'"):
        QuantizeOptions(fold_bn="no")
    with pytest.raises(lq.SpecError, match="calibration_samples=0; calibration needs at least 1"):
        QuantizeOptions(calibration_samples=0)
    with pytest.raises(lq.SpecError, match="estimator='pact' is unknown"):
        AttachOptions(estimator="pact")
    assert (AttachOptions().weights, AttachOptions().activations) == (4, None)
    assert (QuantizeOptions().weights, QuantizeOptions().activations) == (8, 8)


def test_options_of_a_callback_can_be_changed_and_stay_checked():
    quantize = Quantize(4)
    quantize.first_last = None
    assert quantize.options == QuantizeOptions(4, first_last=None)
    with pytest.raises(lq.SpecError, match="bits=9 is not a width"):
        quantize.weights = 9
    assert quantize.weights == 4


def test_a_structure_may_be_read_from_a_file(tmp_path):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

    structure = lq.inspect(network(), torch.zeros(2, 4))
    path = tmp_path / "structure.json"
    path.write_text(structure.to_json(), encoding="utf-8")
    attached = [lq.attach(network(), 4, 4, structure=given, integer=True) for given in (structure, path, str(path))]
    first, *others = (list(model.state_dict()) for model in attached)
    assert all(keys == first for keys in others)
    assert SiteOptions(structure=path).read_structure().sites == structure.sites


def test_options_that_need_a_structure_are_left_out_without_one():
    options = SiteOptions(4, skip="auto", share_concats=True, integer=True)
    assert options.needs_structure == "skip='auto'"
    without = options.with_structure(None)
    assert without == SiteOptions(4) and not without.needs_structure
    assert SiteOptions(share_concats=True).needs_structure == "share_concats=True"
    assert SiteOptions(integer=True).needs_structure == "integer=True"

"""Activations with a few large values get more bits: when, and what goes along with it."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.attachment.sites import activation_quantizers


class Network(nn.Module):
    """Two linear layers, the second of which reads what a ReLU gives."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


def network_and_batches(massive=400.0):
    """A network of which few tokens have one massive value behind the ReLU."""
    torch.manual_seed(0)
    net, x = Network(), torch.randn(16, 20, 8)
    with torch.no_grad():
        net.first.weight[3] = 0.0
        net.first.weight[3, 0] = massive
        net.first.bias[3] = 0.0
    x[:, :, 0] = 0.0
    x[:, 0, 0] = 1.0  # one token of a sample
    return net, [x]


def attached(net, batches, **options):
    return lq.attach(net, 8, structure=lq.inspect(net, batches[0][:1]), **{"activations": 8, "outliers": 16} | options)


def test_the_activation_with_outliers_gets_them():
    net, batches = network_and_batches()
    exact = net(batches[0])
    narrow = lq.calibrate(attached(network_and_batches()[0], batches, outliers=None), batches)
    with pytest.warns(UserWarning, match=r"1 of 1 activations got 16 bits \(second.input\)"):
        wide = lq.calibrate(attached(net, batches), batches)
    assert {name: int(site.bits) for name, site in activation_quantizers(wide).items()} == {"second.input": 16}
    with torch.no_grad():
        errors = [float((model(batches[0]) - exact)[:, 1:].square().mean()) for model in (narrow, wide)]
    assert errors[1] < errors[0] / 20


def test_others_keep_theirs():
    net, batches = network_and_batches(massive=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lq.calibrate(attached(net, batches), batches)
    assert int(net.second.input_quantizer.bits) == 8


def test_relative_error_is_that_of_all_values():
    """Against each value divided by the size of its token, at least the median one."""
    net, batches = network_and_batches(massive=5.0)
    lq.calibrate(attached(net, batches, outliers=None), batches)
    values = net.first(batches[0]).relu().detach().flatten(0, 1)
    site = net.second.input_quantizer
    change = (site(values) - values).double().numpy()
    octaves = np.exp2(np.round(np.log2(np.sqrt((values.double().numpy() ** 2).mean(1)))))
    size = np.maximum(octaves, np.median(octaves))[:, None]
    expected = ((change / size) ** 2).sum() / ((values.double().numpy() / size) ** 2).sum()
    assert site.relative_error() == pytest.approx(expected, rel=0.02)


def test_checkpoints_and_exports_have_them(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, batches = network_and_batches()
    with pytest.warns(UserWarning, match="got 16 bits"):
        lq.calibrate(attached(net, batches), batches)
    torch.save(net.state_dict(), tmp_path / "model.pt")
    loaded = lq.load(tmp_path / "model.pt", Network()).eval()
    assert int(loaded.second.input_quantizer.bits) == 16
    assert torch.equal(loaded(batches[0]), net.eval()(batches[0]))
    report = lq.export_onnx(net, batches[0][:2], tmp_path / "model.onnx")
    assert any("1 activations of 16 bits" in note for note in report.notes)
    settings = runtime.SessionOptions()
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # else it rounds to 8 bits itself
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), settings, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: batches[0][:2].numpy()})
    with torch.no_grad():
        expected = net(batches[0][:2]).numpy()
    assert np.abs(output - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lq.QuantSpec(8, per_channel=False, outliers=9), "bits=9 is not a width"),
        (lambda: lq.QuantSpec(8, outliers=16), "outliers= is for activations"),
        (lambda: lq.attach(Network(), 8, 8, outliers=12), "bits=12 is not a width"),
    ],
)
def test_what_does_not_exist(make, message):
    with pytest.raises(lq.SpecError, match=message):
        make()

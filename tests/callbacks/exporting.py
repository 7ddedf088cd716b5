"""What files that ExportModel wrote give, compared with the module."""

import torch

import lq
from tests.export.exported import assert_close, run
from tests.helpers import dataset, tiny


def x():
    return dataset().tensors[0]


def outputs(path, given, fresh=None):
    """What a file of any format gives; packed ones need the plain network."""
    if path.suffix == ".onnx":
        return torch.tensor(run(path, given)[0])
    with torch.no_grad():
        if path.suffix == ".pt2":
            return torch.export.load(path).module()(given)
        return lq.load(path, fresh).eval()(given)


def check(path, module, fresh=None):
    """The file gives what the network gives, on any batch; ONNX files as nearly as float sums in another order do."""
    network_ = module.net.eval()
    for given in (x(), x()[:1], x()[:5]):
        with torch.no_grad():
            expected = network_(given)
        found = outputs(path, given, tiny(5).net if fresh is None else fresh())
        if path.suffix == ".onnx":
            assert_close(found, expected, 1e-3)
        else:
            assert torch.equal(found, expected)


def of(kind, seed=0):
    torch.manual_seed(seed)
    return kind()

"""Copies of models that hold computed tensors."""

import copy

import pytest
import torch
from torch import nn

import lq
from lq.attachment.float_models import copy_model, float_copy, float_model


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_that_hooks_compute(norm):
    torch.manual_seed(0)
    model, x = nn.Sequential(norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    copied = copy_model(model)
    assert torch.equal(copied.eval()(x), model.eval()(x))
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)
    assert not torch.equal(copied(x), model(x))
    lq.attach(model, 8, None, include="2")
    model.train()(x).sum().backward()
    teacher = float_copy(model)
    assert not lq.attachment.sites.is_attached(teacher) and not any(p.requires_grad for p in teacher.parameters())


def test_what_was_shared_is_shared():
    layer = nn.Linear(3, 3)
    copied = copy_model(nn.Sequential(layer, layer))
    assert copied[0] is copied[1] and copied[0] is not layer


def test_threads_leave_fused_kernels_as_they_were():
    """The switch is of the whole process: it is back when the last of several float models is done."""
    before = torch.backends.mha.get_fastpath_enabled()
    first, second = (float_model(nn.Linear(2, 2)) for _ in range(2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert torch.backends.mha.get_fastpath_enabled() == before

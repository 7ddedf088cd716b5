"""Distillation: its loss against the formula, its gradient against one loss in one graph."""

import math

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lq
from lq.attachment.float_models import float_copy
from lq.attachment.sites import is_attached, quantizers
from lq.errors import PatternError, SpecError, StateError
from lq.structure.outputs import kl_divergence, symmetric_kl_divergence
from lq.training.distillation import Distiller, stages


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def batch():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def grads(model):
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def softmax(logits, temperature):
    powers = [math.exp(v / temperature) for v in logits]
    return [v / sum(powers) for v in powers]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_is_that_of_a_loop(temperature):
    student, teacher = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(2)) * 3
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        pairs = zip(softmax(t, temperature), softmax(s, temperature), strict=True)
        total += sum(p * math.log(p / q) for p, q in pairs)
    expected = temperature**2 * total / 5
    assert kl_divergence(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergence(student.bfloat16(), teacher.bfloat16(), temperature).dtype == torch.float32


def test_divergence_is_the_mean_over_positions():
    student, teacher = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(3))
    flat = kl_divergence(student.flatten(0, 1), teacher.flatten(0, 1))
    torch.testing.assert_close(kl_divergence(student, teacher), flat)


@pytest.mark.parametrize(("weight", "temperature", "scale"), [(1.0, 1.0, 1.0), (0.5, 4.0, 1.0), (2.0, 2.0, 16.0)])
def test_gradient_is_that_of_the_sum_of_losses(weight, temperature, scale):
    student, teacher, plain = network(0), network(1), network(0)
    distiller = Distiller(student, teacher, weight=weight, temperature=temperature, gradient_scale=lambda: scale)
    student.train()(batch()).square().mean().mul(scale).backward()
    output = plain(batch())
    loss = kl_divergence(output, teacher(batch()).detach(), temperature)
    ((output.square().mean() + weight * loss) * scale).backward()
    torch.testing.assert_close(grads(student), grads(plain))
    torch.testing.assert_close(distiller.loss, loss.detach())
    assert not distiller.loss.requires_grad
    assert all(p.grad is None for p in teacher.parameters())


def test_removed_it_leaves_the_student_alone():
    student, plain = network(), network()
    Distiller(student, network(1), weight=1.0, temperature=1.0).remove()
    for model in (student, plain):
        model(batch()).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(grads(student), grads(plain), strict=True))


@pytest.mark.parametrize("context", ["eval", "no_grad", "frozen"])
def test_without_training_the_teacher_is_not_run(context):
    student, teacher = network(), network(1)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    distiller = Distiller(student, teacher, weight=1.0, temperature=1.0)
    student.train(context != "eval")
    if context == "frozen":
        student.requires_grad_(False)
    with torch.set_grad_enabled(context != "no_grad"):
        student(batch())
    assert calls == []
    assert distiller.loss is None


def test_half_precision_outputs():
    student = network().bfloat16()
    Distiller(student, network(1).bfloat16(), weight=1.0, temperature=1.0)
    student(batch().bfloat16()).sum().backward()
    assert all(g.dtype == torch.bfloat16 for g in grads(student))


def test_keyword_arguments_reach_the_teacher():
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    distiller = Distiller(student, teacher, weight=1.0, temperature=1.0)
    student(input=batch())
    torch.testing.assert_close(distiller.loss, kl_divergence(student(batch()), teacher(batch())).detach())


def test_outputs_other_than_a_tensor():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    student = Pair(4, 3)
    Distiller(student, Pair(4, 3), weight=1.0, temperature=1.0)
    with pytest.raises(
        StateError, match="needs a tensor of logits, Pair gives a tuple; name the module .* distill_from="
    ):
        student(batch())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_symmetric_divergence_counts_both_ways(temperature):
    student, teacher = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(4))
    both = kl_divergence(student, teacher, temperature) + kl_divergence(teacher, student, temperature)
    assert symmetric_kl_divergence(student, teacher, temperature) == both
    assert both == symmetric_kl_divergence(teacher, student, temperature)


def deep(seed=0):
    torch.manual_seed(seed)
    block = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)) for _ in range(2)]
    return nn.Sequential(nn.Linear(4, 4), *block, nn.Linear(4, 3))


@pytest.mark.parametrize("features", [None, ["1"], ["1", "2", "3"]])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_gradient_of_features_is_that_of_the_sum_of_losses(features, scale):
    student, teacher, plain = deep(0), deep(1), deep(0)
    options = {"weight": 0.7, "loss": "features", "features": features, "gradient_scale": lambda: scale}
    distiller = Distiller(student, teacher, **options)
    student(batch()).square().mean().mul(scale).backward()
    loss, x, target = 0.0, batch(), batch()
    for name, layer in plain.named_children():
        with torch.no_grad():
            target = teacher[int(name)](target)
        x = layer(x)
        if name in (features or ["1", "2"]):
            loss = loss + (x - target).square().mean() / target.square().mean()
    ((x.square().mean() + 0.7 * loss) * scale).backward()
    torch.testing.assert_close(grads(student), grads(plain))
    torch.testing.assert_close(distiller.loss, loss.detach())


class Checkpointed(nn.Sequential):
    """Runs its parts with activation checkpointing in training."""

    reentrant = None

    def forward(self, x):
        for part in self:
            x = part(x) if self.reentrant is None else checkpoint(part, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [True, False])
def test_features_of_parts_that_are_computed_again_in_backward(reentrant):
    found = []
    for kind in (None, reentrant):
        student = Checkpointed(*deep(0))
        distiller = Distiller(student, deep(1), weight=0.7, loss="features")
        student.reentrant = kind
        student(batch().requires_grad_()).square().mean().backward()
        found.append((grads(student), distiller.loss))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_stages_are_the_parts_with_layers_of_their_own():
    assert stages(deep()) == ["1", "2"]
    assert stages(network()) == ["0", "1", "2"]
    assert stages(timm.create_model("test_resnet")) == ["conv1", "layer1", "layer2", "layer3", "layer4"]


@pytest.mark.parametrize("task", [0.0, 0.5, 1.0])
def test_the_task_can_be_turned_down(task):
    student, teacher, plain = network(0), network(1), network(0)
    Distiller(student, teacher, weight=2.0, task=task)
    student(batch()).square().mean().backward()
    output = plain(batch())
    (task * output.square().mean() + 2.0 * kl_divergence(output, teacher(batch()).detach())).backward()
    torch.testing.assert_close(grads(student), grads(plain))


def test_unknown_losses_and_features():
    with pytest.raises(SpecError, match="distill_loss='mse' is unknown; use one of"):
        Distiller(network(), network(1), weight=1.0, loss="mse")
    with pytest.raises(PatternError, match=r"features \['layer9'\] are no modules of Sequential; it has 0, 1, 2"):
        Distiller(network(), network(1), weight=1.0, loss="features", features=["layer9"])


def test_keeps_no_graph_and_no_second_quantizers():
    student = lq.attach(deep(), 3, 3, first_last=None)
    lq.calibrate(student, [batch()])
    teacher = float_copy(student)
    distiller = Distiller(student, teacher, weight=1.0, loss="features")
    output = student(batch())
    assert not distiller.loss.requires_grad and not list(quantizers(teacher))
    assert all(t.grad_fn is None for t in distiller._targets.values())
    output.sum().backward()
    assert distiller._targets == {}


@pytest.mark.parametrize("attach", [True, False])
def test_float_copy(attach):
    model = network()
    expected = model(batch()).detach()
    if attach:
        lq.attach(model, 2, 4)
        lq.calibrate(model, [batch()])
    teacher = float_copy(model)
    assert is_attached(model) == attach
    assert not is_attached(teacher)
    assert torch.equal(teacher(batch()), expected)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    grids = {id(p) for q in quantizers(model) for p in q.parameters()}
    assert all(p.requires_grad for p in model.parameters() if id(p) not in grids)

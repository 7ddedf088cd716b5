"""What of lq waits for a GPU, and how often; `test_waiting.py` runs these tests in a process of its own.

Nothing may in what runs at every step or iteration. What is found once for a tensor may.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.callbacks.trainer.divergence import DivergenceWatch
from lq.callbacks.trainer.optimizers import loss_scale
from lq.quantizer.estimators import ESTIMATORS, NoiseScale
from lq.training.distillation import Distiller
from lq.training.noise_scale import Penalty, WidthLearner
from lq.training.width_goals import SizeBudget, Targets
from tests import pretended_gpu
from tests.pretended_gpu import WAITS, Pretended, Pretending


@pytest.fixture(scope="session", autouse=True)
def begun():
    if reason := pretended_gpu.begin():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def gpu(begun):
    torch.manual_seed(0)
    with Pretending() as mode:
        yield mode


def network():
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def quantized(device="gpu", weights=4, activations=4, **options):
    """A network that was calibrated on the CPU."""
    torch.manual_seed(0)
    net = lq.attach(network().eval(), weights, activations, **options)
    lq.calibrate(net, [torch.randn(8, 3, 8, 8)])
    return net.to(device)


def batches(count=2, device="gpu"):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]
    labels = [torch.randint(10, (8,), generator=generator) for _ in range(count)]
    return [(x.to(device), y.to(device)) for x, y in zip(images, labels, strict=True)]


def waits_of(function, *args, **kwargs):
    """What is noted while a function runs."""
    WAITS.found.clear()
    function(*args, **kwargs)
    return list(WAITS.found)


# --- the stand-in itself ----------------------------------------------------------------------------------------------

READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x[0]),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "equal": lambda x: torch.equal(x, x + 1),
    "mask": lambda x: x[x > 0],
    "written by a mask": lambda x: x.clone().__setitem__(x > 0, x[:1]),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.abs().long().bincount(),
    "a number from the host": lambda x: x + torch.tensor([1.0], device=x.device),
    "a tensor from the host": lambda x: x + torch.ones(3).to(x),
    "in backward": lambda x: (
        (y := x.clone().requires_grad_()).register_hook(lambda g: print(g.sum().item())) and y.sum().backward()
    ),
}


@pytest.mark.parametrize("kind", READS)
def test_what_waits_is_noted(kind):
    x = torch.tensor([1.0, -2.0, 3.0]).to("gpu")
    assert isinstance(x, Pretended) and x.device.type == "gpu"
    assert waits_of(READS[kind], x)


def test_what_does_not_wait_is_not():
    x = torch.tensor([1.0, -2.0, 3.0]).to("gpu").requires_grad_()
    made = (torch.full_like(x, 2.0), torch.zeros(3, device="gpu"), torch.ones(3).to("gpu", non_blocking=True))
    assert waits_of(lambda: (x * made[0] + made[1] * made[2]).clamp(0, 3).sum().backward()) == []
    assert x.grad.cpu().tolist() == [2.0, 0.0, 0.0]
    with pytest.raises(RuntimeError, match="tensors are on two devices"):
        x + torch.ones(3)


# --- training ---------------------------------------------------------------------------------------------------------


def step(net, batch, optimizer=None):
    net.train()
    F.cross_entropy(net(batch[0]), batch[1]).backward()
    if optimizer is not None:
        optimizer.step()


@pytest.mark.parametrize("estimator", [*ESTIMATORS, "learned widths"])
@pytest.mark.parametrize("channels", [False, True])
def test_a_step_of_training(estimator, channels):
    chosen = NoiseScale(widths=True) if estimator == "learned widths" else estimator
    net = quantized("cpu", estimator=chosen)
    if channels:
        lq.set_bits(net, {"3": (2, 3, 4, 8, 1, 0, 4, 4)})
    net.to("gpu")
    (batch,) = batches(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, foreach=False, capturable=False)
    assert waits_of(step, net, batch, optimizer) == []
    assert all(p.grad is not None for p in net.parameters() if p.requires_grad)


def test_zero_points_are_learned_without_waiting():
    net = lq.attach(nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 4)), 4, 4, estimator="lsq_plus")
    lq.calibrate(net, [torch.randn(32, 6)])
    learned = [q for q in lq.sites.activation_quantizers(net).values() if q.learns_offset]
    assert learned
    net.to("gpu")
    batch = torch.randn(4, 6).to("gpu"), torch.zeros(4, dtype=torch.long).to("gpu")
    assert waits_of(step, net, batch) == []
    assert all(q.zero_point.grad is not None for q in learned)


@pytest.mark.parametrize("levels", ["log2", "log"])
def test_logarithmic_levels(levels):
    from lq.quantizer.log_quantizer import LogQuantizer
    from lq.quantizer.spec import QuantSpec

    quantizer = LogQuantizer(QuantSpec(4, per_channel=False, levels=levels), "probabilities")
    histogram = quantizer.observe()
    quantizer(torch.rand(4, 20))
    quantizer.tap = None
    quantizer.calibrate(histogram)
    quantizer.set_estimator("lsq")
    x = torch.rand(4, 20)
    expected = quantizer(x).detach()
    quantizer.to("gpu")
    there = x.to("gpu").requires_grad_()
    assert waits_of(lambda: quantizer(there).sum().backward()) == []
    torch.testing.assert_close(quantizer(there).detach().cpu(), expected)


def test_evaluation():
    net = quantized().eval()
    (batch,) = batches(1)
    with torch.no_grad():
        assert waits_of(net, batch[0]) == []


@pytest.mark.parametrize("loss", ["kl", "symmetric_kl"])
def test_distillation(loss):
    net, teacher = quantized(estimator="lsq"), network().to("gpu")
    Distiller(net, teacher, weight=1.0, loss=loss)
    (batch,) = batches(1)
    assert waits_of(step, net, batch) == []


def test_looking_for_divergence_waits_once_in_a_while():
    net = quantized(estimator="lsq")
    watch = DivergenceWatch(list(lq.sites.quantizers(net)))
    loss = torch.ones((), device="gpu")
    assert [len(waits_of(watch.see, loss, at)) > 0 for at in range(50)] == ([False] * 24 + [True]) * 2


def test_the_scale_of_gradients_is_not_read():
    scaler = torch.amp.GradScaler("cpu")
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    assert loss_scale(trainer) == 65536.0  # as a number, until there is a tensor
    scaler._scale = torch.tensor(1024.0).to("gpu")
    assert waits_of(lambda: loss_scale(trainer) * torch.ones(2, device="gpu")) == []
    assert float(loss_scale(trainer)) == 1024.0


@pytest.mark.parametrize("budget", [False, True])
def test_learned_widths_on_their_way(budget):
    """Whether targets are met is asked once a step, in one number or two; nothing else is."""
    net = quantized(estimator=NoiseScale(widths=True))
    found = list(lq.sites.quantizers(net))
    learner = WidthLearner(found, {q.name: 2.0 for q in found})
    aim = Targets(learner.target, learner.is_weight, learner.start)
    if budget:
        costs = torch.ones_like(learner.start) * learner.is_weight
        aim = SizeBudget(costs, float(costs.sum()) * 3, aim, learner.start)
    penalty = Penalty(1e-3)
    (batch,) = batches(1)

    def descend():
        step(net, batch)
        learner.gather(aim.gradient(learner.bits) * penalty.factor())
        moved = learner.bits
        learner.hold(moved, aim.project(0.5, moved))
        learner.write()
        penalty.take(torch.ones((), device="gpu"))

    descend()  # the first loss is taken to the device
    assert waits_of(descend) == []
    assert len(waits_of(aim.met, learner.bits)) <= 1 + budget


# --- before training --------------------------------------------------------------------------------------------------


def test_calibration_waits_once_for_each_tensor_of_a_batch():
    net = quantized()
    counts = [len(waits_of(lq.calibrate, net, batches(number))) for number in (1, 2, 4)]
    activations = len(lq.sites.activation_quantizers(net))
    assert counts[1] - counts[0] == activations
    assert counts[2] - counts[1] == 2 * activations


def test_calibration_gives_what_it_gives_on_the_cpu():
    found = []
    for device in ("cpu", "gpu"):
        net = quantized(device)
        lq.calibrate(net, batches(3, device))
        found.append({name: value.cpu() for name, value in net.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=name)


def test_sensitivity_waits_once_for_the_labels_of_a_batch():
    net = quantized(range="minmax")
    counts = [len(waits_of(lq.measure_sensitivity, net, batches(number), widths=(2, 4))) for number in (2, 3, 5)]
    assert counts[1] - counts[0] == 1
    assert counts[2] - counts[1] == 2


def test_large_weights_are_looked_at_once_a_batch(monkeypatch):
    """Changes of large models are not kept: whether a weight is what it was is asked for each batch."""
    monkeypatch.setattr("lq.sensitivity.tensors._KEEP", 0)
    net = quantized(range="minmax")
    counts = [len(waits_of(lq.measure_sensitivity, net, batches(number), widths=(2, 4))) for number in (2, 3)]
    assert counts[1] - counts[0] <= 1 + 3


@pytest.mark.parametrize("metric", ["fisher", "model_fisher", "output_distortion"])
def test_sensitivities_are_those_of_the_cpu(metric):
    """Also of a model that was calibrated on the CPU, and moved then."""
    found = [
        lq.measure_sensitivity(quantized(d, range="minmax"), batches(2, d), metric, widths=(2, 4))
        for d in ("cpu", "gpu")
    ]
    for one, other in zip(*(table.tensors for table in found), strict=True):
        torch.testing.assert_close(torch.tensor(other.loss), torch.tensor(one.loss), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"rounding": "adaround"}, {"rounding": "softmax"}, {"drop": 0.0}, {"loss": "fisher"}]
)
def test_an_iteration_of_reconstruction(options):
    counts = []
    for iterations in (30, 60):
        torch.manual_seed(0)
        net = network().eval()
        lq.fold_batchnorm(net)
        lq.attach(net, 3, 4)
        lq.calibrate(net, [torch.randn(8, 3, 8, 8)])
        counts.append(len(waits_of(lq.reconstruct, net.to("gpu"), batches(2), iterations=iterations, **options)))
    assert counts[1] < counts[0] + 10  # what is decided of a unit may differ; 30 iterations of it would be more

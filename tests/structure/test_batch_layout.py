"""What a sample is, in layouts that no shape gives away: what is measured is of whole samples, or an error says so."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import lq
from lq.attachment.sites import quantizers
from lq.errors import DataError
from lq.sensitivity import BruteForce, Fisher, HawqV2, OutputDistortion
from lq.structure.batch_layout import find_layout
from tests.helpers import assert_same
from tests.reconstruction.networks import quantized

WIDTHS = (0, 2, 4)
METRICS = ["fisher", "model_fisher", "output_distortion", "hawq_v2", "kl", BruteForce("loss")]


class Recurrent(nn.Module):
    """Classes of sequences by the last step, time first or samples first."""

    def __init__(self, kind=nn.LSTM, batch_first=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(6, 8, batch_first=batch_first, **options)
        self.out = nn.Linear(8 * (1 + self.rnn.bidirectional), 5)

    def forward(self, x):
        x = self.rnn(x)[0]
        return self.out(x[:, -1] if self.rnn.batch_first else x[-1])


def sequences(steps=7, samples=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, samples, 6, generator=generator), torch.randint(5, (samples,), generator=generator)


def attached(model, batch, **options):
    model = model.eval()
    lq.attach(model, 4, None, structure=lq.inspect(model, batch, **options), first_last=None)
    return lq.calibrate(model, [batch], **options)


def measured(model, batch, metric, **options):
    return lq.measure_sensitivity(model, [batch], metric, widths=WIDTHS, activations=False, **options)


def assert_equal_tables(one, other):
    assert one.samples == other.samples
    for a, b in zip(one.tensors, other.tensors, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(a.group_loss, b.group_loss, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("steps", [7, 4], ids=["7 steps", "as many steps as samples"])
def test_recurrent_weights_against_autograd_of_single_sequences(kind, options, steps):
    """Half the mean square of <gradient of a sequence's log-likelihood, change of the weight>, in float64."""
    x, y = sequences(steps)
    model = attached(Recurrent(kind, **options), x).double()
    found = measured(model, (x.double(), y), "fisher")
    assert found.samples == 4
    plain = Recurrent(kind, **options).double()
    matrices = [name for name, p in plain.rnn.named_parameters() if p.ndim == 2]
    for position, name in enumerate(matrices):
        weight = plain.rnn.get_parameter(name)
        tensor = next(t for t in found.tensors if t.name == f"rnn.rnn_0_weight_{_place(plain.rnn, name)}")
        quantizer = next(q for q in quantizers(model) if q.name == tensor.name)
        gradients = [
            torch.autograd.grad(-F.cross_entropy(plain(x[:, n : n + 1].double()), y[n : n + 1]), weight)[0]
            for n in range(4)
        ]
        for column, width in enumerate(WIDTHS):
            change = (quantizer.rounded_at(weight.detach(), width) - weight).detach()
            expected = torch.stack([(g * change).sum() for g in gradients]).square().mean() / 2
            assert tensor.loss[column] == pytest.approx(expected.item(), rel=1e-9), (position, width)
        backwards = "reverse" in name and "hh" in name  # the last step is the first one of that direction
        assert (tensor.loss[0] > 0) != backwards


def _place(rnn, name):
    """Where the matrix is in the list of weights that the function is given."""
    return list(dict(rnn.named_parameters())).index(name)


@pytest.mark.parametrize("metric", METRICS, ids=str)
@pytest.mark.parametrize("steps", [7, 4, 1])
def test_time_first_is_samples_first_transposed(metric, steps):
    x, y = sequences(steps)
    tables = [
        measured(attached(Recurrent(), x), (x, y), metric),
        measured(attached(Recurrent(batch_first=True), x.transpose(0, 1)), (x.transpose(0, 1), y), metric),
    ]
    assert_equal_tables(*tables)


class Encoder(nn.Module):
    """Time first in and out."""

    def __init__(self, batch_first=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=batch_first)

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("steps", [7, 4])
def test_outputs_with_time_first(steps):
    x, _ = sequences(steps)
    tables = [
        measured(attached(Encoder(), x), x, BruteForce("output_distortion")),
        measured(attached(Encoder(True), x.transpose(0, 1)), x.transpose(0, 1), BruteForce("output_distortion")),
    ]
    assert_equal_tables(*tables)


def test_a_loss_of_ones_own_with_time_first():
    x, _ = sequences()
    y = torch.randint(6, (7, 4), generator=torch.Generator().manual_seed(2))

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    turned = x.transpose(0, 1).contiguous(), y.T.contiguous()
    tables = [
        measured(attached(Encoder(), x), (x, y), Fisher(loss=loss)),
        measured(attached(Encoder(True), turned[0]), turned, Fisher(loss=loss)),
    ]
    assert tables[0].samples == 4
    assert_equal_tables(*tables)


def test_a_dimension_that_is_given():
    x, y = sequences()
    model = attached(Recurrent(), x)
    assert_equal_tables(measured(model, (x, y), "fisher", batch_dim=1), measured(model, (x, y), "fisher"))
    for dim in (0, 3):
        with pytest.raises(DataError, match=rf"batch_dim={dim} does not fit what a sample is in .*; pass batch_dim="):
            measured(model, (x, y), "fisher", batch_dim=dim)


class Detector(nn.Module):
    """Takes a list of images of any size, calls its layers for each."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images):
        return self.head(torch.cat([self.conv(image[None]).mean((2, 3)) for image in images]))


@pytest.mark.parametrize("sizes", [(8, 9, 10, 11), (8, 8, 8)], ids=["several sizes", "as many images as channels"])
def test_lists_of_images(sizes):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, size, 8, generator=generator) for size in sizes]
    targets = [{"centre": torch.randn(2, generator=generator)} for _ in sizes]

    def loss(model, batch):
        outputs = model(batch[0])
        return sum((o - t["centre"]).square().sum() for o, t in zip(outputs, batch[1], strict=True)) / len(outputs)

    model = attached(Detector(), (images, targets), forward=lambda model, batch: model(batch[0]))
    found = measured(model, (images, targets), Fisher(loss=loss))
    assert found.samples == len(sizes)
    plain, quantizer = Detector(), next(q for q in quantizers(model) if q.name == "conv.weight")
    change = (quantizer.rounded_at(plain.conv.weight, 2) - plain.conv.weight).detach()
    gradients = [
        torch.autograd.grad(loss(plain, ([i], [t])), plain.conv.weight)[0] for i, t in zip(images, targets, strict=True)
    ]
    expected = torch.stack([(g * change).sum() for g in gradients]).square().mean() / 2
    assert found["conv.weight"].loss[1] == pytest.approx(expected.item(), rel=1e-4)


def test_packed_sequences():
    class Packed(Recurrent):
        def forward(self, x):
            return self.out(self.rnn(x)[1][0][-1])

    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(n, 6, generator=generator) for n in (5, 3, 7)]
    y = torch.tensor([0, 1, 2])
    batch = pack_sequence(parts, enforce_sorted=False), y
    model = attached(Packed(), batch, forward=lambda model, batch: model(batch[0]))
    found = measured(model, batch, "fisher", forward=lambda model, batch: model(batch[0]))
    alone = [
        measured(model, (part[:, None], y[n : n + 1]), "fisher", forward=lambda model, batch: model(batch[0]))
        for n, part in enumerate(parts)
    ]
    for tensors in zip(found.tensors, *(table.tensors for table in alone), strict=True):
        np.testing.assert_allclose(tensors[0].loss, np.mean([t.loss for t in tensors[1:]], 0), rtol=1e-4)
        assert tensors[0].loss[0] > 0


class Graph(nn.Module):
    """Nodes that send to each other."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, edges):
        x = torch.relu(self.first(x))
        return self.second(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]]))


@pytest.mark.parametrize("metric", [OutputDistortion(), BruteForce("kl"), Fisher("model"), HawqV2()], ids=str)
def test_what_cannot_be_cut_is_an_error(metric):
    generator = torch.Generator().manual_seed(0)
    batch = {
        "edge_index": torch.randint(9, (2, 30), generator=generator),
        "x": torch.randn(9, 4, generator=generator),
        "y": torch.randint(3, (9,), generator=generator),
    }
    run = lambda model, batch: model(batch["x"], batch["edge_index"])  # noqa: E731
    model = attached(Graph(), batch, forward=run)
    with pytest.raises(
        DataError, match=r"(?s)what a sample is in a batch of dict\(edge_index: Tensor\(2, 30\).*batch_dim=.*forward="
    ):
        measured(model, batch, metric, forward=run)


def test_a_batch_that_nothing_can_be_seen_of():
    class Opaque:
        def __init__(self, x):
            self.x = x

    model = attached(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    run = lambda model, batch: model(batch.x)  # noqa: E731
    assert measured(model, Opaque(torch.randn(1, 4)), "output_distortion", forward=run).samples == 1
    with pytest.raises(DataError, match="do not agree on what a sample is in a batch of Opaque"):
        measured(model, Opaque(torch.randn(5, 4)), "output_distortion", forward=run)


def test_samples_that_influence_each_other_are_noted():
    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x + x.mean(0))

    torch.manual_seed(0)
    model = attached(Coupled(), torch.randn(6, 4))
    found = measured(model, (torch.randn(6, 4), torch.randint(3, (6,))), Fisher("model"))
    assert "a sample's output depends on the others in the batch, or on chance" in found.notes


def test_batches_of_other_parts():
    x = torch.randn(6, 4)
    layout = find_layout({"a": x}, lambda batch: batch["a"])
    assert layout.size({"a": x[:2]}) == 2
    with pytest.raises(DataError, match=r"dict\(b: Tensor\(6, 4\)\) is made of other parts than the first one"):
        layout.size({"b": x})


@pytest.mark.parametrize("units", ["layer", "block"])
def test_reconstruction_with_time_first(units):
    """The same steps as with samples first, though there are as many time steps as samples."""
    x, _ = sequences(6, 6)
    states = []
    for first, batch in ((False, x), (True, x.transpose(0, 1).contiguous())):
        torch.manual_seed(0)
        layers = [nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=first) for _ in range(2)]
        model = quantized(nn.Sequential(*layers).eval(), [batch], 3, 6, skip=True)
        lq.reconstruct(model, [batch], units=units, iterations=5, batch_size=2, drop=0.0, loss="mse")
        states.append(dict(model.state_dict()))
    assert_same(*({key: value for key, value in state.items() if "weight" in key} for state in states))

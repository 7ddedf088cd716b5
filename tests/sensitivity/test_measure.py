"""The table: each metric against its definition, computed the long way."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.sites import float_weight, weight_quantizer
from lq.errors import DataError, LqError, NoEffectWarning, SpecError, StateError
from lq.sensitivity import BruteForce, Fisher, HawqV2, OutputDistortion, Sensitivity, measure_sensitivity

WIDTHS = (0, 1, 2, 3, 4, 8)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3))


def data(samples=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 2, 6, 6, generator=generator), torch.randint(3, (samples,), generator=generator)


def prepared(activations=4):
    model = lq.attach(network(), 4, activations, first_last=None)
    x, y = data()
    if activations:
        lq.calibrate(model, [x])
    return model, list(zip(x.split(5), y.split(5), strict=True))


def change(model, layer, width):
    module = model.get_submodule(layer)
    return weight_quantizer(module).rounded_at(float_weight(module), width) - float_weight(module)


def per_sample_gradients(layer):
    """Gradient of each sample's log-likelihood with respect to a weight of the float network."""
    net = network()
    x, y = data()
    weight = net.get_submodule(layer).weight
    return [
        torch.autograd.grad(-F.cross_entropy(net(x[n : n + 1]), y[n : n + 1]), weight)[0].detach()
        for n in range(len(x))
    ]


def test_fisher_is_half_the_mean_square_of_gradient_times_change():
    model, batches = prepared()
    table = measure_sensitivity(model, batches, "fisher", widths=WIDTHS)
    assert table.samples == 12
    for layer in ("0", "3", "5"):
        gradients = per_sample_gradients(layer)
        for column, width in enumerate(WIDTHS):
            delta = change(model, layer, width).detach()
            terms = torch.stack([(g * delta).flatten(1).sum(1) for g in gradients]).double()  # (samples, channels)
            found = table[f"{layer}.weight"]
            squares = terms.sum(1).square() / 2
            assert found.loss[column] == pytest.approx(squares.mean().item(), rel=1e-4)
            assert found.error[column] == pytest.approx(squares.std().item() / math.sqrt(12), rel=1e-4)
            np.testing.assert_allclose(found.group_loss[:, column], terms.square().mean(0) / 2, rtol=1e-4, atol=1e-12)


def test_groups_of_channels_add_their_terms_before_the_square():
    model, batches = prepared(None)
    table = measure_sensitivity(model, batches, "fisher", widths=(2,), group=3)
    gradients = per_sample_gradients("0")
    terms = torch.stack([(g * change(model, "0", 2).detach()).flatten(1).sum(1) for g in gradients])
    expected = [terms[:, :3].sum(1).square().mean() / 2, terms[:, 3].square().mean() / 2]  # four channels
    np.testing.assert_allclose(table["0.weight"].group_loss[:, 0], expected, rtol=1e-4)


def test_activation_terms_are_those_of_the_rounding_error():
    model, batches = prepared()
    x, y = data()
    table = measure_sensitivity(model, batches, "fisher", widths=WIDTHS)
    net = network()
    hidden = net[:3](x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(-F.cross_entropy(net[3:](hidden), y, reduction="sum"), hidden)
    quantizer = model[3].input_quantizer
    for column, width in enumerate(WIDTHS):
        quantizer.set_bits(width)
        quantizer.refit()
        error = quantizer(hidden.detach()) - hidden.detach()
        expected = (gradient * error).sum(1).square().mean() / 2
        assert table["3.input"].loss[column] == pytest.approx(expected.item(), rel=1e-3), width


def test_model_fisher_is_the_curvature_of_the_divergence():
    """Averaged over its random vectors, the estimate is the second-order expansion of the KL divergence."""
    model, batches = prepared(None)
    found = np.mean(
        [
            measure_sensitivity(model, batches, Fisher("model"), widths=(4,), seed=seed)["5.weight"].loss[0]
            for seed in range(60)
        ]
    )
    net, (x, _) = network(), data()
    moved = F.linear(net[:5](x), change(model, "5", 4).detach())
    p = net(x).softmax(1).detach()
    expected = ((p * moved.square()).sum(1) - (p * moved).sum(1).square()).mean() / 2
    assert found == pytest.approx(expected.item(), rel=0.1)
    divergence = measure_sensitivity(model, batches, "kl", widths=(4,))["5.weight"].loss[0]
    assert found == pytest.approx(divergence, rel=0.15)


def test_output_distortion_is_the_mean_square_of_the_change():
    model, batches = prepared(None)
    found = np.mean(
        [
            measure_sensitivity(model, batches, "output_distortion", widths=(4,), seed=seed)["5.weight"].loss[0]
            for seed in range(60)
        ]
    )
    exact = measure_sensitivity(model, batches, BruteForce("output_distortion"), widths=(4,))["5.weight"].loss[0]
    assert found == pytest.approx(exact, rel=0.1)  # the last layer is linear: no other difference


@pytest.mark.parametrize("measured", ["kl", "output_distortion", "loss"])
def test_brute_force_is_a_model_with_that_width(measured):
    model, batches = prepared()
    table = measure_sensitivity(model, batches, BruteForce(measured, groups=True), widths=(1, 3))
    x, y = data()
    net = network()

    def value(output):
        reference = net(x)
        if measured == "kl":
            return F.kl_div(output.log_softmax(1), reference.log_softmax(1), reduction="batchmean", log_target=True)
        if measured == "loss":
            return F.cross_entropy(output, y) - F.cross_entropy(reference, y)
        return F.mse_loss(output, reference)

    for layer in ("0", "3"):
        changed = network()
        with torch.no_grad():
            changed.get_submodule(layer).weight.add_(change(model, layer, 3))
            found = table[f"{layer}.weight"]
            assert found.loss[1] == pytest.approx(value(changed(x)).item(), rel=1e-3, abs=1e-8)
            changed = network()
            changed.get_submodule(layer).weight[2] += change(model, layer, 3)[2]
            assert found.group_loss[2, 1] == pytest.approx(value(changed(x)).item(), rel=1e-3, abs=1e-8)


def test_hawq_is_the_mean_trace_times_the_squared_change():
    model, _ = prepared(None)
    x, y = data()
    found = measure_sensitivity(model, [(x, y)], HawqV2(vectors=4000, tolerance=0.0), widths=(2, 4))["5.weight"]
    net = network()
    hidden, weight, bias = net[:5](x).detach(), net[5].weight.detach(), net[5].bias.detach()
    hessian = torch.autograd.functional.hessian(lambda w: F.cross_entropy(F.linear(hidden, w, bias), y), weight)
    trace = hessian.view(18, 18).trace().item()
    for column, width in enumerate((2, 4)):
        expected = trace / 18 * change(model, "5", width).square().sum().item() / 2
        assert found.loss[column] == pytest.approx(expected, rel=0.1)
        assert found.group_loss[:, column].sum() == pytest.approx(found.loss[column])


def test_hawq_of_activations():
    model, _ = prepared()
    x, y = data()
    found = measure_sensitivity(model, [(x, y)], HawqV2(vectors=4000, tolerance=0.0), widths=(2,))["5.input"]
    net = network()
    hidden = net[:5](x).detach()
    traces = [
        torch.autograd.functional.hessian(lambda h, n=n: F.cross_entropy(net[5](h)[None], y[n : n + 1]), hidden[n])
        .trace()
        .item()
        for n in range(len(x))
    ]
    model[5].input_quantizer.set_bits(2)
    model[5].input_quantizer.refit()
    squared = (model[5].input_quantizer(hidden) - hidden).square().sum(1).mean().item()
    assert found.loss[0] == pytest.approx(np.mean(traces) / 6 * squared / 2, rel=0.1)


def test_batches_add_up_and_order_does_not_matter():
    model, batches = prepared()
    one = measure_sensitivity(model, batches, "fisher")
    x, y = data()
    whole = measure_sensitivity(model, [(x.flip(0), y.flip(0))], "fisher")
    for a, b in zip(one.tensors, whole.tensors, strict=True):
        np.testing.assert_allclose(a.group_loss, b.group_loss, rtol=1e-4, atol=1e-12)


def test_ranks_add_up():
    """Two ranks with half of the batches each, whose sums are exchanged, find what one finds."""
    model, batches = prepared()
    halves = [batches[:1], batches[1:]]
    kept = []
    for half in halves:  # what each rank would send
        measure_sensitivity(
            model, half, "fisher", reduce=lambda t, operation: (kept.append((t.clone(), operation)), t)[1]
        )
    assert all(operation == "sum" for _, operation in kept)
    together = measure_sensitivity(model, halves[0], "fisher", reduce=lambda t, _: kept[0][0] + kept[1][0])
    alone = measure_sensitivity(model, batches, "fisher")
    assert together.samples == alone.samples == 12
    for a, b in zip(together.tensors, alone.tensors, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-5)
        np.testing.assert_allclose(a.error, b.error, rtol=1e-5)


def test_losses_of_the_user():
    model, batches = prepared(None)
    own = Fisher(loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]))
    tables = measure_sensitivity(model, batches, own), measure_sensitivity(model, batches, "fisher")
    for a, b in zip(*(table.tensors for table in tables), strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4, atol=1e-12)


def test_a_normal_likelihood_for_floats():
    model = lq.attach(nn.Sequential(nn.Linear(3, 2)), 2, first_last=None)
    x, y = torch.randn(5, 3), torch.randn(5, 2)
    found = measure_sensitivity(model, [(x, y)], widths=(2,), activations=False)["0.weight"].loss[0]
    residual = (y - F.linear(x, float_weight(model[0]), model[0].bias)).detach()
    expected = (residual * F.linear(x, change(model, "0", 2).detach())).sum(1).square().mean() / 2
    assert found == pytest.approx(expected.item(), rel=1e-4)


def test_the_models_quantization_does_not_matter_and_stays():
    model, batches = prepared()
    x, _ = data()
    before = model.eval()(x)
    one = measure_sensitivity(model, batches, "model_fisher")
    assert torch.equal(model(x), before)
    lq.set_bits(model, {"*": 2}, {"*": 3})
    assert one.to_json() == measure_sensitivity(model, batches, "model_fisher").to_json()


def test_json_there_and_back():
    model, batches = prepared()
    table = measure_sensitivity(model, batches)
    again = Sensitivity.from_json(table.to_json())
    assert again.to_json() == table.to_json()
    assert again["3.weight"].group_loss.shape == (6, 9)
    assert "Fisher on 12 samples" in str(again)
    with pytest.raises(DataError, match="not a saved sensitivity"):
        Sensitivity.from_json("{}")
    with pytest.raises(DataError, match="'7.weight' was not measured"):
        again["7.weight"]


def test_errors():
    model, batches = prepared()
    x, _ = data()
    with pytest.raises(StateError, match="lq.measure_sensitivity needs a model with quantizers"):
        measure_sensitivity(network(), batches)
    with pytest.raises(DataError, match="got no batches"):
        measure_sensitivity(model, [])
    with pytest.raises(SpecError, match="sensitivity='fischer' is unknown; use 'fisher', "):
        measure_sensitivity(model, batches, "fischer")
    with pytest.raises(SpecError, match="widths is empty"):
        measure_sensitivity(model, batches, widths=())
    with pytest.raises(SpecError, match="bits=9 is not a width"):
        measure_sensitivity(model, batches, widths=(9,))
    with pytest.raises(SpecError, match="group=0; a group has at least 1 channel"):
        measure_sensitivity(model, batches, group=0)
    with pytest.raises(SpecError, match="nothing can be measured"):
        measure_sensitivity(model, batches, weights=False, activations=False)
    with pytest.raises(
        DataError, match=r"has no labels in its second place; give the metric a loss .*Fisher\(loss=f\)"
    ):
        measure_sensitivity(model, [x])
    with pytest.raises(DataError, match=r"do not go with an output Tensor\(1, 3\)"):
        measure_sensitivity(model, [(x, torch.zeros(12, 2))])
    with pytest.raises(DataError, match="loss= returned"):
        measure_sensitivity(model, batches, Fisher(loss=lambda model, batch: model(batch[0])))
    with pytest.raises(DataError, match="the forward returned NoneType"):
        measure_sensitivity(model, batches, "output_distortion", forward=lambda model, batch: None)
    with pytest.raises(SpecError, match="labels='sampled' is unknown"):
        Fisher("sampled")
    with pytest.raises(SpecError, match="a loss has no part in it"):
        Fisher("model", loss=lambda model, batch: None)
    with pytest.raises(SpecError, match="temperature=2.0 must be positive, and is of labels='model' alone"):
        Fisher(temperature=2.0)
    with pytest.raises(SpecError, match="measured='mse' is unknown"):
        BruteForce("mse")
    with pytest.raises(SpecError, match="needs a vector and no negative tolerance"):
        HawqV2(vectors=0)


def test_activations_of_a_loaded_model_have_no_record():
    model, batches = prepared()
    loaded = lq.load(model.state_dict(), network())
    with pytest.raises(StateError, match="has no record of its values"):
        measure_sensitivity(loaded, batches)
    assert measure_sensitivity(loaded, batches, activations=False).samples == 12


def test_layers_that_are_not_reached_are_named():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    model.spare = nn.Linear(2, 2)
    model.forward = lambda x: model[1](model[0](x))
    lq.attach(model, 4, first_last=None)
    with pytest.warns(
        NoEffectWarning,
        match=r"1 tensors were never used by the forward \(spare.weight.*leaves them the widths they have",
    ):
        found = measure_sensitivity(model, [(torch.randn(4, 4), torch.randint(3, (4,)))])
    with pytest.warns(NoEffectWarning, match=r"1 of 3 weights are not in the sensitivity.*spare.weight"):
        chosen = lq.allocate(model, found, 2.0)
    assert set(chosen.weights) == {"0", "1"}  # nothing is known of the third: to give it 1 bit would be a guess


def test_output_distortion_has_no_labels():
    model, batches = prepared(None)
    assert measure_sensitivity(model, [x for x, _ in batches], OutputDistortion()).samples == 12


def some_ignored():
    x, y = data()
    return x, torch.where(torch.arange(12) % 3 == 0, -100, y)


@pytest.mark.parametrize("metric", ["fisher", HawqV2(vectors=1), BruteForce("loss")], ids=str)
def test_samples_without_a_label_do_not_count(metric):
    model, _ = prepared(None)
    x, y = some_ignored()
    found = measure_sensitivity(model, [(x, y)], metric, widths=WIDTHS)
    rest = measure_sensitivity(model, [(x[y >= 0], y[y >= 0])], metric, widths=WIDTHS)
    nothing = torch.full((5,), -100)
    more = measure_sensitivity(model, [(x, y), (x[:5], nothing)], metric, widths=WIDTHS)
    assert found.samples == rest.samples == more.samples == 8
    for a, b, c in zip(found.tensors, rest.tensors, more.tensors, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(a.loss, c.loss, rtol=1e-4, atol=1e-12)
        np.testing.assert_allclose(a.error, b.error, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("metric", ["fisher", "hawq_v2", BruteForce("loss")], ids=str)
def test_labels_that_say_nothing(metric):
    model, _ = prepared(None)
    x, _ = data()
    with pytest.raises(DataError, match="none of 12 samples has a label: all are -100.*give batches with labels"):
        measure_sensitivity(model, [(x, torch.full((12,), -100))], metric)
    with pytest.raises(DataError, match=r"a label is no class of an output .*classes go from 0 to 2, -100 stands for"):
        measure_sensitivity(model, [(x, torch.full((12,), 7))], metric)


def test_a_loss_that_says_nothing():
    model, batches = prepared(None)
    constant = Fisher(loss=lambda model, batch: (model(batch[0]) * 0).sum())
    with pytest.raises(
        DataError, match="nothing changes with the widths of any of 3 tensors: the gradient is zero for"
    ):
        measure_sensitivity(model, batches, constant)
    with pytest.raises(DataError, match=r"sensitivities of 3 of 3 tensors are no finite numbers \(0.weight, 3.weight"):
        measure_sensitivity(model, [(x * math.nan, y) for x, y in batches])


@pytest.mark.parametrize("metric", [Fisher, HawqV2])
@pytest.mark.parametrize("gradient", [False, True])
def test_losses_of_something_else(metric, gradient):
    model = lq.attach(nn.Sequential(nn.Linear(4, 3)), 4, first_last=None)
    batches = [(torch.randn(6, 4), torch.randint(3, (6,)))]
    constant = torch.ones((), requires_grad=gradient)
    loss = lambda model, batch: constant + 0 * model(batch[0]).detach().sum()  # noqa: E731
    with pytest.raises(
        LqError, match="does not depend on a quantized layer|nothing changes with the widths|no second derivative"
    ):
        measure_sensitivity(model, batches, metric(loss=loss))

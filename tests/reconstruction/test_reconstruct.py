"""The whole of it: every method on small networks, the order of units, what a run leaves behind."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lq
from lq.attachment.float_models import float_copy
from lq.attachment.sites import activation_quantizers, float_weight, quantizers, weight_quantizer
from lq.attachment.stored import stored_weights
from lq.errors import DataError, PatternError, SpecError, StateError
from lq.reconstruction import Annealed, LpLoss
from lq.reconstruction.rounding import AdaRound, AnnealingSoftmax
from tests.helpers import assert_same, hooks
from tests.reconstruction.networks import BY_NAME, IMAGE, NETWORKS, ResNet, network, quantized, samples

FAST = AdaRound(lr=0.03)
METHODS = {
    "adaround": {"units": "layer", "drop": 0.0, "activation_mode": "float"},
    "brecq": {"units": "block", "drop": 0.0, "activation_mode": "float", "loss": "fisher"},
    "qdrop": {"units": "block"},
    "mrecg": {"units": "mixed", "merges": 1},
    "mrecg, loss": {"units": "mixed", "merges": 1, "metric": "loss", "search_iterations": 5},
    "nwq": {
        "units": "network", "rounding": AnnealingSoftmax(lr=0.03), "drop": "annealed", "regularization": 1.0,
    },
    "kl": {"units": "network", "loss": "kl"},
    "aph": {"loss": "aph", "drop": "annealed", "regularization": 0.5, "units": "mixed", "merges": 1},
    "dplr": {"loss": "dplr", "start": "feedback", "over_first": True},
    "dplr, network": {"loss": "dplr", "units": "network", "activation_mode": "quantized"},
    "global": {"loss": "global", "units": "layer", "activation_mode": "float", "drop": 0.0},
    "ste": {"rounding": "ste", "loss": "global", "drop": 0.0, "step_lr": None, "bias_lr": 1e-3},
}  # fmt: skip


def prepared(kind="resnet", *, skip=True, blocks=3, weights=2, **options):
    """A quantized network and its batches."""
    if kind == "resnet":
        torch.manual_seed(0)
        model, x = ResNet(blocks).eval(), samples(IMAGE, 24)
    else:
        model, x = network(kind)
    data = list(x.split(8))
    return quantized(model, data, weights, 4, skip=skip, **options), data


def run(model, data, **options):
    return lq.reconstruct(
        model, data, **{"rounding": FAST, "iterations": 40, "batch_size": 8, "step_lr": 5e-3, **options}
    )


def distance(model, twin, data):
    """Mean squared error of the network's output."""
    with torch.no_grad():
        return sum((model(x) - twin(x)).square().sum().item() for x in data) / sum(len(x) for x in data)


def check_levels(model):
    for layer in model.modules():
        quantizer = weight_quantizer(layer)
        if quantizer is not None:
            with torch.no_grad():
                assert torch.equal(quantizer(float_weight(layer)), float_weight(layer))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_comes_nearer_to_the_float_network(name):
    model, data = prepared()
    twin = float_copy(model)
    before = distance(model, twin, data)
    found = run(model, data, **METHODS[name])
    assert all(0 <= unit.after <= unit.before for unit in found.units)
    assert any(unit.after < unit.before for unit in found.units)
    assert distance(model, twin, data) < before
    check_levels(model)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network(kind):
    model, data = prepared(kind, skip=False)
    twin = float_copy(model)
    before = distance(model, twin, data)
    found = run(model, data, units=BY_NAME.get(kind, "block"), drop=0.0, iterations=60)
    assert all(unit.after <= unit.before for unit in found.units)
    after = distance(model, twin, data)
    assert found.units[-1].after == pytest.approx(after, rel=1e-3)  # of the last unit it is that of the network
    assert after < before * 1.05
    check_levels(model)


@pytest.mark.parametrize("units", ["network", ["blocks", "head"]], ids=str)
def test_features_inside_of_a_unit(units):
    model, data = prepared()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    if units == "network":
        with pytest.raises(SpecError, match=r"loss='global' compares what the last layer, 'head', reads, .* loss='kl'"):
            run(model, data, units=units, loss="global")
        assert_same(dict(model.state_dict()), state)
    else:
        assert len(run(model, data, units=units, loss="global", iterations=2).units) == 2


@pytest.mark.parametrize("loss", ["aph", "dplr", "global"])
def test_losses_of_the_network_go_on_from_a_file(loss, tmp_path):
    """The second half alone does what both halves do at once; another loss is another run."""
    whole, data = prepared()
    found = run(whole, data, loss=loss, iterations=6)
    ended, _ = prepared()

    def watch(steps, name):
        if name == "blocks.1":
            raise InterruptedError
        return steps

    path = tmp_path / "units.pt"
    with pytest.raises(InterruptedError):
        run(ended, data, loss=loss, iterations=6, resume=path, watch=watch)
    again, _ = prepared()
    rest = run(again, data, loss=loss, iterations=6, resume=path)
    assert [unit.after for unit in rest.units] == [unit.after for unit in found.units]
    assert_same(dict(again.state_dict()), dict(whole.state_dict()))
    for other in ({"loss": "mse"}, {"over_first": True}, {"rounding": "ste"}, {"start": "feedback"}):
        with pytest.raises(StateError, match="belongs to another reconstruction: its method is"):
            run(prepared()[0], data, **{"loss": loss, "iterations": 6, "resume": path, **other})


def test_units_in_order_with_their_names():
    model, data = prepared()
    watched = []

    def watch(steps, name):
        watched.append(name)
        return steps

    found = run(model, data, iterations=2, watch=watch)
    assert watched == [unit.name for unit in found.units] == ["stem+act", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert found.merges is None
    assert [unit.iterations for unit in found.units] == [2] * 5
    assert all(unit.seconds > 0 and len(unit.curve) == 2 for unit in found.units)


def test_a_unit_reads_the_network_quantized_so_far_and_aims_at_the_float_one():
    model, data = prepared("pooling and flatten", skip=False)
    twin = float_copy(model)
    x, seen = torch.cat(data), {}

    def watch(steps, name):
        if name == "c":
            with torch.no_grad():
                seen["b"] = model.b(F.max_pool2d(F.relu(model.a(x)), 2))
        return steps

    found = run(model, data, units="layer", iterations=20, watch=watch, activation_mode="quantized", drop=0.0)
    with torch.no_grad():
        errors = {
            "a": model.a(x) - twin.a(x),
            "b": model.b(F.max_pool2d(F.relu(model.a(x)), 2)) - twin.b(F.max_pool2d(F.relu(twin.a(x)), 2)),
            "c": model(x) - twin(x),
        }
    for unit in found.units:
        error = errors[unit.name]
        channels = error.shape[1 if error.ndim == 4 else -1]
        assert unit.after == pytest.approx(error.square().mean().item() * channels, rel=1e-4)
    with torch.no_grad():
        assert torch.equal(seen["b"], model.b(F.max_pool2d(F.relu(model.a(x)), 2)))  # settled before c began


@pytest.mark.parametrize("activations", ["float", "quantized", "learned"])
def test_what_becomes_of_activations(activations):
    model, data = prepared()
    before = {n: (q.step.item(), q.zero_point.item()) for n, q in activation_quantizers(model).items()}
    fitted = copy.deepcopy(model)  # its ranges fit the float network, nearly
    lq.set_bits(fitted, {"*": 16})
    lq.calibrate(fitted, data)
    run(model, data, activation_mode=activations, iterations=10, step_lr=0.02)
    after = {n: (q.step.item(), q.zero_point.item()) for n, q in activation_quantizers(model).items()}
    if activations == "quantized":
        assert after == before
    elif activations == "float":
        expected = {n: (q.step.item(), q.zero_point.item()) for n, q in activation_quantizers(fitted).items()}
        for name, found in after.items():
            assert found == pytest.approx(expected[name], rel=2e-2)
        assert after != before
    else:
        assert all(after[name] != before[name] for name in after)
    assert all(q.tap is None for q in quantizers(model))


def test_float_activations_are_float_in_every_loss():
    """With 2-bit activations no loss of a single layer could be this small."""
    model, data = prepared(weights=8, skip=False)
    lq.set_bits(model, {}, dict.fromkeys(activation_quantizers(model), 2))
    lq.calibrate(model, data)
    losses = {
        activations: max(unit.before for unit in run(copy.deepcopy(model), data, activation_mode=activations).units)
        for activations in ("float", "quantized")
    }
    assert losses["float"] < 0.01 * losses["quantized"]


class Functional(nn.Module):
    """A matrix that a function multiplies by, as it is or transposed, or in several parts."""

    def __init__(self, kind="whole"):
        super().__init__()
        self.kind, self.a = kind, nn.Linear(8, 8)
        self.w = nn.Parameter(torch.randn(*{"transposed": (3, 8), "parts": (6, 8)}.get(kind, (8, 3))))

    def forward(self, x):
        x = self.a(x).relu()
        if self.kind == "parts":
            return F.linear(x, self.w[:3]) + F.linear(x, self.w[3:]).tanh()
        if self.kind == "twice":
            return x @ self.w + x.tanh() @ self.w
        return x @ (self.w.t() if self.kind == "transposed" else self.w)


def functional(kind, **options):
    torch.manual_seed(0)
    model, data = Functional(kind).eval(), [samples((8,), 16)]
    options = {"symmetric": False, "first_last": None, **options}
    return lq.calibrate(lq.attach(model, 2, 4, structure=lq.inspect(model, data[0]), **options), data), data


@pytest.mark.parametrize(("kind", "units"), [("whole", "layer"), ("twice", "network")])
def test_weights_of_functions_outside_of_units_or_in_several_calls_keep_nearest_rounding(kind, units):
    model, data = functional(kind)
    before = model.w.detach().clone()
    run(model, data, units=units)
    assert torch.equal(model.w, before)
    check_levels(model)


@pytest.mark.parametrize("rounding", [FAST, "ste"], ids=["adaround", "ste"])
@pytest.mark.parametrize("kind", ["whole", "transposed", "parts"])
def test_weights_of_functions_are_learned_with_their_unit(kind, rounding, tmp_path):
    model, data = functional(kind)
    twin, before = float_copy(model), model.w.detach().clone()
    first = distance(model, twin, data)
    options = {"rounding": rounding, "units": "network", "drop": 0.0, "iterations": 100, "loss": "mse"}
    found = run(model, data, resume=tmp_path / "units.pt", **options)
    assert found.units[0].after < found.units[0].before
    assert distance(model, twin, data) == pytest.approx(found.units[0].after, rel=1e-3)
    assert found.units[0].before == pytest.approx(first, rel=0.2)  # but for ranges of activations
    assert not torch.equal(model.w, before)
    (weights,) = {id(w.parameter): w.parameter for w in stored_weights(model)}.values()
    for call in stored_weights(model):
        with torch.no_grad():
            assert torch.equal(call.quantizer.at_call(call.weight, call.source.layout, model), call.weight)
    assert weights is model.w
    again, _ = functional(kind)
    run(again, data, resume=tmp_path / "units.pt", **options)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))


# --- what a run leaves behind -----------------------------------------------------------------------------------


def traces(model):
    return {
        "modes": {name: part.training for name, part in model.named_modules()},
        "grads": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "hooks": hooks(model),
        "taps": [q.tap for q in quantizers(model)],
        "forwards": {n: vars(m)["forward"] for n, m in model.named_modules() if "forward" in vars(m)},
        "names": [name for name, _ in model.named_modules()],
        "keys": list(model.state_dict()),
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("name", ["adaround", "brecq", "qdrop", "mrecg, loss", "nwq", "dplr", "global"])
def test_the_model_is_as_it_was_but_for_its_weights_and_steps(name, fails):
    model, data = prepared(weights=3, estimator="lsq")
    model.train()
    model.blocks[1].eval()
    model.head.bias.requires_grad_(False)
    before, state = traces(model), torch.get_rng_state()
    frozen = {n: v.clone() for n, v in model.state_dict().items() if n.endswith(("bias", "bits"))}

    def watch(steps, name):
        for step in steps:
            if fails and step == 1:
                raise InterruptedError(name)
            yield step

    if fails:
        with pytest.raises(InterruptedError):
            run(model, data, iterations=3, watch=watch, **METHODS[name])
    else:
        run(model, data, iterations=3, watch=watch, **METHODS[name])
    assert_same(traces(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same({n: v for n, v in model.state_dict().items() if n in frozen}, frozen)


@pytest.mark.parametrize("training", [False, True])
def test_a_teacher_that_was_given_is_left_alone(training):
    """And runs in eval mode, whatever mode it is in."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 3)).eval()
    data = [samples((8,), 16)]
    quantized(model, data)
    teacher = float_copy(model).requires_grad_(True).train(training)
    before = {**traces(teacher), "state": {k: v.clone() for k, v in teacher.state_dict().items()}}
    reference = run(copy.deepcopy(model), data, units="layer", iterations=5, loss="fisher")
    found = run(model, data, units="layer", iterations=5, teacher=teacher, loss="fisher")
    assert_same({**traces(teacher), "state": dict(teacher.state_dict())}, before)
    assert [u.after for u in found.units] == [u.after for u in reference.units]


@pytest.mark.parametrize("name", ["qdrop", "brecq", "nwq", "aph", "dplr", "ste"])
def test_the_seed_decides_everything(name):
    found = []
    for seed, around in ((0, 1), (0, 2), (5, 1)):
        model, data = prepared()
        torch.manual_seed(around)
        report = run(model, data, seed=seed, iterations=10, **METHODS[name])
        found.append(([list(u.curve) for u in report.units], dict(model.state_dict())))
    assert_same(found[0], found[1])
    assert found[0][0] != found[2][0]


def test_a_model_in_training_mode_is_reconstructed_in_eval_mode():
    states = []
    for training in (False, True):
        model, data = prepared()
        run(model.train(training), data, iterations=5)
        states.append(dict(model.state_dict()))
    assert_same(*states)


def test_where_gradients_are_off():
    model, data = prepared()
    with torch.no_grad():
        found = run(model, data, iterations=5)
    assert any(unit.after < unit.before for unit in found.units)


# --- batches -----------------------------------------------------------------------------------------------------


def test_batches_of_all_kinds():
    states = []
    for wrap in (lambda x: x, lambda x: [x, torch.zeros(len(x))], lambda x: {"image": x, "name": "a"}):
        model, data = prepared()
        forward = (lambda m, b: m(b["image"])) if isinstance(wrap(data[0]), dict) else None
        run(model, (wrap(x) for x in data), iterations=3, forward=forward)
        states.append(dict(model.state_dict()))
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


def test_a_last_batch_of_one_sample():
    model, _ = prepared()
    x = samples(IMAGE, 9)
    found = run(model, [x[:8], x[8:]], iterations=3)
    assert all(unit.after <= unit.before for unit in found.units)


def test_batches_of_one_sample():
    model, data = prepared()
    found = run(model, list(torch.cat(data).split(1)), iterations=3, drop=0.0)
    again, _ = prepared()
    other = run(again, data, iterations=3, drop=0.0)
    assert [u.before for u in found.units] == pytest.approx([u.before for u in other.units], rel=1e-3)


def test_captured_in_half_precision():
    model, data = prepared()
    whole = run(copy.deepcopy(model), data, iterations=20, drop=0.0)
    found = run(model, data, iterations=20, drop=0.0, dtype=torch.float16)
    for a, b in zip(found.units, whole.units, strict=True):
        assert a.before == pytest.approx(b.before, rel=0.3) and a.after <= a.before


def test_a_model_in_half_precision():
    model, data = prepared()
    model.bfloat16()
    found = run(model, [x.bfloat16() for x in data], iterations=20)
    assert any(unit.after < unit.before for unit in found.units)
    assert float_weight(model.stem).dtype == torch.bfloat16
    check_levels(model)


def test_own_parts():
    model, data = prepared()
    found = run(model, data, iterations=5, loss=LpLoss(2.4), drop=Annealed(0.3, 0.5), rounding=AdaRound(0.1))
    assert all(unit.after <= unit.before for unit in found.units)


def test_error_feedback_as_a_start_is_undone_where_it_did_not_help():
    """A unit whose loss did not fall keeps nearest rounding of its weights, not the feedback's."""
    model, data = prepared("pooling and flatten", skip=False)
    nearest = {n: m.weight.detach().clone() for n, m in model.named_modules() if weight_quantizer(m) is not None}

    def worse(output, target, weights):
        return LpLoss()(output, target) if torch.is_grad_enabled() else (output * 0).sum() + len(calls)

    calls = []

    def counted(*arguments):
        if not torch.is_grad_enabled():
            calls.append(1)
        return worse(*arguments)  # larger each time it is asked

    found = run(model, data, units="layer", start="feedback", loss=counted, iterations=3, drop=0.0)
    assert all(unit.after == unit.before for unit in found.units)
    for name, weight in nearest.items():
        assert torch.equal(model.get_submodule(name).weight.detach(), weight)


@pytest.mark.parametrize("bias_lr", [0.0, 0.01])
def test_biases_move_on_request(bias_lr):
    model, data = prepared()
    before = {n: p.clone() for n, p in model.named_parameters() if n.endswith("bias")}
    found = run(model, data, bias_lr=bias_lr)
    moved = [not torch.equal(p, before[n]) for n, p in model.named_parameters() if n.endswith("bias")]
    improved = [unit.after < unit.before for unit in found.units]
    assert any(moved) == bool(bias_lr) and any(improved)


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"iterations": 0}, SpecError, "iterations=0 must be at least 1"),
        ({"search_iterations": 0}, SpecError, "search_iterations=0 must be at least 1"),
        ({"batch_size": 0}, SpecError, "batch_size=0 must be at least 1"),
        ({"merges": 0}, SpecError, "merges=0 must be at least 1"),
        ({"batch_size": 9, "ranks": 2}, SpecError, "batch_size=9 cannot be shared by 2 ranks; give a multiple"),
        ({"step_lr": 0.0}, SpecError, "step_lr=0.0 must be positive"),
        ({"regularization": -1.0}, SpecError, "regularization=-1.0 .*not negative"),
        ({"units": "mixed", "metric": "size"}, SpecError, r"metric='size' is unknown; use one of \('modcap', 'loss'\)"),
        ({"rounding": "up"}, SpecError, "rounding='up' is unknown"),
        ({"loss": "l2"}, SpecError, "loss='l2' is unknown"),
        ({"drop": 2.0}, SpecError, "drop=2.0 is no probability"),
        ({"memory": 0}, SpecError, "memory=0; give a number of bytes"),
        (
            {"activation_mode": "fixed"},
            SpecError,
            r"activation_mode='fixed' is unknown; use one of \('learned', 'quantized', 'float'\)",
        ),
        ({"units": "blocks"}, SpecError, "units='blocks' is unknown"),
        ({"start": "gptq"}, SpecError, "start='gptq' is unknown"),
    ],
)
def test_wrong_choices(options, error, message):
    model, data = prepared()
    before = traces(model)
    with pytest.raises(error, match=message):
        run(model, data, **options)
    assert_same(traces(model), before)


def test_wrong_states():
    model, data = prepared()
    with pytest.raises(StateError, match="lq.reconstruct needs a model with quantizers, ResNet has none"):
        lq.reconstruct(ResNet(), data)
    with pytest.raises(StateError, match="lq.reconstruct needs calibrated quantizers; run lq.calibrate"):
        lq.reconstruct(lq.attach(ResNet(), 4, 4), data)
    with pytest.raises(DataError, match="reconstruction got no batches: the loader is empty; give lq.reconstruct at"):
        lq.reconstruct(model, [])
    with pytest.raises(DataError, match="ResNet did not take a batch of Tensor"):
        lq.reconstruct(model, [torch.zeros(4, 7)])


def test_error_feedback_counts_the_inputs_of_layers_inside_attention(monkeypatch):
    """Its own products are not taken for those of the attention, which are quantized by their order."""
    seen = []

    def noted(values, correlation, low, high, offset):
        seen.append((values.shape[1], correlation))
        return values

    model, data = prepared("tokens")
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    inputs = {id(layer): [] for layer in layers}
    keep = lambda layer, args, _: inputs[id(layer)].append(args[0].detach().flatten(0, -2))  # noqa: E731
    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        for x in data:
            model(x)
    for handle in handles:
        handle.remove()
    expected = [torch.cat(rows).T @ torch.cat(rows) for rows in inputs.values()]
    monkeypatch.setattr("lq.reconstruction.rounding.feedback.error_feedback", noted)
    run(model, data, units="network", start="feedback", iterations=1, batch_size=24, activation_mode="quantized")
    linear = [correlation for width, correlation in seen if width != 3 * 4 * 4]
    assert len(seen) > len(expected) - 1 >= 4
    for correlation in linear[-len(expected) :]:
        assert any(
            torch.allclose(correlation, e, rtol=1e-4, atol=1e-3) for e in expected if e.shape == correlation.shape
        )


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it
def test_compiled_units_have_the_same_losses(monkeypatch):
    """By the eager backend, which only traces; without a compiler at hand the others could not run."""
    compiled = []

    def traced(function, **_):
        compiled.append(function)
        return torch._dynamo.optimize("eager")(function)

    losses = []
    for compile_ in (False, True):
        monkeypatch.setattr(torch, "compile", traced)
        model, data = prepared()
        found = run(model, data, iterations=5, compile=compile_)
        losses.append([loss for unit in found.units for loss in (unit.after, *unit.curve)])
        assert len(compiled) == (len(found.units) if compile_ else 0)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # sums may be taken in another order


class Tied(nn.Module):
    """A decoder that has nothing of its own: its weight is the embedding's, and it has no bias."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.decode = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens):
        return self.decode(torch.tanh(self.mix(self.embed(tokens))))


@pytest.mark.parametrize("activations", [None, 4])
@pytest.mark.parametrize("units", ["layer", "block", "network", ["embed", "mix", "decode"]], ids=str)
@pytest.mark.parametrize("rounding", ["adaround", "softmax", "nearest"])
def test_units_with_nothing_to_learn(activations, units, rounding):
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (12, 5))
    model = quantized(Tied().eval(), [tokens], 3, activations)
    found = lq.reconstruct(model, [tokens], units=units, rounding=rounding, iterations=4, batch_size=4, bias_lr=0.01)
    assert model.decode.weight.equal(model.embed.weight)
    assert all(unit.after <= unit.before for unit in found.units)
    if units != "network" and activations is None:
        assert found.units[-1].iterations == 0


def test_no_unit_at_all():
    model = quantized(nn.Sequential(nn.Linear(8, 2)), [torch.randn(4, 8)])
    with pytest.raises(PatternError, match=r"units: \[\] has no module, or an empty chain; give at least one name"):
        lq.reconstruct(model, [torch.randn(4, 8)], units=[])

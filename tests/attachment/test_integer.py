"""integer=True: quantizers, of 8 bits at least, wherever an engine that computes in integers needs a step."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

import lq
from lq.attachment.sites import activation_quantizers, is_attached, quantizers
from lq.callbacks import FineTune, Quantize
from lq.errors import SpecError, StateError
from lq.quantizer.activation_quantizer import ActivationQuantizer
from lq.structure.inspection import inspect
from tests.attachment.test_folding import randomize
from tests.helpers import QUIET, Tiny, assert_same, fit
from tests.models import EXAMPLES, example, names, state

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def resnet(seed=0):
    torch.manual_seed(seed)
    model = randomize(timm.create_model("test_resnet", num_classes=3), seed).eval()
    lq.fold_batchnorm(model)
    return model, torch.randn(2, 3, 32, 32)


def made(kind):
    if kind == "resnet":
        return resnet()
    if kind == "vit":
        torch.manual_seed(0)
        return timm.create_model("test_vit", img_size=32, num_classes=3).eval(), torch.randn(2, 3, 32, 32)
    return example(kind)


def widths(kind, weights=4, activations=4, **options):
    """Widths of all activations by site."""
    model, x = made(kind)
    lq.attach(model, weights, activations, structure=lq.inspect(model, x), **options)
    return {name: int(q.bits) for name, q in activation_quantizers(model).items()}


#: Tensors that a sum reads or gives, and the network's input, beside the sites that multiply.
FOUND = {
    "resnet": {
        "conv1.0.input", "maxpool.output", "layer1.0.conv2.output", "layer1.0.act2.output", "layer2.0.conv2.output",
        "layer2.0.downsample.1.output", "layer2.0.act2.output", "layer3.0.conv3.output", "layer3.0.downsample.1.output",
        "layer3.0.act3.output", "layer4.0.conv2.output", "layer4.0.downsample.1.output", "layer4.0.act2.output",
    },
    "residual": {"stem.input", "conv2.output", "relu_0_output"},
    "u-net": {"down.input", "relu_0_output"},
    "block": {"add_1_output", "mlp.2.output"},
    "encoder": {"layers.0.self_attn.linear_0_input", "layers.0.norm1.output"},
    "vit": {"patch_embed.proj.input"},
    "text": set(),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_what_it_quantizes_besides(kind):
    plain, integer = widths(kind), widths(kind, integer=True)
    added = integer.keys() - plain.keys()
    assert added == FOUND[kind]
    assert {integer[name] for name in added} <= {8}
    # An input that is quantized already, with as many levels, is not quantized again.
    assert all(integer[name] == plain[name] for name in integer.keys() & plain.keys())
    assert all(plain[name] == 8 for name in plain.keys() - integer.keys())


@pytest.mark.parametrize("kind", FOUND)
def test_without_it_none_of_them_is_there(kind):
    assert not FOUND[kind] & widths(kind).keys()
    assert widths(kind) == widths(kind, integer=False)


@pytest.mark.parametrize(("activations", "wide"), [(2, 8), (4, 8), (7, 8), (8, 8), (16, 16)])
def test_at_least_8_bits(activations, wide):
    found = widths("resnet", activations=activations, integer=True, first_last=None)
    assert {found[name] for name in FOUND["resnet"]} == {wide}
    inner = {name: bits for name, bits in found.items() if name.endswith("conv2.input")}
    assert set(inner.values()) == {activations} and len(inner) == 4


@pytest.mark.parametrize("kind", ["resnet", "residual"])
def test_convolutions_still_read_few_bits(kind):
    found = widths(kind, integer=True)
    reading = {name: bits for name, bits in found.items() if name.endswith(".input") and name not in FOUND[kind]}
    assert sum(bits == 4 for bits in reading.values()) == len(reading) - 1  # all but the last layer's
    assert len(reading) >= 3


def test_8_bit_inputs_behind_sums_are_not_quantized_twice():
    found = widths("resnet", activations=8, integer=True)
    assert "layer1.0.act2.output" in found and "layer2.0.conv1.input" not in found
    assert "layer2.0.conv1.input" in widths("resnet", activations=8)


def test_activations_in_float_stay():
    assert widths("resnet", activations=None, integer=True) == {}


def test_skip_paths_have_their_own_width():
    """skip=True takes the activations' width there; the ends of branches have 8 bits."""
    found = widths("resnet", integer=True, skip=True, first_last=None)
    branches = {"layer1.0.conv2.output", "layer2.0.downsample.1.output", "layer4.0.conv2.output"}
    assert {found[name] for name in branches} == {8}
    assert {found[name] for name in FOUND["resnet"] if "act" in name or name.startswith("maxpool")} == {4}
    assert found["conv1.0.input"] == 8


# --- results of convolutions ------------------------------------------------------------------------------------------


class Joined(nn.Module):
    """A convolution, what comes behind it, and another convolution."""

    def __init__(self, between, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.act, self.head = nn.ReLU(), nn.Conv2d(4, 4, 1)
        self.token = nn.Parameter(torch.randn(1, 4, 1, 8))
        self.between = between

    def forward(self, x):
        return self.head(self.between(self, self.bn(self.conv(x))))


BETWEEN = {
    "silu": (lambda m, x: F.silu(x), "conv.output"),
    "sigmoid": (lambda m, x: x.sigmoid(), "conv.output"),
    "gate": (lambda m, x: x * x.mean((2, 3), keepdim=True).sigmoid(), "conv.output"),
    "gate behind a clipping": (lambda m, x: (y := m.act(x)) * y.mean((2, 3), keepdim=True), "act.output"),
    "gate behind a function": (lambda m, x: (y := F.relu6(x)) * y.mean((2, 3), keepdim=True), "relu6_0_output"),
    "pooled mean": (lambda m, x: F.adaptive_avg_pool2d(m.act(x), 2), "act.output"),
    "concatenation": (lambda m, x: torch.cat([x, m.head(x)], 2), "conv.output"),
    "parts": (lambda m, x: torch.cat(list(m.act(x).chunk(2, 1))[::-1], 1), "act.output"),
    "two readers": (lambda m, x: F.max_pool2d(y := m.act(x), 1) + F.conv2d(y, m.head.weight), "act.output"),
    # what follows has a step, or is not for integers
    "nothing": (lambda m, x: x, None),
    "a clipping": (lambda m, x: m.act(x), None),
    "maxima": (lambda m, x: F.max_pool2d(m.act(x), 2), None),
    "a layer norm": (lambda m, x: F.layer_norm(x, x.shape[1:]), None),
    "tokens": (lambda m, x: torch.cat([x, m.token.expand(len(x), -1, -1, -1)], 2), None),
    "tokens behind a pooling": (lambda m, x: F.layer_norm(y := F.max_pool2d(x, 2), y.shape[1:]), None),
    "a position": (lambda m, x: x + m.token, None),
    "another function": (lambda m, x: x.sin(), None),
}


@pytest.mark.parametrize("kind", BETWEEN)
@pytest.mark.parametrize("norm", [False, True])
def test_results_of_convolutions_that_nothing_else_quantizes(kind, norm):
    torch.manual_seed(0)
    between, expected = BETWEEN[kind]
    model, x = Joined(between, norm).eval(), torch.randn(2, 3, 8, 8)
    structure = inspect(model, x)
    if norm and expected == "conv.output":
        expected = "bn.output"
    found = [name for name in names(structure, "result") if not name.startswith("head.")]
    assert found == ([expected] if expected else [])
    lq.attach(model, 4, 4, structure=structure, integer=True, first_last=None)
    there = activation_quantizers(model)
    assert int(there[expected].bits) == 8 if expected else not any(name.endswith("output") for name in there)
    assert lq.calibrate(model, [x]).eval()(x).isfinite().all()
    lq.detach(model)
    lq.attach(model, 4, 4, structure=structure)
    assert expected not in activation_quantizers(model)


def test_norms_with_an_activation_inside_are_quantized_between_the_two():
    """As in timm's networks when BatchNorms stay: the step belongs to convolution and norm together."""
    torch.manual_seed(0)
    model = randomize(timm.create_model("test_efficientnet", num_classes=3)).eval()
    x = torch.randn(2, 3, 32, 32)
    structure = inspect(model, x)
    results = names(structure, "result")
    assert "bn1.drop.output" in results and "bn1.output" not in results
    lq.attach(model, 8, 8, structure=structure, integer=True)
    lq.calibrate(model, [x]).eval()
    seen = {}
    model.bn1.act.register_forward_hook(lambda _, args, out: seen.update(given=args[0].clone()))
    model(x)
    assert 100 < seen["given"].unique().numel() <= 256 and seen["given"].min() < 0


def test_a_quantized_result_is_not_quantized_again_where_it_is_read():
    model = Joined(lambda m, x: (y := m.act(x)) * y.mean((2, 3), keepdim=True) + F.conv2d(y, m.head.weight)).eval()
    structure = inspect(model, torch.randn(2, 3, 8, 8))
    (site,) = [site for site in structure.sites if site.name == "conv2d_0_input"]
    assert site.covered_by == ("act.output",)


# --- streams that a norm reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "block", "unfused block"])
def test_streams_that_a_layer_norm_reads_stay_in_float(kind):
    model, x = made(kind)
    structure = inspect(model, x)
    normalized = {site.name for site in structure.sites if site.normalized}
    assert normalized
    for options in ({"integer": True}, {"integer": True, "skip": "auto"}):
        assert not normalized & widths(kind, **options).keys()
    assert {"blocks.0.attn.proj.output", "blocks.0.mlp.fc2.output"} <= normalized or kind != "vit"


@pytest.mark.parametrize("kind", ["resnet", "residual", "block", "vit"])
def test_ends_of_branches_are_sites_of_their_own_role(kind):
    """Each is the result of one module that only a sum reads."""
    model, x = made(kind)
    structure = inspect(model, x)
    found = names(structure, "result")
    assert found and len(set(found)) == len(found)
    assert not set(found) & set(names(structure, "skip"))
    assert all(site.place == "output" and site.shape for site in structure.sites if site.role == "result")
    assert all(site.covered_by == () and site.shares is None for site in structure.sites if site.role == "result")


@pytest.mark.parametrize("kind", ["residual", "block"])
def test_a_saved_structure_has_them_too(kind):
    model, x = made(kind)
    structure = inspect(model, x)
    again = lq.Structure.from_json(structure.to_json())
    assert again == structure
    lq.attach(model, 4, 4, structure=again, integer=True)
    assert {q.name for q in quantizers(model)} >= FOUND[kind]


# --- what it needs, what it may be told -------------------------------------------------------------------------------


def test_it_needs_a_structure():
    model, _ = resnet()
    message = r"^integer=True needs to know how the tensors flow: pass structure=lq.inspect\(model, example\)$"
    with pytest.raises(StateError, match=message):
        lq.attach(model, 8, 8, integer=True)
    assert not is_attached(model)


@pytest.mark.parametrize("skip", ["all", 1.5, None])
def test_other_values_of_skip(skip):
    model, x = example("block")
    with pytest.raises(SpecError, match=r"^skip=.* is unknown; use True, False or 'auto'$"):
        lq.attach(model, 8, 8, structure=lq.inspect(model, x), skip=skip)


def test_patterns_choose_among_them():
    assert "layer1.0.conv2.output" not in widths("resnet", integer=True, exclude="layer1")
    assert widths("residual", integer=True, include="conv2") == {"conv2.input": 4, "conv2.output": 8}
    found = widths("residual", integer=True, overrides={"stem": {"activations": 6}, "relu_0": {"activations": None}})
    assert found["stem.input"] == 6 and "relu_0_output" not in found


def test_the_input_beside_a_sum_of_it():
    """The network's input is quantized where a layer reads it."""
    model = Outer().eval()
    lq.attach(model, 4, 4, structure=lq.inspect(model, torch.randn(2, 3, 8, 8)), integer=True)
    assert {"conv.input", "conv.output", "add_0_output"} <= activation_quantizers(model).keys()


class Outer(nn.Module):
    """A sum of the network's input and of what a layer makes of it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.head(x + self.conv(x))


@pytest.mark.xfail(strict=True, reason="a sum reads the network's input itself, which is quantized at layers only")
def test_the_input_as_an_operand_of_a_sum():
    torch.manual_seed(0)
    model, x = Outer().eval(), torch.randn(2, 3, 8, 8)
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x), integer=True), [x]).eval()
    seen = []

    class Sums(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func.__name__ in ("add", "__add__"):
                seen.extend(args)
            return func(*args, **(kwargs or {}))

    with Sums(), torch.no_grad():
        model(x)
    assert len(seen) == 2
    assert all(operand.unique().numel() <= 256 for operand in seen)


# --- outputs and training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["resnet", "residual", "u-net", "block", "encoder", "vit"])
def test_8_bits_everywhere_stay_near_the_model(kind):
    model, x = made(kind)
    with torch.no_grad():
        expected = model(x)
        before = state(model)
        lq.attach(model, 8, 8, structure=lq.inspect(model, x), integer=True, first_last=None)
        lq.calibrate(model, [x])
        error = (model(x) - expected).norm() / expected.norm()
        assert 1e-6 < error < 0.1
        lq.detach(model)
        assert torch.equal(model(x), expected)
    assert_same(state(model), before)


def test_operands_and_results_of_sums_have_at_most_256_values():
    model, x = resnet()
    lq.attach(model, 4, 4, structure=lq.inspect(model, x), integer=True)
    lq.calibrate(model, [x])
    seen = {}
    for name in FOUND["resnet"]:
        layer, _, place = name.rpartition(".")
        quantizer = model.get_submodule(layer)._modules[f"{place}_quantizer"]
        assert isinstance(quantizer, ActivationQuantizer)
        count = lambda _, args, out, name=name: seen.update({name: (args[0].unique().numel(), out.unique().numel())})  # noqa: E731
        quantizer.register_forward_hook(count)
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    assert seen.keys() == FOUND["resnet"]
    for name, (given, rounded) in seen.items():
        assert 16 < rounded <= min(256, given), name
    assert sum(given > 256 for given, _ in seen.values()) > 8


class ResNet(Tiny):
    """timm's, whose blocks add in place."""

    def __init__(self):
        super().__init__()
        self.net = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)

    def forward(self, x):
        return self.net(x.expand(-1, 3, -1, -1).repeat(1, 1, 4, 4))


@pytest.mark.filterwarnings("ignore:15 BatchNorms of ResNet were folded")
@pytest.mark.parametrize("fold", [True, False])
def test_training_through_sums_in_place(fold):
    torch.manual_seed(0)
    module = ResNet()
    grads = {}

    class Note(FineTune):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads.update({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})

    fit(module, [Quantize(4, 4, fold_bn=fold, integer=True), Note("lsq")], max_epochs=1, limit_train_batches=2)
    assert len(module.seen) == 2
    assert all(grad.isfinite().all() for grad in grads.values())
    steps = {name: grad for name, grad in grads.items() if name.endswith("output_quantizer.log2_step")}
    assert len(steps) >= 12 and all(grad != 0 for grad in steps.values())
    assert all(p.isfinite().all() for p in module.parameters())


def test_gradients_of_sums_in_place_are_those_of_sums():
    """The residual example adds in place; a copy of it does not."""

    class Plain(EXAMPLES["residual"][0]):
        def forward(self, x):
            x = self.stem(x).relu()
            return self.head(self.relu(self.conv2(self.relu(self.conv1(x))) + x))

    found = []
    for kind in (EXAMPLES["residual"][0], Plain):
        torch.manual_seed(0)
        model, x = kind(), EXAMPLES["residual"][1]
        lq.attach(model, 4, 4, structure=lq.inspect(model, x), integer=True, estimator="lsq")
        lq.calibrate(model, [x]).train()
        model(x).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("output_quantizer" in name for name in found[0])
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], msg=name)


def test_checkpoints_bring_them_back():
    model, x = resnet()
    lq.calibrate(lq.attach(model, 4, 4, structure=lq.inspect(model, x), integer=True), [x]).eval()
    loaded = lq.load(model.state_dict(), resnet(1)[0]).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert set(activation_quantizers(loaded)) == set(activation_quantizers(model))


def test_the_callback_passes_it_on():
    torch.manual_seed(0)
    module, plain = ResNet(), ResNet()
    fit(module, [Quantize(8, 8, integer=True)], max_epochs=0)
    fit(plain, [Quantize(8, 8)], max_epochs=0)
    added = activation_quantizers(module).keys() - activation_quantizers(plain).keys()
    assert added == {f"net.{name}" for name in FOUND["resnet"]}

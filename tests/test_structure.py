"""inspect: what would be quantized where, what stays in float and why; attach by its map."""

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lq
from lq.errors import DataError, PatternError, StateError
from lq.sites import quantizers
from lq.structure import Structure
from tests.models import Attention, Block, Loop, OddWeights, Residual, Text, UNet


def made(model, seed=0):
    torch.manual_seed(seed)
    return model().eval() if isinstance(model, type) else model.eval()


def tokens(seed=1):
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(seed))


def images(size=8, seed=1):
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(seed))


EXAMPLES = {
    "block": (Block, tokens()),
    "unfused block": (lambda: Block(fused=False, bias=True, norm=True), tokens()),
    "residual": (Residual, images()),
    "odd weights": (OddWeights, images()),
    "u-net": (UNet, images()),
    "text": (Text, torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))),
    "control flow": (Loop, torch.randn(3, 6, generator=torch.Generator().manual_seed(1))),
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 1, None, False),
        tokens(),
    ),
}
every_model = pytest.mark.parametrize("kind", EXAMPLES)


def example(kind):
    make, x = EXAMPLES[kind]
    torch.manual_seed(0)
    return make().eval(), x


def names(structure, role):
    return [site.name for site in structure.sites if site.role == role]


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


class Spy(TorchDispatchMode):
    """Records the operands of multiplications, below everything that lq does."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        places = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "convolution": (0, 1)}.get(name, ())
        self.seen.extend((name, place, args[place].detach().clone()) for place in places)
        return func(*args, **(kwargs or {}))


def traces(model):
    """What attach leaves on modules, to be gone after detach."""
    return {
        name: (type(m), sorted(set(m.__dict__)), len(m._forward_hooks), len(m._forward_pre_hooks),
               len(m._load_state_dict_pre_hooks), len(m._forward_hooks_always_called))
        for name, m in model.named_modules()
    }  # fmt: skip


# --- every kind of model, all the way --------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("skip", [False, True])
def test_attach_calibrate_train_save_load_detach(kind, skip):
    model, x = example(kind)
    expected, before, left = model(x), state(model), traces(model)
    structure = lq.inspect(model, x)
    lq.attach(model, 8, 8, structure=structure, skip=skip, estimator="lsq")
    lq.calibrate(model, [x])
    output = model(x)
    error = (output - expected).norm() / expected.norm()
    assert 1e-6 < error < 0.1
    assert all(quantizer.calibrated for quantizer in quantizers(model))

    loaded = lq.load(state(model), example(kind)[0])
    assert torch.equal(loaded(x), output)
    assert {q.name for q in quantizers(loaded)} == {q.name for q in quantizers(model)}
    assert torch.equal(copy.deepcopy(model)(x), output)

    model.train()
    model(x).square().mean().backward()
    moved = [q for q in quantizers(model) if q.log2_step.grad is not None and q.log2_step.grad.abs().sum() > 0]
    assert len(moved) > len(list(quantizers(model))) // 2
    model.zero_grad()

    lq.detach(model.eval())
    assert traces(model) == left
    after = state(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.lstm._flat_weights")  # of any LSTM
@every_model
def test_exported_program_gives_the_same_numbers(kind):
    if kind == "control flow":
        pytest.skip("torch.export does not take control flow on data")
    model, x = example(kind)
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x)), [x])
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x), rtol=1e-4, atol=1e-5)


@every_model
def test_quantized_operands_have_few_values(kind):
    """Independent of lq's own bookkeeping: record what multiplications get, by torch's own dispatcher."""
    model, x = example(kind)
    structure = lq.inspect(model, x)
    lq.calibrate(lq.attach(model, 3, 3, structure=structure, first_last=None), [x])
    with torch.no_grad(), Spy() as spy:
        model(x)
    assert spy.seen
    for name, place, tensor in spy.seen:
        if tensor.numel() == x.numel() and torch.equal(tensor.flatten().sort()[0], x.flatten().sort()[0]):
            continue  # the network's own input
        assert fewest_values(tensor) <= 8, (name, place)


def fewest_values(tensor):
    """Largest number of distinct values in a channel, for the dimension of channels where it is smallest."""
    along = [max(row.unique().numel() for row in tensor.movedim(dim, 0)) for dim in range(tensor.ndim)]
    return min(along)


@every_model
def test_macs_are_those_of_the_flop_counter(kind):
    model, x = example(kind)
    with FlopCounterMode(display=False) as counter:  # with gradients: torch's fused encoder layer is not counted
        model(x)
    structure = lq.inspect(model, x)
    if kind == "text":  # the counter does not know the LSTM: two layers of two matrices (32, 8) on 5 tokens
        assert structure.macs == 5 * (4 * 32 * 8 + 11 * 8)
        return
    assert 2 * structure.macs * len(x) == pytest.approx(counter.get_total_flops())


# --- attention ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"norm": True}])
def test_fused_and_unfused_attention_give_the_same_numbers(options):
    x, outputs, sites = tokens(), [], []
    for fused in (True, False):
        torch.manual_seed(0)
        model = Attention(fused=fused, **options).eval()
        structure = lq.inspect(model, x)
        sites.append([site.name for site in structure.sites])
        lq.calibrate(lq.attach(model, 4, 4, structure=structure), [x])
        outputs.append(model(x))
        model.fused = not fused
        torch.testing.assert_close(model(x), outputs[-1])  # ranges found for one path serve the other
    assert sites[0] == sites[1]
    torch.testing.assert_close(outputs[0], outputs[1])


def test_attention_probabilities_are_unsigned_and_shared_inputs_have_one_quantizer():
    model, x = made(Attention), tokens()
    structure = lq.inspect(model, x)
    assert names(structure, "activation") == [
        "q.input", "k.input", "v.input",
        "matmul_0_left", "matmul_0_right", "matmul_1_left", "matmul_1_right", "proj.input",
    ]  # fmt: skip
    shared = {site.name: site.shares for site in structure.sites if site.shares}
    assert shared == {"k.input": "q.input", "v.input": "q.input"}
    lq.calibrate(lq.attach(model, 8, 8, structure=structure, overrides={"q": {"activations": 8}}), [x])
    found = {q.name: q for q in quantizers(model)}
    assert float(found["matmul_1_left"].zero_point) == 0
    assert float(found["matmul_0_left"].zero_point) > 0
    assert "k.input" not in found


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"mask": "bool"}, {"mask": "float"}, {}])
def test_decomposed_attention_is_torchs(options):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, generator=generator) for _ in range(3))
    mask = torch.rand(2, 1, 6, 6, generator=generator) > 0.3
    mask[0, 0, 2] = False  # a token that may look at nothing
    options = dict(options)
    kind = options.pop("mask", None)
    if kind:
        options["attn_mask"] = mask if kind == "bool" else torch.randn(6, 6, generator=generator)

    class Call(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q, k, v, **options)

    model = Call()
    structure = lq.inspect(model, q)
    expected = model(q)
    lq.attach(model, None, 16, structure=structure, overrides={"matmul_0": {"activations": 16}})
    lq.calibrate(model, [q])
    torch.testing.assert_close(model(q), expected, atol=2e-3, rtol=1e-3)


def test_grouped_queries():
    q, kv = torch.randn(2, 4, 6, 4), torch.randn(2, 2, 6, 4)

    class Call(nn.Module):
        def forward(self, q):
            return F.scaled_dot_product_attention(q * 1.0, kv, kv, enable_gqa=True)

    model = Call()
    expected = model(q)
    lq.calibrate(lq.attach(model, 8, 16, structure=lq.inspect(model, q)), [q])
    torch.testing.assert_close(model(q), expected, atol=5e-2, rtol=1e-2)


@pytest.mark.parametrize("fused", [True, False])
def test_timm_attention(fused):
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    x = torch.randn(2, 3, 160, 160)
    structure = lq.inspect(model, x)
    assert structure.share == 1.0
    found = [o.name for o in structure.operations if o.kind == "matmul"]
    assert found[:2] == ["blocks.0.attn.matmul_0", "blocks.0.attn.matmul_1"]


def test_multi_head_attention_with_its_own_in_projection():
    model, x = nn.MultiheadAttention(8, 2, batch_first=True).eval(), tokens()
    structure = lq.inspect(model, x, forward=lambda m, x: m(x, x, x))
    expected = model(x, x, x)[0]
    assert {o.name: o.kind for o in structure.operations} == {
        "linear_0": "linear", "matmul_0": "matmul", "matmul_1": "matmul", "linear_1": "linear",
    }  # fmt: skip
    assert "in_proj_weight" not in [tensor.name for tensor in structure.floats]
    lq.attach(model, 2, 8, structure=structure, first_last=None)
    lq.calibrate(model, [x], forward=lambda m, x: m(x, x, x))
    quantizer = next(q for q in quantizers(model) if q.name == "linear_0_weight")
    assert quantizer.bits.shape == (24,)
    assert not torch.allclose(model(x, x, x)[0], expected, rtol=1e-2)


# --- weights ----------------------------------------------------------------------------------------------------


def test_weights_that_are_no_layers_are_quantized_or_listed():
    model, x = example("odd weights")
    structure = lq.inspect(model, x)
    assert names(structure, "weight") == [
        "conv.conv2d_0_weight", "conv2d_0_weight", "matmul_0_right_weight",
        "einsum_0_right_weight", "never_called.weight",
    ]  # fmt: skip
    reasons = {tensor.name: tensor.reason for tensor in structure.floats}
    assert reasons["position"] == "added, not multiplied"
    assert reasons["gain"] == "scales elementwise"
    assert reasons["unused"] == "not used by the example"
    assert reasons["never_called.bias"] == "bias"
    assert structure.share == 1.0


def test_the_standardized_weight_is_on_the_grid_not_the_one_before():
    model, x = example("odd weights")
    lq.calibrate(lq.attach(model, 2, structure=lq.inspect(model, x), first_last=None), [x])
    with torch.no_grad(), Spy() as spy:
        model(x)
    standardized = next(tensor for name, place, tensor in spy.seen if (name, place) == ("convolution", 1))
    assert all(channel.unique().numel() <= 4 for channel in standardized)
    quantizer = next(q for q in quantizers(model) if q.name == "conv.conv2d_0_weight")
    assert quantizer.calibrated and quantizer.bits.shape == (4,)
    assert model.conv.weight.detach()[0].unique().numel() > 4  # the parameter itself stays float


def test_set_bits_of_a_weight_at_a_call():
    model, x = example("odd weights")
    lq.calibrate(lq.attach(model, 4, structure=lq.inspect(model, x)), [x])
    lq.set_bits(model, {"matmul_0": 1})
    quantizer = next(q for q in quantizers(model) if q.name == "matmul_0_right_weight")
    model(x)
    assert quantizer.calibrated and set(quantizer.bits.tolist()) == {1.0}


def test_tied_weights_share_their_quantizer():
    model, x = example("text")
    lq.attach(model, 4, structure=lq.inspect(model, x), first_last=None)
    assert model.embed.parametrizations.weight[0] is model.decode.parametrizations.weight[0]
    lq.detach(model)
    assert model.decode.weight is model.embed.weight


# --- sites ------------------------------------------------------------------------------------------------------


def test_skip_paths():
    model, x = example("residual")
    structure = lq.inspect(model, x)
    assert names(structure, "skip") == ["relu_0_output"]  # the sum goes through a ReLU that serves two places


def test_torchvision_blocks_are_quantized_at_their_output():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    skips = names(lq.inspect(model, images(64)), "skip")
    assert skips == ["maxpool.output", *(f"layer{stage}.{block}.output" for stage in (1, 2, 3, 4) for block in (0, 1))]


def test_skip_replaces_the_inputs_it_covers():
    model, x = example("block")
    both = nn.Sequential(model, copy.deepcopy(model)).eval()
    structure = lq.inspect(both, x)
    lq.attach(both, 8, 8, structure=structure, skip=True)
    found = {q.name for q in quantizers(both)}
    assert {"0.output", "0.add_0_output", "1.add_0_output"} <= found


def test_resnet_skip_sites_follow_the_activation():
    torch.manual_seed(0)
    model = timm.create_model("resnet10t").eval()
    x = torch.randn(1, 3, 64, 64)
    structure = lq.inspect(model, x)
    skips = names(structure, "skip")
    assert skips == ["maxpool.output", *(f"layer{n}.0.act2.output" for n in (1, 2, 3, 4))]
    plan = {q.name for q in quantizers(lq.attach(model, 4, 4, structure=structure, skip=True))}
    assert "layer2.0.conv1.input" not in plan and "layer1.0.conv2.input" in plan


def test_concatenations_share_a_range_on_request():
    model, x = example("u-net")
    structure = lq.inspect(model, x)
    lq.calibrate(lq.attach(copy.deepcopy(model), 8, 8, structure=structure), [x])
    apart = {q.name for q in quantizers(lq.attach(copy.deepcopy(model), 8, 8, structure=structure, first_last=None))}
    joined = lq.attach(model, 8, 8, structure=structure, share_concats=True, first_last=None)
    together = {q.name for q in quantizers(joined)}
    assert apart - together == {"out.input"}
    lq.calibrate(joined, [x])
    assert torch.isfinite(joined(x)).all()


def test_a_layer_called_twice_has_one_quantizer():
    model, x = example("control flow")
    structure = lq.inspect(model, x)
    assert names(structure, "activation").count("again.input") == 1
    operation = next(o for o in structure.operations if o.name == "again")
    assert operation.macs == 3 * 36


# --- the map as a value ----------------------------------------------------------------------------------------


@every_model
def test_a_saved_structure_gives_the_same_sites(kind):
    model, x = example(kind)
    structure = lq.inspect(model, x)
    again = Structure.from_json(json.dumps(json.loads(structure.to_json())))
    assert again == structure
    assert [q.name for q in quantizers(lq.attach(model, 4, 4, structure=again))]


def test_the_table_says_what_and_why():
    text = str(lq.inspect(*example("odd weights")))
    assert "einsum_0" in text and "stays in float, added, not multiplied: 1 (position)" in text
    assert "100.00 % with every operand quantizable" in text


def test_patterns_choose_calls():
    model, x = example("block")
    structure = lq.inspect(model, x)
    lq.attach(model, 8, 8, structure=structure, exclude="attn.matmul_*", overrides={"mlp": {"activations": 4}})
    found = {q.name: int(q.bits.flatten()[0]) for q in quantizers(model)}
    assert not any("matmul" in name for name in found)
    assert found["mlp.0.input"] == 4


def test_errors():
    model, x = example("block")
    structure = lq.inspect(model, x)
    with pytest.raises(StateError, match="skip=True needs to know how the tensors flow"):
        lq.attach(model, 8, 8, skip=True)
    with pytest.raises(PatternError, match="exclude pattern 'atn' matches none"):
        lq.attach(model, 8, 8, structure=structure, exclude="atn")
    with pytest.raises(StateError, match="the structure has a module 'norm1|attn"):
        lq.attach(nn.Linear(2, 2), 8, 8, structure=structure)
    with pytest.raises(DataError, match="not a saved structure"):
        Structure.from_dict({"sites": []})
    with pytest.raises(DataError, match="did not take a batch of Tensor"):
        lq.inspect(model, torch.randn(2, 3))
    lq.attach(model, 8, structure=structure)
    with pytest.raises(StateError, match=r"lq.inspect looks at models without quantizers"):
        lq.inspect(model, x)


def test_summary_counts_the_products():
    model, x = example("block")
    structure = lq.inspect(model, x)
    lq.calibrate(lq.attach(model, 4, 8, structure=structure, first_last=None), [x])
    rows = {layer.name: layer for layer in lq.summary(model).layers}
    found = {operation.name: operation.macs for operation in structure.operations}
    assert {name: rows[name].macs for name in found} == found
    assert rows["attn.matmul_0"].bitops == found["attn.matmul_0"] * 8 * 8
    assert rows["mlp.0"].bitops == found["mlp.0"] * 4 * 8
    again = {layer.name: layer.macs for layer in lq.summary(model, x).layers}
    assert {name: again[name] for name in found} == found


@pytest.mark.filterwarnings("ignore")  # of the exporter about itself
@pytest.mark.parametrize("fused", [True, False])
def test_onnx_gives_the_same_numbers(fused, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, x = Block(fused=fused).eval(), tokens()
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x)), [x])
    torch.onnx.export(model, (x,), tmp_path / "block.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "block.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = model(x)
    assert (torch.from_numpy(got) - expected).norm() / expected.norm() < 1e-2  # a tie may be rounded otherwise


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler's own look
def test_compiled_model_gives_the_same_numbers():
    model, x = example("block")
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x)), [x])
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))


def test_an_error_inside_a_forward_leaves_nothing_behind():
    model, x = example("block")
    lq.calibrate(lq.attach(model, 8, 8, structure=lq.inspect(model, x)), [x])
    expected = model(x)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 3))
    assert torch.equal(model(x), expected)
    assert torch.overrides._get_current_function_mode_stack() == []

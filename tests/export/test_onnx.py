"""ONNX files: what is in them, bit by bit, and what onnxruntime makes of them.

Numbers of a file and of its model differ by the order of float sums. Where that lets a value fall on the other side of
a rounding, an activation moves by a step: a matter of chance, one in some 100 000 values, so seeds are fixed, models
are tiny, and outputs are compared up to a thousandth. Errors of a grid are ten times larger.
"""

import json
import math
import re
import threading
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from onnx import TensorProto, helper
from torch import nn

import lq
from lq.attachment.sites import activation_quantizers, weight_quantizer
from lq.errors import DataError, StateError
from lq.export import export_onnx
from lq.export.program import exported
from lq.export.running import can_read
from lq.export.standard import standard_form
from tests.attachment.test_attach import images, quantized, small
from tests.attachment.test_folding import convnet, norms, randomize
from tests.export.exported import (
    Pairs,
    activations,
    assert_close,
    calibrated,
    constants,
    depthwise,
    dynamic,
    kinds,
    known,
    limits_of_codes,
    multiplied,
    nodes,
    nudged,
    pictures,
    relative,
    run,
    session,
    steps_of,
    stored,
    stored_name,
    unpacked,
    weights,
)
from tests.helpers import assert_same, hooks
from tests.models import EXAMPLES, Block, Residual, example, state

#: torch says so of every recurrent layer that it exports, and of its own code on the way.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The tensor attributes self.*_flat_weights"),
    pytest.mark.filterwarnings("ignore:_check_is_size will be removed"),
]


@dataclass
class File:
    """An exported file, its model, an example, and what was said of it."""

    path: Path
    model: nn.Module
    x: torch.Tensor
    report: lq.OnnxReport
    before: dict[str, Any]


def convolutions(seed=0):
    torch.manual_seed(seed)
    return nudged(small(seed)).eval()


def vit():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    return nudged(model).eval(), pictures(4, 32)


def resnet():
    torch.manual_seed(0)
    model = randomize(timm.create_model("test_resnet", num_classes=5)).eval()
    lq.fold_batchnorm(model)
    return model, pictures(4, 32)


def gated():
    """SiLUs and a gate for each channel, behind BatchNorms that stay."""
    torch.manual_seed(0)
    model = randomize(timm.create_model("test_efficientnet", num_classes=5)).eval()
    return model, pictures(4, 32)


def of(kind):
    torch.manual_seed(0)
    return nudged(EXAMPLES[kind][0]()).eval(), EXAMPLES[kind][1]


def upwards(groups=1):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 6, 2, stride=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, groups=groups), nn.ReLU(), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    return nudged(model).eval(), pictures()


def mixed(model):
    lq.set_bits(model, {"2": [0, 1, 3, 4], "5": [2, 0, 4, 1, 8, 3, 2, 2]})


def few(bits, wide=8, **options):
    return {"weights": weights(bits, **options), "activations": activations(wide)}


NO_EDGES = {"first_last": None}
DEPTHWISE = lambda: (depthwise(), pictures())  # noqa: E731
PLAIN = lambda: (convolutions(), images(8))  # noqa: E731

#: Models with their examples, how they are quantized, arguments of the export.
FILES: dict[str, tuple[Any, ...]] = {
    "convolutions": (PLAIN, few(4, 4), {}),
    "8 bits": (PLAIN, few(8), {}),
    "2 bits": (DEPTHWISE, {**few(2, 4), **NO_EDGES}, {}),
    "2 bits in opset 21": (DEPTHWISE, {**few(2, 4), **NO_EDGES}, {"opset": 21}),
    "1 bit": (PLAIN, {**few(1, 2), **NO_EDGES}, {}),
    "zero points": (PLAIN, few(4, symmetric=False), {}),
    "2 bits with zero points": (PLAIN, {**few(2, 3, symmetric=False), **NO_EDGES}, {}),
    "by channel": (PLAIN, {**few(4), **NO_EDGES, "change": mixed}, {}),
    "16 bits": (PLAIN, few(16, 16), {}),
    "depthwise": (DEPTHWISE, {**few(4), "integer": True}, {}),
    "upwards": (upwards, few(4, 6), {}),
    "batchnorms": (lambda: (convnet().eval(), images(8)), {**few(4, 6), **NO_EDGES}, {}),
    "gated": (gated, {**few(8), "integer": True}, {}),
    "vit": (vit, {**few(4), "skip": "auto"}, {}),
    "resnet": (resnet, {**few(4), "skip": "auto", "integer": True}, {}),
    "block": (lambda: of("unfused block"), {**few(5, 5), **NO_EDGES, "skip": "auto", "integer": True}, {}),
    "encoder": (lambda: of("encoder"), {**few(4), "integer": True}, {}),
    "text": (lambda: of("text"), few(4), {}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files by name, exported when they are first asked for."""
    made: dict[str, File] = {}

    def get(name: str) -> File:
        if name not in made:
            build, options, export = FILES[name]
            (model, x), options = build(), dict(options)
            change = options.pop("change", None)
            calibrated(model, x, **options)
            if change is not None:
                change(model)
            before = state(model)
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            made[name] = File(path, model, x, export_onnx(model, x[:2], path, check=[x], **export), before)
        return made[name]

    return get


every_file = pytest.mark.parametrize("name", FILES)


# --- all files --------------------------------------------------------------------------------------------------------


@every_file
@torch.no_grad()
def test_outputs_are_those_of_the_model(name, files):
    file = files(name)
    assert file.report.samples == len(file.x)
    assert file.report.largest_output == pytest.approx(float(file.model(file.x).abs().max()))
    assert relative(file.report) < 1e-3
    assert file.report.agreement == 1
    for x in (file.x, file.x[:1], torch.cat([file.x, file.x.flip(0)])[:5]):
        expected = file.model(x)
        found = run(file.path, x)
        assert len(found) == 1
        assert_close(found[0], expected, 1e-3)


@every_file
def test_files_are_valid_and_say_what_they_are(name, files):
    file = files(name)
    model = onnx.load(file.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", file.report.opset)]
    assert file.report.opset == (25 if name in ("1 bit", "2 bits", "2 bits with zero points") else 21)
    assert model.producer_name == "lq" and not model.functions
    assert dynamic(file.path)
    assert len(model.graph.output) == len(model.graph.input) == 1


@every_file
def test_nothing_of_this_machine_is_in_a_file(name, files):
    content = files(name).path.read_bytes()
    here, home = str(Path(__file__).parents[2]).encode(), str(Path.home()).encode() + b"/"
    for word in (here, home, b"site-packages", b"/tmp", b"tests", b".py"):
        assert word not in content, word
    model = onnx.load(files(name).path)
    owners = [model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.initializer]
    assert not any(owner.doc_string for owner in owners)
    assert not any(len(owner.metadata_props) for owner in owners)


@every_file
def test_the_report_is_beside_the_file(name, files):
    file = files(name)
    beside = file.path.with_name("model.report.json")
    assert sorted(p.name for p in file.path.parent.iterdir()) == ["model.onnx", "model.report.json"]
    found = json.loads(beside.read_text(encoding="utf-8"))
    assert found == {**asdict(file.report), "notes": list(file.report.notes)}
    assert file.report.path == str(file.path) and file.report.size == file.path.stat().st_size
    assert "notes" in found and str(file.report).startswith(f"{file.path}: ")


@every_file
def test_weights_are_the_integers_of_the_model(name, files):
    """As they lie in the file, bit by bit, and as they are multiplied by."""
    file = files(name)
    values, seen = known(file.path), set()
    for layer, weight in lq.integer_weights(file.model).items():
        tensor = stored_name(file.path, layer)
        if tensor is None:
            assert name == "text" and layer == "embed"  # tied: stored as the decoder's
            continue
        seen.add(tensor)
        split, spread, join = weight.layout.split, weight.layout.spread, weight.layout.join
        zeros = weight.zero_point.double() * (0 if "zero points" in name else 1)
        factor = torch.where(weight.zero_point % 1 != 0, 2.0, 1.0).double()  # levels of two-level channels are -1 and 1
        codes = split(weight.codes.double()) - spread(zeros, weight.codes)
        levels = join(codes * spread(factor, weight.codes)).numpy()
        used = multiplied(file.path, layer)
        assert used
        folded = any(node.op_type == "MatMul" for _, node in used) and name != "text"
        assert np.array_equal(values[tensor].T if folded else values[tensor], levels), layer
        for found, node in used:
            value = found.T if name == "text" and node.op_type == "MatMul" else found  # a Transpose is left
            if norms(file.model) and node.op_type == "Conv":
                continue  # whose steps are those of convolution and norm
            np.testing.assert_allclose(value, weight.dequantize().numpy(), rtol=1e-6, err_msg=node.name)
    assert seen


def types(path):
    """Names of the types of stored weights, by name."""
    named = {name: TensorProto.DataType.Name(t.data_type) for name, t in stored(path).items()}
    return {
        name: kind for name, kind in named.items() if re.search(r"(\.weight|\.original|_weight(_\d+|_[ih]h)?)$", name)
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convolutions", {"0.weight": "INT8", "2.weight": "INT4", "5.weight": "INT4", "6.weight": "INT8"}),
        ("8 bits", dict.fromkeys(("0.weight", "2.weight", "5.weight", "6.weight"), "INT8")),
        ("2 bits", dict.fromkeys(("0.weight", "2.weight", "4.weight", "7.weight"), "INT2")),
        ("2 bits in opset 21", dict.fromkeys(("0.weight", "2.weight", "4.weight", "7.weight"), "INT4")),
        ("1 bit", dict.fromkeys(("0.weight", "2.weight", "5.weight", "6.weight"), "INT2")),
        ("2 bits with zero points", dict.fromkeys(("0.weight", "2.weight", "5.weight", "6.weight"), "UINT2")),
        ("by channel", {"0.weight": "INT4", "2.weight": "INT4", "5.weight": "INT8", "6.weight": "INT4"}),
    ],
)
def test_weights_have_the_smallest_type(name, expected, files):
    assert types(files(name).path) == expected


def test_weights_with_zero_points_are_unsigned(files):
    found = types(files("zero points").path)
    assert found["2.weight"] == found["5.weight"] == "UINT4"
    assert {kind for key, kind in found.items() if key[0] in "06"} == {"UINT8"}


def test_weights_of_16_bits(files):
    assert set(types(files("16 bits").path).values()) == {"INT16"}


WIDTH = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "INT8": 8, "UINT8": 8, "INT16": 16}


@every_file
def test_bytes_are_those_of_the_types(name, files):
    """And the report counts the weights by type."""
    file = files(name)
    tensors, counted = stored(file.path), {}
    for tensor, kind in types(file.path).items():
        if kind == "FLOAT":
            continue
        count = int(np.prod(tensors[tensor].dims))
        assert len(tensors[tensor].raw_data) == -(-count * WIDTH[kind] // 8)
        counted[kind.lower()] = counted.get(kind.lower(), 0) + count
    assert file.report.weights == counted


def test_the_size_of_a_file(files):
    """442368 weights of 4 bits and 148416 of 8 bits (of 32 bits, float: 2.4 MB), and 8 bytes each for 2165 channels."""
    file = files("vit")
    assert file.report.weights == {"int4": 442368, "int8": 148416}
    integers = 442368 // 2 + 148416
    assert integers < file.report.size < integers + 45000
    held = sum(len(t.raw_data) for t in stored(file.path).values())
    assert file.report.size - held < 12000  # names, nodes
    assert files("2 bits").report.size < files("2 bits in opset 21").report.size


# --- weights ----------------------------------------------------------------------------------------------------------


@every_file
def test_casts_stand_before_the_weights_of_few_bits_only(name, files):
    path = files(name).path
    made, kind = {node.output[0]: node for node in nodes(path)}, types(path)
    dequantized = [n for n in nodes(path, "DequantizeLinear") if any(part in stored(path) for part in n.input[:1])]
    for node in dequantized:
        tensor = stored(path)[node.input[0]]
        assert tensor.data_type in (TensorProto.INT8, TensorProto.UINT8, TensorProto.INT16, TensorProto.INT32)
    for tensor, of_type in kind.items():
        if of_type in ("INT8", "UINT8") and tensor in {n.input[0] for n in dequantized}:
            continue
        if of_type in ("FLOAT", "INT16"):
            continue
        chain = [node for node in nodes(path, "Cast") if node.input[0] == tensor]
        assert len(chain) == 1
        assert helper.get_node_attr_value(chain[0], "to") == TensorProto.INT32
    for node in nodes(path, "DequantizeLinear"):
        before = made.get(node.input[0])
        if before is not None and before.op_type == "Cast":
            assert helper.get_node_attr_value(before, "to") == TensorProto.INT8


def test_weights_of_8_bits_need_no_cast(files):
    assert kinds(files("8 bits").path)["Cast"] == 0
    assert kinds(files("convolutions").path)["Cast"] == 4  # two of two layers


def test_levels_of_few_bits_are_computed_as_large_ones(files):
    """A power of two for each channel, with which the largest level is over 32 and at most 64."""
    path = files("convolutions").path
    values = known(path)
    for layer in ("2", "5"):
        factors = constants(path)[f"{layer}.weight_factors"]
        assert (np.log2(factors) % 1 == 0).all() and factors.min() >= 8
        levels = values[f"{layer}.weight_int8"]
        assert np.array_equal(levels, values[f"{layer}.weight"] * factors)
        assert (np.abs(levels).reshape(len(levels), -1).max(1) > 32).all() and np.abs(levels).max() <= 64


@pytest.mark.parametrize("name", ["vit", "encoder", "block", "text"])
def test_no_weight_is_transposed_when_the_file_runs(name, files):
    path = files(name).path
    made = {node.output[0]: node for node in nodes(path)}
    behind = [made.get(node.input[0]) for node in nodes(path, "Transpose")]
    weights_ = {n.output[0] for n in nodes(path, "DequantizeLinear") if n.input[0] in known(path)}
    turned = [node for node in behind if node is not None and node.output[0] in weights_]
    assert len(turned) == (name == "text")  # the decoder's, which the embedding looks up as well
    assert kinds(path)["MatMul"] + kinds(path)["Gemm"] >= (1 if name == "text" else 5)


def test_pruned_channels_are_zero(files):
    file = files("by channel")
    assert not known(file.path)["2.weight"][0].any() and not known(file.path)["5.weight"][1].any()
    assert weight_quantizer(file.model[2]).bits.tolist() == [0, 1, 3, 4]


def test_one_step_for_a_whole_weight(tmp_path):
    model = convolutions()
    with torch.no_grad():
        model[2].weight.add_(0.1), model[5].weight.add_(0.1)
    calibrated(model, images(8), **few(4, per_channel=False, symmetric=False))
    path = tmp_path / "m.onnx"
    assert relative(export_onnx(model, images(8), path)) < 1e-3
    assert types(path)["2.weight"] == types(path)["5.weight"] == "UINT4"
    for layer, weight in lq.integer_weights(model).items():
        for value, node in multiplied(path, layer):
            np.testing.assert_allclose(value, weight.dequantize().numpy(), rtol=1e-6, err_msg=node.name)


def test_no_warnings_of_its_own(tmp_path):
    """Of those that torch gives once in a process, too."""
    model = calibrated(convolutions(), images(8), **FILES["8 bits"][1])
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Converting a tensor with requires_grad")
            export_onnx(model, images(), tmp_path / "m.onnx")
    finally:
        torch.set_warn_always(False)


def test_layers_of_equal_integers(tmp_path):
    """Their weights differ by a factor; torch.onnx stores equal constants of up to 1024 bytes once."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        model[2].weight.copy_(model[0].weight * 2)
    x = torch.randn(16, 8)
    calibrated(model, x, **few(4), first_last=None)
    assert relative(export_onnx(model, x, tmp_path / "m.onnx")) < 1e-3


def test_weights_far_from_zero(tmp_path):
    """LSQ+ may move a zero point out of the grid."""
    model = calibrated(convolutions(), images(8), **few(4, symmetric=False), first_last=None)
    with torch.no_grad():
        weight_quantizer(model[5]).zero_point[0] = -2.0
    weight_quantizer(model[5]).refresh()
    export_onnx(model, images(8), tmp_path / "m.onnx")
    assert_close(run(tmp_path / "m.onnx", images(8), plain=True)[0], model(images(8)))  # onnxruntime may round floats


# --- activations ------------------------------------------------------------------------------------------------------


@every_file
def test_activations_have_the_grids_of_their_quantizers(name, files):
    """Steps and zero points, one quantizer for each tensor, and a limit unless 8 or 16 bits have all codes."""
    file = files(name)
    values = constants(file.path)
    weights_at_calls = {n.output[0] for n in nodes(file.path, "QuantizeLinear") if n.input[0] in values}
    found = [n for n in nodes(file.path, "QuantizeLinear") if n.output[0] not in weights_at_calls]
    wanted = activation_quantizers(file.model).values()
    assert len({tuple(n.input) for n in found}) == len(found)
    grids = {(float(values[n.input[1]]), int(values[n.input[2]])) for n in found}
    expected = {(float(np.float32(q.step.detach())), int(q.zero_point)) for q in wanted}
    assert grids == expected
    assert len(found) <= len(wanted)
    narrow = sum(int(q.bits) not in (8, 16) for q in wanted)
    limits = limits_of_codes(file.path)
    assert (len(limits) > 0) == (narrow > 0)
    assert len(limits) <= narrow


@pytest.mark.parametrize(("name", "bits"), [("convolutions", 4), ("2 bits", 4), ("1 bit", 2), ("block", 5)])
def test_activations_never_have_more_levels_than_they_have_bits_for(name, bits, files):
    """However large the input: what flows behind each Clip of codes."""
    file = files(name)
    model = onnx.load(file.path)
    limits = limits_of_codes(file.path)
    assert limits
    for node in limits:
        model.graph.output.append(helper.make_tensor_value_info(node.output[0], TensorProto.UINT8, None))
    found = run(model, 30 * torch.cat([file.x, -file.x]), plain=True)[1:]
    assert len(found) == len(limits)
    for codes in found:
        assert codes.dtype == np.uint8 and codes.max() <= 2**bits - 1
    assert max(np.unique(codes).size for codes in found) > 2 ** (bits - 1)
    assert max(codes.max() for codes in found) == 2**bits - 1


def test_16_bits_are_noted(files):
    note = "3 activations of 16 bits: onnxruntime computes what reads them in float"
    assert note in files("16 bits").report.notes
    assert not any("16 bits" in note for note in files("8 bits").report.notes)


def test_biases_of_16_bit_layers_are_added_apart(files):
    """onnxruntime makes integers of biases in layers, which would overflow at such steps."""
    file = files("16 bits")
    assert kinds(file.path)["Add"] == 3 and not list(biases(file.path))
    assert_close(run(file.path, file.x, plain=True)[0], file.model(file.x))
    assert_close(run(file.path, file.x)[0], file.model(file.x))


def test_narrow_activations_are_noted(files):
    assert (
        "activations with other widths than 8 are 8-bit integers, limited to their levels: 2 of 4 bits"
        in files("convolutions").report.notes
    )
    assert not any("limited" in note for note in files("8 bits").report.notes)


def test_weights_of_functions_are_noted(files):
    assert not any("functions" in note for name in ("vit", "encoder", "text") for note in files(name).report.notes)


def test_weights_that_functions_compute_are_noted(tmp_path):
    model, x = example("odd weights")
    calibrated(model, x, **few(4), first_last=None)
    report = export_onnx(model, x, tmp_path / "m.onnx")
    note = next(note for note in report.notes if "functions" in note)
    assert note.startswith("2 weights of functions are stored in float: ")
    assert "conv.conv2d_0_weight (no parameter as it is" in note and note.endswith("rounded where they are used")
    assert relative(report) < 1e-3


# --- biases -----------------------------------------------------------------------------------------------------------


def biases(path):
    """Biases of layers on integers by the name of the constant: their values, and the products of steps."""
    values, made = known(path), {node.output[0]: node for node in nodes(path)}
    for kind in ("Conv", "ConvTranspose", "Gemm"):
        for node, product in steps_of(path, kind):
            if len(node.input) < 3:
                continue
            source = made.get(node.input[2])
            name = node.input[2] if source is None else source.input[0].removesuffix("_integer")
            yield name, values[node.input[2]], product, node


@pytest.mark.parametrize("name", ["convolutions", "8 bits", "2 bits", "depthwise", "resnet", "vit", "upwards"])
def test_biases_of_file_and_model_are_the_same_multiples_of_products_of_steps(name, files):
    file = files(name)
    found = list(biases(file.path))
    assert found
    parameters = dict(file.model.named_parameters())
    for bias, values, products, _ in found:
        assert_close(values, parameters[bias], 1e-7)
        whole = values / products
        assert np.abs(whole - whole.round()).max() < 1e-2 + 1e-6 * np.abs(whole).max()
        assert not torch.equal(parameters[bias].detach(), file.before[bias])
        moved = (parameters[bias].detach() - file.before[bias]).abs().numpy()
        assert (moved <= 0.51 * products + 1e-7 * np.abs(values)).all()
    assert any(note.startswith(f"{len(found)} biases were rounded") for note in file.report.notes)
    changed = {k for k, v in file.model.state_dict().items() if not torch.equal(v, file.before[k])}
    assert changed == {name for name, *_ in found}


def test_biases_of_matrix_products_are_integers(files):
    """With a float bias onnxruntime computes a Gemm in float."""
    path = files("8 bits").path
    gemms = [node for name, _, _, node in biases(path) if node.op_type == "Gemm"]
    assert len(gemms) == 2
    made = {node.output[0]: node for node in nodes(path)}
    for node in gemms:
        source = made[node.input[2]]
        assert source.op_type == "DequantizeLinear"
        assert constants(path)[source.input[0]].dtype == np.int32


def test_biases_of_layers_on_floats_stay(files):
    file = files("convolutions")
    assert torch.equal(file.model[0].bias.detach(), file.before["0.bias"])
    assert np.array_equal(constants(file.path)["0.bias"], file.before["0.bias"].numpy())


def test_batchnorms_that_are_left_go_into_steps_and_biases(files):
    """The integers stay those of the model; its norms' biases are what the file says."""
    file = files("batchnorms")
    assert kinds(file.path)["BatchNormalization"] == 0 and norms(file.model) == ["1", "4"]
    assert set(types(file.path).values()) == {"INT4"}
    assert not torch.equal(file.model[4].bias.detach(), file.before["4.bias"])
    assert torch.equal(file.model[1].bias.detach(), file.before["1.bias"])  # behind a layer on floats
    found = [(values, products) for _, values, products, node in biases(file.path) if node.op_type == "Conv"]
    assert len(found) == 1
    values, products = found[0]
    norm = file.model[4]
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    assert_close(values, (file.model[3].bias.double() - norm.running_mean.double()) * gain + norm.bias.double())
    whole = values / products
    assert np.abs(whole - whole.round()).max() < 1e-2 + 1e-6 * np.abs(whole).max()
    value = multiplied(file.path, "3")[0][0]
    np.testing.assert_allclose(value, (file.model[3].weight.double() * gain.view(-1, 1, 1, 1)).detach(), rtol=1e-5)


@pytest.mark.parametrize("affine", [True, False])
def test_batchnorms_of_equal_biases(affine, tmp_path):
    """Zeros, as they begin with, or stay."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.ReLU(),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=affine), nn.ReLU(), nn.Conv2d(4, 4, 1),
    )  # fmt: skip
    model.train()(images(8))
    calibrated(model, images(8), **few(4), first_last=None)
    assert relative(export_onnx(model, images(8), tmp_path / "m.onnx")) < 1e-3


# --- integer kernels --------------------------------------------------------------------------------------------------


def test_a_resnet_is_computed_in_integers(files, tmp_path):
    file = files("resnet")
    session(file.path, optimized=tmp_path / "optimized.onnx")
    found = kinds(tmp_path / "optimized.onnx")
    convolutions_ = sum(isinstance(m, nn.Conv2d) for m in file.model.modules())
    assert found["QLinearConv"] == convolutions_ == 15
    assert found["QLinearAdd"] == 4
    assert found["QGemm"] == 1
    assert not set(found) & {"Conv", "FusedConv", "Add", "Gemm", "MatMul", "Cast", "Mul"}
    assert (file.report.products, file.report.integer_products) == (16, 16)
    assert "in integers there: 16 of 16 convolutions and matrix products" in str(file.report)
    assert not any("computed in float" in note for note in file.report.notes)


def test_gates_and_silus_are_between_integers(files, tmp_path):
    """Every SiLU is one node, and each convolution is one of integers although none is followed by a clipping."""
    file = files("gated")
    session(file.path, optimized=tmp_path / "optimized.onnx")
    found = kinds(tmp_path / "optimized.onnx")
    assert found["QLinearConv"] == sum(isinstance(m, nn.Conv2d) for m in file.model.modules()) > 10
    assert found["QuickGelu"] == sum(isinstance(m, nn.SiLU) for m in file.model.modules()) > 5
    assert found["Sigmoid"] == sum(isinstance(m, nn.Sigmoid) for m in file.model.modules()) > 0
    assert file.report.products == file.report.integer_products
    assert kinds(file.path)["BatchNormalization"] == 0


def test_levels_that_no_sign_can_turn_are_moved(tmp_path):
    """-128 behind a BatchNorm of negative factor, in the model as in the file; only those."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False), nn.BatchNorm2d(3)).eval()
    with torch.no_grad():
        net[2].weight[:, 0] = torch.tensor([-1.28, -1.28, 1.27]).view(-1, 1, 1)
        net[2].weight[:, 1:] *= 0.1
        net[3].weight.copy_(torch.tensor([-1.0, 1.0, -0.5]))
    x = pictures(4, 6, channels=2)
    calibrated(net, x, **few(8), **NO_EDGES)
    with torch.no_grad():
        net[2].parametrizations.weight[0].log2_step.fill_(math.log2(0.01))
    codes = lq.integer_weights(net)["2"].codes.clone()
    report = export_onnx(net, x, tmp_path / "m.onnx")
    assert kinds(tmp_path / "m.onnx")["BatchNormalization"] == 0 and relative(report) < 1e-3
    moved = lq.integer_weights(net)["2"].codes
    assert (moved != codes).sum() == 1 and moved[0, 0] - codes[0, 0] == 1
    assert sum("1 weights of level -128" in note for note in report.notes) == 1
    assert not any("-128" in note for note in export_onnx(net, x, tmp_path / "again.onnx").notes)


def test_without_integer_sums_are_computed_in_floats(tmp_path):
    model, x = of("residual")
    calibrated(model, x, **few(4))
    report = export_onnx(model, x[:2], tmp_path / "m.onnx")
    session(tmp_path / "m.onnx", optimized=tmp_path / "optimized.onnx")
    found = kinds(tmp_path / "optimized.onnx")
    assert found["QLinearAdd"] == 0 and found["Add"] + found["FusedConv"] > 0
    floats = found["Conv"] + found["FusedConv"]
    assert report.products - report.integer_products == floats >= 2
    assert report.products == sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    (note,) = (note for note in report.notes if "computed in float" in note)
    assert note.startswith(f"{floats - 1} convolutions") and "integer=True" in note  # the first has a float input


def test_products_of_a_transformer_are_counted(files):
    """Four layers and two products of attention in each block, the patches (in float) and the head."""
    report = files("vit").report
    blocks = len(files("vit").model.blocks)
    assert (report.products, report.integer_products) == (6 * blocks + 2, 6 * blocks + 1)
    assert "convolutions of integers" not in " ".join(report.notes)


@pytest.mark.parametrize("name", ["2 bits", "vit", "depthwise"])
def test_casts_are_done_when_the_file_is_loaded(name, files, tmp_path):
    session(files(name).path, optimized=tmp_path / "optimized.onnx")
    found = kinds(tmp_path / "optimized.onnx")
    assert found["Cast"] == 0
    if name != "2 bits":  # a Min stands before its convolutions, and nobody quantizes their results
        assert found["QLinearConv"] + found["MatMulIntegerToFloat"] > 1


# --- the same again ---------------------------------------------------------------------------------------------------


def test_a_second_export_gives_the_same_bytes(files, tmp_path):
    """And rounds no bias once more; of an example of one sample, that is not checked."""
    file = files("convolutions")
    before = state(file.model)
    report = export_onnx(file.model, file.x[:1], tmp_path / "m.onnx", check=[])
    assert (tmp_path / "m.onnx").read_bytes() == file.path.read_bytes()
    assert_same(state(file.model), before)
    assert not any("biases" in note for note in report.notes)
    assert report.samples == 0
    assert report.largest_difference is report.largest_output is report.agreement is None
    assert report.products is report.integer_products is None
    assert "onnxruntime" not in str(report)


def test_a_packed_file_gives_the_same_bytes(files, tmp_path):
    """Saved before the export, and loaded into a network of other weights."""
    build, options, _ = FILES["convolutions"]
    model, x = build()
    calibrated(model, x, **options)
    lq.save(model, tmp_path / "m.safetensors")
    loaded = lq.load(tmp_path / "m.safetensors", convolutions(seed=5))
    export_onnx(loaded.eval(), x[:2], tmp_path / "m.onnx", check=False)
    assert (tmp_path / "m.onnx").read_bytes() == files("convolutions").path.read_bytes()


def test_the_model_stays_as_it_is_but_for_biases(files):
    model = calibrated(convolutions(), images(8), **FILES["convolutions"][1])
    assert hooks(files("convolutions").model) == hooks(model)
    for training in (True, False):
        fresh = calibrated(convolutions(), images(8), **FILES["convolutions"][1]).train(training)
        with pytest.raises(DataError):
            export_onnx(fresh, torch.randn(2, 2, 6, 6), "/nowhere/m.onnx")
        assert fresh.training is training and list(fresh.state_dict()) == list(model.state_dict())


def test_a_model_in_training_mode_and_half_precision(tmp_path):
    """The check runs in eval mode, the model goes on training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 4)).half()
    x = torch.randn(8, 8).half()
    calibrated(model, x, **few(4), first_last=None)
    report = export_onnx(model.train(), x, tmp_path / "m.onnx")
    assert model.training and relative(report) < 2e-3  # half a unit in the last place of float16, and some
    assert run(tmp_path / "m.onnx", x)[0].dtype == np.float16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_types_that_engines_lack_are_exported_in_float32(dtype, tmp_path):
    """With the integers of the model, and as near to it as its own type rounds."""
    model, x = example("encoder")
    model, x = model.to(dtype), x.to(dtype)
    calibrated(model, x, **few(4), first_last=None)
    expected, path = model(x).detach().double().numpy(), tmp_path / "m.onnx"
    report = export_onnx(model, x, path)
    assert {p.dtype for p in model.parameters() if p.ndim > 1} == {dtype}
    assert f"the file computes in float32, where the model does in {str(dtype)[6:]}" in report.notes
    found = run(path, x.float())[0]
    assert found.dtype == np.float32 and report.samples == len(x)
    bound = 0.2 if dtype == torch.bfloat16 else 0.05  # eight bits, of activations of few levels
    assert np.abs(found - expected).max() < bound * np.abs(expected).max()
    assert {k for n, k in types(path).items() if "linear1" in n or n.endswith("_weight")} == {"INT4"}


class ByKernels(nn.Module):
    """A kernel for each sample, of a bank of kernels: dynamic convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.route, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 2), nn.Linear(6, 3)
        self.bank = nn.Parameter(torch.randn(2, 6 * 4 * 9) / 5)

    def forward(self, x):
        x = self.stem(x).relu()
        samples, channels, *size = x.shape
        kernels = (self.route(x.mean((2, 3))).softmax(-1) @ self.bank).view(samples * 6, 4, 3, 3)
        x = nn.functional.conv2d(x.reshape(1, samples * channels, *size), kernels, padding=1, groups=samples)
        return self.head(x.view(samples, 6, *size).relu().mean((2, 3)))


def test_kernels_of_each_sample_have_the_batch_size_of_the_example(tmp_path):
    """ONNX's convolutions have a fixed number of groups; that is said, and larger batches are compared in pieces."""
    torch.manual_seed(0)
    model, x = ByKernels().eval(), torch.randn(8, 3, 6, 6)
    calibrated(model, x, **few(8), first_last=None)
    refused = exported(standard_form(model), x[:3])[1]  # older torch makes no program for any number of samples
    reason = refused or "a convolution has a group for each sample"
    report = export_onnx(model, x[:3], tmp_path / "m.onnx", check=[x])
    assert f"the batch size is fixed: {reason}; it is the example's, 3 (example=)" in report.notes
    assert report.samples == 6 and relative(report) < 0.02
    assert types(tmp_path / "m.onnx")["matmul_0_right_weight"] == "INT8"


# --- examples and checks ----------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two tensors of the same shape, which are no equals."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, other, scale=1.0):
        x = self.fc(x - 3 * other)
        return {"logits": x * scale, "sum": x.sum(1)}


def two():
    torch.manual_seed(0)
    x, other = torch.randn(3, 4), torch.randn(3, 4)
    model = lq.attach(Two(), 8, 8, first_last=None)
    return lq.calibrate(model, [(x, other)], forward=lambda m, b: m(*b)).eval(), x, other


def test_inputs_by_name_in_any_order_and_several_outputs(tmp_path):
    model, x, other = two()
    check = [{"other": other, "x": x}, {"x": -x, "other": other}]
    report = export_onnx(model, check[0], tmp_path / "m.onnx", check=check)
    assert report.samples == 6 and relative(report) < 1e-5
    assert {value.name for value in onnx.load(tmp_path / "m.onnx").graph.input} == {"x", "other"}
    found = session(tmp_path / "m.onnx").run(None, {"x": x.numpy(), "other": other.numpy()})
    expected = model(x, other)
    assert_close(found[0], expected["logits"]), assert_close(found[1], expected["sum"])


def test_inputs_by_name_beside_a_number(tmp_path):
    model, x, other = two()
    check = [{"other": other, "x": x, "scale": 2.0}, {"x": -x, "other": other, "scale": 2.0}]
    assert relative(export_onnx(model, check[0], tmp_path / "m.onnx", check=check)) < 1e-5


def test_differences_are_found(files, tmp_path, monkeypatch):
    """Batches that are compared are run: a model of other outputs differs by as much."""
    file = files("convolutions")
    real = onnxruntime.InferenceSession

    class Off(real):
        def run(self, *args, **kwargs):
            outputs = super().run(*args, **kwargs)
            outputs[0][0] = np.roll(outputs[0][0], 1) + 0.5
            return outputs

    monkeypatch.setattr(onnxruntime, "InferenceSession", Off)
    batches = (file.x[i : i + 2] for i in range(0, 8, 2))
    report = export_onnx(file.model, file.x[:2], tmp_path / "m.onnx", check=batches)
    assert report.samples == 8 and report.largest_difference >= 0.5
    assert report.agreement < 1
    assert f"same top-1 on {100 * report.agreement:.2f} %" in str(report)


def test_residual_sums_in_the_outermost_forward(tmp_path):
    torch.manual_seed(0)
    model = calibrated(nudged(Residual()), pictures(), **few(4), integer=True)
    report = export_onnx(model, pictures(1), tmp_path / "m.onnx", check=[pictures(1), pictures(5)])
    assert report.samples == 6 and relative(report) < 1e-3
    assert dynamic(tmp_path / "m.onnx") and not any("fixed" in note for note in report.notes)


def test_transposed_convolutions_in_groups(tmp_path):
    """No operator knows their channels: weights are floats. onnxruntime may round them to one step."""
    model, x = upwards(groups=2)
    calibrated(model, x, **few(4))
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert report.weights == {"int8": 116, "int4": 96}
    assert stored_name(tmp_path / "m.onnx", "4") is None
    assert_close(run(tmp_path / "m.onnx", x, plain=True)[0], model(x))


def test_a_fixed_batch_size_is_noted(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = lq.calibrate(lq.attach(Pairs(), 4, 8, first_last=None), [x]).eval()
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert not dynamic(tmp_path / "m.onnx") and relative(report) < 1e-5
    assert report.notes[0].startswith("the batch size is fixed: ")


def test_weights_alone_in_onnxruntime_as_it_is_written(tmp_path):
    """Its own optimizations round the input of such products to 8 bits, for which no file is to blame."""
    torch.manual_seed(0)
    model, x = nudged(Block()).eval(), torch.randn(4, 5, 8)
    calibrated(model, x, weights=weights(4), activations=None)
    export_onnx(model, x, tmp_path / "m.onnx")
    assert_close(run(tmp_path / "m.onnx", x, plain=True)[0], model(x), 1e-6)


def test_float_weights_beside_quantized_activations(tmp_path):
    """Which onnxruntime rounds by itself."""
    model, x = of("residual")
    calibrated(model, x, weights=None, activations=activations(8), integer=True)
    report = export_onnx(model, x, tmp_path / "m.onnx")
    assert_close(run(tmp_path / "m.onnx", x, plain=True)[0], model(x))
    assert relative(report) < 1e-3 or any("float" in note for note in report.notes)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [13, 20])
def test_an_opset_without_small_types(opset, tmp_path):
    message = rf"^opset={opset}: types of 4 bits need 21 or more, those of 2 bits 25; .* would be stored in 8 bits"
    with pytest.raises(DataError, match=message):
        export_onnx(quantized(), images(), tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_two_bits_where_onnxruntime_cannot_read_them(tmp_path, monkeypatch):
    monkeypatch.setattr("lq.export.onnx.can_read", lambda opset: opset < 25)
    model = calibrated(convolutions(), images(8), **few(2))
    report = export_onnx(model, images(), tmp_path / "m.onnx")
    assert report.opset == 21 and "int4" in report.weights and "int2" not in report.weights, report.weights
    assert "weights of 2 bits are stored in 4: this onnxruntime cannot read opset 25" in report.notes
    assert not any("2 bits" in note for note in export_onnx(quantized(), images(), tmp_path / "m.onnx").notes)


def test_which_opsets_onnxruntime_reads():
    assert can_read(17) and not can_read(99)


@pytest.mark.parametrize("opset", [0, 9, 12])
def test_an_opset_without_steps_for_channels(opset, tmp_path):
    with pytest.raises(DataError, match=rf"^opset={opset}: steps for each channel need 13 or more$"):
        export_onnx(quantized(), images(), tmp_path / "m.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_an_opset_that_there_is_not(tmp_path):
    model = calibrated(convolutions(), images(8), **few(8))
    with pytest.raises(DataError, match=r"^opset=99: the newest that this version of onnx knows is \d\d$"):
        export_onnx(model, images(), tmp_path / "m.onnx", opset=99)
    assert not list(tmp_path.iterdir())


class Bessel(nn.Sequential):
    """A function that ONNX does not have."""

    def forward(self, x):
        return torch.special.bessel_j0(super().forward(x))


def test_functions_that_onnx_does_not_have(tmp_path):
    model = calibrated(Bessel(nn.Linear(4, 3)), torch.randn(3, 4), **few(4))
    with pytest.raises(DataError, match="^torch.onnx cannot export Bessel: "):
        export_onnx(model, torch.randn(3, 4), tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (small, StateError, "^export needs a model with quantizers, Sequential has none"),
        (lambda: lq.attach(small(), 4, 8), StateError, "has no range yet: run lq.calibrate"),
    ],
    ids=["float", "not calibrated"],
)
def test_models_that_are_not_ready(model, error, message, tmp_path):
    with pytest.raises(error, match=message):
        export_onnx(model(), images(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    message = rf"^ONNX export needs {package}; pip install 'lq-lightning\[export\]'$"
    with pytest.raises(StateError, match=message):
        export_onnx(quantized(), images(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime_nothing_is_compared(files, tmp_path, monkeypatch):
    file = files("convolutions")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    report = export_onnx(file.model, file.x[:2], tmp_path / "m.onnx")
    assert report.samples == 0 and report.largest_difference is None
    assert "not compared: onnxruntime is not installed" in report.notes
    assert (tmp_path / "m.onnx").read_bytes() == file.path.read_bytes()


def test_a_file_that_onnxruntime_does_not_run_is_not_written(tmp_path, monkeypatch):
    """And the model stays as it is."""

    def fail(*args, **kwargs):
        raise RuntimeError("no kernel for that")

    model = calibrated(convolutions(), images(8), **FILES["convolutions"][1])
    before = state(model)
    (tmp_path / "m.onnx").write_bytes(b"old")
    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    message = "^onnxruntime cannot run the exported Sequential: no kernel for that$"
    with pytest.raises(DataError, match=message):
        export_onnx(model, images(), tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert_same(state(model), before)


def test_unpacking_by_hand():
    """The tests' own reading of small types is onnx's."""
    rng = np.random.default_rng(0)
    for kind, low, high in (("INT2", -2, 1), ("UINT2", 0, 3), ("INT4", -8, 7), ("UINT4", 0, 15), ("INT8", -128, 127)):
        values = rng.integers(low, high + 1, (3, 5))
        made = helper.make_tensor("w", getattr(TensorProto, kind), (3, 5), values.flatten().tolist())
        tensor = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(made), "w")
        assert np.array_equal(unpacked(tensor), values)


def test_threads_export_one_after_the_other(tmp_path):
    model, errors = quantized(weights=8, activations=8), []

    def write(name):
        try:
            if name.endswith("onnx"):
                lq.export_onnx(model, images(2), tmp_path / name)
            else:
                lq.export_program(model, images(2), tmp_path / name)
        except Exception as error:  # noqa: BLE001  (told below)
            errors.append(error)

    threads = [threading.Thread(target=write, args=(name,)) for name in ["m.onnx", "m.pt2"] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.pt2", "m.report.json"]
    program = torch.export.load(tmp_path / "m.pt2").module()
    assert torch.equal(program(images(2)), model(images(2)))


@pytest.mark.parametrize(
    ("options", "listed"),
    [
        ({"activations": None}, "inputs of 0, 2 are float"),
        ({"activations": 8}, "inputs of 0 are float"),
        ({"activations": 8, "integer": True}, None),
    ],
)
def test_float_inputs_of_integer_weights_are_told(options, listed, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(32, 6, 16)
    lq.attach(model, 8, structure=lq.inspect(model, x), first_last=None, **options)
    report = export_onnx(lq.calibrate(model, [x]), x, tmp_path / "m.onnx")
    found = [note.split(":")[0] for note in report.notes if note.startswith("inputs of")]
    assert found == ([] if listed is None else [listed])
    if listed is None:  # nothing is left for onnxruntime to round
        assert report.largest_difference < 1e-5

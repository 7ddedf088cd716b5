"""ONNX files: what is in every one of them, and what onnxruntime makes of them.

Numbers of a file and of its model differ by the order of float sums. Where that lets a value fall on the other side of
a rounding, an activation moves by a step: a matter of chance, one in some 100 000 values, so seeds are fixed, models
are tiny, and outputs are compared up to a thousandth. Errors of a grid are ten times larger.
"""

import json
import threading
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import lq
from lq.attachment.sites import activation_quantizers
from lq.errors import DataError
from lq.export import export_onnx
from tests.attachment.networks import images, quantized
from tests.attachment.test_folding import norms
from tests.export.exported import (
    assert_close,
    calibrated,
    constants,
    dynamic,
    known,
    limits_of_codes,
    multiplied,
    nodes,
    relative,
    run,
    stored,
    stored_name,
    types,
)
from tests.export.nets import FILES, OF_TORCH, convolutions, every_file
from tests.helpers import assert_same, hooks
from tests.models import state

pytestmark = OF_TORCH


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

"""lq show and lq export: what they show, what they write, and how they fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import timm
import torch
from torch import nn

import lq
import lq.cli
from lq.cli import main
from tests.attachment.test_folding import randomize
from tests.export.exported import assert_close, run

ROOT = Path(__file__).parents[2]


def build(width=8, outputs=3, bias=True):
    """A network for --model."""
    return nn.Sequential(nn.Linear(4, width, bias=bias), nn.ReLU(), nn.Linear(width, outputs))


def no_module():
    return {"weight": 1}


def fails(error):
    raise {"value": ValueError, "key": KeyError, "runtime": RuntimeError}[error]("out of order")


HERE = f"{__name__}:build"


def quantized(seed=0, **options):
    torch.manual_seed(seed)
    model = build()
    lq.attach(model, 4, 8, first_last=None, **options)
    return lq.calibrate(model, [torch.randn(16, 4)]).eval()


@pytest.fixture
def packed(tmp_path):
    lq.save(quantized(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


def call(*arguments):
    return main([str(argument) for argument in arguments])


def succeeds(capsys, *arguments):
    """What it prints."""
    capsys.readouterr()
    assert call(*arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def complains(capsys, *arguments):
    """What it says in its last line on stderr; nothing on stdout."""
    capsys.readouterr()
    assert call(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.strip().splitlines()[-1]


def rows(samples=5):
    return torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))


# --- show -------------------------------------------------------------------------------------------------------------


def test_show(packed, capsys):
    lines = succeeds(capsys, "show", packed).splitlines()
    model = quantized()
    assert lines == [
        f"{packed}: {packed.stat().st_size} bytes",
        "2 quantized weights, 28 bytes: 56 of 4 bits",
        "1 ranges of activations",
        "2 tensors that are not quantized, 44 bytes",
        f"{len(model.state_dict())} entries in the state dict",
    ]


def test_show_counts_weights_by_width(tmp_path, capsys):
    model = quantized()
    lq.set_bits(model, {"0": [0, 1, 2, 2, 4, 4, 8, 8], "2": 3})
    lq.save(model, tmp_path / "m.safetensors")
    shown = succeeds(capsys, "show", tmp_path / "m.safetensors")
    assert " bytes: 4 of 1 bits, 8 of 2 bits, 24 of 3 bits, 8 of 4 bits, 8 of 8 bits\n" in shown  # the pruned are gone
    size = int(re.search(r"2 quantized weights, (\d+) bytes", shown)[1])
    assert 0 <= size - (4 * 1 + 8 * 2 + 24 * 3 + 8 * 4 + 8 * 8) / 8 < 6  # each width fills whole bytes


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.safetensors", "lq show: there is no file "),
        ("m.ckpt", "lq show: .* should end in '.safetensors'"),
        ("garbage.safetensors", "lq show: .*garbage.safetensors cannot be loaded: "),
        (".", "lq show: .* should end in '.safetensors'"),
    ],
)
def test_show_of_other_files(name, message, packed, capsys):
    (packed.parent / "m.ckpt").write_bytes(b"checkpoint")
    (packed.parent / "garbage.safetensors").write_bytes(b"garbage" * 20)
    assert re.match(message, complains(capsys, "show", packed.parent / name))


def test_a_damaged_file(packed, capsys):
    content = bytearray(packed.read_bytes())
    content[-30] ^= 1
    packed.write_bytes(content)
    assert "cannot be loaded" in complains(capsys, "show", packed)
    wanted = ("export", packed, "--model", HERE, "--output", packed.with_name("o.safetensors"))
    assert "cannot be loaded" in complains(capsys, *wanted)


# --- export -----------------------------------------------------------------------------------------------------------


def sources(folder):
    """The model as a packed file, a state dict and a checkpoint."""
    model = quantized()
    lq.save(model, folder / "m.safetensors")
    torch.save(model.state_dict(), folder / "m.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "m.ckpt")
    return [folder / name for name in ("m.safetensors", "m.pt", "m.ckpt")]


@torch.no_grad()
def test_packed_files_from_all_sources(tmp_path, capsys):
    expected = quantized()(rows())
    for source in sources(tmp_path):
        output = tmp_path / "o.safetensors"
        shown = succeeds(capsys, "export", source, "--model", HERE, "--output", output)
        assert shown == f"{output}: 0.00 MB\n"
        assert torch.equal(lq.load(output, build()).eval()(rows()), expected)
        output.unlink()


@torch.no_grad()
def test_programs(tmp_path, capsys):
    source, output = sources(tmp_path)[2], tmp_path / "o.pt2"
    shown = succeeds(capsys, "export", source, "--model", HERE, "--input-size", 4, "--output", output)
    assert shown == f"{output}: {output.stat().st_size / 1e6:.2f} MB\n"
    assert torch.equal(torch.export.load(output).module()(rows()), quantized()(rows()))


@torch.no_grad()
def test_onnx_files(packed, capsys):
    output = packed.with_name("o.onnx")
    wanted = ("--model", HERE, "--input-size", 4, "--output", output, "--opset", 22)
    shown = succeeds(capsys, "export", packed, *wanted).splitlines()
    assert re.match(rf"{output}: 0.00 MB, opset 22, weights: 56 int4$", shown[0])
    assert re.match(r"onnxruntime on 2 samples: outputs differ by up to .*, same top-1 on 100.00 %$", shown[1])
    assert onnx.load(output).opset_import[0].version == 22
    assert_close(run(output, rows())[0], quantized()(rows()), 1e-3)
    assert output.with_name("o.report.json").is_file()


@torch.no_grad()
def test_timm_models_say_what_they_take(tmp_path, capsys):
    """Of as many channels as their first convolution reads; other sizes can be given."""
    options = {"num_classes": 5, "in_chans": 1, "img_size": 32, "depth": 1}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **options)
    x = torch.randn(2, 1, 32, 32)
    lq.calibrate(lq.attach(model, 4, 8, structure=lq.inspect(model, x)), [x]).eval()
    source, output = tmp_path / "m.safetensors", tmp_path / "o.pt2"
    lq.save(model, source)
    given = [f"{key}={value}" for key, value in options.items()]
    wanted = ("export", source, "--model", "vit_tiny_patch16_224", "--output", output, "--model-args", *given)
    succeeds(capsys, *wanted, "--input-size", 1, 32, 32)
    found = torch.export.load(output).module()
    assert torch.equal(found(x), model(x))
    assert "torch.export cannot export VisionTransformer: " in complains(capsys, *wanted)  # made for 3 x 224 x 224


def test_the_size_of_a_timm_model(tmp_path, capsys):
    torch.manual_seed(0)
    model = randomize(timm.create_model("test_resnet", num_classes=5, in_chans=2)).eval()
    lq.fold_batchnorm(model)
    lq.calibrate(lq.attach(model, 4, 8), [torch.randn(2, 2, 32, 32)]).eval()
    lq.save(model, tmp_path / "m.safetensors")
    wanted = ("--model", "test_resnet", "--model-args", "num_classes=5", "in_chans=2")
    succeeds(capsys, "export", tmp_path / "m.safetensors", *wanted, "--output", tmp_path / "o.pt2")
    x = torch.randn(3, 2, 160, 160)
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "o.pt2").module()(x), model(x))


def test_arguments_of_the_model_are_yaml(tmp_path, capsys):
    torch.manual_seed(0)
    model = lq.attach(build(width=6, bias=False), 4)
    lq.save(model, tmp_path / "m.safetensors")
    output, given = tmp_path / "o.safetensors", ["width=6", "bias=false"]
    succeeds(capsys, "export", tmp_path / "m.safetensors", "--model", HERE, "--model-args", *given, "--output", output)
    assert output.read_bytes() == (tmp_path / "m.safetensors").read_bytes()
    assert torch.equal(lq.load(output, build(6, 3, False)).eval()(rows()), model.eval()(rows()))


class Holder(nn.Module):
    """What holds the network under a name."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


@torch.no_grad()
def test_a_checkpoint_of_a_module_that_holds_the_network(tmp_path, capsys):
    """Lightning's: the network in an attribute, what the module was made with, and a loss with weights."""
    holder = Holder(loss=nn.CrossEntropyLoss(torch.ones(3)), net=quantized())
    content = {"state_dict": holder.state_dict(), "hyper_parameters": {"lr": 0.1}, "epoch": 3}
    torch.save(content, tmp_path / "m.ckpt")
    output = tmp_path / "o.safetensors"
    shown = succeeds(capsys, "export", tmp_path / "m.ckpt", "--model", HERE, "--output", output)
    assert shown == f"{tmp_path / 'm.ckpt'}: took its part 'net'\n{output}: 0.00 MB\n"
    assert torch.equal(lq.load(output, build()).eval()(rows()), quantized()(rows()))


@torch.no_grad()
def test_one_of_several_parts(tmp_path, capsys):
    holder = Holder(student=quantized(1), teacher=quantized(2))
    torch.save(holder.state_dict(), tmp_path / "m.pt")
    wanted = ("export", tmp_path / "m.pt", "--model", HERE, "--output", tmp_path / "o.safetensors")
    message = "m.pt: several parts of the checkpoint fit Sequential: 'student' and 'teacher'; choose one by --part"
    assert complains(capsys, *wanted).endswith(message)
    assert not (tmp_path / "o.safetensors").exists()
    assert "took its part 'teacher'" in succeeds(capsys, *wanted, "--part", "teacher")
    assert torch.equal(lq.load(tmp_path / "o.safetensors", build()).eval()(rows()), quantized(2)(rows()))
    assert "has no part 'both'; it has student, teacher" in complains(capsys, *wanted, "--part", "both")


# --- errors -----------------------------------------------------------------------------------------------------------

OTHER = {
    "another ending": (["--output", "o.txt"], "--output o.txt: the name should end in one of .onnx, .pt2, .safetenso"),
    "no ending": (["--output", "onnx"], "--output onnx: the name should end in one of"),
    "no size": (["--output", "o.onnx"], "--model .*:build does not say what it takes; give --input-size, such as 3"),
    "no folder": (["--output", "none/o.safetensors"], "there is no folder none"),
    "another model": (["--model-args", "width=9"], ".* is not of this Sequential: .*0.weight is .8, 4. there and .9"),
    "another network": (["--model", "test_resnet"], ".*is not of this ResNet: it has no conv1.0.weight"),
    "unknown model": (["--model", "resnet1818"], r"--model resnet1818: Unknown model \(resnet1818\); give the name of"),
    "no such module": (["--model", "no_such_module:build"], "--model no_such_module:build: No module named"),
    "no such function": (["--model", f"{__name__}:built"], ".*has no attribute 'built'; give the name of a timm model"),
    "no module": (["--model", f"{__name__}:no_module"], "--model .*:no_module gives a dict, not a torch module"),
    "wrong argument": (["--model-args", "depth=9"], ".*unexpected keyword argument 'depth'; give the name of a timm"),
    "no argument": (["--model-args", "width"], "--model-args width: expected KEY=VALUE"),
    "a model that fails": (["--model", f"{__name__}:fails", "--model-args", "error=runtime"], ".*out of order"),
    "an old opset": (
        ["--output", "o.onnx", "--input-size", "4", "--opset", "9"],
        "opset=9: steps for each channel need 13",
    ),
    "no length": (["--output", "o.pt2", "--input-size", "0"], "--input-size 0: expected numbers from 1 on, such as 3"),
    "a size that no memory has": (
        ["--output", "o.pt2", "--input-size", "3", "1000000000", "1000000000"],
        "--input-size 3 1000000000 1000000000: two samples do not fit into memory",
    ),
    "another size": (["--output", "o.pt2", "--input-size", "5"], "torch.export cannot export Sequential: "),
}


@pytest.mark.parametrize("kind", OTHER)
def test_errors_are_told_in_a_line(kind, packed, capsys, monkeypatch):
    arguments, message = OTHER[kind]
    monkeypatch.chdir(packed.parent)
    wanted = ["export", packed, "--model", HERE, "--output", "o.safetensors", *arguments]
    assert re.match(f"lq export: {message}", complains(capsys, *wanted))
    assert [p.name for p in packed.parent.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: build().state_dict(), "lq export: .*m.ckpt: the checkpoint has no quantizers: it is a float one"),
        (lambda: [1, 2], "lq export: .*m.ckpt: expected a state dict or a checkpoint with one, got a list"),
        (None, "lq export: there is no file .*m.ckpt"),
    ],
    ids=["float", "a list", "missing"],
)
def test_other_checkpoints(content, message, tmp_path, capsys):
    source = tmp_path / "m.ckpt"
    if content is not None:
        torch.save(content(), source)
    wanted = ("export", source, "--model", HERE, "--output", tmp_path / "o.safetensors")
    assert re.match(message, complains(capsys, *wanted))


STRANGE = {
    "garbage": (["--model", HERE], b"garbage" * 20),
    "yaml": (["--model", HERE, "--model-args", "width=[9"], None),
    "a value error": (["--model", f"{__name__}:fails", "--model-args", "error=value"], None),
    "a key error": (["--model", f"{__name__}:fails", "--model-args", "error=key"], None),
    "an empty name": (["--model", ":build"], None),
    "a negative size": (["--model", HERE, "--output", "o.pt2", "--input-size", "-1"], None),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_errors_of_other_kinds(kind, tmp_path, capsys, monkeypatch):
    arguments, content = STRANGE[kind]
    monkeypatch.chdir(tmp_path)
    source = sources(tmp_path)[2]
    if content is not None:
        source.write_bytes(content)
    assert complains(capsys, "export", source, "--output", "o.safetensors", *arguments).startswith("lq export: ")


def test_weights_of_another_size_in_a_checkpoint(tmp_path, capsys):
    source = sources(tmp_path)[1]
    wanted = ("export", source, "--model", HERE, "--output", tmp_path / "o.safetensors", "--model-args", "outputs=4")
    assert complains(capsys, *wanted).startswith("lq export: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["convert"], "invalid choice: 'convert'"),
        (["show"], "the following arguments are required: source"),
        (["export", "m.safetensors"], "the following arguments are required: --model, --output"),
        (["export", "m.safetensors", "--model", "a:b", "--output", "o.onnx", "--input-size", "x"], "invalid int value"),
        (["export", "m.safetensors", "--model", "a:b", "--output", "o.onnx", "--check"], "unrecognized arguments"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["--help", "show --help", "export --help"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("usage: lq")


# --- as a program -----------------------------------------------------------------------------------------------------


def start(*arguments, folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False
    )


NETS = """from torch import nn

def build(width):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
"""
WANTED = ("export", "m.safetensors", "--model", "nets:build", "--output", "o.safetensors", "--model-args")
CODE = """import sys, lq.cli
assert lq.cli.main(sys.argv[1:]) == 0
print(*sorted({"lightning", "pytorch_lightning", "onnx", "onnxruntime", "timm"} & set(sys.modules)))
"""


def test_packed_files_need_neither_lightning_nor_onnx(packed):
    (packed.parent / "nets.py").write_text(NETS)
    done = start("-c", CODE, *WANTED, "width=8", folder=packed.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "o.safetensors: 0.00 MB\n\n", "")
    assert packed.with_name("o.safetensors").read_bytes() == packed.read_bytes()


def test_a_model_beside_you(packed):
    """The script that pip installs has its own folder first, not the one it runs in."""
    (packed.parent / "nets.py").write_text(NETS)
    script = packed.parent / "bin" / "lq"
    script.parent.mkdir()
    script.write_text("import sys\nfrom lq.cli import main\nsys.exit(main())\n")
    done = start(str(script), *WANTED, "width=8", folder=packed.parent)
    assert (done.returncode, done.stdout, done.stderr) == (0, "o.safetensors: 0.00 MB\n", "")


def test_as_a_program(packed):
    (packed.parent / "nets.py").write_text(NETS)
    done = start("-m", "lq.cli", *WANTED, "width=9", folder=packed.parent)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("lq export: m.safetensors is not of this Sequential: ")
    assert "Traceback" not in done.stderr and done.stderr.count("\n") == 1


def test_it_is_the_command_of_the_package():
    assert '[project.scripts]\nlq = "lq.cli:main"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert callable(lq.cli.main)


def test_onnx_files_for_an_engine(packed, tmp_path, capsys):
    out = tmp_path / "m.onnx"
    names = ("--input-names", "features", "--output-names", "scores")
    arguments = ("--model", HERE, "--input-size", "4", "--output", out, "--target", "openvino", "--dynamic", *names)
    succeeds(capsys, "export", packed, *arguments)
    graph = onnx.load(out).graph
    assert [value.name for value in (*graph.input, *graph.output)] == ["features", "scores"]
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [2, 4]  # nothing is free
    said = complains(capsys, "export", packed, *arguments[:-1], "scores", "--target", "tensorrt")
    assert said.startswith("lq export: target='tensorrt' does not run this network: ")


@pytest.mark.parametrize(
    ("option", "value"), [("--target", "openvino"), ("--dynamic", "batch"), ("--input-names", "x"), ("--opset", "17")]
)
def test_options_of_onnx_for_other_files(option, value, packed, tmp_path, capsys):
    out = tmp_path / "m.pt2"
    said = complains(capsys, "export", packed, "--model", HERE, "--input-size", "4", "--output", out, option, value)
    assert said == f"lq export: {option} is for files ending in .onnx, not --output {out}"

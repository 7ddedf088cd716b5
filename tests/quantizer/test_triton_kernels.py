"""The kernels of a GPU without one: run by Triton's interpreter, compiled ahead for GPUs, and left alone elsewhere."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import lq
from lq.quantizer import kernels
from lq.quantizer.functional import fake_quantize
from lq.quantizer.places import Places

ROOT = Path(__file__).parents[2]


def interpreted(*tests):
    """Run tests in a process where Triton's interpreter runs the kernels; returns how often it did."""
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch's wheels for GPUs")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:anyio",  # whose version in the oldest environment warns, and warnings are errors
        "-p",
        "tests.quantizer.interpreted",
    ]
    command += ["-W", "ignore:Conversion of an array with ndim > 0:DeprecationWarning"]  # of triton's older versions
    done = subprocess.run([*command, *tests], cwd=ROOT, capture_output=True, text=True, timeout=550, check=False)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stdout:
        pytest.skip("this version of triton has an interpreter that does not go with this version of numpy")
    assert done.returncode == 0, done.stdout[-5000:]
    return [int(number) for number in re.findall(r"fused: (\d+) roundings, (\d+) gradients", done.stdout)[0]]


def test_interpreted_kernels_give_what_operations_give():
    roundings, gradients = interpreted("tests/quantizer/fused.py")
    assert roundings > 190 and gradients > 800


@pytest.mark.parametrize(
    ("tests", "least"),
    [
        (["tests/quantizer/test_functional.py"], (250, 200)),
        (
            ["tests/quantizer/estimators", "tests/quantizer/test_kept_values.py", "-k", "not mean_and_variance"],
            (150, 100),
        ),
    ],
    ids=["functional", "estimators"],
)
def test_the_tests_of_the_reference_pass_with_interpreted_kernels(tests, least):
    """Against the scalar loops over the formulas of papers."""
    assert all(found >= wanted for found, wanted in zip(interpreted(*tests), least, strict=True))


# --- compiled for GPUs ------------------------------------------------------------------------------------------------

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


class Launched:
    """Stands in for a kernel, and takes what it would be launched with."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        self.grid = grid
        return self.launch

    def launch(self, *args, enable_fp_fusion, **constants):
        self.values = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
        assert list(self.values) == self.kernel.arg_names
        assert enable_fp_fusion is False

    def compiled(self, architecture):
        """What would be loaded onto a GPU."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature, constants, known = {}, {}, {}
        for place, (name, value) in enumerate(self.values.items()):
            if name.isupper() or (isinstance(value, int) and value == 1):  # as launching does with ones
                signature[name], constants[place,] = "constexpr", value
            else:
                kinds = {int: "i32", float: "fp32"}
                signature[name] = POINTERS[value.dtype] if isinstance(value, torch.Tensor) else kinds[type(value)]
                if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
                    known[place,] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, known)
        return triton.compile(source, GPUTarget("cuda", architecture, 32), {"enable_fp_fusion": False}).asm


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """The launching functions, on tensors without memory, and their kernels stood in for."""
    pytest.importorskip("triton", reason="triton is not installed: it comes with torch's wheels for GPUs")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
    from lq.quantizer import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_of", lambda _: nullcontext())
    for name in ("round_kernel", "gradients_kernel"):
        monkeypatch.setattr(triton_kernels, name, Launched(getattr(triton_kernels, name)))
    return triton_kernels


KINDS = {
    "tensor": ((64, 320), (1,), 1, False),
    "tensor, kept": ((64, 320), (1,), 1, True),
    "channels": ((64, 320), (64,), 1, False),
    "channels along the last": ((320, 64), (64,), 320, False),
}


@pytest.mark.parametrize("architecture", [75, 80, 90])
@pytest.mark.parametrize("dtype", POINTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_compile_ahead(launched, kind, dtype, architecture):
    shape, steps, outer, keeps = KINDS[kind]
    x, step = torch.empty(shape, dtype=dtype, device="meta"), torch.empty(steps, device="meta")
    kept = torch.empty(shape, device="meta") if keeps else None
    places = Places(outer, steps[0], x.numel() // outer // steps[0])
    bounds = (-8.0, 7.0, 0.0) if outer == 1 else (torch.empty((), device="meta"), step, step)
    launched.round_values(x, step, *bounds, kept, places)
    rounding = launched.round_kernel.compiled(architecture)
    options = {"sums": True, "to_bounds": outer > 1, "squares": keeps, "weight": 0.1 if keeps else None}
    out, sums = launched.gradients(x, x, step, bounds, kept, places, **options)
    gradients = launched.gradients_kernel.compiled(architecture)
    assert out.shape == x.shape and sums.shape == (1 + 2 * (outer > 1) + keeps, *steps)
    for assembly in (rounding, gradients):
        assert len(assembly["cubin"]) > 1000
        assert f".target sm_{architecture}" in assembly["ptx"]
        assert "div.rn.f32" in assembly["ptx"] and "fma" not in assembly["ptx"]  # rounded as torch's operations are
        assert ".v4.b32" in assembly["ptx"] or ".v2.b32" in assembly["ptx"]  # neighbours are read in one go
    if dtype != torch.float32 and architecture >= 80:
        short = "bf16" if dtype == torch.bfloat16 else "f16"
        assert f"cvt.rn.{short}" in rounding["ptx"]


def test_every_value_has_a_program(launched):
    """Programs and tiles cover all values of all channels, and no program has nothing to do but the last of a row."""
    for outer, channels, inner in [(1, 1, 1), (1, 1, 10**6), (1, 512, 4608), (1, 960, 9), (768, 3072, 1), (7, 5, 3)]:
        places = Places(outer, channels, inner)
        x = torch.empty(outer * channels * inner, device="meta")
        step = torch.empty(channels, device="meta")
        across, along = launched.tiles(places)
        assert across * along <= 1024
        launched.round_values(x, step, -8.0, 7.0, 0.0, None, places)
        rows = launched.round_kernel.grid[0] // launched.round_kernel.values["splits"]
        assert rows * across >= channels > (rows - 1) * across
        splits = launched.round_kernel.values["splits"]
        assert splits * along >= outer * inner > (splits - 1) * along
        options = {"sums": True, "to_bounds": False, "squares": False, "weight": None}
        launched.gradients(x, x, step, (-8.0, 7.0, 0.0), None, places, **options)
        splits, blocks = (launched.gradients_kernel.values[name] for name in ("splits", "blocks"))
        assert splits * blocks * along >= outer * inner > (splits - 1) * blocks * along
        assert launched.gradients_kernel.grid[0] == rows * splits <= 4096 + rows


# --- elsewhere --------------------------------------------------------------------------------------------------------


def test_kernels_are_not_loaded_without_a_gpu():
    """Nor is triton by lq itself (torch imports it for its own use)."""
    code = (
        "import torch, sys; import lq; from torch import nn\n"
        "net = nn.Sequential(nn.Linear(4, 4)); lq.attach(net, 4, 4, first_last=None, estimator='lsq')\n"
        "lq.calibrate(net, [torch.randn(8, 4)]); net(torch.randn(8, 4)).sum().backward()\n"
        "print('lq.quantizer.kernels' in sys.modules, 'lq.quantizer.triton_kernels' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]
    importing = [path.name for path in (ROOT / "lq").rglob("*.py") if "import triton" in path.read_text("utf-8")]
    assert sorted(importing) == ["kernels.py", "triton_kernels.py"]


def test_tensors_without_a_gpu_are_left_to_the_operations():
    from torch._subclasses import FakeTensorMode

    assert not kernels.on_gpu(torch.zeros(3))
    with FakeTensorMode():
        fake = torch.zeros(3, device="cuda")
        assert fake.is_cuda and not kernels.on_gpu(fake)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.* is deprecated:DeprecationWarning")  # inductor, 2.10
@pytest.mark.parametrize("estimator", ["lsq", "ewgs", "noise_scale"])
def test_compiled_models_are_one_graph(estimator):
    """Inductor compiles the operations, forward and backward, to the same values."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    lq.attach(net, 4, 4, first_last=None, estimator=estimator)
    x = torch.randn(16, 6)
    lq.calibrate(net, [x])
    net.train()
    found = []
    for run in (net, torch.compile(net, fullgraph=True)):
        net.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad.clone() for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 4
    for eager, compiled in zip(*found, strict=True):
        if estimator != "noise_scale" or eager.ndim:  # its noise depends on the last bits of a sum
            torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)


def test_the_reference_takes_half_precision_with_bounds_of_both_kinds():
    """A number beside a tensor, as learned widths of unsigned grids have."""
    x = torch.tensor([0.4, 5.0], dtype=torch.float16, requires_grad=True)
    high = torch.tensor(3.0, requires_grad=True)
    fake_quantize(x, torch.tensor(0.0), 0.0, high).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0] and high.grad.item() == 1.0

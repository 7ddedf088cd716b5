"""A plug-in of pytest that has Triton's interpreter run the kernels on CPU tensors: ``-p tests.quantizer.interpreted``.

The environment variable has to be set before anything imports triton: it runs in a process of its own
(`test_triton_kernels.py`). The interpreter cuts bfloat16 off where a GPU rounds it (``cvt.rn`` in what is compiled, as
a test there says): here it rounds, too.
"""

import os

import torch

from lq.quantizer import kernels

RUNS = {"round_values": 0, "gradients": 0}


def pytest_configure():
    os.environ["TRITON_INTERPRET"] = "1"
    kernels.on_gpu = lambda x: not torch.compiler.is_compiling() and type(x) in (torch.Tensor, torch.nn.Parameter)
    for name in RUNS:
        count_runs(kernels._kernels(), name)
    round_bfloat16()


def count_runs(module, name):
    function = getattr(module, name)

    def counted(*args, **kwargs):
        RUNS[name] += 1
        return function(*args, **kwargs)

    setattr(module, name, counted)


def round_bfloat16():
    from triton import language
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(values, source, target, mode):
        if (source, target) != (language.float32, language.bfloat16):
            return convert(values, source, target, mode)
        return torch.from_numpy(values.copy()).to(torch.bfloat16).view(torch.int16).numpy().view("uint16")

    interpreter._convert_float = converted


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"fused: {RUNS['round_values']} roundings, {RUNS['gradients']} gradients")

"""A GPU that is none: tensors say that they are on the device "gpu:0", their values are on the CPU.

Code that asks whether a tensor is on the CPU hears that it is not, autograd works, and results are right. What would
make the host wait for a real GPU is noted with its place in lq: values that are read, operations whose results have
shapes that depend on values, and copies between the two without ``non_blocking``.

It takes names of torch that are private, and changes the process that it begins in: `test_waiting.py` runs what uses it
in one of its own.
"""

import contextlib
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

FOLDERS = tuple(str(Path(__file__).parents[1] / name) for name in ("lq", "callbacks"))

# Operations that read values of a GPU: to give a number, or a tensor whose shape depends on them.
READING = {
    *("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::is_nonzero", "aten::allclose", "aten::nonzero"),
    *("aten::masked_select", "aten::bincount", "aten::histc", "aten::repeat_interleave", "aten::_linalg_check_errors"),
    *("aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive"),
}
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


CPU = torch.device("cpu")


def begin():
    """Make torch know the device; returns why it does not, in versions where that cannot be done."""
    try:
        from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

        torch._C._set_only_lift_cpu_tensors(torch._C._only_lift_cpu_tensors())
    except (ImportError, AttributeError) as error:
        return f"torch {torch.__version__} lacks what a pretended GPU takes: {error}"

    class Backend(_DummyBackendModule):
        @staticmethod
        def get_amp_supported_dtype():
            return [torch.bfloat16, torch.float16]

        @staticmethod
        def device(_):
            return contextlib.nullcontext()

        @staticmethod
        def get_rng_state(*_):
            return torch.zeros(8, dtype=torch.uint8)

        @staticmethod
        def set_rng_state(*_):
            return None

    _setup_privateuseone_for_python_backend("gpu", Backend())
    torch.Generator = Generator
    return ""


class Pretended(torch.Tensor):
    """A tensor that says it is on the GPU."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=torch.device("gpu", 0),
            requires_grad=values.requires_grad,
        )

    def __init__(self, values):
        self.values_there = values

    def tolist(self):
        WAITS.note("aten::tolist")
        return self.values_there.tolist()

    def __repr__(self):
        return f"Pretended({self.values_there})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Pretending(TorchDispatchMode):
    """Has to be on wherever tensors are made on the GPU."""

    def __enter__(self):
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # what `torch.tensor` makes on the GPU comes from the host
        torch.autograd.set_multithreading_enabled(False)  # errors come to who called
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.before)
        torch.autograd.set_multithreading_enabled(True)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Generator(torch.Generator):
    """There is none of a device that is none."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls)


class Waits:
    """What would have waited, and where in lq."""

    def __init__(self):
        self.found = []

    def note(self, what):
        frame, places = sys._getframe(1), []
        while frame is not None and len(places) < 4:
            code = frame.f_code
            if code.co_filename.startswith(FOLDERS):
                places.insert(0, f"{Path(code.co_filename).name}:{code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        self.found.append(f"{what} at {' > '.join(places)}")


WAITS = Waits()


def there(value):
    return isinstance(value, Pretended)


def run(function, args, kwargs):
    """Run an operation on the CPU; its results are where the GPU's would be."""
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    target = kwargs.get("device")
    gpu = any(there(t) for t in tensors)
    name = function._schema.name
    if name == "aten::copy_":
        if there(args[0]) != there(args[1]) and not (len(args) > 2 and args[2]) and not kwargs.get("non_blocking"):
            WAITS.note("copy from the host" if there(args[0]) else "copy to the host")
    elif target is not None:
        moves = torch.device(target).type != "cpu"
        if tensors and moves != gpu and not kwargs.get("non_blocking"):
            WAITS.note("copy from the host" if moves else "copy to the host")
        gpu = moves
    elif gpu and any(not there(t) and t.ndim for t in tensors):
        raise RuntimeError(f"{name}: tensors are on two devices")
    elif gpu and name in READING:
        WAITS.note(name)
    elif gpu and name in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1]):
        WAITS.note(f"{name} with a mask")
    plain_args, plain_kwargs = tree_map(lambda v: v.values_there if there(v) else v, (args, kwargs))
    if target is not None:
        plain_kwargs["device"] = CPU
        if name == "aten::_to_copy":
            plain_kwargs.pop("non_blocking", None)
    out = function(*plain_args, **plain_kwargs)
    if gpu:
        out = tree_map(lambda v: Pretended(v) if isinstance(v, torch.Tensor) and not there(v) else v, out)
        return return_and_correct_aliasing(function, args, kwargs, out)
    return return_and_correct_aliasing(function, args, kwargs, out) if tensors else out

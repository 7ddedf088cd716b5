"""Find the tensors of a run whose channels can be rescaled, and say why others cannot.

A tensor is followed from what makes it through all that reads it: selections, paddings, means and reorderings keep its
channels; positive-homogeneous functions (ReLU, leaky ReLU, pooling, a product with another tensor, as in
squeeze-and-excitation) keep a scale and no shift. Every path has to end in a convolution or a linear layer with a
weight of its own. Whether channels stay where they are on the way is left to running the model.
"""

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor, nn

from lq.attachment.preparation.parts import Left, Maker, Pair, Reader
from lq.structure.tracing import Argument, Step, Trace, Value

#: Norms: function name to the positions of what they normalize over, of weight and of bias.
NORMS = {"layer_norm": (1, 2, 3), "rms_norm": (1, 2, None), "group_norm": (None, 2, 3)}
#: A norm that is written out: what it calls beside the product with its weight.
_ROOTS = {"rsqrt", "rsqrt_", "sqrt", "sqrt_", "norm", "vector_norm", "linalg_vector_norm", "linalg_norm", "normalize"}
PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
_QUOTIENTS = {"div", "div_", "true_divide", "__truediv__", "__itruediv__"}
SUMS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
LAYERS = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
}  # fmt: skip
#: Functions that keep channels, scale and shift.
KEEPING = {
    "__getitem__", "chunk", "split", "tensor_split", "unbind", "narrow", "select", "index_select", "repeat",
    "max_pool1d", "max_pool2d", "max_pool3d", "_max_pool2d", "repeat_interleave", "tile", "split_with_sizes",
    "hsplit", "vsplit", "mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "amax",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "interpolate",
}  # fmt: skip
#: Functions that keep channels and a positive scale.
_HOMOGENEOUS = {
    "pad", "avg_pool1d", "avg_pool2d", "avg_pool3d", "sum", "abs", "neg", "unfold", "gather", "lp_pool2d",
    "leaky_relu", "leaky_relu_", "relu", "relu_", "prelu",
}  # fmt: skip
_POSITIVE = {"relu", "relu_"}
_CLIPPING = {"relu6", "hardtanh", "hardtanh_", "clamp", "clamp_"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass
class Found:
    """The pairs of a model, and what is left."""

    pairs: list[Pair] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)


class RefusedError(Exception):
    """Why a tensor is left, and what the caller can do about it."""

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.reason, self.advice = reason, advice


def find(model: nn.Module, seen: Trace, *, frozen: bool, kinds: tuple[str, ...] = ("norm", "layer")) -> Found:
    """Find what can be rescaled in what a run of `model` has seen.

    Args:
        model: the float model, without the hooks of the run.
        seen: the run.
        frozen: whether parameters that do not require gradients may be changed too.
        kinds: what to look for: "norm", what norms make; "layer", what convolutions and linear layers make.
    """
    search, found = Search(model, seen, frozen), Found()
    sources: dict[str, list[_Source]] = {}
    for source in _sources(seen):
        if source.kind in kinds and source.value.varies:
            sources.setdefault(source.weight or f"{source.module}.{source.number}", []).append(source)
    for same in sources.values():
        try:
            found.pairs.append(search.pair(same))
        except RefusedError as refused:
            if same[0].kind == "norm" or refused.advice or search.activated:
                found.left.append(Left(same[0].module, refused.reason, refused.advice))
    return found


# --- what makes tensors -----------------------------------------------------------------------------------------------


@dataclass
class _Source:
    """One run of what makes a tensor."""

    kind: str
    module: str
    weight: str | None
    bias: str | None
    value: Value
    dim: int = 0
    number: int = 0
    problem: str = ""


def _sources(seen: Trace) -> list[_Source]:
    """Norms, those that are written out too, and layers."""
    found = []
    roots = {step.module for step in seen.steps if step.function in _ROOTS}
    for number, step in enumerate(seen.steps):
        if step.function in NORMS:
            found.append(_norm(step, number))
        elif step.function in LAYERS:
            found.append(_layer(step, number))
        elif step.function in PRODUCTS and step.module in roots and (own := _written_out(seen, step, number)):
            found.append(own)
    return found


def _norm(step: Step, number: int) -> _Source:
    over, weight, bias = NORMS[step.function]
    names = ["weight", "bias"]
    scale, shift = (
        None if position is None else step.argument(position, keyword)
        for position, keyword in zip((weight, bias), names, strict=True)
    )
    source = _Source("norm", step.module or "", name_of(scale), name_of(shift), step.results[0], number=number)
    shape = None if over is None else step.argument(over, "normalized_shape")
    if scale is None:
        source.problem = "it has no weight that could take the scale"
    elif source.weight is None or (shift is not None and source.bias is None):
        source.problem = "its weight or its bias is computed, not a parameter"
    elif shape is not None and len(tuple(shape)) != 1:
        source.problem = f"it normalizes over {len(tuple(shape))} dimensions, its weight is not of channels alone"
    return source


def _layer(step: Step, number: int) -> _Source:
    weight, bias = step.argument(1, "weight"), step.argument(2, "bias")
    transposed = step.function.startswith("conv_transpose")
    source = _Source(
        "layer", step.module or "", name_of(weight), name_of(bias), step.results[0], int(transposed), number
    )
    if source.weight is None or (bias is not None and source.bias is None):
        source.problem = "its weight or its bias is computed, not a parameter"
    elif transposed and int(step.argument(6, "groups", 1)) > 1:
        source.problem = "it is a transposed convolution in groups"
    return source


def _written_out(seen: Trace, step: Step, number: int) -> _Source | None:
    """A norm whose code ends in a product with a weight, and perhaps a sum with a bias."""
    scales = [part for part in step.given if part.whole and part.ndim == 1]
    if len(scales) != 1 or len(step.given) != 2 or not any(part.value.varies for part in step.given):
        return None
    source = _Source("norm", step.module or "", name_of(scales[0]), None, step.results[0], number=number)
    readers = [s for s in seen.steps if any(part.value is source.value for part in s.given)]
    if len(readers) == 1 and readers[0].function in SUMS and readers[0].module == step.module:
        biases = [part for part in readers[0].given if part.whole and part.ndim == 1]
        if len(biases) == 1:
            source.bias, source.value = name_of(biases[0]), readers[0].results[0]
    return source


def name_of(part: object) -> str | None:
    """Name of a parameter that was given as it is."""
    return part.value.parameter if isinstance(part, Argument) and part.whole else None


# --- what reads them --------------------------------------------------------------------------------------------------


class Search:
    """Follows tensors through one run."""

    def __init__(self, model: nn.Module, seen: Trace, frozen: bool) -> None:
        self.model, self.seen, self.frozen = model, seen, frozen
        self.modules = dict(model.named_modules())
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        self.owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        self.readers: dict[int, list[Step]] = {}
        for step in seen.steps:
            for value in {id(part.value): part.value for part in step.given}.values():
                self.readers.setdefault(id(value), []).append(step)
        self.given: dict[int, list[str]] = {}
        for name, values in seen.inputs.items():
            for taken in values:
                self.given.setdefault(id(taken), []).append(name)
        self.results = {id(value) for value in seen.results}
        self.activated = False

    def pair(self, sources: list[_Source]) -> Pair:
        """The pair of what one set of parameters makes, in one run or in several.

        Raises:
            RefusedError: if it cannot be rescaled.
        """
        self.activated = False
        first = sources[0]
        if first.problem or first.weight is None:
            raise RefusedError(first.problem)
        names = {source.module for source in sources}
        if len(names) > 1:
            raise RefusedError(f"its weight is used by {' and '.join(sorted(names))}")
        maker = Maker(first.weight, first.bias, first.dim)
        ends = _Ends()
        for source in sources:
            self._follow(source.value, ends, positive=False)
        if any(id(other) in ends.values for other in ends.others):
            raise RefusedError("two tensors that depend on it are multiplied")
        if not ends.readers:
            raise RefusedError("nothing reads it")
        weight = self.parameters[maker.weight]
        channels = weight.shape[maker.dim]
        for part in (maker.weight, maker.bias):
            if part is not None and self.seen.reads[part] != len(sources):
                raise RefusedError(f"{part} is read elsewhere too")
        readers = tuple(self.reader(step, channels, ends.readers) for step in ends.first_of_each())
        self.require_own([maker.weight, maker.bias, *(n for r in readers for n in (r.weight, r.bias))])
        # Layers get no shift: a bias that is made for one would have to be there for the next.
        shifts = (
            first.kind == "norm"
            and ends.shifts
            and maker.bias is not None
            and all(reader.bias is not None for reader in readers)
        )
        return Pair(first.module, first.kind, maker, readers, channels, shifts, ends.positive)

    def _follow(self, value: Value, ends: "_Ends", positive: bool) -> None:
        if id(value) in ends.values:
            return
        ends.values[id(value)] = value
        self.require_unwatched(value)
        if id(value) in self.results:
            raise RefusedError("it is an output of the model")
        for step in self.readers.get(id(value), ()):
            if step.function in LAYERS and _is(step.argument(0, "input"), value):
                ends.readers.append(step)
                ends.positive = ends.positive and positive
                continue
            self._pass(step, value, ends)
            for result in step.results:
                self._follow(result, ends, positive or step.function in _POSITIVE)

    def _pass(self, step: Step, value: Value, ends: "_Ends") -> None:
        """Go through a function that keeps a scale of channels, or raise."""
        function, others = step.function, [part.value for part in step.given if part.value is not value]
        once = len(step.given) == 1 + len(others)  # it is not multiplied by itself
        numerator = function in _QUOTIENTS and _is(step.argument(0, "input"), value)
        if function in KEEPING and not others:
            return
        if function in _HOMOGENEOUS and len(others) <= (function == "prelu"):
            self.activated = self.activated or function.rstrip("_") in ("relu", "leaky_relu", "prelu")
        elif once and len(others) <= 1 and (function in PRODUCTS or numerator):
            ends.others += others
        elif function == "batch_norm":
            raise RefusedError(f"{_in(step)} reads it", "fold it first: lq.fold_batchnorm(model)")
        elif function in _CLIPPING:
            self.activated = True
            raise RefusedError(f"{_in(step)} clips it at a value that is the same for all channels")
        else:
            raise RefusedError(f"{_in(step)} reads it, which cannot take a scale of channels")
        ends.shifts = False

    def reader(self, step: Step, channels: int, calls: list[Step]) -> Reader:
        """The parameters of a layer that reads a tensor with so many channels in these calls of layers.

        Raises:
            RefusedError: if it cannot take the scale.
        """
        weight, bias = step.argument(1, "weight"), step.argument(2, "bias")
        name, layer = name_of(weight), step.module or "the model"
        if name is None:
            raise RefusedError(f"{layer} reads it, whose weight is computed, not a parameter")
        uses = sum(name_of(other.argument(1, "weight")) == name for other in calls)
        if self.seen.reads[name] != uses:
            raise RefusedError(f"{name}, which reads it, is read elsewhere too, or reads other tensors")
        transposed = step.function.startswith("conv_transpose")
        groups = 1 if step.function == "linear" else int(step.argument(6, "groups", 1))
        reader = Reader(name, None, groups, transposed)
        if reader.channels(self.parameters[name]) != channels:
            of = reader.channels(self.parameters[name])
            raise RefusedError(f"{layer} reads it as {of} channels, not as its {channels}")
        if transposed or _pads(step):
            return reader
        if bias is None:
            own = self._unset_bias(name)
            return Reader(name, own, groups, makes_bias=own is not None)
        named = name_of(bias)
        return Reader(name, named if named is not None and self.seen.reads[named] == uses else None, groups)

    def _unset_bias(self, weight: str) -> str | None:
        """Name of the bias that the module of a weight could have, and has not."""
        parent, _, last = weight.rpartition(".")
        table = self.modules[parent]._parameters if parent in self.modules else {}
        fits = last == "weight" and "bias" in table and table["bias"] is None
        return f"{parent}.bias".lstrip(".") if fits else None

    def require_own(self, names: list[str | None]) -> None:
        """Raise if parameters are shared, frozen or have no numbers."""
        for name in names:
            parameter = None if name is None else self.parameters.get(name)
            if parameter is None:
                continue
            if self.owners[id(parameter)] > 1:
                raise RefusedError(f"{name} is shared with another module")
            if parameter.is_meta:
                raise RefusedError(f"{name} is on the meta device", "give the model its values first")
            if not parameter.requires_grad and not self.frozen:
                raise RefusedError(f"{name} is frozen (requires_grad=False)", "pass frozen=True to change it too")
            if not bool(parameter.isfinite().all()):
                raise RefusedError(f"{name} has values that are not finite", "load other weights")

    def require_unwatched(self, value: Value) -> None:
        """Raise if a module that gives or takes the tensor has a hook or a forward of its own, which may see it."""
        for name in (*value.output_of, *self.given.get(id(value), ())):
            module = self.modules.get(name)
            if module is None:
                continue
            if any(len(getattr(module, table, ())) for table in _HOOKS):
                raise RefusedError(f"{name} has a hook, which would see other values", "remove the hook first")
            if "forward" in module.__dict__:
                raise RefusedError(f"{name}.forward was replaced on the instance", "prepare before it is replaced")


@dataclass
class _Ends:
    """Where the ways of a tensor end, and what they go through."""

    values: dict[int, Value] = field(default_factory=dict)
    readers: list[Step] = field(default_factory=list)
    others: list[Value] = field(default_factory=list)
    shifts: bool = True
    positive: bool = True

    def first_of_each(self) -> list[Step]:
        """One call of each layer that reads."""
        found: dict[object, Step] = {}
        for step in self.readers:
            found.setdefault(name_of(step.argument(1, "weight")) or id(step), step)
        return list(found.values())


def _is(part: object, value: Value) -> bool:
    return isinstance(part, Argument) and part.value is value


def _in(step: Step) -> str:
    return f"{step.function} in {step.module or 'the model'}"


def _pads(step: Step) -> bool:
    """Whether a convolution adds zeros around what it reads, which a shift would not reach."""
    if step.function == "linear":
        return False
    padding = step.argument(4, "padding", 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)

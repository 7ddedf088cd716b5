r"""Fold BatchNorms into the convolutions before them, or after them where that is exact.

With ``g = gamma / sqrt(var + eps)`` and ``t = beta - mean * g``, computed in float64: a convolution before the norm
becomes ``w' = w * g``, ``b' = b * g + t``; one after it ``w' = w * g`` along its input channels and
``b' = b + sum(w * t)``, which is exact only without zero padding (the padding would not be shifted). Other norms
(EvoNorm, GroupNorm, LayerNorm) depend on the input and stay.

Pairs are found by tracing each module that holds a BatchNorm, its children taken as they are (torch.fx with every child
a leaf). This needs no example input and no traceable model: only the few lines between a convolution and its norm must
be free of control flow on tensors. A pair is folded if the norm is the only reader of the convolution's output and both
are called once. Convolutions that are not torch's own class (padding variants, weight standardization) are folded only
if a random input comes out the same.
"""

import inspect
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from lq.channels import ChannelLayout
from lq.errors import StateError
from lq.sites import is_attached

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NORM_STATE = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class FoldablePair:
    """Names of a convolution and of the BatchNorm that alone reads its output, or that it alone reads."""

    conv: str
    norm: str
    norm_first: bool = field(default=False, repr=False)


class FoldedNorm(nn.Module):
    """What is left of a `BatchNormAct2d` after folding: its drop and its activation, under their old names."""

    def __init__(self, drop: nn.Module, act: nn.Module) -> None:
        super().__init__()
        self.drop = drop
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Apply drop and activation."""
        return self.act(self.drop(x))  # type: ignore[no-any-return]


def fold_batchnorm(model: nn.Module) -> list[FoldablePair]:
    """Fold every BatchNorm next to a convolution into it, in place; the norm's running statistics are used.

    Norms after a convolution are folded, and norms before one that does not pad; frozen and synchronized ones too.

    A float checkpoint of the unfolded model still loads: its BatchNorms are folded on the way in.

    Returns:
        The folded pairs; BatchNorms that are in no pair stay as they are.

    Raises:
        StateError: if the model has quantizers already, whose ranges would not fit the folded weights.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    >>> fold_batchnorm(model)
    [FoldablePair(conv='0', norm='1')]
    """
    if is_attached(model):
        raise StateError(
            "BatchNorm cannot be folded into weights that have quantizers: lq.detach(model), lq.fold_batchnorm(model), "
            "then lq.attach(model, ...) again"
        )
    return [pair for pair in foldable_pairs(model) if fold_pair(model, pair)]


def foldable_pairs(model: nn.Module) -> list[FoldablePair]:
    """All pairs of a convolution and a BatchNorm to fold into it, found by tracing."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    owners = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    pairs = []
    for prefix, parent in model.named_modules():
        if any(_is_norm(parent.get_submodule(_end_of(parent, name, 0))) for name, _ in parent.named_children()):
            for pair in _pairs_inside(parent):
                modules = parent.get_submodule(pair.conv), parent.get_submodule(pair.norm)
                alone = all(len(names[id(module)]) == 1 for module in modules)  # shared modules have other readers
                if alone and _owns_its_parameters(modules[0], owners):
                    pairs.append(FoldablePair(_join(prefix, pair.conv), _join(prefix, pair.norm), pair.norm_first))
    folded: dict[str, FoldablePair] = {}
    for pair in sorted(dict.fromkeys(pairs), key=lambda pair: pair.norm_first):  # after a convolution before before one
        folded.setdefault(pair.norm, pair)
    return [pair for pair in dict.fromkeys(pairs) if folded[pair.norm] == pair]


def _owns_its_parameters(conv: nn.Module, owners: Counter[int]) -> bool:
    """Whether the weight is a plain Parameter (not computed, as by weight norm or pruning) and shared with no other."""
    weight, bias = conv._parameters.get("weight"), conv._parameters.get("bias")
    computed = weight is None or len(conv._forward_pre_hooks) > 0
    return not computed and all(p is None or owners[id(p)] == 1 for p in (weight, bias))


def fold_pair(model: nn.Module, pair: FoldablePair) -> bool:
    """Fold one pair; False, and nothing changed, if the convolution computes something else than its class says."""
    conv: Any = model.get_submodule(pair.conv)
    norm: Any = model.get_submodule(pair.norm)
    with torch.no_grad():
        folded = _folded(conv.weight, conv.bias, norm, conv, pair.norm_first)
        if type(conv) not in _CONVS and not _same(conv, norm, *folded):
            return False
        conv.weight.copy_(folded[0])
        if conv.bias is None:
            conv.bias = nn.Parameter(folded[1].to(conv.weight))
        else:
            conv.bias.copy_(folded[1])
    left = FoldedNorm(norm.drop, norm.act) if _has_act(norm) else nn.Identity()
    parent, _, child = pair.norm.rpartition(".")
    setattr(model.get_submodule(parent), child, left.train(norm.training))
    _remember(model, pair, float(norm.eps))
    return True


def _folded(weight: Tensor, bias: Tensor | None, norm: Any, conv: Any, norm_first: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution with its norm; computed in float64."""
    gain = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = -norm.running_mean.double() * gain
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    wide = weight.double()
    if norm_first:
        per_group = (conv.groups, 1, -1, *[1] * (weight.ndim - 2))
        grouped = wide.unflatten(0, (conv.groups, -1))
        scaled = (grouped * gain.view(per_group)).flatten(0, 1)
        added = (grouped * shift.view(per_group)).flatten(0, 1).flatten(1).sum(1)
        total = added if bias is None else added + bias.double()
    else:
        layout = ChannelLayout.of(conv, weight)
        scaled = layout.join(layout.split(wide) * layout.spread(gain, weight))
        total = shift if bias is None else bias.double() * gain + shift
    return scaled.to(weight.dtype), total.to(weight.dtype)


def _same(conv: Any, norm: Any, weight: Tensor, bias: Tensor) -> bool:
    """Whether the convolution with folded parameters does what convolution and norm do, on a random input."""
    size = [2 * (kernel - 1) * dilation + 3 for kernel, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, conv.in_channels, *size, generator=generator).to(conv.weight)
    training = norm.training
    norm.eval()
    try:
        expected = nn.functional.batch_norm(
            conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )
        got = torch.func.functional_call(conv, {"weight": weight} | ({} if conv.bias is None else {"bias": bias}), (x,))
        if conv.bias is None:
            got = got + bias.view(-1, *[1] * len(size))
        return torch.allclose(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    except RuntimeError:
        return False
    finally:
        norm.train(training)


# --- tracing ----------------------------------------------------------------------------------------------------


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _pairs_inside(parent: nn.Module) -> Iterator[FoldablePair]:
    """Names, below `parent`, of convolutions and norms that follow each other in its forward."""
    attributes = dict(parent.__dict__)
    parameters = inspect.signature(parent.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    try:
        graph = _ChildrenAreLeaves().trace(parent, concrete_args=defaults)
    except Exception:  # noqa: BLE001 - whatever a forward raises on proxies, it cannot be traced: nothing to fold here
        return
    finally:
        parent.__dict__.update(attributes)  # a forward may have stored proxies on the module
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    for node in graph.nodes:
        if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) != 1:
            continue
        once = calls[before.target] == calls[node.target] == 1
        earlier, later = _end_of(parent, str(before.target), -1), _end_of(parent, str(node.target), 0)
        if not once or {earlier, later} & read:
            continue
        first, second = parent.get_submodule(earlier), parent.get_submodule(later)
        if isinstance(first, _CONVS) and _is_norm(second):
            yield FoldablePair(earlier, later)
        elif _is_norm(first) and not _has_act(first) and _does_not_pad(second):
            yield FoldablePair(later, earlier, norm_first=True)


def _end_of(parent: nn.Module, name: str, index: int) -> str:
    """The first (0) or last (-1) module of a Sequential, and of Sequentials in it; any other module is its own end."""
    module = parent.get_submodule(name)
    while type(module) is nn.Sequential and len(module):
        child = list(module._modules)[index]
        name, module = f"{name}.{child}", module[index]
    return name


def _is_norm(module: nn.Module) -> bool:
    """A BatchNorm with running statistics: torch's own, a frozen one, or timm's with an activation behind."""
    frozen = type(module).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
    if not (frozen or isinstance(module, _NORMS)) or module.running_mean is None or module.running_var is None:
        return False
    return frozen or type(module) in _NORMS or _has_act(module)


def _has_act(norm: nn.Module) -> bool:
    names = {cls.__name__ for cls in type(norm).__mro__}
    known = {"BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"}
    return bool(names & known) and hasattr(norm, "drop") and hasattr(norm, "act")


def _does_not_pad(module: nn.Module) -> bool:
    """A plain convolution that adds no zeros around what it reads."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or type(module) not in _CONVS:
        return False
    return module.padding == "valid" or (module.padding != "same" and not any(map(int, module.padding)))


# --- float checkpoints of the unfolded model ----------------------------------------------------------------------


def _remember(model: nn.Module, pair: FoldablePair, eps: float) -> None:
    """Have the module around the pair fold it in any unfolded checkpoint that it loads."""
    inside = os.path.commonprefix([pair.conv.split("."), pair.norm.split(".")])
    parent = model.get_submodule(".".join(inside))
    conv, norm = (".".join(name.split(".")[len(inside) :]) for name in (pair.conv, pair.norm))
    folds: dict[FoldablePair, float] = parent.__dict__.setdefault("_folded_norms", {})
    if not folds:
        parent.register_load_state_dict_pre_hook(_fold_checkpoint)
    folds[FoldablePair(conv, norm, pair.norm_first)] = eps


def _fold_checkpoint(parent: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load-state-dict hook: fold the BatchNorms that a checkpoint still has and `parent` has folded."""
    for pair, eps in parent.__dict__.get("_folded_norms", {}).items():
        conv, norm = f"{prefix}{pair.conv}.", f"{prefix}{pair.norm}."
        if f"{norm}running_var" not in state_dict or f"{conv}weight" not in state_dict:
            continue
        stored = SimpleNamespace(eps=eps, **{part: state_dict.pop(norm + part, None) for part in _NORM_STATE})
        state_dict.pop(f"{norm}num_batches_tracked", None)
        weight, bias = state_dict[f"{conv}weight"], state_dict.get(f"{conv}bias")
        module = parent.get_submodule(pair.conv)
        state_dict[f"{conv}weight"], state_dict[f"{conv}bias"] = _folded(weight, bias, stored, module, pair.norm_first)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name

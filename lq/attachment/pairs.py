"""Pairs of a convolution and a BatchNorm, and the kinds of modules that can be one."""

from dataclasses import dataclass, field

from torch import nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class FoldablePair:
    """Names of a convolution and of the BatchNorm that alone reads its output, or that it alone reads."""

    conv: str
    norm: str
    norm_first: bool = field(default=False, repr=False)

    @property
    def order(self) -> tuple[str, str]:
        """The two names, the one that is called first in front."""
        return (self.norm, self.conv) if self.norm_first else (self.conv, self.norm)


@dataclass(frozen=True)
class UnfoldedNorm:
    """A BatchNorm beside a convolution that is not folded into it.

    Args:
        norm: name of the norm.
        conv: name of the convolution.
        reason: why, as a sentence without its subject.
        advice: what the caller can do about it; empty if there is nothing to do.
    """

    norm: str
    conv: str
    reason: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.norm} behind {self.conv}: {self.reason}" + (f" ({self.advice})" if self.advice else "")


def end_of(parent: nn.Module, name: str, index: int) -> str:
    """The first (0) or last (-1) module of a Sequential, and of Sequentials in it; any other module is its own end."""
    module = parent.get_submodule(name)
    while type(module) is nn.Sequential and len(module):
        child = list(module._modules)[index]
        name, module = f"{name}.{child}", module[index]
    return name


def holds_norm(module: nn.Module) -> bool:
    """Whether a module has a BatchNorm somewhere inside."""
    return any(is_norm(inner) for inner in module.modules() if inner is not module)


def is_norm(module: nn.Module) -> bool:
    """A BatchNorm with running statistics: torch's own, a frozen one, or timm's with an activation behind."""
    frozen = type(module).__name__ in ("FrozenBatchNorm2d", "FrozenBatchNormAct2d")
    if not (frozen or isinstance(module, _NORMS)) or module.running_mean is None or module.running_var is None:
        return False
    return frozen or type(module) in _NORMS or has_act(module)


def has_act(norm: nn.Module) -> bool:
    """Whether it is one of timm's norms with a drop and an activation behind."""
    names = {cls.__name__ for cls in type(norm).__mro__}
    known = {"BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d"}
    return bool(names & known) and hasattr(norm, "drop") and hasattr(norm, "act")


def does_not_pad(module: nn.Module) -> bool:
    """A plain convolution that adds no zeros around what it reads."""
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) or type(module) not in CONVOLUTIONS:
        return False
    return module.padding == "valid" or (module.padding != "same" and not any(map(int, module.padding)))


def join(prefix: str, name: str) -> str:
    """The name of a part, from outside of the module that it is a part of."""
    return f"{prefix}.{name}" if prefix else name

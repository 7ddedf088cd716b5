"""The model that a command is given: the name of a timm model, or ``module:function`` that builds one."""

import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import nn

from lq.cli.usage import suggestion
from lq.errors import DataError


def built(name: str, pairs: Sequence[str], option: str = "--model") -> nn.Module:
    """The float model.

    Args:
        name: name of a timm model, or ``module:function``; a module of the folder the command runs in, too.
        pairs: arguments of it, as ``KEY=VALUE``.
        option: what the name was given by, for messages.

    Raises:
        DataError: if there is no such model, or it cannot be built.
    """
    if any("=" not in pair for pair in pairs):
        raise DataError(f"--model-args {' '.join(pairs)}: expected KEY=VALUE")
    place, _, function = name.partition(":")
    try:
        arguments = {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in pairs)}
        build = getattr(_module(place), function) if function else _timm(place)
        model = build(**arguments)
    except (Exception, SystemExit) as error:  # what user code raises
        cause = str(error) or type(error).__name__
        near = "" if function else near_models(place)
        raise DataError(f"{option} {name}: {cause}; give the name of a timm model, or module:function{near}") from error
    if not isinstance(model, nn.Module):
        raise DataError(f"{option} {name} gives a {type(model).__name__}, not a torch module")
    return model


def example(model: nn.Module, name: str, size: Sequence[int] | None) -> torch.Tensor:
    """Two random samples of the size that was given, or that a timm model was made for.

    Args:
        model: the model.
        name: what it was given by, for messages.
        size: shape of one sample; None: what the model says.

    Raises:
        DataError: if the size is none, or the model does not say.
    """
    given = f"--input-size {' '.join(map(str, size or ()))}"
    if size and min(size) < 1:
        raise DataError(f"{given}: expected numbers from 1 on, such as 3 224 224")
    shape = size or getattr(model, "pretrained_cfg", {}).get("input_size")
    if not shape:
        raise DataError(f"{name} does not say what it takes; give --input-size, such as 3 224 224")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = shape[0] if size or first is None else first.in_channels
    try:
        return torch.randn(2, channels, *shape[1:], generator=torch.Generator().manual_seed(0))
    except RuntimeError as error:
        raise DataError(f"{given}: two samples do not fit into memory") from error


def _module(name: str) -> ModuleType:
    """A module; of the folder the command runs in, if it is nowhere else."""
    here = str(Path.cwd())
    if not {"", here} & set(sys.path):
        sys.path.append(here)
    return importlib.import_module(name)


def _timm(name: str) -> Callable[..., Any]:
    import timm

    return lambda **arguments: timm.create_model(name, **arguments)


def near_models(name: str) -> str:
    """The end of a message about a name that timm may not know: models with names like it."""
    try:
        import timm
    except ImportError:
        return ""
    known = timm.list_models()
    return "" if name in known else suggestion(name, known)

"""What tells a run of reconstruction from others: its file of finished units belongs to runs with the same."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from lq.reconstruction.identity import describe_object, describe_parts, digest_of_module
from lq.reconstruction.networks import Networks
from lq.reconstruction.options import Options, RunOptions
from lq.reconstruction.units import Unit

# How files of format 2 tell the options, whichever class has them: under this name, these in this order.
_METHOD = "lq.method.Method"
_ALWAYS = (
    "rounding",
    "loss",
    "drop",
    "iterations",
    "batch_size",
    "activation_mode",
    "step_lr",
    "early_stop",
    "compile",
    "regularization",
    "bias_lr",
    "start",
)


def describe_options(options: Options) -> str:
    """The options that decide how units are fitted, in words that are the same in every process.

    Options that came after format 2 are among them where they are not at their default, so that older files go on.
    """
    later = [
        one.name
        for one in fields(Options)
        if one.name not in _ALWAYS and one.metadata.get("compared", True) and getattr(options, one.name) != one.default
    ]
    objects = {
        "rounding": options.rounding_method,
        "loss": options.loss_function,
        "drop": options.drop_schedule,
    }
    return describe_parts(_METHOD, {name: objects.get(name, getattr(options, name)) for name in (*_ALWAYS, *later)})


def fingerprint_of(networks: Networks, units: Sequence[Unit]) -> dict[str, Any]:
    """What has to be the same for a run to go on where another one ended."""
    options = networks.options
    return {
        "units": [unit.name for unit in units],
        "method": describe_options(options),
        "samples": networks.batches.samples,
        "data": digest_over_ranks(networks.batches.digest, options, networks.device),
        "seed": options.seed,
        "ranks": options.ranks,
        "dtype": str(options.kept_dtype),
        "forward": describe_object(options.forward),
        "model": digest_of_module(networks.model),
        "teacher": digest_of_module(networks.float_model),
    }


def digest_over_ranks(digest: str, options: RunOptions, device: torch.device) -> str:
    """One hash of those of all ranks, which depends on their order."""
    if options.reduce is None or options.ranks == 1:
        return digest
    parts = torch.tensor([float(int(digest[i : i + 4], 16)) for i in range(0, len(digest), 4)])
    total = options.reduce((parts * (options.rank + 1)).to(device), "sum")
    return "".join(f"{round(part):06x}" for part in total.tolist())

"""The result of measuring: what each width of each tensor costs, with how sure that is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lq.errors import DataError
from lq.files import parse_json, schema
from lq.quantizer.histogram import Reduce
from lq.quantizer.spec import width_in_file
from lq.sensitivity.tensors import MeasuredTensor
from lq.tables import Table

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class TensorSensitivity:
    """One weight or activation.

    Args:
        name: name of its site, such as "layer1.0.conv1.weight".
        role: "weight" or "activation".
        numel: number of values; of one sample, for activations.
        channels: number of output channels with a width of their own; 1 for activations.
        loss: expected increase of the loss if all of the tensor has a width, (W,).
        error: standard error of `loss` over samples, (W,); NaN where one sample was seen.
        group_loss: the same for each group of adjacent channels alone, (G, W).
        group_error: standard error of `group_loss`, (G, W).
    """

    name: str
    role: Literal["weight", "activation"]
    numel: int
    channels: int
    loss: Array
    error: Array
    group_loss: Array
    group_error: Array


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """What each width costs, in units of the metric; ``print`` shows it as a table.

    Args:
        metric: name of the metric.
        widths: the widths measured, in bits.
        samples: number of samples it was measured on.
        group: number of adjacent channels in a group.
        tensors: one entry per weight and activation, in the model's order.
        notes: what was particular about the measurement.
        terms: by name of tensor, the terms of each group of channels at each width by sample (groups, W, rows), whose
            products are what two of them lose together; None unless ``cross_terms=True``. Not in the JSON.
    """

    metric: str
    widths: tuple[int, ...]
    samples: int
    group: int
    tensors: tuple[TensorSensitivity, ...]
    notes: tuple[str, ...] = ()
    terms: Mapping[str, NDArray[np.float32]] | None = field(default=None, kw_only=True)

    def __getitem__(self, name: str) -> TensorSensitivity:
        """The tensor of that name.

        Raises:
            DataError: if it was not measured.
        """
        for tensor in self.tensors:
            if tensor.name == name:
                return tensor
        raise DataError(
            f"{name!r} was not measured; measured were {', '.join(t.name for t in self.tensors[:5])}, ... "
            f"({len(self.tensors)} tensors)"
        )

    def table(self) -> Table:
        """Loss increase of each tensor at each width, ready to be shown."""
        rows = tuple(
            (t.name, str(t.numel), str(t.channels), *(f"{value:.2e}" for value in t.loss)) for t in self.tensors
        )
        header = ("tensor", "values", "channels", *(f"{width} bits" for width in self.widths))
        noise = np.concatenate([(t.error / t.loss)[t.loss > 0] for t in self.tensors])
        said = f", standard error {100 * np.median(noise):.0f} % (median)" if np.isfinite(noise).any() else ""
        return Table(header, rows, (f"{self.metric} on {self.samples} samples{said}", *self.notes))

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def to_json(self) -> str:
        """The table as JSON, without `terms`."""
        tensors = [
            {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in vars(tensor).items()}
            for tensor in self.tensors
        ]
        return json.dumps({**{k: v for k, v in vars(self).items() if k != "terms"}, "tensors": tensors})

    @classmethod
    def from_json(cls, text: str) -> "Sensitivity":
        """The inverse of `to_json`.

        Raises:
            DataError: if `text` is something else.
        """
        try:
            values = schema.read(parse_json(text), _SENSITIVITY)
            tensors = tuple(TensorSensitivity(**tensor) for tensor in values.pop("tensors"))
            found = cls(tensors=tensors, **values)
            _require_sizes(found)
        except DataError as error:
            raise DataError(f"not a saved sensitivity: {error}; write sensitivity.to_json() to the file") from error
        return found


# What a saved sensitivity looks like. Errors are NaN where one sample was seen.
def _numbers(check: schema.Check) -> schema.Check:
    def into(values: list[Any]) -> Array:
        if len({len(value) for value in values if isinstance(value, list)}) > 1:
            raise schema.MismatchError("rows of one length", values)
        return np.array(values, dtype=float)

    return schema.array(check, into=into)


_LOSS, _ERROR = schema.number(), schema.number(0, nan=True)
_SENSITIVITY = schema.record(
    {
        "metric": schema.text,
        "widths": schema.array(width_in_file, least=1, into=tuple),
        "samples": schema.integer(),
        "group": schema.integer(1),
        "tensors": schema.array(
            schema.record(
                {
                    "name": schema.text,
                    "role": schema.choice("weight", "activation"),
                    "numel": schema.integer(),
                    "channels": schema.integer(1),
                    "loss": _numbers(_LOSS),
                    "error": _numbers(_ERROR),
                    "group_loss": _numbers(schema.array(_LOSS)),
                    "group_error": _numbers(schema.array(_ERROR)),
                }
            )
        ),
        "notes": schema.array(schema.text, into=tuple),
    }
)


def _require_sizes(found: Sensitivity) -> None:
    """Raise if losses are not one for each width, and for each group of channels; or if a name is there twice."""
    count, names = len(found.widths), set()
    if len(set(found.widths)) < count:
        raise DataError(f"at 'widths': {list(found.widths)} has a width twice")
    for i, tensor in enumerate(found.tensors):
        groups = -(-tensor.channels // found.group)
        if tensor.name in names:
            raise DataError(f"at 'tensors[{i}]': {tensor.name!r} is there twice")
        names.add(tensor.name)
        for key in ("loss", "error"):
            shape = getattr(tensor, key).shape
            if shape != (count,):
                raise DataError(f"at 'tensors[{i}].{key}': expected {count} numbers, got {shape}")
        for key in ("group_loss", "group_error"):
            values = getattr(tensor, key)
            if len(values) and values.shape != (groups, count):
                raise DataError(f"at 'tensors[{i}].{key}': expected {groups} x {count} numbers, got {values.shape}")


class Accumulator:
    """Sums over samples of the values of every tensor; memory does not grow with the samples."""

    def __init__(self, tensors: Sequence[MeasuredTensor]) -> None:
        self.tensors = tensors
        self.count = 0
        self.ignored = 0  # samples that were left out, because they have no label
        self._sums: list[list[Tensor]] = []

    def add(self, values: Sequence[tuple[Tensor, Tensor]], counted: Tensor | None = None) -> None:
        """Add a batch: for each tensor the values of each sample, of the whole tensor (S, W) and of groups (S, G, W).

        Args:
            values: of each tensor.
            counted: which samples count, (S,); None: all of them.
        """
        if counted is not None:
            self.ignored += len(counted) - int(counted.sum())
            values = [(whole[rows], groups[rows]) for whole, groups in values for rows in [counted.to(whole.device)]]
        self.count += len(values[0][0])
        found = [[t for v in pair for t in (v.double().sum(0), v.double().square().sum(0))] for pair in values]
        if self._sums:
            found = [[a + b for a, b in zip(old, new, strict=True)] for old, new in zip(self._sums, found, strict=True)]
        self._sums = found

    def found(self, scale: float, reduce: Reduce | None, notes: tuple[str, ...] = ()) -> "Found":
        """Means and standard errors, over all ranks, of what was added.

        Raises:
            DataError: if nothing was.
        """
        if not self.count and self.ignored:
            raise DataError(
                f"none of {self.ignored} samples has a label: all are -100, which the cross-entropy ignores; give "
                "batches with labels, or use a metric without: Fisher(labels='model') or OutputDistortion()"
            )
        if not self.count:
            raise DataError("sensitivity got no batches: the loader is empty; give it at least one batch")
        if reduce is not None:
            self._reduce(reduce)
        tensors = tuple(
            tensor_of(tensor, *_mean_and_error(a, b, self.count, scale), *_mean_and_error(c, d, self.count, scale))
            for tensor, (a, b, c, d) in zip(self.tensors, self._sums, strict=True)
        )
        if self.ignored:
            notes = (*notes, f"{self.ignored} samples without a label do not count")
        return Found(self.count, tensors, notes)

    def _reduce(self, over_ranks: Reduce) -> None:
        """Make these the sums of all ranks."""
        flat = [t.reshape(-1) for sums in self._sums for t in sums]
        device = flat[0].device
        total = over_ranks(torch.cat([*flat, torch.tensor([float(self.count)], device=device).double()]), "sum")
        self.count = round(float(total[-1]))
        parts = iter(total[:-1].split([t.numel() for t in flat]))
        self._sums = [[next(parts).view_as(t) for t in sums] for sums in self._sums]


@dataclass(frozen=True, eq=False)
class Found:
    """What a metric has measured: number of samples, tensors, notes; terms of each tensor if they were kept."""

    samples: int
    tensors: tuple[TensorSensitivity, ...]
    notes: tuple[str, ...] = ()
    terms: Sequence[NDArray[np.float32]] | None = None


def tensor_of(
    tensor: MeasuredTensor, loss: Array, error: Array, group_loss: Array, group_error: Array
) -> TensorSensitivity:
    """The entry of a tensor."""
    role: Literal["weight", "activation"] = "weight" if tensor.is_weight else "activation"
    return TensorSensitivity(tensor.name, role, tensor.numel, tensor.channels, loss, error, group_loss, group_error)


def _mean_and_error(total: Tensor, squares: Tensor, count: int, scale: float) -> tuple[Array, Array]:
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0) / (count - 1) if count > 1 else mean * torch.nan
    return (mean * scale).cpu().numpy(), (variance.sqrt() * scale).cpu().numpy()

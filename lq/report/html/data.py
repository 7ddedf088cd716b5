"""What a report shows, as plain values: each part is there or None, and JSON goes both ways."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from lq.errors import DataError
from lq.files import parse_json, schema


@dataclass
class History:
    """What was noted while training, at some steps.

    Args:
        steps: the steps; all other lists are as long.
        rates: learning rates by optimizer.
        bits: mean widths, of "weights" and "activations".
        names: quantizers, in the order of `alpha` and `widths`.
        alpha: mean binary logarithm of each quantizer's step (its alpha), by step; None: it has no range.
        widths: mean width of each quantizer, by step.
        changed: share of the codes of each weight that are others than at the step before, by name.
        metrics: what was logged at the ends of validations and epochs: "step" and values by name.
    """

    steps: list[int] = field(default_factory=list)
    rates: dict[str, list[float]] = field(default_factory=dict)
    bits: dict[str, list[float]] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    alpha: list[list[float | None]] = field(default_factory=list)
    widths: list[list[float]] = field(default_factory=list)
    changed: dict[str, list[float]] = field(default_factory=dict)
    metrics: list[dict[str, float]] = field(default_factory=list)

    def thin(self) -> None:
        """Keep every second step."""
        series = [self.rates, self.bits, self.changed]
        self.steps, self.alpha, self.widths = self.steps[1::2], self.alpha[1::2], self.widths[1::2]
        for one in series:
            for name in one:
                one[name] = one[name][1::2]


@dataclass
class Report:
    """Everything that a page shows; None: was not measured.

    Args:
        title: name of the model.
        created: date and time.
        summary: `lq.summary(model).to_dict()`.
        channels: numbers of channels by width, of weights whose channels differ, by layer.
        accuracy: share of right classes on validation samples, by what was measured ("float", "calibrated", "final").
        accuracy_samples: how many samples.
        sensitivity: metric, widths, and the losses of each tensor at each width by name.
        allocation: what was allocated: budgets, loss, bound, metric, solver.
        pareto: mean weight bits and expected loss of allocations at rising budgets.
        chosen: mean weight bits and expected loss of the allocation in force.
        reconstruction: units with their losses, of each reconstruction.
        ranges: losses before and after ranges were optimized.
        history: what was noted while training.
        comparison: `lq.Comparison`, as values.
        files: what was exported: path and bytes.
        settings: arguments of each callback, by its name.
        environment: versions and machine.
    """

    title: str
    created: str
    summary: dict[str, Any] | None = None
    channels: dict[str, dict[str, int]] | None = None
    accuracy: dict[str, float] | None = None
    accuracy_samples: int = 0
    sensitivity: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None
    pareto: list[list[float]] | None = None
    chosen: list[float] | None = None
    reconstruction: list[dict[str, Any]] | None = None
    ranges: dict[str, Any] | None = None
    history: History | None = None
    comparison: dict[str, Any] | None = None
    files: list[dict[str, Any]] | None = None
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The report as JSON; numbers that are not finite are null."""
        return json.dumps(_finite(asdict(self)), indent=1, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json`.

        Raises:
            DataError: if `text` is something else.
        """
        try:
            values = dict(schema.read(parse_json(text), _anything))
            unknown = [key for key in values if key not in cls.__dataclass_fields__]
            if unknown or not {"title", "created"} <= values.keys():
                raise DataError(f"no key {unknown[0]!r}" if unknown else "expected 'title' and 'created'")
            history = values.get("history")
            values["history"] = None if history is None else History(**history)
            return cls(**values)
        except (DataError, TypeError) as error:
            raise DataError(f"not a saved report: {error}; give the JSON file that ReportQuantization wrote") from error


def _anything(value: Any) -> Any:
    return schema.mapping(lambda part: part)(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""What a reconstruction did: the loss of every unit before and after, curves, merges; as a table, JSON and a plot."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lq.errors import DataError
from lq.files import parse_json, schema
from lq.reconstruction.granularity import Merges
from lq.tables import Table


@dataclass(frozen=True)
class UnitReport:
    """One unit.

    Args:
        name: its modules.
        before: loss over all samples with nearest rounding.
        after: loss over all samples now.
        curve: loss of single batches on the way, evenly spaced.
        iterations: steps that were taken.
        seconds: for capturing and fitting.
    """

    name: str
    before: float
    after: float
    curve: Sequence[float]
    iterations: int
    seconds: float


@dataclass(frozen=True)
class Reconstruction:
    """All units, in the order they were fitted, and what MRECG merged."""

    units: tuple[UnitReport, ...]
    merges: Merges | None = None

    def to_json(self) -> str:
        """The report as JSON."""
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Reconstruction":
        """The inverse of `to_json`.

        Raises:
            DataError: if `text` is something else.
        """
        try:
            values = schema.read(parse_json(text), _RECONSTRUCTION)
        except DataError as error:
            raise DataError(
                f"not a saved reconstruction: {error}; write reconstruction.to_json() to the file"
            ) from error
        merges = values["merges"]
        units = tuple(UnitReport(**unit) for unit in values["units"])
        return cls(units, None if merges is None else Merges(**merges))

    def table(self) -> Table:
        """Losses by unit, ready to be shown."""
        rows = [
            (unit.name, f"{unit.before:.4g}", f"{unit.after:.4g}", str(unit.iterations), f"{unit.seconds:.1f}")
            for unit in self.units
        ]
        notes = [f"{len(self.units)} units, {sum(unit.seconds for unit in self.units):.0f} seconds"]
        if self.merges is not None:
            joined = [name for name in self.merges.merged if name not in self.merges.units]
            notes.append(f"merged by {self.merges.metric}: {', '.join(joined) or 'none'}")
            for first, second in self.merges.unchained:
                notes.append(f"not merged, since {second} reads more than the output of {first}")
        return Table(("unit", "loss before", "loss after", "iterations", "seconds"), tuple(rows), tuple(notes))

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()

    def plot(self, path: str | Path, others: Mapping[str, "Reconstruction"] | None = None) -> None:
        """Draw the loss of every unit into a file; needs matplotlib.

        Args:
            path: an image file.
            others: reconstructions of the same network to compare with, by their label.
        """
        self.figure(others).savefig(path)

    def figure(self, others: Mapping[str, "Reconstruction"] | None = None) -> Any:
        """A figure of matplotlib with the loss of every unit, as in figure 1 of MRECG's supplement.

        Args:
            others: reconstructions of the same network to compare with, by their label.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot([unit.before for unit in self.units], "o--", color="gray", label="nearest rounding")
        axes.plot([unit.after for unit in self.units], "o-", label="reconstructed")
        names = [unit.name for unit in self.units]
        for label, other in (others or {}).items():
            ends = {unit.name.rpartition("+")[2]: unit.after for unit in other.units}
            points = [
                (i, ends[name.rpartition("+")[2]]) for i, name in enumerate(names) if name.rpartition("+")[2] in ends
            ]
            axes.plot([i for i, _ in points], [loss for _, loss in points], "s-", label=label)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="x-small")
        if all(unit.after > 0 for unit in self.units):
            axes.set_yscale("log")
        axes.set_ylabel("reconstruction loss")
        axes.legend()
        return figure


# What a saved reconstruction looks like.
_NAMES = schema.array(schema.text, into=tuple)
_RECONSTRUCTION = schema.record(
    {
        "units": schema.array(
            schema.record(
                {
                    "name": schema.text,
                    "before": schema.number(),
                    "after": schema.number(),
                    "curve": schema.array(schema.number()),
                    "iterations": schema.integer(),
                    "seconds": schema.number(0),
                }
            )
        ),
        "merges": schema.optional(
            schema.record(
                {
                    "metric": schema.text,
                    "units": _NAMES,
                    "scores": schema.array(schema.number(), into=tuple),
                    "merged": _NAMES,
                    "unchained": schema.array(schema.array(schema.text, least=2, most=2, into=tuple), into=tuple),
                }
            )
        ),
    }
)

"""Tables as text and for rich, and numbers with decimal prefixes."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header, with notes below."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [self.header, *self.rows]
        widths = [max(len(row[column]) for row in rows) for column in range(len(self.header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, *self.notes])

    def __rich__(self) -> Any:
        from rich.table import Table as RichTable

        table = RichTable(*self.header, caption="\n".join(self.notes))
        for row in self.rows:
            table.add_row(*row)
        return table


def amount(value: float, unit: str) -> str:
    """A number with a decimal prefix.

    >>> amount(1234567, "B")
    '1.2 MB'
    """
    for prefix in ("", "k", "M", "G", "T"):
        if value < 1000 or prefix == "T":
            break
        value /= 1000
    return f"{value:.1f} {prefix}{unit}".strip() if prefix else f"{value:.0f} {unit}".strip()

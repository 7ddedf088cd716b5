"""Results of benchmarks: a JSON object a line, which a later run goes on from."""

import json
import statistics
from pathlib import Path
from typing import Any


def rows(path: Path) -> list[dict[str, Any]]:
    """Every line of a file; none if it is not there."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a line to a file of JSON objects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def spread(values: list[float], digits: int = 2, sign: str = "") -> str:
    """Mean, and the standard deviation if there are several."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{deviation}"

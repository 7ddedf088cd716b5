"""Draw the picture of the start page and of the README from the table in results.md, so that they say the same.

python docs/accuracy_by_width.py
"""

import re
from pathlib import Path

HERE = Path(__file__).parent
WIDTHS = ("W4A4", "W3A3", "W2A4", "W2A2")
METHODS = {"nearest": "#a3a3a3", "adaround": "#93c5fd", "qdrop": "#a78bfa", "best_ptq": "#6d28d9"}
FLOAT = 91.5


def scores(text: str) -> dict[str, dict[str, float]]:
    """Top-1 by method and width, from the first four columns of the table of reconstruction methods."""
    found: dict[str, dict[str, float]] = {}
    for method in METHODS:
        row = re.search(rf"^\| {method} \|(.*)\|$", text, flags=re.MULTILINE)
        if row is None:
            raise SystemExit(f"results.md has no row of {method}")
        cells = [cell.split() for cell in row[1].split("|")[: len(WIDTHS)]]
        found[method] = {width: float(cell[0]) for width, cell in zip(WIDTHS, cells, strict=True) if cell}
    return found


def draw(found: dict[str, dict[str, float]], path: Path) -> None:
    """Bars by width."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "lq", "svg.fonttype": "path", "font.size": 9})
    figure, axes = plt.subplots(figsize=(7.2, 2.9))
    for offset, (method, colour) in enumerate(METHODS.items()):
        places = [index + 0.2 * (offset - 1.5) for index in range(len(WIDTHS))]
        heights = [found[method].get(width, 0.0) for width in WIDTHS]
        bars = axes.bar(places, heights, 0.18, color=colour, label=method)
        boxes = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}
        axes.bar_label(bars, fmt="%.1f", fontsize=6.5, padding=2, bbox=boxes)
    axes.axhline(FLOAT, color="black", lw=0.8, ls="--", zorder=0)
    axes.text(len(WIDTHS) - 0.4, FLOAT + 1.5, f"float {FLOAT}", fontsize=7.5, ha="right")
    axes.set(ylim=(0, 104), ylabel="top-1, %")
    axes.set_xticks(range(len(WIDTHS)), WIDTHS)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(ncols=len(METHODS), loc="upper center", bbox_to_anchor=(0.5, 1.16), frameon=False, fontsize=8)
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None}, facecolor="white")
    plt.close(figure)


def main(path: Path = HERE / "_static" / "accuracy_by_width.svg") -> None:
    """Draw what results.md says."""
    draw(scores((HERE / "results.md").read_text(encoding="utf-8")), path)


if __name__ == "__main__":
    main()

"""The small parts that sections are made of: tables, cards, lists; all text is escaped."""

from collections.abc import Mapping, Sequence
from html import escape


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = (), wide: int = -1) -> str:
    """A table in a box that scrolls.

    Args:
        header: names of columns.
        rows: cells.
        numbers: columns that are set to the right.
        wide: column whose text may break.
    """

    def cell(tag: str, index: int, text: str) -> str:
        kind = "n" if index in numbers else "wide" if index == wide and tag == "td" else ""
        return f"<{tag}{f' class={kind}' if kind else ''}>{escape(text)}</{tag}>"

    head = "".join(cell("th", i, name) for i, name in enumerate(header))
    body = "".join(f"<tr>{''.join(cell('td', i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def card(title: str, content: str, note: str = "") -> str:
    """A chart or other content with a title; nothing if there is no content."""
    if not content:
        return ""
    said = f'<p class="muted">{escape(note)}</p>' if note else ""
    return f'<div class="card"><h3>{escape(title)}</h3>{content}{said}</div>'


def cards(*found: str) -> str:
    """Cards beside one another, where there is room."""
    return f'<div class="cards">{"".join(found)}</div>' if any(found) else ""


def folded(title: str, content: str) -> str:
    """Content that is shown on a click."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def pairs(values: Mapping[str, str]) -> str:
    """Names and values."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in values.items())
    return f"<dl>{items}</dl>"


def tile(value: str, label: str) -> str:
    """One number of the overview."""
    return f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span></div>'


def paragraph(text: str, *, muted: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=muted' if muted else ''}>{escape(text)}</p>"

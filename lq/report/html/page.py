"""Put a report on one HTML page: no scripts, no fonts, no images from elsewhere; its charts are SVG inside of it."""

from html import escape
from pathlib import Path

from lq.files import whole_file
from lq.report.html.data import Report
from lq.report.html.parts import paragraph
from lq.report.html.sections import SECTIONS, overview
from lq.report.html.style import STYLE


def render(report: Report) -> str:
    """The page as HTML text. Sections without data are left out; one list says what would give them.

    >>> "Not in this report" in render(Report("net", "today"))
    True
    """
    shown, missing, links = [], [], []
    for title, section, remedy in SECTIONS:
        content = section(report)
        if not content:
            missing.append(f"<li>{escape(title)}: {escape(remedy)}</li>")
            continue
        anchor = title.lower().replace(" ", "-")
        links.append(f'<a href="#{anchor}">{escape(title)}</a>')
        shown.append(f'<section><h2 id="{anchor}">{escape(title)}</h2>{content}</section>')
    if missing:
        shown.append(f"<section><h2>Not in this report</h2><ul class=muted>{''.join(missing)}</ul></section>")
    name = escape(report.title)
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}, quantized</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><style>{STYLE}</style></head>'
    )
    header = (
        f"<header><h1>{name}, quantized</h1>{paragraph(report.created, muted=True)}<nav>{''.join(links)}</nav></header>"
    )
    return f"{head}<body><main>{header}{overview(report)}{''.join(shown)}</main></body></html>\n"


def write_report(report: Report, path: str | Path) -> Path:
    """Write the page to a file, and the same as JSON beside it.

    Returns:
        The path of the JSON file.

    Raises:
        WriteError: if they cannot be written.
    """
    page = Path(path)
    data = page.with_suffix(".json")
    for target, text in ((page, render(report)), (data, report.to_json())):
        with whole_file(target) as unfinished:
            unfinished.write_text(text, encoding="utf-8")
    return data

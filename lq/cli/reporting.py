"""``lq report``: the page of a saved report again, from the JSON file beside it, with the style of this version.

For example::

    lq report quantization.json --out report.html
"""

from pathlib import Path

from lq.cli.inspecting import write
from lq.cli.usage import Parser
from lq.errors import DataError
from lq.files import named, read_text
from lq.report.html import Report, render


def run(name: str, arguments: list[str]) -> str:
    """Write the page; where it is.

    Raises:
        DataError: if the file is no report, or the page should have another ending.
    """
    parser = Parser(
        prog=f"lq {name}",
        description="Write the HTML page of a report again, from the JSON file that ReportQuantization wrote beside "
        f"it. For example: lq {name} quantization.json --out report.html",
    )
    parser.add_argument("source", type=Path, help="the JSON file of a report")
    parser.add_argument("--out", type=Path, help="HTML file to write; by default that of the JSON file's name")
    options = parser.parse_args(arguments)
    out = options.source.with_suffix(".html") if options.out is None else options.out
    if out.suffix not in (".html", ".htm"):
        raise DataError(f"--out {out}: the name should end in .html")
    text = read_text(options.source)
    with named(options.source):
        report = Report.from_json(text)
        try:
            page = render(report)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"not a saved report: a part of it is of another form ({type(error).__name__}: {error}); give the "
                "JSON file that ReportQuantization wrote"
            ) from error
    write(out, page)
    return f"{out}: {out.stat().st_size / 1e3:.0f} kB, {report.title} of {report.created}"

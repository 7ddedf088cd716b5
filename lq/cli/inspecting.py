"""``lq inspect``: what can be quantized in a model, or what is quantized in a file of one."""

from pathlib import Path

from lq.attachment.summary import summary
from lq.cli.models import built, example
from lq.cli.usage import Parser
from lq.export.loading import load
from lq.files import whole_file
from lq.structure.inspection import inspect


def run(name: str, arguments: list[str]) -> str:
    """A table of a model's operations, or of a quantized one's layers."""
    parser = Parser(
        prog=f"lq {name}",
        description="What can be quantized in a model, found by running it once on random numbers; with --source what "
        "is quantized in a file of it, with widths, bytes and bit operations.",
    )
    parser.add_argument("model", help="name of a timm model, or module:function that builds the float one")
    parser.add_argument("--model-args", nargs="*", default=[], metavar="KEY=VALUE", help="such as num_classes=10")
    parser.add_argument("--input-size", nargs="+", type=int, metavar="N", help="of one sample, such as 3 224 224")
    parser.add_argument("--source", type=Path, help="a packed file or checkpoint of the quantized model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write it as JSON")
    options = parser.parse_args(arguments)
    model = built(options.model, options.model_args, "MODEL").eval()
    sample = example(model, options.model, options.input_size)
    if options.source is None:
        structure = inspect(model, sample)
        text, as_json = str(structure), structure.to_json()
    else:
        import json

        found = summary(load(options.source, model).eval(), sample)
        text, as_json = str(found), json.dumps(found.to_dict(), indent=1)
    if options.json is not None:
        write(options.json, as_json)
    return text


def write(path: Path, text: str) -> None:
    """Write a text file as a whole.

    Raises:
        WriteError: if it cannot be written.
    """
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")

"""Files: read within limits and with errors that name the place, written whole, checked against a schema."""

from lq.files.reading import decompress as decompress
from lq.files.reading import named as named
from lq.files.reading import parse_json as parse_json
from lq.files.reading import read_checkpoint as read_checkpoint
from lq.files.reading import read_text as read_text
from lq.files.reading import require_file as require_file
from lq.files.writing import file_for_torch as file_for_torch
from lq.files.writing import whole_file as whole_file

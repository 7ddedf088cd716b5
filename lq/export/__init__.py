"""Out of the Trainer: integer weights, packed files, ONNX and torch.export."""

from lq.export.formats import FORMATS as FORMATS
from lq.export.integers import IntegerWeight as IntegerWeight
from lq.export.integers import integer_weights as integer_weights
from lq.export.onnx import OnnxReport as OnnxReport
from lq.export.onnx import export_onnx as export_onnx
from lq.export.packed import save as save
from lq.export.program import Example as Example
from lq.export.program import export_program as export_program

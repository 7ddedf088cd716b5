"""lq: quantization for models trained with PyTorch Lightning.

Functions here never import Lightning; the callbacks that bring them into a Trainer are in `lq.callbacks`.
"""

from lq.attach import attach as attach
from lq.attach import detach as detach
from lq.attach import set_bits as set_bits
from lq.attach import set_estimator as set_estimator
from lq.bit_allocation import Allocation as Allocation
from lq.bit_allocation import allocate as allocate
from lq.budget import Latency as Latency
from lq.calibration import calibrate as calibrate
from lq.checkpoint import load as load
from lq.errors import BudgetError as BudgetError
from lq.errors import DataError as DataError
from lq.errors import DivergenceError as DivergenceError
from lq.errors import DivergenceWarning as DivergenceWarning
from lq.errors import LqError as LqError
from lq.errors import NoEffectWarning as NoEffectWarning
from lq.errors import PatternError as PatternError
from lq.errors import RecipeError as RecipeError
from lq.errors import SpecError as SpecError
from lq.errors import StateError as StateError
from lq.errors import WriteError as WriteError
from lq.export import IntegerWeight as IntegerWeight
from lq.export import OnnxReport as OnnxReport
from lq.export import export_onnx as export_onnx
from lq.export import export_program as export_program
from lq.export import integer_weights as integer_weights
from lq.export import save as save
from lq.folding import fold_batchnorm as fold_batchnorm
from lq.inspection import inspect as inspect
from lq.loss_aware import optimize_ranges as optimize_ranges
from lq.recipe import recipe as recipe
from lq.recipe import recipe_names as recipe_names
from lq.reconstruction import Reconstruction as Reconstruction
from lq.reconstruction import reconstruct as reconstruct
from lq.report import summary as summary
from lq.sensitivity import Sensitivity as Sensitivity
from lq.sensitivity import measure_sensitivity as measure_sensitivity
from lq.spec import QuantSpec as QuantSpec
from lq.structure import Structure as Structure
from lq.synthesis import synthesize as synthesize

__version__ = "0.1.0"

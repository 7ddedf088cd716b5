"""lq: quantization for models trained with PyTorch Lightning.

Functions here never import Lightning; the callbacks that bring them into a Trainer are in `lq.callbacks`.

`import lq` loads nothing but this file: a name is imported when it is first used (as in SPEC 1 of scientific Python).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lq import callbacks as callbacks
    from lq import errors as errors
    from lq import sites as sites
    from lq.allocation.allocate import Allocation as Allocation
    from lq.allocation.allocate import allocate as allocate
    from lq.allocation.budget import Latency as Latency
    from lq.attachment.attach import attach as attach
    from lq.attachment.attach import detach as detach
    from lq.attachment.attach import set_bits as set_bits
    from lq.attachment.attach import set_estimator as set_estimator
    from lq.attachment.folding import fold_batchnorm as fold_batchnorm
    from lq.attachment.preparation.prepare import Preparation as Preparation
    from lq.attachment.preparation.prepare import prepare as prepare
    from lq.attachment.summary import summary as summary
    from lq.calibration.calibration import calibrate as calibrate
    from lq.calibration.loss_aware import optimize_ranges as optimize_ranges
    from lq.calibration.synthesis import synthesize as synthesize
    from lq.configuration.recipe import recipe as recipe
    from lq.configuration.recipe import recipe_names as recipe_names
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
    from lq.export.loading import load as load
    from lq.quantizer.spec import QuantSpec as QuantSpec
    from lq.reconstruction import Reconstruction as Reconstruction
    from lq.reconstruction import reconstruct as reconstruct
    from lq.report.comparison import Comparison as Comparison
    from lq.report.comparison import compare as compare
    from lq.sensitivity import Sensitivity as Sensitivity
    from lq.sensitivity import measure_sensitivity as measure_sensitivity
    from lq.structure.inspection import inspect as inspect
    from lq.structure.structure import Structure as Structure

# Where each public name is; a test compares it with the imports above.
_HOME = {
    "Comparison": "lq.report.comparison",
    "compare": "lq.report.comparison",
    "allocate": "lq.allocation.allocate",
    "Allocation": "lq.allocation.allocate",
    "attach": "lq.attachment.attach",
    "BudgetError": "lq.errors",
    "calibrate": "lq.calibration.calibration",
    "DataError": "lq.errors",
    "detach": "lq.attachment.attach",
    "DivergenceError": "lq.errors",
    "DivergenceWarning": "lq.errors",
    "export_onnx": "lq.export",
    "export_program": "lq.export",
    "fold_batchnorm": "lq.attachment.folding",
    "inspect": "lq.structure.inspection",
    "integer_weights": "lq.export",
    "IntegerWeight": "lq.export",
    "Latency": "lq.allocation.budget",
    "load": "lq.export.loading",
    "LqError": "lq.errors",
    "measure_sensitivity": "lq.sensitivity",
    "NoEffectWarning": "lq.errors",
    "OnnxReport": "lq.export",
    "optimize_ranges": "lq.calibration.loss_aware",
    "PatternError": "lq.errors",
    "Preparation": "lq.attachment.preparation.prepare",
    "prepare": "lq.attachment.preparation.prepare",
    "QuantSpec": "lq.quantizer.spec",
    "recipe": "lq.configuration.recipe",
    "recipe_names": "lq.configuration.recipe",
    "RecipeError": "lq.errors",
    "reconstruct": "lq.reconstruction",
    "Reconstruction": "lq.reconstruction",
    "save": "lq.export",
    "Sensitivity": "lq.sensitivity",
    "set_bits": "lq.attachment.attach",
    "set_estimator": "lq.attachment.attach",
    "SpecError": "lq.errors",
    "StateError": "lq.errors",
    "Structure": "lq.structure.structure",
    "summary": "lq.attachment.summary",
    "synthesize": "lq.calibration.synthesis",
    "WriteError": "lq.errors",
}

# Modules that are there without an import of their own.
_MODULES = ("callbacks", "errors", "sites")

__all__ = ["__version__", *_HOME, *_MODULES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"lq.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'lq' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_MODULES})

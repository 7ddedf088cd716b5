"""Lightning callbacks that bring quantization into an existing Trainer; one hook story per file."""

if __name__ != "lq.callbacks":
    raise ImportError(f"these callbacks are the package 'lq.callbacks', not {__name__!r}; import them from there")

from lq.callbacks.allocate import AllocateBits as AllocateBits
from lq.callbacks.compare_to_float import CompareToFloat as CompareToFloat
from lq.callbacks.export import ExportModel as ExportModel
from lq.callbacks.finetune import FineTune as FineTune
from lq.callbacks.freeze_oscillations import FreezeOscillations as FreezeOscillations
from lq.callbacks.loading import load_from_checkpoint as load_from_checkpoint
from lq.callbacks.noise_scale import LearnNoiseScale as LearnNoiseScale
from lq.callbacks.optimize_ranges import OptimizeRanges as OptimizeRanges
from lq.callbacks.quantize import Quantize as Quantize
from lq.callbacks.recipe import Recipe as Recipe
from lq.callbacks.reconstruct import Reconstruct as Reconstruct
from lq.callbacks.reconstruct_mlp import ReconstructMLP as ReconstructMLP
from lq.callbacks.reduce_bits import ReduceBits as ReduceBits
from lq.callbacks.report_quantization import ReportQuantization as ReportQuantization
from lq.callbacks.synthesize import SynthesizeData as SynthesizeData

"""AdaRound of AIMET."""

import os
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from peer_job import RANGE_IMAGES, Job, layers_of, tool


def aimet_adaround(job: Job) -> None:
    """AIMET: weights rounded first, then a simulation that has them."""
    aimet = tool("aimet_torch")
    rounding, common = tool("aimet_torch.adaround.adaround_weight"), tool("aimet_torch.common.defs")
    optimizer = tool("aimet_torch._base.adaround.adaround_optimizer")
    optimizer.BATCH_SIZE = job.options.batch_size
    inner = optimizer.AdaroundOptimizer._optimize_rounding.__func__

    def timed(*arguments: Any, **more: Any) -> None:
        with job.timed("reconstruction"):
            inner(*arguments, **more)

    optimizer.AdaroundOptimizer._optimize_rounding = classmethod(timed)
    config = os.path.join(os.path.dirname(aimet.__file__), "common/quantsim_config/default_config_per_channel.json")
    example, options = job.images[:1].clone(), job.options
    model = tool("aimet_torch.model_preparer").prepare_model(job.net).eval()
    tool("aimet_torch.batch_norm_fold").fold_all_batch_norms(model, example.shape, dummy_input=example)
    scheme = common.QuantScheme.post_training_tf_enhanced
    layers = layers_of(model)
    selected = layers[: options.layers or None]
    ignored = [module for _, module in layers[len(selected) :]]
    wide = [(module, 8) for module in (layers[0][1], layers[-1][1]) if module not in ignored]
    batches = job.batches()
    parameters = rounding.AdaroundParameters(batches, len(batches), options.iterations)
    with tempfile.TemporaryDirectory() as folder:
        with job.timed("ranges"):
            rounded = rounding.Adaround.apply_adaround(
                model,
                example,
                parameters,
                folder,
                "found",
                default_param_bw=options.weights,
                param_bw_override_list=wide,
                ignore_quant_ops_list=ignored or None,
                default_quant_scheme=scheme,
                default_config_file=config,
            )
        for suffix in ("", "_cpu"):
            job.found[f"ranges{suffix}"] -= job.found[f"reconstruction{suffix}"]
        job.found["units"] = len(selected)
        if ignored:  # no top-1: of the other layers AIMET leaves no quantizer
            return
        simulation = tool("aimet_torch.quantsim").QuantizationSimModel(
            rounded,
            dummy_input=example,
            quant_scheme=scheme,
            default_param_bw=options.weights,
            default_output_bw=options.activations,
            config_file=config,
        )
        modules = dict(simulation.model.named_modules())
        for name, _ in (layers[0], layers[-1]):
            modules[name].param_quantizers["weight"].bitwidth = 8
        simulation.set_and_freeze_param_encodings(f"{folder}/found.encodings")
    with job.timed("ranges"):
        simulation.compute_encodings(lambda m, _: _run(m, job.batches(RANGE_IMAGES)), None)
    job.score(simulation.model)


@torch.no_grad()
def _run(model: nn.Module, batches: list[Tensor]) -> None:
    for batch in batches:
        model(batch)

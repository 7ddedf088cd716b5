"""QDrop's published code."""

import copy
import logging
import sys

import torch

from peer_job import RANGE_IMAGES, Job, tool


def qdrop(job: Job) -> None:
    """QDrop's published code, unchanged: its folding, quantizers, observers, reconstruction and their order.

    timm's blocks get the names of activations that its own have, and the classifier comes last among the children.
    """
    options = job.options
    sys.path[:0] = [str(options.code), f"{options.code}/qdrop/solver"]
    solver, recon, network = tool("main_imagenet"), tool("recon"), tool("qdrop.model")
    state, quantized = tool("qdrop.quantization.state"), tool("qdrop.quantization.quantized_module")
    block, net = tool("timm.models.resnet").BasicBlock, job.net
    logging.disable(logging.INFO)
    tool("imagenet_utils").set_seed(options.seed)
    for module in net.modules():
        if isinstance(module, block):
            module.relu1, module.relu2 = module.act1, module.act2
    network.specials[block] = network.QuantBasicBlock
    net.add_module("fc", net._modules.pop("fc"))  # the last child is the one whose output stays float
    dictionary = tool("easydict").EasyDict
    config = dictionary(
        a_qconfig={
            "quantizer": "LSQFakeQuantize",
            "observer": "MSEObserver",
            "bit": options.activations,
            "symmetric": False,
            "ch_axis": -1,
        },
        w_qconfig={
            "quantizer": "AdaRoundFakeQuantize",
            "observer": "MSEObserver",
            "bit": options.weights,
            "symmetric": False,
            "ch_axis": 0,
        },
        recon={
            "batch_size": options.batch_size,
            "scale_lr": 4e-5,
            "warm_up": 0.2,
            "weight": 0.01,
            "iters": options.iterations,
            "b_range": [20, 2],
            "keep_gpu": True,
            "round_mode": "learned_hard_sigmoid",
            "drop_prob": 0.5,
        },
    )
    tool("fold_bn").search_fold_and_remove_bn(net)
    model = solver.quantize_model(net, config).eval()
    whole = copy.deepcopy(model)
    state.disable_all(whole)
    with job.timed("ranges"), torch.no_grad():
        state.enable_calibration_woquantization(model, quantizer_type="act_fake_quant")
        model(job.images[:RANGE_IMAGES])
        state.enable_calibration_woquantization(model, quantizer_type="weight_fake_quant")
        model(job.images[:2])
    state.enable_quantization(model)
    job.score(model, "nearest")
    kinds = (quantized.QuantizedLayer, quantized.QuantizedBlock)
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, kinds) and not any(name.startswith(f"{outer}.") for outer in names):
            names.append(name)
    with job.timed("reconstruction"):
        for name in names:
            unit, target = model.get_submodule(name), whole.get_submodule(name)
            recon.reconstruction(model, whole, unit, target, job.images, config.recon)
    job.found["units"] = len(names)
    state.enable_quantization(model)
    job.score(model)

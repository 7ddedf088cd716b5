"""One tool's reconstruction of a real network, timed: what `reconstruction.py` runs in each tool's own environment.

    PYTHON examples/benchmarks/reconstruction_peers.py TOOL --model NAME --iterations N ...

PYTHON needs torch, timm, safetensors, Pillow and the tool (lq, aimet-torch, brevitas with its examples, or what QDrop's
code imports), and LQ_DATA is the folder with real weights and images. The last line printed is a JSON object: seconds
and process CPU seconds of finding ranges and of reconstruction, the number of units, top-1 in percent.

All tools get the same float network, images, widths, iterations and batch size; the first and last layers have 8 bits.
For AdaRound weights are symmetric per channel; for QDrop they have zero points, and activations of skip paths are
quantized. "ranges" and "reconstruction" are cut alike as far as the tools allow: AIMET's ranges include its analysis of
the network's graph. AIMET has no ranges of activations, and no tool a top-1, where only some layers are reconstructed.
"""

import argparse
import copy
import importlib
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

RANGE_IMAGES = 256


def tool(name: str) -> Any:
    """A module of a tool, which type checkers need not know."""
    return importlib.import_module(name)


@dataclass
class Job:
    """A network, its images, and what was measured so far."""

    options: argparse.Namespace
    net: nn.Module
    images: Tensor
    test: tuple[Tensor, Tensor] | None
    found: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add to the seconds of `what`."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        for key, seconds in ((what, time.perf_counter() - wall), (f"{what}_cpu", time.process_time() - cpu)):
            self.found[key] = self.found.get(key, 0.0) + seconds

    @torch.no_grad()
    def score(self, model: nn.Module, what: str = "top1") -> None:
        """Note top-1 on the test images, if there are some."""
        if self.test is not None:
            images, labels = self.test
            hits = [model.eval()(x).argmax(1) == y for x, y in zip(images.split(100), labels.split(100), strict=True)]
            self.found[what] = round(100 * torch.cat(hits).double().mean().item(), 3)

    def batches(self, count: int | None = None) -> list[Tensor]:
        """The first `count` images in batches."""
        return list(self.images[:count].split(self.options.batch_size))


def job_of(options: argparse.Namespace) -> Job:
    """The network in plain layers, and images: exact CIFAR-10 or ImageNet."""
    sys.path.insert(0, os.environ["LQ_DATA"])
    import pack

    net, card = pack.load_model(options.model)
    if card["input_size"] <= 32:
        (pixels, _), (others, labels) = pack.cifar10("train"), pack.cifar10("test")
        test = pack.cifar_tensor(others, card), torch.from_numpy(labels)
        return Job(options, net, pack.cifar_tensor(pixels[: options.images], card), None if options.layers else test)
    images = pack.ImageSet("calib_ilsvrc_train", card)
    chosen = torch.stack([images[i][0] for i in range(options.images)])
    return Job(options, plain(net, card["input_size"]), chosen, None)


def plain(net: nn.Module, size: int) -> nn.Module:
    """The same function without the classes of timm that tracing by torch.fx cannot follow.

    Convolutions that pad by the size of the image get fixed padding, and BatchNorms their activation as a module.
    """
    from timm.layers.conv2d_same import Conv2dSame
    from timm.layers.norm_act import BatchNormAct2d
    from timm.layers.padding import get_same_padding

    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def note(module: nn.Module, inputs: Any) -> None:
        shapes[module] = inputs[0].shape[-2:]

    handles = [m.register_forward_pre_hook(note) for m in net.modules() if isinstance(m, Conv2dSame)]
    with torch.no_grad():
        net(torch.zeros(1, 3, size, size))
    for handle in handles:
        handle.remove()
    for name, old in list(net.named_modules()):
        new: nn.Sequential | None = None
        if isinstance(old, Conv2dSame):
            sides = zip(shapes[old], old.kernel_size, old.stride, old.dilation, strict=True)
            high, wide = (get_same_padding(*side) for side in sides)
            conv: Any = nn.Conv2d(old.in_channels, old.out_channels, 1, groups=old.groups, bias=old.bias is not None)
            conv.kernel_size, conv.stride, conv.dilation = old.kernel_size, old.stride, old.dilation
            conv.weight = old.weight
            conv.load_state_dict(old.state_dict())
            new = nn.Sequential(nn.ZeroPad2d((wide // 2, wide - wide // 2, high // 2, high - high // 2)), conv)
        elif isinstance(old, BatchNormAct2d):
            norm = nn.BatchNorm2d(old.num_features, old.eps)
            norm.load_state_dict(old.state_dict(), strict=False)
            new = nn.Sequential(norm, old.act)
        if new is not None:
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, new)
    return net.eval()


def layers_of(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """All convolutions and linear layers."""
    return [(name, m) for name, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]


# --- AdaRound --------------------------------------------------------------------------------------------------------


def lq_adaround(job: Job) -> None:
    """`lq.reconstruct`, a layer at a time."""
    lq_reconstruct(job, units="layer", drop=0.0, activation_mode="float", symmetric=True, skip=False)


def lq_qdrop(job: Job) -> None:
    """`lq.reconstruct` as in the recipe qdrop."""
    lq_reconstruct(job, units="block", drop=0.5, activation_mode="learned", symmetric=False, skip=True)


def lq_reconstruct(job: Job, *, units: str, drop: float, activation_mode: str, symmetric: bool, skip: bool) -> None:
    """Fold, attach, calibrate, reconstruct."""
    lq, options = tool("lq"), job.options
    model = job.net
    lq.fold_batchnorm(model)
    names = [name for name, _ in layers_of(model)][: options.layers or None]
    structure = lq.inspect(model, job.images[:2])
    with job.timed("ranges"):
        lq.attach(model, options.weights, options.activations, structure=structure, symmetric=symmetric, skip=skip)
        lq.calibrate(model, job.batches(RANGE_IMAGES))
    job.score(model, "nearest")
    with job.timed("reconstruction"):
        found = lq.reconstruct(
            model,
            job.batches(),
            units=names if options.layers else units,
            drop=drop,
            activation_mode=activation_mode,
            iterations=options.iterations,
            batch_size=options.batch_size,
            seed=options.seed,
        )
    job.found["units"] = len(found.units)
    job.score(model)


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
    kept = layers[: options.layers or None]
    ignored = [module for _, module in layers[len(kept) :]]
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
        job.found["units"] = len(kept)
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


def brevitas_adaround(job: Job) -> None:
    """Brevitas' learned rounding (its ImageNet example), a layer at a time, with AdaRound's rounding and penalty."""
    import torch.utils.data

    common = tool("brevitas_examples.imagenet_classification.ptq.ptq_common")
    learned = tool("brevitas_examples.imagenet_classification.ptq.learned_round_utils")
    trainer = tool("brevitas_examples.common.learned_round.learned_round_trainer")
    layer = tool("brevitas.nn.quant_layer").QuantWeightBiasInputOutputLayer
    options, net = job.options, job.net
    fold(net)
    with job.timed("ranges"), torch.no_grad():
        model = common.quantize_model(
            net,
            backend="layerwise",
            weight_bit_width=options.weights,
            act_bit_width=options.activations,
            bias_bit_width=None,
            weight_quant_granularity="per_channel",
            act_quant_percentile=99.999,
            act_quant_type="sym",
            scale_factor_type="float_scale",
            quant_format="int",
            layerwise_first_last_bit_width=8,
            weight_param_method="mse",
            act_param_method="stats",
            weight_quant_type="sym",
        ).eval()
        last = [module for module in model.modules() if isinstance(module, layer)][-1].weight_quant
        last.quant_injector = last.quant_injector.let(bit_width=8)  # by itself only for 1 000 classes
        last.init_tensor_quant(preserve_state_dict=True)
        model(job.images[:2])
        common.calibrate([(batch, None) for batch in job.batches(RANGE_IMAGES)], model)
    job.score(model, "nearest")
    config = learned.parse_args_to_dataclass(
        SimpleNamespace(
            learned_round="hard_sigmoid",
            learned_round_lr_scheduler=None,
            learned_round_iters=options.iterations,
            learned_round_lr=1e-3,
            learned_round_loss="regularised_mse",
            learned_round_batch_size=options.batch_size,
            learned_round_mode="layerwise",
        )
    )
    config.training_args.use_amp = False  # half precision is slow on a CPU
    for loss in config.training_args.losses_args:
        if loss.cls.__name__ == "RoundRegularisationLoss":  # its schedule is of 1 000 steps, whatever is asked
            loss.kwargs = {**(loss.kwargs or {}), "max_count": options.iterations}
    blocks = learned.get_blocks(model, block_check_fn=learned.is_layer)
    kept = [block for block in blocks if list(block.parameters())][: options.layers or None]
    labels = torch.zeros(len(job.images))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(job.images, labels), options.batch_size)
    trainer.tqdm = partial(trainer.tqdm, disable=True)
    with job.timed("reconstruction"):
        trainer.LearnedRoundTrainer(config=config).train(
            model=model,
            model_forward=learned.vision_forward,
            block_forward=learned.vision_block_forward,
            data_loader=data,
            cache=learned.CacheVision(),
            get_blocks_fn=lambda _: kept,
            keep_gpu=True,
        )
    job.found["units"] = len(kept)
    job.score(model)


def fold(module: nn.Module) -> None:
    """Fold each BatchNorm into the convolution before it; both may be part of a Sequential that `plain` has made."""
    conv: tuple[nn.Module, str] | None = None
    for parent, name, part in [*_leaves(module)]:
        if isinstance(part, nn.BatchNorm2d) and conv is not None:
            before = conv[0].get_submodule(conv[1])
            setattr(*conv, nn.utils.fuse_conv_bn_eval(before, part))  # type: ignore[type-var]
            setattr(parent, name, nn.Identity())
        conv = (parent, name) if isinstance(part, nn.Conv2d) else None


def _leaves(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Modules without children, with the module and the name they belong to."""
    for name, child in module.named_children():
        if any(child.children()):
            yield from _leaves(child)
        else:
            yield module, name, child


# --- QDrop -----------------------------------------------------------------------------------------------------------


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


TOOLS: dict[str, Callable[[Job], None]] = {
    "lq_adaround": lq_adaround,
    "aimet": aimet_adaround,
    "brevitas": brevitas_adaround,
    "lq_qdrop": lq_qdrop,
    "qdrop": qdrop,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("--model", default="cifar10_resnet20")
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--activations", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=200, help="steps for a unit")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--layers", type=int, default=0, help="only the first layers; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--code", help="checkout of QDrop's repository")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(options.seed)
    job = job_of(options)
    job.score(job.net, "float")
    TOOLS[options.tool](job)
    print(json.dumps(job.found))


if __name__ == "__main__":
    main()

"""Learned rounding of Brevitas."""

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

from torch import nn

from peer_job import RANGE_IMAGES, Job, tool


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
    selected = [block for block in blocks if list(block.parameters())][: options.layers or None]
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
            get_blocks_fn=lambda _: selected,
            keep_gpu=True,
        )
    job.found["units"] = len(selected)
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

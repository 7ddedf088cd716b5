"""Ranges for other widths than those a model has: what a change of width in the middle of training goes by."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from lq.attachment.sites import activation_quantizers, float_weight, quantizers, weight_quantizer
from lq.quantizer.log_quantizer import LogQuantizer
from lq.quantizer.quantizer import Quantizer
from lq.quantizer.ranges import Samples


def samples_of(model: nn.Module) -> Iterator[tuple[Quantizer, Samples, bool]]:
    """Each quantizer whose values are known, those values, and whether they have both signs.

    Weights have them; activations, if `lq.calibrate` has seen them since the model was made.
    """
    for module in model.modules():
        quantizer, weight = weight_quantizer(module), float_weight(module)
        if quantizer is not None and weight is not None:
            yield quantizer, *quantizer.samples(weight)
    for site in activation_quantizers(model).values():
        if site.seen is not None:
            yield site, *site.samples()


@torch.no_grad()
def fitted_steps(model: nn.Module, most: int) -> dict[str, Tensor]:
    """Logarithm of the step that fits each activation at 1 to `most` bits, by name; shape (most,)."""
    sites = activation_quantizers(model).items()  # the range of levels that halve is the same at any width
    known = {n: site for n, site in sites if site.seen is not None and not isinstance(site, LogQuantizer)}
    return {name: torch.log2(site.grids(range(1, most + 1))[0]) for name, site in known.items()}


@torch.no_grad()
def change_widths(model: nn.Module, widths: Mapping[str, Tensor], fitted: Mapping[str, Tensor]) -> None:
    """Change widths in the middle of training: a learned step changes as fitted ones do.

    Its ratio to the step that fits the old width becomes its ratio to the one that fits the new width. Without the
    fitted steps of an activation its range is kept.

    Args:
        model: a model with quantizers.
        widths: new widths by name of quantizer, shaped like its ``bits``.
        fitted: what `fitted_steps` found.
    """
    changing = {q.name: q for q in quantizers(model) if q.name in widths and not torch.equal(q.bits, widths[q.name])}
    for quantizer, samples, signed in samples_of(model):
        if quantizer.is_weight and quantizer.name in changing:
            steps = []
            for bits in (quantizer.bits, widths[quantizer.name]):
                found, _ = quantizer.grid(samples, signed, bits.detach().reshape(-1), weights=True)
                steps.append(torch.log2(found).view(quantizer.log2_step.shape))
            _change(changing.pop(quantizer.name), widths[quantizer.name], steps)
    for name, quantizer in changing.items():
        both = (quantizer.bits.detach(), widths[name]) if name in fitted else ()
        _change(quantizer, widths[name], [fitted[name][int(bits) - 1] for bits in both])


def _change(quantizer: Quantizer, widths: Tensor, steps: list[Tensor]) -> None:
    """Change widths, and the step from what fitted to what fits."""
    learned = quantizer.log2_step - steps[0] if steps else None
    quantizer.settle(widths)
    if learned is not None:
        quantizer.log2_step.copy_(steps[1] + learned)


@torch.no_grad()
def fit_ranges(model: nn.Module, targets: Mapping[str, float], head: float) -> None:
    """Have quantizers above their targets begin with the range that fits the target, and `head` bits more at most.

    The range that is best for many levels is too wide for few, and bits further up cost next to nothing.

    Args:
        model: a model with quantizers, calibrated.
        targets: widths in bits, by name of quantizer.
        head: in bits.
    """
    for quantizer, samples, signed in samples_of(model):
        target = targets.get(quantizer.name, 0)
        if not target or not bool((quantizer.bits > target).all()):
            continue
        begin = quantizer.bits.detach().clamp(max=target + head)
        quantizer.bits.fill_(target)
        step, zero_point = quantizer.grid(samples, signed, quantizer.bits.reshape(-1), weights=quantizer.is_weight)
        quantizer.log2_step.copy_(torch.log2(step).view(quantizer.log2_step.shape))
        quantizer.zero_point.copy_(zero_point.view(quantizer.zero_point.shape))
        quantizer.settle(begin)

"""Compare a quantized network with the float one, layer by layer: which layers lose, and what by.

Each batch runs once through the float network (the same modules, no quantizer rounds) and once through the quantized
one. While the float network runs, each layer is run a second time on its float input with its own quantizers on: that
is the layer *alone*. Its float outputs are kept until the quantized network has come to the same place: that is the
layer *with* all before it quantized. What is kept is of one batch, within a limit of memory; sums over batches are all
that is left of it (`lq.report.comparison.closeness`). AIMET's QuantAnalyzer and MCT's XQuant tell the like, running the
network once for each layer.

An activation's range is found behind quantized layers. Where the float values go further (a massive value that a bad
layer has lost), clipping them is no loss of the layer's own: alone, its grid is widened in proportion.

Layers are compared by what they return, products that functions compute (attention, `nn.MultiheadAttention`, weights
that are used without calling their layer) by their results, results on skip paths by themselves. Fused attention is one
call, under the name of its second product.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from lq.attachment.float_models import copy_model, float_model
from lq.attachment.float_view import as_float
from lq.attachment.padded import padded
from lq.attachment.sites import is_attached, quantizers, require_attached
from lq.calibration.calibration import needs_calibration
from lq.errors import DataError, StateError
from lq.quantizer.histogram import Reduce
from lq.reconstruction.storage import memory_in_bytes
from lq.report.comparison.result import Comparison
from lq.report.comparison.runs import ComparedRuns
from lq.structure.forward import Forward, run
from lq.structure.recomputation import without_recomputation
from lq.structure.samples import batch_size


def compare(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    forward: Forward | None = None,
    reduce: Reduce | None = None,
    memory: str | float = "1GB",
) -> Comparison:
    """Compare all layers of a quantized model with the float ones: SQNR, cosine and KL.

    `lq.report.comparison.closeness` defines the three.

    Costs one forward of the float and one of the quantized model for each batch, and one more run of each layer.

    Args:
        model: a model with quantizers; runs in eval mode without gradients, is left as it was.
        batches: any iterable of batches, read once. Labels are not used.
        reference: the float network before its weights were changed by reconstruction or training, with the same
            BatchNorms folded; by default `model` itself without rounding, which has the weights of now: those that a
            reconstruction leaves are levels already, and lose nothing by being rounded.
        forward: called with the model and a batch; by default as for `lq.calibrate`.
        reduce: combines a tensor over ranks: called with it and "sum".
        memory: limit for the float outputs of one batch; of those that do not fit, evenly spaced values are compared.

    Returns:
        A `Comparison`, whose first layer is the one that loses most by itself.

    Raises:
        StateError: if the model has no quantizers, or is not calibrated.
        DataError: if there are no batches, the model does not take one, a tensor in it has NaN or Inf, or `reference`
            is another network.
        SpecError: if `memory` is no size.

    >>> import lq
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    >>> model = lq.attach(model, 8, overrides={"2": {"weights": 2}})
    >>> compare(model, [torch.randn(16, 8)]).layers[0].name
    '2'
    """
    require_attached(model, "lq.compare")
    if needs_calibration(model):
        raise StateError("lq.compare needs calibrated quantizers; run lq.calibrate(model, batches) first")
    if reference is None:
        given = model
    else:
        given = reference if is_attached(reference) else float_reference(model, reference.state_dict())
        _require_same(model, given)
    work = ComparedRuns(model, given, memory_in_bytes(memory))
    samples = 0
    with ExitStack() as stack:
        for context in (float_model(model), float_model(given), padded(model, given), torch.no_grad()):
            stack.enter_context(context)
        stack.enter_context(without_recomputation(model, given))
        stack.enter_context(work.hooked())
        for batch in batches:
            samples += batch_size(batch)
            work.batch(lambda which, batch=batch: run(which, batch, forward))  # type: ignore[misc]
        if not samples and reduce is None:
            raise DataError("lq.compare got no batches: the loader is empty; give it at least one batch")
        work.add_uncalled_weights()
    return work.result(samples, reduce)


def float_reference(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a quantized model with other float weights, to give to `compare`.

    Args:
        model: a model with quantizers.
        weights: state dict of the float network.

    Raises:
        DataError: if a parameter or buffer is missing or of another shape.
    """
    copied = copy_model(model)
    ours = {id(t) for q in quantizers(copied) for t in [*q.parameters(), *q.buffers()]}
    with as_float(copied), torch.no_grad():
        for name, tensor in [*copied.named_parameters(), *copied.named_buffers()]:
            if id(tensor) in ours:
                continue
            found = weights.get(name)
            if found is None or found.shape != tensor.shape:
                what = "lacks it" if found is None else f"has {tuple(found.shape)} there"
                raise DataError(
                    f"the reference is another network: {name} has the shape {tuple(tensor.shape)}, the reference "
                    f"{what}; give the float network that was quantized, its BatchNorms folded alike "
                    "(lq.fold_batchnorm)"
                )
            tensor.copy_(found)
    return copied


def _require_same(model: nn.Module, reference: nn.Module) -> None:
    names, others = ([q.name for q in quantizers(one)] for one in (model, reference))
    if names != others:
        different = next(iter(sorted(set(names) ^ set(others))), "the order")
        raise DataError(
            f"the reference has other quantizers than the model ({different}); give the float network, or a copy of "
            "the model made before its weights changed"
        )

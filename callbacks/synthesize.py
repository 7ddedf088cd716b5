"""Calibrate without data: images made from the network's BatchNorm statistics take the place of the Trainer's loader.

``setup`` keeps a float copy of the module, before `Quantize` folds BatchNorms and attaches quantizers. Images are made
from it when the first data-dependent stage of lq asks for batches, on the module's device, each rank its own share; a
run that finds all in its checkpoint makes none.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from typing_extensions import override

from lq.attachment.float_models import float_copy
from lq.attachment.sites import common_module, is_attached, layers
from lq.calibration.batchnorm import batchnorms
from lq.calibration.synthesis import check_sizes, require_statistics, synthesize
from lq.callbacks.quantize import Quantize
from lq.callbacks.trainer.bars import progress_of
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.errors import SpecError, StateError


class SynthesizeData(ModuleCallback):
    """Make images from the network itself, and have every stage of lq read them instead of training data.

    Put it before `Quantize`. With ``Trainer(max_epochs=0)`` no loader is needed, and one that is given is not touched.
    Batches are ``[images]``, without labels, normalised as the module's forward takes them; its transfer hooks do not
    run. Sensitivity is measured without labels by "model_fisher", "output_distortion" and "kl".

    Args:
        shape: shape of one image, such as ``(3, 224, 224)``; None: that of the module's ``example_input_array``.
        samples: images to make, over all ranks; stages that ask for more get these.
        iterations: steps of Adam on each batch; quality is bought with time here.
        batch_size: images that have the network's statistics together.
        seed: the images depend on it, and not on the global random state.

    Afterwards ``images`` are those of this rank, on the CPU, shape ``(N, *shape)``.

    Example::

        Trainer(max_epochs=0, callbacks=[SynthesizeData((3, 32, 32)), Quantize(4, 4)]).fit(module)
    """

    def __init__(
        self,
        shape: Sequence[int] | None = None,
        samples: int = 1024,
        iterations: int = 500,
        *,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(samples=samples, batch_size=batch_size, iterations=iterations)
        self.shape = shape
        self.samples = samples
        self.iterations = iterations
        self.batch_size = batch_size
        self.seed = seed

    @override
    def _begin(self) -> None:
        self.images: Tensor | None = None
        self._copy: nn.Module | None = None
        self._source: int | None = None  # fingerprint of the statistics that images come from

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Copy the float module, once; keep the Trainer from its loader if it is not going to train."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._check_order(trainer)
        if trainer.max_epochs == 0:  # Lightning asks for a loader, and its length, even if it reads nothing from it
            trainer.fit_loop._data_source = _DataLoaderSource(range(10**6), "")
        if self.images is not None or self._copy is not None or is_attached(pl_module):
            return
        if is_overridden("configure_model", pl_module) or not any(layers(pl_module)):
            self._copy_after_configuring(pl_module)
        else:
            self._keep_copy(pl_module)

    @override
    def state_dict(self) -> dict[str, Any]:
        """A fingerprint of the statistics that images come from; images can be made again."""
        return {"source": self._source}

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Forget the copy unless the checkpoint began with the same network: its BatchNorms are no longer in it."""
        if checkpoint["callbacks"].get(self.state_key, {}).get("source") != self._source:
            self._copy = None

    def source_batches(self, trainer: pl.Trainer, samples: int) -> Iterator[Any]:
        """At least `samples` images (over all ranks) in batches, on the device; fewer if there are fewer."""
        if self.images is None:
            self.images = self._synthesize(trainer)
        count = 0
        for images in self.images.split(self.batch_size):
            batch = trainer.precision_plugin.convert_input([images])
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            count += len(images)
            if count * trainer.world_size >= samples:
                break

    def example_batch(self, module: pl.LightningModule) -> Any:
        """Two random images to look at the module with."""
        return [torch.randn(2, *self._shape_for(module), generator=torch.Generator().manual_seed(self.seed))]

    # --- the float copy -----------------------------------------------------------------------------------------------

    def _check_order(self, trainer: pl.Trainer) -> None:
        """Raise if BatchNorms are folded and quantizers attached before this callback sees the module."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if callback is self:
                return
            if isinstance(callback, Quantize):
                raise StateError(
                    "Quantize folds the BatchNorms whose statistics SynthesizeData needs; "
                    "list SynthesizeData before it in Trainer(callbacks=[...])"
                )

    def _copy_after_configuring(self, module: pl.LightningModule) -> None:
        """Copy when ``configure_model``, which may build the layers, has run; `Quantize` attaches after that."""
        configure = module.configure_model

        def configure_model() -> None:
            module.__dict__.pop("configure_model", None)
            configure()
            if self._copy is None and not is_attached(module):
                self._keep_copy(module)

        module.configure_model = configure_model  # type: ignore[method-assign]

    def _keep_copy(self, module: pl.LightningModule) -> None:
        """Keep a float copy of the module, if images can be made from it."""
        require_statistics(module, "SynthesizeData")
        self._shape_for(module)
        attached, module._trainer = module._trainer, None  # a copy of the module must not copy the Trainer
        try:
            self._copy = float_copy(module)
        finally:
            module._trainer = attached
        self._source = _fingerprint(self._copy)

    def _shape_for(self, module: pl.LightningModule) -> Sequence[int]:
        """The shape of one image."""
        if self.shape is not None:
            return self.shape
        example: Any = module.example_input_array
        example = example[0] if isinstance(example, tuple) else example
        if not isinstance(example, Tensor):
            raise SpecError(
                f"SynthesizeData needs the shape of an image, and {type(module).__name__} has no example_input_array "
                "that tells it; give it as in SynthesizeData((3, 224, 224))"
            )
        return example.shape[1:]

    # --- images -------------------------------------------------------------------------------------------------------

    def _synthesize(self, trainer: pl.Trainer) -> Tensor:
        """This rank's share of the images; the copy is given up."""
        module, copy = trainer.lightning_module, self._copy
        if copy is None:
            raise StateError(
                f"SynthesizeData has no float network to make images from: {type(module).__name__} had quantizers "
                "already, or the checkpoint began with other weights than the module was built with; "
                "build it with its float weights and without quantizers (lq.detach)"
            )
        copy.to(module.device)
        if trainer.world_size > 1:
            copy.load_state_dict(trainer.strategy.broadcast(copy.state_dict()))  # DDP takes rank 0's weights too
        has_forward = type(copy).forward is not pl.LightningModule.forward
        one_batch: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
        with progress_of(trainer):
            images = synthesize(
                copy if has_forward else common_module(copy)[1],
                self._shape_for(module),
                self.batch_size * trainer.world_size if one_batch else self.samples,
                batch_size=min(self.batch_size, max(2, self.samples // trainer.world_size)),  # every rank has a share
                iterations=1 if one_batch else self.iterations,
                seed=self.seed,
                rank=trainer.global_rank,
                ranks=trainer.world_size,
            )
        self._copy = None
        return images.cpu()


def _fingerprint(model: nn.Module) -> int:
    """A checksum of the BatchNorm statistics of `model`."""
    checksum = 0
    for norm in batchnorms(model):
        for buffer in (norm.running_mean, norm.running_var):
            if buffer is not None:
                checksum = zlib.crc32(buffer.detach().cpu().double().numpy().tobytes(), checksum)
    return checksum

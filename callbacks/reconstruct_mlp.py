"""Put ReLUs in the place of the GELUs of MLPs, in float, before the network is calibrated.

It runs in ``on_fit_start``, before that of `Quantize`, which it is listed before: quantizers are there and let values
pass. A checkpoint of what came of it has a mark for each ReLU, by which a run with this callback, `Quantize` or
`lq.load` puts it back; a plain module refuses the checkpoint.
"""

from dataclasses import KW_ONLY, asdict, dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lq.attachment.relu import marked, put_relus_of, relus_in
from lq.bars import steps
from lq.callbacks.quantize import Quantize
from lq.callbacks.trainer.averages import give_to_averages
from lq.callbacks.trainer.bars import progress_of
from lq.callbacks.trainer.data import forward_of, reduce_over, training_batches
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.errors import NoEffectWarning, StateError
from lq.options import after, takes
from lq.reconstruction.mlp import MLPReconstruction, reconstruct_mlps
from lq.reconstruction.mlp_fit import MLPOptions, MLPReport
from lq.reconstruction.options import AT_LEAST_1
from lq.structure.forward import Forward


@dataclass(frozen=True)
class MLPCallbackOptions(MLPOptions):
    """Options of MLP reconstruction, and those that the callback alone has.

    Args:
        samples: training samples to fit on, over all ranks.
        forward: called with the module and a batch; by default as for `Quantize`.
    """

    _: KW_ONLY
    samples: int = field(default=1024, metadata={**AT_LEAST_1, **after("batch_size")})
    forward: Forward | None = None


class ReconstructMLP(ModuleCallback):
    """Change GELUs to ReLUs, and fit the linear layers around each of them to what the MLP gave before.

    Put it before `Quantize`. This changes the architecture: the float network, from which quantization starts, loses
    some accuracy, and grids of few bits serve it better (see `lq.reconstruction.mlp`). Afterwards ``reconstruction``
    tells what was done; nothing is done to a module that has such ReLUs, as from a checkpoint.

    Args:
        options: each of `MLPCallbackOptions` is an argument, and an attribute.

    Example::

        Trainer(max_epochs=0, callbacks=[ReconstructMLP(), Quantize(4, 4, skip="auto"), Reconstruct()])
    """

    @takes(MLPCallbackOptions)
    def __init__(self, options: MLPCallbackOptions) -> None:
        super().__init__()
        self.options = options

    @override
    def _begin(self) -> None:
        self.reconstruction: MLPReconstruction | None = None
        self._hook: Any = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Have the module take checkpoints with ReLUs; look at the order of callbacks."""
        super().setup(trainer, pl_module, stage)
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if any(isinstance(callback, Quantize) for callback in callbacks[: callbacks.index(self)]):
            raise StateError(
                "Quantize finds the ranges of a network whose activation functions ReconstructMLP changes; list "
                "ReconstructMLP before it in Trainer(callbacks=[...])"
            )
        if self._hook is None:
            self._hook = pl_module.register_load_state_dict_pre_hook(_take_relus)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the module alone."""
        super().teardown(trainer, pl_module, stage)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Change and fit, unless it was done before."""
        if self.reconstruction is not None or relus_in(pl_module):
            return
        options: MLPOptions = self.options
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            options = replace(options, iterations=1)
        with progress_of(trainer):
            self.reconstruction = reconstruct_mlps(
                pl_module,
                training_batches(trainer, self.options.samples, "Reading samples"),
                options,
                forward=forward_of(trainer, pl_module, self.options.forward, autocast=False),
                reduce=reduce_over(trainer) if trainer.world_size > 1 else None,
                ranks=trainer.world_size,
                watch=lambda items, name: steps(items, f"Reconstructing {name}", unit="step"),
            )
        give_to_averages(trainer, pl_module, weights=True)
        _tell(pl_module, self.reconstruction)

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was done; ReLUs and weights are in the module's own state."""
        return {"mlps": None if self.reconstruction is None else asdict(self.reconstruction)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what was done."""
        super().load_state_dict(state_dict)
        saved = state_dict["mlps"]
        if saved is None:
            self.reconstruction = None
        else:
            mlps = tuple(MLPReport(**one) for one in saved["mlps"])
            self.reconstruction = MLPReconstruction(mlps, tuple((name, why) for name, why in saved["left"]))


def _take_relus(module: pl.LightningModule, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before a state dict is loaded: put ReLUs where it has them."""
    if marked(state_dict):
        put_relus_of(module, state_dict, prefix)


def _tell(module: pl.LightningModule, found: MLPReconstruction) -> None:
    left = "; ".join(f"{name}: {why}" for name, why in found.left)
    if not found.mlps:
        rank_zero_warn(
            f"ReconstructMLP found no GELU between two linear layers in {type(module).__name__}, and changed nothing"
            f"{f' ({left})' if left else ''}; leave it out",
            category=NoEffectWarning,
        )
        return
    before, after = (sum(getattr(m, which) for m in found.mlps) / len(found.mlps) for which in ("before", "after"))
    rank_zero_info(
        f"ReconstructMLP: {len(found.mlps)} GELUs of {type(module).__name__} are ReLUs now; mean error of their MLPs, "
        f"relative to the variance: {before:.3g} without fitting, {after:.3g} fitted{f'; left: {left}' if left else ''}"
    )

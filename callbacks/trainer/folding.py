"""Which BatchNorms `Quantize` folds, and what it says of those that are folded or left."""

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lq.attachment.folded import folded_norms
from lq.attachment.folding import fold
from lq.attachment.options import QuantizeOptions
from lq.attachment.scheme import plan_sites
from lq.attachment.sites import quantizers
from lq.callbacks.trainer.structure import Inspection
from lq.errors import NoEffectWarning


def folds(options: QuantizeOptions, trainer: pl.Trainer, stage: str) -> bool:
    """Whether BatchNorms are folded: as the option says, or if the Trainer fits and nothing is trained."""
    if options.fold_bn != "auto":
        return options.fold_bn
    still = trainer.max_epochs == 0 or trainer.max_steps == 0 or trainer.limit_train_batches == 0
    return stage == "fit" and still


def fold_planned(module: pl.LightningModule, options: QuantizeOptions, inspection: Inspection) -> bool:
    """Fold the BatchNorms of layers that get quantizers; whether there were any."""
    structure = inspection.structure
    plan = plan_sites(module, options.with_structure(structure))
    convs = {planned.site.module for planned in plan.values()}
    if structure is not None:  # networks that did not run stay as they are
        convs &= {operation.name for operation in structure.operations}
    example, forward = inspection.example or (None, None)
    folding = fold(module, example, forward, convs=convs)
    if text := folding.warning():
        rank_zero_warn(text, category=NoEffectWarning)
    elif folding.left:
        rank_zero_info(f"Quantize left BatchNorms unfolded: {'; '.join(map(str, folding.left))}")
    return bool(folding.pairs)


def warn_of_folded(module: pl.LightningModule) -> None:
    """Warn if BatchNorms that training at few bits needs are folded."""
    folded = folded_norms(module)
    fewest = min((float(q.bits.detach().min()) for q in quantizers(module)), default=8.0) if folded else 8.0
    if fewest < 8 or (folded and any("bits" in q.estimator.learns for q in quantizers(module))):
        rank_zero_warn(
            f"{len(folded)} BatchNorms of {type(module).__name__} were folded, and it is trained at fewer than 8 bits: "
            "without their normalization such training is unstable and ends several points lower. Start from the "
            "float module with Quantize(fold_bn='auto') or False, which keep them; exports fold them"
        )

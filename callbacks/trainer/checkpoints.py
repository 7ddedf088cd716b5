"""The Trainer's ModelCheckpoints: scores that no longer count, and what was done after their last checkpoint.

ModelCheckpoint saves while the network trains. It saves nothing where nothing is trained, and what is done to the
network when training is over comes too late for it; `save_result` saves then, under the names that it would give.
"""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor


def model_checkpoints(trainer: pl.Trainer) -> list[Any]:
    """The ModelCheckpoints among the Trainer's callbacks, of either of the packages that Lightning comes as."""
    return [one for one in trainer.callbacks if "ModelCheckpoint" in class_names(one)]  # type: ignore[attr-defined]


def class_names(thing: object) -> set[str]:
    """Names of its class and bases: the same in both packages that Lightning comes as."""
    return {base.__name__ for base in type(thing).__mro__}


def worst_score(callback: Any) -> float:
    """The score that every other is better than, by the callback's ``mode``."""
    return math.inf if callback.mode == "min" else -math.inf


def forget_scores(callback: Any) -> None:
    """Have every later checkpoint be better than those that a ModelCheckpoint has kept so far.

    Their files go as others do when better ones come, by ``save_top_k``.
    """
    if not callback.best_k_models:
        return
    worst = worst_score(callback)
    for path, score in callback.best_k_models.items():
        callback.best_k_models[path] = torch.full_like(torch.as_tensor(score, dtype=torch.float32), worst)
    callback.kth_value = callback.best_model_score = torch.tensor(worst)


def save_result(trainer: pl.Trainer, kind: str) -> None:
    """Save the network as it is now with every ModelCheckpoint of the Trainer; to be called on all ranks.

    It becomes ``last_model_path`` with ``save_last``, and ``best_model_path`` unless ``save_top_k=0``: the checkpoints
    before it, if there are any, are of an unfinished network. Without a ModelCheckpoint, say what saves it.

    Args:
        trainer: a Trainer whose fit ends.
        kind: what the network is, in a word such as "quantized".
    """
    saved = [path for callback in model_checkpoints(trainer) for path in _save(trainer, callback)]
    if saved:
        trainer.strategy.checkpoint_io.teardown()  # one that writes in the background is done then
        rank_zero_info(f"Saved the {kind} network: {', '.join(saved)}")
    elif not any("ExportModel" in class_names(one) for one in trainer.callbacks):  # type: ignore[attr-defined]
        rank_zero_info(
            f"The {kind} network is in memory only: trainer.save_checkpoint('model.ckpt') keeps it for Lightning, "
            "lq.save(module, 'model.safetensors') in a small file"
        )


def _save(trainer: pl.Trainer, callback: Any) -> list[str]:
    """Save with one ModelCheckpoint; the paths."""
    metrics = _metrics(trainer, callback.monitor)
    paths = []
    if callback.save_top_k != 0:
        replaced = callback.best_model_path if callback.monitor is None and callback.save_top_k == 1 else ""
        path = _free_name(trainer, callback, metrics, None, replaced)
        callback.best_model_path = path  # before saving: it is part of the state
        _write(trainer, callback, path)
        if replaced and _may_be_removed(trainer, callback, replaced, path):
            trainer.strategy.remove_checkpoint(replaced)
        paths.append(path)
    if callback.save_last:
        replaced = callback.last_model_path
        path = _free_name(trainer, callback, metrics, callback.CHECKPOINT_NAME_LAST, replaced)
        callback.last_model_path = path
        link = getattr(callback, "_link_checkpoint", None)
        if callback.save_last == "link" and paths and link is not None:
            link(trainer, paths[-1], path)
        else:
            _write(trainer, callback, path)
        paths.append(path)
    return paths


def _metrics(trainer: pl.Trainer, monitor: str | None) -> dict[str, Tensor]:
    """What names of checkpoints are made of."""
    metrics = {
        **trainer.callback_metrics,
        "epoch": torch.tensor(trainer.current_epoch),
        "step": torch.tensor(trainer.global_step),
    }
    if monitor is not None:
        metrics.setdefault(monitor, torch.tensor(math.nan))  # nobody has measured it
    return metrics


def _free_name(
    trainer: pl.Trainer, callback: Any, metrics: dict[str, Tensor], filename: str | None, replaced: str
) -> str:
    """The callback's name for a checkpoint: that of the one it replaces, or one with a version that is not taken."""
    path = str(callback.format_checkpoint_name(dict(metrics), filename))
    version = callback.STARTING_VERSION
    while getattr(callback, "_enable_version_counter", True) and path != replaced and _exists(trainer, callback, path):
        path = str(callback.format_checkpoint_name(dict(metrics), filename, ver=version))
        version += 1
    return path


def _exists(trainer: pl.Trainer, callback: Any, path: str) -> bool:
    return bool(callback.file_exists(path, trainer))


def _write(trainer: pl.Trainer, callback: Any, path: str) -> None:
    """Save as the callback does."""
    own = getattr(callback, "_save_checkpoint", None)
    if own is not None:
        own(trainer, path)
    else:
        trainer.save_checkpoint(path, callback.save_weights_only)


def _may_be_removed(trainer: pl.Trainer, callback: Any, old: str, new: str) -> bool:
    """Whether a replaced checkpoint is the callback's own, and not the one that the run was resumed from."""
    resumed = trainer.ckpt_path
    needed = {Path(one).absolute() for one in (new, *([resumed] if resumed else []))}
    return Path(old).absolute() not in needed and Path(str(callback.dirpath)).absolute() in Path(old).absolute().parents

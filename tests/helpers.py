"""A tiny LightningModule, its data and a quiet Trainer, shared by the tests of the callbacks."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lq.attachment.sites import quantized_layers, quantizers, weight_quantizer
from lq.quantizer.quantizer import Quantizer

#: Warnings of Lightning and torch that are not about lq, to be ignored by ``pytestmark = quiet``.
QUIET = (
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*Trainer.fit. stopped.*:UserWarning",
    "ignore:.*smaller than the logging interval:UserWarning",
    "ignore:Checkpoint directory .* exists and is not empty:UserWarning",
    "ignore:.isinstance.treespec, LeafSpec:FutureWarning",
    "ignore:The dirpath has changed from:UserWarning",
    "ignore:.*callbacks used to create the checkpoint need to be provided:UserWarning",
    "ignore:Total length of .(DataLoader|CombinedLoader). across ranks is zero:UserWarning",
    "ignore:.*have no .val_dataloader.:UserWarning",
)


class Tiny(pl.LightningModule):
    """Two convolutions with BatchNorms and a linear head; remembers the batches it trained on."""

    def __init__(
        self,
        optimizer: str = "sgd",
        lr: float = 0.05,
        weight_decay: float = 0.0,
        scheduler: str | None = None,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        bn = nn.BatchNorm2d if norm else nn.Identity
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), bn(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1), bn(4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip
        self.seen: list[Tensor] = []
        self.rates: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(x.clone())
        return F.cross_entropy(self(x), y)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y), on_epoch=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("test_loss", F.cross_entropy(self(x), y), on_epoch=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        h = self.hparams
        if h.optimizer == "lbfgs":
            return torch.optim.LBFGS(self.parameters(), lr=h.lr)
        kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[h.optimizer]
        extra = {"momentum": 0.9} if h.optimizer == "sgd" else {}
        optimizer = kind(self.parameters(), lr=h.lr, weight_decay=h.weight_decay, **extra)
        if h.scheduler == "step":
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)]
        if h.scheduler == "onecycle":
            total = int(self.trainer.estimated_stepping_batches)
            cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=h.lr, total_steps=total)
            return [optimizer], [{"scheduler": cycle, "interval": "step"}]
        return optimizer


def tiny(seed: int = 0, **kwargs: Any) -> Tiny:
    """A `Tiny` with weights that depend on the seed alone."""
    torch.manual_seed(seed)
    return Tiny(**kwargs)


def dataset(samples: int = 32, seed: int = 1) -> TensorDataset:
    """Images of three kinds that a tiny network can tell apart."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (samples,), generator=generator)
    x = torch.randn(samples, 1, 6, 6, generator=generator) + y[:, None, None, None]
    return TensorDataset(x, y)


def loader(samples: int = 32, batch: int = 8, **kwargs: Any) -> DataLoader[Any]:
    """Batches of `dataset`, in its order unless told otherwise."""
    return DataLoader(dataset(samples), batch_size=batch, **kwargs)


def trainer(callbacks: Sequence[pl.Callback] = (), *, root: Path | None = None, **kwargs: Any) -> pl.Trainer:
    """A Trainer on the CPU that writes and shows nothing by itself."""
    options: dict[str, Any] = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": root,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**options, **kwargs})


def fit(module: pl.LightningModule, callbacks: Sequence[pl.Callback], data: Any = None, **kwargs: Any) -> pl.Trainer:
    """Fit `module` on `data` (by default `loader()`) and return the Trainer."""
    ckpt_path = kwargs.pop("ckpt_path", None)
    made = trainer(callbacks, **kwargs)
    made.fit(module, loader() if data is None else data, ckpt_path=ckpt_path)
    return made


def cli(*configs: Path, options: Sequence[str] = ()) -> Any:
    """A LightningCLI of `Tiny` built from YAML files, later ones over earlier ones; it runs nothing."""
    from lightning.pytorch.cli import LightningCLI

    args = [*(part for path in configs for part in ("--config", str(path))), *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["program"])
        patch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's use of jsonargparse, not ours
        return LightningCLI(Tiny, run=False, args=args, save_config_callback=None, seed_everything_default=False)


def steps(module: nn.Module) -> list[Tensor]:
    """Copies of the log-steps of all quantizers."""
    return [q.log2_step.detach().clone() for q in quantizers(module)]


def quantizer_ids(module: nn.Module) -> set[int]:
    """Identities of all parameters that belong to quantizers."""
    return {id(p) for q in quantizers(module) for p in q.parameters()}


def hooks(module: nn.Module) -> dict[str, list[str]]:
    """Names of the hooks on every module, by table."""
    tables = (
        "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
        "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
    )  # fmt: skip
    found: dict[str, list[str]] = {}
    for name, part in module.named_modules():
        for table in tables:
            for hook in getattr(part, table).values():
                function = getattr(hook, "hook", hook)
                found.setdefault(f"{name}:{table}", []).append(getattr(function, "__qualname__", repr(function)))
    return found


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Compare nested containers of tensors and values, bit for bit."""
    if isinstance(left, Tensor):
        assert torch.equal(left, right), f"{path}: {left} != {right}"
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left:
            assert_same(left[key], right[key], f"{path}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    else:
        assert left == right, path


def most_values_over_limit(module: nn.Module) -> float:
    """Largest ratio, over layers and channels, of distinct weight values to the number the width allows."""
    worst = 0.0
    for _, layer in quantized_layers(module):
        quantizer = weight_quantizer(layer)
        if isinstance(quantizer, Quantizer):
            bits = quantizer.bits.expand(layer.weight.shape[0])
            for row, width in zip(layer.weight.detach(), bits, strict=True):
                worst = max(worst, row.unique().numel() / 2 ** int(width))
    return worst


def run_on_ranks(script: Path, ranks: int, out: Path) -> None:
    """Run a script that is given the number of ranks, a folder and the root of the project; one thread for each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(ranks), str(out), str(Path(__file__).parents[1])]
    done = subprocess.run(command, env=env, cwd=out, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

"""Write the quantized network to a file when fit is over."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lq.attachment.sites import require_attached
from lq.attachment.targets import check_model
from lq.bars import steps
from lq.callbacks.quantize import Quantize
from lq.callbacks.trainer.bars import progress_of
from lq.callbacks.trainer.data import forward_of, run_example, training_batches
from lq.callbacks.trainer.per_module import ModuleCallback
from lq.errors import DataError, SpecError
from lq.export import FORMATS, Example, OnnxReport
from lq.export.formats import endings_with
from lq.export.onnx import Dynamic
from lq.export.program import Call, first_samples, refused_sizes
from lq.quantizer.targets import Target, TargetName, target_of
from lq.structure.forward import eval_mode


class ExportModel(ModuleCallback):
    """Export the quantized network when fit ends, whatever brought it there: calibration, reconstruction, training.

    The file's name says the format: ".onnx" (checked in onnxruntime, a report beside it; `lq.export_onnx`), ".pt2"
    (torch.export; `lq.export_program`) or ".safetensors" (packed, for `lq.load`; `lq.save`). For integer kernels
    throughout, quantize with ``Quantize(integer=True)``. One rank writes; nobody does in a ``fast_dev_run``.

    Args:
        path: the file, with one of these endings; its folder is made.
        part: name of the submodule to export, "" for the LightningModule as a whole. By default the network: its only
            child with parameters, or else the whole.
        example: what it is called with: a batch, a tuple of arguments or a dict of keyword arguments. By default what
            the module calls it with, given its ``example_input_array`` or else training batches.
        samples: training samples to compare an ONNX file with the module on, if no example is given.
        opset: version of ONNX's operators; by default 21, and 25 for weights of 2 bits, or what the target reads.
        target: the engine that an ONNX file is for, as for `lq.export_onnx`; by default that of `Quantize`.
        dynamic: dimensions of an ONNX file that are free, as for `lq.export_onnx`; by default the batch's.
        input_names: names of its inputs; by default those of the parameters.
        output_names: names of its outputs.

    Example::

        Trainer(max_epochs=0, callbacks=[Quantize(8, 8, integer=True), ExportModel("8.onnx")]).fit(module, datamodule)
    """

    def __init__(
        self,
        path: str | Path = "model.onnx",
        *,
        part: str | None = None,
        example: Example | None = None,
        samples: int = 64,
        opset: int | None = None,
        target: TargetName | None = None,
        dynamic: Dynamic | Sequence[Dynamic] = "batch",
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        kind = FORMATS.get(Path(path).suffix)
        if kind is None:
            raise SpecError(f"ExportModel({str(path)!r}): the name should end in one of {', '.join(FORMATS)}")
        target_of(target)
        given = {"opset": opset, "target": target, "input_names": input_names, "output_names": output_names}
        given["dynamic"] = None if dynamic == "batch" else dynamic
        for name, value in given.items():
            if value is not None and name not in kind.options:
                said = f"that is for files ending in {endings_with(name)}"
                raise SpecError(f"ExportModel({str(path)!r}, {name}={value!r}): {said}")
        if samples < 1:
            raise SpecError(f"samples={samples}; an example needs at least 1")
        self.path = path
        self.part = part
        self.example = example
        self.samples = samples
        self.opset = opset
        self.target: TargetName | None = target
        self.dynamic = dynamic
        self.input_names = input_names
        self.output_names = output_names

    @override
    def _begin(self) -> None:
        #: What was exported, if it is ONNX.
        self.report: OnnxReport | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out now, not after hours of training, what the export would lack."""
        for part in (pl_module, network(pl_module, self.part)):
            require_attached(part, "ExportModel")
        if (target := self._target(trainer)) is not None:
            check_model(network(pl_module, self.part), target)
        self._check_sizes(trainer, pl_module)

    def _check_sizes(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise if height or width are to be free in the file, and the network takes one size alone."""
        sizes = {"height", "width"} & set([self.dynamic] if isinstance(self.dynamic, str) else self.dynamic)
        if not sizes or Path(self.path).suffix != ".onnx":
            return
        model = network(pl_module, self.part)
        first = first_samples(self._examples(trainer, pl_module, model, 1)[0])
        with eval_mode(model):
            reason = refused_sizes(model, first, sizes)
        if reason:
            which = " and ".join(sorted(sizes))
            raise DataError(
                f"{self.path}: {which} cannot be free, {type(model).__name__} does not run on images of twice the size "
                f"({reason}); leave them out of dynamic=, or build the model so that it takes any size"
            )

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = Path(self.path)
        model = network(pl_module, self.part)
        with progress_of(trainer):
            needed = FORMATS[path.suffix].needs_example
            examples = self._examples(trainer, pl_module, model, self.samples) if needed else []
            if trainer.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._export(trainer, model, examples, path)

    def _export(self, trainer: pl.Trainer, model: nn.Module, examples: list[Example], path: Path) -> None:
        """Write the file."""
        kind, target = FORMATS[path.suffix], self._target(trainer)
        options = {name: getattr(self, name) for name in kind.options}
        if target is not None:
            options["target"] = target.name
        written = kind.write(model, examples, path, **options)
        self.report = written if isinstance(written, OnnxReport) else None
        rank_zero_info(f"Exported {written}")
        self.files[kind.name] = path

    def _target(self, trainer: pl.Trainer) -> Target | None:
        """The engine that the file is for: that of this callback, or of the one that quantizes."""
        if "target" not in FORMATS[Path(self.path).suffix].options:
            return None
        others = (one.options.target for one in trainer.callbacks if isinstance(one, Quantize))  # type: ignore[attr-defined]
        return target_of(self.target or next(others, None))

    def _examples(
        self, trainer: pl.Trainer, module: pl.LightningModule, part: nn.Module, samples: int
    ) -> list[Example]:
        """What the part is called with, by so many samples; every rank reads its loader."""
        if self.example is not None:
            return [self.example]
        example = module.example_input_array
        forward = forward_of(trainer, module, None, autocast=False) if example is None else run_example
        batches = training_batches(trainer, samples, "Reading samples") if example is None else [example]
        examples: list[Example] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            examples.append(Call(args, kwargs) if kwargs else args)

        handle = part.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
        try:
            with eval_mode(module), torch.no_grad():
                for batch in steps(batches, "Reading samples"):
                    forward(module, batch)
        finally:
            handle.remove()
        if not examples:
            raise DataError(
                "ExportModel needs an example: give example=, set example_input_array, or fit with training data that "
                f"runs through the {type(part).__name__}"
            )
        return examples


def network(module: pl.LightningModule, part: str | None) -> nn.Module:
    """The submodule of that name; None: the only child with parameters, or else the module itself."""
    model: nn.Module = module
    if part is None:
        holders = [child for child in module.children() if any(True for _ in child.parameters())]
        model = holders[0] if len(holders) == 1 and not module._parameters else module
    else:
        named = dict(module.named_modules())
        if part not in named:
            raise SpecError(f"ExportModel(part={part!r}): {type(module).__name__} has no such submodule")
        model = named[part]
    compiled = model._modules.get("_orig_mod")  # torch.compile wraps it
    return compiled if isinstance(compiled, nn.Module) else model

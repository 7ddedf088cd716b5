"""A file that keeps finished units, so that a reconstruction which was ended goes on after the last of them.

It is replaced as a whole after each unit, never half-written. What it holds belongs to one run: units, method, seed,
data and weights at the start must be the same, or an error says which is not.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq.errors import StateError
from lq.histogram import Reduce
from lq.quantizer import Quantizer
from lq.reconstruction.engine import UnitQuantizers
from lq.reconstruction.report import UnitReport


class Progress:
    """Finished units of a run.

    Args:
        path: the file; None: nothing is kept.
        model: the model that is reconstructed.
        fingerprint: what tells this run from others.
    """

    def __init__(self, path: Path | None, model: nn.Module | None, fingerprint: Mapping[str, Any]) -> None:
        self.path = path
        self.model = model
        self.fingerprint = dict(fingerprint)
        self._units: list[dict[str, Any]] = []
        self._finished = 0

    @classmethod
    def none(cls) -> "Progress":
        """Of a run that keeps nothing."""
        return cls(None, None, {})

    @classmethod
    def open(
        cls, path: str | Path | None, model: nn.Module, fingerprint: Mapping[str, Any], reduce: Reduce | None
    ) -> "Progress":
        """Read the file, if there is one.

        Raises:
            StateError: if it is another run's, or no such file.
        """
        if path is None:
            return cls.none()
        found = cls(Path(path), model, {**fingerprint, "model": digest([*model.parameters(), *model.buffers()])})
        if Path(path).exists():
            found._read(Path(path))
        if reduce is not None:  # the ranks may have seen the file at different times
            finished = reduce(torch.tensor(float(found._finished), device=next(model.parameters()).device), "min")
            found._finished = int(finished)
        del found._units[found._finished :]
        return found

    def restored(self, k: int) -> UnitReport | None:
        """Put a finished unit into the model and return its report; None if it is not finished."""
        if k >= self._finished or self.model is None:
            return None
        unit = self._units[k]
        with torch.no_grad():
            parameters = dict(self.model.named_parameters(remove_duplicate=False))
            for name, value in unit["tensors"].items():
                parameters[name].copy_(value)
        for part in self.model.modules():
            if isinstance(part, Quantizer):
                part.refresh()
        return UnitReport(**unit["report"])

    def keep(self, report: UnitReport, quantizers: UnitQuantizers) -> None:
        """Note a unit that has just been written into the model."""
        if self.path is None or self.model is None:
            return
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        parts = [*(weight for _, weight in quantizers.weights), *quantizers.biases]
        parts += [part.log2_step for part in quantizers.learned]
        tensors = {names[id(part)]: part.detach().cpu().clone() for part in parts}
        self._units.append({"report": asdict(report), "tensors": tensors})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_name(f"{self.path.name}.{os.getpid()}.unfinished")
        torch.save({"fingerprint": self.fingerprint, "units": self._units}, unfinished)
        os.replace(unfinished, self.path)

    def _read(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            saved, units = content["fingerprint"], content["units"]
        except Exception as error:
            raise StateError(
                f"{path} does not hold the progress of a reconstruction ({type(error).__name__}: {error}); "
                "give resume= another path, or delete the file"
            ) from error
        other = [key for key in self.fingerprint if saved.get(key) != self.fingerprint[key]]
        if other:
            key = other[0]
            raise StateError(
                f"{path} belongs to another reconstruction: its {key} is {saved.get(key)!r}, here it is "
                f"{self.fingerprint[key]!r}; give resume= another path, or delete the file"
            )
        self._units, self._finished = units, len(units)


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the values of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()

"""A file that keeps finished units, so that a reconstruction which was ended goes on after the last of them.

It is replaced as a whole after each unit, never half-written. What it holds belongs to one run: units, method, seed,
data and weights at the start must be the same, or an error says which is not.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq.errors import StateError
from lq.files import read_checkpoint, whole_file
from lq.histogram import Reduce
from lq.quantizer import Quantizer
from lq.reconstruction.quantizers import UnitQuantizers
from lq.reconstruction.report import UnitReport


class Progress:
    """Finished units of a run.

    Args:
        path: the file; None: nothing is kept.
        model: the model that is reconstructed.
        fingerprint: what tells this run from others.
        writes: whether this is the rank that writes.
    """

    def __init__(
        self, path: Path | None, model: nn.Module | None, fingerprint: Mapping[str, Any], writes: bool = True
    ) -> None:
        self.path = path
        self.writes = writes
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
        cls,
        path: str | Path | None,
        model: nn.Module,
        fingerprint: Mapping[str, Any],
        reduce: Reduce | None,
        writes: bool = True,
    ) -> "Progress":
        """Read the file, if there is one.

        Raises:
            StateError: if it is another run's, or no such file.
        """
        if path is None:
            return cls.none()
        found = cls(Path(path), model, {**fingerprint, "model": digest([*model.parameters(), *model.buffers()])})
        found.writes = writes
        error: StateError | None = None
        if Path(path).exists():
            try:
                found._read(Path(path))
            except StateError as raised:
                error = raised
        if reduce is not None:  # a rank may have no such file; and an error is one of all ranks
            device = next(model.parameters()).device
            found._finished = int(reduce(torch.tensor(float(found._finished), device=device), "min"))
            if error is None and bool(reduce(torch.tensor(float(error is not None), device=device), "max") > 0):
                error = StateError(f"{path} could not be used by another rank; its message says why")
            elif error is not None:
                reduce(torch.tensor(1.0, device=device), "max")
        if error is not None:
            raise error
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
        if self.path is None or self.model is None or not self.writes:
            return
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        parts = [*(weight for _, weight in quantizers.weights), *quantizers.biases]
        parts += [state for part in quantizers.learned for state in (part.log2_step, part.zero_point)]
        tensors = {names[id(part)]: part.detach().cpu().clone() for part in parts}
        self._units.append({"report": asdict(report), "tensors": tensors})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as unfinished:
            torch.save({"fingerprint": self.fingerprint, "units": self._units}, unfinished)

    def _read(self, path: Path) -> None:
        try:
            content = read_checkpoint(path)
            saved, units = dict(content["fingerprint"]), list(content["units"])
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

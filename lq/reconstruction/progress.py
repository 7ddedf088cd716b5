"""A file that keeps finished units, so that a reconstruction which was ended goes on after the last of them.

It is replaced as a whole after each unit, never half-written, and holds a checksum of its content. What it holds
belongs to one run: units, method, seed, all data in their order, the float network and the weights at the start must be
the same, or an error says which is not. All of it is checked before anything is written into the model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq.errors import StateError
from lq.files import file_for_torch, read_checkpoint, whole_file
from lq.quantizer.quantizer import Quantizer
from lq.reconstruction.identity import Digest, named_state, without_folders
from lq.reconstruction.options import RunOptions
from lq.reconstruction.quantizers import UnitQuantizers
from lq.reconstruction.report import UnitReport

# Of the file; other versions are not read.
_FORMAT = 2
_ELSE = "give resume= another path, or delete the file"


class Progress:
    """Finished units of a run.

    Args:
        path: the file; None: nothing is kept.
        model: the model that is reconstructed.
        fingerprint: what tells this run from others.
        parts: of each unit, the names of the tensors that it decides.
        writes: whether this is the rank that writes.
    """

    def __init__(
        self,
        path: Path | None,
        model: nn.Module | None,
        fingerprint: Mapping[str, Any],
        parts: Sequence[frozenset[str]] = (),
        writes: bool = True,
    ) -> None:
        self.path = path
        self.writes = writes
        self.model = model
        self.fingerprint = dict(fingerprint)
        self.parts = parts
        self._units: list[dict[str, Any]] = []
        self._finished = 0

    @classmethod
    def none(cls) -> "Progress":
        """Of a run that keeps nothing."""
        return cls(None, None, {})

    @classmethod
    def open(
        cls,
        path: str | Path,
        model: nn.Module,
        fingerprint: Mapping[str, Any],
        quantizers: Sequence[UnitQuantizers],
        options: RunOptions,
    ) -> "Progress":
        """Read the file, if there is one; `quantizers` are those of each unit.

        Raises:
            StateError: if it is another run's, damaged, or no such file.
        """
        names = _names(model)
        parts = [frozenset(names[id(part)] for part in unit.state()) for unit in quantizers]
        progress = cls(Path(path), model, fingerprint, parts, writes=options.rank == 0)
        error: StateError | None = None
        if Path(path).exists():
            try:
                progress._read(Path(path))
            except StateError as raised:
                error = raised
        reduce = options.reduce
        if reduce is not None:  # a rank may have no such file; and an error is one of all ranks
            device = next(model.parameters()).device
            progress._finished = int(reduce(torch.tensor(float(progress._finished), device=device), "min"))
            if error is None and bool(reduce(torch.tensor(float(error is not None), device=device), "max") > 0):
                error = StateError(f"{path} could not be used by another rank; its message says why")
            elif error is not None:
                reduce(torch.tensor(1.0, device=device), "max")
        if error is not None:
            raise error
        del progress._units[progress._finished :]
        return progress

    @property
    def finished(self) -> int:
        """Number of units that are finished."""
        return self._finished

    def restored(self, k: int) -> UnitReport | None:
        """Put a finished unit into the model and return its report; None if it is not finished."""
        if k >= self._finished or self.model is None:
            return None
        unit = self._units[k]
        with torch.no_grad():
            state = named_state(self.model)
            for name, value in unit["tensors"].items():
                state[name].copy_(value)
        for part in self.model.modules():
            if isinstance(part, Quantizer):
                part.refresh()
        return UnitReport(**unit["report"])

    def keep(self, report: UnitReport, quantizers: UnitQuantizers) -> None:
        """Note a unit that has just been written into the model."""
        if self.path is None or self.model is None or not self.writes:
            return
        names = _names(self.model)
        tensors = {names[id(part)]: part.detach().cpu().clone() for part in quantizers.state()}
        self._units.append({"report": asdict(report), "tensors": tensors})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as unfinished, file_for_torch(unfinished) as file:
            content = {"format": _FORMAT, "fingerprint": self.fingerprint, "units": self._units}
            torch.save({**content, "checksum": _checksum(content)}, file)

    def _read(self, path: Path) -> None:
        try:
            content = read_checkpoint(path)
            saved = {key: _plain(value) for key, value in dict(content["fingerprint"]).items()}
            units = list(content["units"])
        except Exception as error:
            raise StateError(
                f"{path} does not hold the progress of a reconstruction ({type(error).__name__}: {error}); {_ELSE}"
            ) from error
        if content.get("format") != _FORMAT:
            raise StateError(
                f"{path} is of format {content.get('format', 1)!r}, this lq goes on from format {_FORMAT} alone, which "
                f"holds what all data were and a checksum; {_ELSE}"
            )
        if content.get("checksum") != _checksum(content):
            raise StateError(f"{path} is damaged: its content does not have the checksum that it holds; {_ELSE}")
        other = [key for key in {**self.fingerprint, **saved} if saved.get(key) != self.fingerprint.get(key)]
        if other:
            key = other[0]
            raise StateError(
                f"{path} belongs to another reconstruction: its {key} is {saved.get(key)!r}, here it is "
                f"{self.fingerprint.get(key)!r}; {_ELSE}"
            )
        self._check(path, units)
        self._units, self._finished = units, len(units)

    def _check(self, path: Path, units: Sequence[Any]) -> None:
        """Raise if the units do not fit the model: their order, the names, shapes and types of their tensors."""
        state = {} if self.model is None else named_state(self.model)
        names = self.fingerprint.get("units", [])
        if len(units) > len(self.parts):
            raise StateError(f"{path} holds {len(units)} units, this reconstruction has {len(self.parts)}; {_ELSE}")
        for k, (unit, expected) in enumerate(zip(units, self.parts, strict=False)):
            try:
                report, tensors = UnitReport(**unit["report"]), dict(unit["tensors"])
            except (KeyError, TypeError, ValueError) as error:
                raise StateError(f"{path} holds no report and tensors of unit {k}: {error!r}; {_ELSE}") from error
            if k < len(names) and report.name != names[k]:
                raise StateError(f"{path} has {report.name!r} as unit {k}, expected {names[k]!r}; {_ELSE}")
            differing = sorted(expected.symmetric_difference(tensors), key=str)
            if differing:
                missing = "lacks" if differing[0] in expected else "has, for no reason,"
                raise StateError(f"{path}: unit {report.name} {missing} {differing[0]!r}; {_ELSE}")
            for name, value in tensors.items():
                kind = (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)
                if kind != (state[name].shape, state[name].dtype):
                    raise StateError(
                        f"{path}: {name} is {_kind(value)} there, {_kind(state[name])} in the model; {_ELSE}"
                    )


def _names(model: nn.Module) -> dict[int, str]:
    """Names of parameters and buffers, by identity; of several the first."""
    names: dict[int, str] = {}
    for name, tensor in named_state(model).items():
        names.setdefault(id(tensor), name)
    return names


def _kind(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _plain(value: object) -> object:
    return without_folders(value) if isinstance(value, str) else value


def _checksum(content: Mapping[str, Any]) -> str:
    """A hash of everything in the file but itself."""
    digest = Digest()

    def add(part: Any) -> None:
        if isinstance(part, Mapping):
            for key, value in part.items():
                digest.add(key)
                add(value)
        elif isinstance(part, (list, tuple)):
            digest.add(len(part))
            for value in part:
                add(value)
        else:
            digest.add(part)

    add({key: value for key, value in content.items() if key != "checksum"})
    return digest.value

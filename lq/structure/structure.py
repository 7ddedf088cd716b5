"""The map of a model: every tensor that can be quantized, every multiplication, and what stays in float and why.

`lq.inspect` finds it; `lq.attach` puts quantizers where it says. As JSON it can be kept and used without an example.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from lq.errors import DataError
from lq.files import named, parse_json, read_text, schema
from lq.structure.places import Places
from lq.structure.site import Role, Site
from lq.tables import Table, amount

#: Why a parameter stays in float that nothing read while the model ran.
NOT_USED = "not used by the example"

#: Reason of an operation that does not depend on the input: its result is a constant, to be computed once.
CONSTANT = "of parameters alone"


@dataclass(frozen=True)
class Operation:
    """A layer or call that multiplies.

    Args:
        name: name of the layer, or of the module and the call.
        kind: class of the layer or kind of the call.
        sites: names of the sites of its operands.
        macs: multiply-accumulates per sample.
        reason: why an operand has no site; empty if all have one.
    """

    name: str
    kind: str
    sites: tuple[str, ...]
    macs: float
    reason: str = ""


@dataclass(frozen=True)
class FloatTensor:
    """A parameter or buffer that stays in float, and why."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Structure:
    """What can be quantized in a model; ``print`` shows it as a table.

    Args:
        sites: places for quantizers, in the order the model reaches them.
        operations: everything that multiplies, in that order.
        floats: parameters that stay in float.
        first: names of the layers that read the network's input.
        last: names of the layers that make the network's output.
        ran: names of the modules whose forward ran; none are known of structures that an older lq has saved.
        places: where in the code the calls of each module stand; not in JSON, since code changes.
    """

    sites: tuple[Site, ...]
    operations: tuple[Operation, ...]
    floats: tuple[FloatTensor, ...]
    first: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    ran: tuple[str, ...] = ()
    places: Mapping[str, Places] = field(default_factory=dict, compare=False, repr=False)

    @property
    def macs(self) -> float:
        """Multiply-accumulates per sample, of all operations that depend on the input."""
        return sum(operation.macs for operation in self.operations if operation.reason != CONSTANT)

    @property
    def share(self) -> float:
        """Share of multiply-accumulates of which every operand has a site.

        The network's own input counts as one: images come with 256 levels, so that it needs no quantizer.
        """
        return sum(o.macs for o in self.operations if not o.reason) / self.macs if self.macs else 1.0

    def under(self, prefix: str) -> "Structure":
        """The structure of a model that has this one as its submodule `prefix`."""

        def inside(name: str) -> str:
            return f"{prefix}.{name}".strip(".")

        sites = (
            replace(
                site,
                module=inside(site.module),
                shares=site.shares and inside(site.shares),
                covered_by=tuple(map(inside, site.covered_by)),
                source=site.source and replace(site.source, parameter=inside(site.source.parameter)),
            )
            for site in self.sites
        )
        operations = (replace(o, name=inside(o.name), sites=tuple(map(inside, o.sites))) for o in self.operations)
        floats = (replace(tensor, name=inside(tensor.name)) for tensor in self.floats)
        first, last, ran = (tuple(map(inside, names)) for names in (self.first, self.last, self.ran))
        places = {inside(name): found for name, found in self.places.items()}
        return Structure(tuple(sites), tuple(operations), tuple(floats), first, last, ran, places)

    def without(self, parts: Collection[str]) -> "Structure":
        """The structure but for what is in these submodules, which stays in float: they ran, but are no part of it."""

        def kept(name: str) -> bool:
            return not any(f"{name}.".startswith(f"{part}.") for part in parts)

        return replace(
            self,
            sites=tuple(site for site in self.sites if kept(site.module)),
            operations=tuple(operation for operation in self.operations if kept(operation.name)),
            floats=tuple(tensor for tensor in self.floats if kept(tensor.name)),
            first=tuple(filter(kept, self.first)),
            last=tuple(filter(kept, self.last)),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        values = asdict(replace(self, places={}))
        del values["places"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Structure":
        """The inverse of `to_dict`, also after a way through JSON.

        Raises:
            DataError: if `values` are something else.
        """
        try:
            fields = schema.read(values, _STRUCTURE)
            sites = tuple(Site(**site) for site in fields["sites"])
            _require_known(sites, fields["operations"])
        except DataError as error:
            raise DataError(f"not a saved structure: {error}; save one with json.dumps(structure.to_dict())") from error
        return cls(
            sites,
            tuple(Operation(**operation) for operation in fields["operations"]),
            tuple(FloatTensor(**tensor) for tensor in fields["floats"]),
            fields["first"],
            fields["last"],
            fields.get("ran", ()),
        )

    def to_json(self) -> str:
        """The structure as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "Structure":
        """The inverse of `to_json`.

        Raises:
            DataError: if `text` is something else.
        """
        try:
            values = parse_json(text)
        except DataError as error:
            raise DataError(f"not a saved structure: {error}; write structure.to_json() to the file") from error
        return cls.from_dict(values)

    @classmethod
    def load(cls, path: str | Path) -> "Structure":
        """The structure saved in a JSON file.

        Raises:
            DataError: if there is no such file, or it holds something else.
        """
        with named(path):
            return cls.from_json(read_text(path))

    def table(self) -> Table:
        """The operations and what stays in float, ready to be shown."""
        sites = {site.name: site for site in self.sites}
        rows = []
        for operation in self.operations:
            parts = [sites[name] for name in operation.sites]
            weight = [part for part in parts if part.role == "weight"]
            others = [part for part in parts if part.role != "weight"]
            rows.append(
                (
                    operation.name or "(model)",
                    operation.kind,
                    ", ".join("x".join(map(str, part.shape)) for part in weight) or "-",
                    operation.reason or ", ".join(_describe(part) for part in others) or "-",
                    amount(operation.macs, ""),
                    "-" if operation.reason == CONSTANT else f"{100 * operation.macs / max(self.macs, 1):.1f} %",
                )
            )
        skips = [s.name for s in self.sites if s.role == "skip"]
        quantizable = f"{100 * self.share:.2f} % with every operand quantizable"
        notes = [f"{amount(self.macs, '')} multiply-accumulates per sample, {quantizable}"]
        if skips:
            notes.append(f"on request (skip=True) also: {', '.join(skips)}")
        reasons: dict[str, list[str]] = {}
        for tensor in self.floats:
            reasons.setdefault(tensor.reason, []).append(tensor.name)
        for reason, names in reasons.items():
            few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            notes.append(f"stays in float, {reason}: {len(names)} ({few})")
        return Table(("operation", "kind", "weight", "operands", "MACs", "share"), tuple(rows), tuple(notes))

    def __str__(self) -> str:
        return str(self.table())

    def __rich__(self) -> Any:
        return self.table().__rich__()


def _describe(site: Site) -> str:
    place = site.place if site.place in ("input", "output") else site.place[len(site.layer.rpartition(".")[2]) + 1 :]
    if site.network_input:
        return "network input"
    return f"{place} (as {site.shares})" if site.shares else place


# What a saved structure looks like.
_SHAPE = schema.array(schema.integer(), into=tuple)
_NAMES = schema.array(schema.text, into=tuple)


def _place(value: Any) -> str:
    """A place of a site: of a module, or of one of its calls, with the number of the call."""
    found = schema.text(value)
    if found not in ("weight", "input", "output") and not any(word.isdigit() for word in found.split("_")):
        raise schema.MismatchError("'weight', 'input', 'output' or an operand such as 'matmul_0_left'", value)
    return found


_SOURCE = schema.record(
    {
        "parameter": schema.text,
        "shape": _SHAPE,
        "channels": schema.integer(1),
        "dim": schema.integer(),
        "groups": schema.integer(1),
        "offset": schema.integer(),
        "stride": schema.optional(_SHAPE),
        "alone": schema.boolean,
    }
)
_SITE = {"module": schema.text, "place": _place, "role": schema.choice(*get_args(Role))}
_STRUCTURE = schema.record(
    {
        "sites": schema.array(
            schema.record(
                _SITE,
                {
                    "shape": _SHAPE,
                    "shares": schema.optional(schema.text),
                    "concat": schema.optional(schema.integer()),
                    "covered_by": _NAMES,
                    "network_input": schema.boolean,
                    "channels": schema.integer(),
                    "normalized": schema.boolean,
                    "probabilities": schema.boolean,
                    "gelu": schema.boolean,
                    "source": schema.optional(_SOURCE),
                },
            )
        ),
        "operations": schema.array(
            schema.record(
                {"name": schema.text, "kind": schema.text, "sites": _NAMES, "macs": schema.number(0)},
                {"reason": schema.text},
            )
        ),
        "floats": schema.array(schema.record({"name": schema.text, "shape": _SHAPE, "reason": schema.text})),
        "first": _NAMES,
        "last": _NAMES,
    },
    {"ran": _NAMES},
)


def _require_known(sites: tuple[Site, ...], operations: list[dict[str, Any]]) -> None:
    """Raise if a name of a site stands for none or for two, or a weight has more channels than values."""
    known: dict[str, int] = {}
    for i, site in enumerate(sites):
        if known.setdefault(site.name, i) != i:
            raise DataError(f"at 'sites[{i}]': {site.name!r} is there twice")
        if site.channels and site.channels not in site.shape:
            raise DataError(f"at 'sites[{i}].channels': {site.channels} is no size of the shape {list(site.shape)}")
    for i, site in enumerate(sites):
        for name in (*site.covered_by, *([] if site.shares is None else [site.shares])):
            if name not in known:
                raise DataError(f"at 'sites[{i}]': it names a site {name!r} that is not there")
    for i, operation in enumerate(operations):
        for name in operation["sites"]:
            if name not in known:
                raise DataError(f"at 'operations[{i}].sites': it names a site {name!r} that is not there")

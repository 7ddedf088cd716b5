"""Find the structure of a model by running it once on an example (`lq.structure.tracing`).

Rules: a weight that a convolution, a linear layer or an embedding multiplies as it is gets a parametrization; one that
is computed first (weight standardization) or used by other functions is quantized at the call that multiplies it. The
input of a layer is quantized as the layer is called; both operands of a product of activations (attention) at the call.
A tensor that several of them read has one quantizer. On request (``skip=True``, BRECQ and QDrop) so has each tensor
that a residual sum reads besides others, and each sum after its activation: all readers get the quantized tensor.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lq.errors import StateError
from lq.structure.calls import FUNCTIONS
from lq.structure.forward import Forward, eval_mode, run, tensors_of
from lq.structure.places import Places
from lq.structure.samples import batch_size
from lq.structure.site import Site, activation_key, weight_key
from lq.structure.skip_paths import convolution_results, residual_tensors
from lq.structure.sources import Source
from lq.structure.structure import CONSTANT, FloatTensor, Operation, Structure
from lq.structure.tracing import CallEvent, Trace, Value, trace
from lq.structure.unquantized import reason_for_float
from lq.structure.values import GELUS, KEEPING_ROWS, MULTIPLYING, chain, is_normalized, join, leads_to, source_of


def inspect(model: nn.Module, example: Any, *, forward: Forward | None = None) -> Structure:
    """Find what can be quantized in `model`, by running it once on `example` in eval mode.

    Args:
        model: any module without quantizers; fold its BatchNorms first if they should be.
        example: a batch, such as ``torch.randn(1, 3, 224, 224)``; its values do not matter, its path through the code
            does.
        forward: how to run the model on it, as in `lq.calibrate`.

    Returns:
        The map; `lq.attach` takes it as ``structure``.

    Raises:
        StateError: if the model has quantizers.
        DataError: if the model does not take the example.

    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> print(inspect(model, torch.randn(1, 8)))
    operation  kind    weight  operands       MACs  share
    0          Linear  8x8     network input  64    80.0 %
    2          Linear  2x8     input          16    20.0 %
    80 multiply-accumulates per sample, 100.00 % with every operand quantizable
    stays in float, bias: 2 (0.bias, 2.bias)
    """
    if any(getattr(module, "is_lq_quantizer", False) for module in model.modules()):
        raise StateError(
            "lq.inspect looks at models without quantizers: lq.detach(model) first, or inspect before attach"
        )
    # Compiled parts run as they are written: inside a compiled program there is nothing to see.
    with eval_mode(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        traced = trace(model, lambda: run(model, example, forward), list(tensors_of(example)))
    return _Builder(model, traced, batch_size(example)).structure()


class _Builder:
    """From a trace to a structure."""

    def __init__(self, model: nn.Module, trace: Trace, samples: int) -> None:
        self.model = model
        self.trace = trace
        self.samples = max(samples, 1)
        self.modules = dict(model.named_modules())
        self.owners: dict[int, list[str]] = {}
        for name, module in self.modules.items():
            if (weight := module._parameters.get("weight")) is not None:
                self.owners.setdefault(id(weight), []).append(name)
        self.sites: dict[str, Site] = {}
        self.read: dict[str, list[Value]] = {}
        self.operations: dict[str, Operation] = {}
        self.covered: set[str] = set()
        self.constant: set[str] = set()

    def structure(self) -> Structure:
        for event in self.trace.calls:
            if event.operands and event.kind in MULTIPLYING:
                self._operation(event)
        self._whole_tensors()
        self._relations()
        self._sources()
        sites, operations = tuple(self.sites.values()), tuple(self.operations.values())
        ran = tuple(self.trace.outputs)
        return Structure(sites, operations, self._floats(), *self._edges(), ran, self._places())

    def _places(self) -> dict[str, Places]:
        """Where in the code the calls of each module stand."""
        runs: dict[tuple[str, int], list[tuple[str, int, str]]] = {}
        for event in self.trace.calls:
            if event.module is not None:
                runs.setdefault((event.module, event.run), []).append((event.kind, event.index, event.place))
        found: dict[str, Places] = {}
        for (module, _), calls in runs.items():
            found.setdefault(module, Places()).add_run(calls)
        return found

    # --- operations ---------------------------------------------------------------------------------------------

    def _operation(self, event: CallEvent) -> None:
        if event.module is None:
            self._count(
                event.name, event.kind, (), event, f"{event.function} is called outside of any module's forward"
            )
            return
        if not any(value.varies for value in event.operands.values()) and event.kind != "embedding":
            self._count(join(event.module, event.name), event.kind, (), event, CONSTANT)
            self.constant |= {value.parameter for value in event.operands.values() if value.parameter}
            return
        layer = self._own_layer(event)
        names, reasons = [], []
        for slot, value in sorted(event.operands.items(), key=lambda item: item[0] != "weight"):
            site, reason = self._operand(event, slot, value, layer)
            if site is not None:
                self._add(site, value)
                names.append(site.name)
            elif reason:
                reasons.append(reason)
        name = event.module if layer else join(event.module, event.name)
        kind = type(self.modules[event.module]).__name__ if layer else event.kind
        self._count(name, kind, tuple(names), event, "; ".join(reasons))

    def _own_layer(self, event: CallEvent) -> bool:
        """Whether the module is a layer: it multiplies what it is called with by a weight of its own."""
        weight, given = event.operands.get("weight"), event.operands.get("input")
        if weight is None or event.module is None or not self._plain(event):
            return False
        called_with = self.trace.inputs.get(event.module, [])
        own = event.module in self._weight_owners(weight)
        return own and (given is None or any(leads_to(value, given) for value in called_with))

    def _plain(self, event: CallEvent) -> bool:
        """Whether the weight is a parameter called "weight", used as it is."""
        weight = event.operands["weight"]
        return weight.parameter is not None and event.whole.get("weight", False) and bool(self._weight_owners(weight))

    def _weight_owners(self, value: Value) -> list[str]:
        if value.parameter is None:
            return []
        parent, _, last = value.parameter.rpartition(".")
        if last != "weight" or parent not in self.modules:
            return []
        return self.owners.get(id(self.modules[parent]._parameters.get("weight")), [])

    def _operand(self, event: CallEvent, slot: str, value: Value, layer: bool) -> tuple[Site | None, str]:
        module, prefix = event.module or "", event.name + "_"
        if value.is_complex:
            return None, f"the {slot} operand holds complex numbers"
        if not value.varies and slot != "input":
            if slot == "weight" and event.kind in KEEPING_ROWS and self._plain(event):
                owners = self._weight_owners(value)
                if value.parameter is not None:
                    self.covered.update(join(owner, "weight") for owner in owners)
                return Site(module if module in owners else owners[0], "weight", "weight", value.shape), ""
            if slot not in event.layouts:
                return None, f"the {slot} operand is a vector"
            if value.parameter is not None:
                self.covered.add(value.parameter)
            channels = event.layouts[slot].channels
            source = event.sources.get(slot)
            shape = value.shape if source is None else source.shape
            return Site(module, weight_key(prefix, slot), "weight", shape, channels=channels, source=source), ""
        if layer and slot == "input":
            network_input = source_of(self.trace.inputs[module][0]).origin == "input"
            return Site(module, "input", "activation", value.shape, network_input=network_input), ""
        network_input = source_of(value).origin == "input"
        return Site(module, activation_key(prefix, slot), "activation", value.shape, network_input=network_input), ""

    def _add(self, site: Site, value: Value) -> None:
        self.sites.setdefault(site.name, site)
        if site.role != "weight":
            read = self.trace.inputs[site.module] if site.place == "input" else [value]
            seen = self.read.setdefault(site.name, [])
            seen += [v for v in read if site.place != "input" or all(v is not s for s in seen)]

    def _count(self, name: str, kind: str, sites: tuple[str, ...], event: CallEvent, reason: str) -> None:
        before = self.operations.get(name)
        macs = event.macs / self.samples + (before.macs if before else 0.0)
        if before is not None:
            sites, reason = tuple(dict.fromkeys([*before.sites, *sites])), before.reason or reason
        self.operations[name] = Operation(name, kind, sites, macs, reason)

    # --- tensors that all readers get quantized ---------------------------------------------------------------------

    def _whole_tensors(self) -> None:
        skips, branches = residual_tensors(self.trace)
        for value in skips:
            self._add_whole(value, role="skip")
        for value, total in branches:
            self._add_whole(value, role="result", normalized=is_normalized(total))
        for value in convolution_results(self.trace, self._has_step):
            self._add_whole(value, role="result")

    def _has_step(self, value: Value) -> bool:
        """Whether all who read a value read it quantized."""
        whole = [self.read[name][0] for name, site in self.sites.items() if site.role in ("skip", "result")]
        return any(value is v for v in whole) or (bool(value.readers) and set(value.readers) <= set(FUNCTIONS))

    def _add_whole(self, value: Value, **described: Any) -> None:
        """Add a site that quantizes a tensor for all who read it, if there is a place."""
        site = self._producer(value)
        if site is not None and site.name not in self.sites:
            self.sites[site.name] = replace(site, **described)
            self.read[site.name] = [value]

    def _producer(self, value: Value) -> Site | None:
        """Where a tensor can be quantized for all who read it: as a module's output or as a call's result."""
        normalized = is_normalized(value)
        for name in value.output_of:
            outputs = self.trace.outputs[name]
            if all(output is value for output in outputs) and len(outputs) == 1 and name:
                return Site(name, "output", "skip", value.shape, normalized=normalized)
        made = value.made_by
        # A module that is called again (one ReLU for two places) has no place for this tensor alone.
        once = made is not None and len(self.trace.outputs.get(made.module or "", ())) <= 1
        if made is not None and made.module is not None and made.kind not in MULTIPLYING and once:
            return Site(made.module, f"{made.name}_output", "skip", value.shape, normalized=normalized)
        return None

    # --- who shares, who is covered -------------------------------------------------------------------------------

    def _relations(self) -> None:
        whole = ("skip", "result")
        skips = {id(self.read[name][0]): name for name, site in self.sites.items() if site.role in whole}
        first: dict[tuple[int, ...], str] = {}
        groups = self._concats()
        for name, site in self.sites.items():
            if site.role == "weight":
                continue
            read = self.read[name]
            covers = [next((skips[id(v)] for v in chain(value) if id(v) in skips), None) for value in read]
            covered = tuple(dict.fromkeys(c for c in covers if c)) if all(covers) and site.role == "activation" else ()
            key = tuple(dict.fromkeys(id(value) for value in read))
            shares = first.get(key) if site.role == "activation" else None
            made_by = {source_of(value).function for value in read} if site.role == "activation" else set()
            if site.role == "activation":
                first.setdefault(key, name)
            concat = next((groups[id(v)] for value in read for v in chain(value) if id(v) in groups), None)
            self.sites[name] = replace(
                site,
                shares=shares,
                concat=concat,
                covered_by=covered,
                probabilities=made_by == {"softmax"},
                gelu=bool(made_by) and made_by <= GELUS,
            )

    def _sources(self) -> None:
        """Keep sources below the modules that make the calls, and say whether only calls with a site read them."""
        read = Counter(s.parameter for e in self.trace.calls for s in e.sources.values() if self._at_site(e, s))
        first = {id(parameter): name for name, parameter in self.model.named_parameters()}
        names: dict[str, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(first[id(parameter)], []).append(name)
        for name, site in self.sites.items():
            if (source := site.source) is not None:
                alone = read[source.parameter] == self.trace.reads[source.parameter]
                prefix = f"{site.module}." if site.module else ""
                below = next((known for known in names[source.parameter] if known.startswith(prefix)), None)
                source = None if below is None else replace(source, parameter=below, alone=alone)
                self.sites[name] = replace(site, source=source)

    def _at_site(self, event: CallEvent, source: Source) -> bool:
        """Whether the operand that a parameter is the source of has a site of its own at the call."""
        slots = (slot for slot, found in event.sources.items() if found is source)
        names = (join(event.module or "", weight_key(f"{event.name}_", slot)) for slot in slots)
        return any(name in self.sites and self.sites[name].source == source for name in names)

    def _concats(self) -> dict[int, int]:
        """Number of the concatenation that each value is a part or the result of; overlapping ones are one."""
        groups: dict[int, int] = {}
        for number, value in enumerate(self.trace.concats):
            members = [id(v) for part in (value, *value.parts) for v in chain(part) if v.varies]
            known = {groups[m] for m in members if m in groups}
            target = min(known, default=number)
            groups = {m: target if g in known else g for m, g in groups.items()}
            groups.update(dict.fromkeys(members, target))
        return groups

    # --- the rest -----------------------------------------------------------------------------------------------

    def _edges(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Layers that read the network's input, and layers whose output is one of the network's outputs."""
        results = {id(v) for value in self.trace.results for v in chain(value)}
        first: dict[str, None] = {site.layer: None for site in self.sites.values() if site.network_input}
        last: dict[str, None] = {}
        for event in self.trace.calls:
            if event.module is None or event.kind not in KEEPING_ROWS:
                continue
            name = event.module if event.module in self.operations else join(event.module, event.name)
            given = self.trace.inputs.get(event.module, [])
            if event.kind == "embedding" and any(source_of(value).origin == "input" for value in given):
                first[name] = None
            if id(event.result) in results:
                last[name] = None
        before = [e.result.index for e in self.trace.calls if e.kind in MULTIPLYING and id(e.result) not in results]
        for name, site in self.sites.items():
            # The last layers read nothing else (pooled, normalized): their input, in BRECQ's and QDrop's terms.
            if site.role == "skip" and self.read[name][0].index > max(before, default=0):
                last[site.layer] = None
        return tuple(first), tuple(last)

    def _floats(self) -> tuple[FloatTensor, ...]:
        left = [(name, tensor) for name, tensor in self.model.named_parameters() if name not in self.covered]
        return tuple(FloatTensor(name, tuple(tensor.shape), self._reason(name)) for name, tensor in left)

    def _reason(self, name: str) -> str:
        return "makes a constant" if name in self.constant else reason_for_float(self.trace.uses.get(name, set()))

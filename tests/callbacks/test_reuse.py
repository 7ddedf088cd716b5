"""Callback objects that are used again: on another module as if they were new, on the same module as before."""

import copy
import gc
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

import lq
import lq.callbacks
from lq.attachment.sites import quantizers
from lq.callbacks import (
    AllocateBits,
    CompareToFloat,
    ExportModel,
    FineTune,
    FreezeOscillations,
    LearnNoiseScale,
    OptimizeRanges,
    Quantize,
    Reconstruct,
    ReconstructMLP,
    ReduceBits,
    ReportQuantization,
    SynthesizeData,
)
from tests.helpers import QUIET, Tiny, assert_same, fit, loader, tiny, trainer

NOTHING_TO_DO = "ignore:ReconstructMLP found no GELU"  # in the network of these tests
pytestmark = [pytest.mark.filterwarnings(text) for text in (*QUIET, NOTHING_TO_DO)]

Chain = Callable[[Path], list[pl.Callback]]

#: Chains that have every callback at work, with what it keeps of a module; and the number of epochs they train for.
CHAINS: dict[str, tuple[int, Chain]] = {
    "quantize": (1, lambda _: [Quantize(4, 4, skip=True)]),
    "allocate": (1, lambda _: [Quantize(4, 4), AllocateBits("8x", samples=16, activations=4.0), FineTune("ste")]),
    "channels": (0, lambda _: [Quantize(4, 4), AllocateBits("same", samples=16, granularity="channel")]),
    "finetune": (2, lambda _: [Quantize(4, 4, fold_bn=False), FineTune("lsq_plus", distill=1.0, reestimate_bn=16)]),
    "schedule": (2, lambda _: [Quantize(3, 3), FineTune(lr=0.01, schedule="cosine", warmup=2)]),
    "noise_scale": (2, lambda _: [Quantize(8, 8, fold_bn=False), LearnNoiseScale(3, 3, until=0.5)]),
    "noise_scale_budget": (2, lambda _: [Quantize(8, 8, fold_bn=False), LearnNoiseScale(3, 3, budget="8x", until=0.5)]),
    "reduce_bits": (2, lambda _: [Quantize(2, 4, fold_bn=False), ReduceBits(start=4), FineTune("lsq")]),
    "freeze": (2, lambda _: [Quantize(3, 3, fold_bn=False), FineTune(dampening=0.1), FreezeOscillations(0.03, 0.01)]),
    "optimize_ranges": (0, lambda _: [Quantize(4, 4), OptimizeRanges(16, evaluations=5)]),
    "reconstruct": (0, lambda _: [Quantize(3, 3), Reconstruct(iterations=4, samples=16)]),
    "reconstruct_at_the_end": (1, lambda _: [Quantize(3, 3), Reconstruct(iterations=4, samples=16, when="end")]),
    "reconstruct_mlp": (0, lambda _: [ReconstructMLP(iterations=2, samples=16), Quantize(4, 4)]),
    "synthesize": (0, lambda _: [SynthesizeData((1, 6, 6), 16, 3, batch_size=8), Quantize(4, 4)]),
    "compare": (0, lambda path: [Quantize(4, 4), CompareToFloat(16, save_to=path / "compare.json")]),
    "report": (1, lambda path: [Quantize(4, 4), FineTune(), ReportQuantization(16, save_to=path / "page.html")]),
    "export": (0, lambda path: [Quantize(4, 4), ExportModel(path / "model.safetensors")]),
}
every = pytest.mark.parametrize("name", list(CHAINS))


class Wider(Tiny):
    """Other layers than those of `Tiny`, with other names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip


def wider(seed: int = 0) -> Wider:
    torch.manual_seed(seed)
    return Wider()


def run(module: Tiny, callbacks: list[pl.Callback], epochs: int, **kwargs) -> Tiny:
    torch.manual_seed(11)
    fit(module, callbacks, max_epochs=epochs, **kwargs)
    return module


def outcome(module: Tiny, callbacks: list[pl.Callback]) -> tuple:
    """All that a run has made: the network and the batches it saw, and what callbacks would write to a checkpoint."""
    states = [state(callback) for callback in callbacks]
    return dict(module.state_dict()), module.seen, module.rates, states


def state(callback: pl.Callback) -> dict:
    """The callback's state, without the seconds that a reconstruction took."""
    import json

    found = callback.state_dict()
    if found.get("reconstruction") is not None:
        report = json.loads(found["reconstruction"])
        found["reconstruction"] = [(u["name"], u["before"], u["after"]) for u in report["units"]]
    return found


def test_every_callback_is_in_a_chain(tmp_path):
    ours = {value for value in vars(lq.callbacks).values() if inspect.isclass(value) and issubclass(value, pl.Callback)}
    ours.remove(lq.callbacks.Recipe)  # keeps nothing; it is gone once there is a module
    assert ours == {type(callback) for _, chain in CHAINS.values() for callback in chain(tmp_path)}


@pytest.mark.parametrize("first", [lambda: tiny(5), lambda: wider(5)], ids=["same_class", "another_class"])
@every
def test_another_module_gets_what_new_callbacks_give(name, first, tmp_path):
    epochs, chain = CHAINS[name]
    used, new = chain(tmp_path), chain(tmp_path)
    run(first(), used, epochs)
    for make in (tiny, wider):
        reused, fresh = run(make(0), used, epochs), run(make(0), new := chain(tmp_path), epochs)
        assert_same(outcome(reused, used), outcome(fresh, new))


@every
def test_a_copy_gives_it_too(name, tmp_path):
    epochs, chain = CHAINS[name]
    used, new = chain(tmp_path), chain(tmp_path)
    run(tiny(5), used, epochs)
    copies = copy.deepcopy(used)
    reused, fresh = run(tiny(0), copies, epochs), run(tiny(0), new, epochs)
    assert_same(outcome(reused, copies), outcome(fresh, new))


@every
def test_restored_state_is_of_the_module_that_is_restored(name, tmp_path):
    epochs, chain = CHAINS[name]
    saved = tmp_path / "saved.ckpt"
    first = chain(tmp_path)
    torch.manual_seed(11)
    fit(tiny(0), first, max_epochs=epochs).save_checkpoint(saved)
    used, new = chain(tmp_path), chain(tmp_path)
    run(wider(5), used, epochs)
    more = epochs + 1 if epochs else 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        reused, fresh = (run(tiny(0), chain, more, ckpt_path=saved) for chain in (used, new))
    assert_same(outcome(reused, used), outcome(fresh, new))


def test_a_module_that_comes_back_is_known(tmp_path):
    chain = [Quantize(4, 4), AllocateBits("8x", samples=16), Reconstruct(iterations=4, samples=16)]
    one, other = tiny(0), tiny(5)
    run(one, chain, 0)
    done, allocated = dict(copy.deepcopy(one.state_dict())), chain[1].allocated
    run(other, chain, 0)
    assert chain[1].allocated is not allocated
    run(one, chain, 0)
    assert chain[1].allocated is allocated
    assert_same(dict(one.state_dict()), done)  # nothing was measured, learned or rounded again


@every
def test_two_trainers_save_the_state_of_their_own_modules(name, tmp_path):
    epochs, chain = CHAINS[name]
    used, new = chain(tmp_path), chain(tmp_path)
    torch.manual_seed(11)
    made = fit(tiny(0), used, max_epochs=epochs)
    run(wider(5), used, epochs)
    before = [state(callback) for callback in used]
    made.save_checkpoint(tmp_path / "late.ckpt")
    torch.manual_seed(11)
    fit(tiny(0), new, max_epochs=epochs).save_checkpoint(tmp_path / "alone.ckpt")
    assert_same([state(callback) for callback in used], before)
    late, alone = (torch.load(tmp_path / f"{which}.ckpt", weights_only=True) for which in ("late", "alone"))
    for states in (late["callbacks"], alone["callbacks"]):
        for found in states.values():
            found.pop("reconstruction", None)  # with the seconds it took
    assert_same(late["callbacks"], alone["callbacks"])


@every
def test_modules_are_not_held(name, tmp_path):
    epochs, chain = CHAINS[name]
    used, module = chain(tmp_path), tiny(0)
    run(module, used, epochs)
    gone = weakref.ref(module)
    del module
    run(tiny(5), used, epochs)
    gc.collect()
    assert gone() is None


def test_state_loaded_by_hand_is_of_the_next_module(tmp_path):
    first, used = AllocateBits("8x", samples=16), AllocateBits("5x", samples=16)
    module = tiny(0)
    run(module, [Quantize(4, 4), first], 0)
    run(wider(5), [Quantize(4, 4), used], 0)
    used.load_state_dict(first.state_dict())
    again = copy.deepcopy(module)
    run(again, [Quantize(4, 4), used], 0)
    assert used.sensitivity_table is not None and used.allocated.to_json() == first.allocated.to_json()
    assert_same(dict(again.state_dict()), dict(module.state_dict()))


def test_a_second_fit_brings_widths_up_no_more():
    chain, module, seen = [Quantize(2, 2, fold_bn=False), ReduceBits(4), FineTune()], tiny(), []

    class Widths(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append({b for q in quantizers(pl_module) for b in q.bits.detach().reshape(-1).tolist()})

    run(module, [*chain, Widths()], 2)
    assert {4.0, 8.0} in seen or {3.0, 8.0} in seen
    del seen[:]
    run(module, [*chain, Widths()], 2)
    assert seen == [{2.0, 8.0}] * 8


def test_what_is_done_at_the_end_is_done_again_after_more_training():
    end = Reconstruct(iterations=4, samples=16, when="end")
    module = tiny()
    run(module, [Quantize(3, 3), end], 1)
    report = end.reconstruction
    run(module, [Quantize(3, 3), end], 1)
    assert end.reconstruction is not report
    for _, layer in module.net.named_children():
        if isinstance(layer, nn.Conv2d):
            assert torch.equal(layer.weight, layer.parametrizations.weight.original)  # on the grid


def test_batchnorms_are_measured_again_at_the_end_of_a_second_fit():
    tune = FineTune("ste", reestimate_bn=16)
    module = tiny()
    run(module, [Quantize(4, 4, fold_bn=False), tune], 1)
    again = copy.deepcopy(module)
    run(module, [Quantize(4, 4, fold_bn=False), tune], 1)
    run(again, [Quantize(4, 4, fold_bn=False), FineTune("ste", reestimate_bn=16)], 1)
    assert_same(dict(module.state_dict()), dict(again.state_dict()))


def test_a_run_that_failed_leaves_no_distillation_behind():
    class Fails(pl.Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("stop")

    tune, module = FineTune(distill=1.0), tiny()
    made = trainer([Quantize(4, 4), tune, Fails()])
    with pytest.raises(RuntimeError, match="stop"):
        made.fit(module, loader())
    hooks = [len(part._forward_hooks) for part in module.modules()]
    run(tiny(5), [Quantize(4, 4), tune], 1)
    assert sum(len(part._forward_hooks) for part in module.modules()) < sum(hooks)

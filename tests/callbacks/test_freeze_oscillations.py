"""FreezeOscillations in a Trainer: what it counts and freezes, against plain loops over the integers of a run."""

import itertools
import math

import lightning.pytorch as pl
import pytest
import timm.optim
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision

import lq
from lq.attachment.sites import quantized_layers, quantizers, weight_quantizer
from lq.callbacks import ExportModel, FineTune, FreezeOscillations, LearnNoiseScale, Quantize, ReduceBits
from lq.quantizer.estimators import ESTIMATORS
from tests.callbacks.training import check_resume
from tests.helpers import QUIET, assert_same, fit, loader, tiny
from tests.training.oscillation_loops import Loop, integers

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

#: Small networks oscillate: larger rates, and thresholds that some weights exceed in a few steps.
RATE, START, END, MOMENTUM = 0.3, 0.12, 0.06, 0.05


def freeze(**options):
    return FreezeOscillations(**{"start": START, "end": END, "momentum": MOMENTUM, **options})


def chain(*more, weights=3, estimator="lsq", **options):
    quantize = Quantize(weights, 3, fold_bn=False, first_last=None)
    return [quantize, FineTune(estimator), freeze(**options), *more]


def layers(module):
    return [
        (n, layer.parametrizations.weight.original, weight_quantizer(layer)) for n, layer in quantized_layers(module)
    ]


class Following(pl.Callback):
    """Follows each value by plain loops; listed before `FineTune`, so that it sees steps before they are looked at."""

    def __init__(self, start=START, end=END, steps=0):
        self.start, self.end, self.steps, self.count = start, end, steps, 0
        self.loops, self.hooks = {}, []

    def on_train_start(self, trainer, pl_module):
        for name, weight, quantizer in layers(pl_module):
            self.loops[name] = [Loop(q, MOMENTUM) for q in integers(weight, quantizer)]

        def look(*_):
            threshold = self.end + (self.start - self.end) * (1 + math.cos(math.pi * self.count / self.steps)) / 2
            self.count += 1
            for name, weight, quantizer in layers(pl_module):
                for loop, integer in zip(self.loops[name], integers(weight, quantizer), strict=True):
                    loop.step(integer, threshold)

        self.hooks = [optimizer.register_step_post_hook(look) for optimizer in trainer.optimizers]


def check(module, states, following):
    """What the callback knows is what the loops found, and frozen weights are on their levels."""
    frozen = 0
    for name, weight, quantizer in layers(module):
        state = states[quantizer.name]
        rows = {key: quantizer.layout.rows(part).flatten().tolist() for key, part in state.items()}
        for i, loop in enumerate(following.loops[name]):
            assert (rows["frozen"][i], rows["integer"][i]) == (loop.frozen, loop.integer), (name, i)
            assert rows["direction"][i] == loop.direction
            assert rows["frequency"][i] == pytest.approx(loop.frequency, abs=1e-6)
        frozen += int(state["frozen"].sum())
        levels = (state["integer"] * quantizer.step.detach().view(-1, *[1] * (weight.ndim - 1))).detach()
        torch.testing.assert_close(weight.detach()[state["frozen"]], levels[state["frozen"]])
    assert frozen
    return frozen


@pytest.mark.parametrize("accumulate", [1, 2])
def test_counts_and_freezes_as_loops_do(accumulate):
    module, callbacks = tiny(lr=RATE, weight_decay=0.01), chain()
    following = Following(steps=12 * 8 // accumulate)
    made = fit(
        module,
        [callbacks[0], following, *callbacks[1:]],
        loader(64),
        max_epochs=12,
        accumulate_grad_batches=accumulate,
    )
    assert following.count == made.global_step == 12 * 8 // accumulate
    frozen = check(module, callbacks[2].state_dict()["weights"], following)
    total = sum(weight.numel() for _, weight, _ in layers(module))
    assert frozen < total
    loops = [loop for those in following.loops.values() for loop in those]
    often = sum(loop.frequency > 0.005 and not loop.frozen for loop in loops)
    expected = {"oscillations/frozen": frozen / total, "oscillations/oscillating": often / total}
    assert callbacks[2].numbers == pytest.approx(expected)
    assert float(made.callback_metrics["frozen_weights"]) == pytest.approx(frozen / total)


class Levels(pl.Callback):
    """The levels of all weights after each batch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        found = {}
        for name, weight, quantizer in layers(pl_module):
            step = quantizer.layout.spread(quantizer.step.detach(), weight)
            found[name] = (quantizer(weight.detach()).detach() / step).round()
        self.seen.append(found)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(
    "spec",
    [lq.QuantSpec(3, signed=True), lq.QuantSpec(3, symmetric=False), lq.QuantSpec(4, signed=True, per_channel=False)],
    ids=["symmetric", "zero points", "one step"],
)
def test_frozen_levels_stay_with_every_estimator(estimator, spec):
    module, levels, halfway = tiny(lr=RATE, weight_decay=0.05), Levels(), {}
    callbacks = chain(levels, estimator=estimator, weights=spec, start=0.06)

    class Halfway(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 8:
                halfway.update(callbacks[2].state_dict()["weights"])

    fit(module, [*callbacks, Halfway()], loader(64), max_epochs=16)
    assert any(state["frozen"].any() for state in halfway.values())
    moved = False
    for name, _, quantizer in layers(module):
        frozen = halfway[quantizer.name]["frozen"]
        for seen in levels.seen[8 * 8 :]:
            assert seen[name][frozen].equal(levels.seen[8 * 8][name][frozen])
        moved |= not levels.seen[-1][name][~frozen].equal(levels.seen[8 * 8][name][~frozen])
    assert moved
    if estimator != "ste":
        assert any(q.log2_step.requires_grad for q in quantizers(module))


def test_counting_alone_changes_nothing():
    ends = []
    for more in ([], [FreezeOscillations(start=1.0, end=1.0)]):
        module = tiny(lr=RATE)
        fit(module, [*chain()[:2], *more], loader(64), max_epochs=4)
        ends.append(dict(module.state_dict()))
    assert_same(*ends)
    assert more[0].numbers["oscillations/oscillating"] > 0 == more[0].numbers["oscillations/frozen"]


def test_resumed_run_equals_a_straight_one(tmp_path):
    frozen = []

    class Noting(FreezeOscillations):
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            frozen.append(self.numbers["oscillations/frozen"])

    def made():
        return [*chain()[:2], Noting(0.06, 0.03, 0.05)]

    check_resume(lambda seed: tiny(seed, lr=0.03, optimizer="adamw"), made, tmp_path)
    straight, half, resumed = frozen
    assert straight == resumed > half > 0


def test_second_fit_goes_on():
    module, callbacks = tiny(lr=RATE), chain()
    fit(module, callbacks, loader(64), max_epochs=8)
    first = callbacks[2].state_dict()["weights"]
    fit(module, callbacks, loader(64), max_epochs=4)
    second = callbacks[2].state_dict()["weights"]
    assert any(state["frozen"].any() for state in first.values())
    for name, state in first.items():
        held = state["frozen"]
        assert second[name]["frozen"][held].all() and second[name]["integer"][held].equal(state["integer"][held])


def test_order_in_the_list_does_not_matter():
    ends = []
    for order in ((0, 1, 2), (0, 2, 1)):
        module, callbacks = tiny(lr=RATE), chain()
        fit(module, [callbacks[i] for i in order], loader(64), max_epochs=6)
        assert callbacks[2].numbers["oscillations/frozen"] > 0
        ends.append(dict(module.state_dict()))
    assert_same(*ends)


def test_exported_is_what_was_trained(tmp_path):
    module = tiny(lr=RATE)
    fit(module, chain(ExportModel(tmp_path / "model.safetensors")), loader(64), max_epochs=6)
    loaded = lq.load(tmp_path / "model.safetensors", tiny(3).net)
    x = next(iter(loader()))[0]
    torch.testing.assert_close(loaded.eval()(x), module.eval()(x))


# --- what is looked at ----------------------------------------------------------------------------------------------


class Pair(pl.LightningModule):
    """Two networks and two optimizers, the second of which steps every second time."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.first, self.second = tiny(0).net, tiny(1).net

    def forward(self, x):
        return self.first(x) + self.second(x)

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            if index and batch_idx % 2:
                continue
            optimizer.zero_grad()
            self.manual_backward(torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9) for net in (self.first, self.second)]


def test_each_optimizer_has_weights_of_its_own():
    """The frequency of one oscillation falls with the steps of its optimizer, not with those of others."""
    steps, callback = {"first": 0, "second": 0}, freeze(start=1.0, end=1.0)
    loops = {}

    class Steps(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            for name, optimizer in zip(steps, trainer.optimizers, strict=True):
                mine = [part for part in layers(pl_module) if part[0].startswith(name)]
                loops.update({n: [Loop(q, MOMENTUM) for q in integers(w, quantizer)] for n, w, quantizer in mine})

                def look(*_, name=name, mine=mine):
                    steps[name] += 1
                    for layer, weight, quantizer in mine:
                        for loop, integer in zip(loops[layer], integers(weight, quantizer), strict=True):
                            loop.step(integer, 1.0)

                optimizer.register_step_post_hook(look)

    module = Pair()
    quantize = Quantize(3, 3, fold_bn=False, first_last=None)
    fit(module, [quantize, Steps(), FineTune(), callback], loader(64), max_epochs=3)
    assert steps == {"first": 24, "second": 12}
    known = callback.state_dict()["weights"]
    for name, _, quantizer in layers(module):
        found = quantizer.layout.rows(known[quantizer.name]["frequency"]).flatten()
        expected = torch.tensor([loop.frequency for loop in loops[name]])
        torch.testing.assert_close(found, expected)
    assert any(state["frequency"].any() for state in known.values())


def test_layers_that_are_unfrozen_later_are_taken_up():
    module, callback = tiny(lr=RATE), freeze(start=1.0, end=1.0)

    class Unfreeze(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.net[0].requires_grad_(False)

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                names.append(set(callback.state_dict()["weights"]))
                pl_module.net[0].requires_grad_(True)

    names = []
    fit(module, [*chain()[:2], Unfreeze(), callback], max_epochs=4)
    assert names == [{"net.3.weight", "net.8.weight"}]
    assert set(callback.state_dict()["weights"]) == {"net.0.weight", "net.3.weight", "net.8.weight"}


@pytest.mark.parametrize("kind", ["lookahead", "no hooks"])
def test_optimizers_without_hooks_are_looked_at_after_batches(kind):
    class Plain(torch.optim.SGD):
        def register_step_post_hook(self, hook):
            raise AttributeError

    def configure():
        if kind == "lookahead":
            return timm.optim.Lookahead(torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9), k=2)
        return Plain(module.parameters(), lr=RATE, momentum=0.9)

    module, callbacks = tiny(), chain()
    module.configure_optimizers = configure
    fit(module, callbacks, loader(64), max_epochs=10)
    known = callbacks[2].state_dict()["weights"]
    assert any(state["frozen"].any() for state in known.values())
    for _, weight, quantizer in layers(module):
        state, step = known[quantizer.name], quantizer.step.detach().view(-1, *[1] * (weight.ndim - 1))
        held = (state["integer"] * step)[state["frozen"]]
        torch.testing.assert_close(weight.detach()[state["frozen"]], held)


def test_widths_that_come_down_are_looked_at_when_they_are_final():
    module, callback, seen = tiny(lr=RATE), freeze(), []

    class Looking(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            bits = float(layers(pl_module)[1][2].bits.max())
            seen.append((bits, len(callback.state_dict().get("weights", {}))))

    quantize = Quantize(2, 3, fold_bn=False, first_last=None)
    fit(module, [quantize, ReduceBits(start=4), FineTune(), callback, Looking()], loader(64), max_epochs=10)
    assert {bits for bits, _ in seen} == {4.0, 3.0, 2.0}
    assert not any(count for bits, count in seen[:-1] if bits > 2)
    assert seen[-1] == (2.0, 3) and callback.numbers["oscillations/frozen"] > 0


def test_with_learned_widths():
    module, callback = tiny(lr=RATE), freeze()
    learn = LearnNoiseScale(3, 3, first_last=None, until=0.3, distill=0)
    fit(module, [Quantize(8, 8, fold_bn=False), learn, callback], loader(64), max_epochs=10)
    assert {float(q.bits.detach().max()) for _, _, q in layers(module)} == {3.0}
    assert callback.numbers["oscillations/frozen"] > 0


@pytest.mark.parametrize(
    ("most", "names"), [(3, {"net.3.weight"}), (8, {"net.0.weight", "net.3.weight", "net.8.weight"})]
)
def test_most_bits(most, names):
    callback = freeze(max_bits=most)
    fit(tiny(), [Quantize(3, 3, fold_bn=False), FineTune(), callback])
    assert set(callback.state_dict()["weights"]) == names


# --- precision, logs, errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(precision):
    module, callbacks = tiny(lr=RATE), chain()
    fit(module, callbacks, loader(64), max_epochs=10, precision=precision)
    assert callbacks[2].numbers["oscillations/frozen"] > 0
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_steps_that_a_loss_scaler_skips_do_not_count():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=10_000)
    module, callbacks, scales = tiny(lr=RATE), chain(), []

    class Scales(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            state = callbacks[2].state_dict()["weights"]
            scales.append((scaler.get_scale(), max(float(part["frequency"].max()) for part in state.values())))

    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    fit(module, [*callbacks, Scales()], loader(64), max_epochs=40, plugins=[plugin])
    skipped = [(before, now) for (scale, before), (after, now) in itertools.pairwise(scales) if after < scale]
    assert len(skipped) > 80 and all(before == now for before, now in skipped)
    assert scales[-1][0] < 2.0**40 and scales[-1][1] > 0
    assert callbacks[2].numbers["oscillations/frozen"] > 0


def test_what_is_logged(tmp_path):
    logger, callbacks = CSVLogger(tmp_path), chain()
    made = fit(tiny(lr=RATE), callbacks, loader(64), max_epochs=8, logger=logger, log_every_n_steps=4)
    header, *rows = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    table = [dict(zip(header.split(","), row.split(","), strict=True)) for row in rows]
    while_training = [row for row in table if row["frozen_weights"]]
    assert [int(row["step"]) for row in while_training] == [4 * i - 1 for i in range(1, 17)]
    assert all(row["oscillating_weights"] for row in while_training)
    (last,) = (row for row in table if row["oscillations/frozen"])
    assert int(last["step"]) == made.global_step == 64
    assert float(last["oscillations/frozen"]) == pytest.approx(callbacks[2].numbers["oscillations/frozen"])
    assert not last["frozen_weights"]


def test_nothing_to_do():
    with pytest.warns(lq.NoEffectWarning, match="FreezeOscillations found no weight of at most 4 bits among the 3"):
        fit(tiny(), [Quantize(8, 8), FineTune(), FreezeOscillations()])


def test_without_an_end():
    with pytest.raises(lq.SpecError, match=r"FreezeOscillations\(start=0\.12, end=0\.06\) needs the number of steps"):
        fit(tiny(), chain(), max_epochs=-1)
    counting = FreezeOscillations(start=1.0, end=1.0)

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 6

    fit(tiny(), [*chain()[:2], counting, Stop()], max_epochs=-1)
    assert counting.state_dict()["weights"]


def test_without_quantize():
    with pytest.raises(lq.StateError, match="FreezeOscillations needs a model with quantizers"):
        fit(tiny(), [FreezeOscillations()])


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"start": 0.0}, "start=0.0 is no frequency"),
        ({"end": 1.5}, "end=1.5 is no frequency"),
        ({"momentum": 2.0}, "momentum=2.0 is no weight of a running mean"),
        ({"max_bits": 16}, "max_bits=16 is not a width"),
    ],
)
def test_wrong_arguments(kwargs, text):
    with pytest.raises(lq.SpecError, match=text):
        FreezeOscillations(**kwargs)

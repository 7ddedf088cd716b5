"""What quantized training keeps to: accumulation, clipping, several optimizers, precision, limits, divergence."""

import math
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lq.attachment.sites import quantizers
from lq.errors import LqError
from tests.callbacks.training import DISTILLED, FULL, PLAIN, STAGES, Begin, learned, over, updates_of, weights
from tests.helpers import QUIET, Tiny, assert_same, dataset, fit, loader, most_values_over_limit, steps, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


# --- accumulation and clipping --------------------------------------------------------------------------------------


@over({**PLAIN, **DISTILLED})
@pytest.mark.parametrize("clip", [None, ("norm", 0.2), ("value", 0.01)], ids=["", "norm", "value"])
def test_accumulated_batches_equal_large_ones(stages, clip):
    options = {} if clip is None else {"gradient_clip_algorithm": clip[0], "gradient_clip_val": clip[1]}
    ends = []
    for batch, accumulate in [(16, 1), (8, 2), (4, 4)]:
        module = tiny(norm=False)
        made = fit(module, stages(), loader(64, batch=batch), accumulate_grad_batches=accumulate, **options)
        assert made.global_step == 4
        ends.append((weights(module), learned(module)))
    for other in ends[1:]:
        torch.testing.assert_close(other[0], ends[0][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(other[1], ends[0][1], rtol=0, atol=1e-4)


def clipped(gradients, algorithm, value):
    """What the two algorithms are defined to do."""
    if algorithm == "value":
        return {name: g.clamp(-value, value) for name, g in gradients.items()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    return {name: g * min(1.0, value / norm) for name, g in gradients.items()}


class Louder(pl.Callback):
    """Makes the gradients of quantizers so large that nobody who looks at them can overlook them, and notes them."""

    def on_train_start(self, trainer, pl_module):
        for name, p in pl_module.named_parameters():
            if name in learned(pl_module):
                p.register_hook(lambda g: 1000 * g)

    def on_after_backward(self, trainer, pl_module):
        found = {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        self.gradients = {name: found[name] for name in learned(pl_module) if name in found}


@over({**STAGES, **DISTILLED})
@pytest.mark.parametrize(("algorithm", "value"), [("norm", 0.05), ("norm", 0.005), ("value", 0.01)])
def test_clipping_sees_the_users_parameters_alone(stages, algorithm, value):
    free, bound, louder = tiny(), tiny(), Louder()
    with updates_of(free) as without:
        fit(free, [*stages(), louder], limit_train_batches=1)
    clip = {"gradient_clip_algorithm": algorithm, "gradient_clip_val": value}
    with updates_of(bound) as with_it:
        fit(bound, [*stages(), Louder()], limit_train_batches=1, **clip)
    (own_free, users_free), (own, users) = (sorted(u, key=lambda u: not u.own) for u in (without, with_it))
    assert (own.own, users.own) == (True, False)
    expected = clipped(users_free.gradients, algorithm, value)
    torch.testing.assert_close(users.gradients, expected, rtol=1e-5, atol=1e-8)
    assert any(not torch.equal(expected[name], g) for name, g in users_free.gradients.items())  # it was clipped
    if algorithm == "norm":  # the norm over all would be another
        together = clipped({**users_free.gradients, **louder.gradients}, algorithm, value)
        assert not any(torch.allclose(together[name], g, rtol=0.1, atol=0) for name, g in expected.items())
    assert_same(own.gradients, own_free.gradients)
    assert_same(learned(bound), learned(free))


# --- several optimizers ---------------------------------------------------------------------------------------------


class Adversaries(pl.LightningModule):
    """Two networks and two optimizers, stepped by hand; notes which quantizers each step moved, and its gradients."""

    automatic_optimization = False

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.first = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 36))
        self.second = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 3))
        self.moved, self.expected = [], []

    def forward(self, x):
        return self.second(self.first(x.flatten(1)))

    def configure_optimizers(self):
        return [torch.optim.SGD(net.parameters(), lr=0.02) for net in (self.first, self.second)]

    def losses(self, batch):
        """What the first is trained on goes through the second, and the other way round."""
        x, y = batch
        logits = self(x)
        return F.cross_entropy(logits, (y + 1) % 3), F.cross_entropy(logits, y) + logits.square().mean()

    def own(self, name):
        """Learned parameters of the quantizers of one network, by name."""
        return {
            f"{name}.{n}": p for n, p in getattr(self, name).named_parameters() if n in learned(self._modules[name])
        }

    def gradients(self, loss, name):
        """The gradients that the quantizers of a network should be stepped by."""
        own = self.own(name)
        return dict(zip(own, torch.autograd.grad(loss, list(own.values()), retain_graph=True), strict=True))

    def step(self, name, expected):
        """Step one optimizer and note what it did to whose quantizers."""
        before = learned(self)
        self.optimizers()[("first", "second").index(name)].step()
        after = learned(self)
        self.moved.append((name, {n for n in before if not torch.equal(before[n], after[n])}))
        self.expected.append(expected)

    def training_step(self, batch, batch_idx):
        getattr(self, self.way)(batch, batch_idx)

    def in_turn(self, batch, batch_idx):
        for index, name in enumerate(("first", "second")):
            self.optimizers()[index].zero_grad()
            loss = self.losses(batch)[index]
            expected = self.gradients(loss, name)
            self.manual_backward(loss)
            self.step(name, expected)

    def toggled(self, batch, batch_idx):
        for index, name in enumerate(("first", "second")):
            optimizer = self.optimizers()[index]
            with optimizer.toggle_model():
                loss = self.losses(batch)[index]
                expected = self.gradients(loss, name)
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.step(name, expected)

    def one_backward(self, batch, batch_idx):
        loss = sum(self.losses(batch))
        expected = {name: self.gradients(loss, name) for name in ("first", "second")}
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for name, gradients in expected.items():
            self.step(name, gradients)

    def first_twice_as_often(self, batch, batch_idx):
        for index, name in enumerate(("first", "second")[: 1 + batch_idx % 2]):
            self.optimizers()[index].zero_grad()
            loss = self.losses(batch)[index]
            expected = self.gradients(loss, name)
            self.manual_backward(loss)
            self.step(name, expected)

    def accumulated(self, batch, batch_idx):
        first, second = self.optimizers()
        if batch_idx % 2 == 0:
            first.zero_grad()
            second.zero_grad()
            self.sums = {}
        loss = sum(self.losses(batch))
        for name in ("first", "second"):
            for key, gradient in self.gradients(loss, name).items():
                self.sums[key] = self.sums.get(key, 0.0) + gradient
        self.manual_backward(loss)
        if batch_idx % 2:
            for name in ("first", "second"):
                self.step(name, {key: g for key, g in self.sums.items() if key.startswith(name)})


WAYS = ["in_turn", "toggled", "one_backward", "first_twice_as_often", "accumulated"]


def train(stages, way):
    """Train `Adversaries`; the module, its own updates and the gradients they should have had."""
    torch.manual_seed(0)
    module, begin = Adversaries(way), Begin()
    with updates_of(module) as updates:
        fit(module, [*stages(), begin])
    begin.check_all_moved(module)
    assert len(module.moved) == {"first_twice_as_often": 6, "accumulated": 4}.get(way, 8)
    assert {name for name, _ in module.moved} == {"first", "second"}
    return module, [update.gradients for update in updates if update.own]


@over(STAGES)
@pytest.mark.parametrize("way", WAYS)
def test_quantizers_step_with_the_optimizer_of_their_network(stages, way):
    module, own = train(stages, way)
    assert len(own) == len(module.moved)
    for name, moved in module.moved:
        assert any(part.startswith(f"{name}.") for part in moved), name


@over(PLAIN)
@pytest.mark.parametrize("way", WAYS)
def test_they_step_then_alone_and_by_its_loss_alone(stages, way):
    module, own = train(stages, way)
    for name, moved in module.moved:
        assert moved == set(module.own(name)), name
    for found, expected in zip(own, module.expected, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@over(PLAIN)
def test_a_network_that_no_optimizer_holds_keeps_its_steps(stages):
    class Half(Adversaries):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.first.parameters(), lr=0.02)]

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.losses(batch)[0])
            optimizer.step()

    torch.manual_seed(0)
    module, begin = Half("in_turn"), Begin()
    fit(module, [*stages(), begin])
    moved = {q.name for q in quantizers(module) if not torch.equal(q.log2_step, begin.steps[q.name])}
    assert moved == {name for name in begin.steps if name.startswith("first")}


# --- precision ------------------------------------------------------------------------------------------------------


@over({**STAGES, **DISTILLED})
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bfloat16(stages, precision):
    module, begin = tiny(), Begin()
    made = fit(module, [*stages(), begin], precision=precision, max_epochs=2)
    assert made.global_step == 8
    begin.check_all_moved(module)
    stored = torch.float32 if precision == "bf16-mixed" else torch.bfloat16
    assert {p.dtype for p in weights(module).values()} == {stored}
    for quantizer in quantizers(module):
        assert all(t.dtype == torch.float32 for t in quantizer.state_dict().values())
    assert 0 < most_values_over_limit(module) <= 1
    assert math.isfinite(trainer(precision=precision).validate(module, loader(), verbose=False)[0]["val_loss"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 with a loss scaler runs on a GPU only")
@over({**STAGES, **DISTILLED})
def test_float16_with_a_loss_scaler(stages):
    reference, module = tiny(), tiny()
    with updates_of(reference) as full:
        fit(reference, stages(), accelerator="gpu")
    with updates_of(module) as half:
        made = fit(module, stages(), precision="16-mixed", accelerator="gpu")
    assert made.precision_plugin.scaler.get_scale() > 1
    own = [next(u.gradients for u in updates if u.own) for updates in (full, half)]
    for name, expected in own[0].items():  # of the first update: unscaled, before anything else differs
        torch.testing.assert_close(own[1][name], expected, rtol=0.1, atol=1e-3)
    assert all(torch.isfinite(step).all() for step in steps(module))


# --- limits ---------------------------------------------------------------------------------------------------------

LIMITS = {
    "fast_dev_run": ({"fast_dev_run": True}, 1, 1),
    "fast_dev_run of 2": ({"fast_dev_run": 2}, 2, 2),
    "batches": ({"limit_train_batches": 2, "limit_val_batches": 1}, 2, 1),
    "shares": ({"limit_train_batches": 0.5, "limit_val_batches": 0.34}, 2, 1),
    "no validation": ({"limit_train_batches": 3, "limit_val_batches": 0}, 3, 0),
    "overfit": ({"overfit_batches": 1}, 1, 1),
    "overfit a share": ({"overfit_batches": 0.5}, 2, 1),
}


class Counting(torch.utils.data.TensorDataset):
    """Remembers what was read."""

    def __init__(self):
        super().__init__(*dataset().tensors)
        self.read = set()

    def __getitem__(self, index):
        self.read.add(index)
        return super().__getitem__(index)


@over({**STAGES, **FULL})
@pytest.mark.parametrize("name", LIMITS)
def test_limits_hold_for_the_whole_chain(stages, name, tmp_path):
    options, training, validating = LIMITS[name]
    module, data, seen = tiny(), Counting(), []
    module.validation_step = lambda batch, batch_idx: seen.append(batch_idx)
    begin = Begin()
    made = trainer([*stages(), begin], root=tmp_path, num_sanity_val_steps=0, **options)
    made.fit(module, torch.utils.data.DataLoader(data, batch_size=8), loader(24))
    assert (len(module.seen), len(seen), made.global_step) == (training, validating, training)
    assert data.read == set(range(8 * training))
    begin.check_all_moved(module)
    assert list(tmp_path.iterdir()) == []  # nothing was asked to be kept


# --- divergence -----------------------------------------------------------------------------------------------------


class Invariants(pl.Callback):
    """The state of every quantizer is finite and its step positive, after every batch and however training ends."""

    def __init__(self):
        self.checked, self.losses = 0, []

    def check(self, trainer, pl_module, *_):
        for quantizer in quantizers(pl_module):
            for name, value in quantizer.state_dict().items():
                assert value.isfinite().all(), f"{name} of {quantizer.name} after {self.checked} batches"
            assert (quantizer.step > 0).all() and quantizer.step.isfinite().all()
        self.checked += 1

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(float(outputs["loss"]))
        self.check(trainer, pl_module)

    on_exception = on_fit_end = check


def diverge(module, chain, data=None, **kwargs):
    """Fit with quantizer rates ten times too high; the invariants, and all that was said or raised, in lower case."""
    invariants = Invariants()
    for callback in chain:
        if hasattr(callback, "quantizer_lr"):
            callback.quantizer_lr *= 10
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            fit(module, [*chain, invariants], data, **kwargs)
            raised = ""
        except LqError as error:
            raised = str(error)
    return invariants, " ".join([raised, *(str(warning.message) for warning in told)]).lower()


@over(STAGES)
@pytest.mark.parametrize(("lr", "norm"), [(0.5, True), (0.5, False), (1e25, True), (1e25, False)])
def test_divergence_never_reaches_the_quantizers(stages, lr, norm):
    module = tiny(lr=lr, norm=norm)
    invariants, told = diverge(module, stages(), loader(48), max_epochs=50)
    finished = len(invariants.losses) == 300
    assert invariants.checked == len(invariants.losses) + 1 and (lr > 1 or finished)
    if not finished or not all(map(math.isfinite, invariants.losses)):
        assert "nan" in told or "not finite" in told


def loss_is_nan(loss, logits):
    return loss * torch.nan


def loss_is_infinite(loss, logits):
    return loss * torch.inf


def gradient_is_nan(loss, logits):
    return loss + (0 * logits).abs().sqrt().sum()  # its derivative at zero is 0 * inf


@over({**STAGES, **DISTILLED})
@pytest.mark.parametrize("breaks", [loss_is_nan, loss_is_infinite, gradient_is_nan])
def test_a_loss_that_breaks_down_is_reported_and_spares_the_quantizers(stages, breaks):
    class Broken(Tiny):
        def training_step(self, batch, batch_idx):
            logits = self(batch[0])
            loss = F.cross_entropy(logits, batch[1])
            return breaks(loss, logits) if batch_idx == 2 else loss

    torch.manual_seed(0)
    invariants, told = diverge(Broken(), stages())
    assert len(invariants.losses) >= 2 and invariants.checked == len(invariants.losses) + 1
    assert "nan" in told or "inf" in told or "not finite" in told

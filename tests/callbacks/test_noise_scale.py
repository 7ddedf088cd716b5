"""LearnNoiseScale: widths come down to targets or share a budget, become integers, and stay so; whatever the layers."""

import itertools
from contextlib import nullcontext

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lq
from lq.attachment.sites import float_weight, quantized_layers, quantizers, weight_quantizer
from lq.callbacks import AllocateBits, LearnNoiseScale, Quantize, load_from_checkpoint
from lq.quantizer.estimators import NoiseScale
from lq.training.noise_scale import prune_silent
from tests.helpers import QUIET, Tiny, assert_same, dataset, fit, loader, most_values_over_limit, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def quantize(bits=8, **kwargs):
    return Quantize(bits, bits, fold_bn=False, **kwargs)


def widths(module):
    return {q.name: sorted({*q.bits.detach().reshape(-1).tolist()}) for q in quantizers(module)}


class Watch(pl.Callback):
    """Widths, reported widths and the user's learning rate after each step."""

    def __init__(self):
        self.bits, self.reported, self.rates = [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.bits.append({q.name: float(q.bits.detach().mean()) for q in quantizers(pl_module)})
        logged = trainer.callback_metrics
        self.reported.append((float(logged["weight_bits"]), float(logged["activation_bits"])))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


# --- targets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 3, 2, 1])
def test_widths_come_down_and_are_integers_in_the_end(bits):
    module, watch = tiny(), Watch()
    fit(module, [quantize(), LearnNoiseScale(bits, bits, until=0.5), watch], max_epochs=4)
    inner = [step["net.3.weight"] for step in watch.bits]
    assert inner[0] > bits and inner[7:] == [bits] * 9
    assert all(later <= before + 1e-4 for before, later in itertools.pairwise(inner))
    expected = {"net.0.weight": 8, "net.3.weight": bits, "net.3.input": bits, "net.8.weight": 8, "net.8.input": 8}
    assert widths(module) == {name: [width] for name, width in expected.items()}
    assert 0 < most_values_over_limit(module) <= 1


def test_reported_widths_are_those_there_are():
    module, watch = tiny(), Watch()
    fit(module, [quantize(), LearnNoiseScale(2, 3, first_last=None), watch])
    sizes = {name: float_weight(layer).numel() for name, layer in quantized_layers(module)}
    for step, (weights, activations) in zip(watch.bits, watch.reported, strict=True):
        mean = sum(step[f"{name}.weight"] * size for name, size in sizes.items()) / sum(sizes.values())
        assert weights == pytest.approx(mean, rel=1e-5)
        inputs = [bits for name, bits in step.items() if name.endswith("input")]
        assert activations == pytest.approx(sum(inputs) / len(inputs), rel=1e-5)
    assert watch.reported[-1] == pytest.approx((2, 3))


def test_widths_by_name():
    tuner = LearnNoiseScale(3, 4, pins={"net.8": 5})
    fit(tiny(), [quantize(), tuner])
    assert tuner.widths() == {
        "net.0.weight": 8, "net.3.weight": 3, "net.3.input": 4, "net.8.weight": 5, "net.8.input": 5,
    }  # fmt: skip


@pytest.mark.parametrize(("weights", "activations"), [(None, 3), (3, None)])
def test_what_has_no_target_keeps_its_width(weights, activations):
    spec, module = lq.QuantSpec(16, per_channel=False, symmetric=False), tiny()
    overrides = {"net.0": {"weights": lq.QuantSpec((5, 0, 2, 8), signed=True)}, "net.8": {"activations": spec}}
    tuner = LearnNoiseScale(weights, activations, first_last=None, until=0.5, quantizer_lr=0.3)
    fit(module, [quantize(overrides=overrides), tuner], max_epochs=2)
    found = {q.name: q.bits.tolist() for q in quantizers(module)}
    if weights is None:
        assert found["net.0.weight"] == [5, 0, 2, 8] and found["net.3.weight"] == [8] * 4
        assert found["net.8.input"] == 3
    else:
        assert found["net.0.weight"] == [3, 0, 2, 3] and found["net.3.weight"] == [3] * 4
        assert found["net.8.input"] == 16 and found["net.3.input"] == 8


class Kinds(pl.LightningModule):
    """One layer of each kind, pointwise convolutions among them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 12)
        self.one = nn.Conv1d(12, 6, 1)
        self.two = nn.Conv2d(6, 6, 1)
        self.depth = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.up = nn.ConvTranspose2d(6, 4, 2, groups=2)
        self.three = nn.Conv3d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.one(self.embed(x).transpose(1, 2)).relu()
        x = self.depth(self.two(x.unsqueeze(-1).expand(-1, -1, -1, 4)).relu()).relu()
        x = self.three(self.up(x).relu().unsqueeze(2)).flatten(2).transpose(1, 2)
        return self.head(self.attention(x, x, x)[0].mean(1))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def test_every_kind_of_layer_comes_down():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randint(10, (32, 8), generator=generator), torch.randint(3, (32,), generator=generator)
    torch.manual_seed(0)
    module = Kinds()
    data = DataLoader(TensorDataset(x, y), batch_size=8)
    fit(module, [quantize(), LearnNoiseScale(3, 3, first_last=None, until=0.5)], data, max_epochs=3)
    found = widths(module)
    assert all(bits in ([3.0], [0.0, 3.0]) for bits in found.values()), found
    layers = {name.partition(".")[0] for name in found}
    assert layers == {"embed", "one", "two", "depth", "up", "three", "attention", "head"}
    for _, layer in quantized_layers(module):
        quantizer = weight_quantizer(layer)
        if quantizer is not None:
            rows = quantizer.layout.rows(layer.weight.detach())
            assert 1 < max(row.unique().numel() for row in rows) <= 8


def test_start_at_the_targets_leaves_widths_alone():
    module, watch = tiny(), Watch()
    fit(module, [quantize(2), LearnNoiseScale(2, 2), watch])
    assert {step["net.3.weight"] for step in watch.bits} == {2.0}
    assert not any(isinstance(q.estimator, NoiseScale) and q.estimator.widths for q in quantizers(module))


def test_training_that_ends_early_ends_with_integers():
    module = tiny()
    stop = EarlyStopping("val_loss", patience=0, min_delta=1e9)
    made = trainer([quantize(), LearnNoiseScale(3, 3, until=1.0), stop], max_epochs=50)
    made.fit(module, loader(), loader(24))
    assert made.global_step < 50
    assert widths(module)["net.3.weight"] == [3]


def test_a_silent_channel_is_pruned_without_a_change():
    model = lq.attach(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 3, None, first_last=None)
    weight, quantizer = float_weight(model[0]), weight_quantizer(model[0])
    with torch.no_grad():
        weight[1].mul_(0.01)
    x = torch.randn(5, 4)
    with torch.no_grad():
        expected = model.eval()(x)
    assert prune_silent(model) == 1
    assert quantizer.bits.tolist() == [3, 0, 3]
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert prune_silent(model) == 0


# --- schedules ------------------------------------------------------------------------------------------------------


def test_rate_is_constant_until_the_targets_are_met_then_falls():
    watch, tuner = Watch(), LearnNoiseScale(2, 2, until=0.5, lr=0.01, schedule="noise_scale")
    made = fit(tiny(), [quantize(), tuner, watch], max_epochs=4)
    assert type(made.optimizers[0]) is torch.optim.RAdam
    met = tuner._descent.met_at
    assert 4 < met <= 8
    assert watch.rates[: met - 1] == pytest.approx([0.01] * (met - 1))
    decay = 0.01 ** (1 / (16 - met))
    assert watch.rates[met:] == pytest.approx([0.01 * decay ** (k + 1) for k in range(16 - met)])
    assert watch.rates[-1] == pytest.approx(1e-4)


def test_warmup_rises_to_the_rate_and_the_penalty_waits():
    watch, tuner = Watch(), LearnNoiseScale(4, 4, until=1.0, lr=0.01, schedule="cosine", warmup=4, distill=0)
    fit(tiny(), [quantize(), tuner, watch], max_epochs=4)
    rising = watch.rates[:4]
    assert rising == sorted(rising) and rising[0] < 0.006 and watch.rates[-1] == pytest.approx(0, abs=1e-6)
    # the way down begins at two bits above the target, and after the warm-up
    assert watch.bits[3]["net.3.weight"] == pytest.approx(6, abs=0.1)
    assert watch.bits[6]["net.3.weight"] < 5.5


# --- one budget for all ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [3.0, "8x", "400B"])
def test_widths_share_a_budget(budget):
    module = tiny()
    fit(module, [quantize(), LearnNoiseScale(None, 4, budget, until=0.5, quantizer_lr=0.3)], max_epochs=4)
    found = lq.summary(module)
    if budget == "400B":
        assert 380 < found.bytes <= 400
    else:
        limit = 4.0 if budget == "8x" else 3.0
        assert limit - 0.3 < found.average_bits <= limit + 1e-6
    assert len({bits for name, all_ in widths(module).items() if "weight" in name for bits in all_}) > 1
    assert widths(module)["net.3.input"] == [4]
    assert most_values_over_limit(module) <= 1


def test_a_budget_takes_up_where_an_allocation_left_off():
    module, watch = tiny(), Watch()
    allocate = AllocateBits(4.0, granularity="channel", samples=32)
    fit(module, [quantize(), allocate, LearnNoiseScale(None, 8, 4.0, until=0.5), watch], max_epochs=2)
    chosen = {name: sum(bits) / len(bits) for name, bits in allocate.allocated.weights.items()}
    assert watch.bits[0]["net.3.weight"] == pytest.approx(chosen["net.3"], abs=0.3)
    assert lq.summary(module).average_bits <= 4.0


def test_budgets_that_cannot_be():
    with pytest.raises(lq.BudgetError, match="'100B' cannot be met: .* bytes are taken by what is not codes"):
        fit(tiny(), [quantize(), LearnNoiseScale(budget="100B")])
    with pytest.raises(lq.SpecError, match="widths are learned within mean bits, a compression or bytes"):
        LearnNoiseScale(budget="2GBitOps")
    with pytest.raises(lq.BudgetError, match="no weight has a width"):
        fit(tiny(), [Quantize(None, 8, fold_bn=False), LearnNoiseScale(None, 4, 3.0)])


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"weights": 9}, "bits=9 is not a width"),
        ({"until": 0}, "until=0 is no share of a run"),
        ({"budget": "small"}, "budget='small' is not understood"),
        ({"distill_loss": "mse"}, "distill_loss='mse' is unknown; use one of"),
        ({"warmup": 5}, "warmup=5 belongs to schedule="),
    ],
)
def test_wrong_arguments(kwargs, text):
    with pytest.raises(lq.SpecError, match=text):
        LearnNoiseScale(**kwargs)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def says_unfinished():
    return pytest.warns(UserWarning, match=r"Tiny, loaded from a checkpoint, .* \(net.3.weight: \S+ bits instead of 2")


def test_checkpoints_between_integers_and_after_load_by_themselves(tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    module, watch = tiny(), Watch()
    fit(module, [quantize(), LearnNoiseScale(2, 2, until=0.5), saver, watch], max_epochs=2, enable_checkpointing=True)
    x = dataset(8).tensors[0]
    for step in (2, 8):
        with says_unfinished() if step == 2 else nullcontext():
            loaded = load_from_checkpoint(Tiny, tmp_path / f"step={step}.ckpt").eval()
        with says_unfinished() if step == 2 else nullcontext():
            again = lq.load(tmp_path / f"step={step}.ckpt", tiny(3)).eval()
        with torch.no_grad():
            assert torch.equal(loaded(x), again(x))
            if step == 8:
                assert torch.equal(loaded(x), module.eval()(x))
        bits = {q.name: float(q.bits.detach().mean()) for q in quantizers(loaded)}
        assert bits == pytest.approx(watch.bits[step - 1])
    assert 2 < watch.bits[1]["net.3.weight"] < 4


@pytest.mark.parametrize("epoch", [1, 2, 3])
@pytest.mark.parametrize("budget", [None, 3.0])
def test_resumed_run_equals_a_straight_one(tmp_path, epoch, budget):
    def run(folder, seed, ckpt_path=None):
        saver = ModelCheckpoint(tmp_path / folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
        tuner = LearnNoiseScale(2, 3, budget, until=0.5, lr=0.01, schedule="noise_scale")
        module = tiny(seed)
        fit(module, [quantize(), tuner, saver], max_epochs=4, enable_checkpointing=True, ckpt_path=ckpt_path)
        return torch.load(tmp_path / folder / "step=16.ckpt", weights_only=True), dict(module.state_dict())

    straight, ours = run("straight", 0)
    resumed, theirs = run("resumed", 3, tmp_path / "straight" / f"step={4 * epoch}.ckpt")
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "callbacks"):
        one, other = ({k: v for k, v in dict(enumerate(c[part]) if isinstance(c[part], list) else c[part]).items()
                       if not str(k).startswith("ModelCheckpoint")} for c in (straight, resumed))  # fmt: skip
        assert_same(one, other)
    assert_same(ours, theirs)


def test_a_second_fit_begins_anew():
    module, tuner = tiny(), LearnNoiseScale(3, 3)
    fit(module, [quantize(), tuner])
    assert widths(module)["net.3.weight"] == [3]
    other = tiny(1)
    fit(other, [quantize(), tuner])
    assert widths(other)["net.3.weight"] == [3]

"""Checkpoints: unfinished widths do not compete and are told; post-training work is saved as training would be."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

import lq
from lq.attachment.sites import quantizers
from lq.callbacks import ExportModel, FineTune, LearnNoiseScale, Quantize, Reconstruct, ReduceBits, load_from_checkpoint
from lq.quantizer.final_widths import unfinished_widths
from tests.helpers import QUIET, Tiny, assert_same, dataset, fit, loader, run_on_ranks, tiny, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]

UNFINISHED = r"Tiny, .* has more bits than were asked for: .*net.3.weight: \S+ bits instead of 2"


class Scored(Tiny):
    """Reports scores that fall with the widths, as the accuracy of a network does; and then rise a little."""

    def score(self) -> float:
        widths = {q.name: float(q.bits.detach().mean()) for q in quantizers(self)}
        return 10 * widths["net.3.weight"] + 0.01 * self.trainer.global_step

    def training_step(self, batch, batch_idx):
        self.log("train_score", self.score(), on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("score", self.score())


def scored(seed: int = 0) -> Scored:
    torch.manual_seed(seed)
    return Scored()


#: Ways for widths to come down to 2 bits at half of the run.
WAYS = {
    "reduce_bits": lambda: [Quantize(2, 2, fold_bn=False), ReduceBits(4), FineTune()],
    "noise_scale": lambda: [Quantize(6, 6, fold_bn=False), LearnNoiseScale(2, 2, until=0.5, distill=0)],
    "budget": lambda: [
        Quantize(6, None, fold_bn=False, first_last=None),
        LearnNoiseScale(budget=2.0, activations=None, first_last=None, until=0.5, distill=0),
    ],
}
ways = pytest.mark.parametrize("way", list(WAYS))


def train(module, callbacks, epochs=6, **kwargs):
    made = trainer(callbacks, max_epochs=epochs, enable_checkpointing=True, **kwargs)
    made.fit(module, loader(), loader())
    return made


def state_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


def is_finished(path) -> bool:
    """From the widths in a file alone: 2 bits in the inner layer, or on average."""
    state = state_of(path)
    inner = [
        float(v.mean()) for k, v in state.items() if k.endswith(".bits") and ".3." in k and "parametrizations" in k
    ]
    return all(bits <= 3.01 and bits == int(bits) for bits in inner) and not any(
        k.endswith("final_bits") for k in state
    )


# --- scores of unfinished networks ------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("monitor", ["score", "train_score"])
def test_the_best_checkpoint_has_the_widths_asked_for(way, monitor, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor=monitor, mode="max")
    module = scored()
    made = train(module, [*WAYS[way](), saver])
    assert is_finished(saver.best_model_path)
    if way == "reduce_bits":
        steps = {"score": 24, "train_score": 24}  # the score rises when widths are final
        assert torch.load(saver.best_model_path, weights_only=True)["global_step"] == steps[monitor]
        assert float(saver.best_model_score) == pytest.approx(20 + 0.01 * (24 if monitor == "score" else 21.5))
    made.validate(module, loader(), ckpt_path="best", verbose=False)  # no warning
    assert [p.name for p in tmp_path.iterdir()] == [Path(saver.best_model_path).name]


def test_the_scores_of_final_widths_compete(tmp_path):
    class Falls(Scored):
        def score(self):
            return super().score() - 0.02 * self.trainer.global_step

    torch.manual_seed(0)
    saver = ModelCheckpoint(tmp_path, monitor="score", mode="max")
    train(Falls(), [*WAYS["reduce_bits"](), saver])
    assert torch.load(saver.best_model_path, weights_only=True)["global_step"] == 12  # the first at two bits


class Renamed(ModelCheckpoint):
    """A class of the user's."""

    @property
    def state_key(self):
        return f"renamed {self.dirpath}"


@pytest.mark.parametrize(
    ("options", "finished"),
    [
        ({"save_top_k": 2}, [True, True]),
        ({"save_top_k": -1}, [False, False, True, True, True, True]),
        ({"save_top_k": 5}, [False, True, True, True, True]),
        ({"save_top_k": 1, "save_last": True}, [True, True]),
        ({"every_n_train_steps": 1, "save_top_k": 3}, [True, True, True]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("cls", [ModelCheckpoint, Renamed])
def test_files_are_kept_by_the_rule_of_the_callback(options, finished, cls, tmp_path):
    saver, second = (cls(tmp_path / name, monitor="score", mode="max", **options) for name in ("one", "two"))
    second.monitor = "train_score" if cls is Renamed else "score"
    savers = [saver, second] if cls is Renamed else [saver]
    train(scored(), [*WAYS["reduce_bits"](), *savers])
    assert sorted(is_finished(p) for p in (tmp_path / "one").iterdir()) == finished
    assert all(is_finished(one.best_model_path) for one in savers)
    assert all(is_finished(path) for path, score in saver.best_k_models.items() if torch.isfinite(score))


def test_a_score_from_before_is_not_given_to_a_later_checkpoint(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="score", mode="max", every_n_train_steps=1, save_top_k=1)
    chain = [Quantize(2, 2, fold_bn=False), ReduceBits(4, until=0.4), FineTune()]  # final within an epoch
    train(scored(), [*chain, saver], epochs=5)
    assert float(saver.best_model_score) < 21  # of a network of two bits, not 40 or 30 of those before it


@ways
@pytest.mark.parametrize("options", [{}, {"stopping_threshold": 10.0}, {"check_on_train_epoch_end": False}])
def test_early_stopping_waits_for_the_widths(way, options, tmp_path):
    stopper = EarlyStopping("score", mode="max", patience=1, min_delta=1.0, **options)
    made = train(scored(), [stopper, *WAYS[way]()], root=tmp_path)
    # Final at step 12, the end of the third epoch: the next score is no better by 1.0, or the threshold is reached.
    assert made.current_epoch >= 3
    assert not unfinished_widths(made.lightning_module)
    assert stopper.stopping_threshold == options.get("stopping_threshold")
    if way == "reduce_bits":
        assert made.current_epoch == (3 if "stopping_threshold" in options else 4)
        assert float(stopper.best_score) < 21


def test_early_stopping_that_watches_training_forgets_the_epoch_in_which_widths_changed(tmp_path):
    stopper = EarlyStopping("train_score", mode="max", patience=2, check_on_train_epoch_end=True)
    chain = [Quantize(2, 2, fold_bn=False), ReduceBits(4, until=0.4), FineTune()]
    made = train(scored(), [stopper, *chain], epochs=8, root=tmp_path)
    assert made.current_epoch == 8  # the score rises from there on
    assert float(stopper.best_score) < 21


@pytest.mark.filterwarnings("ignore:ReduceBits. the run ended before:UserWarning")
def test_what_is_not_finite_stops_the_run_at_once(tmp_path):
    class Breaks(Scored):
        def score(self):
            return float("nan")

    stopper = EarlyStopping("score", mode="max", stopping_threshold=1.0)
    made = train(Breaks(), [stopper, *WAYS["reduce_bits"]()], root=tmp_path)
    assert made.current_epoch == 1
    assert stopper.stopping_threshold == 1.0


# --- checkpoints of unfinished networks -------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("average", [False, True])
def test_an_unfinished_checkpoint_says_so_wherever_it_is_used(way, weights_only, average, tmp_path):
    options = {"every_n_train_steps": 1, "save_top_k": -1, "save_weights_only": weights_only}
    averages = [EMAWeightAveraging(decay=0.5)] if average else []
    saver = ModelCheckpoint(tmp_path, filename="{step}", **options)
    made = train(tiny(), [*WAYS[way](), *averages, saver], epochs=2)
    early, late = (tmp_path / f"step={step}.ckpt" for step in (2, 8))  # widths are final at step 4
    with pytest.warns(UserWarning, match=UNFINISHED):
        unfinished = load_from_checkpoint(Tiny, early)
    with pytest.warns(UserWarning, match=UNFINISHED):
        lq.load(early, tiny())
    with pytest.warns(UserWarning, match=UNFINISHED):
        lq.load(state_of(early), tiny())
    with pytest.warns(UserWarning, match=UNFINISHED):
        made.test(made.lightning_module, loader(), ckpt_path=early, verbose=False)
    with pytest.warns(UserWarning, match=UNFINISHED):
        made.validate(made.lightning_module, loader(), ckpt_path=early, verbose=False)
    with pytest.warns(UserWarning, match=UNFINISHED):
        made.predict(made.lightning_module, loader(), ckpt_path=early)
    if way == "reduce_bits":  # else widths are no integers, which exports refuse
        with pytest.warns(UserWarning, match=UNFINISHED):
            lq.save(unfinished, tmp_path / "packed.safetensors")
        with pytest.warns(UserWarning, match=UNFINISHED):
            lq.load(tmp_path / "packed.safetensors", tiny())
        with pytest.warns(UserWarning, match=UNFINISHED):
            lq.export_program(unfinished, dataset(2).tensors[0])
    # Nobody is warned of a finished one, loaded into the same module too.
    made.test(made.lightning_module, loader(), ckpt_path=late, verbose=False)
    assert not unfinished_widths(lq.load(late, load_from_checkpoint(Tiny, late)))


def test_a_state_dict_of_a_finished_network_has_no_other_keys(tmp_path):
    module, plain = tiny(), tiny()
    train(module, WAYS["reduce_bits"](), epochs=2, root=tmp_path)
    fit(plain, [Quantize(2, 2, fold_bn=False), FineTune()])
    assert list(module.state_dict()) == list(plain.state_dict())


def test_widths_that_are_set_by_hand_are_final(tmp_path):
    module = tiny()
    with pytest.warns(UserWarning, match=r"ReduceBits: the run ended .* 4 bits instead of 2\); train longer"):
        fit(module, WAYS["reduce_bits"](), max_epochs=0)
    assert unfinished_widths(module) == {"net.3.weight": (4.0, 2.0), "net.3.input": (4.0, 2.0)}
    lq.set_bits(module, {"net.3": 3}, {"net.3.input": 3})
    assert not unfinished_widths(module)


@pytest.mark.filterwarnings("ignore:.*The last model of the previous .fit. call will be used:UserWarning")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available:UserWarning")
def test_a_checkpoint_of_an_interrupted_run_says_so_and_goes_on(tmp_path):
    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == 4:
                raise RuntimeError("power is out")

    def run(module, *more, ckpt_path=None):
        stopper = EarlyStopping("train_loss", stopping_threshold=1e-9, strict=False)
        made = trainer(
            [*WAYS["reduce_bits"](), stopper, *more], max_epochs=4, enable_checkpointing=True, root=tmp_path / "root"
        )
        made.fit(module, loader(), ckpt_path=ckpt_path)
        return stopper

    saver, straight = OnExceptionCheckpoint(tmp_path), tiny()
    with pytest.raises(RuntimeError, match="power is out"):
        run(tiny(), Fails(), saver)
    run(straight)
    assert any(key.endswith("final_bits") for key in state_of(tmp_path / "on_exception.ckpt"))
    with pytest.warns(UserWarning, match=UNFINISHED):
        lq.load(tmp_path / "on_exception.ckpt", tiny())
    resumed = tiny(3)
    stopper = run(resumed, ckpt_path=tmp_path / "on_exception.ckpt")  # no warning
    assert stopper.stopping_threshold == 1e-9
    assert_same(dict(resumed.state_dict()), dict(straight.state_dict()))


def test_a_longer_run_that_goes_on_from_the_end_keeps_its_widths(tmp_path):
    seen = []

    class Widths(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append({b for q in quantizers(pl_module) for b in q.bits.detach().reshape(-1).tolist()})

    saver = ModelCheckpoint(tmp_path, save_last=True)
    train(tiny(), [*WAYS["reduce_bits"](), saver], epochs=2)
    chain = [*WAYS["reduce_bits"](), Widths()]
    fit(tiny(3), chain, max_epochs=20, ckpt_path=tmp_path / "last.ckpt")
    assert seen == [{2.0, 8.0}] * 72


# --- what is done to the network before or after training ---


def post_training(saver, *more, **options):
    module = tiny()
    made = trainer([saver, Quantize(4, 4), *more], max_epochs=0, enable_checkpointing=True, **options)
    made.fit(module, loader(), loader())
    return module, made


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, ["epoch=0-step=0.ckpt"]),
        ({"save_last": True}, ["epoch=0-step=0.ckpt", "last.ckpt"]),
        ({"save_last": "link"}, ["epoch=0-step=0.ckpt", "last.ckpt"]),
        ({"save_last": True, "save_top_k": 0}, ["last.ckpt"]),
        ({"save_top_k": -1, "filename": "mine-{epoch}"}, ["mine-epoch=0.ckpt"]),
        ({"monitor": "val_loss", "filename": "{val_loss:.2f}"}, ["val_loss=nan.ckpt"]),
        ({"monitor": "val_loss", "save_top_k": 3}, ["epoch=0-step=0.ckpt"]),
        ({"every_n_train_steps": 100, "save_weights_only": True}, ["epoch=0-step=0.ckpt"]),
        ({"save_top_k": 0}, []),
    ],
    ids=str,
)
def test_post_training_quantization_is_saved(options, files, tmp_path):
    saver = ModelCheckpoint(tmp_path, **options)
    module, made = post_training(saver)
    assert sorted(p.name for p in tmp_path.iterdir()) == files
    for name in files:
        assert_same(dict(load_from_checkpoint(Tiny, tmp_path / name).state_dict()), dict(module.state_dict()))
        assert_same(dict(lq.load(tmp_path / name, tiny(5)).state_dict()), dict(module.state_dict()))
    best = [name for name in files if name != "last.ckpt"]
    assert Path(saver.best_model_path).name == (best[0] if best else "")
    assert Path(saver.last_model_path).name == ("last.ckpt" if "last.ckpt" in files else "")
    state = dict(module.state_dict())
    for which, there in (("best", best), ("last", "last.ckpt" in files)):
        if there:
            other = tiny(5)
            made.test(other, loader(), ckpt_path=which, verbose=False)
            assert_same(dict(other.state_dict()), state)


@pytest.mark.filterwarnings("ignore:2 BatchNorms of Tiny were folded")
@pytest.mark.parametrize("tune", [lambda: [], lambda: [FineTune("ste")], lambda: [FineTune("lsq")]])
def test_training_goes_on_from_post_training_quantization(tune, tmp_path):
    module, _ = post_training(ModelCheckpoint(tmp_path, save_last=True), *tune())
    start, begun = {k: v.clone() for k, v in module.state_dict().items()}, {}

    class Begin(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            begun.update({k: v.clone() for k, v in pl_module.state_dict().items()})

    other = tiny(5)
    made = fit(other, [Quantize(4, 4), *tune(), Begin()], max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert made.global_step == 12
    assert_same(begun, start)


def test_lightnings_own_model_checkpoint_saves_too(tmp_path):
    module = tiny()
    made = trainer([Quantize(4, 4)], max_epochs=0, enable_checkpointing=True, root=tmp_path)
    made.fit(module, loader())
    assert Path(made.checkpoint_callback.best_model_path) == tmp_path / "checkpoints" / "epoch=0-step=0.ckpt"
    loaded = load_from_checkpoint(Tiny, made.checkpoint_callback.best_model_path)
    assert_same(dict(loaded.state_dict()), dict(module.state_dict()))


def test_a_second_fit_overwrites_its_own_file_alone(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    post_training(saver)
    module, _ = post_training(saver)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=0-step=0.ckpt", "last.ckpt"]
    post_training(ModelCheckpoint(tmp_path, save_last=True))  # another run leaves them
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "epoch=0-step=0-v1.ckpt", "epoch=0-step=0.ckpt", "last-v1.ckpt", "last.ckpt",
    ]  # fmt: skip
    assert_same(dict(load_from_checkpoint(Tiny, tmp_path / "last.ckpt").state_dict()), dict(module.state_dict()))


def test_writers_in_the_background_are_waited_for(tmp_path):
    saver = ModelCheckpoint(tmp_path, save_last=True)
    module, _ = post_training(saver, plugins=[AsyncCheckpointIO()])
    assert_same(dict(load_from_checkpoint(Tiny, saver.last_model_path).state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize("monitor", [None, "val_loss"])
def test_a_reconstruction_at_the_end_is_what_best_and_last_are(monitor, tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor=monitor, save_last=True)
    module, end = tiny(), Reconstruct(iterations=4, samples=16, when="end")
    made = train(module, [Quantize(3, 3), end, saver], epochs=2, root=tmp_path / "root")
    state = {k: v.clone() for k, v in module.state_dict().items()}
    files = {p.name: state_of(p) for p in tmp_path.glob("*.ckpt")}
    assert_same(dict(files[Path(saver.best_model_path).name]), state)
    assert_same(dict(files["last.ckpt"]), state)
    assert len(files) == (2 if monitor is None else 3)  # that of the best epoch stays, with its score
    if monitor is not None:
        (scored,) = saver.best_k_models
        assert not all(torch.equal(state_of(scored)[name], value) for name, value in state.items())
    again, other = tiny(5), Reconstruct(iterations=4, samples=16, when="end")
    fit(again, [Quantize(3, 3), other], max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert_same(dict(again.state_dict()), state)  # done is done
    made.test(again, loader(), ckpt_path="best", verbose=False)


def test_nothing_is_saved_where_nothing_is_to_be(tmp_path, capfd):
    for options in ({"fast_dev_run": True}, {"max_epochs": 0}):
        fit(tiny(), [Quantize(4, 4)], root=tmp_path, **options)
    made = trainer([Quantize(4, 4), ModelCheckpoint(tmp_path)], fast_dev_run=True, enable_checkpointing=True)
    made.fit(tiny(), loader())
    assert not list(tmp_path.rglob("*.ckpt"))


def messages(records):
    return [r.getMessage() for r in records if "in memory only" in r.getMessage()]


def test_without_a_checkpoint_it_is_said_what_to_call(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tiny(), [Quantize(4, 4)], max_epochs=0)
    (message,) = messages(caplog.records)
    assert "trainer.save_checkpoint('model.ckpt')" in message and "lq.save(module, 'model.safetensors')" in message
    caplog.clear()
    with caplog.at_level("INFO"):
        fit(tiny(), [Quantize(4, 4), ExportModel(tmp_path / "model.safetensors")], max_epochs=0)
        fit(tiny(), [Quantize(4, 4), FineTune()])  # trained: as Lightning does
    assert not messages(caplog.records)


def test_a_run_that_was_over_writes_nothing(tmp_path):
    train(tiny(), [Quantize(4, 4), FineTune(), ModelCheckpoint(tmp_path / "first", save_last=True)], epochs=1)
    saver = ModelCheckpoint(tmp_path / "second", save_last=True)
    made = trainer([Quantize(4, 4), FineTune(), saver], max_epochs=1, enable_checkpointing=True)
    made.fit(tiny(5), loader(), ckpt_path=tmp_path / "first" / "last.ckpt")
    assert not list(tmp_path.glob("second/*"))


SCRIPT = """
import sys

sys.path.insert(0, sys.argv[3])
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lq.callbacks import Quantize
from tests.helpers import fit, tiny

torch.set_num_threads(1)
ranks, out = int(sys.argv[1]), sys.argv[2]
saver, module = ModelCheckpoint(out, save_last=True), tiny()
made = fit(module, [Quantize(4, 4), saver], max_epochs=0, enable_checkpointing=True, devices=ranks, strategy="ddp")
torch.save((module.state_dict(), saver.best_model_path), f"{out}/rank-{made.global_rank}.pt")
made.strategy.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_ranks_save_once(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_on_ranks(script, 2, tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.ckpt")) == ["epoch=0-step=0.ckpt", "last.ckpt"]
    for rank in range(2):
        state, best = torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True)
        assert Path(best) == tmp_path / "epoch=0-step=0.ckpt"
        assert_same(dict(state_of(best)), dict(state))

"""`Quantize(prepare=)`: rescaling when fitting starts, what trains and what is saved afterwards."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

import lq
from lq.attachment.preparation.stored import rescalings
from lq.callbacks import Quantize, load_from_checkpoint
from tests.attachment.preparation.nets import uneven
from tests.helpers import QUIET, Tiny, fit, loader, run_on_ranks, trainer

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


class Normed(Tiny):
    """A tiny network with layer norms; one layer has no bias."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(36, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(),
            nn.LayerNorm(16), nn.Linear(16, 3, bias=False),
        )  # fmt: skip


def normed() -> Normed:
    torch.manual_seed(0)
    return uneven(Normed()).train()


def floats(module):
    return lq.detach(copy.deepcopy(module).eval())


X = next(iter(loader(32, 32)))[0]


def same(one, other) -> bool:
    with torch.no_grad():
        return bool((one(X) - other(X)).norm() < 1e-5 * other(X).norm())


def rescaled(module) -> list[str]:
    return list(rescalings(module))


def test_post_training():
    module = normed()
    fit(module, [Quantize(4, 4, prepare="auto", first_last=None)], max_epochs=0)
    assert rescaled(module) == ["net.2.weight", "net.5.weight"]
    assert same(floats(module), normed().eval())
    assert not torch.equal(module.net[2].weight, normed().net[2].weight)
    assert module.net[6].bias is None
    plain = normed()
    fit(plain, [Quantize(4, 4, first_last=None)], max_epochs=0)
    expected = normed().eval()(X).detach()
    with torch.no_grad():
        error = [float((one.eval()(X) - expected).norm()) for one in (module, plain)]
    assert error[0] < error[1]


def test_by_width():
    """ "auto" goes by the width of what is read: the last layer has 8 bits."""
    for choice, activations, names in (
        ("auto", 4, ["net.2.weight"]),
        (True, 4, ["net.2.weight", "net.5.weight"]),
        ("auto", 8, []),
        (True, 8, ["net.2.weight", "net.5.weight"]),
        ("auto", None, []),
        (False, 4, []),
    ):
        module = normed()
        fit(module, [Quantize(4, activations, prepare=choice)], max_epochs=0)
        assert rescaled(module) == names, (choice, activations)
        assert same(floats(module), normed().eval())


def test_training_and_checkpoints(tmp_path):
    module = normed()
    made = fit(module, [Quantize(4, 4, prepare=True)], max_epochs=1)
    assert rescaled(module)
    assert not same(floats(module), normed().eval())  # it has learned
    made.save_checkpoint(tmp_path / "last.ckpt")
    resumed, again = normed(), trainer([Quantize(4, 4, prepare=True)], max_epochs=1)
    again.fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert rescaled(resumed) == rescaled(module)
    assert same(resumed.eval(), module.eval())
    loaded = lq.load(tmp_path / "last.ckpt", normed())
    assert same(loaded.eval(), module.eval())
    loaded = load_from_checkpoint(Normed, tmp_path / "last.ckpt")
    assert same(loaded.eval(), module.eval())
    tested = normed()
    trainer([Quantize(4, 4)]).test(tested, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert same(tested.eval(), module.eval())


def test_averages():
    averaging = WeightAveraging()
    module = normed()
    module.hparams.lr = 0.0
    fit(module, [Quantize(4, 4, prepare=True), averaging], max_epochs=1)
    assert rescaled(module)
    assert same(floats(module), normed().eval())


def test_what_is_told(capfd, caplog):
    module, callback = normed(), Quantize(4, 4, prepare=True)
    with caplog.at_level("INFO"):
        fit(module, [callback], max_epochs=0)
    assert [pair.name for pair in callback.preparation.report.pairs] == ["net.2", "net.5"]
    assert "Quantize rescaled what 2 norms of Normed give" in caplog.text + capfd.readouterr().err


def test_wrong_arguments():
    with pytest.raises(lq.SpecError, match="prepare='always' is unknown; use True, False or 'auto'"):
        Quantize(4, 4, prepare="always")


def test_nothing_to_look_with(monkeypatch):
    for module in ("quantize", "trainer.structure"):
        monkeypatch.setattr(f"lq.callbacks.{module}.example_of", lambda *_: None)
    with pytest.raises(lq.DataError, match=r"Quantize\(prepare='auto'\) has to run Normed to see what reads its norms"):
        fit(normed(), [Quantize(4, 4, prepare="auto")], max_epochs=0)


SCRIPT = """
import sys

sys.path.insert(0, sys.argv[3])
import torch
from lq.callbacks import Quantize, load_from_checkpoint
from tests.callbacks.test_prepare import normed
from tests.helpers import dataset, fit
from torch.utils.data import DataLoader

torch.set_num_threads(1)
ranks, out = int(sys.argv[1]), sys.argv[2]
options = {"devices": ranks, "strategy": "ddp"} if ranks > 1 else {}
module = normed()
data = DataLoader(dataset(32), batch_size=16 // ranks)
made = fit(module, [Quantize(4, 4, prepare=True, calibration_samples=32)], data, max_epochs=0, **options)
torch.save(module.state_dict(), f"{out}/{ranks}-{made.global_rank}.pt")
if ranks > 1:
    made.strategy.barrier()
    torch.distributed.destroy_process_group()  # its threads must end before the interpreter does
"""


def test_two_ranks_prepare_as_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run_on_ranks(script, 1, tmp_path)
    run_on_ranks(script, 2, tmp_path)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert "net.lq_preparation_values" in one
    for key, value in one.items():
        assert torch.equal(first[key], second[key]), key
        assert torch.allclose(value.double(), first[key].double(), rtol=1e-5, equal_nan=True), key

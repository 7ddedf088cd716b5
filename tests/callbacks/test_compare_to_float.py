"""CompareToFloat in a Trainer: what it compares with, what it writes, what figures loggers get."""

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lq.callbacks import CompareToFloat, Quantize, Reconstruct
from lq.errors import SpecError, StateError
from lq.report.comparison import Comparison
from tests.helpers import QUIET, fit, tiny

pytestmark = [pytest.mark.filterwarnings(text) for text in QUIET]


def test_it_finds_the_planted_culprit(tmp_path):
    callback = CompareToFloat(save_to=tmp_path / "c.csv")
    quantize = Quantize(8, 8, overrides={"net.3": {"weights": 2}})
    fit(tiny(), [quantize, callback], max_epochs=0)
    assert callback.comparison.layers[0].name == "net.3" and callback.comparison.samples == 32
    assert (tmp_path / "c.csv").read_text().splitlines()[1].startswith("net.3,")
    assert Comparison.from_json((tmp_path / "c.json").read_text()) == callback.comparison


def test_the_weights_of_the_float_network():
    found = {}
    for weights in ("auto", "end"):
        torch.manual_seed(0)
        callback = CompareToFloat(weights=weights)
        fit(tiny(), [Quantize(3, 8, first_last=None), Reconstruct(iterations=3), callback], max_epochs=0)
        found[weights] = callback.comparison
    own = {w: [p.sqnr for layer in one.layers for p in layer.parts if p.is_weight] for w, one in found.items()}
    assert min(own["end"]) > 100  # levels already
    assert max(own["auto"]) < 40


def test_a_second_fit_and_another_module():
    callback = CompareToFloat()
    module = tiny()
    fit(module, [Quantize(), callback], max_epochs=0)
    first = callback.comparison
    fit(module, [Quantize(), callback], max_epochs=1)
    assert callback.comparison is not first
    fit(tiny(seed=1), [Quantize(2, 8, first_last=None), callback], max_epochs=0)
    assert callback.comparison.layers[0].alone.sqnr < 15


def test_its_state():
    callback = CompareToFloat()
    fit(tiny(), [Quantize(), callback], max_epochs=0)
    other = CompareToFloat()
    other.load_state_dict(callback.state_dict())
    assert other.comparison == callback.comparison


def test_loggers(tmp_path):
    pytest.importorskip("matplotlib")
    figures, images = [], []

    class Board(CSVLogger):
        def __init__(self, root):
            super().__init__(root)
            self.experiment.add_figure = lambda name, figure, global_step: figures.append((name, global_step))

    class Images(CSVLogger):
        def log_image(self, key, images, step):
            add(key, images[0].shape[2])

    def add(*what):
        images.append(what)

    plain = CSVLogger(tmp_path, name="plain")
    logger = [Board(tmp_path / "board"), Images(tmp_path / "images"), plain]
    fit(tiny(), [Quantize(), CompareToFloat()], logger=logger, log_every_n_steps=1)
    assert figures == [("comparison", 4)] and images == [("comparison", 3)]
    rows = (tmp_path / "plain" / "version_0" / "metrics.csv").read_text()
    assert "comparison/network_sqnr" in rows and "4" in rows.splitlines()[-1].split(",")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"samples": 0}, "samples=0"), ({"weights": "both"}, "weights='both' is unknown"), ({"memory": -1}, "memory=-1")],
)
def test_wrong_arguments(arguments, text):
    with pytest.raises(SpecError, match=text):
        CompareToFloat(**arguments)


def test_it_needs_quantizers():
    with pytest.raises(StateError, match="CompareToFloat needs a model with quantizers"):
        fit(tiny(), [CompareToFloat()])
